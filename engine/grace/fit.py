"""The supervised loop: an objective adds gradients, the loop does the rest.

Contrastive baselines and the small experiments' language modelling run on it.  What a step draws
depends on (seed, step) alone and checkpoints hold the random state, so a run that was killed goes
on exactly.
"""

from __future__ import annotations

import math
import time
from typing import Protocol, runtime_checkable

import torch

from tercet.engine.grace.fit_config import FitConfig
from tercet.engine.guards import NonFiniteWeightsError, non_finite_weights
from tercet.engine.loop import Loop, Measures
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy


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
    evaluate: Measures | None = None,
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
    loop = Loop(policy, config, log)
    torch.manual_seed(config.seed)
    loop.resume()
    return loop.run(lambda step: _step(loop, objective, step), evaluate=evaluate)


def _step(loop: Loop, objective: Objective, step: int) -> dict[str, float]:
    started = time.perf_counter()
    model, optimizer = loop.policy.model, loop.optimizer
    rate = loop.set_rate(step)
    model.train()
    metrics = objective.backward(step)
    model.eval()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), loop.config.max_grad_norm).item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise RuntimeError(
            f"fit: loss and gradient of step {step} must be finite, got loss {metrics['loss']} and "
            f"gradient norm {norm}; the update was not made; lower learning_rate or check the data"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if bad := non_finite_weights(model):
        raise RuntimeError(f"fit: step {step}: {NonFiniteWeightsError(bad)}")
    seconds = time.perf_counter() - started
    return {**metrics, "grad_norm": norm, "learning_rate": rate, "time/step_s": seconds}
