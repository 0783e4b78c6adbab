"""How far a result is from float64: the number that stands beside each time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# A row that is smaller than float32 resolves beside the largest one counts as this large.
SMALLEST_ROW = torch.finfo(torch.float32).eps


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Largest error in a row (the last axis) as a share of the row's largest value.

    A vector is one row.  So a token whose gradient is small must be right, too.  Infinite when
    something is not finite that should be.
    """
    if got.shape != truth.shape:
        raise ValueError(f"relative_error: the truth is {truth.shape}, the result {got.shape}")
    if truth.numel() == 0:
        return 0.0
    truth = truth.detach().double()
    truth = truth.reshape(-1, truth.shape[-1] if truth.ndim > 1 else truth.numel())
    error = (got.detach().to(truth).view_as(truth) - truth).abs()
    if not error.isfinite().all():
        return math.inf
    size = truth.abs().amax(dim=1)
    size = size.clamp(min=float(size.max()) * SMALLEST_ROW)
    worst = error.amax(dim=1)
    return float(torch.where(worst > 0, worst / size, 0.0).max())


def relative_errors(got: object, truth: object, names: tuple[str, ...]) -> dict[str, float]:
    """Error of each output that both have.  `names` names them in order; None is no output."""
    pairs = zip(names, _tensors(got), _tensors(truth), strict=True)
    return {
        name: relative_error(got, want)
        for name, got, want in pairs
        if got is not None and want is not None
    }


def _tensors(outputs: object) -> list[Tensor | None]:
    several = outputs if isinstance(outputs, Iterable) else [outputs]
    return [outputs] if isinstance(outputs, Tensor) else list(several)


def worst(errors: dict[str, float]) -> tuple[str, float]:
    """The output with the largest error."""
    name = max(errors, key=lambda name: errors[name])
    return name, errors[name]
