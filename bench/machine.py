"""This machine: its facts, what one call costs on it, and the two roofs that no kernel passes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is not to write to the terminal
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # compile times are to be whole

import torch

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # that benches compute in
PACKAGES = ("torch", "triton", "transformers", "numpy")
GENERATED = ("bench/results", "docs", "README.md")  # their changes do not change what is measured

Side = Callable[[], object]


@cache
def installed(package: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git prints here; nothing outside a repository, or where there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ("git", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip()


@cache
def environment(packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine, versions, commit and time of this process."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = found[1] if found else platform.processor()
    machine = f"{cpu}, {os.cpu_count()} cores"
    if DEVICE.type == "cuda":
        machine = torch.cuda.get_device_name()
    paths = (":(top)", *(f":(top,exclude){path}" for path in GENERATED))
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *paths)
    versions = {package: installed(package) for package in (*PACKAGES, *packages)}
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version for package, version in versions.items() if version},
        "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit + ("+changes" if dirty else ""),
    }


@cache
def _l2_filler() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def time_once(side: Side, *, cold: bool = True) -> float:
    """One call in ms.

    On CUDA the launches queue up behind a sleeping kernel, and `cold` empties the L2 cache first.
    On a CPU the caches are as the call before left them.
    """
    if DEVICE.type == "cuda":
        if cold:
            _l2_filler().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        start.record()
        side()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    started = time.perf_counter()
    side()
    return (time.perf_counter() - started) * 1e3


def extra_bytes(side: Side) -> int:
    """Peak memory that `side` allocates through PyTorch beyond what it returns.

    On a CPU the allocator's events of torch.profiler are summed, so buffers inside C++ operators
    count; private workspaces of MKL do not.
    """
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = side()
        returned = torch.cuda.memory_allocated() - before
        del result
        return torch.cuda.max_memory_allocated() - before - returned
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        torch.empty(1)  # seen and freed: a side may allocate nothing, a profiler may not
        result = side()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("extra_bytes: the profiler saw no allocation; this torch cannot be used")
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak - live


def _best_ms(side: Side, calls: int) -> float:
    return min(time_once(side) for _ in range(calls))


@cache
def copy_gb_per_s(num_bytes: int = 1 << 30) -> float:
    """What a copy on the device reaches, reads and writes counted: the roof of a row kernel."""
    source = torch.ones(num_bytes, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_ms(lambda: target.copy_(source), 10) / 1e6


@cache
def matmul_gflop_per_s(size: int | None = None) -> float:
    """What one large product in DTYPE reaches: the roof of everything with products."""
    size = size or (8192 if DEVICE.type == "cuda" else 3072)
    a = torch.randn(size, size, device=DEVICE, dtype=DTYPE)
    out = torch.empty_like(a)
    return 2 * size**3 / _best_ms(lambda: torch.mm(a, a, out=out), 10) / 1e6


def floor_ms(bytes_moved: int | None, flops: int | None) -> float | None:
    """Least time that this machine needs for this traffic and these products."""
    times = []
    if bytes_moved:
        times.append(bytes_moved / copy_gb_per_s() / 1e6)
    if flops:
        times.append(flops / matmul_gflop_per_s() / 1e6)
    return max(times, default=None)
