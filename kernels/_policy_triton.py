"""Triton kernels of policy_loss and policy_head: tokens in blocks, and the gradient of rows."""
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from tercet.kernels import _policy_terms as pt
from tercet.kernels import _row_softmax as rs
from tercet.kernels._row_softmax_triton import NUM_WARPS, block_size
from tercet.kernels.reference import MAX_LOG_RATIO

BLOCK_N = 1024
CLIPPED, CISPO, SAPO, PLAIN = range(4)
FORMS = {"cispo": CISPO, "sapo": SAPO, "reinforce": PLAIN, "sft": PLAIN}  # the others: CLIPPED
ESTIMATORS = ("k1", "k2", "k3")


@triton.jit
def _clamped(x, MAX: tl.constexpr):
    return tl.clamp(x, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp_clamped(x, MAX: tl.constexpr):
    y = tl.exp(_clamped(x, MAX))
    return y, tl.where(tl.abs(x) > MAX, 0.0, y)


@triton.jit
def _expm1(x):
    u = tl.exp(x)
    log_u = tl.where((u == 1.0) | (u == 0.0), 1.0, tl.log(u))
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * x / log_u))


@triton.jit
def _surrogate(
    logp, ratio, d_ratio, a, lower, upper, delta, tau_pos, tau_neg, FORM: tl.constexpr
):  # fmt: skip
    """Loss without KL and entropy, its derivative, and what is cut: below, above, dual."""
    never = a != a
    low, high, dual = never, never, never
    if FORM == 0:  # constants as in FORMS: a kernel cannot read globals
        low = (a < 0) & (ratio < lower)
        high = (a > 0) & (ratio > upper)
        dual = (a < 0) & (ratio > delta)
        held = tl.where(dual, delta, tl.where(low, lower, tl.where(high, upper, ratio)))
        loss = -held * a
        slope = tl.where(low | high | dual, 0.0, -d_ratio * a)
    elif FORM == 1:
        high = (ratio > upper) & (a != 0)
        slope = -tl.minimum(ratio, upper) * a
        loss = slope * logp
    elif FORM == 2:
        tau = tl.where(a > 0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        loss = -4.0 * gate * a / tau
        slope = -4.0 * gate * (1.0 - gate) * a * d_ratio
    else:
        loss = -a * logp
        slope = -a
    return loss, slope, low, high, dual


@triton.jit(do_not_specialize=["n"])
def _policy_tokens(
    logp_ptr, entropy_ptr, old_ptr, advantage_ptr, ref_ptr, sampler_ptr, weight_ptr, counted_ptr,
    slope_ptr, dentropy_ptr, stats_ptr, n,
    lower, upper, delta, beta, entropy_coef, tau_pos, tau_neg, cap,
    FORM: tl.constexpr, KL: tl.constexpr, BONUS: tl.constexpr, MAX: tl.constexpr,
    NUM_STATS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = offs < n
    counted = (tl.load(counted_ptr + offs, mask=inside, other=0) != 0) & inside  # [BLOCK_N]
    weight = tl.load(weight_ptr + offs, mask=counted, other=0.0)
    logp = tl.load(logp_ptr + offs, mask=counted, other=0.0)
    entropy = tl.zeros_like(logp)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + offs, mask=counted, other=0.0)
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + offs, mask=counted, other=0.0)
    a = tl.where(counted, 1.0, 0.0)
    if advantage_ptr is not None:
        a = tl.load(advantage_ptr + offs, mask=counted, other=0.0)

    ratio, d_ratio = _exp_clamped(logp - old, MAX)
    loss, slope, low, high, dual = _surrogate(
        logp, ratio, d_ratio, a, lower, upper, delta, tau_pos, tau_neg, FORM
    )
    sampler_ratio = tl.where(counted, 1.0, 0.0)
    if sampler_ptr is not None:
        sampler = tl.load(sampler_ptr + offs, mask=counted, other=0.0)
        sampler_ratio = tl.where(counted, _exp_clamped(old - sampler, MAX)[0], 0.0)
        loss *= tl.minimum(sampler_ratio, cap)
        slope *= tl.minimum(sampler_ratio, cap)
    k1, k2, k3 = tl.zeros_like(logp), tl.zeros_like(logp), tl.zeros_like(logp)
    if ref_ptr is not None:
        wide = tl.load(ref_ptr + offs, mask=counted, other=0.0) - logp
        x = _clamped(wide, MAX)
        rise = _expm1(x)
        k1, k2, k3 = -x, 0.5 * x * x, rise - x
        free = tl.where(tl.abs(wide) > MAX, 0.0, beta)
        if KL == 1:
            loss += beta * k1
            slope += free
        elif KL == 2:
            loss += beta * k2
            slope -= free * x
        elif KL == 3:
            loss += beta * k3
            slope -= free * rise
    slope *= weight
    live = slope != 0
    if BONUS:
        loss -= entropy_coef * entropy
        d_entropy = -entropy_coef * weight
        live = live | (d_entropy != 0)
        tl.store(dentropy_ptr + offs, d_entropy, mask=inside)
    tl.store(slope_ptr + offs, slope, mask=inside)

    stats_ptr += block * NUM_STATS
    ratio = tl.where(counted, ratio, 0.0)
    tl.store(stats_ptr, tl.sum(weight * loss))
    tl.store(stats_ptr + 1, tl.sum(tl.where(low, 1.0, 0.0)))
    tl.store(stats_ptr + 2, tl.sum(tl.where(high, 1.0, 0.0)))
    tl.store(stats_ptr + 3, tl.sum(tl.where(dual, 1.0, 0.0)))
    tl.store(stats_ptr + 4, tl.sum(k1))
    tl.store(stats_ptr + 5, tl.sum(k2))
    tl.store(stats_ptr + 6, tl.sum(k3))
    tl.store(stats_ptr + 7, tl.sum(ratio))
    tl.store(stats_ptr + 8, tl.sum(entropy))
    tl.store(stats_ptr + 9, tl.sum(sampler_ratio))
    tl.store(stats_ptr + 10, tl.sum(tl.where(counted, 1.0, 0.0)))
    tl.store(stats_ptr + 11, tl.sum(tl.where(live, 1.0, 0.0)))
    tl.store(stats_ptr + 12, tl.max(ratio))
    tl.store(stats_ptr + 13, tl.max(sampler_ratio))


def slopes(logp: Tensor, entropy: Tensor | None, tokens: pt.Tokens, kind: pt.Kind) -> pt.Slopes:
    """`_policy_terms.slopes` as one kernel; sums of blocks are added in a fixed order."""
    n = len(logp)
    slope = torch.empty_like(logp)
    d_entropy = torch.empty_like(logp) if kind.entropy_coef > 0 else None
    blocks = triton.cdiv(n, BLOCK_N)
    partial = logp.new_zeros(max(blocks, 1), pt.NUM_STATS)
    if n:
        with torch.cuda.device_of(logp):
            _policy_tokens[(blocks,)](
                logp, entropy, tokens.old_logp, tokens.advantage, tokens.ref_logp,
                tokens.sampler_logp, tokens.weights, tokens.counted.view(torch.uint8),
                slope, d_entropy, partial, n, *kind[2:],
                FORM=FORMS.get(kind.loss_type, CLIPPED),
                KL=1 + ESTIMATORS.index(kind.kl_estimator) if kind.beta > 0 else 0,
                BONUS=kind.entropy_coef > 0, MAX=MAX_LOG_RATIO,
                NUM_STATS=pt.NUM_STATS, BLOCK_N=BLOCK_N,
            )  # fmt: skip
    sums, maxima = partial[:, : pt.NUM_SUMS].sum(0), partial[:, pt.NUM_SUMS :].amax(0)
    return pt.Slopes(slope, d_entropy, torch.cat([sums, maxima]))


@triton.jit
def _policy_grad(
    x_ptr, dx_ptr, index_ptr, target_ptr, dtarget_ptr, max_ptr, scale_ptr, log_sum_ptr, a_ptr,
    b_ptr, V, first_column, logit_scale, softcap,
    ENTROPY: tl.constexpr, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Row index[i] of x gives row i of dx; both are contiguous tiles of V columns."""
    row = tl.program_id(0).to(tl.int64)  # int64 before any stride: N*V can exceed 2^31
    source = row
    if index_ptr is not None:
        source = tl.load(index_ptr + row)
    x_ptr += source * V
    dx_ptr += row * V
    scale = tl.load(scale_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    dtarget = tl.load(dtarget_ptr + row)
    column = tl.load(target_ptr + row) - first_column
    dead = (a == 0) & (b == 0)
    read = tl.where(dead, 0, V)  # nothing flows back: x is not read, so its NaN cannot leak
    m = tl.where(dead, 0.0, tl.load(max_ptr + row))
    for start in range(0, V, BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        x = tl.load(x_ptr + offs, mask=offs < read, other=float("-inf")).to(tl.float32)  # [BLOCK_V]
        log_p = (x - m) * scale - log_sum
        p = tl.exp(log_p)
        factor = a
        if ENTROPY:
            factor += b * tl.where(p > 0, log_p, 0.0)
        dx = tl.where(offs < read, -p * factor, 0.0)
        dx = tl.where(offs == column, dtarget, dx)
        if CAPPED:
            share = tl.where(offs < read, x, 0.0) / softcap
            dx *= logit_scale * (1.0 - share * share)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=offs < V)


def row_gradient(
    dx: Tensor,
    x: Tensor,
    index: Tensor | None,
    query: rs.Query,
    grads: rs.RowGrads,
    *,
    first_column: int,
    entropy: bool,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Writes the gradient of rows `index` of x (None: all) to the rows of dx; one target each."""
    vocab = x.shape[1]
    with torch.cuda.device_of(x):
        _policy_grad[(len(dx),)](
            x, dx, index, query.targets, grads.target, *grads.coef.contiguous().unbind(),
            vocab, first_column, logit_scale, 0.0 if softcap is None else softcap,
            ENTROPY=entropy, CAPPED=softcap is not None,
            BLOCK_V=block_size(vocab), num_warps=NUM_WARPS,
        )  # fmt: skip
