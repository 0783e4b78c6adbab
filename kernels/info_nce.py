r"""InfoNCE and its gradient, without ever storing the B x B similarities.

    loss_i = log(1 + e^(lse_i - z_i)),  z = s / temperature,  lse_i over the negatives of row i

Tiles of rows are summed along both directions at once, so the symmetric loss takes one pass over
the similarities, and its backward another: 4 products of 2 B^2 D FLOPs.  The loss of one direction,
when it is reduced, makes its gradients in the forward, as a row's sum is complete once its tile is:
3 products.  Norms, masks, margin and temperature act on the tile; memory is O(B D).

Source: arXiv:1807.03748, eq. 4; the plain definition is `info_nce_ref`.
"""

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels import _similarity as tiled
from tercet.kernels._checks import (
    Impl,
    check_float,
    check_number,
    check_same_device,
    check_tensor,
    use_triton,
)
from tercet.kernels._gather import Gather
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import Reduction, accumulator_dtype


def _gradients(
    found: tiled.Gradients, needs: list[bool], like: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gradients of queries, keys and negatives in the dtypes of `like`; empty if not needed."""
    out = []
    for gradient, needed, x in zip(found[:3], needs, like, strict=True):
        if x is None or not needed:
            out.append(found.temperature.new_empty(0))
        else:
            out.append(x.new_zeros(x.shape) if gradient is None else gradient.to(x.dtype))
    return out


@torch.library.custom_op("tercet::info_nce_lse", mutates_args=())
def _info_nce_lse(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    marks: Sequence[Tensor],
    first: int,
    normalize: bool,
    triton: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the positives, log-sum-exp of the negatives of rows and (symmetric) of keys."""
    with torch.cuda.device_of(queries):  # launches go to the current device
        problem = tiled.prepare(
            queries, keys, negatives, temperature, marks, first, normalize, triton
        )
        lse = tiled.forward(problem, symmetric)
    return lse.positive, lse.row, lse.col


@_info_nce_lse.register_fake
def _(queries, keys, _negatives, _temperature, _marks, _first, _normalize, _triton, symmetric):
    dtype = accumulator_dtype(queries)
    row = queries.new_empty(queries.shape[:1], dtype=dtype)
    col = queries.new_empty((keys.shape[0] if symmetric else 0,), dtype=dtype)
    return row, torch.empty_like(row), col


@torch.library.custom_op("tercet::info_nce_lse_backward", mutates_args=())
def _info_nce_lse_backward(
    slopes: Sequence[Tensor],
    lse: Sequence[Tensor],
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    marks: Sequence[Tensor],
    first: int,
    normalize: bool,
    triton: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(queries):
        problem = tiled.prepare(
            queries, keys, negatives, temperature, marks, first, normalize, triton
        )
        positive, row, col = (x.contiguous() for x in slopes)  # a sum's are one number, expanded
        d = tiled.Slopes(positive, row, col if len(col) else None)
        wanted = [needs[0] or needs[3], *needs[1:3]]
        found = tiled.backward(problem, tiled.Lse(*lse), d, wanted)
    q, k, n = _gradients(found, list(needs[:3]), (queries, keys, negatives))
    return q, k, n, found.temperature


@_info_nce_lse_backward.register_fake
def _(_slopes, _lse, queries, keys, negatives, temperature, _m, _f, _normalize, _triton, needs):
    return _fake_gradients(queries, keys, negatives, temperature, needs[:3], None)


def _fake_gradients(queries, keys, negatives, temperature, needs, dtype):
    found = [
        x.new_empty(x.shape, dtype=dtype or x.dtype)
        if needed and x is not None
        else temperature.new_empty(0)
        for needed, x in zip(needs, (queries, keys, negatives), strict=True)
    ]
    return *found, torch.empty_like(temperature)


def _save(ctx, inputs, output) -> None:
    queries, keys, negatives, temperature, marks, first, normalize, triton, _ = inputs
    ctx.save_for_backward(queries, keys, negatives, temperature, *marks, *output)
    ctx.options = (first, normalize, triton)


def _lse_backward(ctx, *slopes):
    queries, keys, negatives, temperature, *rest = ctx.saved_tensors
    marks, lse = rest[: tiled.NUM_MARKS], rest[tiled.NUM_MARKS :]
    needs = list(ctx.needs_input_grad[:4])
    d = [torch.zeros_like(x) if g is None else g for g, x in zip(slopes, lse, strict=True)]
    found = _info_nce_lse_backward(
        d, lse, queries, keys, negatives, temperature, marks, *ctx.options, needs
    )
    grads = [g if needed else None for g, needed in zip(found, needs, strict=True)]
    return *grads, [None] * tiled.NUM_MARKS, None, None, None, None


_info_nce_lse.register_autograd(_lse_backward, setup_context=_save)


@torch.library.custom_op("tercet::info_nce_sum", mutates_args=())
def _info_nce_sum(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    weight: Tensor,
    marks: Sequence[Tensor],
    first: int,
    normalize: bool,
    triton: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of weight times the loss of one direction, its losses, and its gradients."""
    with torch.cuda.device_of(queries):
        problem = tiled.prepare(
            queries, keys, negatives, temperature, marks, first, normalize, triton
        )
        wanted = [needs[0] or needs[3], *needs[1:3]]
        losses, found = tiled.losses_and_gradients(problem, weight, wanted)
    # in float32: the upstream gradient may bring back what half precision would round to zero
    like = [None if x is None else x.to(losses.dtype) for x in (queries, keys, negatives)]
    q, k, n = _gradients(found, list(needs[:3]), like)
    return (losses * weight).sum(), losses, q, k, n, found.temperature


@_info_nce_sum.register_fake
def _(queries, keys, negatives, temperature, weight, _m, _f, _normalize, _triton, needs):
    grads = _fake_gradients(queries, keys, negatives, temperature, needs[:3], weight.dtype)
    return weight.new_empty(()), torch.empty_like(weight), *grads


def _save_gradients(ctx, inputs, output) -> None:
    _, losses, *grads = output
    ctx.mark_non_differentiable(losses, *grads)
    ctx.save_for_backward(losses, *grads)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:4]]


def _sum_backward(ctx, g, *_):
    losses, *grads = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = [
        (g * x).to(dtype) if needed else None
        for x, dtype, needed in zip(grads, ctx.dtypes, needs, strict=False)
    ]
    return (
        *found,
        g * losses if needs[4] else None,
        [None] * tiled.NUM_MARKS,
        None,
        None,
        None,
        None,
    )


_info_nce_sum.register_autograd(_sum_backward, setup_context=_save_gradients)


def check_candidates(
    op: str,
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float | Tensor,
) -> None:
    """Raises TypeError or ValueError unless the arguments of `op` fit together."""
    floats = {"queries": queries, "keys": keys}
    if negatives is not None:
        floats["negatives"] = negatives
    check_float(op, **floats)
    for name, x in {"ids": ids, "negative_ids": negative_ids}.items():
        if x is not None:
            check_tensor(op, name, x, "index")
    check_same_device(op, **floats, ids=ids, negative_ids=negative_ids)
    for name, x in floats.items():
        if x.dtype != queries.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of queries, got {x.dtype} and {queries.dtype}"
            )
    if queries.ndim != 2 or queries.shape[1] == 0 or keys.shape != queries.shape:
        raise ValueError(
            f"{op}: queries and keys must both be [batch, hidden >= 1], "
            f"got {tuple(queries.shape)} and {tuple(keys.shape)}"
        )
    batch, hidden = queries.shape
    if negatives is not None and (
        negatives.ndim not in (2, 3)
        or negatives.shape[-1] != hidden
        or (negatives.ndim == 3 and len(negatives) != batch)
    ):
        raise ValueError(
            f"{op}: negatives must be [any, {hidden}] or [{batch}, any, {hidden}], "
            f"got {tuple(negatives.shape)}"
        )
    if ids is not None and ids.shape != (batch,):
        raise ValueError(f"{op}: ids must be [{batch}], got {tuple(ids.shape)}")
    if negative_ids is not None:
        if negatives is None or ids is None:
            raise ValueError(
                f"{op}: negative_ids need negatives and ids, got "
                f"{'no negatives' if negatives is None else 'no ids'}"
            )
        if negative_ids.shape != negatives.shape[:-1]:
            raise ValueError(
                f"{op}: negative_ids must be {list(negatives.shape[:-1])} like negatives, "
                f"got {tuple(negative_ids.shape)}"
            )
    _check_temperature(op, temperature, queries)


def _check_temperature(op: str, temperature: float | Tensor, queries: Tensor) -> None:
    if isinstance(temperature, Tensor):
        check_float(op, temperature=temperature)
        check_same_device(op, queries=queries, temperature=temperature)
        if temperature.numel() != 1:
            raise ValueError(
                f"{op}: temperature must have one element, got {tuple(temperature.shape)}"
            )
        return
    check_number(op, temperature=temperature)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")


def scalar_temperature(temperature: float | Tensor, queries: Tensor) -> Tensor:
    """The temperature as an operator takes it."""
    dtype = accumulator_dtype(queries)
    if isinstance(temperature, Tensor):
        return temperature.reshape(()).to(dtype)
    return torch.full((), temperature, dtype=dtype, device=queries.device)


def choose_triton(op: str, impl: Impl, queries: Tensor) -> bool:
    """As use_triton; TypeError where float64 meets impl="triton"."""
    triton = use_triton(op, impl, queries)
    if triton and queries.dtype == torch.float64:
        raise TypeError(f"{op}: impl='triton' computes in float32, got float64 queries")
    return triton


def _limits(queries: Tensor, keys: Tensor, margin: float, normalize: bool) -> Tensor:
    """Similarity with the positive, less the margin."""
    dtype = accumulator_dtype(queries)
    with torch.no_grad():
        positive = (queries.to(dtype) * keys.to(dtype)).sum(-1)
        inv = [tiled.inverse_norms(x, normalize) for x in (queries, keys)]
        return positive * inv[0] * inv[1] - margin


class Candidates(NamedTuple):
    """What queries are compared with, and the position of query 0's key among the keys."""

    keys: Tensor
    ids: Tensor | None
    negatives: Tensor | None
    negative_ids: Tensor | None
    first: int = 0

    def of_every_rank(self, gather: Gather) -> "Candidates":
        """With the keys and pool of the other ranks; negatives of every row's own stay."""
        keys, ids = gather(self.keys), None if self.ids is None else gather(self.ids)
        found = self._replace(keys=keys, ids=ids, first=gather.first)
        if self.negatives is None or self.negatives.ndim == 3:
            return found
        pool = Gather(gather.group, self.negatives)
        ids = None if self.negative_ids is None else pool(self.negative_ids)
        return found._replace(negatives=pool(self.negatives), negative_ids=ids)


def _over_ranks(gather: Gather, col: Tensor) -> Tensor:
    """Log-sum-exp of this rank's keys over the rows of every rank, from that over its own rows."""
    parts = Gather(gather.group, col[None])(col[None])[:, gather.own]
    none = (parts == -torch.inf).all(0)  # logsumexp has no gradient there
    return parts.masked_fill(none, 0.0).logsumexp(0).masked_fill(none, -torch.inf)


def info_nce(
    queries: Float[Tensor, "batch hidden"],
    keys: Float[Tensor, "batch hidden"],
    negatives: Float[Tensor, "*batch m hidden"] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    ids: Int[Tensor, " batch"] | None = None,
    negative_ids: Int[Tensor, "*batch m"] | None = None,
    false_negative_margin: float | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "*batch_or_scalar"]:
    """Cross-entropy of picking each query's key among the keys and negatives, nats, float32.

    Differentiable in queries, keys, negatives, temperature and weight.  The meaning of every
    argument: `tercet.kernels.reference.info_nce_ref`.  Source: arXiv:1807.03748, eq. 4.

    Args:
        keys: row i is the positive of query i, the others are its negatives.
        negatives: a pool for all rows, or [batch, m, hidden]: m of every row's own.
        temperature: divides similarities; finite and > 0, which is checked of a number only.
        normalize: cosines; a norm below 1e-12 counts as 1e-12.  Else inner products.
        symmetric: mean of this and the loss of keys among queries (without the negatives).
        ids: rows with equal ids are no negatives of each other.
        negative_ids: nor is a negative of the same id.
        false_negative_margin: candidates more similar than the positive less this are no
            negatives; no gradient flows through the choice.
        weight: of each row's loss; reduction="mean" divides by its sum.
        reduction: "mean", "sum" or "none".  A row without negatives has loss 0.
        group: rows, pools and ids of its other ranks are candidates, too; their numbers may differ
            between ranks, arguments that are None may not.  The loss is that of this rank's rows,
            and "mean" is such that its mean over ranks (what data parallelism makes of gradients)
            is the mean over all rows.

    Raises:
        TypeError: a type or dtype.
        ValueError: a shape, device or option.
    """
    op = "info_nce"
    check_candidates(op, queries, keys, negatives, ids, negative_ids, temperature)
    if reduction not in get_args(Reduction):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if false_negative_margin is not None:
        check_number(op, false_negative_margin=false_negative_margin)
        if not abs(false_negative_margin) < float("inf"):
            raise ValueError(
                f"{op}: false_negative_margin must be finite, got {false_negative_margin}"
            )
    if weight is not None:
        check_float(op, weight=weight)
        check_same_device(op, queries=queries, weight=weight)
        if weight.shape != queries.shape[:1]:
            raise ValueError(f"{op}: weight must be [{len(queries)}], got {tuple(weight.shape)}")
    triton = choose_triton(op, impl, queries)
    t = scalar_temperature(temperature, queries)
    limit = None
    if false_negative_margin is not None:
        limit = _limits(queries, keys, false_negative_margin, normalize)
    weight = t.new_ones(len(queries)) if weight is None else weight.to(t.dtype)
    total, key_limit, gather = weight.sum(), limit, None
    candidates = Candidates(keys, ids, negatives, negative_ids)
    if group is not None:
        gather = Gather(group, queries)
        candidates = candidates.of_every_rank(gather)
        key_limit = None if limit is None else gather(limit)
        total = Gather(group, total[None])(total[None]).mean()
    keys, key_ids, negatives, negative_ids, first = candidates
    marks = tiled.marks(queries, ids, key_ids, negative_ids, limit, key_limit)
    if reduction == "mean":
        weight = weight / torch.where(total == 0, 1.0, total)
    if reduction != "none" and not symmetric:
        needs = [
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (queries, keys, negatives, t)
        ]
        return _info_nce_sum(
            queries, keys, negatives, t, weight, marks, first, normalize, triton, needs
        )[0]
    positive, row, col = _info_nce_lse(
        queries, keys, negatives, t, marks, first, normalize, triton, symmetric
    )
    losses = F.softplus(row - positive)
    if symmetric and gather is not None:
        col = _over_ranks(gather, col)
    if symmetric:
        losses = (losses + F.softplus(col - positive)) / 2
    losses = losses * weight
    return losses if reduction == "none" else losses.sum()
