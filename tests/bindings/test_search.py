"""Plain searches over Python states, against the oracle's tree."""

import json
import math
import random
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet import Forest, search, search_many, tree_to_json

PlainSearch = runpy.run_path(str(Path(__file__).with_name("oracle.py")))["PlainSearch"]


def queens(placed: tuple[int, ...], size: int = 6):
    """A board with one queen in each of the first rows: its value, and those with one more."""
    row = len(placed)
    safe = [
        column
        for column in range(size)
        if all(column not in (q, q + row - r, q - row + r) for r, q in enumerate(placed))
    ]
    return row / size, [(*placed, column) for column in safe if row < size]


def oracle(root, simulations, look=queens, **settings):
    """Visits and totals of the oracle's tree, in the order in which nodes were made."""
    nodes = PlainSearch(look, simulations, **settings).run(root)
    return [(node.handle, node.visits, node.total) for node in nodes]


def rows(result):
    totals = result.columns.total.tolist()
    return list(zip(result.states, result.visits.tolist(), totals, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"c_uct": 0.3}, {"max_in_flight": 8, "visits_per_flight": 2}],
    ids=str,
)
def test_grows_the_tree_of_the_oracle_with_states_for_handles(settings):
    result = search((), queens, simulations=120, **settings)
    assert rows(result) == oracle((), 120, **settings)
    assert result.forest.columns(result.tree).visits.tolist() == result.visits.tolist()


def test_many_roots_are_searched_as_each_would_be_alone_in_full_batches():
    roots = [(), (1,), (0, 2), (0, 1, 2, 3, 4, 5)]
    sizes = []

    def look(states):
        sizes.append(len(states))
        return [queens(state) for state in states]

    results = search_many(roots, look, simulations=40, max_leaves=3)
    assert sizes[0] == 3
    assert max(sizes) == 3
    for root, result in zip(roots, results, strict=True):
        assert rows(result) == oracle(root, 40)
        assert result.states[0] == root
    assert search_many([], look, simulations=1) == []


def test_the_best_path_solves_the_queens():
    found = search((), queens, simulations=400, c_uct=0.3)
    board = found.best_path[-1]
    assert len(board) == len(set(board)) == 6
    assert (
        len({c - r for r, c in enumerate(board)} | {10 + c + r for r, c in enumerate(board)}) == 12
    )
    assert [len(state) for state in found.best_path] == list(range(7))


def test_the_best_path_takes_most_visits_then_the_highest_value_then_the_first():
    worth = {"": 0.0, "a": 0.4, "b": 0.6, "c": 0.6}
    found = search("", lambda s: (worth[s], [] if s else ["a", "b", "c"]), simulations=4)
    assert found.visits.tolist() == [4, 1, 1, 1]
    assert (found.best_nodes, found.best_path) == ([0, 2], ["", "b"])
    found = search("", lambda s: (worth[s], [] if s else ["a", "b", "c"]), simulations=3)
    assert found.visits.tolist() == [3, 1, 1, 0]
    assert found.values[:3].tolist() == pytest.approx([1.0 / 3, 0.4, 0.6])
    assert math.isnan(found.values[3])
    assert search("", lambda _: (1.0, ["a"]), simulations=1).best_path == [""]
    values = {"": [0.0], "a": [0.4], "b": [0.3], "aa": [0.0]}
    more = {"": ["a", "b"], "a": ["aa"], "b": [], "aa": []}
    found = search("", lambda s: (values[s].pop(), more[s]), simulations=4, c_uct=0.0)
    assert found.visits[1] > found.visits[2]
    assert found.values[1] < found.values[2]
    assert found.best_path == ["", "a", "aa"]


def test_what_failed_is_asked_again_and_counted():
    rng, asked = random.Random(3), []

    def look(state):
        asked.append(state)
        return None if rng.random() < 0.3 else queens(state)

    result = search((), look, simulations=60, max_attempts=9)
    assert rows(result) == oracle((), 60)
    counted = result.forest.counters()
    assert (counted.failures, counted.given_up) == (len(asked) - counted.evaluations, 0)
    assert counted.failures > 5

    def only_the_root(state: tuple[int, ...]):
        return None if state else queens(state)

    given_up = search((), only_the_root, simulations=9, failed_value=-1.0)
    assert given_up.forest.counters().given_up == 6
    assert np.nanmin(given_up.values) == -1


def test_several_may_fail_in_one_batch():
    rng, roots, most = random.Random(5), [(), (1,), (0, 2)], 0

    def look(states):
        nonlocal most
        found = [None if rng.random() < 0.5 else queens(state) for state in states]
        most = max(most, found.count(None))
        return found

    results = search_many(roots, look, simulations=40, max_attempts=40)
    assert most > 1
    for root, result in zip(roots, results, strict=True):
        assert rows(result) == oracle(root, 40)


def test_a_search_is_saved_with_its_forest(tmp_path):
    result = search((), queens, simulations=30)
    result.forest.save(tmp_path / "search.forest")
    again = Forest.load(tmp_path / "search.forest").columns(result.tree)
    assert again.visits.tolist() == result.visits.tolist()
    assert again.handle.tolist() == list(range(len(result.states)))


@pytest.mark.parametrize(
    ("outcome", "error", "message"),
    [
        ((0.5, "next"), TypeError, r"list of children.*got \(0.5, 'next'\)"),
        ((["a"], 0.5), TypeError, "list of children"),
        (0.5, TypeError, "list of children"),
        ((0.5, iter(["a"])), TypeError, "list of children"),
        (("0.5", ["a"]), TypeError, r"list of children.*got \('0.5', "),
        ((None, []), TypeError, "list of children"),
        ((math.nan, ["a"]), ValueError, "nan"),
        ((0.5, ["a"] * 65), ValueError, "64"),
    ],
)
def test_an_answer_of_another_form_is_refused(outcome, error, message):
    with pytest.raises(error, match=message):
        search("", lambda _: outcome, simulations=3)


def test_a_batch_must_be_answered_in_full_and_settings_are_the_forest_s():
    with pytest.raises(ValueError, match="batch of 2 states must have as many results, got 1"):
        search_many(["a", "b"], lambda _: [(0.0, [])], simulations=1)
    with pytest.raises(TypeError, match="answered with a list of results, got None"):
        search_many(["a", "b"], lambda _: None, simulations=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="max_leaves must be >= 1, got 0"):
        search_many(["a"], lambda _: [], simulations=1, max_leaves=0)
    with pytest.raises(ValueError, match="c_uct"):
        search("", lambda _: (0.0, []), simulations=1, c_uct=-1.0)
    with pytest.raises(ValueError, match="simulations"):
        search("", lambda _: (0.0, []), simulations=0)
    with pytest.raises(ZeroDivisionError):
        search("", lambda _: (1 / 0, []), simulations=1)


def test_values_are_those_of_the_backup():
    result = search((), queens, simulations=60, backup="max")
    below = [
        max(v for s, v in _reached(result) if s[: len(state)] == state) for state in _seen(result)
    ]
    assert result.values[result.visits > 0].tolist() == below
    assert np.isnan(result.values[result.visits == 0]).all()
    assert result.best_path == [result.states[row] for row in result.best_nodes]
    shown = json.loads(tree_to_json(result.columns))
    assert [node["value"] for node in shown] == [
        None if math.isnan(value) else value for value in result.values
    ]


def _seen(result):
    return [s for s, n in zip(result.states, result.visits, strict=True) if n]


def _reached(result):
    return [(state, queens(state)[0]) for state in _seen(result)]


@pytest.mark.parametrize("tickets", ["apart", "lazy"])
def test_tickets_apart_are_refused(tickets):
    with pytest.raises(ValueError, match=f'tickets must be "together", .* got "{tickets}"'):
        search((), queens, simulations=3, tickets=tickets)


@pytest.mark.parametrize(
    "settings",
    [
        *({"dual_target": True, "stop_positives": 1}, {"stop_positives": 2}),
        *({"stop_negatives": 1}, {"stop_correct": True}, {"channels": [("value", "max", 1.0)]}),
        *({"model_calls": 5.0}, {"tokens": 5.0}, {"tool_calls": 5.0}, {"seconds": 5.0}),
        *({"widening": 1.0}, {"merge_duplicates": True}),
    ],
    ids=str,
)
def test_settings_that_a_callback_cannot_serve_are_refused(settings):
    name = next(iter(settings))
    with pytest.raises(ValueError, match=f"{name} must be left at .* alone, got .*; use Forest"):
        search((), queens, simulations=3, **settings)


def test_a_value_may_be_any_kind_of_number():
    numbers: list[Any] = [np.float32(0.5), np.array(0.5), Fraction(1, 2)]
    for one in numbers:
        found = search("", lambda _, one=one: (one, []), simulations=2)
        assert found.values.tolist() == [0.5]
