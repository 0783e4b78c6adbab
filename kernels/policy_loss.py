r"""Policy loss and its metrics from log-probs that already exist, packed or padded.

    loss = sum_i weight_i loss_i(logp_i, entropy_i),  `policy_loss_ref`

One pass over about 28 bytes per token gives the loss, its derivative and every metric; the
backward only multiplies by the upstream scalar.
"""

import torch
from torch import Tensor

from tercet.kernels import _policy_terms as pt
from tercet.kernels import _policy_triton as fused
from tercet.kernels._checks import Impl, check_float, use_triton
from tercet.kernels._policy_checks import check_tokens, token_weights
from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels._scaled import scaled
from tercet.kernels._typing import Bool, Float, Int
from tercet.kernels.reference import DEFAULT_POLICY_LOSS, PolicyLoss, accumulator_dtype


@torch.library.custom_op("tercet::policy_loss", mutates_args=())
def _policy_loss(
    logp: Tensor,
    entropy: Tensor | None,
    old_logp: Tensor | None,
    advantage: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    weights: Tensor,
    counted: Tensor,
    loss_type: str,
    kl_estimator: str,
    numbers: list[float],
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulator_dtype(logp)
    given = old_logp, advantage, ref_logp, sampler_logp
    kind = pt.Kind.parse(loss_type, kl_estimator, numbers)
    spread = None if entropy is None else entropy.reshape(-1).to(dtype).contiguous()
    tokens = pt.Tokens.flat(dtype, counted, weights, *given)
    slopes = fused.slopes if triton else pt.slopes
    out = slopes(logp.reshape(-1).to(dtype).contiguous(), spread, tokens, kind)
    d_entropy = out.stats.new_empty(0) if out.entropy is None else out.entropy.view(logp.shape)
    return out.stats[0].clone(), out.stats, out.logp.view(logp.shape), d_entropy


@_policy_loss.register_fake
def _(
    logp, entropy, old_logp, advantage, ref_logp, sampler_logp, weights, counted,
    loss_type, kl_estimator, numbers, triton,
):  # fmt: skip
    dtype = accumulator_dtype(logp)
    bonus = pt.Kind.parse(loss_type, kl_estimator, numbers).entropy_coef > 0
    return (
        logp.new_empty((), dtype=dtype),
        logp.new_empty(pt.NUM_STATS, dtype=dtype),
        logp.new_empty(logp.shape, dtype=dtype),
        logp.new_empty(logp.shape if bonus else (0,), dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    logp, entropy = inputs[:2]
    ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
    ctx.bonus = output[3].shape == logp.shape
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    grads = [None] * 12
    if upstream is None:
        return tuple(grads)
    d_logp, d_entropy = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        grads[0] = scaled(d_logp, upstream, ctx.dtypes[0])
    if ctx.needs_input_grad[1] and ctx.bonus:
        grads[1] = scaled(d_entropy, upstream, ctx.dtypes[1])
    return tuple(grads)


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


def policy_loss(
    logp: Float[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"] | None,
    advantage: Float[Tensor, "*n"] | None,
    *,
    ref_logp: Float[Tensor, "*n"] | None = None,
    sampler_logp: Float[Tensor, "*n"] | None = None,
    entropy: Float[Tensor, "*n"] | None = None,
    mask: Bool[Tensor, "*n"] | None = None,
    config: PolicyLossConfig = DEFAULT_POLICY_LOSS,
    num_items: float | Float[Tensor, ""] | None = None,
    weights: Float[Tensor, "*n"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
    sequence_ids: Int[Tensor, "*n"] | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Policy loss, a scalar, and its metrics, from log-probs in nats: see PolicyLossConfig.

    Differentiable in logp and, under an entropy bonus, in entropy.  A token that does not count
    may hold anything, NaN included.

    Args:
        old_logp: before the update; None means on-policy: the ratio is 1, its gradient logp's.
        advantage: per token; None for "sft" alone.
        ref_logp: of the reference; needed where beta > 0, else for the metrics.
        sampler_logp: of the engine that sampled the tokens.  The loss without KL is multiplied by
            min(exp(old_logp - sampler_logp), importance_sampling_clip_max).
        entropy: of the policy; needed where entropy_coef > 0, else for the metrics.
        mask: true on the tokens that count; None counts all.
        num_items: tokens (token_mean) or sequences (the other aggregations) of the whole optimiser
            step, so that cutting it into calls changes nothing; None: those of this call.
        weights: of each token, in place of the aggregation: the loss is their weighted sum.
        cu_seqlens: boundaries of packed sequences, whole ones; needed by sequence_mean and by
            constant without num_items, unless sequence_ids are given or the tensors are padded
            [sequences, t].  Values are checked on a CPU and trusted on CUDA, as are sequence_ids.
        sequence_ids: of each token, in [0, n).

    Raises:
        TypeError: type or dtype of an argument.
        ValueError: shapes or devices differ, or config asks for what is not given.
        RuntimeError: impl="triton" where Triton cannot run; a second derivative.
    """
    op = "policy_loss"
    check_float(op, logp=logp)
    given = {
        "old_logp": old_logp,
        "advantage": advantage,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
    }
    check_tokens(op, config, logp, logp.shape, mask, **given, weights=weights, entropy=entropy)
    if config.entropy_coef > 0 and entropy is None:
        raise ValueError(f"{op}: entropy_coef={config.entropy_coef} needs entropy, got None")
    triton = use_triton(op, impl, logp)
    if triton and logp.dtype == torch.float64:
        raise TypeError(f"{op}: impl='triton' computes in float32, got float64 logp")
    counted = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    per_token = token_weights(
        op, config, counted, accumulator_dtype(logp),
        weights=weights, num_items=num_items, cu_seqlens=cu_seqlens, sequence_ids=sequence_ids,
    )  # fmt: skip
    parts = [None if x is None else x.detach() for x in given.values()]
    kind = pt.Kind.of(config)
    loss, stats, _, _ = _policy_loss(
        logp, entropy, *parts, per_token, counted, *kind[:2], list(kind[2:]), triton
    )
    return PolicyLoss(loss, pt.metrics_of(stats.detach()))
