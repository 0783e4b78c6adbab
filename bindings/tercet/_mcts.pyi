import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class TicketError(ValueError):
    """A ticket that cannot be told; nothing was changed."""

    ticket: int
    tree: int

class UnknownTicketError(TicketError):
    """It was never issued."""

class RepeatedTicketError(TicketError):
    """It was told, or reported as failed, before."""

class LateTicketError(TicketError):
    """Its tree was removed."""

class SnapshotError(ValueError):
    """Bytes that are no snapshot of a forest, one of a newer version, cut off or altered."""

class Leaves:
    """A batch of leaves to look at, as columns of equal length, read-only."""

    @property
    def ticket(self) -> NDArray[np.uint64]: ...
    @property
    def tree(self) -> NDArray[np.uint32]: ...
    @property
    def node(self) -> NDArray[np.uint32]:
        """Name of the leaf inside its tree."""
    @property
    def depth(self) -> NDArray[np.uint32]:
        """Of a root: 0."""
    @property
    def handle(self) -> NDArray[np.int64]: ...
    @property
    def attempt(self) -> NDArray[np.uint32]:
        """1, and one more after every failure."""
    def __len__(self) -> int: ...

class TreeColumns:
    """All nodes of a tree in the order of their creation, the root first; read-only columns."""

    @property
    def node(self) -> NDArray[np.uint32]:
        """Name of the node in `Leaves.node`."""
    @property
    def parent(self) -> NDArray[np.int64]:
        """Position in these columns; -1 for the root."""
    @property
    def depth(self) -> NDArray[np.uint32]: ...
    @property
    def visits(self) -> NDArray[np.uint32]: ...
    @property
    def in_flight(self) -> NDArray[np.uint32]:
        """Tickets out at or below the node."""
    @property
    def total(self) -> NDArray[np.float64]:
        """Sum of the values backed up."""
    @property
    def handle(self) -> NDArray[np.int64]: ...
    @property
    def terminal(self) -> NDArray[np.uint8]:
        """1 where the node was told without children."""
    def __len__(self) -> int: ...

class Counters:
    """What a forest has done so far."""

    @property
    def trees(self) -> int: ...
    @property
    def finished(self) -> int:
        """Trees whose simulations are used up."""
    @property
    def simulations(self) -> int:
        """Values backed up."""
    @property
    def evaluations(self) -> int:
        """Simulations with a ticket; the others visited an end again."""
    @property
    def in_flight(self) -> int:
        """Tickets that were handed out and are not told."""
    @property
    def waiting(self) -> int:
        """Results that were told and wait for older ones of their tree."""
    @property
    def failures(self) -> int: ...
    @property
    def given_up(self) -> int:
        """Leaves that failed `max_attempts` times."""
    @property
    def nodes(self) -> int: ...
    @property
    def bytes(self) -> int:
        """Of nodes, with what lies free."""

class Forest:
    """Many searches at once, behind ask and tell.

    `ask` hands out leaves of all trees, each with a ticket; `tell` brings what was found out about
    them, at any time and in any order. The trees depend on what is told and on nothing else: not on
    the size of batches, the order of results or each other. A tree issues tickets while it may, and
    else commits its oldest one, so that its leaf gets children and its value goes up the tree.

    Children are chosen by UCT (Kocsis & Szepesvari 2006) with the visits that are on their way
    (WU-UCT, arXiv:1810.11755): `total / visits + c_uct sqrt(ln(N + O) / (n + o))`, N and n finished
    visits of parent and child, O and o those on their way; children nobody visits first, the
    first on ties.

    Args:
        c_uct: weight of exploration, >= 0.
        max_in_flight: most tickets out of one tree, 1 to 255. 1 is the sequential search.
        visits_per_flight: a tree of n visits may have 1 + n // visits_per_flight out.
        max_attempts: at a leaf whose evaluation fails.
        failed_value: value of a leaf that failed as often, in [-1e300, 1e300]; it becomes an end.
        max_bytes: bound on the memory of nodes.

    Raises:
        ValueError: a setting outside its range.
        RuntimeError: by every method, while another thread is in a call of this forest, and after
            memory ran out (MemoryError) in the middle of one.
    """

    def __init__(
        self,
        *,
        c_uct: float = ...,
        max_in_flight: int = 1,
        visits_per_flight: int = 16,
        max_attempts: int = 3,
        failed_value: float = 0.0,
        max_bytes: int = ...,
    ) -> None: ...
    def add_tree(self, root_handle: int, simulations: int) -> int:
        """A tree whose root has this handle and is visited `simulations` times; its number.

        Raises:
            ValueError: simulations outside [1, 2^24), or no room within max_bytes.
        """

    def remove_tree(self, tree: int) -> None:
        """Frees the nodes of a tree; its tickets become late ones.

        Raises:
            IndexError: no such tree.
        """

    def ask(self, max_leaves: int) -> Leaves:
        """At most max_leaves leaves; none when all wait for `tell`, or are done."""

    def tell(
        self,
        tickets: NDArray[np.uint64],
        values: NDArray[np.float64],
        num_children: NDArray[np.uint32],
        handles: NDArray[np.int64],
    ) -> None:
        """What was found out about n leaves; if anything is wrong, nothing changes.

        Args:
            values: in [-1e300, 1e300].
            num_children: 0 to 64; a leaf without children is an end, which is visited again with
                its value but asked about no more.
            handles: names of the children, those of the first leaf first.

        No other thread may write to the arrays in the meantime.

        Raises:
            TypeError: a dtype.
            ValueError: a length, a value, too many children, or no room within max_bytes.
            TicketError: a ticket that was never issued, was told before or is of a removed tree.
        """

    def fail(self, tickets: NDArray[np.uint64]) -> None:
        """The evaluation of these failed: they are handed out again, `max_attempts` times in all.

        Raises:
            TicketError: see `tell`; nothing is changed.
        """

    def recall(self) -> int:
        """Has all tickets that are out handed out again, as the same attempt; how many there are.

        For after `load`, or when an evaluator died: nobody else works at them. A result that comes
        after all counts if it comes first.
        """

    def is_finished(self, tree: int) -> bool: ...
    def columns(self, tree: int) -> TreeColumns: ...
    def counters(self) -> Counters: ...
    def to_bytes(self) -> bytes:
        """The whole state, with the tickets that are out; equal forests give equal bytes."""

    @staticmethod
    def from_bytes(data: bytes) -> Forest:
        """A forest as `to_bytes` gave it; what continues equals what was never interrupted.

        Raises:
            SnapshotError: damaged, cut off or of another version.
            ValueError: max_bytes of its settings does not allow its nodes.
        """

    def save(self, path: str | bytes | os.PathLike[str]) -> None:
        """Writes `to_bytes` to path + ".tmp" and renames: `path` is the old file or the new one.

        Raises:
            OSError: the file; nothing is left behind.
        """

    @staticmethod
    def load(path: str | bytes | os.PathLike[str]) -> Forest:
        """A forest as `save` wrote it.

        Raises:
            OSError: the file.
            SnapshotError: see `from_bytes`.
        """

class RewardForm:
    """Whose formula; see csrc/include/tercet/reward.hpp."""

    paper: RewardForm
    released: RewardForm

class RewardConfig:
    """Formula of a rollout's reward. Immutable.

    Args:
        form: `paper` or `released`.
        outcome_weight: beta >= 0 of the paper form; 1 in the released form, which has its own.
        step_decay: d_j = step_decay^(j-1) of the paper form, in [0, 1]; 1 in the released form.
        truncated_outcome: F of a rollout that was cut off, in [-1, 1]. None: as the form was
            published, 0 in the paper form and -1 in the released one.
        add_start_verdict: whether the start node's own verdict is backed up, too. None: as the form
            was published, true in the paper form and false in the released one.

    Raises:
        ValueError: a setting outside its range.
    """

    def __init__(
        self,
        *,
        form: RewardForm = ...,
        outcome_weight: float = 1.0,
        step_decay: float = 1.0,
        truncated_outcome: float | None = None,
        add_start_verdict: bool | None = None,
    ) -> None: ...
    @property
    def form(self) -> RewardForm: ...
    @property
    def outcome_weight(self) -> float: ...
    @property
    def step_decay(self) -> float: ...
    @property
    def truncated_outcome(self) -> float: ...
    @property
    def add_start_verdict(self) -> bool: ...

class RolloutReward:
    """Parts of a rollout's reward, and `total` = (step + outcome) + start."""

    @property
    def step(self) -> float: ...
    @property
    def outcome(self) -> float: ...
    @property
    def start(self) -> float: ...
    @property
    def total(self) -> float: ...

def rollout_reward(
    verdicts: Sequence[float],
    outcome: float | None,
    *,
    start_verdict: float = 0.0,
    config: RewardConfig = ...,
) -> RolloutReward:
    """Reward of one rollout.

    Args:
        verdicts: of its steps in order, each in [-1, 1]; 0: none.
        outcome: in [-1, 1]; None: cut off before an answer.
        start_verdict: of the node it starts from.
        config: RewardConfig() by default.

    Raises:
        ValueError: a verdict or the outcome outside [-1, 1].
    """

def rollout_rewards(
    verdicts: NDArray[np.float64],
    offsets: NDArray[np.int64],
    outcomes: NDArray[np.float64],
    *,
    start_verdicts: NDArray[np.float64] | None = None,
    config: RewardConfig = ...,
) -> NDArray[np.void]:
    """Rewards of n rollouts, [n] with the float64 fields step, outcome, start, total.

    Args:
        verdicts: [total], those of rollout i at [offsets[i], offsets[i + 1]).
        offsets: [n + 1], from 0 to total.
        outcomes: [n]; NaN: cut off before an answer.
        start_verdicts: [n]; None: no start node has a verdict.
        config: RewardConfig() by default.

    Raises:
        TypeError: a dtype other than these.
        ValueError: an array that is not one-dimensional and contiguous, lengths or offsets that do
            not fit together, a verdict or outcome outside [-1, 1].
    """

class Aggregation:
    """How several numbers become one: step scores a return, returns the value of a node."""

    sum: Aggregation
    mean: Aggregation
    max: Aggregation
    min: Aggregation
    product: Aggregation
    last: Aggregation

class Channel:
    """One of several values that a node keeps at once; gamma in [0, 1] is its decay per level."""

    def __init__(self, how: Aggregation = ..., *, gamma: float = 1.0) -> None: ...
    @property
    def how(self) -> Aggregation: ...
    @property
    def gamma(self) -> float: ...

def identity(how: Aggregation) -> float:
    """What a node holds before its first return."""

def absorbed(accumulated: float, value: float, how: Aggregation) -> float:
    """What a node holds after one more return. ValueError: the value is not finite."""

def value_of(accumulated: float, returns: int, how: Aggregation) -> float:
    """Value of a node after `returns` returns. ValueError: there were none, and it is no sum."""

def path_return(scores: Sequence[float], how: Aggregation) -> float:
    """The scores of a path as one number. ValueError: no scores, or one that is not finite."""

def decayed(value: float, gamma: float, distance: int) -> float:
    """The value times gamma^distance, a repeated product. ValueError: gamma outside [0, 1]."""

def mixed(value: float, simulated: float, alpha: float) -> float:
    """(1 - alpha) * value + alpha * simulated. ValueError: alpha outside [0, 1]."""

def visit_weighted_mean(values: Sequence[float], visits: Sequence[int], own: float) -> float:
    """Mean of the children's values by visits; `own` while none was visited."""

def backup_node(
    accumulated: Sequence[float], values: Sequence[float], channels: Sequence[Channel]
) -> tuple[list[float], list[float]]:
    """One step of a backup: what the node then holds, and the values for its parent; [channels].

    Raises:
        ValueError: unequal lengths, a value that is not finite, a gamma outside [0, 1].
    """

class Tree:
    """UCT search tree in one arena. Not thread-safe: one thread per tree."""

    def __init__(self, *, c_uct: float) -> None: ...
    def expand(self, node: int, num_children: int) -> int: ...
    def select_child(self, node: int) -> int: ...
    def select_leaf(self) -> int: ...
    def backup(self, leaf: int, value: float) -> None: ...
    def children(self, node: int) -> range: ...
    def parent(self, node: int) -> int: ...
    def visits(self) -> NDArray[np.uint32]: ...
    def total_values(self) -> NDArray[np.float64]: ...
    def __len__(self) -> int: ...
