"""Fused kernels: masked means, contrastive rewards, token log-probabilities.

Every op has a plain definition in `tercet.kernels.reference` and takes
`impl="auto"|"triton"|"torch"`: Triton on CUDA, PyTorch elsewhere, or the one named.
"""

from tercet.kernels.contrastive_reward import contrastive_reward
from tercet.kernels.masked_mean import masked_mean, segment_mean
from tercet.kernels.reference import ContrastiveReward, PolicyLoss, TokenLogp

__all__ = [
    "ContrastiveReward",
    "PolicyLoss",
    "TokenLogp",
    "contrastive_reward",
    "masked_mean",
    "segment_mean",
]
