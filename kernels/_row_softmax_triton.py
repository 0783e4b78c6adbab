"""Triton kernels of `_row_softmax.py`: one program per row, one read of it per pass."""
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096
NUM_WARPS = 8


@triton.jit
def _row_softmax_fwd(
    x_ptr, target_ptr, scale_ptr, max_ptr, rest_ptr, spread_ptr, picked_ptr,
    inner, stride_outer, stride_inner, V, first_column, K,
    FIRST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride: N*V can exceed 2^31
    x_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    scale = tl.load(scale_ptr + row)
    m = tl.full((), float("-inf"), tl.float32)
    rest = tl.zeros((), tl.float32)
    spread = tl.zeros((), tl.float32)
    if not FIRST:
        m = tl.load(max_ptr + row)
        rest = tl.load(rest_ptr + row)
        spread = tl.load(spread_ptr + row)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)  # [BLOCK_V]
        block_max = tl.max(x, axis=0)
        grows = block_max > m
        m_new = tl.where(grows, block_max, m)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # not yet a single finite logit
        d = (x - base) * scale
        e = tl.exp(d)
        total = tl.where(m == float("-inf"), 0.0, 1.0 + rest)  # with the old maximum counted
        fall = (base - tl.where(m == float("-inf"), base, m)) * scale
        shrink = tl.exp(-fall)
        if ENTROPY:
            ed = e * tl.where(e > 0, d, 0.0)
            spread = shrink * (spread + total * fall) - tl.sum(ed, axis=0)
        first_max = tl.min(tl.where(x == block_max, offs, V), axis=0)
        e = tl.where(offs == tl.where(grows, first_max, -1), 0.0, e)  # the new maximum stays out
        rest = tl.where(grows, total * shrink, rest) + tl.sum(e, axis=0)
        m = m_new
    tl.store(max_ptr + row, m)
    tl.store(rest_ptr + row, rest)
    tl.store(spread_ptr + row, spread)
    for k in range(K):
        column = tl.load(target_ptr + row * K + k) - first_column
        inside = (column >= 0) & (column < V)
        picked = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(picked_ptr + row * K + k, picked, mask=inside)


@triton.jit
def _row_softmax_bwd(
    x_ptr, dx_ptr, target_ptr, dtarget_ptr, max_ptr, scale_ptr, log_sum_ptr, a_ptr, b_ptr,
    inner, stride_outer, stride_inner, V, first_column, K,
    ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    dx_ptr += row * V
    scale = tl.load(scale_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    dead = (a == 0) & (b == 0)
    read = tl.where(dead, 0, V)  # nothing flows back: x is not read, so its NaN cannot leak
    m = tl.where(dead, 0.0, tl.load(max_ptr + row))
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < read, other=float("-inf")).to(tl.float32)
        log_p = (x - m) * scale - log_sum  # [BLOCK_V]
        p = tl.exp(log_p)
        factor = a
        if ENTROPY:
            factor += b * tl.where(p > 0, log_p, 0.0)
        dx = tl.where(offs < read, -p * factor, 0.0)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=offs < V)
    tl.debug_barrier()  # other threads wrote the targets' columns above; they are written anew
    for k in range(K):
        column = tl.load(target_ptr + row * K + k) - first_column
        inside = (column >= 0) & (column < V)
        dtarget = tl.load(dtarget_ptr + row * K + k)
        tl.store(dx_ptr + column, dtarget.to(dx_ptr.dtype.element_ty), mask=inside)


class Rows(NamedTuple):
    """Where the rows of a tensor [*, V] with unit last stride lie in memory."""

    count: int
    inner: int  # row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner
    stride_outer: int
    stride_inner: int


def rows_of(op: str, name: str, x: Tensor) -> Rows:
    """Raises ValueError where no copy-free reading of x as rows on at most two strides exists."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"{op}: {name} needs unit stride along its last axis, got strides {x.stride()}; "
            "call .contiguous()"
        )
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2:
        raise ValueError(
            f"{op}: the rows of {name} must lie on at most two strides, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}; call .contiguous()"
        )
    (_, stride_outer), (inner, stride_inner) = [(1, 0), (1, 0), *axes][-2:]
    return Rows(x.shape[:-1].numel(), max(inner, 1), stride_outer, stride_inner)


def block_size(vocab: int) -> int:
    return min(BLOCK_V, max(128, triton.next_power_of_2(vocab)))


def forward(
    x: Tensor,
    rows: Rows,
    targets: Tensor,
    scale: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    first_column: int,
    entropy: bool,
) -> None:
    """Adds x, whose columns begin at first_column, to state: (stats [3, N], picked [N, K])."""
    stats, picked = state
    with torch.cuda.device_of(x):
        _row_softmax_fwd[(rows.count,)](
            x, targets, scale, *stats.unbind(), picked,
            rows.inner, rows.stride_outer, rows.stride_inner,
            x.shape[-1], first_column, targets.shape[1],
            FIRST=first_column == 0, ENTROPY=entropy,
            BLOCK_V=block_size(x.shape[-1]), num_warps=NUM_WARPS,
        )  # fmt: skip


def backward(
    dx: Tensor,
    x: Tensor,
    rows: Rows,
    targets: Tensor,
    grads: tuple[Tensor, Tensor],
    *,
    first_column: int,
    entropy: bool,
) -> None:
    """Writes contiguous dx, which may be x itself, from (RowGrads.coef, RowGrads.target)."""
    coef, d_target = grads
    with torch.cuda.device_of(x):
        _row_softmax_bwd[(rows.count,)](
            x, dx, targets, d_target, *coef.unbind(),
            rows.inner, rows.stride_outer, rows.stride_inner,
            x.shape[-1], first_column, targets.shape[1],
            ENTROPY=entropy, BLOCK_V=block_size(x.shape[-1]), num_warps=NUM_WARPS,
        )  # fmt: skip
