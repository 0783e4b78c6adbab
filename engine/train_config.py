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
class TrainConfig:
    """How a policy is trained from rewards; names are TRL's where TRL has them.

    Steps count from 1 to max_steps; one step is one batch of rollouts and mini_batches *
    num_iterations optimiser steps on it.
    """

    max_steps: int = 100  # batches of rollouts; a resume may raise it
    seed: int = 0  # of every request: (seed, step, index of the request) decides a completion

    learning_rate: float = 1e-6  # of AdamW, after warm-up
    lr_scheduler_type: Schedule = "constant"  # what follows; linear and cosine fall to 0
    warmup_steps: int = 0  # the rate rises linearly over these
    adam_beta1: float = 0.9  # decay of the mean gradient
    adam_beta2: float = 0.999  # decay of the mean squared gradient
    weight_decay: float = 0.01  # on every parameter, norms and biases too, as GRACE's release does
    max_grad_norm: float = 1.0  # longer gradients are cut to this length

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

    logging_steps: int = 1  # between lines shown and samples kept; metrics are kept at every step
    eval_steps: int = 0  # 0: never; else also before step 1 and after the last
    save_steps: int = 50  # the last step is always saved; 0: nothing else
    save_total_limit: int | None = None  # newest checkpoints kept; None: all

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "num_iterations",
            "mini_batches",
            "max_tokens_per_batch",
            "logging_steps",
        ):
            _check(name, getattr(self, name), "be >= 1", getattr(self, name) >= 1)
        _check("seed", self.seed, "be in [0, 2^63)", 0 <= self.seed < 2**63)
        for name in ("warmup_steps", "eval_steps", "save_steps"):
            _check(name, getattr(self, name), "be >= 0", getattr(self, name) >= 0)
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            _check(name, value, "be in [0, 1e30]", 0 <= value <= LARGEST_RATE)
        for name in ("beta", "entropy_coef"):
            value = getattr(self, name)
            _check(name, value, "be finite and >= 0", math.isfinite(value) and value >= 0)
        for name in ("adam_beta1", "adam_beta2"):
            _check(name, getattr(self, name), "be in [0, 1)", 0 <= getattr(self, name) < 1)
        _check("max_grad_norm", self.max_grad_norm, "be > 0", self.max_grad_norm > 0)
        _check("epsilon", self.epsilon, "be in (0, 1)", 0 < self.epsilon < 1)
        if self.epsilon_high is not None:
            _check("epsilon_high", self.epsilon_high, "be > 0", self.epsilon_high > 0)
        if self.delta is not None:
            _check("delta", self.delta, "be > 1", self.delta > 1)
        limit, threads = self.save_total_limit, self.num_threads
        _check("save_total_limit", limit, "be >= 1", limit is None or limit >= 1)
        _check("num_threads", threads, "be in [1, 1024]", threads is None or 1 <= threads <= 1024)

    @property
    def on_policy(self) -> bool:
        """One optimiser step per batch: the sampling policy is the one being trained."""
        return self.mini_batches == self.num_iterations == 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 1..max_steps; all optimiser steps of one step share it."""
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


def _check(name: str, value: object, must: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"TrainConfig: {name} must {must}, got {value}")
