r"""Log-probability of chosen tokens and entropy of each row, from logits that already exist.

    z = x / temperature,  logp = z_t - logsumexp(z),  H = logsumexp(z) - sum_j p_j z_j
    dx_j = (g (1[j = t] - p_j) - g_H p_j (log p_j + H)) / temperature

The row arithmetic is in `_row_softmax.py`.  Bytes moved, N rows of V logits of b bytes: forward
reads N V b once, backward reads and writes N V b.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tercet.kernels import _row_softmax as rs
from tercet.kernels._checks import Impl, check_float, check_same_device, use_triton
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import TokenLogp, accumulator_dtype

CPU_TILE = 2**19  # elements of a row chunk: 2 MiB in float32, stays in the core's own cache


@torch.library.custom_op("tercet::token_logp", mutates_args=())
def _token_logp(
    logits: Tensor, targets: Tensor, temperature: Tensor, return_entropy: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = rs.rows_of("token_logp", "logits", logits)
    flat_targets, scale = row_arguments("token_logp", logits.shape, targets, temperature, logits)
    state = rs.RowState.empty(
        rows.count, flat_targets.shape[1], accumulator_dtype(logits), logits.device
    )
    if triton:
        rs.add_tile_triton(
            state, logits, rows, flat_targets, scale, first_column=0, entropy=return_entropy
        )
    else:
        for chunk, x in _row_chunks(logits, rows):
            part = rs.RowState(state.stats[:, chunk], state.picked[chunk])
            work = torch.empty(x.shape, dtype=state.stats.dtype, device=x.device)
            scratch = torch.empty_like(work) if return_entropy else None
            rs.add_tile_torch(
                part, x, flat_targets[chunk], scale[chunk],
                first_column=0, work=work, scratch=scratch,
            )  # fmt: skip
        rs.count_targets(state, flat_targets, scale)
    result = rs.finish(state, scale)
    entropy = result.entropy.view(logits.shape[:-1]) if return_entropy else scale.new_empty(0)
    return result.logp.view(targets.shape), entropy, result.stats


@_token_logp.register_fake
def _(logits, targets, temperature, return_entropy, triton):
    dtype = accumulator_dtype(logits)
    rows = logits.shape[:-1]
    return (
        logits.new_empty(targets.shape, dtype=dtype),
        logits.new_empty(rows if return_entropy else (0,), dtype=dtype),
        logits.new_empty((2, rows.numel()), dtype=dtype),
    )


@torch.library.custom_op("tercet::token_logp_backward", mutates_args=())
def _token_logp_backward(
    g: Tensor | None, g_entropy: Tensor | None, logits: Tensor, targets: Tensor,
    temperature: Tensor, logp: Tensor, entropy: Tensor, stats: Tensor, triton: bool,
) -> Tensor:  # fmt: skip
    rows = rs.rows_of("token_logp", "logits", logits)
    flat_targets, scale = row_arguments("token_logp", logits.shape, targets, temperature, logits)
    grads = rs.row_grads(
        rs.RowResult(logp.reshape(flat_targets.shape), entropy.reshape(-1), stats),
        flat_targets,
        scale,
        torch.zeros_like(logp).view(flat_targets.shape)
        if g is None
        else g.reshape(flat_targets.shape),
        None if g_entropy is None else g_entropy.reshape(-1),
    )
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if triton:
        rs.grad_tile_triton(dlogits, logits, rows, flat_targets, grads, first_column=0)
        return dlogits
    flat_out = dlogits.view(-1, logits.shape[-1])
    for chunk, x in _row_chunks(logits, rows):
        direct = x.dtype == stats.dtype
        out = flat_out[chunk]
        work = out if direct else torch.empty(x.shape, dtype=stats.dtype, device=x.device)
        rs.grad_tile_torch(
            work, x, flat_targets[chunk], grads.rows(chunk),
            first_column=0, scratch=torch.empty_like(work) if grads.entropy else None,
        )  # fmt: skip
        if not direct:
            out.copy_(work)
    return dlogits


@_token_logp_backward.register_fake
def _(g, g_entropy, logits, targets, temperature, logp, entropy, stats, triton):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, return_entropy, triton = inputs
    logp, entropy, stats = output
    ctx.save_for_backward(logits, targets, temperature, logp, entropy, stats)
    ctx.set_materialize_grads(False)
    ctx.return_entropy, ctx.triton = return_entropy, triton


def _backward(ctx, g, g_entropy, _):
    if not ctx.return_entropy:
        g_entropy = None
    if g is None and g_entropy is None:
        return None, None, None, None, None
    dlogits = _token_logp_backward(g, g_entropy, *ctx.saved_tensors, ctx.triton)
    return dlogits, None, None, None, None


_token_logp.register_autograd(_backward, setup_context=_setup_context)


def _row_chunks(logits: Tensor, rows: rs.Rows) -> Iterator[tuple[slice, Tensor]]:
    vocab = logits.shape[-1]
    height = max(1, CPU_TILE // vocab)
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


def row_arguments(
    op: str, shape: torch.Size, targets: Tensor, temperature: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Targets as int64 [N, K] and 1 / temperature as [N] in the accumulator's dtype.

    On a CPU the values are checked; on CUDA that would wait for the device, and a target outside
    the vocabulary gives NaN instead.
    """
    vocab, count = shape[-1], shape[:-1].numel()
    flat = (
        targets.reshape(count, -1).to(torch.int64).contiguous()
        if count
        else targets.new_zeros(0, 1)
    )
    if flat.numel() and flat.device.type == "cpu":
        low, high = (int(v) for v in flat.aminmax())
        if low < 0 or high >= vocab:
            raise IndexError(
                f"{op}: targets must be in [0, {vocab}), got {low if low < 0 else high}; "
                "give ignored rows any valid target and mask their result"
            )
        if not bool((temperature > 0).all()):
            raise ValueError(f"{op}: temperature must be > 0, got {float(temperature.min())}")
    scale = temperature.to(accumulator_dtype(like)).reciprocal()
    return flat, scale.reshape(-1).expand(count).contiguous()


def temperature_tensor(op: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    """The temperature as a tensor of shape [] or of the rows of `like`.

    Raises:
        ValueError: not positive, wrong shape, another device, or it asks for a gradient.
    """
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"{op}: temperature must be > 0, got {temperature}")
        return torch.full((), temperature, dtype=accumulator_dtype(like), device=like.device)
    check_float(op, temperature=temperature)
    check_same_device(op, logits=like, temperature=temperature)
    if temperature.ndim > 0 and temperature.shape != like.shape[:-1]:
        raise ValueError(
            f"{op}: temperature must have the shape of the rows {tuple(like.shape[:-1])}, "
            f"got {tuple(temperature.shape)}"
        )
    if temperature.requires_grad:
        raise ValueError(f"{op}: temperature gets no gradient; pass temperature.detach()")
    return temperature


def check_targets(op: str, targets: Tensor, row_shape: torch.Size) -> None:
    """Raises TypeError or ValueError unless targets are int32 or int64 [*rows] or [*rows, K]."""
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != row_shape and targets.shape[:-1] != row_shape:
        raise ValueError(
            f"{op}: targets must have the shape of the rows {tuple(row_shape)}, or one more axis, "
            f"got {tuple(targets.shape)}"
        )


def token_logp(
    logits: Float[Tensor, "*rows vocab"],
    targets: Int[Tensor, "*rows_or_rows_k"],
    *,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    return_entropy: bool = False,
    impl: Impl = "auto",
) -> TokenLogp:
    """log softmax(logits / temperature)[target] in nats, and the entropy of that softmax.

    Both are differentiable in the logits; rows without upstream gradient get exact zeros.  A
    masked token may have logit -inf.  To ignore a row, give it any valid target and mask its
    result with torch.where.

    Args:
        logits: unit stride along vocab; leading axes that lie on at most two strides.
        targets: int32 or int64, [*rows] or [*rows, K].

    Raises:
        TypeError: dtype of an argument.
        IndexError: a target outside the vocabulary (on a CPU; NaN on CUDA, which is not waited for).
        ValueError: shape, stride, device or temperature <= 0.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    check_float("token_logp", logits=logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"token_logp: logits must be [*, vocab >= 1], got {tuple(logits.shape)}")
    check_targets("token_logp", targets, logits.shape[:-1])
    check_same_device("token_logp", logits=logits, targets=targets)
    triton = use_triton("token_logp", impl, logits)
    if triton and logits.dtype == torch.float64:
        raise TypeError("token_logp: impl='triton' computes in float32, got float64 logits")
    temperatures = temperature_tensor("token_logp", temperature, logits)
    logp, entropy, _ = _token_logp(logits, targets, temperatures, return_entropy, triton)
    return TokenLogp(logp, entropy if return_entropy else None)
