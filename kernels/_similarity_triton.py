"""Triton kernels on a tile of inner products: logits, masks, log-sum-exps, gradients, statistics.

One program per block of a tile.  It reads the products once and leaves one partial result per row
and per column of its block, which are joined in a fixed order; `_tile_bwd` writes the gradients
of the products.  Bytes moved: the tile once, and in the backward its gradient in the operands'
dtype.  Rows of a tile lie a multiple of BLOCK_C apart, so that loads need no mask along columns.
"""
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 16
BLOCK_C = 128


@triton.jit
def _block(
    s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, stride_s, num_rows, num_cols, first,
    num_blocks, HAS_IDS: tl.constexpr, OWN: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows, columns, products, their factors, which are of negatives and which of positives."""
    pid = tl.program_id(0)
    rows = (pid // num_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col_block = (pid % num_blocks).to(tl.int64)
    cols = col_block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_kept, col_kept = rows < num_rows, cols < num_cols
    keep = row_kept[:, None] & col_kept[None, :]
    s_ptrs = s_ptr + rows[:, None] * stride_s + cols[None, :]
    s = tl.load(s_ptrs, mask=row_kept[:, None], other=0.0)
    s = tl.where(col_kept[None, :], s, 0.0)  # what lies behind the last column is anything
    inv = tl.load(inv_row_ptr + rows, mask=row_kept, other=0.0)[:, None]
    at = rows[:, None] * num_cols + cols[None, :]
    if OWN:  # every row has its own columns
        inv = inv * tl.load(inv_col_ptr + at, mask=keep, other=0.0)
    else:
        inv = inv * tl.load(inv_col_ptr + cols, mask=col_kept, other=0.0)[None, :]
    if HAS_IDS:
        row_id = tl.load(row_id_ptr + rows, mask=row_kept, other=0)[:, None]
        if OWN:
            keep &= row_id != tl.load(col_id_ptr + at, mask=keep, other=0)
        else:
            keep &= row_id != tl.load(col_id_ptr + cols, mask=col_kept, other=0)[None, :]
    lanes = tl.arange(0, BLOCK_C)[None, :]
    positive = lanes == (rows + first - col_block * BLOCK_C).to(tl.int32)[:, None]
    if DIAGONAL:
        keep &= ~positive
    return rows, cols, s, inv, keep, positive


@triton.jit
def _below(keep, z, limit_ptr, offs, size):
    """keep, but not where logits are above their limit; NaN stays."""
    return keep & ~(z > tl.load(limit_ptr + offs, mask=offs < size, other=0.0))


@triton.jit
def _log_sum_exp(z, axis: tl.constexpr):
    m = tl.max(z, axis=axis, keep_dims=True)
    m = tl.where(tl.abs(m) == float("inf"), 0.0, m)
    total = tl.sum(tl.exp(z - m), axis=axis, keep_dims=True)
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), m + tl.log(some))
    return tl.reshape(lse, (z.shape[1 - axis],))


@triton.jit
def _tile_fwd(
    s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, row_limit_ptr, col_limit_ptr,
    scale_ptr, row_ptr, col_ptr, stride_s, num_rows, num_cols, first, num_blocks,
    HAS_IDS: tl.constexpr, HAS_LIMIT: tl.constexpr, OWN: tl.constexpr, DIAGONAL: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, cols, s, inv, keep, _ = _block(
        s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, stride_s, num_rows, num_cols,
        first, num_blocks, HAS_IDS, OWN, DIAGONAL, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    z = s * inv * tl.load(scale_ptr)
    of_row = keep
    if HAS_LIMIT:
        of_row = _below(keep, z, row_limit_ptr, rows[:, None], num_rows)
    row = _log_sum_exp(tl.where(of_row, z, float("-inf")), 1)
    col_block = (tl.program_id(0) % num_blocks).to(tl.int64)
    tl.store(row_ptr + col_block * num_rows + rows, row, mask=rows < num_rows)
    if SYMMETRIC:
        if HAS_LIMIT:
            keep = _below(keep, z, col_limit_ptr, cols[None, :], num_cols)
        col = _log_sum_exp(tl.where(keep, z, float("-inf")), 0)
        row_block = (tl.program_id(0) // num_blocks).to(tl.int64)
        tl.store(col_ptr + row_block * num_cols + cols, col, mask=cols < num_cols)


@triton.jit
def _share(keep, z, lse_ptr, slope_ptr, offs, size):
    """Slope times exp(z - lse) of the negatives, 0 elsewhere."""
    lse = tl.load(lse_ptr + offs, mask=offs < size, other=0.0)
    slope = tl.load(slope_ptr + offs, mask=offs < size, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    return tl.exp(tl.where(keep, z - lse, float("-inf"))) * slope


@triton.jit
def _tile_bwd(
    s_ptr, ds_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, row_limit_ptr, col_limit_ptr,
    scale_ptr, row_ptr, col_ptr, d_positive_ptr, d_row_ptr, d_col_ptr,
    stride_s, num_rows, num_cols, first, num_blocks,
    HAS_IDS: tl.constexpr, HAS_LIMIT: tl.constexpr, OWN: tl.constexpr, DIAGONAL: tl.constexpr,
    SYMMETRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, cols, s, inv, keep, positive = _block(
        s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, stride_s, num_rows, num_cols,
        first, num_blocks, HAS_IDS, OWN, DIAGONAL, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    inv = inv * tl.load(scale_ptr)
    z = s * inv
    of_row = keep
    if HAS_LIMIT:
        of_row = _below(keep, z, row_limit_ptr, rows[:, None], num_rows)
    dz = _share(of_row, z, row_ptr, d_row_ptr, rows[:, None], num_rows)
    if SYMMETRIC:
        if HAS_LIMIT:
            keep = _below(keep, z, col_limit_ptr, cols[None, :], num_cols)
        dz += _share(keep, z, col_ptr, d_col_ptr, cols[None, :], num_cols)
    if DIAGONAL:
        d_positive = tl.load(d_positive_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
        dz = tl.where(positive, d_positive, dz)
    ds_ptrs = ds_ptr + rows[:, None] * stride_s + cols[None, :]
    tl.store(ds_ptrs, (dz * inv).to(ds_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit
def _tile_stats(
    s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, scale_ptr, positive_ptr,
    row_ptr, hardest_ptr, index_ptr, above_ptr, stride_s, num_rows, num_cols, first, num_blocks,
    HAS_IDS: tl.constexpr, OWN: tl.constexpr, DIAGONAL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, _, s, inv, keep, _ = _block(
        s_ptr, inv_row_ptr, inv_col_ptr, row_id_ptr, col_id_ptr, stride_s, num_rows, num_cols,
        first, num_blocks, HAS_IDS, OWN, DIAGONAL, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    kept = rows < num_rows
    block = (tl.program_id(0) % num_blocks).to(tl.int64)
    at = block * num_rows + rows
    s = tl.where(keep, s * inv, float("-inf"))
    tl.store(row_ptr + at, _log_sum_exp(s * tl.load(scale_ptr), 1), mask=kept)
    positive = tl.load(positive_ptr + rows, mask=kept, other=0.0)[:, None]
    above = tl.sum((keep & ~(s <= positive)).to(tl.float32), axis=1)  # at most BLOCK_C
    tl.store(above_ptr + at, above.to(tl.int64), mask=kept)
    num_bad = tl.sum((s != s).to(tl.float32), axis=1)
    s = tl.where(s == s, s, float("inf"))  # a maximum would drop NaN
    hardest = tl.max(s, axis=1)
    lanes = tl.arange(0, BLOCK_C)[None, :].to(tl.float32)
    index = tl.cast(tl.min(tl.where(s == hardest[:, None], lanes, BLOCK_C), axis=1), tl.int64)
    tl.store(hardest_ptr + at, tl.where(num_bad != 0, float("nan"), hardest), mask=kept)
    tl.store(index_ptr + at, block * BLOCK_C + index, mask=kept)


class Frame(NamedTuple):
    """What surrounds a tile: factors, ids and limits of its rows and columns."""

    inv_row: Tensor
    inv_col: Tensor  # [columns], or [rows, columns] of every row's own
    row_ids: Tensor | None
    col_ids: Tensor | None
    row_limit: Tensor | None
    col_limit: Tensor | None
    first: int | None  # column of row 0's positive; None: the tile has no positives


def _launch(kernel, s: Tensor, frame: Frame, *, limits: bool = True, **arguments) -> None:
    """Runs a kernel on every block of a tile."""
    inv_row, inv_col, row_ids, col_ids, row_limit, col_limit, first = frame
    if row_ids is None or col_ids is None:
        row_ids = col_ids = None
    if limits:
        arguments |= {"row_limit_ptr": row_limit, "col_limit_ptr": col_limit}
        arguments["HAS_LIMIT"] = row_limit is not None
    num_blocks = triton.cdiv(s.shape[1], BLOCK_C)
    kernel[(triton.cdiv(s.shape[0], BLOCK_R) * num_blocks,)](
        s_ptr=s, inv_row_ptr=inv_row, inv_col_ptr=inv_col, row_id_ptr=row_ids, col_id_ptr=col_ids,
        stride_s=s.stride(0), num_rows=s.shape[0], num_cols=s.shape[1], first=first or 0,
        num_blocks=num_blocks, HAS_IDS=row_ids is not None, OWN=inv_col.ndim == 2,
        DIAGONAL=first is not None, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=8, **arguments,
    )  # fmt: skip


def _partials(s: Tensor, number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """One result per row and block of columns."""
    shape = (number, triton.cdiv(s.shape[1], BLOCK_C), s.shape[0])
    return s.new_empty(shape, dtype=dtype).unbind()


def reduce(
    s: Tensor, frame: Frame, scale: Tensor, *, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of the negatives of each row and, if symmetric, of each column."""
    (row,) = _partials(s, 1)
    col = s.new_empty((triton.cdiv(s.shape[0], BLOCK_R), s.shape[1])) if symmetric else None
    _launch(_tile_fwd, s, frame, scale_ptr=scale, row_ptr=row, col_ptr=col, SYMMETRIC=symmetric)
    return row.logsumexp(0), None if col is None else col.logsumexp(0)


def weigh(
    s: Tensor,
    frame: Frame,
    scale: Tensor,
    lse: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor, Tensor | None],
    out: Tensor,
) -> Tensor:
    """Gradient of the products, from log-sum-exps of rows and columns and the slopes of both."""
    d_positive, d_row, d_col = slopes
    _launch(
        _tile_bwd, s, frame, scale_ptr=scale, ds_ptr=out, row_ptr=lse[0], col_ptr=lse[1],
        d_positive_ptr=d_positive, d_row_ptr=d_row, d_col_ptr=d_col,
        SYMMETRIC=d_col is not None and frame.first is not None,
    )  # fmt: skip
    return out


def describe(
    s: Tensor, frame: Frame, scale: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: log-sum-exp, hardest negative and its column, negatives above the positive."""
    row, hardest = _partials(s, 2)
    index, above = _partials(s, 2, torch.int64)
    _launch(
        _tile_stats, s, frame, limits=False, scale_ptr=scale, positive_ptr=positive,
        row_ptr=row, hardest_ptr=hardest, index_ptr=index, above_ptr=above,
    )  # fmt: skip
    best, block = hardest.max(0)
    return row.logsumexp(0), best, index.gather(0, block[None])[0], above.sum(0)
