"""empty_huge asks for huge pages, and only for large CPU buffers."""

from pathlib import Path

import pytest
import torch

from tercet.kernels._memory import HUGE_PAGE, empty_huge

SMAPS = Path("/proc/self/smaps")
HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()


def _flags(address: int) -> list[str]:
    """VmFlags of the mapping that holds an address; "hg" means that huge pages were asked for."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            begin, end = (int(text, 16) for text in key.split("-"))
            inside = begin <= address < end
        elif inside and key == "VmFlags:":
            return values
    raise LookupError(f"no mapping holds {address:#x}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_buffers_ask_for_huge_pages(dtype):
    out = empty_huge([10, HUGE_PAGE + 3], dtype=dtype, device=torch.device("cpu"))
    assert out.shape == (10, HUGE_PAGE + 3)
    assert out.dtype == dtype
    assert out.fill_(2.0).eq(2.0).all()
    if HAS_HUGE_PAGES:
        assert "hg" in _flags(out.data_ptr() + out.nbytes // 2)


def test_small_and_empty_buffers(device):
    for shape in ([0], [3, 0, 2], [7]):
        out = empty_huge(shape, dtype=torch.float32, device=device)
        assert list(out.shape) == shape
        assert out.device == torch.zeros(1, device=device).device
