"""Which policy loss: settings that policy_head, policy_loss and their definition share."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

LossType = Literal["reinforce", "ppo", "grpo", "dr_grpo", "dapo", "cispo", "sapo", "sft"]
Aggregation = Literal["token_mean", "sequence_mean", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]

OWN_AGGREGATION: dict[LossType, Aggregation] = {
    "grpo": "sequence_mean",
    "sapo": "sequence_mean",
    "dr_grpo": "constant",
}  # the other loss types: token_mean
TWO_PHASE = {"gspo": "gspo_loss", "dpo": "dpo_loss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossConfig:
    """Loss of a token, and how tokens are added up; names are TRL's where TRL has them.

    loss_type, with r the importance ratio and A the advantage (`policy_loss_ref` has the formulas):
        reinforce         -A log p
        ppo, dapo, grpo,  clipped surrogate, arXiv:1707.06347, eq. 7; upper clip arXiv:2503.14476,
        dr_grpo           eq. 10; dual clip arXiv:1912.09729, eq. 5.  They differ in aggregation
        cispo             -min(r, epsilon_high) A log p, r without gradient, arXiv:2506.13585
        sapo              -4 sigmoid(tau (r - 1)) A / tau, arXiv:2511.20347
        sft               -log p, cross-entropy

    aggregation (None: sequence_mean for grpo and sapo, constant for dr_grpo, else token_mean):
        token_mean        sum over tokens / number of tokens, arXiv:2503.14476, eq. 12
        sequence_mean     mean over sequences of the mean over their tokens, arXiv:2402.03300, eq. 3
        constant          sum over tokens / (sequences * max_completion_length), arXiv:2503.20783

    Departs from TRL: `delta` bounds only tokens of negative advantage, so it acts below
    1 + epsilon_high, too; `cispo` has no default cap; the entropy bonus is aggregated as the loss.

    Raises:
        ValueError: a value out of its range; a loss type that is not a sum over tokens.
        TypeError: a number that is not one.
    """

    loss_type: LossType = "dapo"
    aggregation: Aggregation | None = None
    epsilon: float = 0.2  # lower clip: r >= 1 - epsilon
    epsilon_high: float | None = (
        None  # upper: r <= 1 + epsilon_high; None: epsilon; cispo: r itself
    )
    delta: float | None = None  # dual clip, > 1: where A < 0 the loss is at most -delta A
    beta: float = 0.0  # weight of the KL to ref_logp
    kl_estimator: KlEstimator = "k3"  # arXiv:2402.03300, eq. 4; k1's gradient has mean 0
    entropy_coef: float = 0.0  # bonus per nat of token entropy
    sapo_temperature_pos: float = 1.0  # tau where A > 0
    sapo_temperature_neg: float = 1.05  # tau elsewhere
    importance_sampling_clip_max: float = 3.0  # cap on p_old / p_sampler; TRL's vllm_...
    max_completion_length: int | None = None  # tokens; for aggregation "constant" alone

    def __post_init__(self) -> None:
        self._check_choices()
        for name in (
            "epsilon",
            "beta",
            "entropy_coef",
            "sapo_temperature_pos",
            "sapo_temperature_neg",
            "importance_sampling_clip_max",
        ):
            _check_number(name, getattr(self, name))
        for name in ("epsilon_high", "delta"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        high, delta = self.epsilon_high, self.delta
        _check("epsilon", self.epsilon, "in [0, 1]", 0 <= self.epsilon <= 1)
        _check("epsilon_high", high, ">= 0", high is None or high >= 0)
        _check("delta", delta, "> 1", delta is None or delta > 1)
        for name in ("beta", "entropy_coef"):
            _check(
                name, getattr(self, name), ">= 0 and finite", 0 <= getattr(self, name) < math.inf
            )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            _check(name, getattr(self, name), "> 0 and finite", 0 < getattr(self, name) < math.inf)
        cap = self.importance_sampling_clip_max
        _check("importance_sampling_clip_max", cap, "> 0", cap > 0)
        if self.loss_type == "cispo" and high is None:
            raise ValueError(
                "PolicyLossConfig: loss_type='cispo' needs epsilon_high, its cap on the ratio "
                "itself, got None; arXiv:2510.13786 recommends 5.0"
            )
        self._check_length()

    def _check_choices(self) -> None:
        if self.loss_type in TWO_PHASE:
            raise ValueError(
                f"PolicyLossConfig: loss_type must be a sum over tokens, got {self.loss_type!r}, "
                "whose derivative needs whole sequences; use the two-phase "
                f"tercet.kernels.{TWO_PHASE[self.loss_type]}"
            )
        for name, value, allowed in (
            ("loss_type", self.loss_type, get_args(LossType)),
            ("aggregation", self.aggregation, (None, *get_args(Aggregation))),
            ("kl_estimator", self.kl_estimator, get_args(KlEstimator)),
        ):
            if value not in allowed:
                raise ValueError(
                    f"PolicyLossConfig: {name} must be one of {allowed}, got {value!r}"
                )

    def _check_length(self) -> None:
        length = self.max_completion_length
        if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
            raise TypeError(
                f"PolicyLossConfig: max_completion_length must be a whole number, got {length!r}"
            )
        _check("max_completion_length", length, ">= 1", length is None or length >= 1)

    @property
    def aggregates(self) -> Aggregation:
        """The aggregation, also where it is left to the loss type."""
        return self.aggregation or OWN_AGGREGATION.get(self.loss_type, "token_mean")

    @property
    def upper(self) -> float:
        """Largest ratio that is not cut."""
        if self.loss_type == "cispo":
            return math.inf if self.epsilon_high is None else self.epsilon_high
        return 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)):
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"PolicyLossConfig: {name} must be a number, got {kind}")


def _check(name: str, value: object, must_be: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"PolicyLossConfig: {name} must be {must_be}, got {value}")
