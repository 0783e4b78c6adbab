"""Argument checks shared by every op, and the choice of implementation."""

import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
RowImpl = Literal["triton", "cpp", "torch"]


Kind = Literal["float", "index", "bool"]

KINDS: dict[Kind, tuple[str, tuple[torch.dtype, ...]]] = {
    "float": (
        "a floating-point tensor",
        (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "index": ("int32 or int64", (torch.int32, torch.int64)),
    "bool": ("bool", (torch.bool,)),
}


def _type_name(x: object) -> str:
    return "None" if x is None else type(x).__name__


def check_tensor(op: str, name: str, x: Tensor, kind: Kind) -> None:
    """Raises TypeError unless x is a tensor, not a DTensor, whose dtype is one of its kind."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {_type_name(x)}")
    if hasattr(x, "full_tensor"):  # these ops do not know of its shards
        raise TypeError(
            f"{op}: {name} must be a plain tensor, got a DTensor; pass {name}.full_tensor()"
        )
    wanted, dtypes = KINDS[kind]
    if x.dtype not in dtypes:
        remedy = f"; call {name}.bool()" if kind == "bool" else ""
        raise TypeError(f"{op}: {name} must be {wanted}, got {x.dtype}{remedy}")


def check_float(op: str, **tensors: Tensor) -> None:
    """Raises TypeError unless every tensor is float16, bfloat16, float32 or float64."""
    for name, x in tensors.items():
        check_tensor(op, name, x, "float")


def check_number(op: str, **numbers: float) -> None:
    """Raises TypeError unless every number is an int or a float."""
    for name, x in numbers.items():
        if not isinstance(x, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {_type_name(x)}")


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


def choose_rows(op: str, impl: Impl, x: Tensor) -> RowImpl:
    """What computes the rows of a softmax; "auto" on a CPU: the compiled rows, but for float64.

    Raises:
        ValueError: unknown impl.
        RuntimeError: impl="triton" where neither CUDA nor the interpreter is available.
        TypeError: impl="triton" in float64.
    """
    if use_triton(op, impl, x):
        if x.dtype == torch.float64:
            raise TypeError(f"{op}: impl='triton' computes in float32, got float64")
        return "triton"
    compiled = impl == "auto" and x.device.type == "cpu" and x.dtype != torch.float64
    return "cpp" if compiled else "torch"
