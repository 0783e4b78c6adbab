"""The forest, node for node and bit for bit against plain Python, in any order of results."""

import math
import random
import runpy
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet import Forest, LateTicketError, RepeatedTicketError, TicketError, UnknownTicketError

PlainSearch = runpy.run_path(str(Path(__file__).with_name("oracle.py")))["PlainSearch"]
FIELDS = ("parent", "visits", "total", "handle", "terminal")


@dataclass
class World:
    """What lies behind a handle, decided by the handle alone."""

    seed: int = 0
    most: int = 5
    ends: float = 0.15  # share of leaves without children
    scale: float = 1.0
    looked: dict[int, tuple[float, list[int]]] = field(default_factory=dict)

    def look(self, handle: int) -> tuple[float, list[int]]:
        if handle not in self.looked:
            rng = random.Random(f"{self.seed} {handle}")
            count = 0 if rng.random() < self.ends else rng.randint(1, self.most)
            children = [rng.getrandbits(62) for _ in range(count)]
            self.looked[handle] = self.scale * (2 * rng.random() - 1), children
        return self.looked[handle]


def tell(forest, world, tickets, handles):
    found = [world.look(int(handle)) for handle in handles]
    forest.tell(
        np.array(tickets, np.uint64),
        np.array([value for value, _ in found], np.float64),
        np.array([len(children) for _, children in found], np.uint32),
        np.array([child for _, children in found for child in children], np.int64),
    )


def drive(forest, world, rng, most=7):
    """Batches of any size; results come back late, in parts and in any order."""
    out = []
    while True:
        leaves = forest.ask(rng.randint(0, most))
        out += zip(leaves.ticket.tolist(), leaves.handle.tolist(), strict=True)
        rng.shuffle(out)
        now = rng.randint(0, len(out))
        if now:
            tell(forest, world, *zip(*out[:now], strict=True))
            del out[:now]
        counters = forest.counters()
        assert counters.in_flight == len(out)
        if counters.finished == counters.trees:
            assert counters.waiting == len(out) == 0
            return


def columns_of(nodes):
    """The oracle's tree as a forest's columns."""
    at = {id(node): i for i, node in enumerate(nodes)}
    return {
        "parent": [-1 if n.parent is None else at[id(n.parent)] for n in nodes],
        "visits": [n.visits for n in nodes],
        "total": [n.total for n in nodes],
        "handle": [n.handle for n in nodes],
        "terminal": [n.end_value is not None for n in nodes],
    }


def same(forest, tree, nodes):
    ours, wanted = forest.columns(tree), columns_of(nodes)
    for name in FIELDS:
        assert getattr(ours, name).tolist() == wanted[name], name
    assert not ours.in_flight.any()


OPTIONS = [
    {},
    {"c_uct": 0.0},
    {"c_uct": 10.0, "max_in_flight": 4, "visits_per_flight": 1},
    {"max_in_flight": 3, "visits_per_flight": 5},
    {"max_in_flight": 255, "visits_per_flight": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ends", [0.0, 0.15, 0.6])
def test_grows_the_trees_of_the_oracle_in_any_order_of_results(options, ends):
    rng = random.Random(f"{options} {ends}")
    for seed in range(12):
        world = World(seed, most=rng.choice([1, 3, 4, 9]), ends=ends, scale=rng.choice([1, 1e6]))
        forest = Forest(**options)
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 6))]
        roots = [rng.getrandbits(60) for _ in sizes]
        trees = [forest.add_tree(root, size) for root, size in zip(roots, sizes, strict=True)]
        drive(forest, world, rng)
        for tree, root, size in zip(trees, roots, sizes, strict=True):
            same(forest, tree, PlainSearch(world.look, size, **options).run(root))


def test_a_tree_in_memory_of_a_removed_one():
    world, rng = World(5, most=4, ends=0.0), random.Random(0)
    forest = Forest()
    first = forest.add_tree(1, 200)
    drive(forest, world, rng)
    forest.remove_tree(first)
    tree = forest.add_tree(2, 3000)  # more than the first had: all of its memory, and more
    drive(forest, world, rng)
    same(forest, tree, PlainSearch(world.look, 3000).run(2))


def test_a_deep_tree_of_many_blocks():
    world = World(3, most=64, ends=0.05)
    forest = Forest(max_in_flight=16)
    tree = forest.add_tree(1, 3000)
    drive(forest, world, random.Random(0), most=40)
    same(forest, tree, PlainSearch(world.look, 3000, max_in_flight=16).run(1))
    columns = forest.columns(tree)
    assert columns.depth[0] == 0
    below = columns.parent[1:]
    assert (columns.depth[1:] == columns.depth[below] + 1).all()
    children = np.bincount(below, weights=columns.visits[1:], minlength=len(columns))
    grown = np.bincount(below, minlength=len(columns)) > 0
    assert (columns.visits[grown] == 1 + children[grown]).all()


def test_leaves_say_where_they_lie():
    forest = Forest(max_in_flight=8, visits_per_flight=1)
    tree = forest.add_tree(77, 50)
    first = forest.ask(5)
    assert len(first) == 1
    assert [getattr(first, name).tolist() for name in ("tree", "depth", "handle", "attempt")] == [
        [tree], [0], [77], [1],
    ]  # fmt: skip
    assert len(forest.ask(5)) == 0  # the root alone
    forest.tell(first.ticket, np.zeros(1), np.array([3], np.uint32), np.array([5, 6, 7]))
    second = forest.ask(1)
    assert second.handle.tolist() == [5]  # the first of those that nobody visits
    assert second.depth.tolist() == [1]
    columns = forest.columns(tree)
    assert columns.handle[columns.node == second.node[0]].tolist() == [5]
    assert columns.in_flight.tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        second.handle[0] = 1


def test_a_batch_outlives_its_forest():
    forest = Forest()
    forest.add_tree(9, 1)
    ticket = forest.ask(1).ticket
    del forest
    assert ticket.tolist() == [0]


def test_no_pending_leaf_is_handed_out_twice_and_the_cap_grows():
    world, forest = World(ends=0.0, most=3), Forest(max_in_flight=6, visits_per_flight=8)
    tree = forest.add_tree(1, 200)
    most = []
    while not forest.is_finished(tree):
        leaves = forest.ask(100)
        assert len(set(leaves.node.tolist())) == len(leaves)
        allowed = min(6, 1 + forest.counters().simulations // 8)
        assert 1 <= len(leaves) <= allowed
        most.append(len(leaves))
        tell(forest, world, leaves.ticket[::-1], leaves.handle[::-1])
    assert max(most) == 6
    assert most[0] == 1


def test_an_end_is_visited_again_without_being_asked_about():
    forest = Forest()
    tree = forest.add_tree(1, 10)
    leaves = forest.ask(1)
    forest.tell(leaves.ticket, np.array([0.25]), np.zeros(1, np.uint32), np.zeros(0, np.int64))
    assert len(forest.ask(1)) == 0
    assert forest.is_finished(tree)
    columns, counters = forest.columns(tree), forest.counters()
    assert columns.visits.tolist() == [10]
    assert columns.total.tolist() == [2.5]
    assert (counters.simulations, counters.evaluations) == (10, 1)


def test_a_failed_evaluation_is_asked_for_again_and_changes_nothing():
    world, rng = World(ends=0.1), random.Random(5)
    options: dict[str, Any] = {"max_in_flight": 4, "visits_per_flight": 1}
    forest = Forest(max_attempts=4, **options)
    trees = [forest.add_tree(root, 40) for root in (3, 4)]
    failures = 0
    while forest.counters().finished < 2:
        leaves = forest.ask(5)
        bad = np.array([a < 4 and rng.random() < 0.4 for a in leaves.attempt], bool)
        failures += int(bad.sum())
        forest.fail(leaves.ticket[bad])
        tell(forest, world, leaves.ticket[~bad], leaves.handle[~bad])
    assert failures > 20
    assert (forest.counters().failures, forest.counters().given_up) == (failures, 0)
    for tree, root in zip(trees, (3, 4), strict=True):
        same(forest, tree, PlainSearch(world.look, 40, **options).run(root))


def test_a_leaf_that_always_fails_is_an_end():
    world = World(ends=0.0, most=3)
    bad = world.look(1)[1][0]
    forest = Forest(max_attempts=2, failed_value=-0.5)
    tree = forest.add_tree(1, 30)
    attempts = []
    while len(leaves := forest.ask(1)):
        if leaves.handle[0] == bad:
            attempts.append(int(leaves.attempt[0]))
            forest.fail(leaves.ticket)
        else:
            tell(forest, world, leaves.ticket, leaves.handle)
    assert attempts == [1, 2]
    assert forest.is_finished(tree)
    assert (forest.counters().failures, forest.counters().given_up) == (2, 1)
    look = lambda handle: (-0.5, []) if handle == bad else world.look(handle)  # noqa: E731
    same(forest, tree, PlainSearch(look, 30).run(1))


def _asked(**options):
    forest = Forest(max_in_flight=4, visits_per_flight=1, **options)
    forest.add_tree(1, 100)
    forest.add_tree(2, 100)
    leaves = forest.ask(2)
    tell(forest, World(ends=0.0, most=4), leaves.ticket, leaves.handle)
    return forest, forest.ask(4)


def _results(tickets, count=2):
    n = len(tickets)
    return (
        np.array(tickets, np.uint64), np.zeros(n), np.full(n, count, np.uint32),
        np.arange(count * n),
    )  # fmt: skip


def _state(forest):
    counted = forest.counters()
    return [
        [getattr(forest.columns(tree), name).tolist() for name in (*FIELDS, "in_flight")]
        for tree in (0, 1)
    ], (counted.simulations, counted.in_flight, counted.nodes, counted.failures)


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        ((7 << 32), UnknownTicketError, f"ticket {7 << 32} of tree 7 was never issued"),
        (9, UnknownTicketError, "ticket 9 of tree 0 was never issued"),
        (0, RepeatedTicketError, "ticket 0 of tree 0 has been told already"),
        (None, RepeatedTicketError, "has been told already"),  # twice in one call
    ],
)
@pytest.mark.parametrize("failing", [False, True])
def test_a_bad_ticket_changes_nothing(bad, error, match, failing):
    forest, leaves = _asked()
    before = _state(forest)
    good = leaves.ticket.tolist()
    tickets = [*good, good[0] if bad is None else bad]
    with pytest.raises(error, match=match) as caught:
        forest.fail(np.array(tickets, np.uint64)) if failing else forest.tell(*_results(tickets))
    assert isinstance(caught.value, TicketError)
    assert caught.value.ticket == tickets[-1]
    assert caught.value.tree == tickets[-1] >> 32
    assert _state(forest) == before
    forest.tell(*_results(good))
    assert forest.counters().in_flight == 0


def test_a_ticket_of_a_removed_tree_is_late():
    forest, leaves = _asked()
    before = forest.counters().nodes
    held = len(forest.columns(1))
    forest.remove_tree(1)
    counters = forest.counters()
    assert (counters.trees, counters.nodes) == (1, before - held)
    mine = leaves.ticket[leaves.tree == 1]
    assert counters.in_flight == len(leaves) - len(mine) > 0
    with pytest.raises(LateTicketError, match="of tree 1 is of a tree that was removed"):
        forest.tell(*_results(mine))
    for use in (forest.columns, forest.remove_tree, forest.is_finished):
        with pytest.raises(IndexError, match="tree 1 was removed"):
            use(1)
        with pytest.raises(IndexError, match="tree 2 does not exist"):
            use(2)


def test_removed_trees_make_room():
    forest = Forest(max_bytes=8 << 20)
    world, rng = World(ends=0.0, most=4), random.Random(0)
    wanted = PlainSearch(world.look, 1500).run(1)
    for _ in range(30):
        tree = forest.add_tree(1, 1500)
        drive(forest, world, rng)
        assert forest.counters().bytes <= 8 << 20
        same(forest, tree, wanted)
        forest.remove_tree(tree)
    assert forest.counters().nodes == 0


def test_too_many_nodes_are_refused_before_anything_changes():
    forest = Forest(max_bytes=7 << 20)
    forest.add_tree(1, 100_000)
    slabs = (1 << 18) // 64  # of a chunk; the root has one of them
    leaves = forest.ask(1)
    for _ in range(slabs - 1):
        forest.tell(*_results(leaves.ticket, 64))
        leaves = forest.ask(1)
    before = forest.counters()
    with pytest.raises(ValueError, match=r"another chunk would pass max_bytes = 7340032; remove"):
        forest.tell(*_results(leaves.ticket, 64))
    assert forest.counters().simulations == before.simulations
    assert forest.columns(0).visits[0] == before.simulations
    forest.tell(*_results(leaves.ticket, 0))  # an end takes no room
    assert forest.counters().simulations == before.simulations + 1
    with pytest.raises(ValueError, match="max_bytes"):
        Forest(max_bytes=100).add_tree(1, 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: np.zeros(1, np.int64)}, TypeError, "tell: tickets must be uint64, got int64"),
        ({1: np.zeros(1, np.float32)}, TypeError, "tell: values must be float64, got float32"),
        ({2: np.ones(1, np.int32)}, TypeError, "tell: num_children must be uint32, got int32"),
        ({3: np.ones(2)}, TypeError, "tell: handles must be int64, got float64"),
        ({1: np.zeros((1, 1))}, ValueError, "tell: values must be one-dimensional, got shape"),
        ({3: np.zeros(4, np.int64)[::2]}, ValueError, "handles must be contiguous, got strides"),
        ({1: np.zeros(2)}, ValueError, "tell: values must have 1 elements, got 2"),
        ({2: np.ones(2, np.uint32)}, ValueError, "num_children must have 1 elements, got 2"),
        ({1: np.array([math.nan])}, ValueError, r"in \[-1e300, 1e300\], got nan at 0"),
        ({1: np.array([-math.inf])}, ValueError, r"in \[-1e300, 1e300\], got -inf at 0"),
        ({1: np.frombuffer(bytes(9), np.float64, offset=1)}, ValueError, "values must be aligned"),
        ({2: np.array([65], np.uint32)}, ValueError, "num_children must be <= 64, got 65 at 0"),
        ({3: np.zeros(3, np.int64)}, ValueError, "tell: handles must have 2 elements, got 3"),
    ],
)
def test_tell_refuses(change, error, match):
    forest, leaves = _asked()
    before = _state(forest)
    arguments: list[Any] = list(_results(leaves.ticket[:1]))
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=match):
        forest.tell(*arguments)
    assert _state(forest) == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"c_uct": -1.0}, "c_uct must be finite and >= 0, got -1"),
        ({"c_uct": math.nan}, "c_uct must be finite"),
        ({"max_in_flight": 0}, r"max_in_flight must be in \[1, 255\], got 0"),
        ({"max_in_flight": 256}, r"max_in_flight must be in \[1, 255\], got 256"),
        ({"visits_per_flight": 0}, "visits_per_flight must be >= 1"),
        ({"max_attempts": 0}, "max_attempts must be >= 1"),
        ({"failed_value": math.inf}, r"failed_value must be in \[-1e300, 1e300\], got inf"),
    ],
)
def test_config_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        Forest(**options)


@pytest.mark.parametrize("simulations", [0, 1 << 24])
def test_add_tree_refuses(simulations):
    with pytest.raises(ValueError, match=r"simulations must be in \[1, 16777215\], got"):
        Forest().add_tree(1, simulations)


def test_the_greatest_values_have_finite_sums():
    forest = Forest(failed_value=-1e300)
    tree = forest.add_tree(1, 1000)
    leaves = forest.ask(1)
    with pytest.raises(ValueError, match=r"values must be in \[-1e300, 1e300\], got 1000"):
        forest.tell(leaves.ticket, np.array([1.0001e300]), np.ones(1, np.uint32), np.ones(1, int))
    forest.tell(leaves.ticket, np.array([1e300]), np.zeros(1, np.uint32), np.zeros(0, np.int64))
    assert len(forest.ask(1)) == 0
    assert forest.columns(tree).total[0] == pytest.approx(1e303)
    assert Forest.from_bytes(forest.to_bytes()).is_finished(tree)


def test_a_call_beside_another_is_refused():
    """And 2^24 - 1 visits, all in one call, fit their counter."""
    forest = Forest()
    tree = forest.add_tree(1, 2**24 - 1)
    leaves = forest.ask(1)
    forest.tell(leaves.ticket, np.array([0.5]), np.zeros(1, np.uint32), np.zeros(0, np.int64))

    def ask():
        while True:
            try:
                assert len(forest.ask(1)) == 0
            except RuntimeError:  # the calls below were first
                continue
            return

    other = threading.Thread(target=ask)
    other.start()
    refused = 0
    while other.is_alive():
        try:
            forest.is_finished(tree)
        except RuntimeError as error:
            assert "another thread is in a call of this forest" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 0
    columns = forest.columns(tree)
    assert columns.visits.tolist() == [2**24 - 1]
    assert columns.total.tolist() == [(2**24 - 1) / 2]
    assert not columns.in_flight.any()
    assert forest.is_finished(tree)
