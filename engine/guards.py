"""Checks of what samplers and systems hand to the loop, before any of it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tercet.engine.records import Request, Rewards, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class NonFiniteError(RuntimeError):
    """A NaN or an infinity, found before it could reach the weights."""

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(f"{what} must be finite, got NaN or infinity in rows {list(rows)[:20]}")
        self.rows = list(rows)


class NonFiniteWeightsError(NonFiniteError):
    """The weights themselves are spoilt; only what was saved before is of use."""

    def __init__(self, names: Sequence[str]) -> None:
        RuntimeError.__init__(
            self,
            "weights after the update must be finite, got NaN or infinity in "
            f"{len(names)} parameters, first {names[0]}; nothing was saved over: lower "
            "learning_rate or weight_decay and resume from the last checkpoint, or start over",
        )
        self.rows = []


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    named = [(name, x.detach()) for name, x in model.named_parameters() if x.numel()]
    bounds = [torch.stack(x.aminmax()).isfinite().all() for _, x in named]
    good = torch.stack([bound.cpu() for bound in bounds]).tolist() if bounds else []
    return [name for (name, _), fine in zip(named, good, strict=True) if not fine]


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteWeightsError after an update that overflowed, before it can be saved."""
    if names := non_finite_weights(model):
        raise NonFiniteWeightsError(names)


def check_requests(requests: Sequence[Request]) -> None:
    """Raises ValueError unless there are rollouts and each can be scored under its temperature."""
    rollouts = [i for i, request in enumerate(requests) if request.role == "rollout"]
    if not rollouts:
        raise ValueError(
            f"System.requests: there must be rows of role 'rollout', got none in {len(requests)}"
        )
    greedy = [i for i in rollouts if requests[i].params.temperature == 0]
    if greedy:
        raise ValueError(
            "System.requests: rollouts need a temperature > 0 to have log-probs, "
            f"got 0 in rows {greedy[:20]}"
        )


def check_completions(rollouts: Rollouts) -> None:
    """Raises NonFiniteError for log-probs, ValueError for counts that do not belong together."""
    if len(rollouts.completions) != len(rollouts.requests):
        raise ValueError(
            "Sampler: there must be one completion per request, got "
            f"{len(rollouts.completions)} for {len(rollouts.requests)}"
        )
    for i, completion in enumerate(rollouts.completions):
        if not len(completion.ids) == len(completion.logp) >= 1:
            raise ValueError(
                "Sampler: a completion must have at least one token and a log-prob for each, "
                f"got {len(completion.ids)} tokens and {len(completion.logp)} log-probs in row {i}"
            )
    bad = [
        i
        for i, completion in enumerate(rollouts.completions)
        if not torch.tensor(completion.logp).isfinite().all()
    ]
    if bad:
        raise NonFiniteError("sampled log-probs of requests", bad)


def check_embeddings(rollouts: Rollouts) -> None:
    """Raises NonFiniteError when a hidden state has spoilt a pooled embedding."""
    bad = [
        i
        for i, completion in enumerate(rollouts.completions)
        if completion.embedding is not None and not completion.embedding.isfinite().all()
    ]
    if bad:
        raise NonFiniteError("hidden states (pooled embeddings) of requests", bad)


def check_rewards(rewards: Rewards, num_rollouts: int) -> None:
    """Raises ValueError for a wrong shape and NonFiniteError for a NaN or an infinity."""
    for name, values in {"total": rewards.total, **rewards.parts}.items():
        if values.shape != (num_rollouts,):
            raise ValueError(
                f"System.rewards: {name} must be [{num_rollouts}], one per rollout row, "
                f"got {tuple(values.shape)}"
            )
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(f"reward ({name}) of rollouts", bad)


def plain_rows(
    rollouts: Rollouts, rewards: Rewards | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[dict[str, Any]]:
    """Every row as it is, for the account of a step that went wrong; NaN is written as "nan"."""

    def text(ids: list[int]) -> str | list[int]:
        return ids if tokenizer is None else str(tokenizer.decode(ids))

    rows = []
    for request, completion in zip(rollouts.requests, rollouts.completions, strict=True):
        rows.append(
            {
                "role": request.role,
                "group": request.group,
                "prompt": text(request.prompt_ids),
                "completion": text(completion.ids),
                "finished": completion.finished,
            }
        )
    if rewards is not None:
        for place, i in enumerate(rollouts.rows("rollout")):
            for name, values in {"total": rewards.total, **rewards.parts}.items():
                value = float(values[place])
                rows[i][f"reward/{name}"] = value if math.isfinite(value) else str(value)
    return rows
