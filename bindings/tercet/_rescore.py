"""Finished searches told anew from their log, under other settings and without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tercet._log import BUDGETS, LogReader, PathLike, first_settings, plain, replayed
from tercet._mcts import Forest, Leaves

Shape: TypeAlias = tuple[bytes, bytes]  # visits and handles of a tree
Place: TypeAlias = int  # of a node, by the handles on its path
Known: TypeAlias = tuple[int, Place, int, int]  # tree in the log, place, kind, nth of the two

ALL = 1 << 30  # leaves: a batch that takes whatever there is
STOPS = ("stop_positives", "stop_negatives", "stop_correct", "stop_converged")
# Settings that decide neither what is asked about nor, but for those that stop, how often.
ALONG = frozenset(
    {"backup", "gamma", "channels", "reward", "failed_value", "max_bytes", "unfinished", *STOPS}
)


@dataclass(frozen=True, slots=True, eq=False)
class Rescored:
    """What `rescore` made of a log."""

    forest: Forest
    trees: dict[int, int]  # number in the log -> number in the forest
    answered: int  # tickets that were answered from the log, once for each attempt
    unknown: int  # tickets that the log has no answer for; each ended its tree
    ended: frozenset[int]  # these trees, by their numbers in the log
    torn_bytes: int  # at the end of the log, left out


@dataclass(slots=True, eq=False)
class Answer:
    """What was told about a ticket: a call of the forest, without the ticket."""

    call: str
    arguments: dict[str, Any]
    rollout: tuple[NDArray[np.uint32], NDArray[np.float64]] | None = None  # steps and verdicts


@dataclass(slots=True, eq=False)
class Told:
    """About one ticket of the log."""

    answers: list[Answer] = field(default_factory=list)  # one for each attempt
    steps: list[int] = field(default_factory=list)  # of a rollout that is not told to its end
    verdicts: list[float] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    cost: NDArray[np.float64] | None = None  # of rollouts that were given up

    def take_in(self) -> None:
        """Makes an answer of a rollout that is whole."""
        if self.outcome is None or len(self.steps) < self.outcome["num_steps"][0]:
            return
        costs = added(self.cost, self.outcome["costs"])
        parts = (np.array(self.steps, np.uint32), np.array(self.verdicts, np.float64))
        self.answers.append(Answer("tell_outcome", self.outcome | {"costs": costs}, parts))
        self.steps, self.verdicts, self.outcome, self.cost = [], [], None, None

    def give_up(self) -> None:
        """Of a rollout that was begun, only the cost remains."""
        if self.outcome is not None:
            self.cost = added(self.cost, self.outcome["costs"])
        self.steps, self.verdicts, self.outcome = [], [], None


def added(
    one: NDArray[np.float64] | None, other: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


@dataclass(slots=True, eq=False)
class Source:
    """A tree of the log."""

    root_handle: int
    seed: int
    simulations: list[int]  # at first, and what it got whenever it was through with these
    budgets: dict[str, float]
    landings: NDArray[np.uint32] | None = None  # None: it is there still
    shape: Shape | None = None  # where it was finished
    grew_early: bool = False  # got more while it was running
    refused: str = ""  # why it cannot be told anew
    refused_free: str = ""  # why not in a free search


class Places:
    """Numbers the nodes of the trees of a forest by the handles on their paths from the root.

    Siblings with one handle are told apart by their order.
    """

    def __init__(self, names: dict[tuple[int, int, int], Place]):
        self.names = names  # (parent, handle, how many such before) -> place
        self.known: dict[int, dict[int, Place]] = {}
        self.twins: dict[tuple[int, Place, int], int] = {}
        self.asked: dict[tuple[int, int, int], int] = {}

    def forget(self, tree: int) -> None:
        self.known.pop(tree, None)

    def of(self, forest: Forest, tree: int, node: int) -> Place:
        known = self.known.setdefault(tree, {})
        if node not in known:
            self.look(forest, tree, known)
        return known[node]

    def look(self, forest: Forest, tree: int, known: dict[int, Place]) -> None:
        columns = forest.columns(tree)
        nodes, parents, handles = columns.node, columns.parent, columns.handle
        seen = np.fromiter(known, np.uint32, len(known))
        for i in np.flatnonzero(~np.isin(nodes, seen)).tolist():
            parent = -1 if parents[i] < 0 else known[int(nodes[parents[i]])]
            handle = int(handles[i])
            before = self.twins.get((tree, parent, handle), 0)
            self.twins[tree, parent, handle] = before + 1
            known[int(nodes[i])] = self.names.setdefault((parent, handle, before), len(self.names))

    def asking(self, forest: Forest, tree: int, node: int, kind: int) -> tuple[Place, int, int]:
        """Place, kind, and how many tickets of this kind the node had before; counts this one."""
        place = self.of(forest, tree, node)
        nth = self.asked.get((tree, node, kind), 0)
        self.asked[tree, node, kind] = nth + 1
        return place, kind, nth


class Witness:
    """Sees the calls of a log and keeps what they told."""

    def __init__(self, forest: Forest, *, along: bool, names: dict[tuple[int, int, int], Place]):
        self.forest, self.along = forest, along
        self.trees: dict[int, Source] = {}
        self.told: dict[int, Told] = {}  # by ticket
        self.known: dict[Known, Told] = {}
        self.out: set[int] = set()  # tickets with a rollout that is not whole
        self.places = Places(names)

    def see(self, position: int, name: str, arguments: dict[str, Any]) -> None:
        before = getattr(self, f"before_{name}", None)
        state = before(**arguments) if before else None
        result = replayed(self.forest, position, name, arguments)
        after = getattr(self, f"after_{name}", None)
        if after:
            after(result, state, **arguments)
        elif "tickets" in arguments:
            self.take_in(name, arguments)

    # Trees.

    def after_add_tree(
        self, tree: int, _: Any, root_handle: int, simulations: int, seed: int, **budgets: Any
    ) -> None:
        given = {name: x for name, x in budgets.items() if x is not None and name in BUDGETS}
        self.trees[tree] = Source(root_handle, seed or 0, [simulations], given)

    def after_add_tree_along(
        self, tree: int, _: Any, root_handle: int, simulations: int, seed: int, **landings: Any
    ) -> None:
        self.trees[tree] = Source(root_handle, seed or 0, [simulations], {})

    def look(self, tree: int) -> None:
        """Keeps what a tree is."""
        if tree not in self.trees or self.trees[tree].landings is not None:
            return
        source, columns = self.trees[tree], self.forest.columns(tree)
        source.landings = self.forest.landings(tree)
        if self.forest.is_finished(tree):
            source.shape = columns.visits.tobytes(), columns.handle.tobytes()

    def before_remove_tree(self, tree: int) -> None:
        if tree in self.trees and self.trees[tree].landings is None:
            self.look(tree)
            self.places.forget(tree)

    def before_extend(self, tree: int, simulations: int) -> None:
        source = self.trees.get(tree)
        if source is None or source.landings is not None:
            return  # no such tree: the forest will say so
        status = self.forest.status(tree)
        if self.forest.is_finished(tree):
            source.simulations.append(simulations)
        elif status.committed + status.in_flight < status.simulations:
            source.simulations[-1] += simulations
            source.grew_early = True
        else:
            source.refused = (
                "was extended when all its simulations were begun and some not committed, "
                "so that what it asked next depends on that moment"
            )

    def before_reroot(self, tree: int, **_: Any) -> None:
        if tree in self.trees:
            self.trees[tree].refused = "was re-rooted, and what it was before is gone"
            self.places.forget(tree)

    def before_reallocate(self) -> dict[int, int]:
        alive = [tree for tree, source in self.trees.items() if source.landings is None]
        return {tree: self.forest.status(tree).simulations for tree in alive}

    def after_reallocate(self, given: int, before: dict[int, int]) -> None:
        for tree, had in before.items():
            now = self.forest.status(tree).simulations
            if now > had:
                self.trees[tree].simulations.append(now - had)
            if given:
                self.trees[
                    tree
                ].refused_free = "took part in reallocate, which depends on how all trees end"

    # Tickets.

    def after_ask(self, leaves: Leaves, _: Any, /, **__: Any) -> None:
        columns = (leaves.ticket, leaves.tree, leaves.node, leaves.kind)
        for ticket, tree, node, kind in zip(*(c.tolist() for c in columns), strict=True):
            if ticket in self.told:
                continue
            self.told[ticket] = Told()
            if not self.along:
                asking = self.places.asking(self.forest, tree, node, kind)
                self.known[tree, *asking] = self.told[ticket]

    def after_recall(self, *_: Any) -> None:
        for ticket in self.out:
            self.told[ticket].give_up()
        self.out.clear()

    def after_tell_verdicts(self, _: Any, __: Any, tickets: Any, steps: Any, verdicts: Any) -> None:
        rows = zip(tickets.tolist(), steps.tolist(), verdicts.tolist(), strict=True)
        for ticket, step, verdict in rows:
            self.told[ticket].steps.append(step)
            self.told[ticket].verdicts.append(verdict)
        self.close_rollouts(tickets)

    def after_tell_outcome(self, _: Any, __: Any, tickets: Any, **arguments: Any) -> None:
        for i, ticket in enumerate(tickets.tolist()):
            self.told[ticket].outcome = row(arguments, i, {})
        self.close_rollouts(tickets)

    def close_rollouts(self, tickets: NDArray[np.uint64]) -> None:
        for ticket in set(tickets.tolist()):
            told = self.told[ticket]
            told.take_in()
            (self.out.add if told.steps or told.outcome else self.out.discard)(ticket)

    def take_in(self, name: str, arguments: dict[str, Any]) -> None:
        """A telling of whole answers, a failure or a cancelling."""
        counts = arguments.get("num_children")
        ends = None if counts is None else np.cumsum(counts, dtype=np.int64).tolist()
        for i, ticket in enumerate(arguments["tickets"].tolist()):
            told = self.told[ticket]
            told.give_up()
            self.out.discard(ticket)
            below = {} if ends is None else {"handles": (ends[i - 1] if i else 0, ends[i])}
            answer = row({k: x for k, x in arguments.items() if k != "tickets"}, i, below)
            if told.cost is not None:
                answer["costs"], told.cost = added(told.cost, answer["costs"]), None
            told.answers.append(Answer(name, answer))


def row(arguments: dict[str, Any], i: int, below: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Row i of all arguments; of those about children, the part that is its."""
    start, end = below.get("handles", (0, 0))
    return {
        name: None
        if x is None
        else x[start:end]
        if name in ("handles", "priors", "terminal")
        else x[i : i + 1]
        for name, x in arguments.items()
    }


class Teller:
    """Answers the tickets of a forest from what a witness saw."""

    def __init__(self, forest: Forest, witness: Witness):
        self.forest, self.witness = forest, witness
        self.numbers: dict[int, int] = {}  # here -> in the log
        self.later: dict[int, list[int]] = {}  # simulations to come
        self.answers: dict[int, Told | None] = {}
        self.places = Places(witness.places.names)
        self.answered, self.ended = 0, set[int]()
        self.held: list[int] = []
        old = witness.forest.settings["channels"]
        self.takes_priors = reads_priors(forest.settings)
        self.wants = [source for source, _, _ in forest.settings["channels"]]
        self.has = [source for source, _, _ in old]

    def add(self, tree: int, *, along: bool) -> None:
        source = self.witness.trees[tree]
        first, *later = source.simulations
        landings = source.landings
        assert landings is not None
        if along and len(landings):
            here = self.forest.add_tree_along(source.root_handle, first, landings, seed=source.seed)
        else:
            budgets: dict[str, Any] = {} if along else source.budgets
            here = self.forest.add_tree(source.root_handle, first, seed=source.seed, **budgets)
        self.numbers[here], self.later[here] = tree, later

    def run(self) -> None:
        while True:
            leaves = self.forest.ask(ALL)
            if len(leaves):
                self.answer(leaves)
            elif not self.extend():
                break
        if self.held:  # in one call, so that none is handed out again
            self.forest.cancel(np.array(self.held, np.uint64))

    def extend(self) -> bool:
        """More simulations for the trees that got them, when they had come as far."""
        ready = [
            here for here, later in self.later.items() if later and self.forest.is_finished(here)
        ]
        for here in ready:
            self.forest.extend(here, self.later[here].pop(0))
        return bool(ready)

    def answer(self, leaves: Leaves) -> None:
        columns = (leaves.ticket, leaves.tree, leaves.node, leaves.kind, leaves.attempt)
        for ticket, here, node, kind, attempt in zip(*(c.tolist() for c in columns), strict=True):
            if here in self.ended:
                self.held.append(ticket)
                continue
            if ticket not in self.answers:
                self.answers[ticket] = self.find(ticket, here, node, kind)
            told = self.answers[ticket]
            if told is None or len(told.answers) < attempt:
                self.ended.add(here)
                self.held.append(ticket)
                continue
            self.tell(np.array([ticket], np.uint64), told.answers[attempt - 1])
            self.answered += 1

    def find(self, ticket: int, here: int, node: int, kind: int) -> Told | None:
        tree = self.numbers[here]
        if self.witness.along:  # the n-th ticket of its sort is the same one
            return self.witness.told.get(tree << 32 | ticket & 0xFFFFFFFF)
        return self.witness.known.get((tree, *self.places.asking(self.forest, here, node, kind)))

    def tell(self, ticket: NDArray[np.uint64], answer: Answer) -> None:
        given = {name: x for name, x in answer.arguments.items() if x is not None}
        if not self.takes_priors:
            given.pop("priors", None)
        if answer.call in ("tell", "tell_values"):
            given.pop("channels", None)
            if self.wants:
                given["channels"] = self.channels(answer.arguments["channels"])
        if answer.rollout is not None and len(answer.rollout[0]):
            steps, verdicts = answer.rollout
            self.forest.tell_verdicts(np.repeat(ticket, len(steps)), steps, verdicts)
        getattr(self.forest, answer.call)(ticket, **given)

    def channels(self, told: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """The k-th channel of a source takes what was told for the k-th one of this source."""
        columns = []
        for i, source in enumerate(self.wants):
            same = [c for c, other in enumerate(self.has) if other == source]
            k = self.wants[:i].count(source)
            if told is None or k >= len(same):
                raise ValueError(
                    f"rescore: channel {i} is of {source!r}, of which nothing was told beside "
                    "values; only rollouts (tell_outcome) say all parts"
                )
            columns.append(same[k])
        return np.ascontiguousarray(told[:, columns]) if told is not None else np.zeros((1, 0))


def reads_priors(settings: dict[str, Any]) -> bool:
    reduced = settings["first_play"] == "parent" and settings["first_play_value"] != 0
    return settings["rule"] in ("puct", "gumbel") or settings["first_play"] == "prior" or reduced


def rescore(
    path: PathLike,
    *,
    along: bool = True,
    trees: Sequence[int] | None = None,
    **changed_settings: Any,
) -> Rescored:
    """The searches of a log once more under other settings, answered from the log.

    Along: each tree lands where it did, and is told and backs up anew. The settings that may change
    are `backup`, `gamma`, `channels`, `reward`, `failed_value`, `max_bytes`, `unfinished` and those
    that stop a tree, which are off unless they are given: the landings say where a tree ends.

    Not along: a free search under any settings. A ticket is answered with what was told for the
    n-th ticket of its kind at the node with the same handles from the root of the same tree. Where
    the log knows nothing, the ticket is cancelled and the tree ends, with fewer simulations than it
    is allowed and without what waited behind that ticket; `unknown` and `ended` say where. Priors
    that the settings do not read are left out.

    Rollouts that were told by verdicts and outcome are told so again, for another `reward`. Values
    of channels told beside a value go to the channels of the same source, in order. Trees that were
    removed are told anew, too; what was asked and not answered by the end of the log is unknown.

    Args:
        path: a log that `LoggedForest` wrote; it may still be open there.
        trees: numbers in the log. None: all.
        changed_settings: as of `Forest`; the others are those of the log.

    Raises:
        LogError: see `LoggedForest`.
        TypeError: no such setting.
        ValueError: settings that a tree along others cannot have; a value that does not fit them; a
            log of a budget of all trees, unless it is set to None, in a free search; a tree that
            was re-rooted, or whose simulations came at a moment that decided what it asked.
        IndexError: no such tree in the log.
    """
    with open(path, "rb") as file:
        reader = LogReader(file)
        calls = reader.calls()
        known = first_settings(calls)
        if known is None:
            raise ValueError(f"rescore: the log {Path(path)} ends before its settings")
        settings = new_settings(known, changed_settings, along=along)
        forest = Forest(**settings)
        witness = Witness(Forest(**known), along=along, names={})
        for call in calls:
            witness.see(*call)
    for tree in witness.trees:
        witness.look(tree)
    teller = Teller(forest, witness)
    for tree in sorted(witness.trees) if trees is None else trees:
        check_tree(witness, tree, settings, along=along)
        teller.add(tree, along=along)
    teller.run()
    if along:
        check_along(teller, stops=any(settings[name] for name in STOPS))
    return Rescored(
        forest=forest,
        trees={tree: here for here, tree in teller.numbers.items()},
        answered=teller.answered,
        unknown=len(teller.ended),
        ended=frozenset(teller.numbers[here] for here in teller.ended),
        torn_bytes=reader.torn_bytes,
    )


def new_settings(known: dict[str, Any], changed: dict[str, Any], *, along: bool) -> dict[str, Any]:
    off: dict[str, Any] = dict.fromkeys(BUDGETS)
    off |= dict.fromkeys(STOPS[:2], 0) | dict.fromkeys(STOPS[2:], False)
    wanted: dict[str, Any] = {**known, **(off if along else {}), **changed, "record": True}
    settings = Forest(**wanted).settings
    if along:
        old, new = plain(known), plain(settings)
        fixed = [name for name in changed if name not in ALONG and old[name] != new[name]]
        if fixed:
            raise ValueError(
                f"rescore: {', '.join(fixed)} may change what is asked about, which the landings "
                "fix; along=False searches freely"
            )
    elif shared := [name for name in BUDGETS if settings[name] is not None]:
        raise ValueError(
            f"rescore: {', '.join(shared)} bound all trees together, and who gets what depends on "
            f"the order of asking; give {shared[0]}=None"
        )
    return settings


def check_tree(witness: Witness, tree: int, settings: dict[str, Any], *, along: bool) -> None:
    source = witness.trees.get(tree)
    if source is None:
        raise IndexError(f"rescore: the log has no tree {tree}")
    why = source.refused or ("" if along else source.refused_free)
    by_simulations = settings["rule"] == "gumbel" or settings["stop_converged"]
    if not why and not along and source.grew_early and by_simulations:
        why = "was extended while it ran, and its rule or its stop reads the simulations"
    if why:
        raise ValueError(f"rescore: tree {tree} {why}; trees= leaves it out")


def check_along(teller: Teller, *, stops: bool) -> None:
    """That the trees are those of the log, so that no deviation goes unseen."""
    for here, tree in teller.numbers.items():
        shape = teller.witness.trees[tree].shape
        if here in teller.ended or shape is None or stops:
            continue
        columns = teller.forest.columns(here)
        if (columns.visits.tobytes(), columns.handle.tobytes()) != shape:
            raise ValueError(f"rescore: tree {tree} does not follow its landings; along=False may")
