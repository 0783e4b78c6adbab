from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
