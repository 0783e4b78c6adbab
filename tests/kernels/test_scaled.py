"""scaled: saved gradients times the upstream scalar, in Triton (interpreted) and in PyTorch."""

import pytest
import torch

from tercet.kernels import _scaled as scaling
from tercet.kernels._checks import interpreting

BLOCK = scaling.BLOCK_N
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = [1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]


def product(gradient, upstream, dtype):
    """In the wider dtype of the two, and rounded once."""
    return (gradient * upstream.reshape(1)).to(dtype).view(gradient.shape)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_writes_every_element_and_no_other(n, dtype, device):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = torch.randn(n, dtype=wide, device=device)
    gradient[n // 2 :: 5] *= 1e5  # more than float16 holds, unless the factor comes first
    factor = torch.full((1,), 1 / 3e4, dtype=wide, device=device)
    storage = torch.full((n + 100,), 7.0, dtype=dtype, device=device)
    scaling.fused(storage[:n], gradient, factor)
    expected = product(gradient, factor, dtype)
    if interpreting() and dtype == torch.bfloat16:  # the interpreter cuts where a GPU rounds
        torch.testing.assert_close(storage[:n], expected, rtol=2.0**-7, atol=0.0)
    else:
        assert torch.equal(storage[:n], expected)
    assert (storage[n:] == 7.0).all()


@pytest.mark.parametrize("wide", [0, 1])
def test_fused_multiplies_in_the_wider_dtype(wide, device):
    pair = [torch.rand(50, device=device) + 1.0, torch.full((1,), 1 / 3, device=device)]
    pair[wide] = pair[wide].double() + 1e-12
    out = torch.empty(50, dtype=torch.float64, device=device)
    gradient, factor = pair
    scaling.fused(out, gradient, factor)
    assert torch.equal(out, product(gradient, factor, torch.float64))


def test_fused_launches_nothing_for_nothing(device):
    empty = torch.empty(0, device=device)
    scaling.fused(empty, empty, torch.ones(1, device=device))


@pytest.mark.parametrize("shape", [(), (5,), (2, 0), (3, scaling.CAST_ELEMENTS // 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_scaled_is_the_product_in_the_dtype_asked_for(shape, dtype, wide, device):
    gradient = torch.randn(shape, device=device)
    upstream = torch.full((), -1 / 3, dtype=wide, device=device)
    out = scaling.scaled(gradient, upstream, dtype)
    assert (out.dtype, out.shape) == (dtype, gradient.shape)
    torch.testing.assert_close(out, product(gradient, upstream, dtype), rtol=0.0, atol=0.0)


def test_scaled_casts_without_a_temporary_of_the_whole(device):
    if device.type != "cpu":
        pytest.skip("one kernel, which has none")
    gradient, upstream = torch.randn(2**22), torch.ones((), dtype=torch.float64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        scaling.scaled(gradient, upstream, torch.float32)
    taken = [event.cpu_memory_usage for event in profile.events() or []]
    assert max(taken) <= gradient.nbytes + 2**20


def test_registration(device):
    gradient, upstream = torch.randn(3, 4, device=device), torch.ones((), device=device)
    for dtype in DTYPES:
        torch.library.opcheck(torch.ops.tercet.scaled.default, (gradient, upstream, dtype))
