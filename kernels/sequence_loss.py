r"""Losses whose derivative needs whole sequences: GSPO and DPO, in two phases.

    logp = linear_logp(hidden, weight, targets)        first phase: one product
    loss = f(sums of logp over each sequence)          second: its backward, two or three products

A token's derivative is known only when the last token of its sequence is, so the gradient cannot
be taken chunk by chunk as in `policy_head`.  Tokens of a clipped sequence still cost no product in
the backward.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels._checks import Impl, check_float, check_number, check_same_device, check_tensor
from tercet.kernels._policy_checks import check_boundaries
from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels._typing import Bool, Float, Int
from tercet.kernels.linear_logp import linear_logp
from tercet.kernels.masked_mean import segment_mean
from tercet.kernels.policy_loss import policy_loss
from tercet.kernels.reference import PolicyLoss

GSPO = PolicyLossConfig(loss_type="ppo", epsilon=3e-4, epsilon_high=4e-4)  # as published
CLIPPED = ("ppo", "grpo", "dr_grpo", "dapo")


class DpoMetrics(NamedTuple):
    """Means over pairs; an implicit reward is beta * (log-prob - reference's), nats * beta."""

    chosen_reward: Float[Tensor, ""]
    rejected_reward: Float[Tensor, ""]
    margin: Float[Tensor, ""]  # chosen - rejected
    accuracy: Float[Tensor, ""]  # share of pairs whose margin is > 0


class DpoLoss(NamedTuple):
    """Scalar loss, differentiable, and metrics, which are not."""

    loss: Float[Tensor, ""]
    metrics: DpoMetrics


def gspo_loss(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " n"],
    old_logp: Float[Tensor, " n"],
    advantage: Float[Tensor, " sequences"],
    cu_seqlens: Int[Tensor, " sequences_plus_1"],
    *,
    ref_logp: Float[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    ignore_index: int = -100,
    config: PolicyLossConfig = GSPO,
    num_items: float | Float[Tensor, ""] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float | Float[Tensor, " n"] = 1.0,
    memory_budget_mb: int | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """GSPO, a scalar, and its metrics; differentiable in hidden, weight and bias.

        s = exp(mean over a sequence's tokens of (logp - old_logp))
        loss = mean over sequences of -min(s A, clip(s, 1 - epsilon, 1 + epsilon_high) A)

    KL and entropy bonus, where config has them, are means over tokens, then over sequences.
    Source: arXiv:2507.18071, eq. 5-7.

    Args:
        advantage: one per sequence.
        config: epsilon, epsilon_high, delta, beta, kl_estimator and entropy_coef are used.
        num_items: sequences of the whole optimiser step; None: those here with a counted token.
        mask, ignore_index, bias, temperature, memory_budget_mb: as in `policy_head`, `linear_logp`.

    Returns:
        Loss and metrics: ratios and clip ratios count sequences, as does num_live; KL, entropy
        and num_tokens count tokens.

    Raises:
        TypeError: type or dtype of an argument.
        ValueError: shape, device or boundaries; a loss type without clip; see `policy_loss`.
    """
    op = "gspo_loss"
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"{op}: config must be a PolicyLossConfig, got {type(config).__name__}")
    if config.loss_type not in CLIPPED:
        raise ValueError(f"{op}: loss_type must be one of {CLIPPED}, got {config.loss_type!r}")
    counted = _counted(op, targets, mask, ignore_index, cu_seqlens)
    check_float(op, old_logp=old_logp, advantage=advantage)
    check_same_device(op, hidden=hidden, old_logp=old_logp, advantage=advantage)
    _check_shape(op, old_logp=(old_logp, targets), advantage=(advantage, cu_seqlens[1:]))
    out = linear_logp(
        hidden, weight, targets.masked_fill(~counted, 0),
        bias=bias, temperature=temperature, return_entropy=True,
        memory_budget_mb=memory_budget_mb, impl=impl,
    )  # fmt: skip
    gap = segment_mean((out.logp - old_logp.detach())[:, None], cu_seqlens, counted, impl=impl)
    lengths = _lengths(counted, cu_seqlens)
    plain = {"aggregation": "token_mean", "beta": 0.0, "entropy_coef": 0.0}
    of_sequences = policy_loss(
        gap.squeeze(1), torch.zeros_like(gap.squeeze(1)), advantage,
        mask=lengths > 0, config=replace(config, **plain), num_items=num_items, impl=impl,
    )  # fmt: skip
    of_tokens = policy_loss(
        out.logp, None, torch.zeros_like(out.logp),
        ref_logp=ref_logp, entropy=out.entropy, mask=counted, cu_seqlens=cu_seqlens,
        config=replace(config, loss_type="ppo", aggregation="sequence_mean"),
        num_items=num_items, impl=impl,
    )  # fmt: skip
    names = ("kl_k1", "kl_k2", "kl_k3", "entropy", "num_tokens")
    metrics = of_sequences.metrics._replace(**{k: getattr(of_tokens.metrics, k) for k in names})
    return PolicyLoss(of_sequences.loss + of_tokens.loss, metrics)


def dpo_loss(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " n"],
    ref_logp: Float[Tensor, " n"],
    cu_seqlens: Int[Tensor, " sequences_plus_1"],
    *,
    beta: float = 0.1,
    mask: Bool[Tensor, " n"] | None = None,
    ignore_index: int = -100,
    bias: Float[Tensor, " vocab"] | None = None,
    memory_budget_mb: int | None = None,
    impl: Impl = "auto",
) -> DpoLoss:
    """DPO, the mean over pairs, and its metrics; differentiable in hidden, weight and bias.

        loss = -log sigmoid(beta (d(chosen) - d(rejected))),  d = sum of (logp - ref_logp)

    Source: arXiv:2305.18290, eq. 7.  The first half of the sequences are the chosen answers, the
    second half, in the same order, the rejected ones, as in TRL.

    Args:
        ref_logp: of the reference, per token.
        mask, ignore_index, bias, memory_budget_mb: as in `policy_head` and `linear_logp`.

    Raises:
        TypeError: type or dtype of an argument.
        ValueError: shape, device or boundaries; an odd number of sequences; beta <= 0.
    """
    op = "dpo_loss"
    check_number(op, beta=beta)
    if not 0 < beta < float("inf"):
        raise ValueError(f"{op}: beta must be > 0 and finite, got {beta}")
    counted = _counted(op, targets, mask, ignore_index, cu_seqlens)
    check_float(op, ref_logp=ref_logp)
    check_same_device(op, hidden=hidden, ref_logp=ref_logp)
    _check_shape(op, ref_logp=(ref_logp, targets))
    count = cu_seqlens.shape[0] - 1
    if count % 2 or count < 2:
        raise ValueError(f"{op}: cu_seqlens must bound pairs of sequences, got {count} sequences")
    logp = linear_logp(
        hidden, weight, targets.masked_fill(~counted, 0),
        bias=bias, memory_budget_mb=memory_budget_mb, impl=impl,
    ).logp  # fmt: skip
    gap = segment_mean((logp - ref_logp.detach())[:, None], cu_seqlens, counted, impl=impl)
    reward = beta * gap.squeeze(1) * _lengths(counted, cu_seqlens)
    chosen, rejected = reward.chunk(2)
    margin = chosen - rejected
    metrics = DpoMetrics(
        chosen_reward=chosen.detach().mean(),
        rejected_reward=rejected.detach().mean(),
        margin=margin.detach().mean(),
        accuracy=(margin.detach() > 0).to(margin.dtype).mean(),
    )
    return DpoLoss(-F.logsigmoid(margin).mean(), metrics)


def _counted(
    op: str, targets: Tensor, mask: Tensor | None, ignore_index: int, cu_seqlens: Tensor
) -> Tensor:
    check_tensor(op, "targets", targets, "index")
    check_boundaries(op, cu_seqlens, targets)
    counted = targets != ignore_index
    if mask is None:
        return counted
    check_tensor(op, "mask", mask, "bool")
    _check_shape(op, mask=(mask, targets))
    return counted & mask


def _check_shape(op: str, **pairs: tuple[Tensor, Tensor]) -> None:
    for name, (x, like) in pairs.items():
        if x.shape != like.shape:
            raise ValueError(
                f"{op}: {name} must be {tuple(like.shape)}, got {tuple(x.shape)}; "
                "advantages are per sequence, everything else is per token"
            )


def _lengths(counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Counted tokens of each sequence, exact."""
    before = F.pad(counted.cumsum(0), (1, 0))[cu_seqlens.to(torch.int64)]
    return before[1:] - before[:-1]
