"""What every bench shares: runs cases, prints them for people, writes JSON lines.

A bench file lists its cases and ends with

    test_speed = harness.as_test(CASES)          # pytest bench/<op>.py --benchmark-only
    if __name__ == "__main__":
        harness.main(CASES)                      # python bench/<op>.py

A case is judged before it is timed: wrong is not fast.  One round runs the sides in turn, in an
order of its own, so that a busy or hot machine slows all of them alike; slow sides sit out some
rounds.  Times are medians; `slower` is the median of a side divided by the median of "ours".
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accuracy
import machine
import pytest
from lines import RESULTS, drop_other_cases, emit, emit_case, read, results_file, shown
from machine import DEVICE, DTYPE, Side, environment, extra_bytes
from measure import LIMITS, Case, judge, time_sides, warm_up
from peers import Peer, Roster, forget_compiled_code, remedy, roster

__all__ = [
    "DEVICE", "DTYPE", "LIMITS", "RESULTS", "Case", "Peer", "Roster", "Side", "as_test",
    "drop_other_cases", "emit", "emit_case", "environment", "extra_bytes", "judge", "main", "read",
    "remedy", "results_file", "roster", "run", "time_sides", "warm_up", "wrote",
]  # fmt: skip

LEGEND = """
ms            median of the rounds; p20-p80: a fifth of them took less, a fifth more
x ours        ms over that of ours: below 1 the side is faster than we are
of floor      share of what this machine's memory or products allow at best
extra MB      most memory beyond arguments and results, in 1e6 bytes
largest error against float64, as a share of its row's largest value, and the output it is in;
              dx is the gradient of x
compiled      seconds of torch.compile's first call, not in ms"""
HOT = (
    "hot ms        the same with what the side reads still in the L2 cache; for ms it is emptied\n"
)


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
    first_s, failures = warm_up(case, judged)
    case = replace(case, sides={name: case.sides[name] for name in first_s})
    load = round(os.getloadavg()[0], 2)
    timings = time_sides(case, first_s, benchmark)
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
    for name, reason in (case.roster.not_run | failures).items():
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
    size = "not finite" if line["error"] is None else f"{line['error']:.1e}"
    return f"{size} in {line['error_in']}"


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
    hot = f" {'hot ms':>9}" if "hot_ms" in ours else ""
    columns = f"{'ms':>9} {'p20-p80':>17}{hot} {'x ours':>7} {'of floor':>8} {'extra MB':>9}"
    print(f"  {'':{width}} {columns}  largest error")
    for name, line in lines.items():
        if "not_run" in line:
            print(f"  {name:{width}} not run: {line['not_run']}")
            continue
        spread = f"{line['ms_p20']:.2f}-{line['ms_p80']:.2f}"
        hot = f" {line['hot_ms']:9.3f}" if "hot_ms" in line else ""
        share = f"{line['share_of_floor']:.0%}" if "share_of_floor" in line else "-"
        compiled = f"; compiled in {line['compile_s']:.0f} s" if "compile_s" in line else ""
        print(
            f"  {name:{width}} {line['ms']:9.3f} {spread:>17}{hot} {line['slower']:7.2f}"
            f" {share:>8} {line['extra_mb']:9.2f}  {show_error(line)}{compiled}"
        )
    versions = ", ".join(f"{k} {v}" for k, v in ours["versions"].items())
    print(f"  {ours['rounds']} rounds of ours; load {ours['load_1min']}; {versions}")


def wrote(*files: Path, absent: Iterable[str] = ()) -> str:
    """What a bench says last: where its results are, and how to add the peers that it lacked."""
    lines = [remedy(absent), f"wrote {', '.join(map(shown, files))}"]
    return "\n".join(line for line in lines if line)


def as_test(cases: Mapping[str, Callable[[], Case]]) -> Callable[..., None]:
    """A pytest-benchmark test with one parameter per case; run pytest with -s to see the tables."""

    @pytest.mark.parametrize("name", list(cases))
    @pytest.mark.filterwarnings("default")
    def test(name: str, benchmark: Any) -> None:
        run(cases[name](), benchmark)

    return test


def without(case: Case, skip: Iterable[str]) -> Case:
    """The case without some of its peers, which are listed as not run."""
    skipped = {name: "left out by --skip" for name in skip if name in case.sides}
    if "ours" in skipped:
        raise ValueError("harness: ours is what the others are compared with; leave it in")

    def kept(sides: Mapping[str, Side]) -> dict[str, Side]:
        return {name: side for name, side in sides.items() if name not in skipped}

    left = case.roster._replace(
        not_run=case.roster.not_run | skipped,
        compiled=tuple(name for name in case.roster.compiled if name not in skipped),
    )
    probes = None if case.probes is None else kept(case.probes)
    return replace(case, sides=kept(case.sides), probes=probes, roster=left)


def busy() -> str:
    """A warning where more wants to run on the CPU than it has cores, else an empty text."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return ""
    return f"warning: load {load:.1f} on {cores} cores, the machine is busy: figures will be off"


def progress(done: int, total: int, seconds: float) -> str:
    """How far a bench is, and seconds left were the other cases like those that ran."""
    left = seconds / done * (total - done)
    return f"  {done} of {total} cases in {seconds:.0f} s; about {left:.0f} s left"


def main(cases: Mapping[str, Callable[[], Case]]) -> None:
    """Runs the cases named on the command line, or all; --list only names them."""
    try:
        _main(cases)
    except KeyboardInterrupt:
        sys.exit("stopped; the cases that ran are written")


def _main(cases: Mapping[str, Callable[[], Case]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", nargs="*", help="default: all")
    parser.add_argument(
        "--out", type=Path, help="JSON lines file (default: bench/results/OP.jsonl)"
    )
    parser.add_argument("--rounds", type=int, help="fewer or more than a case's own")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="SIDE", help='peers to leave out, "torch.compile"'
    )
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    args = parser.parse_args()
    if unknown := [case for case in args.case if case not in cases]:
        parser.error(f"case must be one of {', '.join(cases)}; got {', '.join(unknown)}")
    if args.list:
        print(*cases, sep="\n")
        return
    if warning := busy():
        print(warning)
    ran, absent, names, start = [], [], args.case or list(cases), time.perf_counter()
    for name in names:
        case = without(cases[name](), args.skip)
        case = replace(case, rounds=args.rounds or case.rounds)
        absent += case.roster.absent
        ran.append(run(case, out=args.out)["ours"])
        print(progress(len(ran), len(names), time.perf_counter() - start))
    files = dict.fromkeys(args.out or results_file(line["op"]) for line in ran)
    if not args.case:
        for file in files:
            drop_other_cases(ran, file)
    print(LEGEND.replace("x ours", HOT + "x ours") if DEVICE.type == "cuda" else LEGEND)
    print(wrote(*files, absent=absent))
