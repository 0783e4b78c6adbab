"""What policy_head and policy_loss ask of the tensors that describe tokens."""

import torch
from torch import Tensor

from tercet.kernels._checks import (
    check_float,
    check_number,
    check_same_device,
    check_tensor,
)
from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels.reference import aggregation_weights


def check_tokens(
    op: str,
    config: PolicyLossConfig,
    like: Tensor,
    shape: torch.Size,
    mask: Tensor | None,
    **tensors: Tensor | None,
) -> None:
    """Raises unless each tensor that is given is a float of `shape` beside `like`, as config asks.

    Raises:
        TypeError: type or dtype of an argument.
        ValueError: shape or device; something that config needs is missing, or what it ignores
            is given.
    """
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"{op}: config must be a PolicyLossConfig, got {type(config).__name__}")
    given = {name: x for name, x in tensors.items() if x is not None}
    check_float(op, **given)
    if mask is not None:
        check_tensor(op, "mask", mask, "bool")
        given["mask"] = mask
    check_same_device(op, like=like, **given)
    for name, x in given.items():
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name} must have one value per token, {tuple(shape)}, got {tuple(x.shape)}"
            )
    sft = config.loss_type == "sft"
    if sft and (unused := sorted(given.keys() & {"old_logp", "advantage", "sampler_logp"})):
        raise ValueError(f"{op}: loss_type='sft' takes no {unused[0]}; pass None")
    if not sft and "advantage" not in given:
        raise TypeError(
            f"{op}: advantage must be a tensor, got None; only loss_type='sft' goes without"
        )
    if config.beta > 0 and "ref_logp" not in given:
        raise ValueError(
            f"{op}: beta={config.beta} needs ref_logp, got None; give it or set beta=0"
        )


def token_weights(
    op: str,
    config: PolicyLossConfig,
    counted: Tensor,
    dtype: torch.dtype,
    *,
    weights: Tensor | None,
    num_items: float | Tensor | None,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
) -> Tensor:
    """Weight of each token in the loss; see `aggregation_weights`."""
    if weights is not None:
        if num_items is not None:
            raise ValueError(f"{op}: num_items must be None where weights are given")
        return weights.detach().to(dtype).masked_fill(~counted, 0.0)
    _check_num_items(op, num_items, counted)
    ids, count = None, 0
    if config.aggregates == "constant" and config.max_completion_length is None:
        raise ValueError(
            f"{op}: aggregation 'constant' needs config.max_completion_length, got None"
        )
    if config.aggregates == "sequence_mean" or (
        config.aggregates == "constant" and num_items is None
    ):
        ids, count = _sequence_ids(op, config, counted, cu_seqlens, sequence_ids)
    return aggregation_weights(
        counted, config,
        num_items=num_items, sequence_ids=ids, num_sequences=count, dtype=dtype,
    )  # fmt: skip


def _check_num_items(op: str, num_items: float | Tensor | None, like: Tensor) -> None:
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        check_same_device(op, like=like, num_items=num_items)
        if num_items.ndim > 0:
            raise ValueError(f"{op}: num_items must be a scalar, got {tuple(num_items.shape)}")
        return
    check_number(op, num_items=num_items)
    if not 0 < num_items < float("inf"):
        raise ValueError(f"{op}: num_items must be > 0 and finite, got {num_items}")


def _sequence_ids(
    op: str,
    config: PolicyLossConfig,
    counted: Tensor,
    cu_seqlens: Tensor | None,
    sequence_ids: Tensor | None,
) -> tuple[Tensor, int]:
    """The sequence of each token, and an upper bound on their number."""
    shape, n = counted.shape, counted.numel()
    if cu_seqlens is not None and sequence_ids is not None:
        raise ValueError(f"{op}: give cu_seqlens or sequence_ids, got both")
    if cu_seqlens is not None:
        check_boundaries(op, cu_seqlens, counted)
        places = torch.arange(n, device=counted.device, dtype=cu_seqlens.dtype)
        ids = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
        return ids, cu_seqlens.shape[0] - 1
    if sequence_ids is not None:
        check_tensor(op, "sequence_ids", sequence_ids, "index")
        check_same_device(op, like=counted, sequence_ids=sequence_ids)
        if sequence_ids.shape != shape:
            raise ValueError(
                f"{op}: sequence_ids must have one value per token, {tuple(shape)}, "
                f"got {tuple(sequence_ids.shape)}"
            )
        if _values_are_at_hand(sequence_ids) and n:
            low, high = (int(x) for x in sequence_ids.aminmax())
            if low < 0 or high >= n:
                raise ValueError(
                    f"{op}: sequence_ids must be in [0, {n}), got {low if low < 0 else high}"
                )
        return sequence_ids, n
    if len(shape) == 2:  # padded: a sequence per row
        return torch.arange(shape[0], device=counted.device)[:, None].expand(shape), shape[0]
    raise ValueError(
        f"{op}: aggregation {config.aggregates!r} needs cu_seqlens or sequence_ids to tell "
        f"sequences apart, got neither for tokens {tuple(shape)}"
    )


def _values_are_at_hand(x: Tensor) -> bool:
    """On CUDA they would have to be waited for, and a graph being traced has none."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_boundaries(op: str, cu_seqlens: Tensor, tokens: Tensor) -> None:
    """Raises TypeError or ValueError unless cu_seqlens cut packed tokens [n] into sequences."""
    check_tensor(op, "cu_seqlens", cu_seqlens, "index")
    check_same_device(op, tokens=tokens, cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or tokens.ndim != 1:
        raise ValueError(
            f"{op}: cu_seqlens must be [sequences + 1] over packed tokens [n], "
            f"got {tuple(cu_seqlens.shape)} over {tuple(tokens.shape)}"
        )
    if not _values_are_at_hand(cu_seqlens):
        return
    bounds, n = cu_seqlens.tolist(), len(tokens)
    if not bounds or bounds[0] != 0 or bounds[-1] != n or sorted(bounds) != bounds:
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to n = {n}, got {str(bounds[:4])[:-1]}"
            f"{', ...' if len(bounds) > 4 else ''}]; pass the running sum of the lengths"
        )
