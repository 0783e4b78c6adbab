"""Every rule, backup and kind of ticket of the forest against plain Python, bit for bit.

    python tests/bindings/test_forest_rules.py 100000

compares as many random searches; the test below a few.
"""

import math
import multiprocessing
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tercet import Forest, RewardConfig, RewardForm

HERE = Path(__file__).parent
worlds = SimpleNamespace(**runpy.run_path(str(HERE / "random_search.py")))
KINDS = ("evaluate", "expand", "verify")


def forest_of(settings: Any) -> Forest:
    chosen: dict[str, Any] = dict(vars(settings))
    reward = vars(chosen["reward"])
    chosen["reward"] = RewardConfig(**reward | {"form": getattr(RewardForm, reward["form"])})
    return Forest(**chosen)


def add(forest: Forest, tree: Any) -> int:
    bounds = {name: x for name, x in vars(tree.budgets).items() if x is not None}
    return forest.add_tree(tree.root_handle, tree.simulations, seed=tree.seed, **bounds)


class Worker:
    """Answers tickets of trees as their worlds say."""

    def __init__(self, forest: Forest, trees: dict[int, Any], rng: random.Random):
        self.forest, self.trees, self.rng = forest, trees, rng
        self.priors = worlds.reads_priors(forest.settings)
        self.asked: dict[tuple[int, int, str], int] = {}  # tickets that a node had, by kind
        self.found: dict[int, Any] = {}  # what each ticket finds
        self.failures: dict[int, int] = {}
        self.out: list[tuple[int, str]] = []

    def take(self, leaves: Any) -> None:
        rows = zip(
            *(c.tolist() for c in (leaves.ticket, leaves.tree, leaves.node, leaves.kind)),
            leaves.handle.tolist(),
            leaves.attempt.tolist(),
            strict=True,
        )
        for ticket, tree, node, number, handle, attempt in rows:
            kind = KINDS[number]
            if ticket not in self.found:
                nth = self.asked.get((tree, node, kind), 0)
                self.asked[tree, node, kind] = nth + 1
                self.found[ticket] = self.trees[tree].look(kind, handle, nth)
            assert attempt == self.failures.get(ticket, 0) + 1
            self.out.append((ticket, kind))

    def answer(self) -> None:
        """Some of what is out, in any order."""
        self.rng.shuffle(self.out)
        now = self.rng.randint(0, len(self.out))
        batch, self.out = self.out[:now], self.out[now:]
        told: dict[str, list[int]] = {}
        for ticket, kind in batch:
            found = self.found[ticket]
            failures = self.failures.get(ticket, 0)
            if failures < min(found.fails, self.forest.settings["max_attempts"]):
                self.failures[ticket] = failures + 1
                given_up = failures + 1 == self.forest.settings["max_attempts"]
                costs = np.array([found.cost]) if given_up else None
                self.forest.fail(np.array([ticket], np.uint64), costs=costs)
            elif found.cancelled:
                told.setdefault("cancel", []).append(ticket)
            elif kind == "verify" and found.verdicts is not None:
                self.tell_rollout(ticket, found)
            else:
                told.setdefault(kind, []).append(ticket)
        for how, tickets in told.items():
            getattr(self, how)(tickets)

    def cancel(self, tickets: list[int]) -> None:
        costs = np.array([self.found[ticket].cost for ticket in tickets])
        self.forest.cancel(np.array(tickets, np.uint64), costs=costs)

    def evaluate(self, tickets: list[int]) -> None:
        _, counts, handles, children = self.children(tickets)
        told = self.values(tickets) | children
        values = told.pop("values")
        self.forest.tell(np.array(tickets, np.uint64), values, counts, handles, **told)

    def expand(self, tickets: list[int]) -> None:
        costs, counts, handles, children = self.children(tickets)
        self.forest.tell_children(
            np.array(tickets, np.uint64), counts, handles, **children, costs=costs
        )

    def verify(self, tickets: list[int]) -> None:
        self.forest.tell_values(np.array(tickets, np.uint64), **self.values(tickets))

    def children(self, tickets: list[int]) -> Any:
        found = [self.found[ticket] for ticket in tickets]
        told = [priors for f in found for priors in (f.priors or ())]
        ends = [end for f in found for end in (f.terminal or [False] * len(f.handles))]
        handles = np.array([h for f in found for h in f.handles], np.int64)
        return (
            np.array([f.cost for f in found]),
            np.array([len(f.handles) for f in found], np.uint32),
            handles,
            {
                # An end among leaves with priors has none to tell; all or none have them.
                "priors": np.array(told, np.float32)
                if self.priors and len(told) == len(handles) and told
                else None,
                "terminal": np.array(ends, bool) if any(ends) else None,
            },
        )

    def values(self, tickets: list[int]) -> dict[str, Any]:
        found = [self.found[ticket] for ticket in tickets]
        channels = np.array([f.channel_values for f in found])
        return {
            "values": np.array([f.value for f in found]),
            "outcomes": np.array([f.outcome for f in found]),
            "channels": channels if channels.size else None,
            "costs": np.array([f.cost for f in found]),
        }

    def tell_rollout(self, ticket: int, found: Any) -> None:
        """Verdicts one by one, and the outcome at any time among them."""
        parts = [-1, *range(len(found.verdicts))]
        self.rng.shuffle(parts)
        for step in parts:
            if step >= 0:
                self.forest.tell_verdicts(
                    np.array([ticket], np.uint64),
                    np.array([step], np.uint32),
                    np.array([found.verdicts[step]]),
                )
            else:
                self.forest.tell_outcome(
                    np.array([ticket], np.uint64),
                    np.array([len(found.verdicts)], np.uint32),
                    np.array([found.outcome]),
                    start_verdicts=np.array([found.start_verdict]),
                    costs=np.array([found.cost]),
                )


def drive(forest: Forest, trees: dict[int, Any], rng: random.Random, most: int = 6) -> Forest:
    worker = Worker(forest, trees, rng)
    while (counters := worker.forest.counters()).finished < counters.trees:
        worker.take(worker.forest.ask(rng.randint(0, most)))
        worker.answer()
        if rng.random() < 0.05:
            worker.forest = Forest.from_bytes(worker.forest.to_bytes())
        assert worker.forest.counters().in_flight == len(worker.out)
    assert counters.waiting == 0
    return worker.forest


def bits(x: float) -> int:
    """Equal for equal floats; not for zeros of two signs; for all NaNs."""
    return 0 if math.isnan(x) else np.float64(x).view(np.int64).item()


def compared(forest: Forest, number: int, tree: Any) -> None:
    columns, status = forest.columns(number), forest.status(number)
    below: dict[int, list[int]] = {}
    for i, parent in enumerate(columns.parent.tolist()):
        below.setdefault(parent, []).append(i)
    seen, stack = 0, [(below[-1][0], tree.root)]
    while stack:
        i, node = stack.pop()
        seen += 1
        ours = (
            columns.handle[i],
            columns.visits[i],
            columns.in_flight[i],
            bool(columns.terminal[i]),
            bool(columns.closed[i]),
            bits(columns.total[i]),
            [bits(x) for x in columns.channels[i]],
        )
        assert ours == (
            node.handle,
            node.visits,
            0,
            node.terminal,
            node.closed,
            bits(node.total),
            [bits(x) for x in node.channels],
        )
        if not math.isnan(columns.prior[i]):
            assert columns.prior[i] == node.prior
        if tree.settings.tickets != "together":
            assert bits(columns.verdict[i]) == bits(node.verdict)
        children = below.get(i, [])
        assert len(children) == len(node.children)
        stack += zip(children, node.children, strict=True)
    assert seen == len(columns) == len(tree.nodes)
    assert status.stop_reason == tree.reason
    assert (status.committed, status.evaluations) == (tree.committed, tree.evaluations)
    assert (status.positives, status.negatives) == (tree.positives, tree.negatives)
    spent = [getattr(status.spent, name) for name in tuple(tree.spent)[2:]]
    assert spent == list(tree.spent.values())[2:]
    taken, wanted = forest.choice(number), tree.choice()
    assert taken == (None if wanted is None else columns.node[below[0][wanted]])


def same_search(seed: int) -> str:
    """One random search, done twice; what differs."""
    rng = random.Random(f"search {seed}")
    tree = worlds.random_search(rng)
    forest = forest_of(tree.settings)
    number = add(forest, tree)
    try:
        tree.run()
        forest = drive(forest, {number: tree}, rng)
        compared(forest, number, tree)
        assert forest.counters().merged == tree.merged
    except Exception as error:
        error.add_note(f"seed {seed}: {tree.settings}")
        raise
    return ""


@pytest.mark.parametrize("first", range(0, 1600, 200))
def test_random_searches_are_those_of_plain_python(first):
    for seed in range(first, first + 200):
        same_search(seed)


if __name__ == "__main__":
    count = int(sys.argv[1])
    with multiprocessing.Pool() as pool:
        for done, _ in enumerate(pool.imap_unordered(same_search, range(count), 50), 1):
            if done % 10_000 == 0:
                sys.stdout.write(f"{done} searches are the same\n")
                sys.stdout.flush()
