r"""Log-probability of chosen tokens and entropy of each row, from logits that already exist.

    z = x / temperature,  logp = z_t - logsumexp(z),  H = logsumexp(z) - sum_j p_j z_j
    dx_j = (g (1[j = t] - p_j) - g_H p_j (log p_j + H)) / temperature

The row arithmetic is in `_row_softmax.py`.  Bytes moved, for N rows of V logits of b bytes: the
forward reads N V b once, the backward reads N V b and writes N V b, in place if asked to.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tercet.kernels import _row_softmax as rs
from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels import _row_softmax_triton as fused
from tercet.kernels._checks import Impl, check_float, choose_rows
from tercet.kernels._memory import empty_huge
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import TokenLogp, accumulator_dtype

CPU_TILE_BYTES = 2**21  # of a chunk of rows: stays in the cores' own caches


@torch.library.custom_op("tercet::token_logp", mutates_args=())
def _token_logp(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    return_entropy: bool,
    impl: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = fused.rows_of("token_logp", "logits", logits)
    query = rs.flatten_query("token_logp", logits.shape, targets, temperature, logits)
    state = rs.empty_state(query)
    if impl == "torch":
        _forward_torch(state, logits, rows, query, return_entropy)
    else:
        kernels = fused if impl == "triton" else compiled
        kernels.forward(logits, rows, *query, state, first_column=0, entropy=return_entropy)
    result = rs.finish(state, query)
    entropy = result.entropy.view(logits.shape[:-1]) if return_entropy else _nothing(result.stats)
    return result.logp.view(targets.shape), entropy, result.stats


@_token_logp.register_fake
def _(logits, targets, temperature, return_entropy, impl, inplace_backward):
    dtype = accumulator_dtype(logits)
    rows = logits.shape[:-1]
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(rows if return_entropy else (0,), dtype=dtype),
        logits.new_empty((2, rows.numel()), dtype=dtype),
    )


@torch.library.custom_op("tercet::token_logp_backward", mutates_args=())
def _token_logp_backward(
    g: Tensor | None,
    g_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    impl: str,
) -> Tensor:
    dlogits = empty_huge(logits.shape, dtype=logits.dtype, device=logits.device)
    _write_gradient(dlogits, g, g_entropy, logits, targets, temperature, logp, entropy, stats, impl)
    return dlogits


@_token_logp_backward.register_fake
def _(g, g_entropy, logits, targets, temperature, logp, entropy, stats, impl):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("tercet::token_logp_backward_", mutates_args={"logits"})
def _token_logp_backward_(
    g: Tensor | None,
    g_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    impl: str,
) -> None:
    _write_gradient(logits, g, g_entropy, logits, targets, temperature, logp, entropy, stats, impl)


def _write_gradient(
    dlogits: Tensor,
    g: Tensor | None,
    g_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    impl: str,
) -> None:
    rows = fused.rows_of("token_logp", "logits", logits)
    query = rs.flatten_query("token_logp", logits.shape, targets, temperature, logits)
    grads = flat_grads(g, g_entropy, logp, entropy, stats, query)
    if impl == "torch":
        _backward_torch(dlogits, logits, rows, query, grads, g_entropy is not None)
        return
    kernels = fused if impl == "triton" else compiled
    kernels.backward(
        dlogits, logits, rows, query.targets, (grads.coef, grads.target),
        first_column=0, entropy=g_entropy is not None,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, ctx.return_entropy, ctx.impl, ctx.inplace = inputs
    ctx.save_for_backward(logits, targets, temperature, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, g, g_entropy, _):
    g_entropy = g_entropy if ctx.return_entropy else None
    if g is None and g_entropy is None:
        return (None,) * 6
    args = (g, g_entropy, *ctx.saved_tensors, ctx.impl)
    if not ctx.inplace:
        return _token_logp_backward(*args), *(None,) * 5
    if torch.is_grad_enabled():
        raise RuntimeError(
            "token_logp: inplace_backward=True must be False for a second derivative, got "
            "create_graph=True"
        )
    logits = ctx.saved_tensors[0]
    _token_logp_backward_(*args)  # marks logits as changed: whoever saved them is told
    return logits.detach(), *(None,) * 5


_token_logp.register_autograd(_backward, setup_context=_setup_context)


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def flat_grads(
    g: Tensor | None,
    g_entropy: Tensor | None,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    query: rs.Query,
) -> rs.RowGrads:
    """Coefficients of the backward from what the forward returned and the upstream gradients."""
    shape = query.targets.shape
    result = rs.RowResult(logp.reshape(shape), entropy.reshape(-1), stats)
    flat = torch.zeros_like(result.logp) if g is None else g.reshape(shape)
    return rs.row_grads(result, query, flat, None if g_entropy is None else g_entropy.reshape(-1))


def _forward_torch(
    state: rs.RowState, logits: Tensor, rows: fused.Rows, query: rs.Query, entropy: bool
) -> None:
    works = _works(logits, query.scale, 2 if entropy else 1)
    for chunk, x in _row_chunks(logits, rows, query.scale.itemsize):
        scratch = works[1][: len(x)] if entropy else None
        part = rs.RowState(state.stats[:, chunk], state.picked[chunk])
        rs.add_tile(
            part, x, query.rows(chunk), first_column=0, work=works[0][: len(x)], scratch=scratch
        )
    rs.close(state, query)


def _backward_torch(
    dlogits: Tensor,
    logits: Tensor,
    rows: fused.Rows,
    query: rs.Query,
    grads: rs.RowGrads,
    entropy: bool,
) -> None:
    direct = dlogits.dtype == query.scale.dtype
    works = _works(logits, query.scale, (not direct) + entropy)
    flat = dlogits.view(-1, dlogits.shape[-1])
    for chunk, x in _row_chunks(logits, rows, query.scale.itemsize):
        buffers = [buffer[: len(x)] for buffer in works]
        out = flat[chunk] if direct else buffers[0]
        rs.grad_tile(
            out, x, query.rows(chunk), grads.rows(chunk),
            first_column=0, scratch=buffers[-1] if entropy else None,
        )  # fmt: skip
        if not direct:
            flat[chunk] = out


def _height(vocab: int, itemsize: int) -> int:
    return max(1, CPU_TILE_BYTES // (vocab * itemsize))


def _works(logits: Tensor, like: Tensor, count: int) -> list[Tensor]:
    vocab = logits.shape[-1]
    height = min(len(like), _height(vocab, like.itemsize))
    return [like.new_empty(height, vocab) for _ in range(count)]


def _row_chunks(logits: Tensor, rows: fused.Rows, itemsize: int) -> Iterator[tuple[slice, Tensor]]:
    vocab = logits.shape[-1]
    height = _height(vocab, itemsize)
    blocks = logits.as_strided(
        (rows.count // rows.inner, rows.inner, vocab),
        (rows.stride_outer, rows.stride_inner, 1),
        logits.storage_offset(),
    )
    for number, block in enumerate(blocks):
        for start in range(0, rows.inner, height):
            x = block[start : start + height]
            first = number * rows.inner + start
            yield slice(first, first + len(x)), x


def token_logp(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows_or_rows_k"],
    *,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> TokenLogp:
    """Log-softmax of logits / temperature at the targets, in nats, and the entropy of the row.

    Both are differentiable in the logits.  A row without upstream gradient gets exact zeros, also
    where it holds NaN, so to ignore a row give it any valid target and drop its result with
    torch.where.  A masked token may have logit -inf.

    Args:
        logits: unit stride along vocab; leading axes that lie on at most two strides.
        targets: int32 or int64, [*rows] or [*rows, K].
        temperature: > 0, one number or one per row; gets no gradient.
        inplace_backward: the backward writes the gradient over the logits, which saves a tensor of
            their size.  They must be contiguous, the result of an operation that does not need
            them in its own backward, and of no use to anyone afterwards.  Autograd notices a
            second backward, and others that saved the logits; it cannot see readers outside of
            it, such as a view by .data or a NumPy array.  Under torch.compile, which plans memory
            itself, the option has no effect.

    Raises:
        TypeError: type or dtype of an argument.
        IndexError: a target outside the vocabulary on a CPU; on CUDA, which is not waited for, it
            gives NaN.
        ValueError: shape, stride, device or temperature <= 0; with inplace_backward: logits that
            are a leaf or not contiguous.
        RuntimeError: impl="triton" where Triton cannot run; with inplace_backward, from the
            backward: create_graph=True, a second backward, or logits changed in between.
    """
    check_float("token_logp", logits=logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"token_logp: logits must be [*, vocab >= 1], got {tuple(logits.shape)}")
    temperatures = rs.check_query("token_logp", targets, temperature, logits)
    rows_impl = choose_rows("token_logp", impl, logits)
    inplace = inplace_backward and logits.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_disposable(logits)
    inplace = inplace and not torch.compiler.is_compiling()
    options = (return_entropy, rows_impl, inplace)
    logp, entropy, _ = _token_logp(logits, targets, temperatures, *options)
    return TokenLogp(logp, entropy if return_entropy else None)


def _check_disposable(logits: Tensor) -> None:
    remedy = "pass inplace_backward=False"
    if logits.is_leaf:
        raise ValueError(
            "token_logp: inplace_backward=True needs logits that an operation made, got a leaf, "
            f"whose values stay in use; {remedy}"
        )
    if not logits.is_contiguous():
        raise ValueError(
            "token_logp: inplace_backward=True needs contiguous logits, got strides "
            f"{logits.stride()}; {remedy}"
        )
