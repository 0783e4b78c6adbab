"""Simulations per CPU second of the search core, through Python, beside searches in Python.

    python bench/search.py [--repeats 5] [--out FILE]

Workload: k = 4 children, depth limit 12, a state is a 32-bit hash whose top 24 bits are its value;
a simulation descends, looks at the leaf, gives it children and backs its value up (mcts and
treequest make one node per simulation).  Looking is the caller's work and is not counted: the
seconds are those of ask and tell, of the process, so that a busy machine shows less.  Best and
median of the repeats; bytes are those of the nodes that exist, and what the process grew by.
"""

import argparse
import os
import runpy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from lines import RESULTS, emit_case
from machine import environment, installed
from search_peers import CHILDREN, DEPTH, PEERS

from tercet import Forest

STEP = np.arange(1, CHILDREN + 1, dtype=np.uint32) * np.uint32(0x9E3779B9)
ORACLE = Path(__file__).parents[1] / "tests" / "bindings" / "oracle.py"
CASES = [  # trees, simulations of each, settings
    (1, 1024, {}),
    (64, 1024, {}),
    (1024, 1024, {}),
    (64, 1024, {"max_in_flight": 16}),
    (64, 1024, {"rule": "puct"}),
    (64, 1024, {"rule": "gumbel"}),
    (64, 1024, {"backup": "max", "gamma": 0.9}),
    (16, 256, {}),
    (16, 4096, {}),
    (16, 16_384, {}),
    (100_000, 64, {}),
]


def mixed(x: np.ndarray) -> np.ndarray:
    """A hash of 32 bits, in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def look(handles: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, numbers of children and handles of the children of a batch of leaves."""
    state = handles.astype(np.uint32)
    values = (mixed(state.copy()) >> np.uint32(8)) / 2.0**24
    ends = depth >= DEPTH
    children = mixed(state[~ends, None] + STEP)
    return values, np.where(ends, 0, CHILDREN).astype(np.uint32), children.astype(np.int64).ravel()


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grow(trees: int, simulations: int, options: dict[str, Any]) -> tuple[Forest, float]:
    """The finished forest, and CPU seconds of ask and tell."""
    forest, clock = Forest(**options), time.process_time
    for tree in range(trees):
        forest.add_tree(7919 * tree + 1, simulations)
    most = trees * options.get("max_in_flight", 1)
    started = clock()
    leaves = forest.ask(most)
    seconds = clock() - started
    while len(leaves):
        results = look(leaves.handle, leaves.depth)
        tickets = leaves.ticket
        started = clock()
        forest.tell(tickets, *results)
        leaves = forest.ask(most)
        seconds += clock() - started
    return forest, seconds


def plain(simulations: int, options: dict[str, int]) -> float:
    """CPU seconds of one plain Python search, those of looking taken off."""
    search = runpy.run_path(str(ORACLE))["PlainSearch"]
    looking, depths = 0.0, {1: 0}
    clock = time.process_time

    def found(handle: int) -> tuple[float, list[int]]:
        nonlocal looking
        started = clock()
        depth = depths[handle]
        values, _, children = look(np.array([handle]), np.array([depth]))
        depths.update(dict.fromkeys(children.tolist(), depth + 1))
        looking += clock() - started
        return float(values[0]), children.tolist()

    started = clock()
    search(found, simulations, **options).run(1)
    return clock() - started - looking


def measured(trees: int, simulations: int, options: dict[str, int], repeats: int) -> list[dict]:
    """One line per side."""
    label = "".join(f", {name}={value}" for name, value in options.items())
    facts = {"op": "search", "case": f"{trees} trees of {simulations} simulations{label}"}
    facts |= {
        "repeats": repeats,
        "device": "cpu",
        **environment(tuple(p for _, p in PEERS.values())),
    }
    rates, grown, forest = [], [], None
    for _ in range(repeats):
        forest = None  # its memory goes before the next one's comes
        before = resident()
        forest, seconds = grow(trees, simulations, options)
        grown.append(resident() - before)
        rates.append(forest.counters().simulations / seconds)
    assert forest is not None
    counters = forest.counters()
    per_simulation = 25 * counters.nodes / counters.simulations
    sides = {"ours": rates}
    if trees == 1:
        sides["plain Python"] = [simulations / plain(simulations, options) for _ in range(repeats)]
        for name, (search, package) in PEERS.items():
            if installed(package) is not None:
                sides[name] = [simulations / search(simulations) for _ in range(repeats)]
    return [
        facts
        | {"side": side, "best_per_s": max(found), "median_per_s": statistics.median(found)}
        | ({"bytes_per_simulation": per_simulation, "grown": max(grown)} if side == "ours" else {})
        for side, found in sides.items()
    ]


def not_run() -> str:
    """How to add the peers that are missing."""
    absent = [package for _, package in PEERS.values() if installed(package) is None]
    return f"not run, not installed: pip install {' '.join(absent)}" if absent else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "search.jsonl")
    args = parser.parse_args()
    print(
        f"{'million simulations per CPU second':58}    best  median  bytes per simulation, grown by"
    )
    for trees, simulations, options in CASES:
        lines = measured(trees, simulations, options, args.repeats)
        emit_case(lines, args.out)
        for line in lines:
            memory = ""
            if "grown" in line:
                memory = f"{line['bytes_per_simulation']:.0f}, {line['grown'] / 1e6:.0f} MB"
            print(
                f"{line['case'] + ', ' + line['side']:58}{line['best_per_s'] / 1e6:7.3f}"
                f"{line['median_per_s'] / 1e6:8.3f}  {memory}"
            )
            sys.stdout.flush()
    print(not_run())


if __name__ == "__main__":
    main()
