"""linear_logp with its vocabulary cut over two processes, against the whole one in float64."""
# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportPrivateImportUsage=false

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tercet.kernels import _linear_tiles as tiles
from tercet.kernels import linear_logp
from tercet.kernels._vocab_shards import check_group
from tercet.kernels.reference import linear_logp_ref

VOCAB, CUT, HIDDEN, ROWS = 300, 187, 24, 37
IMPLS = ("triton", "torch", "auto")


class Problem(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    targets: torch.Tensor
    dy: torch.Tensor  # of the log-probs, then of the entropies
    options: dict[str, Any]
    budget: int = 40  # KiB


def _problem(num_targets=1, dtype=torch.float32, spread=3.0, budget=40, **options) -> Problem:
    weight = torch.randn(VOCAB, HIDDEN).mul_(spread * HIDDEN**-0.5)
    targets = torch.randint(VOCAB, (ROWS, num_targets))
    targets[:2, 0] = torch.tensor([CUT - 1, CUT])  # both sides of the cut
    if num_targets > 1:
        targets[4, -1] = targets[4, 0]
    return Problem(
        torch.randn(ROWS, HIDDEN).to(dtype), weight.to(dtype), torch.randn(VOCAB).to(dtype),
        targets if num_targets > 1 else targets[:, 0], torch.randn(ROWS * (num_targets + 1)),
        options, budget,
    )  # fmt: skip


def _masked_shard() -> Problem:
    problem = _problem()
    problem.bias[CUT:] = -torch.inf
    return problem._replace(targets=problem.targets % CUT)


def _masked_vocabulary_beside_the_cut() -> Problem:
    problem = _problem(num_targets=2)
    problem.bias[100 : CUT + 60] = -torch.inf
    return problem._replace(targets=problem.targets % 50 + CUT + 60)


def _ties() -> Problem:
    """The likeliest tokens of every row are one on each rank, with equal logits."""
    problem = _problem()
    problem.bias[[3, CUT + 5]] = 30.0
    problem.weight[CUT + 5] = problem.weight[3]
    return problem


def _far_apart() -> Problem:
    problem = _problem()
    problem.bias[:CUT] -= 1e6
    return problem._replace(targets=problem.targets % (VOCAB - CUT) + CUT)


def _peaked() -> Problem:
    problem = _problem()
    problem.bias[CUT + 5] = 28.0
    return problem._replace(targets=torch.full((ROWS,), CUT + 5))


def _dead_rows() -> Problem:
    problem = _problem(budget=30)
    dead = torch.rand(ROWS) < 0.5
    dead[16:32] = True
    problem.dy.view(2, ROWS)[:, dead] = 0.0
    return problem


def _all_dead() -> Problem:
    problem = _problem()
    return problem._replace(dy=torch.zeros_like(problem.dy))


PROBLEMS = {
    "one target": _problem,
    "several targets": partial(_problem, num_targets=4),
    "nothing kept": partial(_problem, budget=12),
    "all kept": partial(_problem, budget=4096),
    "scalar temperature": partial(_problem, temperature=0.6),
    "softcap and logit_scale": partial(_problem, spread=12.0, softcap=4.0, logit_scale=0.5),
    "float64": partial(_problem, dtype=torch.float64),
    "bfloat16": partial(_problem, dtype=torch.bfloat16),
    "a masked shard": _masked_shard,
    "masked vocabulary": _masked_vocabulary_beside_the_cut,
    "ties": _ties,
    "far apart": _far_apart,
    "peaked": _peaked,
    "dead rows": _dead_rows,
    "all dead": _all_dead,
}
CASES = [
    (name, impl)
    for name in PROBLEMS
    for impl in IMPLS
    if impl != "triton" or PROBLEMS[name] is not PROBLEMS["float64"]
]


def make(name: str) -> Problem:
    torch.manual_seed(list(PROBLEMS).index(name))
    return PROBLEMS[name]()


def run(op, problem: Problem, rows: slice, dtype=None, **options) -> list[torch.Tensor]:
    """Log-probs, entropies and the gradients of hidden, weight[rows] and bias[rows]."""
    tensors = (problem.hidden, problem.weight[rows], problem.bias[rows])
    leaves = [x.to(dtype or x.dtype, copy=True).requires_grad_() for x in tensors]
    out = op(
        *leaves[:2], problem.targets, bias=leaves[2], return_entropy=True,
        **problem.options, **options,
    )  # fmt: skip
    y = torch.cat([out.logp.flatten(), out.entropy.flatten()])
    return [y.detach(), *torch.autograd.grad(y, leaves, problem.dy.to(y.dtype))]


def _error_of(call) -> str:
    try:
        call()
    except IndexError as error:
        return f"IndexError: {error}"
    return "no error"


def _compiled(rows: slice, group) -> list[list[torch.Tensor]]:
    problem = make("one target")
    options = {"group": group, "vocab_start": rows.start, "impl": "torch"}

    def loss(hidden, weight):
        out = linear_logp(hidden * 2, weight, problem.targets, return_entropy=True, **options)
        return (out.logp * out.entropy).sum()

    found = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [problem.hidden.clone(), problem.weight[rows].clone()]
        leaves = [x.requires_grad_() for x in leaves]
        found.append(list(torch.autograd.grad(fn(*leaves), leaves)))
    return found


def _main(rank: int, folder: Path) -> None:
    """What each rank finds, as a file; rank 1 holds the first tokens, so that order shows."""
    torch.set_num_threads(1)
    tiles.CPU_TILE_BYTES, tiles.CPU_HEIGHT, tiles.MEBI = 8192, 16, 1024
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    rows = slice(0, CUT) if rank == 1 else slice(CUT, VOCAB)
    op = partial(linear_logp, group=group, vocab_start=rows.start)
    found: dict[Any, Any] = {}
    for name, impl in CASES:
        problem = make(name)
        again = [run(op, problem, rows, impl=impl, memory_budget_mb=problem.budget)]
        again += [run(op, problem, rows, impl=impl, memory_budget_mb=problem.budget)]
        found[name, impl] = again
    problem = make("one target")
    frozen = problem.weight[rows].clone().requires_grad_()
    logp = op(problem.hidden, frozen, problem.targets).logp
    found["frozen hidden"] = torch.autograd.grad(logp, frozen, problem.dy[:ROWS])[0]
    nan = problem.hidden.clone()
    nan[3] = torch.nan if rank == 0 else 1.0
    for impl in IMPLS:
        found["nan", impl] = op(nan, frozen, problem.targets, return_entropy=True, impl=impl)
    none = op(problem.hidden[:0].requires_grad_(), frozen, problem.targets[:0]).logp
    found["no rows"] = torch.autograd.grad(none.sum(), frozen)[0]
    head = problem.hidden, problem.weight[rows]
    found["beyond"] = _error_of(lambda: op(*head, problem.targets + VOCAB))
    found["negative"] = _error_of(lambda: op(*head, problem.targets - VOCAB))
    overlap = linear_logp, problem.hidden, problem.weight[: CUT + 20]
    found["twice"] = _error_of(
        lambda: partial(*overlap)(problem.targets * 0 + CUT, group=group, vocab_start=0)
    )
    found["compiled"] = _compiled(rows, group)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[Any, Any]]:
    """What two processes found; [0] holds the tokens from CUT on, [1] those before."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(rank), str(folder)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def whole(ranks, key) -> list[torch.Tensor]:
    """The results of both ranks as those of one, after checking what both must have alike."""
    upper, lower = ranks[0][key][0], ranks[1][key][0]
    for of_one, of_other in zip(upper[:2], lower[:2], strict=True):
        torch.testing.assert_close(of_one, of_other, rtol=0, atol=0, equal_nan=True)
    pairs = zip(lower[2:], upper[2:], strict=True)
    return [*upper[:2], *(torch.cat(pair) for pair in pairs)]


@pytest.mark.parametrize(("name", "impl"), CASES, ids=str)
def test_matches_the_whole_in_float64(ranks, name, impl):
    problem, everything = make(name), slice(None)
    problem.bias.clamp_(min=-1e6)  # the gradient of the definition is 0 times -inf
    truth = run(linear_logp_ref, problem, everything, dtype=torch.float64)
    eager = run(linear_logp_ref, problem, everything)
    ours = whole(ranks, (name, impl))
    cut = 2.0**-8 if problem.hidden.dtype == torch.bfloat16 else 0.0  # the interpreter's rounding
    parts = ("y", "dhidden", "dweight", "dbias")
    for part, right, usual, got in zip(parts, truth, eager, ours, strict=True):
        assert got.shape == right.shape
        assert got.isfinite().all()
        allowed = 2 * (usual.double() - right).abs().max() + 2e-6
        error = ((got.double() - right).abs() - cut * right.abs()).max()
        assert error <= allowed, f"{part}: error {error:.2e}, eager has {allowed / 2:.2e}"
    logp = ours[0][: problem.targets.numel()]
    assert (logp <= 0).all()


@pytest.mark.parametrize(("name", "impl"), CASES, ids=str)
def test_same_bits_on_every_run(ranks, name, impl):
    for found in ranks:
        for one, two in zip(*found[name, impl], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_upstream_get_zeros(ranks, impl):
    dead = (make("dead rows").dy.view(2, ROWS) == 0).all(0)
    assert 0 < dead.sum() < ROWS
    assert (whole(ranks, ("dead rows", impl))[1][dead] == 0).all()
    for grad in whole(ranks, ("all dead", impl))[1:]:
        assert (grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_target_far_above_the_other_shard_keeps_its_precision(ranks, impl):
    """The other rank's share is exactly 0, so the result is that of the shard alone."""
    problem = make("far apart")
    y = whole(ranks, ("far apart", impl))[0]
    alone = linear_logp_ref(
        problem.hidden.double(), problem.weight[CUT:].double(), problem.targets - CUT,
        bias=problem.bias[CUT:].double(), return_entropy=True,
    )  # fmt: skip
    expected = torch.cat([alone.logp, alone.entropy])
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_peaked_softmax_keeps_relative_precision(ranks, impl):
    """The likeliest token is on one rank, what is left of the probability on both."""
    problem = make("peaked")
    y = whole(ranks, ("peaked", impl))[0]
    logits = problem.hidden.double() @ problem.weight.double().T + problem.bias.double()
    logits[:, CUT + 5], top = -torch.inf, logits[:, CUT + 5].clone()
    rest = (logits - top[:, None]).exp().sum(1)
    assert float((y[:ROWS].double() / -rest.log1p() - 1).abs().max()) < 1e-4


def test_frozen_hidden(ranks):
    problem = make("one target")
    weight = problem.weight.double().requires_grad_()
    logp = linear_logp_ref(problem.hidden.double(), weight, problem.targets).logp
    expected = torch.autograd.grad(logp, weight, problem.dy[:ROWS].double())[0]
    got = torch.cat([ranks[1]["frozen hidden"], ranks[0]["frozen hidden"]])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_on_one_rank_reaches_all(ranks, impl):
    for found in ranks:
        for out in found["nan", impl]:
            assert out.isnan().nonzero().tolist() == [[3]]


def test_no_rows(ranks):
    for found in ranks:
        assert (found["no rows"] == 0).all()


def test_targets_that_no_shard_or_several_hold(ranks):
    first = int(make("one target").targets[0])
    for found in ranks:
        start = "IndexError: linear_logp: every target must lie in the shard"
        assert found["beyond"].startswith(start)
        assert f"got {first + VOCAB}, which 0 ranks hold" in found["beyond"]
        assert f"got {first - VOCAB}, which 0 ranks hold" in found["negative"]
        assert f"got {CUT}, which 2 ranks hold" in found["twice"]


def test_compiles_without_graph_break(ranks):
    for found in ranks:
        for eager, compiled in zip(*found["compiled"], strict=True):
            torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize(
    ("group", "start", "error", "match"),
    [
        (None, 0, ValueError, "must be given together, got group=None and vocab_start=0"),
        ("world", None, ValueError, "must be given together, got group=world and vocab_start=None"),
        ("world", 0, TypeError, "group must be a ProcessGroup, got str"),
    ],
)
def test_rejects(group, start, error, match):
    with pytest.raises(error, match=f"linear_logp: .*{match}"):
        linear_logp(
            torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(2, dtype=torch.long),
            group=group, vocab_start=start,
        )  # fmt: skip


def test_rejects_a_start_that_is_no_place():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="op: vocab_start must be >= 0, got -1"):
            check_group("op", dist.group.WORLD, -1)
        with pytest.raises(TypeError, match=r"vocab_start must be a whole number, got 1\.0"):
            check_group("op", dist.group.WORLD, 1.0)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
