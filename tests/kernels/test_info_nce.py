"""info_nce: Triton (interpreted without a GPU) and PyTorch, against float64."""
# pyright: reportArgumentType=false, reportCallIssue=false

import math
from functools import partial
from typing import Any

import pytest
import torch

from tercet.kernels import _similarity as tiled
from tercet.kernels import info_nce
from tercet.kernels.reference import info_nce_ref

IMPLS = ["triton", "torch"]
SHAPES = [(1, 1), (3, 5), (32, 64), (33, 7), (130, 20)]  # batch, hidden; blocks are 16 x 128

every_impl = pytest.mark.parametrize("impl", IMPLS)
every_way = pytest.mark.parametrize("symmetric", [False, True], ids=["one-sided", "symmetric"])
every_pool = pytest.mark.parametrize("kind", [None, "pool", "own"])
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter, on NaN


def batch(rows, hidden, kind=None, *, device, m=3, dtype=torch.float32) -> list[Any]:
    """Queries, keys near them, and negatives or None, of very different lengths."""
    q = torch.randn(rows, hidden, device=device)
    k = q + torch.randn(rows, hidden, device=device)
    q, k = (x * torch.rand(rows, 1, device=device).mul(4).exp() for x in (q, k))
    shape = (m, hidden) if kind == "pool" else (rows, m, hidden)
    n = None if kind is None else torch.randn(shape, device=device) * 3
    return [None if x is None else x.to(dtype) for x in (q, k, n)]


def run(fn, inputs, dy, **options):
    """Loss and gradients of the embeddings, a tensor temperature and a weight."""
    names = [
        name for name in ("temperature", "weight") if isinstance(options.get(name), torch.Tensor)
    ]
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    extra = {name: options[name].detach().requires_grad_() for name in names}
    loss = fn(*leaves, **options | extra)
    given = [x for x in (*leaves, *extra.values()) if x is not None]
    return [loss.detach(), *torch.autograd.grad(loss, given, dy.to(loss.dtype))]


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def judge(impl, inputs, *, slack=2e-6, half_slack=0.0, **options):
    """Our error at most twice eager's plus a slack of the largest element; float64 is the truth."""
    rows = len(inputs[0])
    slack *= 4 if inputs[0].is_cuda else 1  # a GPU's exponential is two units off
    dy = torch.randn((rows,) if options.get("reduction") == "none" else (), device=inputs[0].device)
    exact = {name: double(x) for name, x in options.items()}
    truth = run(info_nce_ref, [double(x) for x in inputs], dy, **exact)
    eager = run(info_nce_ref, inputs, dy, **options)
    ours = run(partial(info_nce, impl=impl), inputs, dy, **options)
    for number, (t, e, o) in enumerate(zip(truth, eager, ours, strict=True)):
        assert o.shape == t.shape
        assert o.dtype == e.dtype
        if not t.numel():
            continue
        our_error, eager_error = (o.double() - t).abs().max(), (e.double() - t).abs().max()
        allowed = 2 * eager_error + (slack + half_slack) * max(1.0, t.abs().max().item())
        assert our_error <= allowed, f"{number}: error {our_error:.2e}, eager {eager_error:.2e}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_way
@every_pool
@every_impl
def test_matches_float64(impl, kind, symmetric, shape, reduction, device):
    judge(impl, batch(*shape, kind, device=device), symmetric=symmetric, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_way
@every_pool
@every_impl
def test_every_option_at_once(impl, kind, symmetric, reduction, device):
    rows = 21
    inputs = batch(rows, 12, kind, device=device)
    ids = torch.randint(0, 9, (rows,), device=device)
    marked = None if kind is None else torch.randint(0, 9, inputs[2].shape[:-1], device=device)
    judge(
        impl,
        inputs,
        temperature=torch.tensor(0.2, device=device),
        symmetric=symmetric,
        ids=ids,
        negative_ids=None if marked is None else marked.int(),
        false_negative_margin=0.3,
        weight=torch.rand(rows, device=device),
        reduction=reduction,
    )


@every_way
@every_pool
@every_impl
def test_inner_products(impl, kind, symmetric, device):
    inputs = [None if x is None else x / 30 for x in batch(9, 5, kind, device=device)]
    options = {"symmetric": symmetric, "normalize": False, "temperature": 0.7}
    judge(impl, inputs, **options)
    margin = torch.tensor([[1.0, 0.0], [0.0, 0.5]], device=device)  # a cosine would drop 1 of 2
    loss = info_nce(margin, margin.flip(0), impl=impl, false_negative_margin=0.1, **options)
    expected = info_nce_ref(margin, margin.flip(0), false_negative_margin=0.1, **options)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, dtype) for impl in IMPLS for dtype in (torch.float16, torch.bfloat16)]
    + [("torch", torch.float64)],  # Triton refuses it
    ids=str,
)
@every_way
@every_pool
def test_dtypes(kind, symmetric, impl, dtype, device):
    inputs = batch(37, 33, kind, device=device, dtype=dtype)
    # the weights of the products are of half precision, as in eager autocast
    half = 0.0 if impl == "torch" else {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for reduction in ("mean", "none"):
        judge(impl, inputs, symmetric=symmetric, half_slack=half, reduction=reduction)


@every_way
@every_impl
def test_tiny_gradients_survive_float16(impl, symmetric, device):
    """Weights of 1e-6 through norms of 30: below float16's range, but for their common gain."""
    q, k, _ = batch(24, 16, device=device)
    q, k = (torch.nn.functional.normalize(x, dim=-1).mul(30).half() for x in (q, k))
    dy = torch.tensor(1e-3, device=device)
    options = {"symmetric": symmetric, "weight": torch.full((24,), 1e-2, device=device)}
    options |= {"reduction": "sum", "temperature": torch.tensor(1.0, device=device)}
    truth = run(info_nce_ref, [q.double(), k.double()], dy, **options | {
        "weight": options["weight"].double(), "temperature": options["temperature"].double()
    })  # fmt: skip
    ours = run(partial(info_nce, impl=impl), [q, k], dy, **options)
    torch.testing.assert_close(ours[-2].double(), truth[-2], rtol=1e-3, atol=0)
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=0, atol=6e-8)


@pytest.mark.parametrize("tile", [1, 11 * 4 + 3, 11 * 5])
@every_way
@every_pool
@every_impl
def test_tiles_do_not_show(impl, kind, symmetric, tile, device, monkeypatch):
    monkeypatch.setattr(tiled, "CPU_TILE", tile)
    monkeypatch.setattr(tiled, "CUDA_TILE", tile)
    ids = torch.arange(11, device=device) // 2
    inputs = batch(11, 6, kind, device=device)
    marked = None if kind is None else torch.randint(0, 6, inputs[2].shape[:-1], device=device)
    for reduction in ("mean", "none"):
        judge(
            impl,
            inputs,
            symmetric=symmetric,
            ids=ids,
            negative_ids=marked,
            false_negative_margin=0.5,
            reduction=reduction,
        )


@pytest.mark.parametrize("order", ["growing", "falling"])
@every_way
@every_impl
def test_running_maximum(impl, symmetric, order, device, monkeypatch):
    """At a low temperature the similarities of a tile tower above (or vanish under) the last's."""
    monkeypatch.setattr(tiled, "CPU_TILE", 300 * 40)
    monkeypatch.setattr(tiled, "CUDA_TILE", 300 * 40)
    angles = torch.linspace(0, 3, 300, device=device)
    angles = angles if order == "growing" else angles.flip(0)
    fan = torch.stack((angles.cos(), angles.sin()), dim=-1)
    near_the_end = torch.tensor([-1.0, 0.1], device=device).expand(300, 2)
    for q, k in ((fan, near_the_end), (near_the_end, fan)):
        judge(impl, (q, k, None), symmetric=symmetric, temperature=0.01, slack=1e-4)


@every_pool
@every_impl
def test_a_probability_near_one_keeps_its_gradient(impl, kind, device):
    """1 - p is a sum over the others here; as a difference it would be rounding alone."""
    angles = torch.tensor([0.0, 1.3, 2.8, 4.6], device=device)
    q = torch.stack((angles.cos(), angles.sin(), torch.zeros_like(angles)), dim=-1)
    n = torch.tensor([[0.1, 0.2, 1.0], [0.3, 0.1, -1.0]], device=device)
    n = {None: None, "pool": n, "own": n.expand(4, 2, 3)}[kind]
    for options in ({}, {"symmetric": True}, {"reduction": "none"}):
        dy = torch.ones((4,) if "reduction" in options else (), device=device)
        inputs = [q, q, n]
        truth = run(info_nce_ref, [double(x) for x in inputs], dy.double(), **options)
        ours = run(partial(info_nce, impl=impl), inputs, dy, **options)
        assert truth[0].max() < 1e-4
        torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(ours[1].double(), truth[1], rtol=1e-4, atol=1e-12)


@every_way
@every_impl
def test_golden(impl, symmetric, device):
    """Unit vectors of the plane, by angle: queries 0, 90; keys 60, 45; one negative at 180."""

    def at(*degrees):
        angles = torch.tensor(degrees, device=device).deg2rad()
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    def nce(positive, *others):
        return math.log(1 + sum(math.exp((s - positive) / 0.5) for s in others))

    r, s = math.sqrt(0.5), math.sqrt(0.75)
    rows = [nce(0.5, r, -1.0), nce(r, s, 0.0)]
    of_keys = [nce(0.5, s), nce(r, r)]
    expected = [(a + b) / 2 for a, b in zip(rows, of_keys, strict=True)] if symmetric else rows
    options = {"temperature": 0.5, "symmetric": symmetric, "reduction": "none", "impl": impl}
    loss = info_nce(at(0.0, 90.0), at(60.0, 45.0), at(180.0), **options)
    torch.testing.assert_close(loss, torch.tensor(expected, device=device))


@every_impl
def test_symmetric_is_the_mean_of_both_ways(impl, device):
    q, k, _ = batch(40, 6, device=device)
    both = info_nce(q, k, symmetric=True, reduction="none", impl=impl)
    ways = [info_nce(a, b, reduction="none", impl=impl) for a, b in ((q, k), (k, q))]
    torch.testing.assert_close(both, (ways[0] + ways[1]) / 2)


@pytest.mark.parametrize("why", ["one row", "one text", "margin"])
@every_way
@every_impl
def test_rows_without_negatives(impl, symmetric, why, device):
    q, k, _ = batch(1 if why == "one row" else 5, 4, device=device)
    options: dict[str, Any] = {"symmetric": symmetric}
    if why == "one text":
        options["ids"] = torch.full((5,), 7, device=device)
    if why == "margin":
        options["false_negative_margin"] = 2.1
    for reduction in ("mean", "none"):
        judge(impl, (q, k, None), reduction=reduction, **options)
        dy = torch.ones((len(q),) if reduction == "none" else (), device=device)
        found = run(partial(info_nce, impl=impl), (q, k), dy, reduction=reduction, **options)
        assert all((x == 0).all() for x in found)


@every_way
@every_pool
@every_impl
def test_no_rows_and_no_negatives(impl, kind, symmetric, device):
    for rows, m in ((0, 2), (3, 0)):
        inputs = batch(rows, 4, kind, device=device, m=m)
        for reduction in ("mean", "none"):
            judge(impl, inputs, symmetric=symmetric, reduction=reduction)
    weight = torch.zeros(3, device=device)
    q, k, n = batch(3, 4, kind, device=device)
    assert info_nce(q, k, n, symmetric=symmetric, weight=weight, impl=impl) == 0


@every_way
@every_impl
def test_zero_vectors(impl, symmetric, device):
    q, k, n = batch(4, 6, "pool", device=device)
    q[1], k[2], n[0] = 0.0, 0.0, 0.0
    for reduction in ("mean", "none"):
        judge(impl, (q, k, n), symmetric=symmetric, reduction=reduction)
    q[1] = 1e-13  # below the floor of norms: no part along itself is taken off
    judge(impl, (q, k, n), symmetric=symmetric)


@every_way
@every_impl
def test_large_values(impl, symmetric, device):
    q, k, n = batch(5, 6, "pool", device=device)
    judge(impl, (q * 1e15, k * 1e-8, n * 1e15), symmetric=symmetric)
    options = {"normalize": False, "temperature": 1.0, "symmetric": symmetric}
    judge(impl, (q * 100, k * 100, n * 100), **options)


@NUMPY_WARNS
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "negative"])
@pytest.mark.parametrize("kind", ["pool", "own"])
@every_way
@every_impl
def test_nan_spoils_the_rows_that_see_it(impl, symmetric, kind, which, bad, device):
    ids = torch.tensor([0, 1, 1, 2, 0], device=device)
    inputs = batch(5, 6, kind, device=device)
    inputs[which].view(-1, 6)[1, 3] = bad
    options = {"symmetric": symmetric, "ids": ids, "reduction": "none"}
    expected = info_nce_ref(*inputs, **options)
    assert torch.equal(info_nce(*inputs, **options, impl=impl).isnan(), expected.isnan())
    assert expected.isnan().any()
    assert info_nce(*inputs, symmetric=symmetric, impl=impl).isnan()


@every_way
@every_pool
@every_impl
def test_any_strides_and_untouched_inputs(impl, kind, symmetric, device):
    inputs = batch(6, 5, kind, device=device)
    given = [x for x in inputs if x is not None]

    def spaced(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), math.nan, device=device)
        wide[..., 1::2] = x
        return wide[..., 1::2]

    def hidden_first(x):
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    for reduction in ("mean", "none"):
        dy = torch.randn((6,) if reduction == "none" else (), device=device)
        options = {"symmetric": symmetric, "reduction": reduction}
        expected = run(partial(info_nce, impl=impl), given, dy, **options)
        for layout in (spaced, hidden_first):
            moved = [layout(x) for x in given]
            before = [x.clone() for x in moved]
            found = run(partial(info_nce, impl=impl), moved, dy, **options)
            for e, g in zip(expected, found, strict=True):
                torch.testing.assert_close(g, e)
            assert all(torch.equal(a, b) for a, b in zip(moved, before, strict=True))


@every_way
@every_pool
@every_impl
def test_same_bits_on_every_run(impl, kind, symmetric, device):
    inputs = batch(35, 17, kind, device=device)
    for reduction in ("mean", "none"):
        dy = torch.randn((35,) if reduction == "none" else (), device=device)
        options = {"symmetric": symmetric, "reduction": reduction}
        first, again = (run(partial(info_nce, impl=impl), inputs, dy, **options) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("needed", range(4), ids=["queries", "keys", "negatives", "temperature"])
@every_way
@every_pool
@every_impl
def test_each_gradient_alone(impl, kind, symmetric, needed, device):
    needed = 0 if needed == 2 and kind is None else needed
    inputs = [*batch(6, 5, kind, device=device), torch.tensor(0.3, device=device)]
    for reduction in ("sum", "none"):
        grads = []
        for fn in (partial(info_nce, impl=impl), info_nce_ref):
            given = list(inputs)
            leaf = given[needed] = inputs[needed].clone().requires_grad_()
            loss = fn(*given[:3], temperature=given[3], symmetric=symmetric, reduction=reduction)
            loss.sum().backward(retain_graph=True)
            loss.sum().backward()  # a second time through the same graph
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        assert grads[0].any()


@every_way
@every_impl
def test_no_gradients_are_made_where_none_is_asked_for(impl, symmetric, device, monkeypatch):
    q, k, n = batch(6, 5, "pool", device=device)
    made = []
    zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda x, s, **o: (made.append(s), zeros(x, s, **o))[1]
    )
    expected = info_nce_ref(q, k, n, symmetric=symmetric)
    with torch.no_grad():
        loss = info_nce(q.requires_grad_(), k, n, symmetric=symmetric, impl=impl)
    torch.testing.assert_close(loss, expected)
    assert not any(len(shape) > 1 for shape in made)


@every_way
@every_pool
@every_impl
def test_nothing_of_rows_times_keys_is_stored(impl, kind, symmetric, device, monkeypatch):
    rows = 640 if impl == "torch" or device.type == "cuda" else 160  # the interpreter is slow
    monkeypatch.setattr(tiled, "CPU_TILE", rows * 16)
    monkeypatch.setattr(tiled, "CUDA_TILE", rows * 16)
    inputs = [x for x in batch(rows, 4, kind, device=device, m=2) if x is not None]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for reduction in ("mean", "none"):
        dy = torch.ones((rows,) if reduction == "none" else (), device=device)
        options = {"symmetric": symmetric, "reduction": reduction}
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            run(partial(info_nce, impl=impl), inputs, dy, **options)
        profiler: Any = profile.profiler
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        largest = max(event.nbytes() for event in events)
        assert 0 < largest <= rows * rows * 4 / 4


@every_way
@every_pool
@every_impl
def test_registration(impl, kind, symmetric, device):
    q, k, n = (None if x is None else x.requires_grad_() for x in batch(3, 4, kind, device=device))
    t = torch.tensor(0.3, device=device, requires_grad=True)
    ids = torch.tensor([0, 0, 1], device=device)
    marks = tiled.marks(q, ids, ids, None, None, None)
    options = (0, True, impl == "triton")
    op = torch.ops.tercet.info_nce_lse.default
    torch.library.opcheck(op, (q, k, n, t, marks, *options, symmetric))
    weight = torch.rand(3, device=device, requires_grad=True)
    needs = [True, True, kind is not None, True]
    op = torch.ops.tercet.info_nce_sum.default
    torch.library.opcheck(op, (q, k, n, t, weight, marks, *options, needs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_way
@every_impl
def test_compiles_without_graph_break(impl, symmetric, reduction, dynamic, device):
    def loss(q, k, n, t, ids):
        options = {"symmetric": symmetric, "reduction": reduction, "impl": impl}
        found = info_nce(q * 2, k, n, temperature=t, ids=ids, false_negative_margin=0.5, **options)
        return found.sum() * 3

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 4):
        inputs = [*batch(rows, 6, "pool", device=device), torch.tensor(0.2, device=device)]
        results = []
        for fn in (compiled, loss):
            leaves = [x.clone().requires_grad_() for x in inputs]
            value = fn(*leaves, torch.arange(rows, device=device) // 2)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)


def _call(q=(3, 4), k=(3, 4), n=None, ids=None, dtype=torch.float32, nids=None, **options):
    ids, nids = (None if x is None else torch.tensor(x) for x in (ids, nids))
    n = None if n is None else torch.ones(n)
    info_nce(torch.ones(q, dtype=dtype), torch.ones(k), n, ids=ids, negative_ids=nids, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, dtype=torch.int64), TypeError, "queries must be a floating-point tensor"),
        (partial(_call, dtype=torch.float16), TypeError, "keys must have the dtype of queries"),
        (partial(_call, q=(3,)), ValueError, r"both be \[batch, hidden >= 1\], got \(3,\)"),
        (partial(_call, q=(3, 0), k=(3, 0)), ValueError, r"hidden >= 1\], got \(3, 0\)"),
        (partial(_call, k=(2, 4)), ValueError, r"both be .*got \(3, 4\) and \(2, 4\)"),
        (partial(_call, n=(4,)), ValueError, r"negatives must be \[any, 4\] or .*got \(4,\)"),
        (partial(_call, n=(3, 5)), ValueError, r"negatives must be .*got \(3, 5\)"),
        (partial(_call, n=(2, 3, 4)), ValueError, r"\[3, any, 4\], got \(2, 3, 4\)"),
        (partial(_call, ids=[0, 1]), ValueError, r"ids must be \[3\], got \(2,\)"),
        (partial(_call, ids=[0.0, 1, 2]), TypeError, "int32 or int64, got torch.float32"),
        (partial(_call, n=(1, 4), nids=[1]), ValueError, "need negatives and ids, got no ids"),
        (partial(_call, ids=[0, 1, 2], nids=[1]), ValueError, "and ids, got no negatives"),
        (
            partial(_call, n=(1, 4), ids=[0, 1, 2], nids=[1, 2]),
            ValueError,
            r"negative_ids must be \[1\] like negatives, got \(2,\)",
        ),
        (partial(_call, temperature=0.0), ValueError, "temperature must be finite and > 0, got 0"),
        (partial(_call, temperature=math.inf), ValueError, "finite and > 0, got inf"),
        (partial(_call, temperature=math.nan), ValueError, "finite and > 0, got nan"),
        (partial(_call, temperature="a"), TypeError, "temperature must be a number, got str"),
        (partial(_call, temperature=torch.ones(2)), ValueError, r"one element, got \(2,\)"),
        (partial(_call, temperature=torch.tensor(1)), TypeError, "temperature must be a floating"),
        (partial(_call, reduction="avg"), ValueError, "'mean', 'sum' or 'none', got 'avg'"),
        (partial(_call, weight=torch.ones(2)), ValueError, r"weight must be \[3\], got \(2,\)"),
        (partial(_call, weight=[1.0]), TypeError, "weight must be a tensor, got list"),
        (partial(_call, false_negative_margin="a"), TypeError, "must be a number, got str"),
        (partial(_call, false_negative_margin=math.nan), ValueError, "must be finite, got nan"),
        (partial(_call, impl="cuda"), ValueError, "impl must be 'auto', 'triton' or 'torch'"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_rejects_float64_in_triton_and_mixed_devices(device):
    q = torch.ones(2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="impl='triton' computes in float32, got float64"):
        info_nce(q.to(device), q.to(device), impl="triton")
    with pytest.raises(ValueError, match="must be on one device, got queries on cpu, keys on"):
        info_nce(q, q.to("meta"))
    for name in ("weight", "temperature"):
        with pytest.raises(ValueError, match=f"got queries on cpu, {name} on meta"):
            info_nce(q, q, **{name: torch.ones(2 if name == "weight" else (), device="meta")})
