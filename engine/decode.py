"""The parts of a KV-cache decoding loop: prefill, one step, drawing tokens by each row's own rules.

Row i of the cache holds [padding | prompt | sampled], so that every row's next token has the same
index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from tercet.engine.attention import HALF
from tercet.engine.model import LMHead, Policy
from tercet.engine.pooling import Pool, RunningPool, States
from tercet.engine.records import SamplingParams, pack, split_by_tokens
from tercet.kernels._typing import Bool, Float, Int

PREFILL_TOKENS = 16384  # of one packed prefill pass; memory only
CACHE_ROOM = 64  # tokens that a full cache grows by


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in a buffer with room, so that a step writes one token per row.

    (transformers' own layer copies the whole cache at every step.)
    """

    def __init__(
        self,
        keys: Float[Tensor, "batch heads t dim"],
        values: Float[Tensor, "batch heads t value_dim"],
    ) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._hold(keys, values)

    def update(
        self,
        key_states: Float[Tensor, "batch heads new dim"],
        value_states: Float[Tensor, "batch heads new value_dim"],
        *args,
        **kwargs,
    ) -> tuple[Float[Tensor, "batch heads t dim"], Float[Tensor, "batch heads t value_dim"]]:
        """Appends one step's states; returns everything held (views of the buffers)."""
        end = self._length + key_states.shape[-2]
        if end > self._key_buffer.shape[-2]:
            self._hold(self._held(self._key_buffer), self._held(self._value_buffer))
        self._key_buffer[:, :, self._length : end] = key_states
        self._value_buffer[:, :, self._length : end] = value_states
        self._show(end)
        return self._held(self._key_buffer), self._held(self._value_buffer)

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Keeps only these rows."""
        self._hold(self._held(self._key_buffer), self._held(self._value_buffer), indices)

    def _hold(
        self,
        keys: Float[Tensor, "batch heads t dim"],
        values: Float[Tensor, "batch heads t value_dim"],
        indices: Int[Tensor, " kept"] | None = None,
    ) -> None:
        self._key_buffer = _with_room(keys, indices)
        self._value_buffer = _with_room(values, indices)
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._held(self._key_buffer), self._held(self._value_buffer)

    def _held(
        self, buffer: Float[Tensor, "batch heads room dim"]
    ) -> Float[Tensor, "batch heads t dim"]:
        return buffer[:, :, : self._length]


def _with_room(
    x: Float[Tensor, "batch heads t dim"], indices: Int[Tensor, " kept"] | None
) -> Float[Tensor, "rows heads room dim"]:
    rows = len(x) if indices is None else len(indices)
    shape = (rows, x.shape[1], x.shape[2] + CACHE_ROOM, x.shape[3])
    buffer = torch.empty(shape, dtype=x.dtype, device=x.device)
    buffer[:, :, : x.shape[2]] = x if indices is None else x.index_select(0, indices)
    return buffer


@dataclass(slots=True)
class DecodeState:
    """A batch in the middle of decoding."""

    policy: Policy
    cache: Cache
    mask: Bool[Tensor, "batch t"] | None  # false on left padding; None where there is none
    positions: Int[Tensor, " batch"]  # of the next token
    hidden: Float[Tensor, "batch hidden"]  # of the last token read: predicts the next one

    def read(self, tokens: Int[Tensor, " batch"], layer: int) -> Float[Tensor, "batch hidden"]:
        """Runs the model on one new token per row; returns their states of `layer`."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], dim=1)
        out = self.policy.model.base_model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            **States.wanted(layer),
        )
        states = States.of(out, layer)
        self.hidden = states.last[:, 0]
        last = self.policy.max_length
        # a finished row stays in the batch for a while and must not run past the position table
        self.positions = (self.positions + 1).clamp(max=None if last is None else last - 1)
        return states.pooled[:, 0]

    def select(self, index: Int[Tensor, " kept"]) -> None:
        """Keeps only these rows."""
        self.cache.batch_select_indices(index)
        self.mask = None if self.mask is None else self.mask[index]
        self.positions, self.hidden = self.positions[index], self.hidden[index]


def prefill(
    policy: Policy, prompts: Sequence[Sequence[int]], pool_from: Sequence[int | None], pool: Pool
) -> tuple[DecodeState, RunningPool]:
    """Reads every distinct prompt once, packed, and spreads its keys and values over its rows.

    Returns the state, and what each prompt's hidden states from pool_from on have come to.
    """
    keys = [(tuple(prompt), start) for prompt, start in zip(prompts, pool_from, strict=True)]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    texts = list(distinct)
    lengths = [len(ids) for ids, _ in texts]
    caches, last, vectors = [], [], []
    for part in split_by_tokens(lengths, PREFILL_TOKENS):
        packed = pack(
            [texts[i][0] for i in part],
            pool_from=[texts[i][1] for i in part],
            device=policy.device,
        )
        caches.append(DynamicCache())
        states = policy.states(packed, layer=pool.layer, cache=caches[-1])
        last.append(states.last[packed.cu_seqlens[1:].long() - 1])
        vectors.append(pool.rows(states.pooled, packed))

    which = torch.tensor([distinct[key] for key in keys])  # [batch]
    slots, mask = _slots(torch.tensor(lengths), which)
    which, slots = which.to(policy.device), slots.to(policy.device)
    state = DecodeState(
        policy=policy,
        cache=_spread(caches, slots),
        mask=None if mask.all() else mask.to(policy.device),
        positions=torch.tensor(lengths, device=policy.device)[which],
        hidden=torch.cat(last)[which],
    )
    counts = [0 if start is None else len(ids) - start for ids, start in texts]
    count = torch.tensor(counts, device=policy.device)[which]
    return state, RunningPool(pool, torch.cat(vectors)[which], count)


def _slots(
    lengths: Int[Tensor, " prompts"], which: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, "batch t"], Bool[Tensor, "batch t"]]:
    """Packed token of every cache slot [batch, t], and which slots are real."""
    starts = lengths.cumsum(0) - lengths
    longest = int(lengths.max())
    offset = torch.arange(longest) - (longest - lengths[which])[:, None]
    return starts[which][:, None] + offset.clamp(min=0), offset >= 0


def _spread(caches: list[Cache], slots: Int[Tensor, "batch t"]) -> Cache:
    layers = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        k = torch.cat([layer.keys[0] for layer in parts], dim=1)  # [heads, n, dim]
        v = torch.cat([layer.values[0] for layer in parts], dim=1)
        layers.append(GrowingLayer(k[:, slots].transpose(0, 1), v[:, slots].transpose(0, 1)))
    return Cache(layers=layers)


def wide_head(policy: Policy) -> LMHead:
    """The LM head in the dtype that `wide_logits` multiplies in.

    float32, as `linear_logp` does, so that sampled and trained log-probs agree; on CUDA half
    precision stays (its products accumulate in float32), elsewhere it is copied.
    """
    weight, bias = policy.head()
    if weight.dtype in HALF and not weight.is_cuda:
        return LMHead(weight.float(), None if bias is None else bias.float())
    return LMHead(weight, bias)


def wide_logits(
    hidden: Float[Tensor, "batch hidden"], head: LMHead
) -> Float[Tensor, "batch vocab"]:
    """Logits hidden @ weight.T + bias, never rounded to half precision, autocast or not."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.to(head.weight.dtype)
        if head.weight.dtype not in HALF:
            return F.linear(hidden, head.weight, head.bias)
        logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        return logits if head.bias is None else logits + head.bias.float()


@dataclass(frozen=True, slots=True)
class Rules:
    """How each row draws its tokens."""

    temperature: Float[Tensor, " batch"]  # 1 where greedy
    greedy: Bool[Tensor, " batch"]
    top_k: Int[Tensor, " batch"]  # vocabulary size where everything is kept
    top_p: Float[Tensor, " batch"]
    uniform: Float[Tensor, "batch steps"]  # float64 in [0, 1), of each row's own generator
    truncates: Bool[Tensor, " batch"]  # rows where top_k or top_p removes anything

    @staticmethod
    def of(params: Sequence[SamplingParams], seeds: Sequence[int], policy: Policy) -> Rules:
        """The rules of a batch whose row i is sampled as params[i] with seeds[i]."""
        steps = max(p.max_completion_length for p in params)
        uniform = torch.zeros(len(params), steps, dtype=torch.float64)
        for row, p, seed in zip(uniform, params, seeds, strict=True):
            if p.temperature > 0:
                row[: p.max_completion_length].uniform_(
                    generator=torch.Generator().manual_seed(seed)
                )
        temperature = torch.tensor([p.temperature for p in params])
        top_k = torch.tensor([p.top_k or policy.vocab_size for p in params])
        top_p = torch.tensor([p.top_p for p in params])
        greedy = temperature == 0
        truncates = ~greedy & ((top_k < policy.vocab_size) | (top_p < 1))
        rules = (temperature.masked_fill(greedy, 1.0), greedy, top_k, top_p, uniform, truncates)
        return Rules(*(x.to(policy.device) for x in rules))

    def select(self, index: Int[Tensor, " kept"]) -> Rules:
        """The rules of these rows."""
        mine = (self.temperature, self.greedy, self.top_k, self.top_p, self.uniform, self.truncates)
        return Rules(*(x[index] for x in mine))


def draw(
    logits: Float[Tensor, "batch vocab"], rules: Rules, step: int
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The next token of each row and its log-prob under softmax(logits / temperature), in nats.

    A token is drawn by inverting the distribution function at the row's own uniform number, so
    rows do not influence each other.
    """
    scaled = logits.float() / rules.temperature[:, None]
    normaliser = scaled.logsumexp(dim=-1)
    probs = (scaled - normaliser[:, None]).exp_()
    if rules.truncates.any():
        probs[rules.truncates] = _truncate(
            probs[rules.truncates], rules.top_k[rules.truncates], rules.top_p[rules.truncates]
        )
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    # u <= 1 - 2^-53, so the product rounds to less than the total and a token is always found
    target = rules.uniform[:, step, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)[:, 0]
    tokens = torch.where(rules.greedy, logits.argmax(dim=-1), tokens.clamp(max=logits.shape[1] - 1))
    return tokens, scaled.gather(1, tokens[:, None])[:, 0] - normaliser


def _truncate(
    probs: Float[Tensor, "rows vocab"], top_k: Int[Tensor, " rows"], top_p: Float[Tensor, " rows"]
) -> Float[Tensor, "rows vocab"]:
    """Zero outside of the top_k, then outside of the smallest set that holds top_p of the rest."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[1], device=probs.device)
    ordered = ordered.masked_fill(rank >= top_k[:, None], 0.0)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill(before >= top_p[:, None] * ordered.sum(-1, keepdim=True), 0.0)
    return torch.zeros_like(probs).scatter_(1, order, ordered)
