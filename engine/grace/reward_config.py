"""Settings of GRACE's reward; rewards.py says what they mean.  Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
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
