"""What every bench shares: cases, errors against float64, interleaved timing, JSON lines, tables.

A bench file lists its cases and ends with

    test_speed = harness.as_test(CASES)          # pytest bench/<op>.py --benchmark-only
    if __name__ == "__main__":
        harness.main(CASES)                      # python bench/<op>.py

A case is judged before it is timed: wrong is not fast.  One round runs the sides in turn, so that
a busy machine slows all of them alike; slow sides sit out some rounds.  Times are medians;
`slower` is the median of a side divided by the median of "ours".
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import accuracy
import machine
import pytest
import torch
from machine import DEVICE, DTYPE, Side, environment, extra_bytes, time_once
from peers import Peer, Roster, forget_compiled_code, roster

__all__ = [
    "DEVICE", "DTYPE", "LIMITS", "RESULTS", "Case", "Peer", "Roster", "Side", "as_test", "emit",
    "emit_case", "environment", "extra_bytes", "judge", "main", "roster", "run", "time_once",
]  # fmt: skip

RESULTS = machine.ROOT / "bench" / "results"
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # wrong is above these
KEY = ("op", "case", "side", "machine")  # a newer line with the same key replaces the older one
SIDE_BUDGET_MS = 3000.0  # of one case; a side that needs more runs fewer rounds
FEWEST_ROUNDS = 3
NOBODY = Roster({}, {}, (), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Sides that do the same work; the one called "ours" is what the others are compared with.

    Either `gate` raises when ours is wrong, or `truth` gives in float64 what the `probes` give,
    and the error of ours may be at most `limit`.
    """

    op: str
    name: str  # for the table, e.g. "B=32 T=512 H=1024 fp32 fwd+bwd"
    sides: Mapping[str, Side]
    gate: Callable[[], None] | None = None
    truth: Side | None = None
    probes: Mapping[str, Side] | None = None  # on a problem small enough for float64; None: sides
    outputs: tuple[str, ...] = ()  # names of what a probe returns
    limit: float | None = None
    roster: Roster = NOBODY  # the peers among the sides, and those that cannot run
    bounds: tuple[str, ...] = ()  # sides that do a part of the work: no peers
    sizes: Mapping[str, int | str] = field(default_factory=dict)  # the first is the x of a plot
    mode: str = "fwd"  # or "fwd+bwd"
    peers: tuple[str, ...] = ()  # packages whose versions belong to the result
    bytes_moved: int | None = None  # least traffic of one call; gives GB/s
    flops: int | None = None  # of one call; gives GFLOP/s
    formula: str = ""  # how bytes_moved, flops or a budget were computed
    rounds: int = 15
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.gate is None and (self.truth is None or self.limit is None):
            raise ValueError(f"Case: {self.op} needs a gate, or a truth and a limit")


class Judged(NamedTuple):
    """What the first call of a probe showed."""

    errors: dict[str, float]  # of each output against float64
    first_s: float  # how long it took, compilation included


def judge(case: Case) -> dict[str, Judged]:
    """Calls every probe once and compares it with float64.

    Raises:
        AssertionError: ours is wrong.
    """
    if case.gate is not None:
        case.gate()
    if case.truth is None:
        return {}
    truth = case.truth()
    probes = case.sides if case.probes is None else case.probes
    found = {}
    for name, probe in probes.items():
        if name in case.bounds:
            continue
        started = time.perf_counter()
        result = probe()
        seconds = time.perf_counter() - started
        found[name] = Judged(accuracy.relative_errors(result, truth, case.outputs), seconds)
        if name == "ours" and case.limit is not None:
            output, error = accuracy.worst(found[name].errors)
            assert error <= case.limit, f"{case.op} {case.name}: error of {output} is {error:.1e}"
    return found


def _quantiles(times_ms: list[float]) -> dict[str, float]:
    if len(times_ms) == 1:
        times_ms = times_ms * 2
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return {"ms": statistics.median(times_ms), "ms_p20": fifths[0], "ms_p80": fifths[3]}


def _is_due(turn: int, quota: int, rounds: int) -> bool:
    """Whether a side that takes part in `quota` of `rounds` turns takes part in this one."""
    return turn * quota // rounds > (turn - 1) * quota // rounds


def time_sides(
    case: Case, first_s: Mapping[str, float], benchmark: Any = None
) -> dict[str, dict[str, float]]:
    """Median, 20 % and 80 % quantile of each side in ms; on CUDA the median with a hot L2, too.

    Sides that are not in `first_s`, seconds of a first call, get one.  pytest-benchmark, when
    given, times "ours"; the other sides run in its set-up of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    hot: dict[str, list[float]] = {name: [] for name in case.sides}
    first_s = dict(first_s)
    for name, side in case.sides.items():
        if name not in first_s:
            first_s[name] = time_once(side) / 1e3

    def take_turn(name: str) -> None:
        times[name].append(time_once(case.sides[name]))
        if DEVICE.type == "cuda":
            hot[name].append(time_once(case.sides[name], cold=False))

    for name in case.sides:
        take_turn(name)
    allowed = {
        name: min(case.rounds, max(FEWEST_ROUNDS, int(SIDE_BUDGET_MS / t[0])))
        for name, t in times.items()
    }

    def run_others() -> None:
        for name in case.sides:
            if name != "ours" and _is_due(len(times["ours"]), allowed[name], case.rounds):
                take_turn(name)

    rounds = max(case.rounds - 1, 1)
    if benchmark is not None:
        benchmark.pedantic(lambda: take_turn("ours"), setup=run_others, rounds=rounds)
    else:
        for _ in range(rounds):
            run_others()
            take_turn("ours")
    found = {}
    for name, measured in times.items():
        found[name] = {**_quantiles(measured), "rounds": len(measured)}
        if hot[name]:
            found[name]["hot_ms"] = statistics.median(hot[name])
        if name in case.roster.compiled:
            found[name]["compile_s"] = first_s[name] - found[name]["ms"] / 1e3
    return found


def results_file(op: str) -> Path:
    return RESULTS / f"{op}.jsonl"


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none when there is no file."""
    return [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []


def _write(lines: Iterable[Mapping[str, Any]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".tmp")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(out)


def emit(line: Mapping[str, Any], out: Path) -> None:
    """Adds a JSON line to `out`, in place of an older one with the same key."""
    kept = [old for old in read(out) if any(old.get(k) != line.get(k) for k in KEY)]
    _write([*kept, line], out)


def emit_case(lines: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Adds the lines of one case to `out`, in place of all older ones of the case and machine."""
    lines = list(lines)
    key = KEY[0], KEY[1], KEY[3]
    cases = {tuple(line[k] for k in key) for line in lines}
    kept = [old for old in read(out) if tuple(old.get(k) for k in key) not in cases]
    _write([*kept, *lines], out)


def drop_other_cases(ran: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Removes from `out` what this machine measured of the same ops in cases that did not run."""
    cases: dict[tuple[str, str], set[str]] = {}
    for line in ran:
        cases.setdefault((line["op"], line["machine"]), set()).add(line["case"])
    lines = read(out)
    keep = [x for x in lines if x["case"] in cases.get((x["op"], x["machine"]), {x["case"]})]
    if len(keep) < len(lines):
        _write(keep, out)


def error_facts(errors: Mapping[str, float]) -> dict[str, Any]:
    """Errors as JSON can hold them; null is an output with NaN or infinity."""
    if not errors:
        return {}
    name, error = accuracy.worst(dict(errors))
    finite = {k: v if math.isfinite(v) else None for k, v in errors.items()}
    return {"error": error if math.isfinite(error) else None, "error_in": name, "errors": finite}


def _rates(case: Case, ms: float) -> dict[str, float]:
    rates = {}
    if case.bytes_moved is not None:
        rates["gb_per_s"] = case.bytes_moved / ms / 1e6
    if case.flops is not None:
        rates["gflop_per_s"] = case.flops / ms / 1e6
    floor = machine.floor_ms(case.bytes_moved, case.flops)
    if floor is not None:
        rates |= {"floor_ms": floor, "share_of_floor": floor / ms}
    return rates


def run(case: Case, benchmark: Any = None, out: Path | None = None) -> dict[str, dict[str, Any]]:
    """Judges, times and weighs all sides of a case; prints a table and writes JSON lines."""
    if case.roster.compiled:
        forget_compiled_code()
    judged = judge(case)
    load = round(os.getloadavg()[0], 2)
    called = judged if case.probes is None else {}
    timings = time_sides(case, {name: j.first_s for name, j in called.items()}, benchmark)
    ours = timings["ours"]["ms"]
    facts = {"formula": case.formula, "sizes": dict(case.sizes), "mode": case.mode}
    facts |= {"device": DEVICE.type, "load_1min": load, **case.notes}
    facts |= environment((*case.roster.packages, *case.peers))
    lines: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        line = {"op": case.op, "case": case.name, "side": name, **timing}
        line |= {"slower": timing["ms"] / ours, "extra_mb": extra_bytes(case.sides[name]) / 1e6}
        line |= _rates(case, timing["ms"])
        line |= error_facts(judged[name].errors if name in judged else {})
        lines[name] = line | ({"bound": True} if name in case.bounds else {}) | facts
    for name, reason in case.roster.not_run.items():
        lines[name] = {"op": case.op, "case": case.name, "side": name, "not_run": reason, **facts}
    emit_case(lines.values(), out or results_file(case.op))
    show(case, lines)
    if benchmark is not None:
        benchmark.extra_info.update({name: timing["ms"] for name, timing in timings.items()})
    return lines


def show_error(line: Mapping[str, Any]) -> str:
    """Largest error and the output that has it, or a dash."""
    if "error" not in line:
        return "-"
    shown = "not finite" if line["error"] is None else f"{line['error']:.1e}"
    return f"{shown} {line['error_in']}"


def show(case: Case, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the case for people."""
    ours = lines["ours"]
    cold = "cold L2" if DEVICE.type == "cuda" else "caches as they come"
    print(f"\n{case.op}: {case.name}   [{case.formula}]")
    if "floor_ms" in ours:
        roofs = [f"{machine.copy_gb_per_s():.1f} GB/s in a copy"] if case.bytes_moved else []
        roofs += [f"{machine.matmul_gflop_per_s():.0f} GFLOP/s in a product"] if case.flops else []
        print(f"  floor of this machine {ours['floor_ms']:.2f} ms: {', '.join(roofs)}; {cold}")
    width = max(map(len, lines))
    columns = (
        f"{'ms':>9} {'p20-p80':>17} {'hot ms':>9} {'x ours':>7} {'of floor':>8} {'extra MB':>9}"
    )
    print(f"  {'':{width}} {columns}  largest error")
    for name, line in lines.items():
        if "not_run" in line:
            print(f"  {name:{width}} not run: {line['not_run']}")
            continue
        spread = f"{line['ms_p20']:.2f}-{line['ms_p80']:.2f}"
        hot = f"{line['hot_ms']:.3f}" if "hot_ms" in line else "-"
        share = f"{line['share_of_floor']:.0%}" if "share_of_floor" in line else "-"
        compiled = f"; compiled in {line['compile_s']:.0f} s" if "compile_s" in line else ""
        print(
            f"  {name:{width}} {line['ms']:9.3f} {spread:>17} {hot:>9} {line['slower']:7.2f}"
            f" {share:>8} {line['extra_mb']:9.2f}  {show_error(line)}{compiled}"
        )
    versions = ", ".join(f"{k} {v}" for k, v in ours["versions"].items())
    print(f"  {ours['rounds']} rounds of ours; load {ours['load_1min']}; {versions}")


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
    ran = [run(cases[name](), out=args.out)["ours"] for name in args.case or cases]
    if not args.case:
        for op in {line["op"] for line in ran}:
            drop_other_cases(ran, args.out or results_file(op))
