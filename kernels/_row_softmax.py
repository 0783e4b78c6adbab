r"""Row statistics and gradients of a softmax over a vocabulary that arrives in column tiles.

With z = x / temperature, m = max x and rest = the sum, over all tokens but the likeliest, of
e_j = exp(z_j - max z), a row is described by (m, rest, spread), spread = sum_j e_j (max z - z_j):

    logp_t = (x_t - m) / temperature - log1p(rest),   never positive
    H      = log1p(rest) + spread / (1 + rest)
    dx_j   = -p_j (a + b log p_j),   a = (sum_k g_k + g_H H) / temperature,  b = g_H / temperature
    dx_t   = g_t (1 - p_t) / temperature - ...,   1 - p_t = -expm1(logp_t)

Leaving the likeliest token out of the sum keeps log1p(rest), H and 1 - p_t precise to the last
bits when p_t -> 1.  Source of the running maximum: arXiv:1805.02867, alg. 3.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels._checks import (
    check_float,
    check_number,
    check_same_device,
    check_tensor,
)
from tercet.kernels.reference import accumulator_dtype

MIN_LOG = -1e4  # exp and exp2 give 0 here in every dtype; keeps 0 * log 0 finite
LOG2E = math.log2(math.e)  # PyTorch's exp2 takes a third of the time of its exp on a CPU


class Query(NamedTuple):
    """What is asked of each row."""

    targets: Tensor  # int64 [N, K]
    scale: Tensor  # [N], 1 / temperature in the accumulator's dtype

    def rows(self, which: slice | Tensor) -> "Query":
        return Query(self.targets[which], self.scale[which])


def check_query(op: str, targets: Tensor, temperature: float | Tensor, rows: Tensor) -> Tensor:
    """The temperature as a tensor; shapes, dtypes and devices checked against rows [*rows, _].

    Raises:
        TypeError: type or dtype of targets or temperature.
        ValueError: shape or device; temperature not positive, or asking for a gradient.
    """
    shape = rows.shape[:-1]
    check_tensor(op, "targets", targets, "index")
    if targets.shape != shape and targets.shape[:-1] != shape:
        raise ValueError(
            f"{op}: targets must have the shape of the rows {tuple(shape)}, or one more axis, "
            f"got {tuple(targets.shape)}"
        )
    if targets.ndim == rows.ndim and targets.shape[-1] == 0:
        raise ValueError(f"{op}: targets must name at least one token per row, got [*, 0]")
    check_same_device(op, rows=rows, targets=targets)
    if not isinstance(temperature, Tensor):
        check_number(op, temperature=temperature)
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be > 0, got {temperature}")
        return torch.full((), temperature, dtype=accumulator_dtype(rows), device=rows.device)
    check_float(op, temperature=temperature)
    check_same_device(op, rows=rows, temperature=temperature)
    if temperature.ndim > 0 and temperature.shape != shape:
        raise ValueError(
            f"{op}: temperature must have the shape of the rows {tuple(shape)}, "
            f"got {tuple(temperature.shape)}"
        )
    if temperature.requires_grad:
        raise ValueError(
            f"{op}: temperature gets no gradient, got one that requires grad; "
            "pass temperature.detach()"
        )
    return temperature


def flatten_query(
    op: str,
    shape: torch.Size,
    targets: Tensor,
    temperature: Tensor,
    like: Tensor,
    *,
    sharded: bool = False,
) -> Query:
    """Query of the flattened rows of a tensor of `shape`; sharded: of a part of the vocabulary.

    On a CPU the values are checked; on CUDA that would wait for the device, and a target outside
    the vocabulary gives NaN instead.
    """
    vocab, count = shape[-1], shape[:-1].numel()
    num_targets = 1 if targets.ndim < len(shape) else targets.shape[-1]
    flat = targets.reshape(count, num_targets).to(torch.int64).contiguous()
    if flat.numel() and flat.device.type == "cpu":
        low, high = (int(v) for v in flat.aminmax())
        if not sharded and (low < 0 or high >= vocab):
            raise IndexError(
                f"{op}: targets must be in [0, {vocab}), got {low if low < 0 else high}; "
                "give ignored rows any valid target and mask their result"
            )
        if not bool((temperature > 0).all()):
            raise ValueError(f"{op}: temperature must be > 0, got {float(temperature.min())}")
    scale = temperature.to(accumulator_dtype(like)).reciprocal()
    return Query(flat, scale.reshape(-1).expand(count).contiguous())


class RowState(NamedTuple):
    """What is known of N rows after some vocabulary tiles; updated in place."""

    stats: Tensor  # [3, N]: maximum of x, rest, spread
    picked: Tensor  # [N, K]: logits of the targets; NaN until their tile came


def empty_state(query: Query) -> RowState:
    stats = query.scale.new_zeros(3, len(query.scale))
    stats[0] = -torch.inf
    return RowState(stats, torch.full_like(query.targets, torch.nan, dtype=query.scale.dtype))


def _columns_in_tile(targets: Tensor, first_column: int, width: int) -> tuple[Tensor, ...]:
    """(row, k, local column) of the targets that fall into the tile."""
    local = targets - first_column
    row, k = ((local >= 0) & (local < width)).nonzero(as_tuple=True)
    return row, k, local[row, k]


def _shifted(x: Tensor, base: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
    """(x - base) * scale per row, into `out`."""
    if x.dtype == out.dtype:
        torch.sub(x, base[:, None], out=out)
    else:
        out.copy_(x).sub_(base[:, None])
    return out.mul_(scale[:, None])


def add_tile(
    state: RowState,
    x: Tensor,
    query: Query,
    *,
    first_column: int,
    work: Tensor,
    scratch: Tensor | None,
) -> None:
    """Adds x [N, columns], except that rest and spread leave out every target until `close`.

    `work` is overwritten and may be x itself; so is `scratch`, given when entropy is wanted.
    """
    (m, rest, spread), picked = state.stats, state.picked
    row, k, column = _columns_in_tile(query.targets, first_column, x.shape[1])
    picked[row, k] = x[row, column].to(picked.dtype)
    m_new = torch.maximum(m, x.amax(-1).to(m.dtype))
    fall = ((m_new - m) * query.scale).nan_to_num_(nan=0.0, posinf=-MIN_LOG)
    shrink = (-fall).exp_()
    base = m_new.masked_fill(m_new == -torch.inf, 0.0)
    bits = _shifted(x, base, query.scale * LOG2E, out=work)
    e = bits.exp2_() if scratch is None else torch.exp2(bits.clamp_(min=MIN_LOG), out=scratch)
    e[row, column] = 0.0
    if scratch is not None:
        spread.add_(rest * fall).mul_(shrink).sub_(bits.mul_(e).sum(-1), alpha=1 / LOG2E)
    rest.mul_(shrink).add_(e.sum(-1))
    m.copy_(m_new)


def close(state: RowState, query: Query) -> None:
    """Adds the targets that `add_tile` left out, each distinct one once."""
    (m, rest, spread), picked = state.stats, state.picked
    base = m.masked_fill(m == -torch.inf, 0.0)
    d = (picked - base[:, None]) * query.scale[:, None]
    e = d.exp()
    for k in range(1, d.shape[1]):
        repeated = (query.targets[:, :k] == query.targets[:, k : k + 1]).any(-1)
        e[:, k].masked_fill_(repeated, 0.0)
    spread.sub_((e * d.clamp(min=MIN_LOG)).sum(-1))
    best = d.argmax(-1, keepdim=True)  # of the targets, only this one can be the likeliest token
    rest.add_(e.scatter(1, best, 0.0).sum(-1)).add_(d.gather(1, best).squeeze(1).expm1())


class RowResult(NamedTuple):
    logp: Tensor  # [N, K]
    entropy: Tensor  # [N]
    stats: Tensor  # [2, N]: maximum of x, log1p(rest)


def finish(state: RowState, query: Query) -> RowResult:
    m, rest, spread = state.stats
    log_sum = rest.log1p()
    logp = (state.picked - m[:, None]) * query.scale[:, None] - log_sum[:, None]
    return RowResult(logp, log_sum + spread / (1 + rest), torch.stack([m, log_sum]))


class RowGrads(NamedTuple):
    """dx_j = -p_j (a + b log p_j), except at the targets, where it is `target`."""

    coef: Tensor  # [5, N]: maximum of x, scale, log1p(rest), a, b
    target: Tensor  # [N, K]
    live: Tensor  # bool [N]: some gradient flows back to the row

    def rows(self, which: slice | Tensor) -> "RowGrads":
        return RowGrads(self.coef[:, which], self.target[which], self.live[which])


def row_grads(result: RowResult, query: Query, g: Tensor, g_entropy: Tensor | None) -> RowGrads:
    """Coefficients of the gradient from upstream g [N, K] and g_entropy [N].

    A row whose upstream is all zero gets zeros whatever it holds; a live row whose target lies
    outside the vocabulary gets NaN.
    """
    m, log_sum = result.stats
    logp, scale = result.logp, query.scale
    live = (g != 0).any(-1)
    same = torch.zeros_like(g)  # upstream of all entries that name the same token
    for k in range(g.shape[1]):
        same[:, k] = torch.where(query.targets == query.targets[:, k : k + 1], g, 0.0).sum(-1)
    a = g.sum(-1)
    p = logp.exp()
    d_target = -same * torch.expm1(logp)
    if g.shape[1] > 1:
        d_target -= p * (a[:, None] - same)
    b = torch.zeros_like(a)
    if g_entropy is not None:
        live = live | (g_entropy != 0)
        a = a + g_entropy * result.entropy
        b = g_entropy * scale
        d_target -= g_entropy[:, None] * p * (logp.clamp(min=MIN_LOG) + result.entropy[:, None])
    a = torch.where(logp.isnan().any(-1), torch.nan, a * scale)
    coef = torch.stack([m, scale, log_sum, a, b])
    coef[3:].masked_fill_(~live, 0.0)
    return RowGrads(coef, (d_target * scale[:, None]).masked_fill_(~live[:, None], 0.0), live)


def grad_tile(
    out: Tensor,
    x: Tensor,
    query: Query,
    grads: RowGrads,
    *,
    first_column: int,
    scratch: Tensor | None,
) -> None:
    """Gradient of x [N, columns] into `out`, which may be x; `scratch` when entropy has one."""
    m, scale, log_sum, a, b = grads.coef
    bits = _shifted(x, m, scale * LOG2E, out=out).sub_(log_sum[:, None] * LOG2E)
    if scratch is None:
        out.exp2_().mul_(-a[:, None])
    else:
        p = torch.exp2(bits.clamp_(min=MIN_LOG), out=scratch)
        out.mul_(-b[:, None] / LOG2E).sub_(a[:, None]).mul_(p)
    dead = ~grads.live
    if bool(dead.any()):
        out.masked_fill_(dead[:, None], 0.0)
    row, k, column = _columns_in_tile(query.targets, first_column, x.shape[1])
    out[row, column] = grads.target[row, k]
