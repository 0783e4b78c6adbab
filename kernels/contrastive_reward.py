r"""GRACE's reward of every rollout, without ever storing the B x B x G similarities.

    positive(i, k) = s(d_ik, q_i)        consistency(i, k) = mean over l != k of s(d_ik, d_il)
    hard: a mean over the other groups j of max_l s(q_i, d_jl) (query side) or of s(d_ik, q_j)
    (document side), or the log-sum-exp of all candidates (info_nce).

Source: arXiv:2510.04506, eq. 12-18; the plain definition is `contrastive_reward_ref`.
"""
# pyright: reportArgumentType=false

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels._checks import (
    Impl,
    check_float,
    check_number,
    check_same_device,
    check_tensor,
    use_triton,
)
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import (
    NORM_EPS,
    ContrastiveReward,
    Repulsion,
    RewardForm,
    accumulator_dtype,
)

MAX_TILE = 1 << 22  # similarities in memory at once on the PyTorch path


def _within_groups(d: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse norms and consistency, both [B, G]; the products of a group hold its norms, too."""
    gram = torch.bmm(d, d.mT)  # [B, G, G]
    inv_d = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_(min=NORM_EPS).reciprocal_()
    cosines = gram.mul_(inv_d[..., None]).mul_(inv_d[:, None])
    own = cosines.diagonal(dim1=1, dim2=2)
    return inv_d, (cosines.sum(-1) - own) / max(d.shape[1] - 1, 1)


def _cross_torch(
    d: Tensor, inv_d: Tensor, q: Tensor, ids: Tensor, *, document: bool, temperature: float | None
) -> tuple[Tensor, Tensor]:
    """Reduction over the groups of another id, and their number: [B, G or 1] and [B, 1].

    It is the sum over those groups of their highest cosine (temperature=None), or the log-sum-exp
    of all their cosines / temperature.
    """
    num_groups, num_rollouts, _ = d.shape
    rows = d.flatten(0, 1) if document else q
    out = rows.new_full((len(rows),), 0.0 if temperature is None else -torch.inf)
    out = out.view(num_groups, num_rollouts if document else 1)
    num_other = torch.zeros_like(ids)
    step = max(1, MAX_TILE // max(1, num_groups * num_rollouts))
    for j in range(0, num_groups, step):
        chunk = slice(j, j + step)
        same = ids[:, None] == ids[chunk]
        num_other += (~same).sum(1)
        if document:
            tile = (rows @ q[chunk].T).mul_(inv_d.view(-1, 1))
            tile = tile.view(num_groups, num_rollouts, -1, 1)
        else:
            tile = (rows @ d[chunk].flatten(0, 1).T).mul_(inv_d[chunk].flatten())
            tile = tile.view(num_groups, 1, -1, num_rollouts)
        if temperature is None:
            out += tile.amax(-1).masked_fill_(same[:, None], 0.0).sum(-1)
        else:
            tile = tile.div_(temperature).masked_fill_(same[:, None, :, None], -torch.inf)
            out = torch.logaddexp(out, tile.flatten(2).logsumexp(-1))
    return out, num_other[:, None]


def _torch_fwd(
    rollouts: Tensor,
    queries: Tensor,
    negatives: Tensor | None,
    group_ids: Tensor | None,
    *,
    form: str,
    repulsion: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four unweighted parts, each [B, G]."""
    dtype, document = accumulator_dtype(rollouts), repulsion == "document"
    d, q = rollouts.to(dtype), F.normalize(queries.to(dtype), dim=-1, eps=NORM_EPS)
    num_groups, num_rollouts, _ = d.shape
    n = d[:, :0] if negatives is None else F.normalize(negatives.to(dtype), dim=-1, eps=NORM_EPS)
    ids = torch.arange(num_groups, device=d.device) if group_ids is None else group_ids

    inv_d, consistency = _within_groups(d)
    positive = torch.bmm(q[:, None], d.mT)[:, 0].mul_(inv_d)  # d @ q: 9x slower
    to_negatives = (d @ n.mT).mul_(inv_d[..., None]) if document else q[:, None] @ n.mT
    if form == "info_nce":
        cross, num_other = _cross_torch(
            d, inv_d, q, ids, document=document, temperature=temperature
        )
        others = torch.cat((to_negatives / temperature, cross[..., None]), dim=-1).logsumexp(-1)
        count = 1 + to_negatives.shape[-1] + num_other * (1 if document else num_rollouts)
        log_sum = torch.logaddexp(positive / temperature, others)
        hard = temperature * (count.to(dtype).log() - log_sum)
        return positive, torch.zeros_like(positive), consistency, hard
    cross, num_other = _cross_torch(d, inv_d, q, ids, document=document, temperature=None)
    hard = (-cross / num_other.clamp(min=1)).expand_as(positive).contiguous()
    negative = (-to_negatives.sum(-1)).expand_as(positive).contiguous()
    return positive, negative, consistency, hard


@torch.library.custom_op("tercet::contrastive_reward", mutates_args=())
def _contrastive_reward(
    rollouts: Tensor,
    queries: Tensor,
    negatives: Tensor | None,
    group_ids: Tensor | None,
    form: str,
    repulsion: str,
    temperature: float,
    negative_weight: float,
    consistency_weight: float,
    hard_weight: float,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hard_weight = 1.0 if form == "info_nce" else hard_weight
    if triton:
        from tercet.kernels import _contrastive_reward_triton

        with torch.cuda.device_of(rollouts):  # launches go to the current device
            return _contrastive_reward_triton.forward(
                rollouts,
                queries,
                negatives,
                group_ids,
                lse=form == "info_nce",
                document=repulsion == "document",
                temperature=temperature,
                weights=(negative_weight, consistency_weight, hard_weight),
            )
    positive, negative, consistency, hard = _torch_fwd(
        rollouts,
        queries,
        negatives,
        group_ids,
        form=form,
        repulsion=repulsion,
        temperature=temperature,
    )
    total = positive + negative_weight * negative + consistency_weight * consistency
    total = (total + hard_weight * hard) / temperature
    return total, positive, negative, consistency, hard


@_contrastive_reward.register_fake
def _(rollouts, *_others):
    shape, dtype = rollouts.shape[:2], accumulator_dtype(rollouts)
    return tuple(rollouts.new_empty(shape, dtype=dtype) for _ in range(5))


def _check(
    rollouts: Tensor, queries: Tensor, negatives: Tensor | None, group_ids: Tensor | None
) -> None:
    op = "contrastive_reward"
    floats = {"rollouts": rollouts, "queries": queries}
    if negatives is not None:
        floats["negatives"] = negatives
    check_float(op, **floats)
    if group_ids is not None:
        check_tensor(op, "group_ids", group_ids, "index")
    check_same_device(op, **floats, group_ids=group_ids)
    for name, x in floats.items():
        if x.dtype != rollouts.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of rollouts, got {x.dtype} and {rollouts.dtype}"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{op}: a reward has no gradient, so no embedding may require one, "
                f"got {name}.requires_grad=True; call {name}.detach()"
            )
    if rollouts.ndim != 3 or rollouts.shape[1] == 0 or rollouts.shape[2] == 0:
        raise ValueError(
            f"{op}: rollouts must be [groups, rollouts>=1, hidden>=1], got {tuple(rollouts.shape)}"
        )
    groups, _, hidden = rollouts.shape
    if queries.shape != (groups, hidden):
        raise ValueError(
            f"{op}: queries must be [{groups}, {hidden}] like rollouts, got {tuple(queries.shape)}"
        )
    if negatives is not None and (
        negatives.ndim != 3 or negatives.shape[0] != groups or negatives.shape[2] != hidden
    ):
        raise ValueError(
            f"{op}: negatives must be [{groups}, any, {hidden}] to match rollouts, "
            f"got {tuple(negatives.shape)}"
        )
    if group_ids is not None and group_ids.shape != (groups,):
        raise ValueError(f"{op}: group_ids must be [{groups}], got {tuple(group_ids.shape)}")


def _check_numbers(temperature: float, **weights: float) -> None:
    op = "contrastive_reward"
    check_number(op, temperature=temperature, **weights)
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
    for name, weight in weights.items():
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"{op}: {name} must be finite and >= 0, got {weight}")


def contrastive_reward(
    rollouts: Float[Tensor, "groups rollouts hidden"],
    queries: Float[Tensor, "groups hidden"],
    negatives: Float[Tensor, "groups negatives hidden"] | None = None,
    *,
    group_ids: Int[Tensor, " groups"] | None = None,
    form: RewardForm = "sum",
    repulsion: Repulsion = "query",
    temperature: float = 0.1,
    negative_weight: float = 1.0,
    consistency_weight: float = 0.2,
    hard_weight: float = 0.2,
    impl: Impl = "auto",
) -> ContrastiveReward:
    """GRACE's reward of each rollout and its unweighted parts, all [groups, rollouts], float32.

    The meaning of every part: `tercet.kernels.reference.contrastive_reward_ref`.
    Source: arXiv:2510.04506, eq. 12-18.

    Args:
        rollouts: embeddings that need not be unit vectors.  Norms, here and of queries and
            negatives, are taken in float32 (float64 stays): one below 1e-12 counts as 1e-12, and
            from about 1e19 on the square overflows, which nothing checks and gives NaN.
        group_ids: groups with equal ids do not repel each other; None makes every group its own.
        temperature: > 0 and finite; divides the whole reward.
        negative_weight: of the sum over a group's negatives; each weight is >= 0 and finite.
        consistency_weight: of the mean over the other rollouts of the group.
        hard_weight: of the mean over the other groups; "info_nce" takes 1 instead.

    Raises:
        TypeError: a type or dtype.
        ValueError: a shape, device or option, or an embedding that requires grad.
    """
    _check(rollouts, queries, negatives, group_ids)
    if form not in ("sum", "info_nce") or repulsion not in ("query", "document"):
        raise ValueError(
            "contrastive_reward: form must be 'sum' or 'info_nce' and repulsion 'query' or "
            f"'document', got {form!r} and {repulsion!r}"
        )
    _check_numbers(
        temperature,
        negative_weight=negative_weight,
        consistency_weight=consistency_weight,
        hard_weight=hard_weight,
    )
    triton = use_triton("contrastive_reward", impl, rollouts)
    if triton and rollouts.dtype == torch.float64:
        raise TypeError(
            "contrastive_reward: impl='triton' computes in float32, got float64 rollouts"
        )
    return ContrastiveReward(
        *_contrastive_reward(
            rollouts,
            queries,
            negatives,
            group_ids,
            form,
            repulsion,
            temperature,
            negative_weight,
            consistency_weight,
            hard_weight,
            triton,
        )
    )
