"""Fused kernels: masked means, contrastive rewards, token log-probabilities.

Every op has a plain definition in `tercet.kernels.reference` and takes `impl="auto"|"triton"|"torch"`.
"""

from tercet.kernels.reference import ContrastiveReward, PolicyLoss, TokenLogp

__all__ = ["ContrastiveReward", "PolicyLoss", "TokenLogp"]
