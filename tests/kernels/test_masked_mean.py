"""masked_mean and segment_mean: Triton (interpreted without a GPU) and PyTorch, against float64."""

import threading
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from harness import extra_bytes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tercet.kernels import _masked_mean_triton as kernels
from tercet.kernels import masked_mean, segment_mean
from tercet.kernels.masked_mean import CHUNK_ELEMENTS, _sums_plain
from tercet.kernels.reference import masked_mean_ref, segment_mean_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [  # tokens: one, some, a slot, one more; hidden: one, a block, one more, many
    (1, 1, 1),
    (3, 5, 256),
    (1, 256, 257),
    (1, 257, 64),
    (2, 2, kernels.BLOCK_ROW + 6),
]
LENGTHS = [[1], [3, 0, 290, 1], [256, 17], [0, 0, 5, 0]]


@pytest.fixture(params=["triton", "torch"])
def impl(request):
    return request.param


def _boundaries(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "unit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padded_matches_float64(impl, shape, dtype, normalize, device, judge):
    x = torch.randn(shape, device=device).add_(0.3).to(dtype)
    mask = torch.rand(shape[:2], device=device) < 0.6
    mask[:, 0] = True
    dy = torch.randn(shape[0], shape[2], device=device)
    ours = partial(masked_mean, mask=mask, normalize=normalize, impl=impl)
    judge(ours, partial(masked_mean_ref, mask=mask, normalize=normalize), [x], dy)


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "unit"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_matches_float64(impl, lengths, dtype, masked, normalize, device, judge):
    cu = _boundaries(lengths, device)
    n = sum(lengths) + 3  # the last three tokens belong to no row
    x = torch.randn(n, 37, device=device).add_(0.3).to(dtype)
    mask = torch.rand(n, device=device) < 0.7 if masked else None
    dy = torch.randn(len(lengths), 37, device=device)
    ours = partial(segment_mean, cu_seqlens=cu, mask=mask, normalize=normalize, impl=impl)
    ref = partial(segment_mean_ref, cu_seqlens=cu, mask=mask, normalize=normalize)
    judge(ours, ref, [x], dy)


def test_more_slots_than_one_block_of_them(impl, device, judge):
    t = kernels.SPLIT_T * kernels.BLOCK_SPLITS + 40
    x = torch.randn(1, t, 3, device=device)
    mask = torch.rand(1, t, device=device) < 0.7
    ref = partial(masked_mean_ref, mask=mask)
    judge(partial(masked_mean, mask=mask, impl=impl), ref, [x], torch.randn(1, 3, device=device))


def test_means_shorter_than_the_least_norm(impl, device, judge):
    """They are divided by 1e-12, and no part of their gradient is projected out."""
    x = torch.randn(3, 4, 5, device=device) * 1e-13
    x[1] = 0.0
    mask = torch.rand(3, 4, device=device) < 0.7
    mask[:, 0] = True
    ref = partial(masked_mean_ref, mask=mask, normalize=True)
    ours = partial(masked_mean, mask=mask, normalize=True, impl=impl)
    judge(ours, ref, [x], torch.randn(3, 5, device=device) * 1e-12)


def test_float64_keeps_its_precision(impl, device, judge):
    x = torch.randn(2, 40, 9, dtype=torch.float64, device=device)
    mask = torch.rand(2, 40, device=device) < 0.7
    ref = partial(masked_mean_ref, mask=mask, normalize=True)
    ours = partial(masked_mean, mask=mask, normalize=True, impl=impl)
    judge(ours, ref, [x], torch.randn(2, 9, device=device), slack=1e-14)


def test_boundaries_of_any_stride(impl, device):
    x = torch.randn(9, 4, device=device)
    cu = torch.tensor([0, 9, 2, 9, 9, 9], dtype=torch.int32, device=device)[::2]
    torch.testing.assert_close(segment_mean(x, cu, impl=impl), segment_mean_ref(x, cu))


def test_tokens_behind_the_last_one_are_not_read(device):
    """A GPU trusts cu_seqlens; wrong ones must not lead out of x."""
    x = torch.ones(5, 4, device=device)
    storage = torch.cat([x, torch.full((600, 4), float("nan"), device=device)])
    cu = torch.tensor([0, 2, 600], dtype=torch.int32, device=device)
    mean, count, norm = kernels.forward(storage[:5], cu, None, False)
    assert torch.equal(mean, torch.ones(2, 4, device=device))
    assert count.tolist() == [2, 3]
    dx = torch.zeros(605, 4, device=device)
    kernels.backward(mean, mean, count, norm, cu, None, dx[:5], False)
    assert dx[:5].ne(0).all()
    assert dx[5:].eq(0).all()


def test_golden(impl, device):
    x = torch.tensor([[[3.0, 0.0], [1.0, 8.0], [9.0, 9.0]]], device=device, requires_grad=True)
    mask = torch.tensor([[True, True, False]], device=device)
    mean = masked_mean(x, mask, impl=impl)
    unit = masked_mean(x, mask, normalize=True, impl=impl)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 4.0]], device=device))
    torch.testing.assert_close(unit, torch.tensor([[0.2, 0.8]], device=device).sqrt())
    (dx,) = torch.autograd.grad(mean, x, torch.tensor([[2.0, -6.0]], device=device))
    expected = torch.tensor([[[1.0, -3.0], [1.0, -3.0], [0.0, 0.0]]], device=device)
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "unit"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
def test_masked_tokens_cannot_leak(impl, bad, normalize, device, fwd_bwd):
    clean = torch.randn(3, 300, 20, device=device)
    mask = torch.arange(300, device=device) >= torch.tensor([[260], [17], [0]], device=device)
    dirty = clean.masked_fill(~mask[..., None], bad)  # left padding of 260, 17 and 0 tokens
    dy = torch.randn(3, 20, device=device)
    fn = partial(masked_mean, mask=mask, normalize=normalize, impl=impl)
    for got, expected in zip(fwd_bwd(fn, [dirty], dy), fwd_bwd(fn, [clean], dy), strict=True):
        assert torch.equal(got, expected)
    cu = _boundaries([300] * 3, device)
    packed = partial(segment_mean, cu_seqlens=cu, mask=mask.flatten(), impl=impl)
    y, dx = fwd_bwd(packed, [dirty.flatten(0, 1)], dy)
    assert y.isfinite().all()
    assert dx[~mask.flatten()].eq(0).all()


def test_nan_in_a_kept_token_stays_in_its_row_and_column(impl, device, fwd_bwd):
    x = torch.randn(2, 3, 4, device=device)
    x[1, 2, 3] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    y, dx = fwd_bwd(
        partial(masked_mean, mask=mask, impl=impl), [x], torch.randn(2, 4, device=device)
    )
    assert y.isnan().nonzero().tolist() == [[1, 3]]
    assert dx.isfinite().all()
    unit = masked_mean(x, mask, normalize=True, impl=impl)
    assert unit.isnan().any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "unit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_without_tokens_are_zero_and_take_no_gradient(impl, dtype, normalize, device, fwd_bwd):
    x = torch.full((3, 4, 5), float("nan"), device=device).to(dtype)
    x[1] = 1.0
    mask = torch.zeros(3, 4, dtype=torch.bool, device=device)
    mask[1] = True
    dy = torch.randn(3, 5, device=device)
    dy[2] = float("nan")  # an upstream gradient may be anything where nothing can flow
    y, dx = fwd_bwd(partial(masked_mean, mask=mask, normalize=normalize, impl=impl), [x], dy)
    assert y[[0, 2]].eq(0).all()
    assert dx[[0, 2]].eq(0).all()
    assert dx[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_batches(impl, shape, dtype, device, fwd_bwd):
    x = torch.randn(shape, device=device).to(dtype)
    mask = torch.ones(shape[:2], dtype=torch.bool, device=device)
    dy = torch.randn(shape[0], shape[2], device=device)
    y, dx = fwd_bwd(partial(masked_mean, mask=mask, normalize=True, impl=impl), [x], dy)
    assert torch.equal(y, torch.zeros(shape[0], shape[2], device=device))
    assert dx.shape == x.shape
    for lengths in ([], [0, 0]):
        cu = _boundaries(lengths, device)
        packed = partial(segment_mean, cu_seqlens=cu, impl=impl)
        zeros = torch.zeros(len(lengths), 8, device=device)
        y, dx = fwd_bwd(packed, [torch.randn(2, 8, device=device).to(dtype)], zeros + 1)
        assert torch.equal(y, zeros)
        assert dx.eq(0).all()


@pytest.mark.parametrize("normalize", [False, True], ids=["mean", "unit"])
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64], ids=str)
def test_packed_equals_padded_bit_for_bit(impl, cu_dtype, normalize, device, fwd_bwd):
    lengths = torch.tensor([520, 1, 0, 256], device=device)
    x = torch.randn(4, 520, 19, device=device)
    mask = torch.arange(520, device=device) < lengths[:, None]
    dy = torch.randn(4, 19, device=device)
    padded = partial(masked_mean, mask=mask, normalize=normalize, impl=impl)
    cu = _boundaries(lengths.tolist(), device, cu_dtype)
    packed = partial(segment_mean, cu_seqlens=cu, normalize=normalize, impl=impl)
    y, dx = fwd_bwd(padded, [x], dy)
    y_packed, dx_packed = fwd_bwd(packed, [x[mask]], dy)
    assert torch.equal(y, y_packed)
    assert torch.equal(dx[mask], dx_packed)


def test_same_bits_on_every_run_and_in_every_batch(impl, device, fwd_bwd):
    x = torch.randn(4, 270, 70, device=device)
    mask = torch.rand(4, 270, device=device) < 0.5
    dy = torch.randn(4, 70, device=device)
    runs = [
        fwd_bwd(
            partial(masked_mean, mask=mask[rows], normalize=True, impl=impl), [x[rows]], dy[rows]
        )
        for rows in (slice(None), slice(None), slice(2, 3))
    ]
    for first, again, alone in zip(*runs, strict=True):
        assert torch.equal(first, again)
        assert torch.equal(first[2:3], alone)


def _layouts(x):
    """The same values as x: transposed, strided, misaligned by one element, and expanded."""
    spaced = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    spaced[..., ::2] = x
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    shifted[1:] = x.flatten()
    inner = torch.zeros(x.shape[0], x.shape[1] + 3, x.shape[2], dtype=x.dtype, device=x.device)
    inner[:, 2:-1] = x
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "time first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "spaced": spaced[..., ::2],
        "misaligned": shifted[1:].view(x.shape),
        "inner": inner[:, 2:-1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_result(impl, dtype, device, fwd_bwd):
    x = torch.randn(3, 40, 12, device=device).to(dtype)
    mask = (torch.rand(40, 3, device=device) < 0.5).T
    dy = torch.randn(12, 3, device=device).T
    y, dx = fwd_bwd(partial(masked_mean, mask=mask, normalize=True, impl=impl), [x], dy)
    rtol = 0.0 if impl == "triton" and device.type == "cpu" else 1e-5
    for name, other in _layouts(x).items():
        fn = partial(masked_mean, mask=mask.contiguous(), normalize=True, impl=impl)
        for got, expected in zip(fwd_bwd(fn, [other], dy.contiguous()), (y, dx), strict=True):
            torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, msg=name)


def test_expanded_input_and_summed_loss(impl, device):
    x = torch.randn(1, 1, 6, device=device, requires_grad=True)
    mask = torch.tensor([[True, False, True]], device=device).expand(2, 3)
    y = masked_mean(x.expand(2, 3, 6), mask, impl=impl)
    torch.testing.assert_close(y, x[0].expand(2, 6))
    y.sum().backward()  # the upstream gradient has stride 0
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


@pytest.mark.parametrize("step", [-1, 1], ids=["short", "long"])
def test_chunks_of_a_cast_do_not_show(impl, step, device, judge, monkeypatch):
    module = import_module("tercet.kernels.masked_mean")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 16 * 7 + step)
    x = torch.randn(90, 16, device=device).to(torch.bfloat16)
    cu = _boundaries([7, 0, 7, 30, 1, 40], device)
    mask = torch.rand(90, device=device) < 0.8
    ours = partial(segment_mean, cu_seqlens=cu, mask=mask, impl=impl)
    ref = partial(segment_mean_ref, cu_seqlens=cu, mask=mask)
    judge(ours, ref, [x], torch.randn(6, 16, device=device))


def test_two_backward_calls_and_untouched_inputs(impl, device):
    x = torch.randn(2, 9, 5, device=device, requires_grad=True)
    mask = torch.rand(2, 9, device=device) < 0.5
    dy = torch.randn(2, 5, device=device)
    before = [t.detach().clone() for t in (x, mask, dy)]
    y = masked_mean(x, mask, normalize=True, impl=impl)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)[0].clone()
    second = torch.autograd.grad(y, x, dy)[0]
    assert torch.equal(first, second)
    for now, then in zip((x, mask, dy), before, strict=True):
        assert torch.equal(now, then)


def test_no_gradient_wanted(impl, device):
    x = torch.randn(2, 9, 5, device=device)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    assert not masked_mean(x, mask, impl=impl).requires_grad
    y = masked_mean(x.requires_grad_(), mask, impl=impl)
    with pytest.raises(RuntimeError, match="no autograd formula"):  # rather than a silent zero
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)


def test_backward_in_a_bare_thread(impl, device):
    x = torch.randn(2, 9, 5, device=device, requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    y = masked_mean(x, mask, impl=impl)
    thread = threading.Thread(target=lambda: y.backward(torch.ones_like(y)))
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_registration(impl, layout, dtype, device):
    x = torch.randn(3, 5, 8, device=device).to(dtype).requires_grad_()
    mask = torch.rand(3, 5, device=device) < 0.5
    inputs = (x, None, mask, True, impl == "triton")
    if layout == "packed":
        x = x.detach().flatten(0, 1).requires_grad_()
        inputs = (x, _boundaries([4, 0, 11], device), mask.flatten(), True, impl == "triton")
    torch.library.opcheck(torch.ops.tercet.masked_mean.default, inputs)
    y, count, norm = torch.ops.tercet.masked_mean(*inputs)
    assert not norm.requires_grad  # it has no derivative, so it must not look as if it had
    saved = (torch.randn_like(y), y.detach(), count, norm.detach(), *inputs[1:3])
    rest = (list(x.shape), torch.bfloat16, *inputs[3:])
    torch.library.opcheck(torch.ops.tercet.masked_mean_backward.default, (*saved, *rest))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(impl, dynamic, device):
    def loss(x, mask, cu, w):
        padded = masked_mean(x * w, mask, normalize=True, impl=impl)
        packed = segment_mean((x * w).flatten(0, 1), cu, mask.flatten(), impl=impl)
        return (padded * packed).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for t in (5, 6):
        x = torch.randn(3, t, 8, device=device)
        mask = torch.rand(3, t, device=device) < 0.5
        cu = _boundaries([t] * 3, device)
        w = torch.tensor(1.5, device=device, requires_grad=True)
        expected = torch.autograd.grad(loss(x, mask, cu, w), w)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x, mask, cu, w), w)[0], expected)


def test_offsets_beyond_32_bits(impl, device):
    stride = 2**30 + 8  # elements; row 2 begins behind 2^31
    if device.type == "cuda":
        storage = torch.zeros(2 * stride + 64, dtype=torch.float16, device=device)
    else:  # untouched pages of a NumPy array take no memory
        storage = torch.from_numpy(np.zeros(2 * stride + 64, dtype=np.float16))
    x = storage.as_strided((3, 2, 8), (stride, 8, 1))
    x[2] = 3.0
    mask = torch.ones(3, 2, dtype=torch.bool, device=device)
    expected = torch.tensor([0.0, 0.0, 3.0], device=device)[:, None].expand(3, 8)
    torch.testing.assert_close(masked_mean(x, mask, impl=impl), expected)


@pytest.mark.parametrize("layout", ["contiguous", "time first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory_does_not_grow_with_the_input(dtype, layout, device, fwd_bwd):
    x = torch.randn(8, 2048, 256, device=device).to(dtype)
    if layout == "time first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    mask = torch.rand(8, 2048, device=device) < 0.5
    fn = partial(masked_mean, mask=mask, normalize=True)
    dy = torch.randn(8, 256, device=device)
    # the backward hides what the forward borrows, as it returns a gradient of the input's size
    extra = max(extra_bytes(partial(fn, x)), extra_bytes(partial(fwd_bwd, fn, [x], dy)))
    per_row, per_token = 8 * 256 * 4, 8 * 2048 * 8
    whole = dtype == torch.float32 and layout == "contiguous"  # else in chunks, gathered and cast
    cast = 0 if whole or device.type == "cuda" else (x.itemsize + 8) * CHUNK_ELEMENTS
    assert extra <= 16 * per_row + 5 * per_token + cast
    assert extra < x.nbytes / 2


def test_sharded_tensors_are_refused(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.zeros(2, 3, 4), mesh, [Shard(0)])
        mask = distribute_tensor(torch.ones(2, 3, dtype=torch.bool), mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"masked_mean: x must be a plain.*x\.full_tensor\(\)"):
            masked_mean(x, mask)
    finally:
        torch.distributed.destroy_process_group()


def test_rows_lie_on_the_first_grid_axis(impl, device, monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in [name for name in vars(kernels) if name.startswith("_masked_mean_")]:
        monkeypatch.setattr(kernels, name, Recorder())
    x = torch.zeros(70_000, 1, 8, device=device, requires_grad=True)  # axes 1, 2 end at 65,535
    mask = torch.ones(70_000, 1, dtype=torch.bool, device=device)
    masked_mean(x, mask, normalize=True, impl=impl).sum().backward()
    cu = torch.arange(70_001, device=device)
    segment_mean(x.flatten(0, 1), cu, normalize=True, impl=impl).sum().backward()
    assert len(grids) == (10 if impl == "triton" else 0)
    assert all(grid[0] >= 70_000 and grid[1:] in ((), (1,)) for grid in grids)


@pytest.mark.gpu
def test_more_rows_than_a_grid_axis_holds(impl):
    x = torch.randn(70_000, 2, 8, device="cuda")
    mask = torch.rand(70_000, 2, device="cuda") < 0.5
    torch.testing.assert_close(masked_mean(x, mask, impl=impl), masked_mean_ref(x, mask))


@pytest.mark.gpu
def test_current_device_need_not_be_the_tensors(impl):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 9, 8, device="cuda:1", requires_grad=True)
    mask = torch.ones(2, 9, dtype=torch.bool, device="cuda:1")
    with torch.cuda.device(0):
        y = masked_mean(x, mask, impl=impl)
        y.sum().backward()
    torch.testing.assert_close(y, x.mean(1))
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 9))


def test_sums_of_devices_without_an_own_path(impl, device):
    x = torch.randn(20, 6, device=device)
    x[4] = float("nan")
    mask = torch.rand(20, device=device) < 0.6
    mask[4] = False
    cu = _boundaries([3, 0, 9, 5], device, torch.int64)
    sums, count = _sums_plain(x, cu, mask)
    mean = sums / count.clamp(min=1)[:, None]
    torch.testing.assert_close(mean, segment_mean(x, cu, mask, impl=impl))


def _call(impl, x=(2, 3, 4), mask=(2, 3), dtype=torch.float32, mask_dtype=torch.bool):
    masked_mean(torch.zeros(x, dtype=dtype), torch.zeros(mask, dtype=mask_dtype), impl=impl)


def _call_packed(impl, x=(5, 4), cu=(0, 2, 5), mask=None, cu_dtype=torch.int32):
    segment_mean(torch.zeros(x), torch.tensor(cu, dtype=cu_dtype), mask, impl=impl)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (partial(_call, dtype=torch.int64), TypeError, "x must be a floating-point tensor"),
        (partial(_call, mask_dtype=torch.int64), TypeError, r"mask must be bool.*mask\.bool\(\)"),
        (partial(_call, x=(2, 3)), ValueError, r"x must be \[batch, t, hidden\], got \(2, 3\)"),
        (partial(_call, mask=(3, 2)), ValueError, r"mask must be \(2, 3\) like the tokens of x"),
        (partial(_call_packed, x=(5,)), ValueError, r"x must be \[n, hidden\], got \(5,\)"),
        (partial(_call_packed, cu=(0, 2, 6)), ValueError, "end at most at n = 5, got"),
        (partial(_call_packed, cu=(1, 2, 5)), ValueError, "must start at 0"),
        (partial(_call_packed, cu=(0, 3, 2)), ValueError, "not decrease"),
        (partial(_call_packed, cu=((0, 5),)), ValueError, r"must be \[segments \+ 1\]"),
        (partial(_call_packed, cu_dtype=torch.int16), TypeError, "int32 or int64, got torch.int16"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_rejects(impl, call, error, match):
    with pytest.raises(error, match=match):
        call(impl)


def test_rejects_mixed_devices(impl):
    with pytest.raises(ValueError, match="must be on one device, got x on cpu, mask on meta"):
        masked_mean(
            torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool, device="meta"), impl=impl
        )
