"""Sampling completions: the protocol, and the embedded implementation on transformers.

One call serves requests of different prompts, temperatures and limits.  The prompts that are
distinct are read once, and rows that are finished leave the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tercet.engine.decode import Rules, draw, prefill, wide_head, wide_logits
from tercet.engine.model import Policy, evaluating
from tercet.engine.pooling import Pool, RunningPool, common_pooling, find_pool
from tercet.engine.records import Completion, Request

COMPACT_BELOW = 0.75  # the batch is compacted when at most this share of its rows is still needed


@runtime_checkable
class Sampler(Protocol):
    """Anything that turns requests into completions, in the same order."""

    def sample(self, requests: Sequence[Request]) -> list[Completion]: ...


class TransformersSampler:
    """KV-cache decoding inside the training process, with the policy's own weights.

    With a seed of its own, a request's completion does not depend on what else is in the batch (up
    to rounding: a draw may fall between two tokens).  `Completion.logp` is under
    softmax(logits / temperature) before top_k and top_p, which is what `score` recomputes;
    at temperature 0 (greedy) it is under softmax(logits).
    """

    def __init__(self, policy: Policy, *, max_batch_size: int = 256, seed: int = 0) -> None:
        """Samples from `policy` as it is at each call.

        Args:
            policy: may be trained between calls.
            max_batch_size: rows decoded together; memory and speed only.
            seed: of `generator`, which seeds the requests that have no seed.

        Raises:
            ValueError: max_batch_size < 1.
        """
        if max_batch_size < 1:
            raise ValueError(
                f"TransformersSampler: max_batch_size must be >= 1, got {max_batch_size}"
            )
        self.policy = policy
        self.max_batch_size = max_batch_size
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every token that ends a completion: of the generation config and of the tokenizer."""
        config = self.policy.model.generation_config
        ends = getattr(config, "eos_token_id", None)
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        own = getattr(self.policy.tokenizer, "eos_token_id", None)
        return frozenset(ends if own is None else [*ends, own])

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order.  Weights and training flags stay as they are.

        Raises:
            ValueError: an empty prompt, a pool_from outside of the prompt, a prompt that with its
                completion would exceed the model's positions, or several kinds of pooling.
            FloatingPointError: the model's logits are not finite.
        """
        _check(requests, self.policy.max_length)
        pooling = common_pooling("TransformersSampler", requests)
        pool = find_pool("TransformersSampler", pooling)
        seeds = [self._seed(request) for request in requests]
        order = sorted(
            range(len(requests)),
            key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids),
        )
        done: dict[int, Completion] = {}
        with evaluating(self.policy.model), torch.no_grad():
            for start in range(0, len(order), self.max_batch_size):
                part = order[start : start + self.max_batch_size]
                completions = self._decode(
                    [requests[i] for i in part], [seeds[i] for i in part], pool
                )
                done.update(zip(part, completions, strict=True))
        return [done[i] for i in range(len(requests))]

    def _seed(self, request: Request) -> int:
        if request.params.seed is not None:
            return request.params.seed
        return int(torch.randint(2**62, (), generator=self.generator))

    def _decode(self, requests: list[Request], seeds: list[int], pool: Pool) -> list[Completion]:
        policy, ends = self.policy, self.end_tokens
        head = wide_head(policy)
        params = [request.params for request in requests]
        state, pooled = prefill(
            policy, [r.prompt_ids for r in requests], [r.pool_from for r in requests], pool
        )
        rules = Rules.of(params, seeds, policy)
        texts = [_Text(limit=p.max_completion_length) for p in params]
        rows = list(range(len(requests)))  # the request that each row of the batch writes for

        for step in range(rules.uniform.shape[1]):
            tokens, logp = draw(wide_logits(state.hidden, head), rules, step)
            needed = []  # rows whose new token the model must still read
            for slot, (token, value) in enumerate(zip(tokens.tolist(), logp.tolist(), strict=True)):
                text, pool_from = texts[rows[slot]], requests[rows[slot]].pool_from
                if text.open:
                    text.append(token, value, ends)
                    if text.open or pool_from is not None:
                        needed.append(slot)
            if not needed:
                break
            if len(needed) <= COMPACT_BELOW * len(rows):
                index = torch.tensor(needed, device=policy.device)
                state.select(index)
                tokens, rules = tokens[index], rules.select(index)
                rows, needed = [rows[slot] for slot in needed], list(range(len(needed)))
            states = state.read(tokens, pool.layer)
            slots = [slot for slot in needed if requests[rows[slot]].pool_from is not None]
            _pool(pooled, states, slots, [rows[slot] for slot in slots])
        return [
            text.completion(None if request.pool_from is None else vector)
            for text, request, vector in zip(texts, requests, pooled.vectors(), strict=True)
        ]


@dataclass(slots=True)
class _Text:
    """A completion while it is written."""

    limit: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def open(self) -> bool:
        return not self.finished and len(self.ids) < self.limit

    def append(self, token: int, logp: float, ends: frozenset[int]) -> None:
        if not math.isfinite(logp):
            raise FloatingPointError(
                f"TransformersSampler: log-probs must be finite, got {logp} at completion token "
                f"{len(self.ids)}; the weights have diverged: take an earlier checkpoint"
            )
        self.ids.append(token)
        self.logp.append(logp)
        self.finished = token in ends

    def completion(self, embedding: Tensor | None) -> Completion:
        return Completion(ids=self.ids, logp=self.logp, finished=self.finished, embedding=embedding)


def _pool(pooled: RunningPool, states: Tensor, slots: list[int], rows: list[int]) -> None:
    """Pools the states of the tokens just read in these batch slots into these rows."""
    if slots:
        device = states.device
        pooled.add(torch.tensor(rows, device=device), states[torch.tensor(slots, device=device)])


def _check(requests: Sequence[Request], max_length: int | None) -> None:
    for i, request in enumerate(requests):
        prompt = len(request.prompt_ids)
        if prompt == 0:
            raise ValueError(
                f"TransformersSampler: a prompt needs at least one token, got none in request {i}"
            )
        if request.pool_from is not None and not 0 <= request.pool_from <= prompt:
            raise ValueError(
                f"TransformersSampler: pool_from must be in [0, {prompt}], "
                f"got {request.pool_from} in request {i}"
            )
        length = prompt + request.params.max_completion_length
        if max_length is not None and length > max_length:
            raise ValueError(
                f"TransformersSampler: prompt and max_completion_length must fit into {max_length} "
                f"positions, got {prompt} + {request.params.max_completion_length} in request {i}; "
                "shorten one of them"
            )
