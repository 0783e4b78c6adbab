"""Fused kernels: masked means, contrastive rewards and losses, token log-probabilities.

Every op has a plain definition in `tercet.kernels.reference` and takes
`impl="auto"|"triton"|"torch"`: Triton on CUDA, PyTorch elsewhere, or the one named.
"""

from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels.contrastive_reward import contrastive_reward
from tercet.kernels.info_nce import info_nce
from tercet.kernels.linear_logp import linear_logp
from tercet.kernels.masked_mean import masked_mean, segment_mean
from tercet.kernels.policy_head import policy_head
from tercet.kernels.policy_loss import policy_loss
from tercet.kernels.reference import (
    ContrastiveReward,
    PolicyLoss,
    PolicyMetrics,
    SimilarityStats,
    TokenLogp,
)
from tercet.kernels.sequence_loss import DpoLoss, DpoMetrics, dpo_loss, gspo_loss
from tercet.kernels.similarity_stats import similarity_stats
from tercet.kernels.token_logp import token_logp

__all__ = [
    "ContrastiveReward",
    "DpoLoss",
    "DpoMetrics",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "SimilarityStats",
    "TokenLogp",
    "contrastive_reward",
    "dpo_loss",
    "gspo_loss",
    "info_nce",
    "linear_logp",
    "masked_mean",
    "policy_head",
    "policy_loss",
    "segment_mean",
    "similarity_stats",
    "token_logp",
]
