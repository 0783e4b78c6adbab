"""Plain searches over Python states: a callback says what a state is worth and what follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tercet._mcts import Forest, Leaves, TreeColumns

State = TypeVar("State")
Outcome: TypeAlias = tuple[float, Sequence[State]] | None  # value and children; None: it failed

# Settings of a forest that read what a callback does not say: outcomes, channels, costs, children
# that come late; and duplicates are known by handles, of which each state here has its own.
UNANSWERED = (
    *("dual_target", "stop_positives", "stop_negatives", "stop_correct"),
    *("channels", "model_calls", "tokens", "tool_calls", "seconds"),
    *("widening", "merge_duplicates"),
)


@dataclass(frozen=True, slots=True, eq=False)
class SearchResult(Generic[State]):
    """A finished tree: row i of the columns, states[i], visits[i] and values[i] are one node."""

    forest: Forest
    tree: int  # its number in the forest
    columns: TreeColumns
    states: list[State]

    @property
    def visits(self) -> NDArray[np.uint32]:
        return self.columns.visits

    @property
    def values(self) -> NDArray[np.float64]:
        """Of each node, by the backup: by default the mean from there on; NaN where nobody was."""
        return self.columns.value

    @property
    def best_nodes(self) -> list[int]:
        """Rows from the root down: at each step the child with most visits, until none has any.

        Among those with equally many, the one with the highest value, and the first of these.
        """
        return most_visited_path(self.columns)

    @property
    def best_path(self) -> list[State]:
        """The states of `best_nodes`."""
        return [self.states[node] for node in self.best_nodes]


def most_visited_path(columns: TreeColumns) -> list[int]:
    """Rows of `SearchResult.best_nodes`."""
    parent, visits, values = columns.parent, columns.visits, columns.value
    path = [0]
    while True:
        children = np.flatnonzero(parent == path[-1])
        visited = children[visits[children] > 0]
        if not len(visited):
            return path
        path.append(int(max(visited, key=lambda child: (visits[child], values[child]))))


def search(
    root: State,
    expand: Callable[[State], Outcome[State]],
    *,
    simulations: int,
    **forest_settings: Any,
) -> SearchResult[State]:
    """Searches from one state; `expand` is called once for each state that is reached.

    Args:
        expand: gives the value of a state and the states that can follow it, at most 64; none, and
            it is an end. None: it failed, and is asked again, `max_attempts` times in all.
        simulations: visits of the root, in [1, 2^24).
        forest_settings: as of `Forest`, which says what they mean: `c_uct`, `max_attempts`, ...

    Raises:
        ValueError: a setting, a value or a number of children outside its range.
        TypeError: expand returned something else.
        Exception: any that expand raises; the search is lost with it.
    """

    def expand_batch(states: Sequence[State]) -> list[Outcome[State]]:
        return [expand(state) for state in states]

    found = search_many([root], expand_batch, simulations=simulations, **forest_settings)
    return found[0]


def search_many(
    roots: Sequence[State],
    expand_batch: Callable[[Sequence[State]], Sequence[Outcome[State]]],
    *,
    simulations: int,
    max_leaves: int = 256,
    **forest_settings: Any,
) -> list[SearchResult[State]]:
    """Searches from many states at once, each as `search` would, with batches from all of them.

    Args:
        roots: one tree each, all in one forest.
        expand_batch: what `expand` of `search` gives, for each of at least one state, in order.
        simulations: of each tree.
        max_leaves: most states in a batch, >= 1.  With `max_in_flight=1` a tree has at most one.
        forest_settings: as of `Forest`, but nothing for tickets apart, for children that come
            later, or for outcomes, channels and costs, of which a callback says nothing.

    Raises:
        ValueError: as `search`, such a setting, and a batch answered with another number of
            results.
        TypeError: as `search`.
        Exception: any that expand_batch raises; the searches are lost with it.
    """
    if max_leaves < 1:
        raise ValueError(f"search_many: max_leaves must be >= 1, got {max_leaves}")
    forest = Forest(**forest_settings)
    if (tickets := forest.settings["tickets"]) != "together":
        raise ValueError(
            'search_many: tickets must be "together", since a callback gives value and states at '
            f'once, got "{tickets}"; use Forest'
        )
    defaults = Forest().settings
    for name in UNANSWERED:
        if (given := forest.settings[name]) != defaults[name]:
            raise ValueError(
                f"search_many: {name} must be left at {defaults[name]}, since a callback gives "
                f"values and new states alone, got {given}; use Forest"
            )
    states = list(roots)  # a handle is an index into it
    trees = [forest.add_tree(handle, simulations) for handle in range(len(states))]
    while len(leaves := forest.ask(max_leaves)):
        batch = [states[handle] for handle in leaves.handle.tolist()]
        _answer(forest, leaves, expand_batch(batch), states)
    results = []
    for tree in trees:
        columns = forest.columns(tree)
        own = [states[handle] for handle in columns.handle.tolist()]
        results.append(SearchResult(forest, tree, columns, own))
    return results


def _answer(
    forest: Forest, leaves: Leaves, outcomes: Sequence[Outcome[State]], states: list[State]
) -> None:
    """Tells the forest what was found, or that it failed; new states go behind the others."""
    if not isinstance(outcomes, Sequence):
        raise TypeError(
            f"search: a batch must be answered with a list of results, got {outcomes!r:.200}"
        )
    if len(outcomes) != len(leaves):
        raise ValueError(
            f"search: a batch of {len(leaves)} states must have as many results, "
            f"got {len(outcomes)}"
        )
    values, counts, children = [], [], []
    failed = np.array([outcome is None for outcome in outcomes], bool)
    for outcome in outcomes:
        if outcome is not None:
            value, following = _checked(outcome)
            values.append(value)
            counts.append(len(following))
            children += following
    handles = np.arange(len(states), len(states) + len(children), dtype=np.int64)
    forest.tell(
        leaves.ticket[~failed],
        np.array(values, np.float64),
        np.array(counts, np.uint32),
        handles,
    )
    forest.fail(leaves.ticket[failed])
    states += children


def _checked(outcome: tuple[float, Sequence[State]]) -> tuple[float, Sequence[State]]:
    """What a callback returned, if it is a number and a sequence other than one text."""
    if isinstance(outcome, tuple) and len(outcome) == 2:
        value, children = outcome
        is_number = hasattr(value, "__float__") or hasattr(value, "__index__")  # no text of one
        if is_number and isinstance(children, Sequence) and not isinstance(children, str | bytes):
            return float(value), children
    raise TypeError(
        "search: a state must be answered with (value, list of children), or None where that "
        f"failed, got {outcome!r:.200}"
    )
