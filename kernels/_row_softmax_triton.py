"""Triton kernels of `_row_softmax.py`: one program per row, one read of it per pass."""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096
NUM_WARPS = 8
FORWARD_BLOCK_V = 2048
FORWARD_WARPS = 4
STAGES = 4  # blocks of a row on their way at a time


@triton.jit
def _grouped(x, GROUP: tl.constexpr):
    """Sums of GROUP neighbours, which one thread holds: fewer registers, and no exchange yet."""
    return tl.sum(tl.reshape(x, (x.shape[0] // GROUP, GROUP)), axis=1)


@triton.jit
def _add_terms(d, e, rest, spread, ENTROPY: tl.constexpr, GROUP: tl.constexpr):
    rest += _grouped(e, GROUP)
    if ENTROPY:
        spread -= _grouped(e * tl.maximum(d, -1e4), GROUP)  # e = 0 where d = -inf
    return rest, spread


@triton.jit
def _add_block(x, lanes, groups, m, rest, spread, rate, ENTROPY: tl.constexpr, GROUP: tl.constexpr):
    """Adds a block of logits to the sums, which leave one element, the maximum m, out."""
    block_max = tl.max(x, axis=0)
    if block_max > m:
        fall = tl.minimum((block_max - m) * rate, 1e4)  # of an infinite one nothing stays
        shrink = tl.exp2(-fall)
        rest += tl.where(groups == 0, 1.0, 0.0)  # the old maximum
        spread = (spread + rest * fall) * shrink
        rest *= shrink
        m = block_max
        d = (x - m) * rate
        first = tl.min(tl.where(x == m, lanes, x.shape[0]), axis=0)
        e = tl.where(lanes == first, 0.0, tl.exp2(d))
        rest, spread = _add_terms(d, e, rest, spread, ENTROPY, GROUP)
    else:
        d = (x - tl.where(m == float("-inf"), 0.0, m)) * rate
        rest, spread = _add_terms(d, tl.exp2(d), rest, spread, ENTROPY, GROUP)
    return m, rest, spread


@triton.jit
def _row_softmax_fwd(
    x_ptr, target_ptr, scale_ptr, max_ptr, rest_ptr, spread_ptr, picked_ptr,
    inner, stride_outer, stride_inner, V, first_column, K,
    FIRST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride: N*V can exceed 2^31
    x_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    rate = tl.load(scale_ptr + row) * 1.4426950408889634  # exponents are base 2 in here
    lanes = tl.arange(0, BLOCK_V)
    groups = tl.arange(0, BLOCK_V // GROUP)
    m = tl.full((), float("-inf"), tl.float32)
    rest = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    spread = tl.zeros((BLOCK_V // GROUP,), tl.float32)
    if not FIRST:
        m = tl.load(max_ptr + row)
        rest += tl.where(groups == 0, tl.load(rest_ptr + row), 0.0)
        spread += tl.where(groups == 0, tl.load(spread_ptr + row) * 1.4426950408889634, 0.0)
    whole = V - V % BLOCK_V
    for start in tl.range(0, whole, BLOCK_V, num_stages=STAGES):
        x = tl.load(x_ptr + start + lanes).to(tl.float32)  # [BLOCK_V]
        m, rest, spread = _add_block(x, lanes, groups, m, rest, spread, rate, ENTROPY, GROUP)
    if whole < V:
        x = tl.load(x_ptr + whole + lanes, mask=lanes < V - whole, other=float("-inf"))
        x = x.to(tl.float32)
        m, rest, spread = _add_block(x, lanes, groups, m, rest, spread, rate, ENTROPY, GROUP)
    tl.store(max_ptr + row, m)
    tl.store(rest_ptr + row, tl.sum(rest, axis=0))
    tl.store(spread_ptr + row, tl.sum(spread, axis=0) * 0.6931471805599453)
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


def block_size(vocab: int, most: int = BLOCK_V) -> int:
    return min(most, max(128, triton.next_power_of_2(vocab)))


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
            BLOCK_V=block_size(x.shape[-1], FORWARD_BLOCK_V), GROUP=16 // x.itemsize,
            STAGES=STAGES, num_warps=FORWARD_WARPS,
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
