"""Triton kernels of masked_mean and segment_mean.

Both layouts are cut into slots: one slot is up to SPLIT_T tokens of one row.  Forward: a partial
sum per slot, then a sum over the slots of a row, in a fixed order, then the norm.  The cut depends
on the row alone: padded equals packed and a row never feels its neighbours, bit for bit.

Padded: row b owns slots [b * splits, (b + 1) * splits).  Packed: row i owns the slots from
cu[i] // SPLIT_T + i on; the next row begins behind them, as ceil(a) <= floor(b + a) - floor(b) + 1.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels.reference import NORM_EPS, accumulator_dtype

SPLIT_T = 256  # tokens per slot; part of the numerics: it fixes the order of summation
BLOCK_T = 8  # a warp sums a tile of BLOCK_T x BLOCK_H on its own: what is in flight is many blocks
BLOCK_H = 256
SUM_WARPS = 1
SCATTER_T = 16
BLOCK_SPLITS = 8
BLOCK_ROW = 1024  # columns at once where a program owns a whole row


@triton.jit
def _slot_range(
    slot, cu_ptr, t, rows, splits,
    PACKED: tl.constexpr, SEARCH_STEPS: tl.constexpr, SPLIT_T: tl.constexpr,
):  # fmt: skip
    """Row of a slot, its first token inside the row (packed: in x), and how many tokens it holds.

    t is the padded length, or the number of packed tokens.  Row `rows` of a packed batch is what
    lies behind cu[rows].  A slot that no row owns holds no tokens.
    """
    if PACKED:
        low = slot * 0  # the largest row <= rows whose first slot is <= slot
        high = low + rows + 1
        # unrolled: behind a loop over loads, Triton 3.9 loads x one element at a time
        for _ in tl.static_range(SEARCH_STEPS):
            middle = (low + high) // 2
            first_slot = tl.load(cu_ptr + middle).to(tl.int64) // SPLIT_T + middle
            low = tl.where(first_slot <= slot, middle, low)
            high = tl.where(first_slot <= slot, high, middle)
        row = low
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.load(cu_ptr + row + 1, mask=row < rows, other=t).to(tl.int64)
        first = start + (slot - start // SPLIT_T - row) * SPLIT_T
        length = tl.minimum(end, t) - first
    else:
        row = slot // splits
        first = (slot % splits) * SPLIT_T
        length = t - first
    return row, first, tl.maximum(tl.minimum(length, SPLIT_T), 0).to(tl.int32)


@triton.jit
def _masked_mean_partial(
    x_ptr, mask_ptr, cu_ptr, partial_ptr, count_ptr,
    t, hidden, rows, splits, stride_xb, stride_xt, stride_xh,
    PACKED: tl.constexpr, SEARCH_STEPS: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr,
    SPLIT_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, first, length = _slot_range(slot, cu_ptr, t, rows, splits, PACKED, SEARCH_STEPS, SPLIT_T)
    offs = tl.arange(0, SPLIT_T)
    length = tl.where(row < rows, length, 0)  # tokens of no row are not read
    keep = offs < length
    if PACKED:
        x_ptr += first * stride_xt
        mask_ptr += first
    else:
        x_ptr += row * stride_xb + first * stride_xt
        mask_ptr += row * t + first
    if HAS_MASK:
        keep &= tl.load(mask_ptr + offs, mask=keep, other=0) != 0
    count = tl.sum(keep.to(tl.int32), axis=0)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + slot, count)
    if count != 0:  # else nothing reads the partial sum
        begin = tl.min(tl.where(keep, offs, SPLIT_T), axis=0)
        begin -= begin % BLOCK_T
        end = tl.max(tl.where(keep, offs + 1, 0), axis=0)
        offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
        in_row = offs_h < hidden
        acc = tl.zeros((BLOCK_T, BLOCK_H), dtype=ACC)
        for tile in range(begin, end, BLOCK_T):
            offs_t = tile + tl.arange(0, BLOCK_T)
            kept = offs_t < length
            if HAS_MASK:
                kept &= tl.load(mask_ptr + offs_t, mask=kept, other=0) != 0
            offs_x = offs_t[:, None].to(tl.int64) * stride_xt + offs_h[None, :] * stride_xh
            x = tl.load(x_ptr + offs_x, mask=kept[:, None] & in_row[None, :], other=0.0)
            acc += x.to(ACC)  # a masked token is never loaded, so its NaN cannot enter
        tl.store(partial_ptr + slot * hidden + offs_h, tl.sum(acc, axis=0), mask=in_row)


@triton.jit
def _masked_mean_combine(
    partial_ptr, slot_count_ptr, cu_ptr, mean_ptr, count_ptr, t, hidden, splits,
    PACKED: tl.constexpr, ACC: tl.constexpr,
    SPLIT_T: tl.constexpr, BLOCK_SPLITS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.minimum(tl.load(cu_ptr + row + 1).to(tl.int64), t)
        first = start // SPLIT_T + row
        num_slots = (end - start + SPLIT_T - 1) // SPLIT_T
    else:
        first = row * splits
        num_slots = splits
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = offs_h < hidden
    acc = tl.zeros((BLOCK_SPLITS, BLOCK_H), dtype=ACC)
    counts = tl.zeros((BLOCK_SPLITS,), dtype=tl.int32)
    for block in range(0, num_slots, BLOCK_SPLITS):
        offs_s = block + tl.arange(0, BLOCK_SPLITS)
        slot = first + offs_s
        slot_counts = tl.load(slot_count_ptr + slot, mask=offs_s < num_slots, other=0)
        written = (slot_counts > 0)[:, None] & in_row[None, :]
        acc += tl.load(
            partial_ptr + slot[:, None] * hidden + offs_h[None, :], mask=written, other=0.0
        )
        counts += slot_counts
    count = tl.sum(counts, axis=0)
    mean = tl.sum(acc, axis=0) / tl.maximum(count, 1).to(ACC)
    tl.store(mean_ptr + row * hidden + offs_h, mean, mask=in_row)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + row, count)


@triton.jit
def _masked_mean_normalize(
    y_ptr, norm_ptr, hidden, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_ROW: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * hidden
    squares = tl.zeros((BLOCK_ROW,), dtype=ACC)
    for block in range(0, hidden, BLOCK_ROW):
        offs_h = block + tl.arange(0, BLOCK_ROW)
        y = tl.load(y_ptr + offs_h, mask=offs_h < hidden, other=0.0)
        squares += y * y
    norm = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(norm_ptr + row, norm)
    divisor = tl.where(norm < EPS, EPS, norm)  # keeps NaN, which tl.maximum need not
    for block in range(0, hidden, BLOCK_ROW):
        offs_h = block + tl.arange(0, BLOCK_ROW)
        y = tl.load(y_ptr + offs_h, mask=offs_h < hidden, other=0.0)
        tl.store(y_ptr + offs_h, y / divisor, mask=offs_h < hidden)


@triton.jit
def _masked_mean_row_grad(
    dy_ptr, y_ptr, norm_ptr, count_ptr, grad_ptr, hidden, stride_db, stride_dh,
    NORMALIZE: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """What each kept token of a row receives: (dy - y (y . dy)) / |mean| / count."""
    row = tl.program_id(0).to(tl.int64)
    dy_ptr += row * stride_db
    y_ptr += row * hidden
    grad_ptr += row * hidden
    count = tl.load(count_ptr + row)
    live = tl.where(count > 0, hidden, 0)  # nothing flows into an empty row: zeros
    divisor = tl.maximum(count, 1).to(ACC)
    along = tl.zeros((), dtype=ACC)
    norm = tl.full((), 1.0, dtype=ACC)
    if NORMALIZE:
        norm = tl.load(norm_ptr + row)
        products = tl.zeros((BLOCK_ROW,), dtype=ACC)
        for block in range(0, hidden, BLOCK_ROW):
            offs_h = block + tl.arange(0, BLOCK_ROW)
            y = tl.load(y_ptr + offs_h, mask=offs_h < hidden, other=0.0)
            dy = tl.load(dy_ptr + offs_h.to(tl.int64) * stride_dh, mask=offs_h < live, other=0.0)
            products += y * dy
        along = tl.where(norm < EPS, 0.0, tl.sum(products, axis=0))
        norm = tl.where(norm < EPS, EPS, norm)
    for block in range(0, hidden, BLOCK_ROW):
        offs_h = block + tl.arange(0, BLOCK_ROW)
        dy = tl.load(dy_ptr + offs_h.to(tl.int64) * stride_dh, mask=offs_h < live, other=0.0)
        if NORMALIZE:
            dy -= along * tl.load(y_ptr + offs_h, mask=offs_h < hidden, other=0.0)
        tl.store(grad_ptr + offs_h, dy / norm / divisor, mask=offs_h < hidden)


@triton.jit
def _masked_mean_scatter(
    grad_ptr, mask_ptr, cu_ptr, dx_ptr, t, hidden, rows, splits,
    PACKED: tl.constexpr, SEARCH_STEPS: tl.constexpr, HAS_MASK: tl.constexpr,
    SPLIT_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, first, length = _slot_range(slot, cu_ptr, t, rows, splits, PACKED, SEARCH_STEPS, SPLIT_T)
    if not PACKED:
        first += row * t
    mask_ptr += first
    dx_ptr += first * hidden
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = offs_h < hidden
    owned = tl.where(row < rows, hidden, 0)  # tokens of no row get zeros
    grad = tl.load(grad_ptr + row * hidden + offs_h, mask=offs_h < owned, other=0.0)
    grad = grad.to(dx_ptr.dtype.element_ty)
    for tile in range(0, length, BLOCK_T):
        offs_t = tile + tl.arange(0, BLOCK_T)
        inside = offs_t < length
        dx = tl.zeros((BLOCK_T, BLOCK_H), dtype=dx_ptr.dtype.element_ty) + grad[None, :]
        if HAS_MASK:
            kept = tl.load(mask_ptr + offs_t, mask=inside, other=0) != 0
            dx = tl.where(kept[:, None], dx, 0.0)
        offs_x = offs_t[:, None].to(tl.int64) * hidden + offs_h[None, :]
        tl.store(dx_ptr + offs_x, dx, mask=inside[:, None] & in_row[None, :])


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current CUDA device, which may not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _cut(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Tokens per row (packed: in all), rows, slots per padded row, slots."""
    if cu_seqlens is not None:
        rows = cu_seqlens.shape[0] - 1
        return shape[0], rows, 0, shape[0] // SPLIT_T + rows + 1
    splits = triton.cdiv(shape[1], SPLIT_T)
    return shape[1], shape[0], splits, shape[0] * splits


def _search_steps(rows: int) -> int:
    """Halvings that find one of rows + 1 entries, rounded up so that few variants are compiled."""
    return triton.cdiv(rows.bit_length(), 4) * 4


def _pointers(
    cu_seqlens: Tensor | None, mask: Tensor | None, unused: Tensor
) -> tuple[Tensor, Tensor]:
    """Contiguous cu_seqlens and mask as bytes; `unused` stands for what is not there."""
    return (
        unused if cu_seqlens is None else cu_seqlens.contiguous(),
        unused if mask is None else mask.contiguous().view(torch.uint8),
    )


def forward(
    x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [rows, hidden], tokens per row, and the norm divided by (1 without normalize)."""
    t, rows, splits, slots = _cut(x.shape, cu_seqlens)
    hidden, dtype = x.shape[-1], accumulator_dtype(x)
    mean = torch.empty((rows, hidden), dtype=dtype, device=x.device)
    count = torch.empty(rows, dtype=torch.int32, device=x.device)
    norm = torch.ones(rows, dtype=dtype, device=x.device)
    partial = torch.empty((slots, hidden), dtype=dtype, device=x.device)
    slot_count = torch.empty(slots, dtype=torch.int32, device=x.device)
    packed = cu_seqlens is not None
    cu, keep = _pointers(cu_seqlens, mask, slot_count)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    columns = triton.cdiv(hidden, BLOCK_H)
    strides = (0, *x.stride()) if packed else x.stride()
    with _on(x.device):
        if slots * columns:
            _masked_mean_partial[(slots, columns)](
                x, keep, cu, partial, slot_count, t, hidden, rows, splits, *strides,
                PACKED=packed, SEARCH_STEPS=_search_steps(rows), HAS_MASK=mask is not None, ACC=acc,
                SPLIT_T=SPLIT_T, BLOCK_T=BLOCK_T, BLOCK_H=BLOCK_H, num_warps=SUM_WARPS,
            )  # fmt: skip
        if rows * columns:
            _masked_mean_combine[(rows, columns)](
                partial, slot_count, cu, mean, count, t, hidden, splits, PACKED=packed, ACC=acc,
                SPLIT_T=SPLIT_T, BLOCK_SPLITS=BLOCK_SPLITS, BLOCK_H=BLOCK_H,
            )  # fmt: skip
            if normalize:
                _masked_mean_normalize[(rows,)](
                    mean, norm, hidden, EPS=NORM_EPS, ACC=acc, BLOCK_ROW=BLOCK_ROW
                )
    return mean, count, norm


def backward(
    dy: Tensor,
    y: Tensor,
    count: Tensor,
    norm: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dx: Tensor,
    normalize: bool,
) -> Tensor:
    """Writes the gradient of x into dx, which is contiguous, and returns it."""
    t, rows, splits, slots = _cut(dx.shape, cu_seqlens)
    hidden = dx.shape[-1]
    grad = torch.empty_like(y)
    cu, keep = _pointers(cu_seqlens, mask, count)
    acc = tl.float64 if y.dtype == torch.float64 else tl.float32
    columns = triton.cdiv(hidden, BLOCK_H)
    with _on(dx.device):
        if rows * columns:
            _masked_mean_row_grad[(rows,)](
                dy, y, norm, count, grad, hidden, *dy.stride(),
                NORMALIZE=normalize, EPS=NORM_EPS, ACC=acc, BLOCK_ROW=BLOCK_ROW,
            )  # fmt: skip
        if slots * columns:
            _masked_mean_scatter[(slots, columns)](
                grad, keep, cu, dx, t, hidden, rows, splits,
                PACKED=cu_seqlens is not None, SEARCH_STEPS=_search_steps(rows),
                HAS_MASK=mask is not None,
                SPLIT_T=SPLIT_T, BLOCK_T=SCATTER_T, BLOCK_H=BLOCK_H,
            )  # fmt: skip
    return dx
