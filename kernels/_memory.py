"""Large fresh buffers on a CPU, without a page fault per 4 KB."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on most arm64 kernels
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty_huge(
    shape: torch.Size | list[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty, asking Linux to back a buffer of at least two huge pages with huge pages.

    PyTorch returns large buffers to the system when they die, so each gradient of an activation is
    faulted in anew, 4 KB at a time, which takes several times as long as writing it.  The request
    is a hint: where the system ignores it, nothing changes.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if _LIBC is None or device.type != "cpu" or out.nbytes < 2 * HUGE_PAGE:
        return out
    start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (out.data_ptr() + out.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return out
