"""One optimiser step on scored rollouts: clipped policy gradient over packed micro-batches.

    loss = 1/T sum over tokens [ clipped surrogate + beta * k3 KL - entropy_coef * entropy ]

T counts every completion token of the optimiser step, so max_tokens_per_batch is about memory
alone.  Rows with advantage 0 have no gradient when beta and entropy_coef are 0: they are left out
of the forward pass, but their tokens stay in T.  Source: GRPO, arXiv:2402.03300; token mean,
arXiv:2503.14476, eq. 12; dual clip, arXiv:1912.09729.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from tercet.engine.guards import NonFiniteError, check_weights
from tercet.engine.model import Policy
from tercet.engine.records import Completion, Request
from tercet.engine.scoring import Logps, micro_batches, score_completions
from tercet.engine.train_config import TrainConfig
from tercet.kernels import PolicyLossConfig, policy_loss
from tercet.kernels._typing import Bool, Float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """n rollouts with everything that their update needs."""

    row: list[int]  # place among the step's rollouts
    requests: list[Request]
    completions: list[Completion]
    advantage: Float[Tensor, " n"]
    counted: Bool[Tensor, " n"]  # rows whose tokens are in T; the others are out of the step
    old_logp: Logps | None  # before this step's first update; None: on-policy, the ratio is 1
    ref_logp: Logps | None  # of the frozen reference; None: beta is 0

    def rows(self, rows: Sequence[int]) -> Batch:
        """The same batch with only these rows."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Batch(
            row=[self.row[i] for i in rows],
            requests=[self.requests[i] for i in rows],
            completions=[self.completions[i] for i in rows],
            advantage=self.advantage[index],
            counted=self.counted[index],
            old_logp=None if self.old_logp is None else [self.old_logp[i] for i in rows],
            ref_logp=None if self.ref_logp is None else [self.ref_logp[i] for i in rows],
        )

    def lengths(self) -> Tensor:
        """Completion tokens of each row."""
        return torch.tensor([len(completion.ids) for completion in self.completions])


def optimise(
    policy: Policy, optimizer: Optimizer, batch: Batch, config: TrainConfig
) -> dict[str, float]:
    """Updates the policy once, in place, and returns the update's metrics.

    A batch without a row to learn from leaves weights and optimiser alone (updates_skipped is 1).

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite; the weights are untouched.
        NonFiniteWeightsError: the update made the weights so; they are spoilt.
    """
    tokens = int(batch.lengths()[batch.counted].sum())  # T
    every_row = config.beta > 0 or config.entropy_coef > 0
    learns = batch.counted & (every_row | (batch.advantage != 0))
    left_out = float((~learns).sum())
    batch = batch.rows(learns.nonzero().flatten().tolist())
    if not batch.completions:
        return {"loss": 0.0, "grad_norm": 0.0, "rows_left_out": left_out, "updates_skipped": 1.0}

    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=policy.device))
    losses: list[tuple[list[int], Tensor]] = []
    for rows in micro_batches(batch.requests, batch.completions, config.max_tokens_per_batch):
        loss = _micro_loss(policy, batch.rows(rows), config, sums, tokens)
        loss.backward()
        losses.append((rows, loss.detach()))

    grad_norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    total = torch.stack([loss for _, loss in losses]).sum()
    if not (total + grad_norm).isfinite():
        optimizer.zero_grad(set_to_none=True)
        bad = [batch.row[i] for rows, loss in losses if not loss.isfinite() for i in rows]
        raise NonFiniteError(f"{'loss' if bad else 'gradient norm'} of rollouts", bad or batch.row)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    check_weights(policy.model)
    num_scored = int(batch.lengths().sum())
    means = {
        key: float(value) / (1 if key.endswith("_max") else num_scored)
        for key, value in sums.items()
    }
    return {
        "loss": float(total),
        "grad_norm": float(grad_norm),
        "rows_left_out": left_out,
        "updates_skipped": 0.0,
        **means,
    }


def _micro_loss(
    policy: Policy,
    batch: Batch,
    config: TrainConfig,
    sums: defaultdict[str, Tensor],
    tokens: int,
) -> Tensor:
    """Loss of a micro-batch, its share of 1/T; adds its metrics to `sums`."""
    device = policy.device
    scored = score_completions(policy, batch.requests, batch.completions, config, entropy=True)
    old = None if batch.old_logp is None else torch.cat(batch.old_logp)
    loss, metrics = policy_loss(
        scored.logp,
        old,
        batch.advantage.repeat_interleave(batch.lengths()).to(device),
        ref_logp=None if batch.ref_logp is None else torch.cat(batch.ref_logp),
        entropy=scored.entropy,
        config=PolicyLossConfig(
            loss_type="ppo",
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            delta=config.delta,
            beta=config.beta,
            entropy_coef=config.entropy_coef,
        ),
        num_items=tokens,
    )
    sampled = torch.tensor([x for c in batch.completions for x in c.logp], device=device)
    trainer = scored.logp.detach() if old is None else old
    clipped = metrics.clip_ratio_low + metrics.clip_ratio_high + metrics.clip_ratio_dual
    sums["entropy"] += metrics.entropy * metrics.num_tokens
    sums["clip_ratio"] += clipped * metrics.num_tokens
    mismatch = (trainer - sampled).abs()
    sums["sampling/logp_mismatch"] += mismatch.sum()
    worst = "sampling/logp_mismatch_max"
    sums[worst] = torch.maximum(sums[worst], mismatch.max())
    if config.beta > 0:
        sums["kl"] += metrics.kl_k3 * metrics.num_tokens
    return loss
