"""Training from rewards: sample, score, advantage, update; around it stands loop.py.

A system (GRACE, a reward model, a toy) says what to sample and what a completion earns; the
trainer knows nothing of texts.  Whatever a step draws depends on (seed, step) alone, so a run that
was killed goes on from its last checkpoint exactly as if nothing had happened.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from tercet.engine.advantage import advantages, dead_parts, flat_groups
from tercet.engine.environment import torch_threads
from tercet.engine.files import replace_text
from tercet.engine.guards import (
    NonFiniteError,
    NonFiniteWeightsError,
    check_completions,
    check_embeddings,
    check_requests,
    check_rewards,
    plain_rows,
)
from tercet.engine.loop import Loop, due
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.records import Request, Rewards, Rollouts
from tercet.engine.rollout import (
    deal_groups,
    groups_of,
    num_tokens,
    split_greedy,
    with_greedy,
    with_seeds,
)
from tercet.engine.sampler import Sampler
from tercet.engine.scoring import ScoredRollouts, score_rollouts
from tercet.engine.step_metrics import Clock, completion_metrics, reward_metrics
from tercet.engine.train_config import TrainConfig
from tercet.engine.update import Batch, optimise
from tercet.kernels._typing import Float

__all__ = ["System", "TrainConfig", "Trainer"]

NOT_MADE = "; the update was not made and nothing was saved over"


@runtime_checkable
class System(Protocol):
    """What is trained: where requests come from and what completions earn."""

    def requests(self, step: int) -> list[Request]:
        """What to sample at step 1, 2, ...: a pure function of the system's settings and the step.

        Rows of role "rollout" are trained; those of one group share a prompt.  A request without
        a seed gets one from (config.seed, step, its index).
        """
        ...

    def rewards(self, rollouts: Rollouts) -> Rewards:
        """Rewards of the rows of role "rollout", in their order; a pure function."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out measures, logged as eval/<key>; step 0 is before training.  May be {}."""
        ...

    def samples(self, rollouts: Rollouts, rewards: Rewards) -> list[dict[str, Any]]:
        """A few rows for people to read, with their rewards."""
        ...


class Trainer:
    """Trains a policy on a system's rewards and keeps the run's folder."""

    def __init__(
        self,
        policy: Policy,
        sampler: Sampler,
        system: System,
        config: TrainConfig,
        log: RunLog,
        *,
        reference: Policy | None = None,
    ) -> None:
        """Prepares the optimiser, and with beta > 0 the reference.

        Args:
            policy: with the weights from before step 1, also when a run is resumed.
            sampler: samples from this very policy.
            system: see `System`.
            config: see `TrainConfig`.
            log: the run's folder; checkpoints go there too.
            reference: what beta pulls towards; None: a frozen copy of `policy`.
        """
        self.policy = policy
        self.sampler = sampler
        self.system = system
        self.config = config
        self.log = log
        self.reference = reference
        if config.beta > 0 and reference is None:
            frozen = copy.deepcopy(policy.model).requires_grad_(False)
            self.reference = Policy(frozen, policy.tokenizer, attn=policy.attn)
        self.loop = Loop(policy, config, log)
        self.optimizer = self.loop.optimizer
        self._told: set[str] = set()  # warnings that are given once per run

    def train(self) -> dict[str, float]:
        """Trains up to max_steps, from the last checkpoint if there is one.

        Returns:
            The metrics of the last step.

        Raises:
            RuntimeError: NaN or infinity; the step's samples are in samples.jsonl, the account of
                it in nan_step.json.  The update that hit it has not touched the weights, or is
                the one that spoilt them; no checkpoint holds it.
        """
        with torch_threads(self.config.num_threads):
            return self._train()

    def _train(self) -> dict[str, float]:
        told = self.loop.resume().get("told")
        self._told = {key for key in told if isinstance(key, str)} if type(told) is list else set()
        self._check_precision()
        return self.loop.run(
            self.step,
            evaluate=self.system.evaluate,
            state=lambda: {"told": sorted(self._told)},
        )

    def step(self, step: int) -> dict[str, float]:
        """One batch of rollouts and the updates on it.  Returns the step's metrics.

        Raises:
            RuntimeError: NaN or infinity; see `train`.
            ValueError: requests, completions or rewards that do not fit together; see guards.py.
        """
        rollouts: Rollouts | None = None
        rewards: Rewards | None = None
        clock = Clock(self.policy.device)
        try:
            rollouts = self._sample(step)
            clock.lap("sample")
            check_completions(rollouts)
            scored = score_rollouts(self.policy, self.reference, rollouts, self.config)
            check_embeddings(scored.rollouts)
            rollouts, greedy = split_greedy(scored.rollouts)
            rewards = self._rewards(rollouts)
            check_rewards(rewards, len(rollouts.rows("rollout")))
            baseline = self._baseline(greedy) if self._remax else None
            advantage = self._advantage(rollouts, rewards, baseline)
            batch = self._batch(rollouts, rewards, advantage, scored)
            clock.lap("score")
            learnt = self._update(batch, step)
            clock.lap("update")
        except (NonFiniteError, FloatingPointError) as error:
            raise self._stopped(step, error, rollouts, rewards) from error
        self._tell(step, rollouts, rewards)
        return {
            **reward_metrics(rewards, groups_of(rollouts)),
            **completion_metrics(rollouts),
            **rewards.counts,
            **learnt,
            **clock.metrics(num_tokens(scored.rollouts)),
        }

    @property
    def _remax(self) -> bool:
        return self.config.advantage_estimator == "remax"

    def _sample(self, step: int) -> Rollouts:
        requests = with_seeds(self.system.requests(step), self.config.seed, step)
        check_requests(requests)
        if self._remax:
            requests = with_greedy(requests)
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.config.bf16):
            return Rollouts(requests=requests, completions=self.sampler.sample(requests))

    def _rewards(self, rollouts: Rollouts) -> Rewards:
        rewards = self.system.rewards(rollouts)
        parts = {name: part.detach().float().cpu() for name, part in rewards.parts.items()}
        return replace(rewards, total=rewards.total.detach().float().cpu(), parts=parts)

    def _baseline(self, greedy: Rollouts) -> Float[Tensor, " n"]:
        """What the greedy completion of each rollout's group would have earned (remax)."""
        rewards = self._rewards(greedy)
        check_rewards(rewards, len(greedy.rows("rollout")))
        return rewards.total

    def _advantage(
        self, rollouts: Rollouts, rewards: Rewards, baseline: Float[Tensor, " n"] | None
    ) -> Float[Tensor, " n"]:
        return advantages(
            rewards.total,
            groups_of(rollouts),
            estimator=self.config.advantage_estimator,
            scale_rewards=self.config.scale_rewards,
            baseline=baseline,
        )

    def _batch(
        self,
        rollouts: Rollouts,
        rewards: Rewards,
        advantage: Float[Tensor, " n"],
        scored: ScoredRollouts,
    ) -> Batch:
        rows = rollouts.rows("rollout")
        dapo = self.config.advantage_estimator == "dapo"
        flat = flat_groups(rewards.total, groups_of(rollouts))
        return Batch(
            row=list(range(len(rows))),
            requests=[rollouts.requests[i] for i in rows],
            completions=[rollouts.completions[i] for i in rows],
            advantage=advantage,
            counted=~flat if dapo else torch.ones_like(flat),
            old_logp=scored.old_logp,
            ref_logp=scored.ref_logp,
        )

    def _update(self, batch: Batch, step: int) -> dict[str, float]:
        """mini_batches * num_iterations optimiser steps; the mean of their metrics."""
        config = self.config
        rate = self.loop.set_rate(step)
        self.policy.model.train()
        updates = [
            optimise(self.policy, self.optimizer, batch.rows(rows), config)
            for _ in range(config.num_iterations)
            for rows in deal_groups([r.group for r in batch.requests], config.mini_batches)
        ]
        self.policy.model.eval()
        means = {
            key: sum(values) / len(values)
            for key in dict.fromkeys(key for update in updates for key in update)
            if (values := [update[key] for update in updates if key in update])
        }
        return {**means, "learning_rate": rate}

    def _tell(self, step: int, rollouts: Rollouts, rewards: Rewards) -> None:
        """Readable samples, and what the user should hear of once per run."""
        if due(step, self.config.logging_steps):
            self.log.samples(step, self.system.samples(rollouts, rewards))
        groups = groups_of(rollouts)
        if bool(flat_groups(rewards.total, groups).all()):
            self._warn_once(
                "flat",
                "all rollouts of each group earned the same: there is nothing to learn from (the "
                "task is solved, the policy has collapsed, or the reward cannot tell them apart)",
            )
        else:
            for name in dead_parts(rewards.parts, groups):
                self._warn_once(
                    f"dead/{name}",
                    f"reward part {name!r} is the same for all rollouts of each group: it is "
                    "paid, but it cannot tell them apart, so it teaches nothing",
                )
        if not any(rollouts.completions[i].finished for i in rollouts.rows("rollout")):
            self._warn_once(
                "all_truncated",
                "no rollout of the batch ended before max_completion_length; raise it, or check "
                "the end token (counted in completions/clipped_ratio)",
            )

    def _check_precision(self) -> None:
        if self.policy.dtype in (torch.float16, torch.bfloat16):
            self._warn_once(
                "precision",
                f"the weights are {self.policy.dtype}: an update below about 1/256 of a weight is "
                "lost in rounding; load them as float32 and set bf16 for bfloat16 compute",
            )

    def _warn_once(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self.log.warn(message)

    def _stopped(
        self,
        step: int,
        error: NonFiniteError | FloatingPointError,
        rollouts: Rollouts | None,
        rewards: Rewards | None,
    ) -> RuntimeError:
        """Saves what the step drew, and says what happened."""
        rows = [] if rollouts is None else plain_rows(rollouts, rewards, self.policy.tokenizer)
        self.log.samples(step, rows)
        path = self.log.folder / "nan_step.json"
        bad = error.rows if isinstance(error, NonFiniteError) else []
        account = {"step": step, "what": str(error), "rows": bad, "samples": rows}
        replace_text(path, json.dumps(account, indent=2) + "\n")
        done = "" if isinstance(error, NonFiniteWeightsError) else NOT_MADE
        return RuntimeError(
            f"Trainer: step {step}: {error}{done}; "
            f"see {path} and {self.log.folder / 'samples.jsonl'}"
        )
