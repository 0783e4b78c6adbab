"""The plain PyTorch meaning of every op.  Tests, benches and CPU paths are judged against these.

Written for reading, not for speed: a function here is a definition.  All of them are
differentiable, accept float64, and keep float64 when given it (else results are float32).
"""

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels._typing import Bool, Float, Int

NORM_EPS = 1e-12  # as torch.nn.functional.normalize

Repulsion = Literal["query", "document"]
RewardForm = Literal["sum", "info_nce"]


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def masked_mean_ref(
    x: Float[Tensor, "batch t hidden"],
    mask: Bool[Tensor, "batch t"],
    *,
    normalize: bool = False,
) -> Float[Tensor, "batch hidden"]:
    """Mean of x over the tokens where mask is true; a row without such tokens gives zeros."""
    x = x.to(accumulator_dtype(x)).masked_fill(~mask[..., None], 0.0)
    mean = x.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return F.normalize(mean, dim=-1, eps=NORM_EPS) if normalize else mean


def segment_mean_ref(
    x: Float[Tensor, "n hidden"],
    cu_seqlens: Int[Tensor, " segments_plus_1"],
    mask: Bool[Tensor, " n"] | None = None,
    *,
    normalize: bool = False,
) -> Float[Tensor, "segments hidden"]:
    """Masked mean of each segment x[cu_seqlens[i]:cu_seqlens[i + 1]]."""
    mask = torch.ones(len(x), dtype=torch.bool, device=x.device) if mask is None else mask
    bounds = cu_seqlens.tolist()
    rows = [
        masked_mean_ref(x[None, a:b], mask[None, a:b], normalize=normalize)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(rows) if rows else x.new_zeros((0, x.shape[1]), dtype=accumulator_dtype(x))


class ContrastiveReward(NamedTuple):
    """Rewards of B groups of G rollouts and their signed parts, all [B, G], before any weight.

    form="sum":      total = (positive + wn*negative + wc*consistency + wh*hard) / temperature
    form="info_nce": total = (positive + hard + wc*consistency) / temperature, where hard is
                     -temperature * logsumexp over the positive and every negative, plus the
                     constant temperature*log(number of candidates); negative is 0 because a
                     log-sum-exp does not split into a sum.
    """

    total: Float[Tensor, "groups rollouts"]
    positive: Float[Tensor, "groups rollouts"]
    negative: Float[Tensor, "groups rollouts"]
    consistency: Float[Tensor, "groups rollouts"]
    hard: Float[Tensor, "groups rollouts"]


def contrastive_reward_ref(
    rollouts: Float[Tensor, "groups rollouts hidden"],
    queries: Float[Tensor, "groups hidden"],
    negatives: Float[Tensor, "groups negatives hidden"] | None = None,
    *,
    group_ids: Int[Tensor, " groups"] | None = None,
    form: RewardForm = "sum",
    repulsion: Repulsion = "query",
    temperature: float = 0.1,
    negative_weight: float = 1.0,
    consistency_weight: float = 0.2,
    hard_weight: float = 0.2,
) -> ContrastiveReward:
    """GRACE's reward of each rollout.  Source: arXiv:2510.04506, eq. 12-18.

    With s = cosine, rollout k of group i, and j running over the groups that do not share i's id:
        positive(i, k)    = s(d_ik, q_i)
        consistency(i, k) = mean over l != k of s(d_ik, d_il);  0 when G == 1
        query repulsion (the paper):
            negative(i)   = -sum_m s(q_i, n_im)
            hard(i)       = -mean_j max_l s(q_i, d_jl);  0 when there is no such j
        document repulsion (repaired: depends on k, so a group baseline cannot cancel it):
            negative(i,k) = -sum_m s(d_ik, n_im)
            hard(i, k)    = -mean_j s(d_ik, q_j)
        info_nce: candidates are the positive, the negatives n_im, and q_j (document side, against
            d_ik) or every d_jl (query side, against q_i).
    """
    dtype = accumulator_dtype(rollouts)
    d, q = F.normalize(rollouts.to(dtype), dim=-1), F.normalize(queries.to(dtype), dim=-1)
    num_groups, num_rollouts, _ = d.shape
    ids = torch.arange(num_groups, device=d.device) if group_ids is None else group_ids
    other = ids[:, None] != ids[None, :]  # [i, j]
    num_other = other.sum(dim=1).clamp(min=1)  # [i]
    n = (
        d.new_zeros((num_groups, 0, d.shape[-1]))
        if negatives is None
        else F.normalize(negatives.to(dtype), dim=-1)
    )

    positive = torch.einsum("igh,ih->ig", d, q)
    siblings = torch.einsum("igh,ilh->igl", d, d)
    consistency = siblings.sum(-1) - siblings.diagonal(dim1=1, dim2=2)
    consistency = consistency / max(num_rollouts - 1, 1)

    if repulsion == "document":
        to_negatives = torch.einsum("igh,imh->igm", d, n)
        cross = torch.einsum("igh,jh->igj", d, q)
        mask = other[:, None, :].expand_as(cross)
        hard = -cross.masked_fill(~mask, 0.0).sum(-1) / num_other[:, None]
    else:
        to_negatives = torch.einsum("ih,imh->im", q, n)[:, None].expand(-1, num_rollouts, -1)
        cross = torch.einsum("ih,jlh->ijl", q, d)
        hard = -cross.amax(-1).masked_fill(~other, 0.0).sum(-1) / num_other
        hard = hard[:, None].expand_as(positive)
        mask = other[:, None, :, None].expand(-1, num_rollouts, -1, num_rollouts).flatten(2)
        cross = cross.flatten(1)[:, None].expand_as(mask)
    negative = -to_negatives.sum(-1)

    if form == "info_nce":
        candidates = torch.cat(
            [positive[..., None], to_negatives, cross.masked_fill(~mask, -torch.inf)], -1
        )
        count = 1 + to_negatives.shape[-1] + mask.sum(-1)
        hard = temperature * (count.to(d.dtype).log() - (candidates / temperature).logsumexp(-1))
        negative = torch.zeros_like(positive)
        hard_weight = 1.0
    total = (
        positive
        + negative_weight * negative
        + consistency_weight * consistency
        + hard_weight * hard
    )
    return ContrastiveReward(total / temperature, positive, negative, consistency, hard)


class TokenLogp(NamedTuple):
    """Log-probability of the chosen tokens and entropy of each row, both in nats, float32."""

    logp: Float[Tensor, "*rows"]
    entropy: Float[Tensor, "*rows"] | None


def token_logp_ref(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows_or_rows_k"],
    *,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    return_entropy: bool = False,
) -> TokenLogp:
    """Log softmax(logits / temperature)[target] and the entropy of that softmax.

    `targets` has the shape of the rows, or one more axis of K targets per row.
    """
    z = logits.to(accumulator_dtype(logits))
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    logp = z.log_softmax(-1)
    several = targets.ndim == logits.ndim
    picked = logp.gather(-1, targets if several else targets[..., None])
    entropy = -(logp.exp() * logp).sum(-1) if return_entropy else None
    return TokenLogp(picked if several else picked.squeeze(-1), entropy)


def linear_logp_ref(
    hidden: Float[Tensor, "*rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "*rows"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    return_entropy: bool = False,
) -> TokenLogp:
    """token_logp of hidden @ weight.T + bias, with the products in the accumulator's dtype."""
    dtype = accumulator_dtype(hidden)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return token_logp_ref(logits, targets, temperature=temperature, return_entropy=return_entropy)


class PolicyLoss(NamedTuple):
    """Per-token policy loss, not reduced: dividing by a token count is the caller's job."""

    loss: Float[Tensor, " n"]
    ratio: Float[Tensor, " n"]  # exp(logp - old_logp), the importance ratio, detached
    clipped: Bool[Tensor, " n"]  # tokens whose policy gradient a clip has cut to zero
    kl: Float[Tensor, " n"]  # k3 estimate of KL(policy || reference) in nats; 0 without ref_logp


def policy_loss_ref(
    logp: Float[Tensor, " n"],
    old_logp: Float[Tensor, " n"] | None,
    advantage: Float[Tensor, " n"],
    *,
    ref_logp: Float[Tensor, " n"] | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate of PPO with dual clip and k3 KL, per token.

        r = exp(clamp(logp - old_logp, -20, 20));  unclipped = r A
        loss = -min(unclipped, clip(r, 1 - epsilon, 1 + epsilon_high) A)
        loss = min(loss, -delta A) where A < 0 and delta is given   (dual clip, arXiv:1912.09729)
        loss += beta (exp(ref - logp) - (ref - logp) - 1)

    `old_logp=None` means on-policy: the ratio is 1 and its gradient that of logp (REINFORCE).
    """
    old = logp.detach() if old_logp is None else old_logp
    ratio = (logp - old).clamp(-20.0, 20.0).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)
    clipped = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - epsilon))
    if delta is not None:
        floor = torch.where(
            advantage < 0, delta * advantage, torch.full_like(advantage, -torch.inf)
        )
        clipped = clipped | (surrogate < floor)
        surrogate = torch.maximum(surrogate, floor)
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        log_ratio = (ref_logp - logp).clamp(-20.0, 20.0)
        kl = log_ratio.exp() - log_ratio - 1
    return PolicyLoss(beta * kl - surrogate, ratio.detach(), clipped, kl)
