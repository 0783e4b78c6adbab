"""Attention over packed rows, registered with transformers under the name "tercet".

A model whose attention is "tercet" behaves as stock SDPA, cache and masks included, until a call
brings a `Layout` (keyword `packed_layout`): then its rows see only themselves, causally.

    flash_attention_2   flash-attn's varlen kernel          CUDA, float16 or bfloat16
    varlen              torch.nn.attention.varlen           CUDA, float16 or bfloat16
    sdpa                buckets of rows of similar length   any device and dtype

The sdpa backend pads inside a bucket, and only there: behind a row's last token, where causality
already hides the padding, so it needs no mask and no row can see another.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tercet.kernels._typing import Bool, Float, Int

Backend = Literal["flash_attention_2", "varlen", "sdpa"]

NAME = "tercet"
NAME_WITHOUT_MASKS = "tercet_packed"  # the same function; transformers builds no [n, n] mask for it
HALF = (torch.float16, torch.bfloat16)
MIN_FILL = 0.75  # rows shorter than this share of a bucket's longest row open the next bucket


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the rows of one packed batch lie, and how their attention is computed."""

    backend: Backend
    dtype: torch.dtype  # that the attention runs in
    cu_seqlens: Int[Tensor, " rows_plus_1"]
    max_seqlen: int
    buckets: list[tuple[int, int]]  # (rows, padded length), sdpa only
    # packed token of each bucket slot; padding repeats the last token
    gather: Int[Tensor, " padded"]
    scatter: Int[Tensor, " n"]  # slot of each packed token


def choose_backend(attn: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that `attn` ("auto" or a backend's name) means for this device and dtype.

    Raises:
        ValueError: unknown name, or a backend that device, dtype or installation cannot serve.
    """
    half_on_cuda = device.type == "cuda" and dtype in HALF
    usable: dict[Backend, bool] = {
        "flash_attention_2": half_on_cuda and find_spec("flash_attn") is not None,
        "varlen": half_on_cuda and {"scale", "window_size"} <= _varlen_options(),
        "sdpa": True,
    }
    if attn == "auto":
        return next(backend for backend, ok in usable.items() if ok)
    if attn not in usable:
        raise ValueError(f"Policy: attn must be 'auto' or one of {list(usable)}, got {attn!r}")
    if not usable[attn]:
        raise ValueError(
            f"Policy: attn={attn!r} needs its package, a CUDA device and float16 or bfloat16, "
            f"got {device} and {dtype}; use attn='auto'"
        )
    return attn


def _varlen_options() -> set[str]:
    if find_spec("torch.nn.attention.varlen") is None:
        return set()
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def plan_layout(
    cu_seqlens: Int[Tensor, " rows_plus_1"], max_seqlen: int, backend: Backend, dtype: torch.dtype
) -> Layout:
    """Prepares one packed batch; the sdpa backend reads cu_seqlens on the host."""
    if backend != "sdpa":
        empty = cu_seqlens.new_empty(0)
        return Layout(backend, dtype, cu_seqlens, max_seqlen, [], empty, empty)
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    buckets, order = _fill_buckets(lengths)
    starts = torch.tensor([bounds[row] for row in order])
    last = torch.tensor([lengths[row] - 1 for row in order])
    padded = torch.tensor([length for rows, length in buckets for _ in range(rows)])

    slot_start = padded.cumsum(0) - padded
    row = torch.arange(len(order)).repeat_interleave(padded)  # [padded slots]
    offset = torch.arange(len(row)) - slot_start[row]
    gather = starts[row] + torch.minimum(offset, last[row])
    scatter = torch.zeros(bounds[-1], dtype=torch.int64)
    real = offset <= last[row]
    scatter[gather[real]] = torch.arange(len(row))[real]
    device = cu_seqlens.device
    return Layout(
        backend, dtype, cu_seqlens, max_seqlen, buckets, gather.to(device), scatter.to(device)
    )


def _fill_buckets(lengths: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    buckets: list[tuple[int, int]] = []
    for row in order:
        if buckets and lengths[row] >= MIN_FILL * buckets[-1][1]:
            buckets[-1] = (buckets[-1][0] + 1, buckets[-1][1])
        else:
            buckets.append((1, lengths[row]))
    return buckets, order


class _ToBuckets(torch.autograd.Function):
    """x[gather].  The gradient of a padding slot is zero, so the backward is a gather as well."""

    @staticmethod
    def forward(ctx, x, gather, scatter):
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx, grad):
        (scatter,) = ctx.saved_tensors
        return grad.index_select(0, scatter), None, None


class _FromBuckets(torch.autograd.Function):
    """x[scatter]; the backward writes each gradient to its one slot."""

    @staticmethod
    def forward(ctx, x, scatter):
        ctx.save_for_backward(scatter)
        ctx.num_slots = len(x)
        return x.index_select(0, scatter)

    @staticmethod
    def backward(ctx, grad):
        (scatter,) = ctx.saved_tensors
        out = grad.new_zeros((ctx.num_slots, *grad.shape[1:]))
        return out.index_copy_(0, scatter, grad), None


def _sdpa_buckets(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    layout: Layout,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Float[Tensor, "n heads dim"]:
    sizes = [rows * length for rows, length in layout.buckets]
    single = len(layout.buckets) == 1 and layout.buckets[0][0] == 1
    parts = [
        (x if single else _ToBuckets.apply(x, layout.gather, layout.scatter)).split(sizes)
        for x in (query, key, value)
    ]
    outputs = []
    for (rows, length), q, k, v in zip(layout.buckets, *parts, strict=True):
        q, k, v = (x.view(rows, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if q.is_cuda and groups > 1:  # CUDA's fp32 kernels know no grouped heads, only "math" does
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        mask = _band(length, window, q.device) if window is not None and length > window else None
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=k.shape[1] != q.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs)
    return joined if single else _FromBuckets.apply(joined, layout.scatter)


def _band(length: int, window: int, device: torch.device) -> Bool[Tensor, "length length"]:
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril() & everything.triu(1 - window)


def _flash(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    layout: Layout,
    *,
    scale: float | None,
    dropout: float,
    window: int | None,
) -> Float[Tensor, "n heads dim"]:
    cu, longest = layout.cu_seqlens, layout.max_seqlen
    left = -1 if window is None else window - 1  # a window of W keys holds the query's own
    if layout.backend == "flash_attention_2":
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu,
            cu,
            longest,
            longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=True,
            window_size=(left, 0 if left >= 0 else -1),
        )
    from torch.nn.attention.varlen import varlen_attn

    if dropout > 0:
        raise ValueError(
            "Policy.hidden: attention_dropout must be 0 with varlen_attn, which has none, got "
            f"{dropout}; set it to 0 in the model's config, or use attn='sdpa'"
        )
    options = {"scale": scale, "window_size": (left, 0)}
    if "enable_gqa" in _varlen_options():
        options["enable_gqa"] = True
    elif query.shape[1] != key.shape[1]:  # torch before it had the option: a key for every head
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = varlen_attn(query, key, value, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)  # a tuple only where return_aux is asked for
    return out


def _attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads t dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: Layout | None = None,
    **kwargs,
) -> tuple[Float[Tensor, "batch t heads value_dim"], None]:
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(
                f"Policy.hidden: attention of {type(module).__name__} must be plain softmax "
                f"attention, got {unsupported}; use a model without it"
            )
    run = _sdpa_buckets if packed_layout.backend == "sdpa" else _flash
    q, k, v = (x[0].transpose(0, 1).to(packed_layout.dtype) for x in (query, key, value))
    out = run(q, k, v, packed_layout, scale=scaling, dropout=dropout, window=sliding_window)
    return out[None], None


def register_attention() -> None:
    """Makes both names known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(NAME_WITHOUT_MASKS, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def without_masks(config: PreTrainedConfig) -> Iterator[None]:
    """Within, transformers builds no attention mask: the layout says everything.

    Only the mask's construction looks at the name, so a layer that activation checkpointing runs
    again later, outside of this block, still computes the same attention.
    """
    before = config._attn_implementation
    config._attn_implementation = NAME_WITHOUT_MASKS
    try:
        yield
    finally:
        config._attn_implementation = before
