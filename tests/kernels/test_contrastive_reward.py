"""contrastive_reward: Triton (interpreted without a GPU) and PyTorch, against float64."""

import math
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from tercet.kernels import _contrastive_reward_triton as kernels
from tercet.kernels import contrastive_reward
from tercet.kernels.reference import contrastive_reward_ref

module = import_module("tercet.kernels.contrastive_reward")  # the package re-exports its function
IMPLS = ["triton", "torch"]
MODES = [(f, r) for f in ("sum", "info_nce") for r in ("query", "document")]
MODE_IDS = ["-".join(mode) for mode in MODES]
SHAPES = [  # groups, rollouts, hidden, negatives (None: not given)
    (1, 1, 1, None),
    (3, 1, 5, 0),
    (2, 8, 64, 1),
    (9, 3, 65, 3),  # odd everything
    (65, 2, 16, None),  # one group more than a tile of rows
    (3, 70, 8, 1),  # a group wider than a tile of columns
    (2, 70, 150, 2),  # and longer than one pass over it
]

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_mode = pytest.mark.parametrize(("form", "repulsion"), MODES, ids=MODE_IDS)
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter, on NaN


def batch(groups, rollouts, hidden, negatives, *, device, dtype=torch.float32) -> tuple[Any, ...]:
    """Rollouts, queries and negatives (or None) of very different lengths."""
    d = torch.randn(groups, rollouts, hidden, device=device)
    d = d * torch.rand(groups, rollouts, 1, device=device).mul(4).exp()
    q = torch.randn(groups, hidden, device=device) * 7
    n = None if negatives is None else torch.randn(groups, negatives, hidden, device=device)
    return d.to(dtype), q.to(dtype), None if n is None else n.to(dtype)


def judge(impl, inputs, **options):
    """Our error in every field must be at most twice eager's, plus 2e-6 / temperature."""
    double: list[Any] = [None if x is None else x.double() for x in inputs]
    truth = contrastive_reward_ref(*double, **options)
    eager = contrastive_reward_ref(*inputs, **options)
    ours = contrastive_reward(*inputs, **options, impl=impl)
    for name, t, e, o in zip(truth._fields, truth, eager, ours, strict=True):
        assert o.shape == t.shape
        assert o.dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
        slack = 2e-6 / (options.get("temperature", 0.1) if name == "total" else 1)
        if not t.numel():
            continue
        our_error, eager_error = (o.double() - t).abs().max(), (e.double() - t).abs().max()
        assert our_error <= 2 * eager_error + slack, (
            f"{name}: error {our_error:.2e}, eager has {eager_error:.2e}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_mode
@every_impl
def test_matches_float64(impl, form, repulsion, shape, device):
    judge(impl, batch(*shape, device=device), form=form, repulsion=repulsion)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in IMPLS for dtype in (torch.float16, torch.bfloat16)]
    + [("torch", torch.float64)],  # Triton refuses it
    ids=str,
)
@every_mode
def test_dtypes(impl, form, repulsion, dtype, device):
    inputs = batch(5, 3, 33, 2, device=device, dtype=dtype)
    judge(impl, inputs, form=form, repulsion=repulsion)


@every_mode
@every_impl
def test_options_and_group_ids(impl, form, repulsion, device):
    judge(
        impl,
        batch(7, 4, 16, 2, device=device),
        form=form,
        repulsion=repulsion,
        temperature=0.3,
        negative_weight=0.7,
        consistency_weight=0.5,
        hard_weight=0.9,
        group_ids=torch.tensor([4, -1, 4, 2**40, 7, 4, 2**40], device=device),
    )


@pytest.mark.parametrize("programs", [1, 4, 1000], ids=["one share", "some", "a share per tile"])
@every_mode
def test_many_tiles_in_shares(form, repulsion, programs, device, monkeypatch):
    """Running maxima and sums over tiles of one share, and over shares; groups cut by a tile."""
    monkeypatch.setattr(kernels, "BLOCK_R", 16)
    monkeypatch.setattr(kernels, "BLOCK_C", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    for rollouts in (3, 20):
        ids = torch.arange(11, device=device) // 2
        inputs = batch(11, rollouts, 24, 1, device=device)
        judge("triton", inputs, form=form, repulsion=repulsion, group_ids=ids)


@pytest.mark.parametrize("order", ["growing", "falling"])
@pytest.mark.parametrize("repulsion", ["query", "document"])
@every_impl
def test_running_maximum_of_the_log_sum(impl, repulsion, order, device, monkeypatch):
    """At a low temperature each tile's cosines tower above (or vanish under) the last one's."""
    monkeypatch.setattr(kernels, "BLOCK_R", 16)
    monkeypatch.setattr(kernels, "BLOCK_C", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # two shares of two tiles
    monkeypatch.setattr(module, "MAX_TILE", 64)  # chunks of few groups
    angles = torch.linspace(0, 3, 64, device=device)
    angles = angles if order == "growing" else angles.flip(0)
    fan = torch.stack((angles.cos(), angles.sin()), dim=-1)
    here = torch.tensor([-1.0, 0.0], device=device).expand(64, 2)  # nearest to the end of the fan
    d, q = (fan[:, None], here) if repulsion == "query" else (here[:, None], fan)
    judge(impl, (d, q, None), form="info_nce", repulsion=repulsion, temperature=0.01)


@pytest.mark.parametrize("repulsion", ["query", "document"])
@every_impl
def test_negatives_far_above_the_positive(impl, repulsion, device):
    d = torch.tensor([[[-1.0, 0.0]]], device=device).expand(2, 1, 2)
    q = -d[:, 0]
    n = (q if repulsion == "query" else d[:, 0])[:, None]
    judge(impl, (d, q, n), form="info_nce", repulsion=repulsion, temperature=0.01)


@pytest.mark.parametrize("where", range(6))
@every_impl
def test_the_nearest_rollout_of_a_group_counts_wherever_it_is(impl, where, device, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_C", 16)
    d = torch.zeros(2, 20, 2, device=device)
    d[..., 0] = -1.0  # opposite to the queries
    d[:, where * 4 - 1] = torch.tensor([0.6, 0.8], device=device)
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=device)
    hard = contrastive_reward(d, q, impl=impl).hard
    torch.testing.assert_close(hard, torch.full_like(hard, -0.6))


@every_impl
def test_golden(impl, device):
    """Unit vectors of the plane, by angle: queries 0, 90; rollouts 30, -10 | 60, 135."""

    def at(*degrees):
        angles = torch.tensor(degrees, device=device).deg2rad()
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    d, q, n = torch.stack((at(30.0, -10.0), at(60.0, 135.0))), at(0.0, 90.0), at(80.0, 20.0)
    r = contrastive_reward(d, q, n[:, None], impl=impl)
    expected = {
        "total": [[7.45586, 8.64369], [4.75769, 3.16850]],
        "positive": [[0.866025, 0.984808], [0.866025, 0.707107]],
        "negative": [[-0.173648] * 2, [-0.342020] * 2],
        "consistency": [[0.766044] * 2, [0.258819] * 2],
        "hard": [[-0.5] * 2] * 2,
    }
    for name, values in expected.items():
        wanted = torch.tensor(values, device=device)
        torch.testing.assert_close(getattr(r, name), wanted, rtol=0, atol=1e-5)
    r = contrastive_reward(d, q, repulsion="document", impl=impl)
    unsupervised = torch.tensor([[9.19234, 11.72746], [8.17789, 9.00292]], device=device)
    torch.testing.assert_close(r.total, unsupervised, rtol=0, atol=1e-5)


@every_impl
def test_info_nce_is_a_log_softmax_plus_the_log_of_the_candidates(impl, device):
    d, q, n = batch(4, 3, 8, 2, device=device)
    r = contrastive_reward(d, q, n, form="info_nce", repulsion="document", impl=impl)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (d, q, n)]
    for i in range(4):
        others = unit[1][[j for j in range(4) if j != i]]
        candidates = torch.cat((unit[1][i : i + 1], others, unit[2][i]))
        logits = unit[0][i] @ candidates.T / 0.1
        expected = logits.log_softmax(-1)[:, 0] + math.log(6)
        torch.testing.assert_close(r.total[i] - 0.2 * r.consistency[i] / 0.1, expected)


@NUMPY_WARNS
@pytest.mark.parametrize(
    ("which", "bad"),
    [(0, math.nan), (0, math.inf), (1, math.nan), (2, math.nan)],
    ids=["nan rollout", "inf rollout", "nan query", "nan negative"],
)
@every_mode
@every_impl
def test_nan_spoils_what_depends_on_it_and_nothing_else(impl, form, repulsion, bad, which, device):
    ids = torch.tensor([0, 1, 1, 2, 0], device=device)
    inputs = batch(5, 3, 20, 2, device=device)
    inputs[which].view(5, -1)[1, 7] = bad
    expected = contrastive_reward_ref(*inputs, form=form, repulsion=repulsion, group_ids=ids)
    got = contrastive_reward(*inputs, form=form, repulsion=repulsion, group_ids=ids, impl=impl)
    for name, e, g in zip(expected._fields, expected, got, strict=True):
        assert g.isnan().any(dim=1).tolist() == e.isnan().any(dim=1).tolist(), name
        assert torch.equal(g.isnan(), e.isnan()), name
    assert got.total.isfinite().any() or which != 2  # a negative belongs to one group


@NUMPY_WARNS
@every_impl
def test_nan_in_a_group_of_the_same_text_does_not_repel(impl, device):
    d, q, _ = batch(3, 2, 8, None, device=device)
    d[1] = math.nan
    ids = torch.zeros(3, dtype=torch.int32, device=device)
    r = contrastive_reward(d, q, group_ids=ids, impl=impl)
    assert r.total.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@every_mode
@every_impl
def test_one_group_is_not_repelled(impl, form, repulsion, device):
    d, q, _ = batch(3, 4, 8, None, device=device)
    options = {"form": form, "repulsion": repulsion, "impl": impl}
    alone = contrastive_reward(d[:1], q[:1], **options)
    same_text = contrastive_reward(d, q, group_ids=torch.full((3,), 9, device=device), **options)
    for r in (alone, same_text):  # info_nce: the only candidate has probability 1
        expected = -r.positive if form == "info_nce" else torch.zeros_like(r.hard)
        torch.testing.assert_close(r.hard, expected, rtol=0, atol=1e-6)


@every_impl
def test_a_group_of_one_rollout_has_no_consistency(impl, device):
    d, q, n = batch(3, 1, 8, 1, device=device)
    assert contrastive_reward(d, q, n, impl=impl).consistency.abs().max() < 1e-6


@every_mode
@every_impl
def test_no_groups(impl, form, repulsion, device):
    d, q, n = batch(0, 4, 8, 2, device=device)
    r = contrastive_reward(d, q, n, form=form, repulsion=repulsion, impl=impl)
    assert all(part.shape == (0, 4) and part.dtype == torch.float32 for part in r)


@every_impl
def test_zero_vectors_have_cosine_zero(impl, device):
    d, q, n = batch(3, 2, 8, 1, device=device)
    d[0, 1], q[1], n[2] = 0.0, 0.0, 0.0
    judge(impl, (d, q, n))
    judge(impl, (d, q, n), form="info_nce", repulsion="document")
    consistency = contrastive_reward(d, q, n, impl=impl).consistency[0]
    torch.testing.assert_close(consistency, torch.zeros_like(consistency), rtol=0, atol=1e-6)


@every_mode
@every_impl
def test_any_strides_and_untouched_inputs(impl, form, repulsion, device):
    inputs = batch(5, 3, 12, 2, device=device)
    options = {"form": form, "repulsion": repulsion, "impl": impl}
    expected = contrastive_reward(*inputs, **options)

    def spaced(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, device=device)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    def hidden_first(x):
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    for layout in (spaced, hidden_first):
        moved = [layout(x) for x in inputs]
        before = [x.clone() for x in moved]
        for e, g in zip(expected, contrastive_reward(*moved, **options), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
            assert g.is_contiguous()
        for x, then in zip(moved, before, strict=True):
            assert torch.equal(x, then)


@every_mode
@every_impl
def test_same_bits_on_every_run(impl, form, repulsion, device):
    inputs = batch(6, 3, 40, 1, device=device)
    first, again = (
        contrastive_reward(*inputs, form=form, repulsion=repulsion, impl=impl) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@every_mode
def test_chunks_do_not_show(form, repulsion, device, monkeypatch):
    inputs = batch(13, 4, 8, 1, device=device)
    for tile in (1, 13 * 4 * 5, 13 * 4 * 4 * 3 + 1):
        monkeypatch.setattr(module, "MAX_TILE", tile)
        judge("torch", inputs, form=form, repulsion=repulsion)


@every_mode
@every_impl
def test_nothing_of_groups_times_groups_times_rollouts_is_stored(
    impl, form, repulsion, device, monkeypatch
):
    groups, rollouts = 192, 16
    if impl == "triton" and device.type == "cpu":
        groups = 32  # the interpreter is slow
    monkeypatch.setattr(module, "MAX_TILE", groups * rollouts)
    inputs = batch(groups, rollouts, 4, 1, device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        contrastive_reward(*inputs, form=form, repulsion=repulsion, impl=impl)
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    largest = max(event.nbytes() for event in events)
    assert 0 < largest <= groups * groups * rollouts * 4 / 8


@every_impl
def test_registration(impl, device):
    d, q, n = batch(3, 2, 8, 1, device=device)
    ids = torch.tensor([0, 0, 1], device=device)
    for form, repulsion in MODES:
        tensors = (d, q, n, ids) if form == "sum" else (d.half(), q.half(), None, None)
        options = (form, repulsion, 0.1, 1.0, 0.2, 0.2, impl == "triton")
        op = torch.ops.tercet.contrastive_reward.default
        torch.library.opcheck(op, (*tensors, *options))


@pytest.mark.parametrize("dynamic", [False, True])
@every_impl
def test_compiles_without_graph_break(impl, dynamic, device):
    def reward(d, q, n, ids):
        r = contrastive_reward(d * 2, q, n, group_ids=ids, repulsion="document", impl=impl)
        return r.total - r.total.mean(dim=1, keepdim=True)

    compiled = torch.compile(reward, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for groups in (3, 4):
        d, q, n = batch(groups, 2, 8, 1, device=device)
        ids = torch.arange(groups, device=device)
        torch.testing.assert_close(compiled(d, q, n, ids), reward(d, q, n, ids))


@every_impl
def test_offsets_beyond_32_bits(impl, device):
    stride = 2**30 + 8  # elements; group 2 begins behind 2^31
    if device.type == "cuda":
        storage = torch.zeros(2 * stride + 64, dtype=torch.float16, device=device)
    else:  # untouched pages of a NumPy array take no memory
        storage = torch.from_numpy(np.zeros(2 * stride + 64, dtype=np.float16))
    d = storage.as_strided((3, 2, 8), (stride, 8, 1))
    d.copy_(torch.randn(3, 2, 8))
    q = torch.randn(3, 8, device=device).half()
    for repulsion in ("query", "document"):
        got = contrastive_reward(d, q, repulsion=repulsion, impl=impl)
        expected = contrastive_reward(d.clone(), q, repulsion=repulsion, impl=impl)
        torch.testing.assert_close(got.total, expected.total)


def test_rows_lie_on_the_first_grid_axis(device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_group_fwd", "_cross_fwd", "_finish_fwd"):
        monkeypatch.setattr(kernels, name, Recorder())
    d = torch.zeros(70_000, 1, 1, device=device)  # grid axes 1 and 2 end at 65,535
    contrastive_reward(d, d[:, 0], impl="triton")
    assert [len(grid) for grid in grids] == [1, 1, 1]
    assert grids[0] == (70_000,)


@pytest.mark.gpu
def test_more_groups_than_a_grid_axis_holds():
    inputs = batch(70_000, 1, 16, None, device="cuda")
    ours = contrastive_reward(*inputs, repulsion="document", impl="triton")
    plain = contrastive_reward(*inputs, repulsion="document", impl="torch")
    torch.testing.assert_close(ours.total, plain.total, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_current_device_need_not_be_the_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = batch(5, 3, 16, 1, device="cuda:1")
    with torch.cuda.device(0):
        judge("triton", inputs)


@every_impl
def test_an_embedding_that_requires_grad_is_refused(impl, device):
    inputs = batch(2, 2, 4, 1, device=device)
    for i, name in enumerate(("rollouts", "queries", "negatives")):
        tensors = list(inputs)
        tensors[i] = tensors[i].clone().requires_grad_()
        with pytest.raises(ValueError, match=rf"got {name}.requires_grad=True; call {name}.detach"):
            contrastive_reward(*tensors, impl=impl)
        with torch.no_grad():
            assert not contrastive_reward(*tensors, impl=impl).total.requires_grad


def _call(d=(3, 2, 4), q=(3, 4), n=None, ids=None, dtype=torch.float32, **options):
    ids = None if ids is None else torch.tensor(ids)
    n = None if n is None else torch.ones(n)
    contrastive_reward(torch.ones(d, dtype=dtype), torch.ones(q), n, group_ids=ids, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, dtype=torch.int64), TypeError, "rollouts must be a floating-point tensor"),
        (partial(_call, dtype=torch.float16), TypeError, "queries must have the dtype of rollouts"),
        (partial(_call, d=(3, 4)), ValueError, r"must be \[groups, rollouts>=1, .*got \(3, 4\)"),
        (partial(_call, d=(3, 0, 4)), ValueError, r"rollouts>=1, hidden>=1\], got \(3, 0, 4\)"),
        (partial(_call, d=(3, 2, 0), q=(3, 0)), ValueError, r"hidden>=1\], got \(3, 2, 0\)"),
        (partial(_call, q=(2, 4)), ValueError, r"queries must be \[3, 4\].*got \(2, 4\)"),
        (partial(_call, n=(3, 4)), ValueError, r"negatives must be \[3, any, 4\].*got \(3, 4\)"),
        (partial(_call, n=(3, 1, 5)), ValueError, r"negatives must be .*got \(3, 1, 5\)"),
        (partial(_call, ids=[0, 1]), ValueError, r"group_ids must be \[3\], got \(2,\)"),
        (partial(_call, ids=[0.0, 1, 2]), TypeError, "int32 or int64, got torch.float32"),
        (partial(_call, form="nce"), ValueError, "form must be 'sum' or 'info_nce'.*got 'nce'"),
        (partial(_call, repulsion="both"), ValueError, "repulsion 'query' or .*'both'"),
        (partial(_call, temperature=0.0), ValueError, "temperature must be finite and > 0, got 0"),
        (partial(_call, temperature=math.nan), ValueError, "finite and > 0, got nan"),
        (partial(_call, impl="cuda"), ValueError, "impl must be 'auto', 'triton' or 'torch'"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_rejects_float64_in_triton_and_mixed_devices(device):
    d, q = torch.ones(2, 2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="impl='triton' computes in float32, got float64"):
        contrastive_reward(d.to(device), q.to(device), impl="triton")
    with pytest.raises(ValueError, match="must be on one device, got rollouts on cpu, queries on"):
        contrastive_reward(d, q.to("meta"))
