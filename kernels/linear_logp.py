r"""Log-probability of chosen tokens and entropy of each row, from hidden states and the LM head.

    x = hidden weight^T + bias,  then as token_logp; the N V logits are never stored as a whole.

Vocabulary chunks of logits pass through a tile; a row's maximum and sum are carried from chunk to
chunk.  The backward recomputes each chunk, whose gradient is then final: a chunk of the weight's
gradient is written once, the gradient of `hidden` accumulates in float32.  As many rows as the
memory budget allows keep their logits instead, so a step costs 3 to 4 products of 2 N H V FLOPs.
Rows without upstream gradient leave before the backward's products.
Related: arXiv:2411.09009 (recompute with saved log-sum-exp), arXiv:2410.10989 (chunks).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _row_softmax as rs
from tercet.kernels._checks import Impl, check_float, check_same_device, use_triton
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import TokenLogp, accumulator_dtype
from tercet.kernels.token_logp import check_targets, row_arguments, temperature_tensor

MEBI = 2**20
CPU_BUDGET_MB = 96
CUDA_BUDGET_MB = 2048
CPU_TILE_BYTES = 16 * MEBI
CUDA_TILE_BYTES = 512 * MEBI
MAX_ROWS = 16384  # of a tile


class Plan(NamedTuple):
    """How N rows of V float32 logits are cut so that workspace stays under the budget."""

    rows: int  # height of a tile
    columns: int  # width of a tile
    kept: int  # leading rows whose logits are stored for the backward


def plan(rows: int, vocab: int, itemsize: int, cuda: bool, entropy: bool, budget_mb: int) -> Plan:
    tiles = 2 if entropy or cuda else 1
    tile_bytes = min(CUDA_TILE_BYTES if cuda else CPU_TILE_BYTES, budget_mb * MEBI // tiles)
    height = max(1, min(rows, MAX_ROWS if cuda else 2048))
    width = min(vocab, max(1, tile_bytes // (height * itemsize)))
    if width >= 256:
        width -= width % 64
    spare = budget_mb * MEBI - tiles * height * width * itemsize
    return Plan(height, width, min(rows, max(0, spare // (vocab * itemsize))))


class Head(NamedTuple):
    """The operands of the products: in half precision on CUDA, else in the accumulator's dtype."""

    hidden: Tensor  # [N, H], cast
    weight: Tensor  # [V, H], cast chunk by chunk
    bias: Tensor | None
    dtype: torch.dtype  # of the operands
    accumulator: torch.dtype

    def chunk(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[columns].to(self.accumulator)
        return self.weight[columns].to(self.dtype), bias


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    accumulator = accumulator_dtype(hidden)
    half = hidden.is_cuda and hidden.dtype == weight.dtype
    dtype = hidden.dtype if half else accumulator
    flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    return Head(flat, weight, bias, dtype, accumulator)


def _product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """out = a b, or out += a b, accumulated in out's dtype."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add:
        return out.add_(torch.mm(a, b, out_dtype=out.dtype))
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _logits(hidden: Tensor, chunk: tuple[Tensor, Tensor | None], *, out: Tensor) -> Tensor:
    weight, bias = chunk
    _product(hidden, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def _cuts(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def _tile(buffer: Tensor, rows: slice | Tensor, columns: slice) -> Tensor:
    height = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    width = columns.stop - columns.start
    return buffer[: height * width].view(height, width)


def _rows(x: Tensor) -> rs.Rows:
    return rs.Rows(x.shape[0], max(1, x.shape[0]), 0, x.stride(0))


@torch.library.custom_op("tercet::linear_logp", mutates_args=())
def _linear_logp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor,
    return_entropy: bool, save: bool, memory_budget_mb: int, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
    flat_targets, scale = row_arguments("linear_logp", shape, targets, temperature, hidden)
    head = _head(hidden, weight, bias)
    cut, kept = _plan_and_kept(head, return_entropy, save, memory_budget_mb)
    buffers = _buffers(cut, head.hidden, head.accumulator, 2 if return_entropy else 1)
    blocks = _cuts(0, len(kept), cut.rows) + _cuts(len(kept), len(head.hidden), cut.rows)
    states = [
        rs.RowState.empty(b.stop - b.start, flat_targets.shape[1], head.accumulator, hidden.device)
        for b in blocks
    ]
    for columns in _cuts(0, weight.shape[0], cut.columns):
        chunk = head.chunk(columns)
        for rows, state in zip(blocks, states, strict=True):
            work = _tile(buffers[0], rows, columns)
            x = kept[rows, columns] if rows.stop <= len(kept) else work
            _logits(head.hidden[rows], chunk, out=x)
            if triton:
                rs.add_tile_triton(
                    state, x, _rows(x), flat_targets[rows], scale[rows],
                    first_column=columns.start, entropy=return_entropy,
                )  # fmt: skip
            else:
                rs.add_tile_torch(
                    state, x, flat_targets[rows], scale[rows], first_column=columns.start,
                    work=work, scratch=_tile(buffers[1], rows, columns) if return_entropy else None,
                )  # fmt: skip
    state = rs.RowState(
        torch.cat([scale.new_zeros(3, 0), *(s.stats for s in states)], dim=1),
        torch.cat([scale.new_zeros(0, flat_targets.shape[1]), *(s.picked for s in states)]),
    )
    if not triton:
        rs.count_targets(state, flat_targets, scale)
    result = rs.finish(state, scale)
    entropy = result.entropy.view(shape[:-1]) if return_entropy else scale.new_empty(0)
    return result.logp.view(targets.shape), entropy, result.stats, kept


@_linear_logp.register_fake
def _(hidden, weight, bias, targets, temperature, return_entropy, save, memory_budget_mb, triton):
    dtype = accumulator_dtype(hidden)
    rows = hidden.shape[:-1]
    kept = _kept_rows(hidden, weight, return_entropy, save, memory_budget_mb)
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty(rows if return_entropy else (0,), dtype=dtype),
        hidden.new_empty((2, rows.numel()), dtype=dtype),
        hidden.new_empty((kept, weight.shape[0]), dtype=dtype),
    )


def _kept_rows(
    hidden: Tensor, weight: Tensor, entropy: bool, save: bool, memory_budget_mb: int
) -> int:
    if not save:
        return 0
    itemsize = accumulator_dtype(hidden).itemsize
    rows = hidden.shape[:-1].numel()
    return plan(rows, weight.shape[0], itemsize, hidden.is_cuda, entropy, memory_budget_mb).kept


def _plan_and_kept(
    head: Head, entropy: bool, save: bool, memory_budget_mb: int
) -> tuple[Plan, Tensor]:
    vocab = head.weight.shape[0]
    itemsize = head.accumulator.itemsize
    cut = plan(len(head.hidden), vocab, itemsize, head.hidden.is_cuda, entropy, memory_budget_mb)
    kept = torch.empty(
        (cut.kept if save else 0, vocab), dtype=head.accumulator, device=head.hidden.device
    )
    return cut, kept


def _buffers(cut: Plan, like: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    return [
        torch.empty(cut.rows * cut.columns, dtype=dtype, device=like.device) for _ in range(count)
    ]


@torch.library.custom_op("tercet::linear_logp_backward", mutates_args=())
def _linear_logp_backward(
    g: Tensor | None, g_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, targets: Tensor, temperature: Tensor, logp: Tensor, entropy: Tensor,
    stats: Tensor, kept: Tensor, need_hidden: bool, need_weight: bool, need_bias: bool,
    memory_budget_mb: int, triton: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
    flat_targets, scale = row_arguments("linear_logp", shape, targets, temperature, hidden)
    grads = rs.row_grads(
        rs.RowResult(logp.reshape(flat_targets.shape), entropy.reshape(-1), stats),
        flat_targets,
        scale,
        torch.zeros_like(logp).view(flat_targets.shape)
        if g is None
        else g.reshape(flat_targets.shape),
        None if g_entropy is None else g_entropy.reshape(-1),
    )
    head = _head(hidden, weight, bias)
    cut = plan(
        len(head.hidden), len(weight), stats.dtype.itemsize, hidden.is_cuda,
        g_entropy is not None, memory_budget_mb,
    )  # fmt: skip
    live = grads.live.nonzero().squeeze(1)  # one wait for the device: it sets the products' size
    num_kept = int((live < len(kept)).sum())
    blocks = _cuts(0, num_kept, cut.rows) + _cuts(num_kept, len(live), cut.rows)
    live_hidden = head.hidden[live]
    live_targets = flat_targets[live]
    live_grads = grads.rows(live)
    dtype, device = stats.dtype, hidden.device
    buffers = _buffers(cut, hidden, dtype, 2 if g_entropy is not None else 1)
    halves = _buffers(cut, hidden, head.dtype, 1)[0] if head.dtype != dtype else None
    d_live = torch.zeros((len(live), hidden.shape[-1]), dtype=dtype, device=device)
    d_weight = torch.zeros(weight.shape if need_weight else (0,), dtype=weight.dtype, device=device)
    d_bias = torch.zeros(weight.shape[0] if need_bias else 0, dtype=dtype, device=device)
    for columns in _cuts(0, weight.shape[0] if len(live) else 0, cut.columns):
        chunk = head.chunk(columns)
        d_chunk = torch.zeros(chunk[0].shape, dtype=dtype, device=device) if need_weight else None
        for rows in blocks:
            x = _tile(buffers[0], rows, columns)
            if rows.stop <= num_kept:
                torch.index_select(kept[:, columns], 0, live[rows], out=x)
            else:
                _logits(live_hidden[rows], chunk, out=x)
            out = x if halves is None else _tile(halves, rows, columns)
            if triton:
                rs.grad_tile_triton(
                    out, x, _rows(x), live_targets[rows], live_grads.rows(rows).contiguous(),
                    first_column=columns.start,
                )  # fmt: skip
            else:
                scratch = _tile(buffers[1], rows, columns) if grads.entropy else None
                rs.grad_tile_torch(
                    x, x, live_targets[rows], live_grads.rows(rows),
                    first_column=columns.start, scratch=scratch,
                )  # fmt: skip
                out = out if out is x else out.copy_(x)
            if need_hidden:
                _product(out, chunk[0], out=d_live[rows], add=True)
            if d_chunk is not None:
                _product(out.t(), live_hidden[rows], out=d_chunk, add=True)
            if need_bias:
                d_bias[columns] += out.sum(0, dtype=dtype)
        if d_chunk is not None:
            d_weight[columns] = d_chunk
    d_hidden = torch.zeros(hidden.shape if need_hidden else (0,), dtype=hidden.dtype, device=device)
    if need_hidden:
        d_hidden.view(-1, hidden.shape[-1])[live] = d_live.to(hidden.dtype)
    return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)


@_linear_logp_backward.register_fake
def _(
    g, g_entropy, hidden, weight, bias, targets, temperature, logp, entropy, stats, kept,
    need_hidden, need_weight, need_bias, memory_budget_mb, triton,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        (stats if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, temperature, return_entropy, _, memory_budget_mb, triton = inputs
    logp, entropy, stats, kept = output
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, logp, entropy, stats, kept)
    ctx.set_materialize_grads(False)
    ctx.options = (return_entropy, memory_budget_mb, triton)


def _backward(ctx, g, g_entropy, *_):
    return_entropy, memory_budget_mb, triton = ctx.options
    g_entropy = g_entropy if return_entropy else None
    nothing = (None,) * 6
    needs = list(ctx.needs_input_grad[:3])
    if (g is None and g_entropy is None) or not any(needs):
        return None, None, None, *nothing
    grads = _linear_logp_backward(
        g, g_entropy, *ctx.saved_tensors, *needs, memory_budget_mb, triton
    )
    return *(d if need else None for d, need in zip(grads, needs, strict=True)), *nothing


_linear_logp.register_autograd(_backward, setup_context=_setup_context)


def linear_logp(
    hidden: Float[Tensor, "*rows hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "*rows_or_rows_k"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float | Float[Tensor, "*rows"] = 1.0,
    return_entropy: bool = False,
    memory_budget_mb: int | None = None,
    impl: Impl = "auto",
) -> TokenLogp:
    """log softmax((hidden weight^T + bias) / temperature)[target] in nats, and the entropy.

    Both are differentiable in hidden, weight and bias; what needs no gradient costs no product.

    Args:
        memory_budget_mb: MiB of workspace beside the returned gradients: tiles, and the logits
            of as many rows as fit (each kept row saves its part of a fourth product).  None
            means 96 on a CPU and 2048 on CUDA.

    Raises:
        TypeError: dtype of an argument, or a DTensor.
        IndexError: a target outside the vocabulary (on a CPU; NaN on CUDA, which is not waited for).
        ValueError: shape, device, memory_budget_mb < 1 or temperature <= 0.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    op = "linear_logp"
    check_float(op, hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    check_same_device(op, hidden=hidden, weight=weight, bias=bias, targets=targets)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must be [vocab >= 1, hidden], got {tuple(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden must be [*, {weight.shape[1]}] like weight, got {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    check_targets(op, targets, hidden.shape[:-1])
    if memory_budget_mb is None:
        memory_budget_mb = CUDA_BUDGET_MB if hidden.is_cuda else CPU_BUDGET_MB
    if memory_budget_mb < 1:
        raise ValueError(f"{op}: memory_budget_mb must be >= 1, got {memory_budget_mb}")
    triton = use_triton(op, impl, hidden)
    if triton and hidden.dtype == torch.float64:
        raise TypeError(f"{op}: impl='triton' computes in float32, got float64 hidden")
    temperatures = temperature_tensor(op, temperature, hidden)
    wanted = [hidden, weight] if bias is None else [hidden, weight, bias]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
    logp, entropy, _, _ = _linear_logp(
        hidden, weight, bias, targets, temperatures, return_entropy, save, memory_budget_mb, triton
    )
    return TokenLogp(logp, entropy if return_entropy else None)
