"""Settings of the training loop.  Loads no torch, so that a command line can show them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Estimator = Literal["grpo", "rloo", "reinforce++", "remax", "dapo"]
ScaleRewards = Literal["none", "group", "batch"]
Schedule = Literal["constant", "linear", "cosine"]
LARGEST_RATE = 1e30  # of learning and decay: torch wants a float32 of them


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """What every training sets: steps, AdamW, and when to show, measure and save; names are TRL's.

    Steps count from 1 to max_steps.
    """

    max_steps: int = 100  # a resume may raise it
    seed: int = 0  # of dropout

    learning_rate: float = 1e-6  # of AdamW, after warm-up
    lr_scheduler_type: Schedule = "constant"  # what follows; linear and cosine fall to 0
    warmup_steps: int = 0  # the rate rises linearly over these
    adam_beta1: float = 0.9  # decay of the mean gradient
    adam_beta2: float = 0.999  # decay of the mean squared gradient
    weight_decay: float = 0.01  # on every parameter, norms and biases too, as GRACE's release does
    max_grad_norm: float = 1.0  # longer gradients are cut to this length

    logging_steps: int = 1  # between lines shown and samples kept; metrics are kept at every step
    eval_steps: int = 0  # 0: never; else also before step 1 and after the last
    save_steps: int = 50  # the last step is always saved; 0: nothing else
    save_total_limit: int | None = None  # newest checkpoints kept; None: all

    def __post_init__(self) -> None:
        for name in ("max_steps", "logging_steps"):
            self._check(name, "be >= 1", getattr(self, name) >= 1)
        self._check("seed", "be in [0, 2^63)", 0 <= self.seed < 2**63)
        for name in ("warmup_steps", "eval_steps", "save_steps"):
            self._check(name, "be >= 0", getattr(self, name) >= 0)
        for name in ("learning_rate", "weight_decay"):
            self._check(name, "be in [0, 1e30]", 0 <= getattr(self, name) <= LARGEST_RATE)
        for name in ("adam_beta1", "adam_beta2"):
            self._check(name, "be in [0, 1)", 0 <= getattr(self, name) < 1)
        self._check("max_grad_norm", "be > 0", self.max_grad_norm > 0)
        limit = self.save_total_limit
        self._check("save_total_limit", "be >= 1", limit is None or limit >= 1)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 1..max_steps; all updates of one step share it."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1)
        match self.lr_scheduler_type:
            case "constant":
                return self.learning_rate
            case "linear":
                return self.learning_rate * (1 - done)
            case "cosine":
                return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _check(self, name: str, must: str, holds: bool) -> None:
        if not holds:
            raise ValueError(
                f"{type(self).__name__}: {name} must {must}, got {getattr(self, name)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(LoopConfig):
    """How a policy is trained from rewards; names are TRL's where TRL has them.

    Steps count from 1 to max_steps; one step is one batch of rollouts and mini_batches *
    num_iterations optimiser steps on it.
    """

    seed: int = 0  # of every request: (seed, step, index of the request) decides a completion

    advantage_estimator: Estimator = "grpo"  # which baseline a rollout's reward is compared with
    scale_rewards: ScaleRewards = "none"  # divide advantages by a standard deviation: whose
    num_iterations: int = 1  # mu: passes over one batch of rollouts
    mini_batches: int = 1  # optimiser steps per pass; groups are dealt out whole, in order
    epsilon: float = 0.2  # ratio clip, below 1
    epsilon_high: float | None = None  # above 1; None: epsilon.  DAPO publishes 0.28
    delta: float | None = None  # dual clip of negative advantages, > 1; None: off
    beta: float = 0.0  # weight of the k3 KL against the policy as it was before step 1
    entropy_coef: float = 0.0  # bonus per nat of mean token entropy

    max_tokens_per_batch: int = 16384  # tokens per forward pass; memory only, never the result
    bf16: bool = False  # autocast to bfloat16; the weights and Adam stay in their own dtype

    num_threads: int | None = None  # of the CPU, that torch computes on; None: torch's choice

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # slots=True makes a new class, which super() would miss
        for name in ("num_iterations", "mini_batches", "max_tokens_per_batch"):
            self._check(name, "be >= 1", getattr(self, name) >= 1)
        for name in ("beta", "entropy_coef"):
            value = getattr(self, name)
            self._check(name, "be finite and >= 0", math.isfinite(value) and value >= 0)
        self._check("epsilon", "be in (0, 1)", 0 < self.epsilon < 1)
        high, delta, threads = self.epsilon_high, self.delta, self.num_threads
        self._check("epsilon_high", "be > 0", high is None or high > 0)
        self._check("delta", "be > 1", delta is None or delta > 1)
        self._check("num_threads", "be in [1, 1024]", threads is None or 1 <= threads <= 1024)

    @property
    def on_policy(self) -> bool:
        """One optimiser step per batch: the sampling policy is the one being trained."""
        return self.mini_batches == self.num_iterations == 1
