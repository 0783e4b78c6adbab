"""Saved gradients times the upstream scalar: all that the backward of a fused loss has to do."""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels._memory import empty_huge

CAST_ELEMENTS = 2**16  # a product of two dtypes has a temporary on a CPU
BLOCK_N = 4096
NUM_WARPS = 8


@triton.jit
def _scale(x_ptr, factor_ptr, out_ptr, n, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.load(factor_ptr)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, (x * factor).to(out_ptr.dtype.element_ty), mask=offs < n)


def fused(out: Tensor, gradient: Tensor, factor: Tensor) -> None:
    """On CUDA torch.mul of two dtypes moves an element at a time: a third of the bandwidth."""
    n = gradient.numel()
    with torch.cuda.device_of(gradient):
        _scale[(triton.cdiv(n, BLOCK_N),)](  # Triton launches no empty grid
            gradient, factor, out, n, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS
        )


@torch.library.custom_op("tercet::scaled", mutates_args=())
def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Upstream scalar * gradient, in dtype; no second derivative is registered, so it raises."""
    out = empty_huge(gradient.shape, dtype=dtype, device=gradient.device)
    factor = upstream.reshape(1)  # of one axis: then the product is as wide as the wider
    if gradient.is_cuda:
        fused(out, gradient, factor)
        return out
    step = CAST_ELEMENTS if gradient.dtype != factor.dtype else gradient.numel()
    pairs = zip(gradient.view(-1).split(step), out.view(-1).split(step), strict=True)
    for part, result in pairs:
        torch.mul(part, factor, out=result)
    return out


@scaled.register_fake
def _(gradient, upstream, dtype):
    return gradient.new_empty(gradient.shape, dtype=dtype)
