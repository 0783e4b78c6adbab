"""Tercet: a training engine for models that write their reasons and are paid for them.

Importing this package loads neither torch nor triton; `tercet.kernels` and `tercet.engine` do.
"""

from importlib.metadata import version

from tercet._mcts import (
    Forest,
    LateTicketError,
    RepeatedTicketError,
    RewardConfig,
    RewardForm,
    SnapshotError,
    TicketError,
    Tree,
    UnknownTicketError,
    rollout_reward,
    rollout_rewards,
)
from tercet._search import SearchResult, search, search_many

__version__ = version("tercet")
__all__ = [
    "Forest",
    "LateTicketError",
    "RepeatedTicketError",
    "RewardConfig",
    "RewardForm",
    "SearchResult",
    "SnapshotError",
    "TicketError",
    "Tree",
    "UnknownTicketError",
    "__version__",
    "rollout_reward",
    "rollout_rewards",
    "search",
    "search_many",
]
