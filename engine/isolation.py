"""Proof that packed rows cannot see each other, on the model at hand.

transformers isolates packed rows under SDPA only without cache and without mask, and an
architecture may bypass the registered attention altogether; both fail silently.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tercet.engine.attention import HALF, NAME
from tercet.engine.guards import non_finite_weights
from tercet.engine.records import Packed, pack

# Largest accepted error of packed rows against separate forwards, relative to the token's norm.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
TOLERANCE_HALF = 0.1
# Largest accepted change of a row when only other rows change: shapes stay, so nearly none.
LEAK_TOLERANCE = 1e-5
LEAK_TOLERANCE_HALF = 1e-2
MAX_WINDOW = 256  # a sliding window up to this is crossed by one of the rows


def isolation_error(
    model: PreTrainedModel,
    packed_forward: Callable[[Packed], Tensor],
    head: tuple[Tensor, Tensor | None],
    dtype: torch.dtype,
) -> float:
    """Largest relative error of packed hidden states against the model's own separate forwards.

    Also compared: a row while the others change, and the model's logits with
    hidden @ weight.T + bias.

    Args:
        model: in evaluation mode.
        packed_forward: hidden states [n, hidden] of packed rows of this model.
        head: weight and bias of its LM head.
        dtype: that it computes in; decides the tolerance.

    Raises:
        RuntimeError: weights are not finite, or any of the three differs by more than rounding.
        FloatingPointError: hidden states are not finite though the weights are.
    """
    _check_weights(model)
    device, vocab_size = head[0].device, len(head[0])
    rows = _random_rows(vocab_size, _windows(model))
    packed = packed_forward(pack(rows, device=device))
    others = [[(token + 1) % vocab_size for token in row] for row in rows[:-1]]
    changed = packed_forward(pack([*others, rows[-1]], device=device))
    leak = _relative_error(changed[-len(rows[-1]) :], packed[-len(rows[-1]) :])
    if not packed.isfinite().all():
        raise FloatingPointError(
            f"Policy: hidden states of {type(model).__name__} must be finite, got NaN or infinity "
            f"on random tokens in {dtype}; use a dtype of larger range, or another checkpoint"
        )

    errors, head_errors = [], []
    for row, hidden in zip(rows, packed.split([len(row) for row in rows]), strict=True):
        ids = torch.tensor([row], device=device)
        alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = model(input_ids=ids, use_cache=False).logits[0]
        errors.append(_relative_error(hidden, alone))
        head_errors.append(_relative_error(F.linear(alone, *head), logits))
    error, head_error = (float(torch.tensor(e).max()) for e in (errors, head_errors))  # keeps NaN

    half, name = dtype in HALF, type(model).__name__
    tolerance = TOLERANCE_HALF if half else TOLERANCE[dtype]
    if not (error <= tolerance and leak <= (LEAK_TOLERANCE_HALF if half else LEAK_TOLERANCE)):
        raise RuntimeError(
            f"Policy: packed rows of {name} must equal separate forwards, got relative error "
            f"{error:.1e} (limit {tolerance:.0e}) and leak between rows {leak:.1e}; its attention "
            "is not causal or ignores the packed layout (implementation "
            f"{model.config._attn_implementation!r}, must be {NAME!r}); use a causal architecture "
            "whose attention goes through transformers' AttentionInterface"
        )
    if not head_error <= tolerance:
        raise RuntimeError(
            f"Policy: logits of {name} must be hidden @ weight.T + bias, got relative error "
            f"{head_error:.1e}; use a model that neither scales nor caps its logits"
        )
    return error


def _check_weights(model: PreTrainedModel) -> None:
    if bad := non_finite_weights(model):
        raise RuntimeError(
            f"Policy: weights of {type(model).__name__} must be finite, got NaN or infinity in "
            f"{len(bad)} of its parameters, first {bad[0]}; take another checkpoint, "
            "or a dtype that they do not overflow"
        )


def _windows(model: PreTrainedModel) -> list[int]:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return [window] if window and "sliding_attention" in layers else []


def _random_rows(vocab_size: int, windows: list[int]) -> list[list[int]]:
    lengths = [5, 9, 7, *(w + 3 for w in windows if w <= MAX_WINDOW), 7]  # 9 and 7 share a bucket
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (n,), generator=draw).tolist() for n in lengths]


def _relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.double(), expected.double()
    norm = expected.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((got - expected).norm(dim=-1) / norm).max())
