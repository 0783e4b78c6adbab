"""The plain PyTorch meaning of every op.  Tests, benches and CPU paths are judged against these.

Written for reading, not for speed: a function here is a definition.  All of them are
differentiable, accept float64, and keep float64 when given it (else results are float32).
"""

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels._typing import Bool, Float, Int

NORM_EPS = 1e-12  # as torch.nn.functional.normalize
MAX_LOG_RATIO = 20.0  # nats; differences of log-probs are cut here, where their gradient ends
DEFAULT_POLICY_LOSS = PolicyLossConfig()

Repulsion = Literal["query", "document"]
Reduction = Literal["mean", "sum", "none"]
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


def info_nce_ref(
    queries: Float[Tensor, "batch hidden"],
    keys: Float[Tensor, "batch hidden"],
    negatives: Float[Tensor, "*batch m hidden"] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    ids: Int[Tensor, " batch"] | None = None,
    negative_ids: Int[Tensor, "*batch m"] | None = None,
    false_negative_margin: float | None = None,
    weight: Float[Tensor, " batch"] | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*batch_or_scalar"]:
    """Cross-entropy of picking one's key among the candidates, nats.

        loss_i = -log [ e^(s(q_i, k_i)/t) / sum over candidates c of e^(s(q_i, c)/t) ]

    Candidates of row i: its key, the other keys, and the negatives: a pool [m, hidden] for all
    rows, or its own of [batch, m, hidden].  s is the cosine, or the inner product without
    normalize.  A candidate but the key is no negative where its id is the row's, or where
    s(q_i, c) > s(q_i, k_i) - false_negative_margin (arXiv:2402.16829, with the model's own s).
    symmetric: the mean of this and of a key's loss among all queries, without the negatives.
    The mean is that of the weighted losses by the sum of the weights, 0 where that sum is 0.
    Source: arXiv:1807.03748, eq. 4; arXiv:2103.00020, fig. 3 (symmetric).
    """
    unit = [_unit_or_same(x, normalize) for x in (queries, keys)]
    s = unit[0] @ unit[1].T
    positive = s.diagonal()
    drop = torch.eye(len(s), dtype=torch.bool, device=s.device)
    if ids is not None:
        drop = drop | (ids[:, None] == ids)
    limit = torch.full_like(positive, torch.inf)
    if false_negative_margin is not None:
        limit = positive.detach() - false_negative_margin
    of_rows, dropped = [s], [drop | (s > limit[:, None])]
    if negatives is not None:
        of_rows.append(_to_negatives(unit[0], _unit_or_same(negatives, normalize)))
        dropped.append(of_rows[1] > limit[:, None])
        if ids is not None and negative_ids is not None:
            dropped[1] = dropped[1] | (ids[:, None] == negative_ids)
    losses = _nce(positive, torch.cat(of_rows, 1), torch.cat(dropped, 1), temperature)
    if symmetric:
        losses = (losses + _nce(positive, s.T, (drop | (s > limit)).T, temperature)) / 2
    weight = torch.ones_like(losses) if weight is None else weight
    losses = losses * weight
    if reduction == "mean":
        total = weight.sum()
        return losses.sum() / torch.where(total == 0, 1.0, total)
    return losses.sum() if reduction == "sum" else losses


def _unit_or_same(x: Tensor, normalize: bool) -> Tensor:
    x = x.to(accumulator_dtype(x))
    return F.normalize(x, dim=-1, eps=NORM_EPS) if normalize else x


def _to_negatives(q: Tensor, n: Tensor) -> Tensor:
    """Similarities with a pool or with every row's own negatives, [rows, m]."""
    return q @ n.T if n.ndim == 2 else torch.einsum("ih,imh->im", q, n)


def _nce(
    positive: Tensor, negatives: Tensor, dropped: Tensor, temperature: float | Tensor
) -> Tensor:
    logits = (negatives / temperature).masked_fill(dropped, -torch.inf)
    return -torch.cat([positive[:, None] / temperature, logits], dim=1).log_softmax(1)[:, 0]


class SimilarityStats(NamedTuple):
    """Where each row's key stands among its candidates; similarities have no temperature."""

    positive: Float[Tensor, " batch"]  # similarity with the key
    lse: Float[Tensor, " batch"]  # log-sum-exp of all similarities / temperature, nats
    hardest: Float[Tensor, " batch"]  # largest similarity of a negative; -inf without one
    hardest_index: Int[Tensor, " batch"]  # a key, or batch + a negative; -1 without one
    rank: Int[Tensor, " batch"]  # 1 + the negatives that are not below the positive
    margin: Float[Tensor, " batch"]  # positive - hardest


def similarity_stats_ref(
    queries: Float[Tensor, "batch hidden"],
    keys: Float[Tensor, "batch hidden"],
    negatives: Float[Tensor, "*batch m hidden"] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    normalize: bool = True,
    ids: Int[Tensor, " batch"] | None = None,
    negative_ids: Int[Tensor, "*batch m"] | None = None,
) -> SimilarityStats:
    """Statistics of info_nce's similarities; candidates and ids as there."""
    unit = [_unit_or_same(x, normalize) for x in (queries, keys)]
    s = unit[0] @ unit[1].T
    positive = s.diagonal()
    drop = torch.eye(len(s), dtype=torch.bool, device=s.device)
    if ids is not None:
        drop = drop | (ids[:, None] == ids)
    if negatives is not None:
        to_own = _to_negatives(unit[0], _unit_or_same(negatives, normalize))
        no_negative = torch.zeros_like(to_own, dtype=torch.bool)
        if ids is not None and negative_ids is not None:
            no_negative = ids[:, None] == negative_ids
        s, drop = torch.cat([s, to_own], dim=1), torch.cat([drop, no_negative], dim=1)
    candidates = torch.cat([positive[:, None], s.masked_fill(drop, -torch.inf)], dim=1)
    above = ~(s <= positive[:, None]) & ~drop
    if not s.numel():
        index = torch.empty(0, dtype=torch.int64, device=s.device)
        return SimilarityStats(positive, positive, positive, index, index, positive)
    hardest, index = candidates[:, 1:].max(1)
    return SimilarityStats(
        positive,
        (candidates / temperature).logsumexp(1),
        hardest,
        torch.where(drop.all(1), -1, index),
        1 + above.sum(1),
        positive - hardest,
    )


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
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
) -> TokenLogp:
    """token_logp of logit_scale (hidden @ weight.T + bias), capped by softcap tanh(x / softcap).

    The products are in the accumulator's dtype.
    """
    dtype = accumulator_dtype(hidden)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logp_ref(logits, targets, temperature=temperature, return_entropy=return_entropy)


class PolicyTerms(NamedTuple):
    """Policy loss of each token, not reduced, and what is worth knowing of it (detached)."""

    loss: Float[Tensor, "*n"]
    ratio: Float[Tensor, "*n"]  # exp(logp - old_logp), the importance ratio
    clipped_low: Bool[Tensor, "*n"]  # r below its lower bound: no policy gradient
    clipped_high: Bool[Tensor, "*n"]  # above its upper bound; in cispo its weight is cut
    clipped_dual: Bool[Tensor, "*n"]  # the loss is cut to -delta A
    kl_k1: Float[Tensor, "*n"]  # estimates of KL(policy || reference) in nats; 0 without ref_logp
    kl_k2: Float[Tensor, "*n"]
    kl_k3: Float[Tensor, "*n"]
    sampler_ratio: Float[Tensor, "*n"]  # exp(old_logp - sampler_logp), not capped; 1 without


def _exp_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss_ref(
    logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"] | None,
    advantage: Float[Tensor, "*n"] | None,
    *,
    ref_logp: Float[Tensor, "*n"] | None = None,
    sampler_logp: Float[Tensor, "*n"] | None = None,
    entropy: Float[Tensor, "*n"] | None = None,
    config: PolicyLossConfig = DEFAULT_POLICY_LOSS,
) -> PolicyTerms:
    """Policy loss of each token: `loss_type` * sampler weight + beta KL - entropy_coef entropy.

        r = exp(logp - old_logp);  u = r A;  A = 1 for sft
        clipped types    -max(min(u, clip(r, 1 - epsilon, 1 + epsilon_high) A), delta A if A < 0)
        cispo            -stop_gradient(min(r, epsilon_high)) A logp
        sapo             -4 sigmoid(tau (r - 1)) A / tau
        reinforce, sft   -A logp
        sampler weight   stop_gradient(min(exp(old_logp - sampler_logp), cap))
        KL, x = ref_logp - logp:  k1 = -x,  k2 = x^2 / 2,  k3 = exp(x) - x - 1

    `old_logp=None` means on-policy: r = 1, with the gradient of logp.
    """
    old = logp.detach() if old_logp is None else old_logp.detach()
    a = torch.ones_like(logp) if advantage is None else advantage.detach()
    ratio = _exp_difference(logp, old)
    loss, low, high, dual = _surrogate_ref(logp, ratio, a, config)
    sampler_ratio = torch.ones_like(logp.detach())
    if sampler_logp is not None:
        sampler_ratio = _exp_difference(old, sampler_logp.detach())
        loss = loss * sampler_ratio.clamp(max=config.importance_sampling_clip_max)
    kls = [torch.zeros_like(logp)] * 3
    if ref_logp is not None:
        x = (ref_logp.detach() - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kls = [-x, x.square() / 2, x.exp() - x - 1]
    if config.beta > 0:
        loss = loss + config.beta * kls[("k1", "k2", "k3").index(config.kl_estimator)]
    if config.entropy_coef > 0:
        assert entropy is not None
        loss = loss - config.entropy_coef * entropy
    k1, k2, k3 = (kl.detach() for kl in kls)
    return PolicyTerms(loss, ratio.detach(), low, high, dual, k1, k2, k3, sampler_ratio)


def _surrogate_ref(
    logp: Tensor, ratio: Tensor, a: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss without KL and entropy, and which tokens are cut below, above and by the dual clip."""
    never = torch.zeros_like(a, dtype=torch.bool)
    if config.loss_type in ("reinforce", "sft"):
        return -a * logp, never, never, never
    if config.loss_type == "cispo":
        high = (ratio > config.upper) & (a != 0)
        return -ratio.detach().clamp(max=config.upper) * a * logp, never, high, never
    if config.loss_type == "sapo":
        up = (a > 0).to(a.dtype)
        tau = config.sapo_temperature_pos * up + config.sapo_temperature_neg * (1 - up)
        return -4 * torch.sigmoid(tau * (ratio - 1)) * a / tau, never, never, never
    low = (a < 0) & (ratio < 1 - config.epsilon)
    high = (a > 0) & (ratio > config.upper)
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - config.epsilon, config.upper) * a)
    if config.delta is None:
        return -surrogate, low, high, never
    floor = torch.where(a < 0, config.delta * a, -torch.inf)
    return -torch.maximum(surrogate, floor), low, high, surrogate < floor


def aggregation_weights(
    counted: Bool[Tensor, "*n"],
    config: PolicyLossConfig,
    *,
    num_items: float | Float[Tensor, ""] | None = None,
    sequence_ids: Int[Tensor, "*n"] | None = None,
    num_sequences: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*n"]:
    """Weight of each token in `dtype`: the loss is the sum of weight * loss of a token.

    `num_items` counts tokens (token_mean) or sequences (the others) of the whole optimiser step;
    None counts those of this call, where a sequence without a counted token is none.
    `sequence_ids` are in [0, num_sequences); token_mean needs none.
    """
    lengths = None
    if sequence_ids is not None:
        ids = sequence_ids.flatten().to(torch.int64)
        lengths = ids.new_zeros(num_sequences).index_add_(0, ids, counted.flatten().long())
    if num_items is None:
        if config.aggregates == "token_mean":
            num_items = counted.sum()
        else:
            assert lengths is not None
            num_items = (lengths > 0).sum()
    if isinstance(num_items, Tensor):
        num_items = num_items.detach().clamp(min=1)
    weights = counted.to(dtype) / num_items
    if config.aggregates == "sequence_mean":
        assert sequence_ids is not None
        assert lengths is not None
        return weights / lengths.clamp(min=1)[sequence_ids.to(torch.int64)]
    if config.aggregates == "constant":
        assert config.max_completion_length is not None
        return weights / config.max_completion_length
    return weights


class PolicyMetrics(NamedTuple):
    """What one call saw: means over its counted tokens unless said otherwise; all are scalars.

    A call without a counted token has zeros.
    """

    clip_ratio_low: Float[Tensor, ""]  # share of tokens, as PolicyTerms.clipped_low
    clip_ratio_high: Float[Tensor, ""]
    clip_ratio_dual: Float[Tensor, ""]
    kl_k1: Float[Tensor, ""]  # nats
    kl_k2: Float[Tensor, ""]
    kl_k3: Float[Tensor, ""]
    ratio_mean: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]  # largest
    entropy: Float[Tensor, ""]  # nats; 0 when it was not given
    sampler_ratio_mean: Float[Tensor, ""]  # p_old / p_sampler before its cap
    sampler_ratio_max: Float[Tensor, ""]  # largest
    num_tokens: Float[Tensor, ""]  # counted: neither masked nor ignored
    num_live: Float[Tensor, ""]  # counted and with a gradient that is not zero


class PolicyLoss(NamedTuple):
    """Scalar loss, differentiable, and metrics, which are not."""

    loss: Float[Tensor, ""]
    metrics: PolicyMetrics


def policy_total_ref(
    logp: Float[Tensor, " n"],
    old_logp: Float[Tensor, " n"] | None,
    advantage: Float[Tensor, " n"] | None,
    *,
    weights: Float[Tensor, " n"],
    ref_logp: Float[Tensor, " n"] | None = None,
    sampler_logp: Float[Tensor, " n"] | None = None,
    entropy: Float[Tensor, " n"] | None = None,
    config: PolicyLossConfig = DEFAULT_POLICY_LOSS,
) -> PolicyLoss:
    """Sum of weights * `policy_loss_ref` over n counted tokens, and the metrics."""

    def terms_of(logp: Tensor, entropy: Tensor | None) -> PolicyTerms:
        return policy_loss_ref(
            logp, old_logp, advantage,
            ref_logp=ref_logp, sampler_logp=sampler_logp, entropy=entropy, config=config,
        )  # fmt: skip

    def mean(x: Tensor) -> Tensor:
        return x.detach().to(weights.dtype).sum() / max(len(logp), 1)

    def largest(x: Tensor) -> Tensor:
        return x.max() if len(x) else mean(x)

    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (logp, entropy) if x is not None]
        total = (weights.detach() * terms_of(*inputs, *[None] * (2 - len(inputs))).loss).sum()
        slopes = torch.autograd.grad(total, inputs, allow_unused=True)
    live = torch.stack([slope for slope in slopes if slope is not None]).ne(0).any(0)

    terms = terms_of(logp, entropy)
    metrics = PolicyMetrics(
        clip_ratio_low=mean(terms.clipped_low),
        clip_ratio_high=mean(terms.clipped_high),
        clip_ratio_dual=mean(terms.clipped_dual),
        kl_k1=mean(terms.kl_k1),
        kl_k2=mean(terms.kl_k2),
        kl_k3=mean(terms.kl_k3),
        ratio_mean=mean(terms.ratio),
        ratio_max=largest(terms.ratio),
        entropy=mean(torch.zeros_like(logp) if entropy is None else entropy),
        sampler_ratio_mean=mean(terms.sampler_ratio),
        sampler_ratio_max=largest(terms.sampler_ratio),
        num_tokens=mean(torch.ones_like(logp)) * len(logp),
        num_live=mean(live) * len(logp),
    )
    return PolicyLoss((weights * terms.loss).sum(), metrics)


def policy_head_ref(
    hidden: Float[Tensor, "n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " n"],
    old_logp: Float[Tensor, " n"] | None,
    advantage: Float[Tensor, " n"] | None,
    *,
    weights: Float[Tensor, " n"],
    ref_logp: Float[Tensor, " n"] | None = None,
    sampler_logp: Float[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    ignore_index: int = -100,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float | Float[Tensor, " n"] = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    config: PolicyLossConfig = DEFAULT_POLICY_LOSS,
) -> PolicyLoss:
    """Sum over the counted tokens of weights * policy loss, from hidden states and the LM head.

    A token counts unless `mask` is false or its target is `ignore_index`.  Logits:
        x = logit_scale (hidden weight^T + bias),  then softcap tanh(x / softcap) when given
    """
    counted = targets != ignore_index
    counted = counted if mask is None else counted & mask

    def kept(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[counted]

    dtype = accumulator_dtype(hidden)
    wide_bias = None if bias is None else bias.to(dtype)
    logits = logit_scale * F.linear(hidden[counted].to(dtype), weight.to(dtype), wide_bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor) and temperature.ndim > 0:
        temperature = temperature[counted]
    logp, entropy = token_logp_ref(
        logits, targets[counted].to(torch.int64), temperature=temperature, return_entropy=True
    )
    return policy_total_ref(
        logp,
        kept(old_logp),
        kept(advantage),
        weights=weights[counted],
        ref_logp=kept(ref_logp),
        sampler_logp=kept(sampler_logp),
        entropy=entropy,
        config=config,
    )
