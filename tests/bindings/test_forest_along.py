"""Trees that follow the landings of others."""

import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tercet import Forest

HERE = Path(__file__).parent
rules = SimpleNamespace(**runpy.run_path(str(HERE / "test_forest_rules.py")))


def nodes_of(forest, tree):
    columns = forest.columns(tree)
    return {
        name: getattr(columns, name).tobytes()
        for name in ("node", "parent", "visits", "handle", "terminal", "total", "channels")
    }


def recorded(seed):
    """A random search that recorded its landings, and its tree."""
    rng = random.Random(f"along {seed}")
    tree = rules.worlds.random_search(rng)
    settings = rules.forest_of(tree.settings).settings | {"record": True}
    forest = Forest(**settings)
    number = rules.add(forest, tree)
    return rules.drive(forest, {number: tree}, rng), number, tree, rng


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_a_tree_that_follows_another_is_the_same(first):
    for seed in range(first, first + 100):
        forest, number, tree, rng = recorded(seed)
        landings = forest.landings(number)
        assert len(landings) >= forest.status(number).committed
        settings = forest.settings | {"stop_correct": False, "stop_converged": False}
        again = Forest(**settings | {"stop_positives": 0, "stop_negatives": 0})
        simulations = forest.status(number).simulations
        copy = again.add_tree_along(tree.root_handle, simulations, landings, seed=tree.seed)
        again = rules.drive(again, {copy: tree}, rng)
        assert nodes_of(again, copy) == nodes_of(forest, number), seed
        empty = again.status(copy).committed == 0
        wanted = ("script", "closed") if empty else ("simulations", "closed")
        assert again.status(copy).stop_reason in wanted
        assert again.landings(copy).tolist() == landings.tolist()


def told(forest, leaves, value, children=2):
    handles = np.repeat(leaves.handle * 10, children) + np.tile(np.arange(children), len(leaves))
    counts = np.full(len(leaves), children, np.uint32)
    forest.tell(leaves.ticket, np.full(len(leaves), value), counts, handles)


def test_values_may_be_told_anew():
    forest = Forest(record=True)
    tree = forest.add_tree(1, 20)
    while len(leaves := forest.ask(1)):
        told(forest, leaves, float(leaves.handle[0] % 3))
    again = Forest(backup="max", c_uct=0.0)
    copy = again.add_tree_along(1, 20, forest.landings(tree))
    while len(leaves := again.ask(1)):
        told(again, leaves, float(leaves.handle[0] % 5))
    assert (again.columns(copy).visits == forest.columns(tree).visits).all()
    assert (again.columns(copy).handle == forest.columns(tree).handle).all()
    looked = again.columns(copy).visits > 0
    assert again.columns(copy).value[0] == (again.columns(copy).handle[looked] % 5).max()


def test_landings_that_do_not_fit_stop_the_tree():
    for landings in ([0, 4], [0, 99 << 1], [0, 0], [0, 1], [1], [0, (4 << 1) | 1], [0, 6 << 1]):
        forest = Forest()
        tree = forest.add_tree_along(1, 9, np.array(landings, np.uint32))
        while len(leaves := forest.ask(1)):
            told(forest, leaves, 0.5)
        fits = landings == [0, 4 << 1]
        assert (forest.status(tree).stop_reason == "script") != fits, landings
        assert forest.is_finished(tree)
        assert not forest.columns(tree).in_flight.any()


def test_bad_landings_are_refused():
    forest = Forest()
    with pytest.raises(ValueError, match="landings must not be empty; did the settings"):
        forest.add_tree_along(1, 5, np.zeros(0, np.uint32))
    with pytest.raises(TypeError, match="landings must be uint32, got int64"):
        forest.add_tree_along(1, 5, np.zeros(1, np.int64))  # pyright: ignore[reportArgumentType]
    assert forest.counters().trees == 0
