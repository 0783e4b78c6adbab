"""Compiled row kernels, each instruction set by name, through token_logp and by themselves."""
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

from functools import partial

import pytest
import torch

import tercet._rows as _rows
from tercet.kernels import _row_softmax as rs
from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels import token_logp
from tercet.kernels._row_softmax_triton import Rows, rows_of
from tercet.kernels.reference import token_logp_ref

DTYPES = list(compiled.DTYPES)
CHUNK = 64  # floats that the AVX-512 loop takes at a time


@pytest.fixture(params=compiled.INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Every compiled row runs this instruction set."""
    calls = []
    for name in ("forward", "backward"):
        one = partial(getattr(compiled, name), instruction_set=request.param)
        monkeypatch.setattr(
            compiled, name, lambda *a, f=one, n=name, **k: (calls.append(n), f(*a, **k))
        )
    yield request.param
    assert calls, "no compiled row ran"


def both(logits, targets, op=token_logp, **options):
    out = op(logits, targets, return_entropy=True, **options)
    return torch.cat([out.logp.flatten(), out.entropy.flatten()])


def judge_both(judge, logits, targets, **options):
    dy = torch.randn(targets.numel() + logits.shape[:-1].numel())
    ours = partial(both, targets=targets, **options)
    judge(ours, partial(both, targets=targets, op=token_logp_ref, **options), [logits], dy)


def test_auto_is_what_runs(instruction_set):
    assert instruction_set in ("portable", "avx2", "avx512")
    token_logp(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width_around_the_vectors(instruction_set, dtype, judge):
    for vocab in range(1, CHUNK + 7):
        logits = torch.randn(19, vocab).mul_(3).to(dtype)
        judge_both(judge, logits, torch.randint(vocab, (19,)), temperature=0.8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [4096, 4097, 3 * 4096 + CHUNK + 1])
def test_rows_of_many_chunks(instruction_set, vocab, dtype, judge):
    logits = torch.randn(2, 3, vocab).mul_(4).to(dtype)
    temperature = torch.rand(2, 3) + 0.5
    judge_both(judge, logits, torch.randint(vocab, (2, 3, 4)), temperature=temperature)


def test_rising_and_falling_rows(instruction_set, judge):
    row = torch.linspace(-60, 60, 5000)
    judge_both(judge, torch.stack([row, row.flip(0)]), torch.tensor([4100, 5]))


@pytest.mark.parametrize("offset", [-1e4, 0.0, 3e4])
def test_far_from_zero(instruction_set, offset, judge):
    logits = (torch.randn(3, 600) * 8).round() / 8 + offset
    logits[2] = offset
    judge_both(judge, logits, torch.tensor([0, 599, 64]))


@pytest.mark.parametrize("gap", [5.0, 12.0, 25.0, 60.0])
def test_peaked_rows_keep_relative_precision(instruction_set, gap):
    logits = torch.randn(1, 301)
    logits[0, 77] = gap + 4
    e = (logits.double() - logits[0, 77].double()).exp().scatter(1, torch.tensor([[77]]), 0.0)
    leaf = logits.requires_grad_()
    logp = token_logp(leaf, torch.tensor([77])).logp
    dx = torch.autograd.grad(logp.sum(), leaf)[0].double()
    rest = e.sum()
    expected = -e / (1 + rest)
    expected[0, 77] = rest / (1 + rest)
    assert float((logp.detach() / -rest.log1p() - 1).abs()) < 1e-6
    assert float((dx / expected - 1).abs().max()) < 1e-5


def test_masked_vocabulary_and_nan(instruction_set):
    logits = torch.randn(4, 700)
    targets = torch.tensor([650, 3, 3, 640])
    logits[0, :640] = -torch.inf
    logits[1, 699] = torch.nan
    logits[2] = -torch.inf
    logits[3, 20] = torch.inf
    out = token_logp(logits.requires_grad_(), targets, return_entropy=True)
    assert out.entropy is not None
    assert out.logp.isnan().tolist() == [False, True, True, True]
    small = token_logp_ref(logits[:1, 640:].double(), targets[:1] - 640, return_entropy=True)
    assert small.entropy is not None
    torch.testing.assert_close(out.logp[:1].double(), small.logp)
    torch.testing.assert_close(out.entropy[:1].double(), small.entropy)
    dx = torch.autograd.grad(out.logp, logits, torch.tensor([1.0, 1.0, 0.0, 0.0]))[0]
    assert (dx[0, :640] == 0).all()
    assert dx[1, torch.arange(700) != 3].isnan().all()
    assert (dx[2:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_misaligned_rows_give_the_same_bits(instruction_set, dtype, fwd_bwd):
    x = torch.randn(3, 5, 301).to(dtype)
    fn = partial(both, targets=torch.randint(301, (3, 5)))
    dy = torch.randn(30)
    expected = fwd_bwd(fn, [x], dy)
    padded = torch.full((3, 6, 304), torch.nan, dtype=dtype)
    padded[:, :5, :301] = x
    shifted = torch.zeros(x.numel() + 1, dtype=dtype)
    shifted[1:] = x.flatten()
    time_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (padded[:, :5, :301], shifted[1:].view(x.shape), time_first):
        for got, want in zip(fwd_bwd(fn, [other], dy), expected, strict=True):
            assert torch.equal(got, want)


def test_threads_change_no_bit(instruction_set, fwd_bwd):
    logits = torch.randn(61, 9001)
    fn = partial(both, targets=torch.randint(9001, (61,)))
    dy = torch.randn(122)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fwd_bwd(fn, [logits], dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


def _state(rows, query):
    state = rs.empty_state(query)
    assert len(state.picked) == rows
    return state


def test_tiles_and_targets_at_their_edges(instruction_set):
    x = torch.randn(3, 300)
    targets = torch.tensor([[0, 99, 100], [199, 200, 299], [150, 150, 3]])
    query = rs.Query(targets, torch.full((3,), 0.7))
    whole, parts = _state(3, query), _state(3, query)
    compiled.forward(x, rows_of("t", "x", x), *query, whole, first_column=0, entropy=True)
    for first in (0, 100, 200):
        tile = x[:, first : first + 100]
        at = rows_of("t", "x", tile)
        compiled.forward(tile, at, *query, parts, first_column=first, entropy=True)
    torch.testing.assert_close(parts.stats, whole.stats, rtol=1e-6, atol=0)
    assert torch.equal(parts.picked, x.gather(1, targets))
    result = rs.finish(whole, query)
    grads = rs.row_grads(result, query, torch.randn(3, 3), torch.randn(3))
    pair = (grads.coef, grads.target)
    expected = torch.full_like(x, torch.nan)
    compiled.backward(
        expected, x, rows_of("t", "x", x), targets, pair, first_column=0, entropy=True
    )
    for first in (0, 100, 200):
        tile = x[:, first : first + 100].clone()
        at = rows_of("t", "x", tile)
        compiled.backward(tile, tile, at, targets, pair, first_column=first, entropy=True)
        assert torch.equal(tile, expected[:, first : first + 100])
    truth = torch.full_like(x, torch.nan)
    rs.grad_tile(truth, x, query, grads, first_column=0, scratch=torch.empty_like(x))
    torch.testing.assert_close(expected, truth, rtol=1e-5, atol=1e-6)


def test_no_entropy_leaves_spread_alone(instruction_set):
    x = torch.randn(2, 90)
    query = rs.Query(torch.zeros(2, 1, dtype=torch.long), torch.ones(2))
    state = _state(2, query)
    state.stats[2] = 7.0
    compiled.forward(x, rows_of("t", "x", x), *query, state, first_column=0, entropy=False)
    assert (state.stats[2] == 7.0).all()


def _tile(rows=2, vocab=6):
    x = torch.randn(rows, vocab)
    query = rs.Query(torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows))
    return x, query, rs.empty_state(query)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 6).double()}, TypeError, "x must be .*got torch.float64"),
        ({"x": torch.zeros(6, 2).T}, ValueError, "x needs unit stride along its last axis"),
        ({"rows": Rows(3, 3, 0, 6)}, ValueError, "rows of x must lie inside it"),
        ({"rows": Rows(2, 2, 0, 7)}, ValueError, "rows of x must lie inside it"),
        ({"targets": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "targets must be a contig"),
        ({"targets": torch.zeros(1, 1, dtype=torch.long)}, ValueError, r"targets .*\(2, 1\)"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be .*\(2,\) on a CPU, got"),
        ({"scale": torch.ones(4)[::2]}, ValueError, r"scale must be a contiguous.*strides \(2,\)"),
        ({"stats": torch.zeros(3, 3)}, ValueError, "maximum must be a contiguous"),
        ({"picked": torch.zeros(2, 2)}, ValueError, "picked must be a contiguous"),
        ({"instruction_set": "mmx"}, ValueError, "instruction_set .* got mmx"),
    ],
)
def test_rejects(change, error, match):
    x, query, state = _tile()
    given = {
        "x": x, "rows": Rows(2, 2, 0, 6), "targets": query.targets, "scale": query.scale,
        "stats": state.stats, "picked": state.picked, "instruction_set": "",
    }  # fmt: skip
    given |= change
    with pytest.raises(error, match=match):
        compiled.forward(
            given["x"], given["rows"], given["targets"], given["scale"],
            (given["stats"], given["picked"]), first_column=0, entropy=True,
            instruction_set=given["instruction_set"],
        )  # fmt: skip


def test_rejects_a_gradient_of_another_layout():
    x, query, _ = _tile()
    pair = (torch.zeros(5, 2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="dx must be a contiguous"):
        compiled.backward(
            torch.zeros(6, 2).T, x, rows_of("t", "x", x), query.targets, pair,
            first_column=0, entropy=False,
        )  # fmt: skip


def test_the_binding_refuses_null_and_negative():
    good = {
        "x": 0, "type": _rows.RowType.float32, "layout": (1, 0, 0), "rows": 1, "columns": 4,
        "first_column": 0, "targets": 0, "num_targets": 0, "scale": 0, "maximum": 0, "rest": 0,
        "spread": None, "picked": 0, "num_threads": 1, "instruction_set": "",
    }  # fmt: skip
    with pytest.raises(ValueError, match="x must not be null"):
        _rows.forward(**good)
    with pytest.raises(ValueError, match="must be >= 0"):
        _rows.forward(**good | {"rows": -1})
    with pytest.raises(ValueError, match="num_threads must be >= 1, got 0"):
        _rows.forward(**good | {"rows": 0, "num_threads": 0})
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _rows.forward(**good | {"x": -8})
    _rows.forward(**good | {"rows": 0})


def test_torch_and_the_rows_share_one_openmp_runtime():
    """Two of them would leave each other's threads spinning."""
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) <= 1, runtimes
