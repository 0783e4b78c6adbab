"""The ask and tell of treequest on Tercet's core.

`StandardMCTS` stands where `treequest.StandardMCTS` stood; treequest itself is not needed.  Departs
from it:

- Selection is plain UCT: no prior from the scores of siblings.  A new child is selected for by
  itself, where treequest fills all children of a node before it looks at the tree again.
- Each trial is another child, so none becomes invalid; `ask_batch` gives fewer than it was asked
  for when nothing else is worth starting, above all while the tree is small.
- Results may come in any order, and the tree does not depend on it: they wait for older ones.
  A trial that will never be told has to be given up with `fail`, or asked for again with `recall`.
- A copy of a state, or a pickle, is a snapshot of the forest; scores may be any finite numbers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from tercet import Forest
from tercet._mcts import TreeColumns

State = TypeVar("State")
GenerateFn = Callable[[State | None], tuple[State, float]]

MAX_CHILDREN = 64  # of a node of a forest
NO_END = 2**24 - 1  # simulations
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial(Generic[State]):
    """A child that is wanted: of which node, and by which action."""

    trial_id: str
    node_to_expand: int  # its place among the state-score pairs; -1 is the root
    action: str
    parent_state: State | None


@dataclass(slots=True)
class _Slot:
    """A child that a node has or may get; its number is the handle."""

    parent: int  # place among the pairs
    action: str
    pair: int | None = None  # its own place, once it was told


@dataclass
class MCTSState(Generic[State]):
    """A tree, its states and scores, and the trials that are out: to pickle or copy."""

    forest: Forest
    slots: list[_Slot] = field(default_factory=lambda: [_Slot(-1, "", -1)])
    pairs: list[tuple[State, float]] = field(default_factory=list)  # in the order of their telling
    running: dict[str, tuple[int, Trial[State]]] = field(default_factory=dict)  # with its slot
    actions: tuple[str, ...] = ()  # of the last ask

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "forest": self.forest.to_bytes(),
            "slots": [replace(slot) for slot in self.slots],  # a shallow copy must not share these
            "pairs": list(self.pairs),
            "running": dict(self.running),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"forest": Forest.from_bytes(state["forest"])})

    @property
    def columns(self) -> TreeColumns:
        """The tree, children that nobody made yet included."""
        return self.forest.columns(0)

    def of_rows(self) -> list[State | None]:
        """The state of each row of the columns; None for the root and for what is not told."""
        places = [self.slots[handle].pair for handle in self.columns.handle.tolist()]
        return [None if place is None or place < 0 else self.pairs[place][0] for place in places]


class StandardMCTS(Generic[State]):
    """UCT for functions that make one scored child of a state.

    Args:
        samples_per_action: children of a node by each action.
        exploration_weight: `c_uct` of `Forest`; the default suits scores in [0, 1].
        max_in_flight: most trials of a tree that are out at a time, 1 to 255.
        visits_per_flight: a tree of n visits may have 1 + n // visits_per_flight out.
        max_attempts: at a child whose trial fails, before it is given up.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        *,
        samples_per_action: int = 2,
        exploration_weight: float = math.sqrt(2),
        max_in_flight: int = 64,
        visits_per_flight: int = 1,
        max_attempts: int = 3,
    ) -> None:
        if samples_per_action < 1:
            raise ValueError(
                f"StandardMCTS: samples_per_action must be >= 1, got {samples_per_action}"
            )
        self.samples_per_action = samples_per_action
        self.settings: dict[str, Any] = {
            "c_uct": exploration_weight,
            "max_in_flight": max_in_flight,
            "visits_per_flight": visits_per_flight,
            "max_attempts": max_attempts,
        }
        Forest(**self.settings)  # refuses what is out of range here, not at the first tree

    def init_tree(self) -> MCTSState[State]:
        """A tree of a root, which has no state and no score."""
        forest = Forest(**self.settings)
        forest.add_tree(0, NO_END)
        return MCTSState(forest)

    def step(
        self,
        state: MCTSState[State],
        generate_fn: Mapping[str, GenerateFn[State]],
        inplace: bool = False,
    ) -> MCTSState[State]:
        """Makes one child.

        Args:
            state: left as it is, if not inplace.
            generate_fn: by action, from the state of the parent (of the root: None) to a new state
                and its score.
            inplace: whether state may be changed, and is returned.

        Raises:
            RuntimeError: all children that may be started are out.
            Exception: any that a function raises; the trial counts as failed.
        """
        state = state if inplace else copy.deepcopy(state)
        state, trial = self.ask(state, list(generate_fn))
        try:
            result = generate_fn[trial.action](trial.parent_state)
        except BaseException:
            self.fail(state, trial.trial_id)
            raise
        return self.tell(state, trial.trial_id, result)

    def ask(
        self, state: MCTSState[State], actions: list[str]
    ) -> tuple[MCTSState[State], Trial[State]]:
        """One trial.

        Raises:
            RuntimeError: all that may be started are out.
            ValueError: as `ask_batch`.
        """
        state, trials = self.ask_batch(state, 1, actions)
        if not trials:
            raise RuntimeError(
                f"ask: {len(state.running)} trials are out and no other may be started; tell the "
                "results of some, or fail them"
            )
        return state, trials[0]

    def ask_batch(
        self, state: MCTSState[State], batch_size: int, actions: list[str]
    ) -> tuple[MCTSState[State], list[Trial[State]]]:
        """At most batch_size trials, each of another child.

        Args:
            state: is changed, and returned.
            batch_size: none if < 1.
            actions: those by which nodes that are told from now on get children.

        Raises:
            ValueError: no action, one twice, or more children of a node than 64.
        """
        state.actions = self._checked(actions)
        leaves = state.forest.ask(max(batch_size, 0))
        if len(leaves) and leaves.handle[0] == 0:  # the root, alone: it needs no trial
            self._commit(state, int(leaves.ticket[0]), 0, 0.0, place=-1)
            leaves = state.forest.ask(batch_size)
        trials = []
        for ticket, handle in zip(leaves.ticket.tolist(), leaves.handle.tolist(), strict=True):
            slot = state.slots[handle]
            parent = None if slot.parent < 0 else state.pairs[slot.parent][0]
            trial = Trial(str(ticket), slot.parent, slot.action, parent)
            state.running[trial.trial_id] = handle, trial
            trials.append(trial)
        return state, trials

    def tell(
        self, state: MCTSState[State], trial_id: str, result: tuple[State, float]
    ) -> MCTSState[State]:
        """What a trial gave; one that is not out is warned of and changes nothing, as in treequest.

        Args:
            state: is changed, and returned.
            trial_id: of a trial.
            result: the new state and its score.

        Raises:
            ValueError: a score that is not finite; nothing is changed.
        """
        handle = self._out(state, trial_id)
        if handle is not None:
            new_state, score = result
            self._commit(state, int(trial_id), handle, float(score), place=len(state.pairs))
            state.pairs.append((new_state, float(score)))
            del state.running[trial_id]
        return state

    def fail(self, state: MCTSState[State], trial_id: str) -> MCTSState[State]:
        """A trial gave nothing: it is asked for again, `max_attempts` times in all."""
        if self._out(state, trial_id) is not None:
            state.forest.fail(np.array([int(trial_id)], np.uint64))
            del state.running[trial_id]
        return state

    def recall(self, state: MCTSState[State]) -> int:
        """Has the trials that are out asked for again, under their names; how many there are."""
        return state.forest.recall()

    def get_state_score_pairs(self, state: MCTSState[State]) -> list[tuple[State, float]]:
        """All states that were told, and their scores: what `treequest.top_k` ranks."""
        return list(state.pairs)

    def _out(self, state: MCTSState[State], trial_id: str) -> int | None:
        """The slot of a trial that is out."""
        if trial_id in state.running:
            return state.running[trial_id][0]
        logger.warning("trial %s is not out; its result is left out of the search", trial_id)
        return None

    def _commit(
        self, state: MCTSState[State], ticket: int, handle: int, score: float, *, place: int
    ) -> None:
        """Tells the forest of a node, with a slot for each child that it may get."""
        actions = state.actions * self.samples_per_action
        first = len(state.slots)
        state.forest.tell(
            np.array([ticket], np.uint64),
            np.array([score], np.float64),
            np.array([len(actions)], np.uint32),
            np.arange(first, first + len(actions), dtype=np.int64),
        )
        state.slots[handle].pair = place
        state.slots += [_Slot(place, action) for action in actions]

    def _checked(self, actions: Sequence[str]) -> tuple[str, ...]:
        if not actions or len(set(actions)) < len(actions):
            raise ValueError(
                f"ask_batch: actions must be at least one, each once, got {list(actions)}"
            )
        children = len(actions) * self.samples_per_action
        if children > MAX_CHILDREN:
            raise ValueError(
                f"ask_batch: a node must have at most {MAX_CHILDREN} children, got {len(actions)} "
                f"actions of {self.samples_per_action} samples each"
            )
        return tuple(actions)
