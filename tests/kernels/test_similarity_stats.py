"""similarity_stats: Triton (interpreted without a GPU) and PyTorch, against its definition."""
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from functools import partial
from typing import Any

import pytest
import torch

from tercet.kernels import _similarity as tiled
from tercet.kernels import similarity_stats
from tercet.kernels.reference import similarity_stats_ref

IMPLS = ["triton", "torch"]
SHAPES = [(1, 1), (3, 5), (32, 64), (130, 20)]  # batch, hidden; blocks are 16 x 128

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_pool = pytest.mark.parametrize("kind", [None, "pool", "own"])
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter, on NaN


def batch(rows, hidden, kind=None, *, device, m=3, dtype=torch.float32) -> list[Any]:
    q = torch.randn(rows, hidden, device=device) * 7
    k = q + 3 * torch.randn(rows, hidden, device=device)
    shape = (m, hidden) if kind == "pool" else (rows, m, hidden)
    n = None if kind is None else torch.randn(shape, device=device) * 3
    return [None if x is None else x.to(dtype) for x in (q, k, n)]


def judge(impl, inputs, **options):
    """Errors at most twice eager's plus 2e-6; whole numbers are those of float64."""
    exact = [None if x is None else x.double() for x in inputs]
    truth = similarity_stats_ref(*exact, **options)
    eager = similarity_stats_ref(*inputs, **options)
    ours = similarity_stats(*inputs, **options, impl=impl)
    for name, t, e, o in zip(truth._fields, truth, eager, ours, strict=True):
        assert o.shape == t.shape
        assert o.dtype == e.dtype
        if name in ("hardest_index", "rank"):
            assert o.tolist() == t.tolist(), name
            continue
        found = t.isfinite()
        assert torch.equal(o.isfinite(), found), name
        if found.any():
            eager_error = (e.double() - t)[found].abs().max()
            slack = 2e-6 * max(1.0, t[found].abs().max().item())
            assert (o.double() - t)[found].abs().max() <= 2 * eager_error + slack, name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_pool
@every_impl
def test_matches_float64(impl, kind, shape, device):
    judge(impl, batch(*shape, kind, device=device))


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in IMPLS for dtype in (torch.float16, torch.bfloat16)]
    + [("torch", torch.float64)],  # Triton refuses it
    ids=str,
)
@every_pool
def test_dtypes(kind, impl, dtype, device):
    judge(impl, batch(19, 33, kind, device=device, dtype=dtype))


@pytest.mark.parametrize("normalize", [True, False])
@every_pool
@every_impl
def test_options(impl, kind, normalize, device):
    inputs = batch(21, 12, kind, device=device)
    ids = torch.randint(0, 6, (21,), device=device)
    marked = None if kind is None else torch.randint(0, 6, inputs[2].shape[:-1], device=device)
    t = torch.tensor(0.3, device=device, requires_grad=True)
    options = {"normalize": normalize, "ids": ids, "negative_ids": marked}
    judge(impl, inputs, temperature=t.detach(), **options)
    assert not similarity_stats(*inputs, temperature=t, impl=impl, **options).lse.requires_grad


@pytest.mark.parametrize("tile", [1, 11 * 4, 11 * 5])
@every_pool
@every_impl
def test_tiles_do_not_show(impl, kind, tile, device, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", tile)
    monkeypatch.setattr(tiled, "CUDA_TILE", tile)
    judge(impl, batch(11, 6, kind, device=device), ids=torch.arange(11, device=device) // 2)


@pytest.mark.parametrize("where", [0, 1, 127, 128, 199])
@every_impl
def test_the_hardest_and_the_rank_wherever_they_are(impl, where, device):
    """Keys at right angles but for `where` and one before it; the row's own key is the last."""
    q = torch.zeros(200, 3, device=device)
    q[:, 0] = 1.0
    k = torch.zeros(200, 3, device=device)
    k[:, 1] = 1.0
    k[where] = torch.tensor([0.8, 0.6, 0.0], device=device)
    k[where - 1] = torch.tensor([0.6, 0.8, 0.0], device=device)
    row = (where + 50) % 200
    k[row] = torch.tensor([0.7, 0.0, 0.7141428], device=device)
    found = similarity_stats(q, k, impl=impl)
    assert found.hardest_index[row] == where
    assert found.rank[row] == 2
    torch.testing.assert_close(found.hardest[row].item(), 0.8, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.margin[row].item(), -0.1, rtol=0, atol=1e-6)
    assert found.rank[where] == 1


@every_impl
def test_equal_similarities(impl, device):
    """The first of equal negatives is the hardest; one as near as the positive stands before it."""
    ones = torch.ones(300, 4, device=device)
    found = similarity_stats(ones, ones, ones[:2], normalize=False, impl=impl)
    assert found.hardest_index.tolist() == [1] + [0] * 299
    assert found.rank.tolist() == [1] * 300  # not above it
    assert found.margin.tolist() == [0.0] * 300


@every_impl
def test_rows_without_negatives(impl, device):
    q, k, n = batch(4, 6, "pool", device=device)
    ids = torch.zeros(4, dtype=torch.int32, device=device)
    found = similarity_stats(q, k, n, ids=ids, negative_ids=ids[:3], impl=impl)
    assert found.hardest.tolist() == [-math.inf] * 4
    assert found.hardest_index.tolist() == [-1] * 4
    assert found.rank.tolist() == [1] * 4
    assert found.margin.tolist() == [math.inf] * 4
    torch.testing.assert_close(found.lse, found.positive / 0.05)
    empty = similarity_stats(q[:0], k[:0], n, impl=impl)
    assert all(x.shape == (0,) for x in empty)
    assert [x.dtype for x in empty] == [x.dtype for x in found]
    judge(impl, (q, k, n[:0]))


@NUMPY_WARNS
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "negative"])
@every_impl
def test_nan_is_never_a_good_rank(impl, which, device):
    ids = torch.tensor([0, 1, 1, 2, 0], device=device)
    inputs = batch(5, 6, "pool", device=device)
    inputs[which][2, 3] = math.nan
    expected = similarity_stats_ref(*inputs, ids=ids)
    found = similarity_stats(*inputs, ids=ids, impl=impl)
    for e, o in zip(expected, found, strict=True):
        torch.testing.assert_close(o, e, equal_nan=True)
    assert expected.hardest.isnan().any()
    assert expected.rank.max() > 1


@every_pool
@every_impl
def test_same_bits_and_any_strides(impl, kind, device):
    inputs = [x for x in batch(35, 17, kind, device=device) if x is not None]
    first, again = (similarity_stats(*inputs, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    moved = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in inputs]
    for a, b in zip(first, similarity_stats(*moved, impl=impl), strict=True):
        torch.testing.assert_close(a, b)


@every_impl
def test_nothing_of_rows_times_keys_is_stored(impl, device, monkeypatch):
    rows = 640 if impl == "torch" or device.type == "cuda" else 160  # the interpreter is slow
    monkeypatch.setattr(tiled, "CPU_TILE", rows * 16)
    monkeypatch.setattr(tiled, "CUDA_TILE", rows * 16)
    inputs = batch(rows, 4, "pool", device=device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        similarity_stats(*inputs, impl=impl)
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(event.nbytes() for event in events) <= rows * rows * 4 / 4


@every_pool
@every_impl
def test_registration(impl, kind, device):
    q, k, n = batch(3, 4, kind, device=device)
    marks = tiled.marks(q, torch.tensor([0, 0, 1], device=device), None, None)
    t = torch.tensor(0.3, device=device)
    op = torch.ops.tercet.similarity_stats.default
    torch.library.opcheck(op, (q, k, n, t, marks, 0, True, impl == "triton"))


@pytest.mark.parametrize("dynamic", [False, True])
@every_impl
def test_compiles_without_graph_break(impl, dynamic, device):
    def stats(q, k, n):
        found = similarity_stats(q * 2, k, n, impl=impl)
        return found.margin + found.rank

    compiled = torch.compile(stats, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 4):
        inputs = batch(rows, 6, "own", device=device)
        torch.testing.assert_close(compiled(*inputs), stats(*inputs))


X = torch.ones(3, 4, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(similarity_stats, X, X[:2]), ValueError, "similarity_stats: queries and keys"),
        (partial(similarity_stats, X, X, ids=[0, 1, 2]), TypeError, "ids must be a tensor"),
        (partial(similarity_stats, X, X, temperature=0.0), ValueError, "finite and > 0, got 0"),
        (partial(similarity_stats, X, X, impl="cuda"), ValueError, "impl must be 'auto'"),
        (
            partial(similarity_stats, X.double(), X.double(), impl="triton"),
            TypeError,
            "similarity_stats: impl='triton' computes in float32",
        ),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
