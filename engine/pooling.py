"""Embeddings of rows: which hidden states are pooled, and how they become one vector.

pooling           states                                   become
mean              the last layer's, after the final norm   their mean; the default
penultimate_mean  the layer's before it, without a norm    their mean
max               the last layer's, after the final norm   their largest value, each dimension
last_token        the last layer's, after the final norm   the last of them: the end token's, or
                                                           where a row was cut off, its last token's

A pass over whole rows pools them at once (`Pool.rows`), a sampler token by token while it decodes
(`RunningPool`); both give the same vectors.  Source: arXiv:2510.04506, eq. 10-11 and fig. 6, whose
"EOS" is last_token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tercet.engine.choices import Pooling
from tercet.engine.records import Packed, Request
from tercet.kernels import segment_mean
from tercet.kernels._typing import Float, Int

LAST, PENULTIMATE = -1, -2  # places in transformers' tuple of hidden states

Vectors = Float[Tensor, "batch hidden"]  # one per row
Count = Int[Tensor, "batch 1"]  # of the tokens that each row has pooled


class States(NamedTuple):
    """Hidden states of the tokens of one pass."""

    last: Float[Tensor, "*tokens hidden"]  # of the last layer: what the LM head reads
    pooled: Float[Tensor, "*tokens hidden"]  # of the layer that was asked for; may be `last` itself

    @staticmethod
    def wanted(layer: int) -> dict[str, int]:
        """Arguments of the base model that make its output hold this layer, and no other."""
        return {} if layer == LAST else {"output_hidden_states": layer}

    @staticmethod
    def of(output: Any, layer: int) -> States:
        """What the base model returned."""
        last = output.last_hidden_state
        return States(last, last if layer == LAST else output.hidden_states[layer])


class Pool(ABC):
    """One way to pool; vectors are float32 (float64 for float64)."""

    def __init__(self, layer: int = LAST) -> None:
        self.layer = layer

    @abstractmethod
    def rows(self, states: Float[Tensor, "n hidden"], packed: Packed) -> Vectors:
        """Vectors of packed rows, with gradient; zeros for a row without pooled tokens."""

    @abstractmethod
    def add(
        self, held: Vectors, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]
    ) -> None:
        """Takes one more state into each of these different rows, in place."""

    def start(self, vectors: Vectors, count: Count) -> Vectors:
        """What `add` works on, from the vectors of each row's first `count` pooled tokens."""
        return vectors

    def finish(self, held: Vectors, count: Count) -> Vectors:
        """The vectors again; count is of all tokens pooled, and may be 0."""
        return held


class MeanPool(Pool):
    """Mean over the pooled tokens; a sum while rows are read."""

    def rows(self, states: Float[Tensor, "n hidden"], packed: Packed) -> Vectors:
        return segment_mean(states, packed.cu_seqlens, packed.pool_mask)

    def add(
        self, held: Vectors, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]
    ) -> None:
        held.index_add_(0, rows, states)

    def start(self, vectors: Vectors, count: Count) -> Vectors:
        return vectors * count

    def finish(self, held: Vectors, count: Count) -> Vectors:
        return held / count.clamp(min=1)


class MaxPool(Pool):
    """Largest value of each dimension over the pooled tokens; equal ones share the gradient."""

    def rows(self, states: Float[Tensor, "n hidden"], packed: Packed) -> Vectors:
        states = _wide(states[packed.pool_mask])
        row = packed.row_of_token()[packed.pool_mask][:, None].expand_as(states)
        vectors = states.new_zeros(packed.num_rows, states.shape[1])
        return vectors.scatter_reduce(0, row, states, "amax", include_self=False)

    def add(
        self, held: Vectors, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]
    ) -> None:
        held.index_copy_(0, rows, torch.maximum(held.index_select(0, rows), states))

    def start(self, vectors: Vectors, count: Count) -> Vectors:
        return vectors.masked_fill(count == 0, -torch.inf)

    def finish(self, held: Vectors, count: Count) -> Vectors:
        return held.masked_fill(count == 0, 0.0)


class LastPool(Pool):
    """State of the last pooled token."""

    def rows(self, states: Float[Tensor, "n hidden"], packed: Packed) -> Vectors:
        place = torch.arange(len(states), device=states.device)
        place = torch.where(packed.pool_mask, place, -1)
        last = place.new_full((packed.num_rows,), -1)
        last = last.scatter_reduce(0, packed.row_of_token(), place, "amax")
        return _wide(states[last.clamp(min=0)]).masked_fill(last[:, None] < 0, 0.0)

    def add(
        self, held: Vectors, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]
    ) -> None:
        held.index_copy_(0, rows, states)


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


POOLS: dict[Pooling, Pool] = {
    "mean": MeanPool(),
    "penultimate_mean": MeanPool(PENULTIMATE),
    "max": MaxPool(),
    "last_token": LastPool(),
}


class RunningPool:
    """What a batch of rows has pooled so far, kept up to date while tokens are read."""

    def __init__(self, pool: Pool, vectors: Vectors, count: Int[Tensor, " batch"]) -> None:
        """Starts from the vectors of each row's first `count` pooled tokens; takes both over."""
        self.pool = pool
        self.count = count
        self._held = pool.start(vectors, count[:, None])

    def add(self, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]) -> None:
        """Pools one more state into each of these rows, which must differ."""
        self.pool.add(self._held, rows, states.to(self._held.dtype))
        self.count.index_add_(0, rows, torch.ones_like(rows))

    def vectors(self) -> Vectors:
        """The vectors so far; zeros for a row without pooled tokens."""
        return self.pool.finish(self._held, self.count[:, None])


def find_pool(owner: str, pooling: Pooling) -> Pool:
    """The pool of this name.

    Raises:
        ValueError: there is none; `owner` is who says so.
    """
    if pooling not in POOLS:
        raise ValueError(f"{owner}: pooling must be one of {list(POOLS)}, got {pooling!r}")
    return POOLS[pooling]


def common_pooling(owner: str, requests: Sequence[Request]) -> Pooling:
    """How the requests that want an embedding are pooled.

    Raises:
        ValueError: not all alike; `owner` is who says so.
    """
    found: set[Pooling] = {r.pooling for r in requests if r.pool_from is not None}
    if len(found) > 1:
        raise ValueError(
            f"{owner}: requests of one call must share their pooling, got {sorted(found)}; "
            "make a call for each"
        )
    return found.pop() if found else "mean"
