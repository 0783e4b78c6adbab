"""Tercet: a training engine for models that write their reasons and are paid for them.

Importing this package loads neither torch nor triton; `tercet.kernels` and `tercet.engine` do.
"""

from importlib.metadata import version

from tercet._export import tree_to_dot, tree_to_json, tree_to_svg
from tercet._log import LogError, LoggedForest
from tercet._mcts import (
    Cost,
    Counters,
    Forest,
    LateTicketError,
    Leaves,
    RepeatedTicketError,
    RewardConfig,
    RewardForm,
    SnapshotError,
    TicketError,
    TicketKind,
    TicketKindError,
    TreeColumns,
    TreeStatus,
    UnknownTicketError,
    rollout_reward,
    rollout_rewards,
)
from tercet._rescore import Rescored, rescore
from tercet._search import SearchResult, search, search_many

__version__ = version("tercet")
__all__ = [
    "Cost",
    "Counters",
    "Forest",
    "LateTicketError",
    "Leaves",
    "LogError",
    "LoggedForest",
    "RepeatedTicketError",
    "Rescored",
    "RewardConfig",
    "RewardForm",
    "SearchResult",
    "SnapshotError",
    "TicketError",
    "TicketKind",
    "TicketKindError",
    "TreeColumns",
    "TreeStatus",
    "UnknownTicketError",
    "__version__",
    "rescore",
    "rollout_reward",
    "rollout_rewards",
    "search",
    "search_many",
    "tree_to_dot",
    "tree_to_json",
    "tree_to_svg",
]
