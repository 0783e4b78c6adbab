"""Tercet: a training engine for models that write their reasons and are paid for them.

Importing this package loads neither torch nor triton; `tercet.kernels` and `tercet.engine` do.
"""

from importlib.metadata import version

from tercet._mcts import RewardConfig, RewardForm, Tree, rollout_reward, rollout_rewards

__version__ = version("tercet")
__all__ = [
    "RewardConfig",
    "RewardForm",
    "Tree",
    "__version__",
    "rollout_reward",
    "rollout_rewards",
]
