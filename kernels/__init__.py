"""Fused kernels: masked means, contrastive rewards, token log-probabilities.

Every op has a plain definition in `tercet.kernels.reference` and takes
`impl="auto"|"triton"|"torch"`: Triton on CUDA, PyTorch elsewhere, or the one named.
"""

from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels.contrastive_reward import contrastive_reward
from tercet.kernels.linear_logp import linear_logp
from tercet.kernels.masked_mean import masked_mean, segment_mean
from tercet.kernels.policy_head import policy_head
from tercet.kernels.policy_loss import policy_loss
from tercet.kernels.reference import ContrastiveReward, PolicyLoss, PolicyMetrics, TokenLogp
from tercet.kernels.sequence_loss import DpoLoss, DpoMetrics, dpo_loss, gspo_loss
from tercet.kernels.token_logp import token_logp

__all__ = [
    "ContrastiveReward",
    "DpoLoss",
    "DpoMetrics",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyMetrics",
    "TokenLogp",
    "contrastive_reward",
    "dpo_loss",
    "gspo_loss",
    "linear_logp",
    "masked_mean",
    "policy_head",
    "policy_loss",
    "segment_mean",
    "token_logp",
]
