"""Tercet: a training engine for models that write their reasons and are paid for them.

Importing this package loads neither torch nor triton; `tercet.kernels` and `tercet.engine` do.
"""

from importlib.metadata import version

from tercet._mcts import Tree

__version__ = version("tercet")
__all__ = ["Tree", "__version__"]
