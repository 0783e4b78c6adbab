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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tercet.engine.records import Packed, Pooling, Request
from tercet.kernels import segment_mean
from tercet.kernels._typing import Float, Int

LAST, PENULTIMATE = -1, -2  # places in transformers' tuple of hidden states


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


@dataclass(frozen=True, slots=True)
class Pool:
    """One way to pool; vectors are float32 (float64 for float64)."""

    # Vectors of packed rows, with gradient; zeros for a row without pooled tokens.
    rows: Callable[[Float[Tensor, "n hidden"], Packed], Float[Tensor, "rows hidden"]]
    # Vectors of rows that get one more state, which is the count-th of its row.
    add: Callable[
        [Float[Tensor, "k hidden"], Float[Tensor, "k hidden"], Float[Tensor, "k 1"]],
        Float[Tensor, "k hidden"],
    ]
    layer: int = LAST


def _mean_rows(states: Tensor, packed: Packed) -> Tensor:
    return segment_mean(states, packed.cu_seqlens, packed.pool_mask)


def _mean_add(vectors: Tensor, states: Tensor, count: Tensor) -> Tensor:
    return vectors + (states - vectors) / count


def _max_rows(states: Tensor, packed: Packed) -> Tensor:
    states = _wide(states[packed.pool_mask])
    row = packed.row_of_token()[packed.pool_mask][:, None].expand_as(states)
    vectors = states.new_zeros(packed.num_rows, states.shape[1])
    return vectors.scatter_reduce(0, row, states, "amax", include_self=False)


def _max_add(vectors: Tensor, states: Tensor, count: Tensor) -> Tensor:
    return torch.where(count == 1, states, torch.maximum(vectors, states))


def _last_rows(states: Tensor, packed: Packed) -> Tensor:
    place = torch.arange(len(states), device=states.device)
    place = torch.where(packed.pool_mask, place, -1)
    last = place.new_full((packed.num_rows,), -1)
    last = last.scatter_reduce(0, packed.row_of_token(), place, "amax")
    return _wide(states[last.clamp(min=0)]).masked_fill(last[:, None] < 0, 0.0)


def _last_add(vectors: Tensor, states: Tensor, count: Tensor) -> Tensor:
    return states


def _wide(states: Tensor) -> Tensor:
    return states if states.dtype == torch.float64 else states.float()


POOLS: dict[Pooling, Pool] = {
    "mean": Pool(_mean_rows, _mean_add),
    "penultimate_mean": Pool(_mean_rows, _mean_add, PENULTIMATE),
    "max": Pool(_max_rows, _max_add),
    "last_token": Pool(_last_rows, _last_add),
}


class RunningPool:
    """Vectors of a batch of rows, kept up to date while tokens are read."""

    def __init__(
        self, pool: Pool, vectors: Float[Tensor, "batch hidden"], count: Int[Tensor, " batch"]
    ) -> None:
        """Starts from the vectors of each row's first `count` pooled tokens."""
        self.pool = pool
        self.vectors = vectors
        self.count = count[:, None].to(vectors.dtype)

    def add(self, rows: Int[Tensor, " k"], states: Float[Tensor, "k hidden"]) -> None:
        """Pools one more state into each of these rows, which must differ."""
        count = self.count[rows] + 1
        states = states.to(self.vectors.dtype)
        self.vectors[rows] = self.pool.add(self.vectors[rows], states, count)
        self.count[rows] = count


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
