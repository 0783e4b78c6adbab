"""What stands around the steps of any training: AdamW, going on, evaluation, log, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tercet.engine.checkpoint import load_latest, save_checkpoint
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.train_config import LoopConfig

Measures = Callable[[int], dict[str, float]]  # of a step; 0 is before the first


class Loop:
    """The outer loop of one run: what a step does is its caller's.

    Whatever a step draws must depend on its number alone, or on torch's random state, which
    checkpoints hold: then a run that was killed goes on as if nothing had happened.
    """

    def __init__(self, policy: Policy, config: LoopConfig, log: RunLog) -> None:
        """Prepares the optimiser.

        Args:
            policy: with the weights from before step 1, also when a run is resumed.
            config: see `LoopConfig`.
            log: the run's folder; checkpoints go there too.
        """
        self.policy, self.config, self.log = policy, config, log
        self.optimizer = torch.optim.AdamW(
            policy.model.parameters(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.done = 0  # the last step of the checkpoint that `resume` found

    def resume(self) -> dict[str, Any]:
        """Goes back to the folder's last checkpoint, if there is one; returns the state it holds.

        Raises:
            RuntimeError, ValueError: as `load_latest`.
        """
        found = load_latest(self.log.folder, self.policy, self.optimizer, warn=self.log.warn)
        self.log.rewind(-1 if found is None else found.step)
        if found is None:
            return {}
        self.log.info(f"going on from {found.folder}")
        self.done = found.step
        return found.state

    def set_rate(self, step: int) -> float:
        """Sets and returns the learning rate of a step."""
        rate = self.config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def run(
        self,
        step: Measures,
        *,
        evaluate: Measures | None = None,
        state: Callable[[], dict[str, Any]] = dict,
    ) -> dict[str, float]:
        """Does the steps that are left, up to max_steps, after `resume`.

        Args:
            step: trains once; its metrics are logged.
            evaluate: held-out measures, logged as eval/<key> every eval_steps steps.
            state: what a checkpoint holds for `resume` to return; as JSON can hold it.

        Returns:
            The metrics of the last step.

        Raises:
            OSError: as `save_checkpoint`.  Whatever step and evaluate raise.
        """
        config, log = self.config, self.log
        evaluate = evaluate if config.eval_steps else None
        metrics = log.last_metrics()
        if self.done == 0 and evaluate is not None:
            log.log(0, _evaluated(evaluate, 0))
        for number in range(self.done + 1, config.max_steps + 1):
            last = number == config.max_steps
            log.step = number
            metrics = step(number)
            if evaluate is not None and (last or due(number, config.eval_steps)):
                metrics |= _evaluated(evaluate, number)
            log.log(number, metrics, show=last or due(number, config.logging_steps))
            if last or due(number, config.save_steps):
                save_checkpoint(
                    log.folder,
                    number,
                    self.policy,
                    self.optimizer,
                    state(),
                    run=log.about,
                    save_total_limit=config.save_total_limit,
                )
        return metrics


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is due; 0 is never."""
    return every > 0 and step % every == 0


def _evaluated(evaluate: Measures, step: int) -> dict[str, float]:
    return {f"eval/{key}": value for key, value in evaluate(step).items()}
