"""The records that flow through the engine: packed batches, requests, completions, rewards.

One layout everywhere (no padding): rows of different length lie one behind the other in a single
axis of n tokens, row i being [cu_seqlens[i], cu_seqlens[i + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from tercet.engine.choices import Pooling
from tercet.kernels._typing import Bool, Float, Int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled; names are TRL's where TRL has them."""

    max_completion_length: int = 256  # new tokens, the end token included
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    seed: int | None = None  # of this request alone; None draws from the sampler's own stream

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(
                "SamplingParams: max_completion_length must be >= 1, "
                f"got {self.max_completion_length}"
            )
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"SamplingParams: temperature must be finite and >= 0, got {self.temperature}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"SamplingParams: top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"SamplingParams: top_k must be >= 0, got {self.top_k}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample.  Requests that share `group` share a prompt and a baseline."""

    prompt_ids: list[int]
    params: SamplingParams
    group: int = 0  # index of the group inside the batch
    role: str = "rollout"  # what the system uses it for; only "rollout" rows are trained
    pool_from: int | None = None  # first prompt token that enters the embedding; None: no embedding
    pooling: Pooling = "mean"  # how the states from there on become an embedding
    truncated: bool = False  # the prompt lost text to fit its limit; counted, nothing else


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came back for one request."""

    ids: list[int]  # sampled tokens, the end token included when there is one
    logp: list[float]  # nats, of each sampled token under softmax(logits / temperature)
    finished: bool  # False: cut off by max_completion_length
    embedding: Float[Tensor, " hidden"] | None = None  # pooled from pool_from on, not normalised


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """s rows of different length in one axis of n tokens."""

    ids: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]  # restart at 0 in every row
    cu_seqlens: Int[Tensor, " s_plus_1"]  # int32, cu_seqlens[0] == 0
    pool_mask: Bool[Tensor, " n"]  # tokens whose hidden state enters the row's embedding
    loss_mask: Bool[Tensor, " n"]  # tokens the policy sampled: their log-prob is trained
    max_seqlen: int

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.numel() - 1

    def row_of_token(self) -> Int[Tensor, " n"]:
        """Index of the row that each token belongs to."""
        lengths = self.cu_seqlens.diff().to(torch.int64)
        rows = torch.arange(self.num_rows, device=self.ids.device)
        return rows.repeat_interleave(lengths, output_size=self.ids.numel())

    def to(self, device: torch.device | str) -> Packed:
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]] | None = None,
    *,
    pool_from: Sequence[int | None] | None = None,
    device: torch.device | str = "cpu",
) -> Packed:
    """Lays prompt + completion rows one behind the other.

    Args:
        prompts: token ids of each row's prompt.
        completions: token ids sampled behind it; these tokens get loss_mask.
        pool_from: index of the first token that is pooled, per row; None pools nothing of the row.

    Raises:
        ValueError: no rows, a row without tokens, or lists of different length.
    """
    completions = [[] for _ in prompts] if completions is None else completions
    pool_from = [None] * len(prompts) if pool_from is None else pool_from
    if not len(prompts) == len(completions) == len(pool_from):
        raise ValueError(
            "pack: prompts, completions and pool_from must have one entry per row, "
            f"got {len(prompts)}, {len(completions)}, {len(pool_from)}"
        )
    rows = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    if not rows or not all(rows):
        empty = [i for i, row in enumerate(rows) if not row]
        raise ValueError(
            f"pack: there must be at least one row and no empty row, got empty rows {empty}"
        )
    lengths = torch.tensor([len(row) for row in rows])
    cu_seqlens = torch.zeros(len(rows) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    n = int(cu_seqlens[-1])
    positions = torch.arange(n) - cu_seqlens[:-1].repeat_interleave(lengths)
    prompt_len = torch.tensor([len(p) for p in prompts]).repeat_interleave(lengths)
    first = torch.tensor([n if f is None else f for f in pool_from]).repeat_interleave(lengths)
    return Packed(
        ids=torch.tensor([token for row in rows for token in row]),
        positions=positions,
        cu_seqlens=cu_seqlens,
        pool_mask=positions >= first,
        loss_mask=positions >= prompt_len,
        max_seqlen=int(lengths.max()),
    ).to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """One step's requests with what came back, in the same order."""

    requests: list[Request]
    completions: list[Completion]

    def rows(self, role: str) -> list[int]:
        """Indices of the requests with this role."""
        return [i for i, request in enumerate(self.requests) if request.role == role]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """Rewards of the "rollout" rows, in their order, with everything they were made from."""

    total: Float[Tensor, " n"]
    parts: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)  # as they enter the total
    counts: dict[str, float] = field(default_factory=dict)  # what the system counted, to be logged


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cuts rows 0..len(lengths) - 1, in order, into parts of at most max_tokens tokens.

    A row longer than max_tokens is a part of its own.
    """
    parts: list[list[int]] = []
    used = 0
    for row, length in enumerate(lengths):
        if not parts or used + length > max_tokens:
            parts.append([])
            used = 0
        parts[-1].append(row)
        used += length
    return parts
