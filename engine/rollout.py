"""What a step asks the sampler for, and how its rows belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tercet.engine.records import Request, Rollouts
from tercet.kernels._typing import Int


def request_seed(seed: int, step: int, index: int) -> int:
    """The seed of one request, in [0, 2**63): equal inputs give equal completions on a resume."""
    digest = hashlib.blake2b(f"{seed} {step} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def with_seeds(requests: Sequence[Request], seed: int, step: int) -> list[Request]:
    """Gives every request that has no seed of its own the one of its place."""
    return [
        request
        if request.params.seed is not None
        else replace(request, params=replace(request.params, seed=request_seed(seed, step, index)))
        for index, request in enumerate(requests)
    ]


def with_greedy(requests: Sequence[Request]) -> list[Request]:
    """Adds one greedy request per group, role "baseline", behind the others (remax)."""
    first = {r.group: r for r in reversed(requests) if r.role == "rollout"}
    greedy = [
        replace(r, role="baseline", params=replace(r.params, temperature=0.0))
        for r in sorted(first.values(), key=lambda r: r.group)
    ]
    return [*requests, *greedy]


def split_greedy(rollouts: Rollouts) -> tuple[Rollouts, Rollouts]:
    """Undoes `with_greedy`: the rollouts, and the same with greedy completions in their place.

    Rewards of the second are the baselines of the first: a system that scores a batch as a whole
    (GRACE) sees the batch it knows, each group now being copies of its greedy completion.
    """
    baseline = rollouts.rows("baseline")
    keep = [i for i, request in enumerate(rollouts.requests) if request.role != "baseline"]
    by_group = {rollouts.requests[i].group: rollouts.completions[i] for i in baseline}
    requests = [rollouts.requests[i] for i in keep]
    sampled = [rollouts.completions[i] for i in keep]
    greedy = [
        by_group.get(request.group, completion) if request.role == "rollout" else completion
        for request, completion in zip(requests, sampled, strict=True)
    ]
    return (
        Rollouts(requests=requests, completions=sampled),
        Rollouts(requests=requests, completions=greedy),
    )


def num_tokens(rollouts: Rollouts) -> int:
    """Prompt and completion tokens of all rows."""
    pairs = zip(rollouts.requests, rollouts.completions, strict=True)
    return sum(len(request.prompt_ids) + len(completion.ids) for request, completion in pairs)


def groups_of(rollouts: Rollouts) -> Int[Tensor, " n"]:
    """Group of each rollout row."""
    return torch.tensor([rollouts.requests[i].group for i in rollouts.rows("rollout")])


def deal_groups(groups: Sequence[int], mini_batches: int) -> list[list[int]]:
    """Rows of each mini-batch; groups stay whole and in order, their numbers differ by one at most.

    Raises:
        ValueError: fewer groups than mini-batches.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    if mini_batches > len(names):
        raise ValueError(
            f"Trainer: mini_batches must be at most the number of groups, got {mini_batches} for "
            f"{len(names)} groups; lower mini_batches or raise the batch"
        )
    parts: list[list[int]] = [[] for _ in range(mini_batches)]
    for row, name in enumerate(groups):
        parts[names[name] * mini_batches // len(names)].append(row)
    return parts
