"""Passes without gradient over a step's rows: old and reference log-probs, missing embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tercet.engine.model import Policy, Scored, evaluating, score
from tercet.engine.pooling import common_pooling
from tercet.engine.records import Completion, Request, Rollouts, pack, split_by_tokens
from tercet.engine.train_config import TrainConfig
from tercet.kernels._typing import Float

Logps = list[Float[Tensor, " _"]]  # one entry per row, nats, of its completion's tokens


class ScoredRollouts(NamedTuple):
    """A step's rollouts with every embedding that was asked for, and their log-probs."""

    rollouts: Rollouts
    old_logp: Logps | None  # of the rollout rows, by the policy before the update; None: on-policy
    ref_logp: Logps | None  # the same by the reference; None: no reference


def score_rollouts(
    policy: Policy, reference: Policy | None, rollouts: Rollouts, config: TrainConfig
) -> ScoredRollouts:
    """Old log-probs and the embeddings a sampler has not pooled, from one pass of the policy.

    On-policy (one optimiser step per batch) the ratio is 1 and old log-probs are not computed: when
    the sampler has pooled too, there is no pass at all.
    """
    requests, completions = rollouts.requests, rollouts.completions
    trained = rollouts.rows("rollout")
    unpooled = {
        i
        for i, request in enumerate(requests)
        if request.pool_from is not None and completions[i].embedding is None
    }
    rows = sorted(unpooled.union([] if config.on_policy else trained))
    logps, embeddings = score_rows(policy, rollouts, rows, config, embed=bool(unpooled))
    pooled = dict(zip(rows, embeddings, strict=False))
    completions = [
        replace(completion, embedding=pooled[i]) if i in unpooled else completion
        for i, completion in enumerate(completions)
    ]
    by_row = dict(zip(rows, logps, strict=True))
    old_logp = None if config.on_policy else [by_row[i] for i in trained]
    ref_logp = None
    if reference is not None:
        ref_logp, _ = score_rows(reference, rollouts, trained, config)
    return ScoredRollouts(replace(rollouts, completions=completions), old_logp, ref_logp)


def score_rows(
    policy: Policy,
    rollouts: Rollouts,
    rows: Sequence[int],
    config: TrainConfig,
    *,
    embed: bool = False,
) -> tuple[Logps, list[Float[Tensor, " hidden"]]]:
    """Log-probs of rows' completions and, with `embed`, their embeddings; no gradient.

    Only "rollout" rows have log-probs; those of another role get an empty tensor.
    """
    requests = [rollouts.requests[i] for i in rows]
    completions = [rollouts.completions[i] for i in rows]
    logps: Logps = []
    embeddings: list[Tensor] = []
    with torch.no_grad(), evaluating(policy.model):
        for part in micro_batches(requests, completions, config.max_tokens_per_batch):
            some = [requests[i] for i in part], [completions[i] for i in part]
            scored = score_completions(policy, *some, config, embed=embed)
            logps += scored.logp.split([len(ids) for ids in scored_ids(*some)])
            if scored.embedding is not None:
                embeddings += scored.embedding.unbind()
    return logps, embeddings


def micro_batches(
    requests: Sequence[Request], completions: Sequence[Completion], max_tokens: int
) -> Iterator[list[int]]:
    """Rows, in order, in parts of at most max_tokens packed tokens."""
    pairs = zip(requests, completions, strict=True)
    yield from split_by_tokens([len(r.prompt_ids) + len(c.ids) for r, c in pairs], max_tokens)


def scored_ids(requests: Sequence[Request], completions: Sequence[Completion]) -> list[list[int]]:
    """Tokens that have log-probs: the completions of "rollout" rows."""
    pairs = zip(requests, completions, strict=True)
    return [completion.ids if request.role == "rollout" else [] for request, completion in pairs]


def score_completions(
    policy: Policy,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    config: TrainConfig,
    *,
    entropy: bool = False,
    embed: bool = False,
) -> Scored:
    """`score` of rows in one forward pass, each under the temperature it was sampled with."""
    ids = scored_ids(requests, completions)
    context = [
        request.prompt_ids + ([] if request.role == "rollout" else completion.ids)
        for request, completion in zip(requests, completions, strict=True)
    ]
    packed = pack(context, ids, pool_from=[r.pool_from for r in requests], device=policy.device)
    warm = [r.params.temperature for r, row in zip(requests, ids, strict=True) for _ in row]
    uniform = len(set(warm)) == 1
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.bf16):
        return score(
            policy,
            packed,
            temperature=warm[0] if uniform else torch.tensor(warm, device=policy.device),
            entropy=entropy,
            embed=common_pooling("score_completions", requests) if embed else None,
        )
