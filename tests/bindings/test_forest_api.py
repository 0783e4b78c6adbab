"""The Python surface of the forest: settings, choices, arrays, kinds of tickets, threads."""

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tercet import (
    Forest,
    RepeatedTicketError,
    RewardConfig,
    RewardForm,
    TicketError,
    TicketKind,
    TicketKindError,
)

ALL_CHANGED: dict[str, Any] = {
    "rule": "puct",
    "c_uct": 0.5,
    "c_base": 10.0,
    "c_init": 2.0,
    "first_play": "parent",
    "first_play_value": 0.25,
    "min_max": "tree",
    "unfinished": "virtual_loss",
    "virtual_loss": 0.5,
    "gumbel_considered": 3,
    "gumbel_value_scale": 0.2,
    "gumbel_maxvisit_init": 5.0,
    "dirichlet_alpha": 0.3,
    "dirichlet_fraction": 0.5,
    "dual_target": True,
    "widening": 1.5,
    "widening_alpha": 0.25,
    "max_children": 8,
    "solver": True,
    "merge_duplicates": True,
    "backup": "sum",
    "gamma": 0.5,
    "channels": [("step", "max", 0.5), ("outcome", "mean", 1.0)],
    "reward": RewardConfig(form=RewardForm.released),
    "stop_positives": 3,
    "stop_negatives": 2,
    "stop_correct": True,
    "stop_converged": True,
    "record": True,
    "tickets": "lazy",
    "max_in_flight": 5,
    "visits_per_flight": 7,
    "max_unverified": 9,
    "max_attempts": 2,
    "failed_value": -0.5,
    "max_bytes": 1 << 25,
    "evaluations": 100.0,
    "nodes": 200.0,
    "model_calls": 1.5,
    "tokens": 2.5,
    "tool_calls": 3.5,
    "seconds": 4.5,
}
AT_ODDS = {"unfinished": "unobserved"}  # a virtual loss wants a mean


def test_each_setting_comes_back():
    default = Forest().settings
    assert list(default) == list(ALL_CHANGED)
    for name, value in ALL_CHANGED.items():
        assert repr(default[name]) != repr(value), f"{name} is not changed"
    for more in (AT_ODDS, {"backup": "mean"}):
        wanted: dict[str, Any] = dict(ALL_CHANGED, **more)
        forest = Forest(**wanted)
        assert repr(forest.settings) == repr(wanted)
        again = Forest(**forest.settings)
        assert repr(again.settings) == repr(wanted)
        assert again.to_bytes() == forest.to_bytes()
        assert repr(Forest.from_bytes(forest.to_bytes()).settings) == repr(wanted)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"c_ucb": 1.0}, TypeError, r"Forest: there is no setting 'c_ucb'; help\(tercet.Forest\)"),
        ({"c_uct": "1"}, TypeError, "Forest: c_uct cannot be '1'"),
        ({"max_in_flight": 1.5}, TypeError, "Forest: max_in_flight cannot be 1.5"),
        ({"max_unverified": -1}, TypeError, "Forest: max_unverified cannot be -1"),
        ({"channels": [("step", "sum")]}, TypeError, r"Forest: channels cannot be \('step', 'sum'"),
        ({"rule": "ucb"}, ValueError,
         'Forest: rule must be one of "uct", "uct_released", "puct", "gumbel", got "ucb"'),
        ({"tickets": "apart", "max_in_flight": 200, "max_unverified": 56}, ValueError,
         "max_in_flight and max_unverified must be at most 255 together, got 200 and 56"),
        ({"max_unverified": 0}, ValueError, r"max_unverified must be in \[1, 255\], got 0"),
        ({"max_children": 65}, ValueError, r"max_children must be in \[1, 64\], got 65"),
        ({"unfinished": "virtual_loss", "backup": "max"}, ValueError,
         'backup must be "mean" where unfinished is "virtual_loss"'),
        ({"dirichlet_alpha": 0.3}, ValueError, "dirichlet_alpha is noise on priors, which these"),
        ({"backup": "children", "gamma": 0.5}, ValueError, 'gamma must be 1 where backup is "chil'),
        ({"rule": "uct", "first_play": "value"}, ValueError, "first_play must be first with rule"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], error, match):
    with pytest.raises(error, match=match):
        Forest(**settings)


def test_budgets_of_a_tree_are_named():
    budget: dict[str, Any] = {"token": 5}
    with pytest.raises(TypeError, match="there is no setting 'token'"):
        Forest().add_tree(1, 10, **budget)


# Arrays.  A forest of one tree with priors and two channels; `asked` has one ticket of each kind.


def asked(tickets: str) -> tuple[Forest, dict[int, np.ndarray]]:
    settings: dict[str, Any] = {"tickets": tickets, "max_unverified": 1}
    forest = Forest(
        rule="puct", channels=[("value", "mean", 1.0), ("step", "sum", 0.5)], **settings
    )
    forest.add_tree(1, 100)
    leaves = forest.ask(8)
    return forest, {int(kind): leaves.ticket[leaves.kind == kind] for kind in leaves.kind}


def state_of(forest: Forest) -> list[Any]:
    counters, columns = forest.counters(), forest.columns(0)
    return [repr(counters), columns.visits.tolist(), columns.in_flight.tolist()]


U32, F32, F64 = np.uint32, np.float32, np.float64
TWO: dict[str, Any] = {  # two children of the leaf
    "num_children": np.array([2], U32),
    "handles": np.array([5, 6]),
    "priors": np.array([0.5, 0.5], F32),
    "terminal": np.array([False, True]),
}
VALUE: dict[str, Any] = {
    "values": np.array([0.5]),
    "outcomes": np.array([1.0]),
    "channels": np.array([[0.5, -1.0]]),
}
COSTS: dict[str, Any] = {"costs": np.array([[1.0, 100.0, 2.0, 0.5]])}
CALLS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tell": ("together", TicketKind.evaluate, VALUE | TWO | COSTS),
    "tell_children": ("apart", TicketKind.expand, TWO | COSTS),
    "tell_values": ("apart", TicketKind.verify, VALUE | COSTS),
    "tell_verdicts": (
        "apart", TicketKind.verify, {"steps": np.array([0], U32), "verdicts": np.array([1.0])},
    ),
    "tell_outcome": (
        "apart",
        TicketKind.verify,
        {"num_steps": np.array([1], U32), "outcomes": np.array([1.0]),
         "start_verdicts": np.array([1.0]), **COSTS},
    ),
    "fail": ("together", TicketKind.evaluate, COSTS),
    "cancel": ("together", TicketKind.evaluate, COSTS),
}  # fmt: skip
WANTED = {"terminal": "bool", "priors": "float32", "handles": "int64"} | dict.fromkeys(
    ("num_children", "steps", "num_steps"), "uint32"
)
ANY_SHAPE = {"channels", "costs"}
ARRAYS = [(call, name) for call, (_, _, arrays) in CALLS.items() for name in arrays]


def refused(call: str, change: dict[str, Any], error: type[Exception], match: str) -> None:
    """The call is refused, changes nothing, and is taken once the change is left out."""
    tickets, kind, arrays = CALLS[call]
    forest, mine = asked(tickets)
    before = state_of(forest)
    with pytest.raises(error, match=match):
        getattr(forest, call)(mine[kind], **arrays | change)
    assert state_of(forest) == before
    getattr(forest, call)(mine[kind], **arrays)
    if call not in ("tell_verdicts", "tell_outcome"):  # which are parts of an answer
        assert forest.counters().in_flight == sum(map(len, mine.values())) - 1


@pytest.mark.parametrize(("call", "name"), ARRAYS)
def test_another_dtype_is_named(call, name):
    wanted = WANTED.get(name, "float64")
    wrong = np.ones(2, np.int8)
    refused(call, {name: wrong}, TypeError, f"^{call}: {name} must be {wanted}, got int8$")


@pytest.mark.parametrize(("call", "name"), ARRAYS)
def test_another_shape_is_named(call, name):
    right = CALLS[call][2][name]
    longer = np.concatenate([right, right[:1]])
    number = len(right.ravel())
    match = f"{call}: {name} must have {number} elements, got {longer.size}"
    if name in ANY_SHAPE:
        shape, got = (re.escape(str(a.shape)) for a in (right, longer))
        match = f"{call}: {name} must have shape {shape}, got {got}"
    refused(call, {name: longer}, ValueError, match)
    if name not in ANY_SHAPE:
        match = rf"^{call}: {name} must be one-dimensional, got shape \(1, {number}\)$"
        refused(call, {name: right[None]}, ValueError, match)
    apart = np.repeat(right, 2, axis=-1)[..., ::2]
    if not apart.flags.c_contiguous:
        match = f"^{call}: {name} must be contiguous, got strides"
        refused(call, {name: apart}, ValueError, match)


@pytest.mark.parametrize(
    ("call", "change", "match"),
    [
        (
            "tell",
            {"priors": np.array([0.5, -0.5], F32)},
            r"priors must be in \[0, 1e30\], got -0.5",
        ),
        ("tell_children", {"priors": np.array([np.nan, 1], F32)}, r"priors must be in \[0, 1e30\]"),
        ("tell", {"outcomes": np.array([2.0])}, r"outcomes must be in \[-1, 1\], or NaN, got 2"),
        (
            "tell_values",
            {"values": np.array([np.inf])},
            r"values must be in \[-1e300, 1e300\], got",
        ),
        ("tell_values", {"channels": np.array([[0, 2e300]])}, r"channels must be in \[-1e300, 1e"),
        ("tell", {"channels": None}, "channels must have 2 elements, got 0"),
        ("cancel", {"costs": -np.ones((1, 4))}, "costs must be finite and >= 0, not so at 0"),
        ("fail", {"costs": np.full((1, 4), np.nan)}, "costs must be finite and >= 0, not so at 0"),
        ("tell_verdicts", {"verdicts": np.array([1.5])}, r"verdicts must be in \[-1, 1\], got 1.5"),
        (
            "tell_verdicts",
            {"steps": np.array([4096], U32)},
            "steps must be < 4096, got step 4096 of",
        ),
        ("tell_outcome", {"outcomes": np.array([-2.0])}, r"outcomes must be in \[-1, 1\], or NaN"),
        ("tell_outcome", {"num_steps": np.array([4097], U32)}, r"num_steps must be in \[0, 4096\]"),
        ("tell_outcome", {"start_verdicts": np.array([9.0])}, r"start_verdicts must be in \[-1, 1"),
    ],
)
def test_what_cannot_be_told_is_named(call, change, match):
    refused(call, change, ValueError, match)


def test_priors_that_nothing_reads_are_refused():
    forest = Forest()
    forest.add_tree(1, 10)
    arrays = {name: TWO[name] for name in ("num_children", "handles", "priors")}
    with pytest.raises(ValueError, match='these settings read none; set rule="puct" or leave them'):
        forest.tell(forest.ask(1).ticket, np.array([0.5]), **arrays)


def test_an_array_for_another_number_of_leaves_is_named():
    """Whatever it is: none of them is read beyond its end."""
    for call, (tickets, kind, arrays) in CALLS.items():
        forest, mine = asked(tickets)
        for name in arrays:
            if name in ("handles", "priors", "terminal"):
                continue
            none = mine[kind][:0]
            empty = {each: array[:0] for each, array in arrays.items()} | {name: arrays[name]}
            with pytest.raises(
                ValueError, match=rf"{call}: {name} must have (0 elements|shape \(0, .\)), got"
            ):
                getattr(forest, call)(none, **empty)


# Kinds.


def test_kinds_are_numbers():
    forest, mine = asked("apart")
    assert {int(kind): kind.name for kind in TicketKind} == {
        0: "evaluate",
        1: "expand",
        2: "verify",
    }
    assert sorted(mine) == [TicketKind.expand, TicketKind.verify]
    assert isinstance(TicketKind.expand, int)
    assert forest.recall() == 2
    leaves = forest.ask(8)
    assert leaves.kind.dtype == np.uint8
    assert (leaves.kind == TicketKind.verify).tolist() == [k == 2 for k in leaves.kind.tolist()]
    assert {TicketKind(k) for k in leaves.kind} == {TicketKind.expand, TicketKind.verify}
    assert ((leaves.ticket & np.uint64(1)) == (leaves.kind == TicketKind.expand)).all()
    with pytest.raises(ValueError, match="read-only"):
        leaves.kind[0] = 0


def test_ticket_numbers():
    forest = Forest(tickets="apart")
    for root in (7, 8):
        forest.add_tree(root, 10)
    leaves = forest.ask(8)
    numbers = {
        (int(tree), int(kind)): int(ticket)
        for tree, kind, ticket in zip(leaves.tree, leaves.kind, leaves.ticket, strict=True)
    }
    assert numbers == {(0, 1): 1, (0, 2): 0, (1, 1): 1 << 32 | 1, (1, 2): 1 << 32}


@pytest.mark.parametrize(
    ("call", "tickets", "kind"),
    [
        ("tell", "apart", TicketKind.verify),
        ("tell", "lazy", TicketKind.expand),
        ("tell_children", "apart", TicketKind.verify),
        ("tell_values", "apart", TicketKind.expand),
        ("tell_verdicts", "together", TicketKind.evaluate),
        ("tell_outcome", "apart", TicketKind.expand),
    ],
)
def test_a_ticket_of_another_kind_changes_nothing(call, tickets, kind):
    forest, mine = asked(tickets)
    before = state_of(forest)
    ticket = int(mine[kind][0])
    match = f"ticket {ticket} of tree 0 is of another kind; tell answers those of kind evaluate, "
    with pytest.raises(TicketKindError, match=match) as caught:
        getattr(forest, call)(mine[kind], **CALLS[call][2])
    assert isinstance(caught.value, TicketError)
    assert isinstance(caught.value, ValueError)
    assert (caught.value.ticket, caught.value.tree) == (ticket, 0)
    assert state_of(forest) == before


def test_a_cancelled_ticket_is_answered_once():
    forest, mine = asked("together")
    forest.cancel(mine[0])
    with pytest.raises(RepeatedTicketError) as caught:
        forest.fail(mine[0])
    assert caught.value.ticket == mine[0][0]
    leaves = forest.ask(8)
    assert len(leaves) == 1
    assert leaves.ticket[0] > mine[0][0]
    assert forest.counters().cancelled == 1


# What there is to look at.


def test_everything_shows_itself():
    forest, mine = asked("apart")
    forest.tell_children(mine[1], **TWO | COSTS)
    forest.tell_values(mine[2], **VALUE)
    cost = "Cost(model_calls=1.0, tokens=100.0, tool_calls=2.0, seconds=0.5)"
    assert repr(forest.status(0)) == (
        "TreeStatus(simulations=100, committed=1, in_flight=0, positives=1, negatives=0, "
        f"evaluations=1, nodes=3, spent={cost}, stop_reason='')"
    )
    shown = repr(forest.counters())
    assert shown.startswith("Counters(trees=1, finished=0, simulations=1, evaluations=1, expans")
    assert shown.endswith(f"spent={cost})")
    assert repr(forest.columns(0)) == "<TreeColumns: 3 nodes>"
    leaves = forest.ask(1)
    assert repr(leaves) == ("<Leaves: 1 of ticket, tree, node, kind, depth, handle, attempt>")


def test_columns_have_what_was_told():
    forest, mine = asked("apart")
    children: dict[str, Any] = dict(TWO, priors=np.array([0.25, 3.0], F32))
    forest.tell_children(mine[1], **children)
    outcome: dict[str, Any] = dict(CALLS["tell_outcome"][2], num_steps=np.array([2], U32))
    forest.tell_outcome(mine[2], **outcome)
    for step, verdict in ((1, -1.0), (0, 0.5)):
        assert forest.columns(0).visits[0] == 0
        forest.tell_verdicts(mine[2], np.array([step], U32), np.array([verdict]))
    columns = forest.columns(0)
    assert columns.value[0] == 0.5 + 1.0 + 1.0  # verdict, outcome, start
    assert np.isnan(columns.value[1:]).all()
    assert columns.verdict[0] == 1
    assert np.isnan(columns.verdict[1:]).all()
    assert np.isnan(columns.prior[0])
    assert columns.prior[1:].tolist() == [0.25, 3.0]
    assert columns.terminal.tolist() == [0, 0, 1]
    assert columns.closed.tolist() == [0, 0, 0]
    assert columns.channels.tolist() == [[2.5, 0.5], [0, 0], [0, 0]]
    assert columns.channels.dtype == F64
    assert forest.choice(0) == columns.node[1]
    for name in ("value", "channels", "prior", "verdict", "closed"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(columns, name)[0] = 0


def test_without_channels_they_have_no_columns():
    forest = Forest()
    forest.add_tree(1, 1)
    columns = forest.columns(0)
    assert columns.channels.shape == (1, 0)
    assert np.isnan(columns.prior[0])
    assert np.isnan(columns.verdict[0])
    assert forest.choice(0) is None


# Threads.


def during(forest: Forest, work: Callable[[], object], look: Callable[[], object]) -> list[object]:
    """What `look` gave, surely during one call of `work` in another thread."""

    def until_done() -> None:
        while True:
            try:
                work()
            except RuntimeError:  # a call below was first
                continue
            return

    def is_busy() -> bool:
        try:
            forest.is_finished(0)
        except RuntimeError as error:
            assert "another thread is in a call of this forest" in str(error)  # noqa: PT017
            return True
        return False

    other = threading.Thread(target=until_done)
    other.start()
    seen: list[object] = []
    while other.is_alive():
        if is_busy():
            now = look()
            if is_busy():  # still: there is one call of work that does something
                seen.append(now)
    return seen


def test_counters_are_read_while_another_thread_is_in_a_call():
    forest = Forest()
    forest.add_tree(1, 2**24 - 1)
    leaves = forest.ask(1)
    forest.tell(leaves.ticket, np.array([0.5]), np.zeros(1, U32), np.zeros(0, np.int64))
    seen = during(forest, lambda: forest.ask(1), lambda: forest.counters().simulations)
    assert seen
    assert set(seen) == {1}  # as they were before
    assert forest.counters().simulations == 2**24 - 1
