"""Searches that wait for a slow model: how full its slots are, and how long a tree takes.

    python bench/search_latency.py [--trees 64] [--slots 64] [--simulations 64]

Time is simulated, so nothing here depends on the machine.  An evaluation (the model writes steps, a
tool checks them) takes a random time with a long tail, and some fail and are asked for again.  The
slots are what the model server does at once.  Schedulers, all on the same forest and times:

    as results come    each result is told at once, and a free slot gets the next leaf
    lock-step          a batch fills the slots; the next begins when the last result is there
    one thread a tree  a slot belongs to a tree until it is done

`latency` is the mean time from the start until a tree is done, in seconds; `busy` the share of slot
time in which a slot works; `in flight` what the server sees at once, on average.
"""

import argparse
import heapq
import random
import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tercet import Forest

CHILDREN = 3
SEEDS = (0, 1, 2)


class Setting(NamedTuple):
    trees: int
    slots: int
    simulations: int
    max_in_flight: int = 1
    failing: float = 0.02


class Found(NamedTuple):
    latency: float
    total: float
    busy: float
    in_flight: float


def duration(rng: random.Random) -> float:
    """Seconds of one evaluation: 50 ms to 2 s from the model, 5 to 500 ms from the tool."""
    model = min(2.0, max(0.05, rng.lognormvariate(-1.2, 0.8)))
    return model + min(0.5, max(0.005, rng.lognormvariate(-3.5, 1.2)))


class Run:
    """A forest, a clock, and the evaluations that are on their way."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.rng = setting, random.Random(seed)
        self.forest = Forest(
            max_in_flight=setting.max_in_flight, visits_per_flight=4, max_attempts=100
        )
        self.now = self.worked = 0.0
        self.running: list[tuple[float, int, int]] = []  # end, ticket, handle
        self.done: dict[int, float] = {}  # tree: when

    def add_trees(self, count: int) -> list[int]:
        return [self.forest.add_tree(i, self.setting.simulations) for i in range(count)]

    def start(self, most: int) -> int:
        leaves = self.forest.ask(most)
        for ticket, handle in zip(leaves.ticket.tolist(), leaves.handle.tolist(), strict=True):
            seconds = duration(self.rng)
            self.worked += seconds
            heapq.heappush(self.running, (self.now + seconds, ticket, handle))
        return len(leaves)

    def finish_one(self) -> None:
        self.now, ticket, handle = heapq.heappop(self.running)
        tickets = np.array([ticket], np.uint64)
        if self.rng.random() < self.setting.failing:
            self.forest.fail(tickets)
            return
        rng = random.Random(f"{ticket >> 32} {handle}")
        children = np.array([rng.getrandbits(40) for _ in range(CHILDREN)])
        counts = np.array([CHILDREN], np.uint32)
        self.forest.tell(tickets, np.array([rng.random()]), counts, children)
        if self.forest.is_finished(ticket >> 32):
            self.done[ticket >> 32] = self.now

    def found(self) -> Found:
        slot_time = self.now * self.setting.slots
        return Found(
            statistics.mean(self.done.values()),
            self.now,
            self.worked / slot_time,
            self.worked / self.now,
        )


def as_results_come(setting: Setting, seed: int) -> Found:
    run = Run(setting, seed)
    run.add_trees(setting.trees)
    while len(run.done) < setting.trees:
        run.start(setting.slots - len(run.running))
        run.finish_one()
    return run.found()


def lock_step(setting: Setting, seed: int) -> Found:
    run = Run(setting, seed)
    run.add_trees(setting.trees)
    while len(run.done) < setting.trees:
        run.start(setting.slots)
        while run.running:
            run.finish_one()
    return run.found()


def one_thread_a_tree(setting: Setting, seed: int) -> Found:
    """A tree begins when a slot is free of the one before; it has one evaluation at a time."""
    run = Run(setting._replace(max_in_flight=1), seed)
    begun = len(run.add_trees(min(setting.slots, setting.trees)))
    while len(run.done) < setting.trees:
        run.start(setting.slots - len(run.running))
        before = len(run.done)
        run.finish_one()
        if len(run.done) > before and begun < setting.trees:
            begun += len(run.add_trees(1))
    return run.found()


SCHEDULERS: dict[str, Callable[[Setting, int], Found]] = {
    "as results come": as_results_come,
    "lock-step": lock_step,
    "one thread a tree": one_thread_a_tree,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trees", type=int, default=64)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--simulations", type=int, default=64)
    args = parser.parse_args()
    print(f"{'':40} latency (3 seeds)    total    busy  in flight")
    for in_flight in (1, 4):
        setting = Setting(args.trees, args.slots, args.simulations, in_flight)
        for name, schedule in SCHEDULERS.items():
            if in_flight > 1 and schedule is one_thread_a_tree:
                continue  # has one
            found = [schedule(setting, seed) for seed in SEEDS]
            mean = Found(*(statistics.mean(values) for values in zip(*found, strict=True)))
            low, high = min(f.latency for f in found), max(f.latency for f in found)
            label = f"{name}, at most {in_flight} of a tree out"
            print(
                f"{label:40}{mean.latency:7.1f} ({low:.1f}-{high:.1f}){mean.total:9.1f}"
                f"{mean.busy:8.0%}{mean.in_flight:11.1f}"
            )


if __name__ == "__main__":
    main()
