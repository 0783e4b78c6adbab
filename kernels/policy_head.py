r"""Policy-gradient loss (or cross-entropy) from hidden states and the LM head, in three products.

    x = logit_scale (hidden weight^T + bias),  capped where softcap is given,  z = x / temperature
    loss = sum_i weight_i loss_i(log softmax(z_i)[target_i], entropy_i),  `policy_loss_ref`

The derivative of such a loss by a token's logits needs nothing but that token, so the forward
takes it while the logits are at hand: one product for them, and two turn their gradient into
those of `hidden` and `weight`; the backward multiplies by the upstream scalar.  Log-probs with an
arbitrary upstream (`linear_logp`) cost four.  Rows without a gradient - ignored, clipped, of
advantage 0 - leave before the two.

A chunk holds as many rows of logits as the memory budget allows.  Its vocabulary is swept twice
in tiles: for the sums of the rows, then for the gradient, which exists one tile at a time.  On a
CPU, without softcap and entropy bonus, one sweep turns whole rows into exponentials, of which the
gradient is a multiple per row.
Related: arXiv:2410.10989 (gradient of the cross-entropy in the forward).
"""

from typing import cast

import torch
from torch import Tensor

from tercet.kernels import _linear_tiles as lt
from tercet.kernels import _policy_pass as run
from tercet.kernels import _policy_terms as pt
from tercet.kernels import _row_softmax as rs
from tercet.kernels._checks import Impl, RowImpl, choose_rows
from tercet.kernels._policy_checks import check_tokens, token_weights
from tercet.kernels._policy_config import PolicyLossConfig
from tercet.kernels._scaled import scaled
from tercet.kernels._typing import Bool, Float, Int
from tercet.kernels.linear_logp import check_budget, check_head
from tercet.kernels.reference import DEFAULT_POLICY_LOSS, PolicyLoss, accumulator_dtype

CPU_BUDGET_MB = 88
CUDA_BUDGET_MB = 2384  # 2.5 GB; of a weight [152k, 4096]: chunks of 3300 rows


@torch.library.custom_op("tercet::policy_head", mutates_args=())
def _policy_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor | None,
    ref_logp: Tensor | None,
    sampler_logp: Tensor | None,
    weights: Tensor,
    counted: Tensor,
    loss_type: str,
    kl_estimator: str,
    numbers: list[float],
    logit_scale: float,
    softcap: float | None,
    needs: list[bool],
    memory_budget_mb: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = old_logp, advantage, ref_logp, sampler_logp
    options = run.Options(
        pt.Kind.parse(loss_type, kl_estimator, numbers),
        lt.Cap(logit_scale, softcap), run.Needs(*needs), memory_budget_mb, cast(RowImpl, impl),
    )  # fmt: skip
    tokens = pt.Tokens.flat(accumulator_dtype(hidden), counted, weights, *given)
    return run.policy_pass(hidden, weight, bias, targets, temperature, tokens, options)


@_policy_head.register_fake
def _(
    hidden, weight, bias, targets, temperature, old_logp, advantage, ref_logp, sampler_logp,
    weights, counted, loss_type, kl_estimator, numbers, logit_scale, softcap, needs,
    memory_budget_mb, impl,
):  # fmt: skip
    wide = accumulator_dtype(hidden)
    shapes = (hidden.shape, weight.shape, (weight.shape[0],))
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(pt.NUM_STATS, dtype=wide),
        *(
            hidden.new_empty(shape if need else (0,), dtype=wide)
            for shape, need in zip(shapes, needs, strict=True)
        ),
        hidden.new_empty((), dtype=wide),
    )


def _setup_context(ctx, inputs, output):
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for outputs as large as the weight


def _backward(ctx, upstream, *_):
    out = [None] * 19
    if upstream is None:
        return tuple(out)
    *grads, unit = ctx.saved_tensors
    scale = upstream * unit
    for i, (grad, dtype) in enumerate(zip(grads, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i]:
            out[i] = scaled(grad, scale, dtype)
    return tuple(out)


_policy_head.register_autograd(_backward, setup_context=_setup_context)


def policy_head(
    hidden: Float[Tensor, "*n hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "*n"],
    old_logp: Float[Tensor, "*n"] | None,
    advantage: Float[Tensor, "*n"] | None,
    *,
    ref_logp: Float[Tensor, "*n"] | None = None,
    sampler_logp: Float[Tensor, "*n"] | None = None,
    mask: Bool[Tensor, "*n"] | None = None,
    ignore_index: int = -100,
    config: PolicyLossConfig = DEFAULT_POLICY_LOSS,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float | Float[Tensor, "*n"] = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    num_items: float | Float[Tensor, ""] | None = None,
    weights: Float[Tensor, "*n"] | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
    sequence_ids: Int[Tensor, "*n"] | None = None,
    memory_budget_mb: int | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """Policy loss, a scalar, and its metrics, from hidden states and the LM head.

    Differentiable in hidden, weight and bias; what needs no gradient costs no product: three
    products of 2 N H V FLOPs, two with a frozen head, one without gradients.  Rows that do not
    count may hold anything, NaN included, and cost nothing; a row whose derivative is exactly 0
    costs one product, for the metrics.  On CUDA the products run in half precision when hidden
    and weight share that dtype, with float32 logits and sums; else in float32.

    A head with LoRA adapters: merge them, as W + B A; gradients then flow through that sum.

    Args:
        targets: int32 or int64, the tokens whose loss it is; `ignore_index` where there is none.
        old_logp, advantage, ref_logp, sampler_logp, mask, num_items, weights, cu_seqlens,
            sequence_ids: see `policy_loss`; "sft" takes neither old_logp nor advantage.
        config: loss type, aggregation, clips, KL, entropy bonus.
        temperature: > 0, one number or one per token; gets no gradient.
        softcap: logits are softcap * tanh(logits / softcap), as in Gemma 2.
        logit_scale: > 0, factor on the logits before the cap, as in Cohere.
        memory_budget_mb: MiB of workspace beside the gradients (which stay in float32 until the
            backward): the logits of a chunk, and tiles.  One row of logits is the least.  None
            means 88 on a CPU and 2384 on CUDA.

    Raises:
        TypeError: type or dtype of an argument, a DTensor, or a module instead of its weight.
        IndexError: a target outside the vocabulary on a CPU; on CUDA, which is not waited for, it
            gives NaN.
        ValueError: shapes or devices differ, an option is out of its range, or config asks for
            what is not given.  Losses of whole sequences are `gspo_loss` and `dpo_loss`.
        RuntimeError: impl="triton" where Triton cannot run; a second derivative.
    """
    op = "policy_head"
    check_head(op, hidden, weight, bias)
    shape = hidden.shape[:-1]
    temperatures = rs.check_query(op, targets, temperature, hidden)
    if targets.shape != shape:
        raise ValueError(f"{op}: targets must be {tuple(shape)}, got {tuple(targets.shape)}")
    given = {
        "old_logp": old_logp,
        "advantage": advantage,
        "ref_logp": ref_logp,
        "sampler_logp": sampler_logp,
    }
    check_tokens(op, config, hidden, shape, mask, **given, weights=weights)
    lt.Cap(logit_scale, softcap).check(op)
    if memory_budget_mb is None:
        memory_budget_mb = CUDA_BUDGET_MB if hidden.is_cuda else CPU_BUDGET_MB
    check_budget(op, memory_budget_mb)
    rows_impl = choose_rows(op, impl, hidden)

    counted = targets != ignore_index
    counted = counted if mask is None else counted & mask
    if temperatures.ndim > 0:
        temperatures = temperatures.masked_fill(~counted, 1.0)
    per_token = token_weights(
        op, config, counted, accumulator_dtype(hidden),
        weights=weights, num_items=num_items, cu_seqlens=cu_seqlens, sequence_ids=sequence_ids,
    )  # fmt: skip
    needs = [
        x is not None and x.requires_grad and torch.is_grad_enabled()
        for x in (hidden, weight, bias)
    ]
    parts = [None if x is None else x.detach() for x in given.values()]
    kind = pt.Kind.of(config)
    loss, stats, *_ = _policy_head(
        hidden, weight, bias, targets.masked_fill(~counted, 0), temperatures, *parts, per_token,
        counted, *kind[:2], list(kind[2:]), float(logit_scale), softcap, needs, memory_budget_mb,
        rows_impl,
    )  # fmt: skip
    return PolicyLoss(loss, pt.metrics_of(stats.detach()))
