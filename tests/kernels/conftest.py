"""Forward and backward of an op as one call, and its error judged against float64."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tercet.kernels._checks import interpreting

Judge = Callable[..., None]


def _patch_once_per_launch() -> None:
    """Takes out two fifths of the time of Triton's interpreter, which patches `tl` for a launch.

    It does so again at each call of another jitted function, tl.max and tl.sum among them, and
    finds nothing left to patch where a function with the same globals ran in the same launch.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    scopes: dict[int, Any] = {}  # by id of the globals

    def patch_once(fn: Any) -> Any:
        key = id(fn.__globals__)
        if key not in scopes:
            scopes[key] = patch(fn)
        return scopes[key]

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
        scopes.clear()  # what a launch patched, it restored
        launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


if interpreting():
    _patch_once_per_launch()


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """What a test makes without naming a device lies on the GPU, where there is one."""
    with device:
        yield


@pytest.fixture
def on_cpu(impl: str) -> None:
    """For tests of arguments, which lie on the CPU: there Triton runs in its interpreter only."""
    if impl == "triton" and not interpreting():
        pytest.skip("Triton's interpreter is off")


def _run(fn: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.fixture
def fwd_bwd() -> Callable[..., list[Tensor]]:
    """fwd_bwd(fn, [x, ...], dy) -> [y, dx, ...]; the inputs are copied into fresh leaves."""
    return _run


@pytest.fixture
def judge() -> Judge:
    """judge(ours, ref, [x, ...], dy): our error <= 2 x eager's + slack, against float64, y and dx.

    `ref` runs twice: on float64 copies of the inputs (the truth) and on the inputs (eager).
    Non-finite elements must be the same ones in the truth and in ours.  Triton's interpreter cuts
    float32 to bfloat16 where a GPU rounds, so there an element may be one unit further off.  The
    slack is 1e-6, three times that on a GPU, whose exponential is two units off.
    """

    def check(ours, ref, inputs: Sequence[Tensor], dy: Tensor, *, slack: float = 1e-6) -> None:
        slack *= 3 if dy.is_cuda else 1
        results = [
            _run(ref, [x.double() for x in inputs], dy),
            _run(ref, inputs, dy),
            _run(ours, inputs, dy),
        ]
        names = ["y", *(f"dx{i}" for i in range(len(inputs)))]
        for name, truth, eager, our in zip(names, *results, strict=True):
            assert our.shape == truth.shape, f"{name}: {our.shape} instead of {truth.shape}"
            finite = truth.isfinite()
            assert torch.equal(our.isfinite(), finite), f"{name}: other elements are finite"
            if not finite.any():
                continue
            cut = our.dtype == torch.bfloat16 and interpreting()
            allowed = truth.abs() * (2.0**-8 if cut else 0.0)
            our_error = ((our.double() - truth).abs() - allowed)[finite].max()
            eager_error = (eager.double() - truth)[finite].abs().max()
            assert our_error <= 2 * eager_error + slack, (
                f"{name}: error {our_error:.2e}, eager has {eager_error:.2e}"
            )

    return check


@pytest.fixture(autouse=True)
def _compiled_code_is_forgotten() -> Iterator[None]:
    yield
    torch.compiler.reset()
