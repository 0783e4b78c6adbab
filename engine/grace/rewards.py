"""GRACE's reward in four named forms, the truncation rule, and the parts that the total is made of.

A GRPO baseline removes whatever all rollouts of a group share.  The paper's negative and hard
terms compare the *query* with other texts, so they are such constants: nothing repels, and training
collapses to one rationale for all texts.  A repair must put the rollout itself into its negatives.

form        repulsion of rollout d_k                                   does it reach the gradient
paper       s(q, d-) and mean_j max_l s(q, d_jl)                       no
released    with negatives as paper, without them mean_j s(d_k, q_j)   no, yes
document    s(d_k, d-) and mean_j s(d_k, q_j); the default             yes
info_nce    log-softmax of s(d_k, q) among s(d_k, q_j) and s(d_k, d-)  yes

Source: arXiv:2510.04506, eq. 12-18, and the code released with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.engine.grace.reward_config import RewardConfig
from tercet.engine.records import Rewards
from tercet.kernels import contrastive_reward
from tercet.kernels._checks import Impl
from tercet.kernels._typing import Bool, Float, Int


def grace_reward(
    rollout_emb: Float[Tensor, "groups rollouts hidden"],
    query_emb: Float[Tensor, "groups hidden"],
    negative_emb: Float[Tensor, "groups negatives hidden"] | None,
    finished: Bool[Tensor, "groups rollouts"],
    config: RewardConfig,
    group_ids: Int[Tensor, " groups"] | None = None,
    *,
    impl: Impl = "auto",
) -> Rewards:
    """Reward of every rollout, group after group, and its parts, which add up to it exactly.

    Every part is stored as it enters the total: weighted, divided by the temperature, and rounded
    to one grid of all rows (float32's spacing at the largest reward), so that sums are exact in
    any order.  A truncated rollout's reward is replaced; its part "truncation" is the difference:
        relative  the group's lowest finished reward - penalty; in a group without a finished
                  rollout the batch's lowest - penalty (all equal: no signal under a group baseline)
        flat      -penalty, whatever the others earn (the paper)
    Groups without a finished rollout are counted.

    Args:
        rollout_emb: pooled embeddings of any length, of the G rollouts of each group.
        query_emb: of the query, or of the anchor sample when unsupervised.
        negative_emb: of mined negatives; None trains unsupervised.
        finished: false where the completion was cut off by its length limit.
        group_ids: equal ids mark groups that share a text, which do not repel each other.

    Raises:
        ValueError: NaN or infinity in an embedding, shapes that do not fit.
    """
    if finished.shape != rollout_emb.shape[:2] or finished.dtype != torch.bool:
        raise ValueError(
            f"grace_reward: finished must be bool {list(rollout_emb.shape[:2])} as rollout_emb is, "
            f"got {finished.dtype} {list(finished.shape)}"
        )
    _check_finite(rollout_emb=rollout_emb, query_emb=query_emb, negative_emb=negative_emb)
    supervised = negative_emb is not None
    hard_weight = config.hard_weight_for(supervised=supervised)
    reward = contrastive_reward(
        rollout_emb,
        query_emb,
        negative_emb,
        group_ids=group_ids,
        form="info_nce" if config.form == "info_nce" else "sum",
        repulsion=config.repulsion_for(supervised=supervised),
        temperature=config.temperature,
        impl=impl,
    )
    weights = {
        "positive": 1.0,
        "negative": config.negative_weight,
        "consistency": config.consistency_weight,
        "hard": 1.0 if config.form == "info_nce" else hard_weight,
    }
    parts = {
        name: getattr(reward, name) * (weight / config.temperature)
        for name, weight in weights.items()
    }
    parts = _with_truncation(parts, finished.to(rollout_emb.device), config)
    total = torch.stack(list(parts.values())).sum(0)
    return Rewards(
        total=total.flatten(),
        parts={name: part.flatten() for name, part in parts.items()},
        counts={"groups/all_truncated": float((~finished).all(dim=1).sum())},
    )


def _with_truncation(
    parts: dict[str, Tensor], finished: Tensor, config: RewardConfig
) -> dict[str, Tensor]:
    """The parts on their common grid, and the part that replaces truncated rewards."""
    stacked = torch.stack(list(parts.values()))  # [parts, groups, rollouts]
    if not stacked.numel():
        return parts | {"truncation": torch.zeros_like(stacked[0])}
    # No partial sum exceeds bound < 2^exponent, so multiples of 2^(exponent - digits) add exactly.
    gamma = 0.0 if finished.all() else config.truncation_penalty  # nobody pays: no coarser grid
    bound = 3 * stacked.abs().sum(0).max() + gamma
    digits = 24 if stacked.dtype == torch.float32 else 53
    grid = torch.ldexp(torch.ones_like(bound), bound.frexp().exponent - digits)
    stacked = (stacked / grid).round() * grid + 0.0  # no -0
    penalty = (gamma / grid).round() * grid

    base = stacked.sum(0)
    paid = base.masked_fill(~finished, torch.inf)
    lowest = paid.amin(dim=1, keepdim=True)  # inf where no rollout of the group finished
    if config.truncation == "flat" or not finished.any():
        lowest = torch.zeros_like(lowest)
    replacement = torch.where(lowest.isinf(), paid.amin(), lowest) - penalty
    truncation = (replacement - base).masked_fill(finished, 0.0)
    return dict(zip(parts, stacked, strict=True)) | {"truncation": truncation}


def _check_finite(**embeddings: Tensor | None) -> None:
    for name, x in embeddings.items():
        if x is None or x.isfinite().all():
            continue
        bad = (~x.isfinite().all(dim=-1)).nonzero().tolist()
        axes = {"rollout_emb": "(group, rollout)", "negative_emb": "(group, negative)"}
        rows = ", ".join(str(tuple(row)) if len(row) > 1 else str(row[0]) for row in bad[:8])
        raise ValueError(
            f"grace_reward: {name} must be finite, got NaN or infinity in {len(bad)} of "
            f"{x[..., 0].numel()} rows, {axes.get(name, 'group')} {rows}"
            f"{', ...' if len(bad) > 8 else ''}"
        )
