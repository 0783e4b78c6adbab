"""What every bench shares: cases, interleaved timing, extra memory, machine facts, JSON lines.

A bench file lists its cases and ends with

    test_speed = harness.as_test(CASES)          # pytest bench/<op>.py --benchmark-only
    if __name__ == "__main__":
        harness.main(CASES)                      # python bench/<op>.py

One round runs every side once, in turn, so that a busy machine slows all of them alike.  Results
are medians; `slower` is the median of a side divided by the median of "ours".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is not to write to the terminal

import pytest
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy")
KEY = ("op", "case", "side", "machine")  # a newer line with the same key replaces the older one
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Side = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sides that do the same work; the one called "ours" is what the others are compared with."""

    op: str
    name: str  # for the table, e.g. "B=32 T=512 H=1024 fp32 fwd+bwd"
    sides: Mapping[str, Side]
    gate: Callable[[], None]  # raises when ours is wrong: wrong is not fast
    peers: tuple[str, ...] = ()  # packages whose versions belong to the result
    bytes_moved: int | None = None  # least traffic of one call; gives GB/s
    flops: int | None = None  # of one call; gives GFLOP/s
    formula: str = ""  # how bytes_moved, flops or a budget were computed
    rounds: int = 15
    notes: Mapping[str, Any] = field(default_factory=dict)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return done.stdout.strip()


@cache
def environment(peers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Machine, versions and commit of this process."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    cpu = found[1] if found else platform.processor()
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    machine = f"{cpu}, {os.cpu_count()} cores"
    if DEVICE.type == "cuda":
        machine = torch.cuda.get_device_name()
    paths = (":(top)", ":(top,exclude)bench/results")
    dirty = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *paths)
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in (*PACKAGES, *peers) if p in installed},
        "commit": _output("git", "rev-parse", "--short", "HEAD") + ("+changes" if dirty else ""),
    }


@cache
def _l2_filler() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def _time_once(side: Side) -> float:
    """One call in ms.  On CUDA: cold L2, and the launches queue up behind a sleeping kernel."""
    if DEVICE.type == "cuda":
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


@cache
def copy_gb_per_s(num_bytes: int = 1 << 30) -> float:
    """What a copy on the device reaches, reads and writes counted: the roof of a row kernel."""
    source = torch.ones(num_bytes, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    times = [_time_once(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.nbytes / statistics.median(times[2:]) / 1e6


def _quantiles(times_ms: list[float]) -> dict[str, float]:
    if len(times_ms) == 1:
        times_ms = times_ms * 2
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return {"ms": statistics.median(times_ms), "ms_p20": fifths[0], "ms_p80": fifths[3]}


def time_sides(case: Case, benchmark: Any = None) -> dict[str, dict[str, float]]:
    """Median, 20 % and 80 % quantile of each side in ms.

    pytest-benchmark, when given, times "ours"; the other sides run in its set-up of each round.
    """
    others = {name: side for name, side in case.sides.items() if name != "ours"}
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    for side in case.sides.values():  # warm-up
        side()

    def run_others() -> None:
        for name, side in others.items():
            times[name].append(_time_once(side))

    def run_ours() -> None:
        times["ours"].append(_time_once(case.sides["ours"]))

    if benchmark is not None:
        benchmark.pedantic(run_ours, setup=run_others, rounds=case.rounds)
    else:
        for _ in range(case.rounds):
            run_others()
            run_ours()
    return {name: _quantiles(t) for name, t in times.items()}


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


def emit(line: Mapping[str, Any], out: Path) -> None:
    """Adds a JSON line to `out`, in place of an older one with the same key."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []
    kept = [old for old in lines if any(old.get(k) != line.get(k) for k in KEY)]
    part = out.with_suffix(".tmp")
    part.write_text("".join(json.dumps(item) + "\n" for item in [*kept, dict(line)]))
    part.replace(out)


def run(case: Case, benchmark: Any = None, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Gate, time and weigh all sides of a case; prints a table and writes JSON lines."""
    case.gate()
    load = round(os.getloadavg()[0], 2)
    timings = time_sides(case, benchmark)
    ours = timings["ours"]["ms"]
    lines: dict[str, dict[str, Any]] = {}
    print(f"\n{case.op}: {case.name}   [{case.formula}]")
    for name, timing in timings.items():
        line: dict[str, Any] = {"op": case.op, "case": case.name, "side": name, **timing}
        line |= {"rounds": case.rounds, "slower": timing["ms"] / ours, "load_1min": load}
        line["extra_mb"] = extra_bytes(case.sides[name]) / 1e6
        if case.bytes_moved is not None:
            line["gb_per_s"] = case.bytes_moved / timing["ms"] / 1e6
            if DEVICE.type == "cuda":
                line["share_of_copy"] = line["gb_per_s"] / copy_gb_per_s()
        if case.flops is not None:
            line["gflop_per_s"] = case.flops / timing["ms"] / 1e6
        line |= {"formula": case.formula, "device": DEVICE.type}
        line |= {**case.notes, **environment(case.peers)}
        rates = [
            f"{line[k]:8.2f} {k}" for k in ("gb_per_s", "share_of_copy", "gflop_per_s") if k in line
        ]
        print(
            f"  {name:28s} {line['ms']:9.3f} ms  ({line['ms_p20']:.3f}-{line['ms_p80']:.3f})"
            f"  x{line['slower']:<6.2f} {line['extra_mb']:9.2f} MB extra", *rates
        )  # fmt: skip
        emit(line, out or RESULTS / f"{case.op}.jsonl")
        lines[name] = line
    print(f"  slower = median ms / median ms of ours, {case.rounds} rounds; load {load};", end=" ")
    print(", ".join(f"{k} {v}" for k, v in environment(case.peers)["versions"].items()))
    for peer in case.peers:
        if peer not in environment(case.peers)["versions"]:
            print(f"  {peer} is not installed: not measured")
    if benchmark is not None:
        benchmark.extra_info.update({name: line["ms"] for name, line in lines.items()})
    return lines


def as_test(cases: Mapping[str, Callable[[], Case]]) -> Callable[..., None]:
    """A pytest-benchmark test with one parameter per case; run pytest with -s to see the tables."""

    @pytest.mark.parametrize("name", list(cases))
    @pytest.mark.filterwarnings("default")
    def test(name: str, benchmark: Any) -> None:
        run(cases[name](), benchmark)

    return test


def main(cases: Mapping[str, Callable[[], Case]]) -> None:
    """Runs the cases named on the command line, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*", choices=[[], *cases], help="default: all")
    parser.add_argument(
        "--out", type=Path, help="JSON lines file (default: bench/results/OP.jsonl)"
    )
    args = parser.parse_args()
    for name in args.case or cases:
        run(cases[name](), out=args.out)
