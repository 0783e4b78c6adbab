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

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tercet.engine.records import Rewards
from tercet.kernels import contrastive_reward
from tercet.kernels._checks import Impl
from tercet.kernels._typing import Bool, Float, Int
from tercet.kernels.reference import Repulsion

Form = Literal["paper", "released", "document", "info_nce"]
Truncation = Literal["relative", "flat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Which reward a rollout earns; weights and temperature as in the paper's launch script."""

    form: Form = "document"  # which texts repel a rollout; `paper` collapses (docs/grace.md)
    temperature: float = 0.1  # tau: divides every part but the truncation penalty
    consistency_weight: float = 0.2  # lambda_1
    hard_weight: float | None = None  # lambda_2; None: 0.2, or 1 for "document" without negatives
    negative_weight: float = 1.0  # of the sum over a row's negatives
    # a rollout without an end token earns its group's lowest reward (or 0 if flat) less the penalty
    truncation: Truncation = "relative"
    truncation_penalty: float = 1.0  # gamma, in units of the finished reward

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("form", self.form, get_args(Form)),
            ("truncation", self.truncation, get_args(Truncation)),
        ):
            if value not in allowed:
                raise ValueError(f"RewardConfig: {name} must be one of {allowed}, got {value!r}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(
                f"RewardConfig: temperature must be finite and > 0, got {self.temperature}"
            )
        for name in ("consistency_weight", "hard_weight", "negative_weight", "truncation_penalty"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"RewardConfig: {name} must be finite and >= 0, got {value}")
        if self.form == "info_nce" and (self.hard_weight is not None or self.negative_weight != 1):
            raise ValueError(
                "RewardConfig: form='info_nce' has no hard_weight and no negative_weight (all "
                f"negatives enter one log-sum-exp), got {self.hard_weight} and "
                f"{self.negative_weight}; leave them at None and 1"
            )

    def hard_weight_for(self, *, supervised: bool) -> float:
        """lambda_2 in force; without negatives 0.2 is too weak to keep rationales apart."""
        if self.hard_weight is not None:
            return self.hard_weight
        return 0.2 if supervised or self.form != "document" else 1.0

    def repulsion_for(self, *, supervised: bool) -> Repulsion:
        """Whose similarities to the negatives are paid for: the query's or the rollout's."""
        query_side = self.form == "paper" or (self.form == "released" and supervised)
        return "query" if query_side else "document"


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
