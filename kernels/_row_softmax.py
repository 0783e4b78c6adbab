r"""Row statistics and gradients of a softmax over a vocabulary that arrives in column tiles.

With z = x / temperature, m = max x and rest = sum over all tokens but the maximum of
exp(z_j - max z), a row is described by (m, rest, spread) where spread = sum_j e_j (max z - z_j):

    logp_t = (x_t - m) / temperature - log1p(rest)               <= 0, exact to the last bits
    H      = log1p(rest) + spread / (1 + rest)
    dx_j   = -p_j (a + b log p_j),   a = (sum_k g_k + g_H H) / temperature,  b = g_H / temperature
    dx_t   = (sum of g over t) (1 - p_t) / temperature - ...,    1 - p_t = -expm1(logp_t)

Leaving the maximum out of the sum keeps log1p(rest) and 1 - p_t precise when p_t -> 1.
Source of the running maximum: arXiv:1805.02867, alg. 3.
"""
# pyright: reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096
MIN_LOG = -1e4  # exp gives 0 here in every dtype; keeps 0 * log 0 finite for masked vocabulary


@triton.jit
def _row_softmax_fwd(
    x_ptr, target_ptr, scale_ptr, stats_ptr, picked_ptr,
    inner, stride_outer, stride_inner, N, V, first_column, K,
    FIRST: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride: N*V can exceed 2^31
    x_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    scale = tl.load(scale_ptr + row)
    if FIRST:
        m = tl.full((), float("-inf"), tl.float32)
        rest = tl.zeros((), tl.float32)
        spread = tl.zeros((), tl.float32)
    else:
        m = tl.load(stats_ptr + row)
        rest = tl.load(stats_ptr + N + row)
        spread = tl.load(stats_ptr + 2 * N + row)
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)  # [BLOCK_V]
        block_max, argmax = tl.max(x, axis=0, return_indices=True)
        grows = block_max > m
        m_new = tl.where(grows, block_max, m)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        d = (x - base) * scale
        e = tl.exp(d)
        total = tl.where(m == float("-inf"), 0.0, 1.0 + rest)  # with the old maximum counted
        fall = tl.where(grows & (total > 0), (m_new - m) * scale, 0.0)
        shrink = tl.exp(-fall)
        if ENTROPY:
            ed = e * tl.where(e > 0, d, 0.0)
            spread = shrink * (spread + total * fall) - tl.sum(ed, axis=0)
        left_out = tl.where(grows, argmax, -1)
        e = tl.where(tl.arange(0, BLOCK_V) == left_out, 0.0, e)
        rest = tl.where(grows, total * shrink, rest) + tl.sum(e, axis=0)
        m = m_new
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + N + row, rest)
    tl.store(stats_ptr + 2 * N + row, spread)
    for k in range(K):
        column = tl.load(target_ptr + row * K + k).to(tl.int64) - first_column
        inside = (column >= 0) & (column < V)
        picked = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(picked_ptr + row * K + k, picked, mask=inside)


@triton.jit
def _row_softmax_bwd(
    x_ptr, dx_ptr, target_ptr, dtarget_ptr, coef_ptr,
    inner, stride_outer, stride_inner, stride_dx, N, V, first_column, K,
    ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    dx_ptr += row * stride_dx
    m = tl.load(coef_ptr + row)
    scale = tl.load(coef_ptr + N + row)
    log_sum = tl.load(coef_ptr + 2 * N + row)
    a = tl.load(coef_ptr + 3 * N + row)
    b = tl.load(coef_ptr + 4 * N + row)
    if (a == 0) & (b == 0):  # nothing flows back: x is not read, so its NaN cannot leak
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            zeros = tl.zeros([BLOCK_V], tl.float32)
            tl.store(dx_ptr + offs, zeros.to(dx_ptr.dtype.element_ty), mask=offs < V)
    else:
        for start in range(0, V, BLOCK_V):
            offs = start + tl.arange(0, BLOCK_V)
            x = tl.load(x_ptr + offs, mask=offs < V, other=float("-inf")).to(tl.float32)
            log_p = (x - m) * scale - log_sum  # [BLOCK_V]
            p = tl.exp(log_p)
            factor = a
            if ENTROPY:
                factor += b * tl.where(p > 0, log_p, 0.0)
            tl.store(dx_ptr + offs, (-p * factor).to(dx_ptr.dtype.element_ty), mask=offs < V)
    tl.debug_barrier()  # other threads wrote the targets' columns above; they are written anew
    for k in range(K):
        column = tl.load(target_ptr + row * K + k).to(tl.int64) - first_column
        inside = (column >= 0) & (column < V)
        dtarget = tl.load(dtarget_ptr + row * K + k)
        tl.store(dx_ptr + column, dtarget.to(dx_ptr.dtype.element_ty), mask=inside)


class Rows(NamedTuple):
    """How the rows of a tensor [*, V] with unit last stride lie in memory: at most two strides."""

    count: int
    inner: int  # row r starts at (r // inner) * stride_outer + (r % inner) * stride_inner
    stride_outer: int
    stride_inner: int


def rows_of(op: str, name: str, x: Tensor) -> Rows:
    """Raises ValueError where no copy-free reading of x as rows exists."""
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
    count = x.shape[:-1].numel()
    (_, outer), (inner, stride) = [(1, 0), (1, 0), *axes][-2:]
    return Rows(count, max(inner, 1), outer, stride)


class RowState(NamedTuple):
    """What is known of N rows after some vocabulary tiles; updated in place by `add_tile`."""

    stats: Tensor  # [3, N]: maximum of x, rest, spread
    picked: Tensor  # [N, K]: logits of the targets; NaN until their tile came

    @staticmethod
    def empty(rows: int, targets: int, dtype: torch.dtype, device: torch.device) -> "RowState":
        stats = torch.zeros((3, rows), dtype=dtype, device=device)
        stats[0] = -torch.inf
        picked = torch.full((rows, targets), torch.nan, dtype=dtype, device=device)
        return RowState(stats, picked)


def add_tile_triton(
    state: RowState, x: Tensor, rows: Rows, targets: Tensor, scale: Tensor,
    *, first_column: int, entropy: bool,
) -> None:  # fmt: skip
    if rows.count == 0:
        return
    with torch.cuda.device_of(x):
        _row_softmax_fwd[(rows.count,)](
            x, targets, scale, state.stats, state.picked,
            rows.inner, rows.stride_outer, rows.stride_inner,
            rows.count, x.shape[-1], first_column, targets.shape[1],
            FIRST=first_column == 0, ENTROPY=entropy, BLOCK_V=block_size(x.shape[-1]), num_warps=8,
        )  # fmt: skip


def block_size(vocab: int) -> int:
    return min(BLOCK_V, max(128, triton.next_power_of_2(vocab)))


def grad_tile_triton(
    dx: Tensor, x: Tensor, rows: Rows, targets: Tensor, grads: "RowGrads", *, first_column: int
) -> None:
    if rows.count == 0:
        return
    with torch.cuda.device_of(x):
        _row_softmax_bwd[(rows.count,)](
            x, dx, targets, grads.target, grads.coef,
            rows.inner, rows.stride_outer, rows.stride_inner, dx.stride(-2),
            rows.count, x.shape[-1], first_column, targets.shape[1],
            ENTROPY=grads.entropy, BLOCK_V=block_size(x.shape[-1]), num_warps=8,
        )  # fmt: skip


def columns_in_tile(
    targets: Tensor, first_column: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, k, local column) of the targets that fall into the tile."""
    local = targets - first_column
    row, k = ((local >= 0) & (local < width)).nonzero(as_tuple=True)
    return row, k, local[row, k]


def add_tile_torch(
    state: RowState, x: Tensor, targets: Tensor, scale: Tensor,
    *, first_column: int, work: Tensor, scratch: Tensor | None,
) -> None:  # fmt: skip
    """As the kernel, for x [N, Vc], except that `rest` and `spread` still lack every target.

    `work` [N, Vc] is overwritten and may be x itself; `scratch` (entropy only) likewise.
    """
    (m, rest, spread), picked = state.stats, state.picked
    row, k, column = columns_in_tile(targets, first_column, x.shape[1])
    picked[row, k] = x[row, column].to(picked.dtype)
    m_new = torch.maximum(m, x.amax(-1).to(m.dtype))
    base = m_new.masked_fill(m_new == -torch.inf, 0.0)
    fall = ((m_new - m) * scale).nan_to_num_(nan=0.0, posinf=-MIN_LOG)
    shrink = (-fall).exp()
    d = shifted(x, base, scale, out=work)
    if scratch is None:
        e = d.exp_()
    else:
        e = torch.exp(d.clamp_(min=MIN_LOG), out=scratch)
    e[row, column] = 0.0
    if scratch is not None:
        spread.copy_(shrink * (spread + rest * fall) - d.mul_(e).sum(-1))
    rest.mul_(shrink).add_(e.sum(-1))
    m.copy_(m_new)


def shifted(x: Tensor, base: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
    """(x - base) * scale per row, into `out`."""
    if x.dtype == out.dtype:
        torch.sub(x, base[:, None], out=out)
    else:
        out.copy_(x).sub_(base[:, None])
    return out if bool((scale == 1).all()) else out.mul_(scale[:, None])


def count_targets(state: RowState, targets: Tensor, scale: Tensor) -> None:
    """Add the targets that `add_tile_torch` left out, each distinct one once."""
    (m, rest, spread), picked = state.stats, state.picked
    d = (picked - m[:, None]) * scale[:, None]
    e = d.exp()
    for k in range(1, targets.shape[1]):
        repeated = (targets[:, :k] == targets[:, k : k + 1]).any(-1)
        e[:, k].masked_fill_(repeated, 0.0)
    spread.sub_((e * d.clamp(min=MIN_LOG)).sum(-1))
    best = d.argmax(-1, keepdim=True)  # only the likeliest can be the maximum itself
    rest.add_(e.scatter(1, best, 0.0).sum(-1)).add_(d.gather(1, best).squeeze(1).expm1())


class RowResult(NamedTuple):
    logp: Tensor  # [N, K]
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N]: maximum of x, log of the sum of exp(z - max z)


def finish(state: RowState, scale: Tensor) -> RowResult:
    m, rest, spread = state.stats
    log_sum = rest.log1p()
    logp = (state.picked - m[:, None]) * scale[:, None] - log_sum[:, None]
    return RowResult(logp, log_sum + spread / (1 + rest), torch.stack([m, log_sum]))


class RowGrads(NamedTuple):
    """dx_j = -p_j (a + b log p_j), except at the targets, where it is `target`."""

    coef: Tensor  # [5, N]: maximum, scale, log_sum, a, b
    target: Tensor  # [N, K]
    entropy: bool  # b is not zero everywhere by construction
    live: Tensor  # [N]: rows with any upstream gradient

    def rows(self, chunk: slice | Tensor) -> "RowGrads":
        return RowGrads(self.coef[:, chunk], self.target[chunk], self.entropy, self.live[chunk])

    def contiguous(self) -> "RowGrads":
        return self._replace(coef=self.coef.contiguous(), target=self.target.contiguous())


def row_grads(
    result: RowResult, targets: Tensor, scale: Tensor, g: Tensor, g_entropy: Tensor | None
) -> RowGrads:
    """Coefficients of the gradient from upstream g [N, K] and g_entropy [N].

    A row whose upstream is all zero gets zeros whatever it holds; a live row whose target lies
    outside the vocabulary gets NaN.
    """
    m, log_sum = result.stats
    logp = result.logp
    live = (g != 0).any(-1)
    if g_entropy is not None:
        live = live | (g_entropy != 0)
    per_token = torch.zeros_like(g)  # upstream of all entries that name the same token
    for k in range(g.shape[1]):
        per_token[:, k] = torch.where(targets == targets[:, k : k + 1], g, 0.0).sum(-1)
    others = g.sum(-1, keepdim=True) - per_token if g.shape[1] > 1 else torch.zeros_like(g)
    p = logp.exp()
    d_target = -per_token * torch.expm1(logp) - p * others
    a = g.sum(-1)
    b = torch.zeros_like(a)
    if g_entropy is not None:
        b = g_entropy * scale
        a = a + g_entropy * result.entropy
        surprise = logp.clamp(min=MIN_LOG) + result.entropy[:, None]
        d_target = d_target - g_entropy[:, None] * p * surprise
    a = torch.where(logp.isnan().any(-1), torch.nan, a * scale)
    coef = torch.stack([m, scale, log_sum, a, b])
    coef[3:].masked_fill_(~live, 0.0)
    d_target = (d_target * scale[:, None]).masked_fill(~live[:, None], 0.0)
    return RowGrads(coef, d_target, g_entropy is not None, live)


def grad_tile_torch(
    out: Tensor, x: Tensor, targets: Tensor, grads: RowGrads,
    *, first_column: int, scratch: Tensor | None,
) -> None:  # fmt: skip
    """dx of x [N, Vc] into `out`, which may be x itself; `scratch` is needed for entropy."""
    m, scale, log_sum, a, b = grads.coef
    log_p = shifted(x, m, scale, out=out).sub_(log_sum[:, None])
    if scratch is None:
        out.exp_().mul_(-a[:, None])
    else:
        p = torch.exp(log_p.clamp_(min=MIN_LOG), out=scratch)
        out.mul_(-b[:, None]).sub_(a[:, None]).mul_(p)
    dead = ~grads.live
    if bool(dead.any()):
        out.masked_fill_(dead[:, None], 0.0)
    row, k, column = columns_in_tile(targets, first_column, x.shape[1])
    out[row, column] = grads.target[row, k]
