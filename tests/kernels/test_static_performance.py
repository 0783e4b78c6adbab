"""Registers, memory and vector widths of every Triton kernel on three GPUs; no GPU is needed.

The kernels and their real shapes stand in bench/static_report.py.  This file runs itself once in a
subprocess, because Triton's interpreter replaces the compiler in the process of the tests.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import static_report as report
import triton
import triton.language as tl

ROOT = Path(__file__).parents[2]
KERNELS = list(dict.fromkeys(name.split()[0] for name in report.DESIGN))


@triton.jit
def _narrow(x_ptr, stride):
    tl.store(x_ptr + tl.program_id(0) * stride, 1.0)  # the product is one of 32 bits


def _with(module: Any, launch: report.Launch, **constants: int) -> report.Launch:
    """The launch, with other constants of its module."""

    @contextmanager
    def changed() -> Iterator[None]:
        before = {name: getattr(module, name) for name in constants}
        try:
            vars(module).update(constants)
            yield
        finally:
            vars(module).update(before)

    def run() -> None:
        with changed():
            launch.run()

    return launch._replace(run=run)


def _broken() -> dict[str, report.Launch]:
    """Launches that a bad block size, stride or product spoils, by the fault that must be found."""
    bf16, fp32 = report.BF16, report.FP32
    scored = report.scored(bf16, bf16, 64, 151_936, entropy=True)
    odd = report.scored(bf16, bf16, 64, 50_257, entropy=True)  # the rows of GPT-2 lie unaligned
    pooled = report.pooled(bf16, 8, 512, 1024, packed=False)
    crossed = report.rewarded(bf16, 64, 8, 1024, lse=True, document=True)
    plain = report.rewarded(fp32, 64, 8, 1024, lse=True, document=True)
    x = report._meta(8)
    return {
        "_cross_fwd: local memory": _with(report.reward, crossed, BLOCK_R=256, BLOCK_C=128),
        "_row_softmax_fwd: x_ptr: 2 bytes per thread": odd,
        "_row_softmax_bwd: dx_ptr: 2 bytes per thread": odd,
        "_row_softmax_fwd: blocks per multiprocessor": _with(
            report.rows, scored, FORWARD_BLOCK_V=16_384
        ),
        "_masked_mean_partial: in flight": _with(report.mean, pooled, BLOCK_T=2),
        "_narrow: 32-bit product": report.Launch("narrow", lambda: _narrow[(8,)](x, 48), 32),
        "_cross_fwd: tensor cores": plain,
    }


def _main() -> None:
    """Writes two objects: faults of "kernel arch", and of each broken launch for one GPU."""
    report.DESIGN["_narrow"] = report.Design((), blocks=1)
    found: dict[str, list[str]] = {}
    items = report.reports(report.LAUNCHES)
    used = {(item.kernel, access.pointer) for item in items for access in item.accesses}
    for item in items:
        unused = [p for p in item.design().wide if (item.kernel, p) not in used]
        found[f"{item.kernel} {item.arch}"] = [f"{p}: no such pointer" for p in unused]
    for item in items:
        faults = [f"{item.launch}: {fault}" for fault in report.faults(item)]
        found[f"{item.kernel} {item.arch}"] += faults
    del report.DESIGN["_cross_fwd f32"]  # so that float32 is asked for tensor cores
    broken = {
        name: [
            f"{item.kernel}: {fault}"
            for item in report.reports([launch], (90,))
            for fault in report.faults(item)
        ]
        for name, launch in _broken().items()
    }
    sys.stdout.write(json.dumps([found, broken]) + "\n")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, list[str]]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([env.get("PYTHONPATH", ""), str(ROOT / "bench")])
    done = subprocess.run(
        [sys.executable, "-P", __file__], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("arch", report.ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_keeps_to_its_design(kernel, arch, compiled):
    assert compiled[0][f"{kernel} {arch}"] == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(_broken()))
def test_a_fault_is_found(fault, compiled):
    assert any(found.startswith(fault) for found in compiled[1][fault]), compiled[1][fault]


def test_every_kernel_has_a_design():
    for path in (ROOT / "kernels").glob("*.py"):
        module = import_module(f"tercet.kernels.{path.stem}")
        jitted = {k for k, v in vars(module).items() if isinstance(v, triton.KernelInterface)}
        launched = jitted & set(re.findall(r"(\w+)\[", path.read_text()))
        assert launched <= set(KERNELS), f"{path.name}: add a Launch to bench/static_report.py"


def test_occupancy_of_known_kernels():
    """Figures of NVIDIA's occupancy calculator, compute capability 8.0 and 9.0."""
    item = report.Report("", "", 90, "f32", 256, 32, 0, 0, [], [], report.Counter())
    assert item.blocks() == 8  # threads
    assert item._replace(registers=33).blocks() == 6  # registers, in steps of 8
    assert item._replace(registers=128).blocks() == 2
    assert item._replace(registers=129).blocks() == 1
    assert item._replace(threads=32).blocks() == 32  # blocks
    assert item._replace(shared=49_152).blocks() == 4  # 228 KiB by 49
    assert item._replace(shared=49_152, arch=80).blocks() == 3  # 164 KiB by 49


if __name__ == "__main__":
    _main()
