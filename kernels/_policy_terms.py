"""Derivative of a policy loss by the log-prob and entropy of its tokens, and sums for the metrics.

`policy_loss_ref` is the meaning; here its derivative is written out, because an operator that
computes gradients in its forward cannot ask autograd.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from tercet.kernels._policy_config import KlEstimator, LossType, PolicyLossConfig
from tercet.kernels.reference import MAX_LOG_RATIO, PolicyMetrics

NUM_SUMS = 12  # loss, low, high, dual, k1, k2, k3, ratio, entropy, sampler ratio, tokens, live
NUM_STATS = NUM_SUMS + 2  # and two maxima: ratio, sampler ratio


class Kind(NamedTuple):
    """A PolicyLossConfig as the operators take it: names, and numbers in this order."""

    loss_type: LossType
    kl_estimator: KlEstimator
    lower: float  # bounds of the ratio
    upper: float
    delta: float
    beta: float
    entropy_coef: float
    tau_pos: float
    tau_neg: float
    cap: float

    @staticmethod
    def of(config: PolicyLossConfig) -> "Kind":
        return Kind(
            config.loss_type,
            config.kl_estimator,
            1 - config.epsilon,
            config.upper,
            float("inf") if config.delta is None else config.delta,
            config.beta,
            config.entropy_coef,
            config.sapo_temperature_pos,
            config.sapo_temperature_neg,
            config.importance_sampling_clip_max,
        )

    @staticmethod
    def parse(loss_type: str, kl_estimator: str, numbers: list[float]) -> "Kind":
        return Kind(cast(LossType, loss_type), cast(KlEstimator, kl_estimator), *numbers)


class Tokens(NamedTuple):
    """What is given of each of n tokens, in the accumulator's dtype; None: not given."""

    old_logp: Tensor | None
    advantage: Tensor | None
    ref_logp: Tensor | None
    sampler_logp: Tensor | None
    weights: Tensor  # of a token in the loss; 0 where it does not count
    counted: Tensor  # bool

    @staticmethod
    def flat(
        dtype: torch.dtype, counted: Tensor, weights: Tensor, *given: Tensor | None
    ) -> "Tokens":
        """From tensors of any shape, `given` in order; zero where a token does not count."""
        counts = counted.reshape(-1).contiguous()

        def flatten(x: Tensor) -> Tensor:
            return x.reshape(-1).to(dtype).masked_fill(~counts, 0.0).contiguous()

        old, advantage, ref, sampler = (None if x is None else flatten(x) for x in given)
        return Tokens(old, advantage, ref, sampler, flatten(weights), counts)

    def rows(self, which: slice | Tensor) -> "Tokens":
        old, advantage, ref, sampler = (None if x is None else x[which] for x in self[:4])
        return Tokens(old, advantage, ref, sampler, self.weights[which], self.counted[which])

    def maybe_live(self, kind: Kind) -> Tensor:
        """Tokens whose gradient is not known to be zero before their log-prob is."""
        live = self.weights != 0
        if kind.beta > 0 or kind.entropy_coef > 0 or self.advantage is None:
            return live
        return live & (self.advantage != 0)


class Slopes(NamedTuple):
    """Derivatives of the loss, and the sums and maxima of the metrics."""

    logp: Tensor  # [n]
    entropy: Tensor | None  # [n]; None: the loss does not depend on it
    stats: Tensor  # [NUM_STATS]


def _exp_clamped(x: Tensor) -> tuple[Tensor, Tensor]:
    """The exponential of x cut to +-MAX_LOG_RATIO, and its derivative."""
    y = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return y, torch.where(x.abs() > MAX_LOG_RATIO, 0.0, y)  # NaN stays


def slopes(logp: Tensor, entropy: Tensor | None, tokens: Tokens, kind: Kind) -> Slopes:
    logp = logp.masked_fill(~tokens.counted, 0.0)
    old = logp if tokens.old_logp is None else tokens.old_logp
    a = torch.ones_like(logp) if tokens.advantage is None else tokens.advantage
    ratio, d_ratio = _exp_clamped(logp - old)
    loss, slope, cuts = _surrogate(logp, ratio, d_ratio, a, kind)
    sampler_ratio = torch.ones_like(logp)
    if tokens.sampler_logp is not None:
        sampler_ratio = _exp_clamped(old - tokens.sampler_logp)[0]
        capped = sampler_ratio.clamp(max=kind.cap)
        loss, slope = loss * capped, slope * capped
    kls = [torch.zeros_like(logp)] * 3
    if tokens.ref_logp is not None:
        kls, d_kls = _kl(tokens.ref_logp - logp)
        if kind.beta > 0:
            chosen = ("k1", "k2", "k3").index(kind.kl_estimator)
            loss, slope = loss + kind.beta * kls[chosen], slope + kind.beta * d_kls[chosen]
    d_entropy = None
    spread = torch.zeros_like(logp) if entropy is None else entropy
    spread = spread.masked_fill(~tokens.counted, 0.0)
    if kind.entropy_coef > 0:
        loss = loss - kind.entropy_coef * spread
        d_entropy = -kind.entropy_coef * tokens.weights
    slope = slope * tokens.weights
    live = slope != 0 if d_entropy is None else (slope != 0) | (d_entropy != 0)
    counts = [x.to(logp.dtype) for x in (*cuts, tokens.counted, live)]
    rows = [tokens.weights * loss, *counts[:3], *kls, ratio, spread, sampler_ratio, *counts[3:]]
    return Slopes(slope, d_entropy, _stats(torch.stack(rows), tokens.counted))


def _surrogate(
    logp: Tensor, ratio: Tensor, d_ratio: Tensor, a: Tensor, kind: Kind
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss without KL and entropy, its derivative, and what is cut: below, above, dual."""
    never = torch.zeros_like(a, dtype=torch.bool)
    if kind.loss_type in ("reinforce", "sft"):
        return -a * logp, -a, [never] * 3
    if kind.loss_type == "cispo":
        weight = -ratio.clamp(max=kind.upper) * a
        return weight * logp, weight, [never, (ratio > kind.upper) & (a != 0), never]
    if kind.loss_type == "sapo":
        up = (a > 0).to(a.dtype)
        tau = kind.tau_pos * up + kind.tau_neg * (1 - up)
        gate = torch.sigmoid(tau * (ratio - 1))
        return -4 * gate * a / tau, -4 * gate * (1 - gate) * a * d_ratio, [never] * 3
    low = (a < 0) & (ratio < kind.lower)
    high = (a > 0) & (ratio > kind.upper)
    dual = (a < 0) & (ratio > kind.delta)
    held = torch.where(low, kind.lower, torch.where(high, kind.upper, ratio))
    held = torch.where(dual, kind.delta, held)
    return -held * a, torch.where(low | high | dual, 0.0, -d_ratio * a), [low, high, dual]


def _kl(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """k1, k2, k3 of x = ref_logp - logp, and their derivatives by logp."""
    inside = (~(x.abs() > MAX_LOG_RATIO)).to(x.dtype)
    x = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    rise = x.expm1()
    return [-x, x.square() / 2, rise - x], [inside, -x * inside, -rise * inside]


def _stats(rows: Tensor, counted: Tensor) -> Tensor:
    """Sums over the counted tokens of rows [NUM_SUMS, n], and the two maxima."""
    rows = rows.masked_fill(~counted, 0.0)
    if rows.shape[1] == 0:
        return rows.new_zeros(NUM_STATS)
    return torch.cat([rows.sum(1), rows[[7, 9]].amax(1)])


def merge(stats: Tensor, other: Tensor) -> None:
    """Adds `other` to `stats`, in place."""
    stats[:NUM_SUMS] += other[:NUM_SUMS]
    torch.maximum(stats[NUM_SUMS:], other[NUM_SUMS:], out=stats[NUM_SUMS:])


def metrics_of(stats: Tensor) -> PolicyMetrics:
    mean = stats[:NUM_SUMS] / stats[10].clamp(min=1)
    return PolicyMetrics(
        clip_ratio_low=mean[1],
        clip_ratio_high=mean[2],
        clip_ratio_dual=mean[3],
        kl_k1=mean[4],
        kl_k2=mean[5],
        kl_k3=mean[6],
        ratio_mean=mean[7],
        ratio_max=stats[12],
        entropy=mean[8],
        sampler_ratio_mean=mean[9],
        sampler_ratio_max=stats[13],
        num_tokens=stats[10],
        num_live=stats[11],
    )
