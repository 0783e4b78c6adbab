r"""Masked mean of hidden states, padded or packed, with an optional L2 norm of the result.

    mean_b = sum_{t kept in row b} x_bt / max(1, number kept);   y_b = mean_b / max(|mean_b|, 1e-12)

Bytes moved: forward reads the kept tokens of x once, backward writes the gradient of x once.  Extra
memory: O(batch x hidden), and two integers per token on a CPU or one float32 partial row per 256
tokens on a GPU.  A masked token never enters arithmetic, so NaN or Inf in it cannot leak.
"""

import torch
from torch import Tensor

from tercet.kernels import _masked_mean_triton
from tercet.kernels._checks import (
    Impl,
    check_float,
    check_same_device,
    check_tensor,
    use_triton,
)
from tercet.kernels._memory import empty_huge
from tercet.kernels._typing import Bool, Float, Int
from tercet.kernels.reference import NORM_EPS, accumulator_dtype

CHUNK_ELEMENTS = 1 << 18  # elements gathered and cast at once on a CPU: 1 MB of float32


def _boundaries(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64[rows + 1]: flat index of each row's first token, then one past the last row."""
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int64)
    batch, t = x.shape[:2]
    return torch.arange(batch + 1, device=x.device) * t


def _kept_tokens(x: Tensor, cu: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat indices of the tokens that count, and where each row begins in that list."""
    if mask is None:
        return torch.arange(int(cu[-1]), device=x.device), cu
    kept = mask.flatten()[: int(cu[-1])].nonzero().squeeze(1)
    return kept, torch.searchsorted(kept, cu)


def _bag(x: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
    """Sum of x[indices[offsets[i]:offsets[i + 1]]] for each i: parallel over i, ordered inside."""
    return torch.embedding_bag(x, indices, offsets, False, 0, False, None, True)[0]


def _gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x by their index in the flattened token axis, whatever the strides of x."""
    if x.ndim == 3 and not x.is_contiguous():
        return x[indices // x.shape[1], indices % x.shape[1]]
    return x.flatten(0, -2).index_select(0, indices)


def _sums_cpu(x: Tensor, kept: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the kept tokens of each row; casts and gathers at most CHUNK_ELEMENTS at a time."""
    hidden, dtype = x.shape[-1], accumulator_dtype(x)
    if hidden == 0:
        return torch.zeros(len(offsets) - 1, 0, dtype=dtype)
    if x.dtype == dtype and x.is_contiguous():
        return _bag(x.flatten(0, -2), kept, offsets)
    sums = torch.zeros(len(offsets) - 1, hidden, dtype=dtype)
    step = max(1, CHUNK_ELEMENTS // hidden)
    for low in range(0, len(kept), step):
        high = min(low + step, len(kept))
        first = int(torch.searchsorted(offsets, low, right=True)) - 1  # rows that the chunk touches
        last = int(torch.searchsorted(offsets, high))
        tokens = _gather_tokens(x, kept[low:high]).to(dtype)
        bags = offsets[first : last + 1].clamp(low, high) - low
        sums[first:last] += _bag(tokens, torch.arange(high - low), bags)
    return sums


def _sums_plain(x: Tensor, cu: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums and counts without a host synchronisation, by a masked copy; for devices but the CPU."""
    tokens = x.to(accumulator_dtype(x)).flatten(0, -2)
    keep = torch.ones_like(tokens[:, 0], dtype=torch.bool) if mask is None else mask.flatten()
    tokens = tokens.masked_fill(~keep[:, None], 0.0)
    sums = torch.segment_reduce(tokens, "sum", offsets=cu, axis=0, unsafe=True, initial=0.0)
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return sums, before[cu].diff()


def _forward_torch(
    x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    cu = _boundaries(x, cu_seqlens)
    if x.device.type == "cpu":
        kept, offsets = _kept_tokens(x, cu, mask)
        sums, count = _sums_cpu(x, kept, offsets), offsets.diff()
    else:
        sums, count = _sums_plain(x, cu, mask)
    mean = sums / count.clamp(min=1)[:, None]
    norm = torch.linalg.vector_norm(mean, dim=1) if normalize else mean.new_ones(len(mean))
    return mean / norm.clamp(min=NORM_EPS)[:, None], count.to(torch.int32), norm


def _row_gradient(dy: Tensor, y: Tensor, count: Tensor, norm: Tensor, normalize: bool) -> Tensor:
    """Gradient that each kept token of a row receives: [rows, hidden]."""
    if normalize:
        along = torch.where(norm >= NORM_EPS, (dy * y).sum(1), 0.0)
        dy = (dy - y * along[:, None]) / norm.clamp(min=NORM_EPS)[:, None]
    return dy / count.clamp(min=1)[:, None]


def _backward_torch(
    dy: Tensor,
    y: Tensor,
    count: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dx: Tensor,
    normalize: bool,
) -> Tensor:
    """Copies each row's gradient to its kept tokens in dx, and zeros to all others."""
    row_grad = _row_gradient(dy, y, count, norm, normalize).to(dx.dtype)
    tokens = dx.flatten(0, -2)  # a view
    cu = _boundaries(dx, cu_seqlens)
    row = torch.searchsorted(cu[1:], torch.arange(len(tokens), device=dx.device), right=True)
    if mask is not None:  # row len(row_grad) of the table is zero, also for tokens behind the last
        row = torch.where(mask.flatten(), row, len(row_grad))
    table = torch.cat([row_grad, torch.zeros_like(tokens[:1])])
    torch.index_select(table, 0, row, out=tokens)
    return dx


@torch.library.custom_op("tercet::masked_mean", mutates_args=())
def _masked_mean(
    x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, normalize: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and number of tokens of each row, and the norm divided by (1 without normalize)."""
    if cu_seqlens is not None and not cu_seqlens.is_cuda:
        _check_boundaries(cu_seqlens, x.shape[0])
    if triton:
        return _masked_mean_triton.forward(x, cu_seqlens, mask, normalize)
    return _forward_torch(x, cu_seqlens, mask, normalize)


@_masked_mean.register_fake
def _(x, cu_seqlens, mask, normalize, triton):
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mean = x.new_empty((rows, x.shape[-1]), dtype=accumulator_dtype(x))
    return mean, mean.new_empty(rows, dtype=torch.int32), mean.new_empty(rows)


@torch.library.custom_op("tercet::masked_mean_backward", mutates_args=())
def _masked_mean_backward(
    dy: Tensor,
    y: Tensor,
    count: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    x_shape: list[int],
    x_dtype: torch.dtype,
    normalize: bool,
    triton: bool,
) -> Tensor:
    dx = empty_huge(x_shape, dtype=x_dtype, device=dy.device)
    saved = (dy, y, count, norm, cu_seqlens, mask)
    return (_masked_mean_triton.backward if triton else _backward_torch)(*saved, dx, normalize)


@_masked_mean_backward.register_fake
def _(dy, y, count, norm, cu_seqlens, mask, x_shape, x_dtype, normalize, triton):
    return dy.new_empty(x_shape, dtype=x_dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, cu_seqlens, mask, ctx.normalize, ctx.triton = inputs
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.save_for_backward(*output, cu_seqlens, mask)
    ctx.mark_non_differentiable(*output[1:])


def _autograd_backward(ctx, dy, _dcount, _dnorm):
    y, count, norm, cu_seqlens, mask = ctx.saved_tensors
    saved = (y, count, norm, cu_seqlens, mask, ctx.x_shape, ctx.x_dtype, ctx.normalize, ctx.triton)
    return _masked_mean_backward(dy, *saved), None, None, None, None


_masked_mean.register_autograd(_autograd_backward, setup_context=_setup_context)


def _check_boundaries(cu_seqlens: Tensor, n: int) -> None:
    """Raises ValueError unless 0 = cu[0] <= cu[1] <= ... <= cu[-1] <= n; reads the values."""
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if int(cu_seqlens[0]) != 0:
        bad = 0
    elif bool(falls.any()):
        bad = int(falls.nonzero()[0]) + 1
    elif int(cu_seqlens[-1]) > n:
        bad = len(cu_seqlens) - 1
    else:
        return
    before = f" behind {int(cu_seqlens[bad - 1])}" if bad else ""
    raise ValueError(
        f"segment_mean: cu_seqlens must start at 0, not decrease and end at most at n = {n}, "
        f"got cu_seqlens[{bad}] = {int(cu_seqlens[bad])}{before}; "
        "pass the running sum of the row lengths"
    )


def _check_mask(op: str, mask: Tensor, shape: torch.Size) -> None:
    check_tensor(op, "mask", mask, "bool")
    if mask.shape != shape:
        raise ValueError(
            f"{op}: mask must be {tuple(shape)} like the tokens of x, got {tuple(mask.shape)}"
        )


def masked_mean(
    x: Float[Tensor, "batch t hidden"],
    mask: Bool[Tensor, "batch t"],
    *,
    normalize: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "batch hidden"]:
    """Mean of x over the tokens where mask is true, accumulated and returned in float32.

    A row without such tokens is zero and gives no gradient.  float64 input stays float64.  The
    result of a row does not depend on the other rows, and is the same bit for bit on every run.

    Args:
        x: hidden states of any floating dtype and any strides.
        mask: true on the tokens that count; left padding, right padding or holes.
        normalize: divide each mean by its L2 norm (at least 1e-12).
        impl: "auto" is Triton on CUDA and PyTorch elsewhere.

    Raises:
        TypeError: x is not a floating tensor, or mask is not a bool tensor.
        ValueError: wrong shapes, or x and mask on different devices.
    """
    check_float("masked_mean", x=x)
    if x.ndim != 3:
        raise ValueError(f"masked_mean: x must be [batch, t, hidden], got {tuple(x.shape)}")
    _check_mask("masked_mean", mask, x.shape[:2])
    check_same_device("masked_mean", x=x, mask=mask)
    return _masked_mean(x, None, mask, normalize, use_triton("masked_mean", impl, x))[0]


def segment_mean(
    x: Float[Tensor, "n hidden"],
    cu_seqlens: Int[Tensor, " segments_plus_1"],
    mask: Bool[Tensor, " n"] | None = None,
    *,
    normalize: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "segments hidden"]:
    """Masked mean of each packed row x[cu_seqlens[i]:cu_seqlens[i + 1]]; see masked_mean.

    Rows may be empty (zeros, no gradient).  Tokens behind cu_seqlens[-1] belong to no row.

    Args:
        x: hidden states of all rows, one behind the other.
        cu_seqlens: int32 or int64, running sum of the row lengths, starting at 0.  Its values are
            checked on a CPU; on a GPU that would stop the stream, so there they are trusted.
        mask: true on the tokens that count; None counts all.
        normalize: divide each mean by its L2 norm (at least 1e-12).
        impl: "auto" is Triton on CUDA and PyTorch elsewhere.

    Raises:
        TypeError: x is not a floating tensor, cu_seqlens not one of int32 or int64, or mask not
            one of bool.
        ValueError: wrong shapes, boundaries out of order, or tensors on different devices.
    """
    check_float("segment_mean", x=x)
    if x.ndim != 2:
        raise ValueError(f"segment_mean: x must be [n, hidden], got {tuple(x.shape)}")
    check_tensor("segment_mean", "cu_seqlens", cu_seqlens, "index")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"segment_mean: cu_seqlens must be [segments + 1], got {tuple(cu_seqlens.shape)}"
        )
    if mask is not None:
        _check_mask("segment_mean", mask, x.shape[:1])
    check_same_device("segment_mean", x=x, cu_seqlens=cu_seqlens, mask=mask)
    return _masked_mean(x, cu_seqlens, mask, normalize, use_triton("segment_mean", impl, x))[0]
