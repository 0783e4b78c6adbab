"""One case of a bench: how wrong each side is, and how long it takes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import accuracy
import torch
from machine import DEVICE, Side, time_once
from peers import Roster

LIMITS = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}  # beyond: plainly wrong
SIDE_BUDGET_MS = 3000.0  # of one case; a peer that needs more runs fewer rounds
FEWEST_ROUNDS = 3
NOBODY = Roster({}, {}, (), (), ())
PEER_ERRORS = (  # what a peer raises on inputs or on a machine that it does not take
    RuntimeError, ValueError, TypeError, AssertionError, ImportError, LookupError, AttributeError,
)  # fmt: skip


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


class FirstCall(NamedTuple):
    """The first call of a side."""

    result: object
    seconds: float  # compilation included
    failure: str = ""


def call_once(name: str, side: Side) -> FirstCall:
    """Calls a side.  That a peer fails is a result; what ours raises is raised."""
    started = time.perf_counter()
    try:
        result = side()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    except PEER_ERRORS as error:
        if name == "ours":
            raise
        text = str(error).strip().splitlines() or [""]
        return FirstCall(None, 0.0, f"failed: {type(error).__name__}: {text[0][:120]}")
    return FirstCall(result, time.perf_counter() - started)


class Judged(NamedTuple):
    """What the first call of a probe showed."""

    errors: dict[str, float]  # of each output against float64
    seconds: float
    failure: str = ""


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
        result, seconds, failure = call_once(name, probe)
        errors = {} if failure else accuracy.relative_errors(result, truth, case.outputs)
        found[name] = Judged(errors, seconds, failure)
        if name == "ours" and case.limit is not None:
            output, error = accuracy.worst(errors)
            assert error <= case.limit, f"{case.op} {case.name}: error of {output} is {error:.1e}"
    return found


def warm_up(case: Case, judged: Mapping[str, Judged]) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the first call of each side, and the sides that failed with the reason."""
    seconds, failures = {}, {}
    for name, side in case.sides.items():
        known = judged.get(name)
        if known is not None and (known.failure or case.probes is None):
            took, failure = known.seconds, known.failure
        else:
            _, took, failure = call_once(name, side)
        if failure:
            failures[name] = failure
        else:
            seconds[name] = took
    return seconds, failures


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
    """Median, 20 % and 80 % quantile of each warm side in ms; on CUDA the median with a hot L2.

    `first_s` are the seconds of the first calls.  pytest-benchmark, when given, times "ours"; the
    other sides run in its set-up of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in case.sides}
    hot: dict[str, list[float]] = {name: [] for name in case.sides}

    def take_turn(name: str) -> None:
        times[name].append(time_once(case.sides[name]))
        if DEVICE.type == "cuda":
            hot[name].append(time_once(case.sides[name], cold=False))

    for name in case.sides:
        take_turn(name)
    allowed = {
        name: case.rounds
        if name in case.bounds
        else min(case.rounds, max(FEWEST_ROUNDS, int(SIDE_BUDGET_MS / t[0])))
        for name, t in times.items()
    }

    order = random.Random(0)  # new in each round: heat and power that one side leaves meet all

    def run(names: list[str]) -> None:
        turn = len(times["ours"])
        order.shuffle(names)
        for name in names:
            if name == "ours" or _is_due(turn, allowed[name], case.rounds):
                take_turn(name)

    others = [name for name in case.sides if name != "ours"]
    rounds = max(case.rounds - 1, 1)
    if benchmark is not None:
        benchmark.pedantic(lambda: take_turn("ours"), setup=lambda: run(others), rounds=rounds)
    else:
        for _ in range(rounds):
            run([*case.sides])
    found = {}
    for name, measured in times.items():
        found[name] = {**_quantiles(measured), "rounds": len(measured)}
        if hot[name]:
            found[name]["hot_ms"] = statistics.median(hot[name])
        if name in case.roster.compiled:
            found[name]["compile_s"] = first_s[name] - found[name]["ms"] / 1e3
    return found
