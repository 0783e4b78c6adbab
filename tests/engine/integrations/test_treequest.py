"""One driver, two searches: treequest's own and ours behind its ask and tell."""

import copy
import logging
import math
import pickle
import random
from collections import Counter

import pytest
import treequest

from tercet import tree_to_svg
from tercet.engine.integrations.treequest import StandardMCTS

BOTH = pytest.mark.parametrize(
    "library", [treequest.StandardMCTS, StandardMCTS], ids=["its", "our"]
)


class Digits:
    """Strings of digits, each the better the nearer it is to a hidden one; counts what it made."""

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)
        self.given: Counter[str | None] = Counter()

    def make(self, parent: str | None, digits: str) -> tuple[str, float]:
        self.given[parent] += 1
        state = (parent or "") + self.rng.choice(digits)
        hits = sum(a == b for a, b in zip(state, "31415926", strict=False))
        return state, hits / 8

    @property
    def functions(self):
        return {
            "low": lambda parent: self.make(parent, "01234"),
            "high": lambda parent: self.make(parent, "56789"),
        }


@BOTH
def test_steps_of_a_user_s_loop(library):
    algorithm, digits = library(samples_per_action=3), Digits()
    state = algorithm.init_tree()
    for i in range(60):
        before = len(algorithm.get_state_score_pairs(state))
        state = algorithm.step(state, digits.functions, inplace=True)
        assert (before, len(algorithm.get_state_score_pairs(state))) == (i, i + 1)
    (best, score), *_ = treequest.top_k(state, algorithm, k=3)
    assert score == max(score for _, score in algorithm.get_state_score_pairs(state)) >= 2 / 8
    assert best.startswith("3")
    assert digits.given[None] == 6


@BOTH
def test_batches_of_a_user_s_loop(library):
    algorithm, digits = library(), Digits()
    state, told = algorithm.init_tree(), 0
    while told < 60:
        state, trials = algorithm.ask_batch(state, batch_size=5, actions=list(digits.functions))
        assert 1 <= len(trials) <= 5
        for trial in reversed(trials):
            assert trial.parent_state is None or isinstance(trial.parent_state, str)
            result = digits.functions[trial.action](trial.parent_state)
            state = algorithm.tell(state, trial.trial_id, result)
            told += 1
    assert treequest.top_k(state, algorithm, k=1)[0][1] >= 1 / 8


@BOTH
def test_a_step_leaves_its_state_as_it_was_unless_told_otherwise(library):
    algorithm, digits = library(), Digits()
    first = algorithm.init_tree()
    second = algorithm.step(first, digits.functions)
    third = algorithm.step(second, digits.functions)
    sizes = [len(algorithm.get_state_score_pairs(state)) for state in (first, second, third)]
    assert sizes == [0, 1, 2]
    assert algorithm.step(third, digits.functions, inplace=True) is third


@BOTH
def test_a_pickled_state_still_knows_its_trials(library):
    algorithm, digits = library(), Digits()
    state, trial = algorithm.ask(algorithm.init_tree(), ["low"])
    state = pickle.loads(pickle.dumps(state))
    state = algorithm.tell(state, trial.trial_id, digits.functions["low"](None))
    assert len(algorithm.get_state_score_pairs(state)) == 1


@BOTH
def test_an_unknown_or_repeated_trial_is_warned_of(library, caplog):
    algorithm = library()
    state, trial = algorithm.ask(algorithm.init_tree(), ["low"])
    with caplog.at_level(logging.WARNING):
        state = algorithm.tell(state, trial.trial_id, ("a", 0.5))
        assert caplog.records == []
        state = algorithm.tell(state, trial.trial_id, ("b", 0.25))
        state = algorithm.tell(state, "none", ("c", 0.25))
    assert len(caplog.records) == 2
    assert algorithm.get_state_score_pairs(state) == [("a", 0.5)]


def tree(state):
    """Parent, visits, total and state of each row."""
    columns = state.columns
    lists = columns.parent.tolist(), columns.visits.tolist(), columns.total.tolist()
    return list(zip(*lists, state.of_rows(), strict=True))


def searched(seed, batch, visits=80):
    """A tree whose results depend on the trial alone, and come in another order for each seed."""
    rng, algorithm, out = random.Random(seed), StandardMCTS(max_in_flight=4), []
    state = algorithm.init_tree()
    while state.columns.visits[0] < visits:
        out += algorithm.ask_batch(state, batch, ["low", "high"])[1]
        rng.shuffle(out)
        for _ in range(rng.randint(0, len(out))):
            trial = out.pop()
            path = f"{trial.parent_state or ''}{trial.action[0]}"
            algorithm.tell(state, trial.trial_id, (path, random.Random(path).random()))
    return tree(state)


def test_the_tree_does_not_depend_on_the_order_of_results():
    one, *others = [searched(seed, batch) for seed, batch in [(0, 1), (1, 3), (2, 99)]]
    for other in others:  # they stop at different times, and grow alike until then
        rows = list(zip(one, other, strict=False))
        assert len(rows) > 300
        assert all(a[0] == b[0] for a, b in rows)
        told = [(a[3], b[3]) for a, b in rows if a[3] and b[3]]
        assert len(told) >= 75
        assert all(a == b for a, b in told)


def test_no_two_trials_are_the_same_child_and_few_are_out_of_a_small_tree():
    algorithm = StandardMCTS(samples_per_action=4, max_in_flight=6)
    state, trials = algorithm.ask_batch(algorithm.init_tree(), 50, ["a", "b"])
    assert len(trials) == 2
    assert [(trial.node_to_expand, trial.action) for trial in trials] == [(-1, "a"), (-1, "b")]
    for trial in trials:
        algorithm.tell(state, trial.trial_id, ("x", 0.5))
    _, more = algorithm.ask_batch(state, 50, ["a", "b"])
    assert len({trial.trial_id for trial in trials + more}) == 2 + len(more)
    assert len(more) == 4
    with pytest.raises(RuntimeError, match="4 trials are out and no other may be started"):
        algorithm.ask(state, ["a", "b"])
    assert algorithm.ask_batch(state, -1, ["a", "b"])[1] == []


def test_a_failed_trial_is_asked_for_again_and_then_given_up():
    algorithm = StandardMCTS(samples_per_action=1, max_in_flight=1, max_attempts=2)
    state, trial = algorithm.ask(algorithm.init_tree(), ["a", "b"])
    algorithm.fail(state, trial.trial_id)
    assert algorithm.get_state_score_pairs(state) == []
    _, again = algorithm.ask(state, ["a", "b"])
    assert (again.action, again.node_to_expand) == ("a", -1)
    algorithm.fail(state, again.trial_id)
    assert algorithm.ask(state, ["a", "b"])[1].action == "b"
    assert state.forest.counters().given_up == 1


def test_a_step_whose_function_raises_fails_its_trial():
    algorithm = StandardMCTS(samples_per_action=1, max_in_flight=1)
    state = algorithm.init_tree()
    with pytest.raises(ZeroDivisionError):
        algorithm.step(state, {"a": lambda _: (1 / 0, 0.0)}, inplace=True)
    assert state.forest.counters().failures == 1
    state = algorithm.step(state, {"a": lambda _: ("x", 0.25)})
    assert algorithm.get_state_score_pairs(state) == [("x", 0.25)]


def test_lost_trials_are_recalled_under_their_names():
    algorithm = StandardMCTS(max_in_flight=3)
    state, trials = algorithm.ask_batch(algorithm.init_tree(), 3, ["a"])
    state = copy.deepcopy(state)
    assert algorithm.ask_batch(state, 3, ["a"])[1] == []
    assert algorithm.recall(state) == len(trials)
    assert algorithm.ask_batch(state, 3, ["a"])[1] == trials


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(made):
    algorithm, digits = StandardMCTS(max_in_flight=3), Digits()
    state = algorithm.init_tree()
    for _ in range(10):
        state = algorithm.step(state, digits.functions, inplace=True)
    state, (trial, *_) = algorithm.ask_batch(state, 2, ["low"])
    before = state.of_rows(), len(state.slots), list(state.pairs), dict(state.running)
    other = algorithm.tell(made(state), trial.trial_id, ("3", 0.125))
    assert other.pairs[-1] == ("3", 0.125)
    assert (state.of_rows(), len(state.slots), state.pairs, state.running) == before
    assert algorithm.tell(state, trial.trial_id, ("9", 0.0)).pairs[-1] == ("9", 0.0)


def test_a_score_that_is_no_number_changes_nothing():
    algorithm = StandardMCTS()
    state, trial = algorithm.ask(algorithm.init_tree(), ["a"])
    before = tree(state)
    with pytest.raises(ValueError, match="nan"):
        algorithm.tell(state, trial.trial_id, ("x", math.nan))
    assert tree(state) == before
    algorithm.tell(state, trial.trial_id, ("x", -3.0))
    assert algorithm.get_state_score_pairs(state) == [("x", -3.0)]


def test_a_tree_can_be_drawn_with_its_states():
    algorithm, digits = StandardMCTS(), Digits()
    state = algorithm.init_tree()
    for _ in range(20):
        state = algorithm.step(state, digits.functions, inplace=True)
    states = state.of_rows()
    assert states[0] is None
    made = [row for row in states if row is not None]
    assert sorted(made) == sorted(row for row, _ in algorithm.get_state_score_pairs(state))
    assert f">{made[0]}<" in tree_to_svg(state.columns, states)
    for row, parent in enumerate(state.columns.parent.tolist()):
        if (own := states[row]) is not None:
            assert own[:-1] == (states[parent] or "")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: StandardMCTS(samples_per_action=0), "samples_per_action must be >= 1, got 0"),
        (lambda: StandardMCTS(exploration_weight=-1.0), "c_uct"),
        (lambda: StandardMCTS(max_in_flight=0), "max_in_flight"),
    ],
)
def test_settings_outside_their_range_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize(
    ("actions", "said"),
    [
        ([], r"at least one, each once, got \[\]"),
        (["a", "a"], "each once"),
        ([str(i) for i in range(33)], "at most 64 children, got 33 actions of 2 samples"),
    ],
)
def test_actions_that_cannot_be_children_are_refused(actions, said):
    algorithm = StandardMCTS()
    with pytest.raises(ValueError, match=said):
        algorithm.ask_batch(algorithm.init_tree(), 1, actions)
