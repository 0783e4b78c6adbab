"""What is measured on one step: seconds, memory, lengths, rewards and their spread."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from tercet.engine.advantage import flat_groups, group_spread
from tercet.engine.environment import peak_memory_gb
from tercet.engine.records import Rewards, Rollouts
from tercet.kernels._typing import Int


class Clock:
    """Seconds per phase of one step, and the memory it took."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        self._start = self._last = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def lap(self, name: str) -> None:
        """Ends a phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._laps[f"time/{name}_s"] = now - self._last
        self._last = now

    def metrics(self, tokens: int) -> dict[str, float]:
        """Seconds, tokens per second of the whole step, and peak memory in GB."""
        total = self._last - self._start
        return {
            **self._laps,
            "time/step_s": total,
            "tokens_per_s": tokens / total,
            "memory_gb": peak_memory_gb(self._device),
        }


def reward_metrics(rewards: Rewards, groups: Int[Tensor, " n"]) -> dict[str, float]:
    """Mean of the total and of each part, and their mean standard deviation inside the groups."""
    total = rewards.total
    metrics = {
        "reward/mean": float(total.mean()),
        "reward/std": float(total.std(correction=0)),
        "reward/spread": group_spread(total, groups),
        "frac_reward_zero_std": float(flat_groups(total, groups).float().mean()),
    }
    for name, part in rewards.parts.items():
        metrics[f"reward/{name}"] = float(part.mean())
        metrics[f"reward/{name}_spread"] = group_spread(part, groups)
    return metrics


def completion_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Lengths, share without an end, and what packing saves, of the rows that are trained."""
    rows = rollouts.rows("rollout")
    lengths = [len(rollouts.completions[i].ids) for i in rows]
    totals = [len(rollouts.requests[i].prompt_ids) + n for i, n in zip(rows, lengths, strict=True)]
    cut = sum(not rollouts.completions[i].finished for i in rows)
    return {
        "completions/mean_length": sum(lengths) / len(rows),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": cut / len(rows),
        "padding_saved": 1 - sum(totals) / (len(rows) * max(totals)),
    }
