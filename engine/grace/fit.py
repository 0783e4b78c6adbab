"""The supervised loop: an objective adds gradients, the loop does the rest.

Contrastive baselines and the small experiments' language modelling run on it.  What a step draws
depends on (seed, step) alone and checkpoints hold the random state, so a run that was killed goes
on exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

import torch

from tercet.engine.checkpoint import load_latest, save_checkpoint
from tercet.engine.guards import NonFiniteWeightsError, non_finite_weights
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.train_config import Schedule, TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """How a policy is fitted to an objective; names are TRL's.  Steps count from 1."""

    max_steps: int = 100  # one batch and one update each
    seed: int = 0  # of dropout; the objective has its own for the data

    learning_rate: float = 1e-4  # of AdamW, after warm-up
    lr_scheduler_type: Schedule = "constant"  # what follows; linear and cosine fall to 0
    warmup_steps: int = 0  # the rate rises linearly over these
    adam_beta1: float = 0.9  # decay of the mean gradient
    adam_beta2: float = 0.999  # decay of the mean squared gradient
    weight_decay: float = 0.01  # on every parameter
    max_grad_norm: float = 1.0  # longer gradients are cut to this length

    logging_steps: int = 10  # between lines shown; metrics are kept at every step
    eval_steps: int = 0  # 0: never; else also before step 1 and after the last
    save_steps: int = 50  # the last step is always saved; 0: nothing else
    save_total_limit: int | None = 2  # newest checkpoints kept; None: all

    def __post_init__(self) -> None:
        try:
            self._as_train()  # whose checks are these
        except ValueError as error:
            raise ValueError(str(error).replace("TrainConfig", "FitConfig")) from error

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 1..max_steps."""
        return self._as_train().learning_rate_at(step)

    def _as_train(self) -> TrainConfig:
        return TrainConfig(**asdict(self))


@runtime_checkable
class Objective(Protocol):
    """What is minimised."""

    def backward(self, step: int) -> dict[str, float]:
        """Adds the gradient of step's loss to the parameters'; returns {"loss": ..., ...}.

        The rows are a pure function of the objective's seed and the step.
        """
        ...


def fit(
    policy: Policy,
    objective: Objective,
    config: FitConfig,
    log: RunLog,
    *,
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Fits up to max_steps, from the folder's last checkpoint if there is one.

    Args:
        policy: with the weights from before step 1, also when a run is resumed.
        objective: see `Objective`.
        config: see `FitConfig`.
        log: the run's folder; checkpoints go there too.
        evaluate: held-out measures, logged as eval/<key>.

    Returns:
        The metrics of the last step.

    Raises:
        RuntimeError: the loss or its gradient is not finite (the weights are those of the step
            before), or the update made the weights so; nothing was saved over.
    """
    optimizer = torch.optim.AdamW(
        policy.model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    start = _resume(policy, optimizer, config, log)
    metrics = log.last_metrics()
    evaluate = evaluate if config.eval_steps else None
    if start == 0 and evaluate is not None:
        log.log(0, _prefixed(evaluate(0)))
    for step in range(start + 1, config.max_steps + 1):
        last = step == config.max_steps
        log.step = step
        metrics = _step(policy, objective, optimizer, config, step)
        if evaluate is not None and (last or step % config.eval_steps == 0):
            metrics |= _prefixed(evaluate(step))
        log.log(step, metrics, show=last or step % config.logging_steps == 0)
        if last or (config.save_steps and step % config.save_steps == 0):
            save_checkpoint(
                log.folder,
                step,
                policy,
                optimizer,
                {},
                run=log.about,
                save_total_limit=config.save_total_limit,
            )
    return metrics


def _resume(
    policy: Policy, optimizer: torch.optim.Optimizer, config: FitConfig, log: RunLog
) -> int:
    torch.manual_seed(config.seed)
    found = load_latest(log.folder, policy, optimizer, warn=log.warn)
    log.rewind(-1 if found is None else found.step)
    if found is None:
        return 0
    log.info(f"going on from {found.folder}")
    return found.step


def _step(
    policy: Policy,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    config: FitConfig,
    step: int,
) -> dict[str, float]:
    started = time.perf_counter()
    rate = config.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    parameters = list(policy.model.parameters())
    policy.model.train()
    metrics = objective.backward(step)
    policy.model.eval()
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise RuntimeError(
            f"fit: loss and gradient of step {step} must be finite, got loss {metrics['loss']} and "
            f"gradient norm {norm}; the update was not made; lower learning_rate or check the data"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if bad := non_finite_weights(policy.model):
        raise RuntimeError(f"fit: step {step}: {NonFiniteWeightsError(bad)}")
    seconds = time.perf_counter() - started
    return {**metrics, "grad_norm": norm, "learning_rate": rate, "time/step_s": seconds}


def _prefixed(measures: dict[str, float]) -> dict[str, float]:
    return {f"eval/{key}": value for key, value in measures.items()}
