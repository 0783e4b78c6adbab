"""Argument checks shared by every op, and the choice of implementation."""

import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]


def check_float(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless every tensor is float16, bfloat16, float32 or float64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors that are not None live on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listing}")


def interpreting() -> bool:
    """True when Triton runs kernels in its interpreter, which needs no GPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def use_triton(op: str, impl: Impl, x: Tensor) -> bool:
    """Whether `op` on `x` runs the Triton kernel; "auto": Triton on CUDA, PyTorch elsewhere.

    Raises:
        ValueError: unknown impl.
        RuntimeError: impl="triton" where neither CUDA nor the interpreter is available.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "auto":
        return x.is_cuda and x.dtype != torch.float64
    if impl == "triton" and not x.is_cuda and not interpreting():
        raise RuntimeError(
            f"{op}: impl='triton' needs a CUDA tensor, got {x.device}; "
            "set TRITON_INTERPRET=1 before Python starts, or use impl='auto'"
        )
    return impl == "triton"
