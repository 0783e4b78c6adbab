r"""Log-probability of chosen tokens and entropy of each row, from hidden states and the LM head.

    x = hidden weight^T + bias,  then as token_logp; the N V logits never exist as a whole.

Vocabulary chunks of the logits pass through a tile, and each row's maximum and sum are carried
from chunk to chunk.  The backward recomputes them: given the row's sum the gradient of a chunk is
final, so a chunk of the weight's gradient is written once while that of `hidden` accumulates in
float32.  As many rows as the memory budget allows keep their logits instead, so that a step costs
3 to 4 products of 2 N H V FLOPs; rows without upstream gradient leave before the backward's.
Related: arXiv:2411.09009 (recompute from saved sums), arXiv:2410.10989 (chunks of rows).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _linear_tiles as lt
from tercet.kernels import _row_softmax as rs
from tercet.kernels import _row_softmax_triton as fused
from tercet.kernels._checks import Impl, check_float, check_same_device, use_triton
from tercet.kernels._memory import empty_huge
from tercet.kernels._typing import Float, Int
from tercet.kernels.reference import TokenLogp, accumulator_dtype
from tercet.kernels.token_logp import flat_grads

CPU_BUDGET_MB = 112
CUDA_BUDGET_MB = 2048


class _Options(NamedTuple):
    """What the ops take besides tensors; part of the operators' schema, in this order."""

    entropy: bool
    save: bool  # keep logits for the backward
    memory_budget_mb: int
    triton: bool


@torch.library.custom_op("tercet::linear_logp", mutates_args=())
def _linear_logp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    entropy: bool,
    save: bool,
    memory_budget_mb: int,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _Options(entropy, save, memory_budget_mb, triton)
    shape = torch.Size((*hidden.shape[:-1], len(weight)))
    query = rs.flatten_query("linear_logp", shape, targets, temperature, hidden)
    head = lt.Head.of(hidden, weight, bias)
    plan = _plan(hidden, weight, options)
    kept = empty_huge([plan.kept, len(weight)], dtype=head.accumulator, device=hidden.device)
    tiles = lt.Tiles(plan, 2 if entropy and not triton else 1, kept)
    result = rs.finish(_forward(head, query, tiles, options), query)
    no_entropy = result.stats.new_empty(0)
    return (
        result.logp.view(targets.shape),
        result.entropy.view(shape[:-1]) if entropy else no_entropy,
        result.stats,
        kept,
    )


@_linear_logp.register_fake
def _(hidden, weight, bias, targets, temperature, entropy, save, memory_budget_mb, triton):
    dtype = accumulator_dtype(hidden)
    rows = hidden.shape[:-1]
    plan = _plan(hidden, weight, _Options(entropy, save, memory_budget_mb, triton))
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty(rows if entropy else (0,), dtype=dtype),
        hidden.new_empty((2, rows.numel()), dtype=dtype),
        hidden.new_empty((plan.kept, weight.shape[0]), dtype=dtype),
    )


def _plan(hidden: Tensor, weight: Tensor, options: _Options) -> lt.Plan:
    plan = lt.make_plan(
        hidden.shape[:-1].numel(),
        weight.shape[0],
        accumulator_dtype(hidden).itemsize,
        2 if options.entropy or hidden.is_cuda else 1,  # tiles at a time
        options.memory_budget_mb,
        hidden.is_cuda,
    )
    return plan if options.save else plan._replace(kept=0)


def _forward(head: lt.Head, query: rs.Query, tiles: lt.Tiles, options: _Options) -> rs.RowState:
    blocks = tiles.blocks(len(head.hidden))
    queries = [query.rows(rows) for rows in blocks]
    states = [rs.empty_state(part) for part in queries]
    for columns in lt.cuts(0, len(head.weight), tiles.plan.width):
        chunk, first = head.chunk(columns), columns.start
        for rows, part, state in zip(blocks, queries, states, strict=True):
            work = tiles.buffer(0, rows, columns)
            x = tiles.kept(rows, columns) if rows.stop <= tiles.plan.kept else work
            head.logits(rows, chunk, out=x)
            if options.triton:
                at = fused.rows_of("linear_logp", "tile", x)
                fused.forward(x, at, *part, state, first_column=first, entropy=options.entropy)
            else:
                scratch = tiles.buffer(1, rows, columns) if options.entropy else None
                rs.add_tile(state, x, part, first_column=first, work=work, scratch=scratch)
    whole = rs.empty_state(query)
    for rows, state in zip(blocks, states, strict=True):
        whole.stats[:, rows] = state.stats
        whole.picked[rows] = state.picked
    if not options.triton:
        rs.close(whole, query)
    return whole


@torch.library.custom_op("tercet::linear_logp_backward", mutates_args=())
def _linear_logp_backward(
    g: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    logp: Tensor,
    entropy: Tensor,
    stats: Tensor,
    kept: Tensor,
    needs: list[bool],
    options: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    chosen = _Options(bool(options[0]), bool(options[1]), options[2], bool(options[3]))
    shape = torch.Size((*hidden.shape[:-1], len(weight)))
    query = rs.flatten_query("linear_logp", shape, targets, temperature, hidden)
    grads = flat_grads(g, g_entropy, logp, entropy, stats, query)
    head = lt.Head.of(hidden, weight, bias)
    scratch = g_entropy is not None and not chosen.triton
    tiles = lt.Tiles(_plan(hidden, weight, chosen), 2 if scratch else 1, kept)
    index, blocks = lt.live_blocks(grads.live, tiles)
    if index is not None:
        query, grads = query.rows(index), grads.rows(index)
        head = head._replace(hidden=head.hidden[index])
    elif lt.capturing(hidden):  # dead rows stay, and must not spread their NaN
        head = head._replace(hidden=head.hidden.masked_fill(~grads.live[:, None], 0.0))
    todo = _Backward(head, query, grads, tiles, g_entropy is not None, chosen.triton)
    d_live, d_weight, d_bias = todo.run(blocks, *needs)
    return _scatter(d_live, index, hidden) if needs[0] else d_live, d_weight, d_bias


@_linear_logp_backward.register_fake
def _(
    g, g_entropy, hidden, weight, bias, targets, temperature, logp, entropy, stats, kept,
    needs, options,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


def _scatter(d_live: Tensor, index: Tensor | None, hidden: Tensor) -> Tensor:
    if index is None:
        return d_live.to(hidden.dtype).view(hidden.shape)
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    d_hidden.view(-1, hidden.shape[-1])[index] = d_live.to(hidden.dtype)
    return d_hidden


class _Backward(NamedTuple):
    """The products of the backward over the live rows."""

    head: lt.Head
    query: rs.Query
    grads: rs.RowGrads
    tiles: lt.Tiles
    entropy: bool
    triton: bool

    def run(
        self, blocks: list[lt.LiveBlock], need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the live hidden rows (float32), weight and bias; empty where not needed."""
        hidden, weight, bias = self.head.hidden, self.head.weight, self.head.bias
        wide = self.head.accumulator
        d_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=wide)
        d_weight = empty_huge(
            weight.shape if need_weight and blocks else [0],
            dtype=weight.dtype,
            device=weight.device,
        )
        d_bias = hidden.new_zeros(len(weight) if need_bias else 0, dtype=wide)
        for columns in lt.cuts(0, len(weight), self.tiles.plan.width):
            chunk = self.head.chunk(columns)
            d_chunk = d_weight[columns] if weight.dtype == wide else d_weight[columns].to(wide)
            for number, block in enumerate(blocks):
                rows = block.rows
                tile = self.tile(block, columns, chunk)
                if need_hidden:
                    lt.product(tile, chunk[0], out=d_hidden[rows], add=columns.start > 0)
                if need_weight:
                    lt.product(tile.t(), hidden[rows], out=d_chunk, add=number > 0)
                if need_bias:
                    d_bias[columns] += tile.sum(0, dtype=wide)
            if need_weight and blocks and weight.dtype != wide:
                d_weight[columns] = d_chunk
        if need_weight and not blocks:
            d_weight = torch.zeros_like(weight)
        return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)

    def tile(
        self, block: lt.LiveBlock, columns: slice, chunk: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """Gradient of the logits of a tile, in the dtype of the products."""
        rows, first = block.rows, columns.start
        x = out = self.tiles.buffer(0, rows, columns)
        if block.source is None:
            self.head.logits(rows, chunk, out=x)
        elif block.inside is None:
            x = self.tiles.kept(block.source, columns)
        else:
            torch.index_select(self.tiles.kept(block.source, columns), 0, block.inside, out=x)
        query, grads = self.query.rows(rows), self.grads.rows(rows)
        if not self.triton:
            scratch = self.tiles.buffer(1, rows, columns) if self.entropy else None
            rs.grad_tile(out, x, query, grads, first_column=first, scratch=scratch)
            return out.to(self.head.hidden.dtype)
        if out.dtype != self.head.hidden.dtype:
            out = torch.empty_like(out, dtype=self.head.hidden.dtype)
        at = fused.rows_of("linear_logp", "tile", x)
        parts = (grads.coef.contiguous(), grads.target)
        fused.backward(out, x, at, query.targets, parts, first_column=first, entropy=self.entropy)
        return out


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = list(inputs[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, g_entropy, *_):
    g_entropy = g_entropy if ctx.options[0] else None
    needs = list(ctx.needs_input_grad[:3])
    if (g is None and g_entropy is None) or not any(needs):
        return (None,) * 9
    options = [int(option) for option in ctx.options]
    grads = _linear_logp_backward(g, g_entropy, *ctx.saved_tensors, needs, options)
    return *(d if need else None for d, need in zip(grads, needs, strict=True)), *(None,) * 6


_linear_logp.register_autograd(_backward, setup_context=_setup_context)


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError unless hidden [*, hidden] and the head fit each other."""
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in named.items():
        if isinstance(x, torch.nn.Module):
            raise TypeError(
                f"{op}: {name} must be a plain tensor, got a module {type(x).__name__}; "
                "pass its weight, with adapters merged into it"
            )
    check_float(op, **named)
    rs.check_plain(op, **named)
    check_same_device(op, **named)
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must be [vocab >= 1, hidden], got {tuple(weight.shape)}")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden must be [*, {weight.shape[1]}] like weight, got {tuple(hidden.shape)}"
        )
    if hidden.shape[-1] == 0:
        raise ValueError(f"{op}: hidden must be [*, hidden >= 1], got {tuple(hidden.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"{op}: hidden and weight must both be float64 or neither, "
            f"got {hidden.dtype} and {weight.dtype}"
        )


def check_budget(op: str, memory_budget_mb: int) -> None:
    """Raises TypeError or ValueError unless the budget is a whole number >= 1."""
    if not isinstance(memory_budget_mb, int):
        raise TypeError(f"{op}: memory_budget_mb must be a whole number, got {memory_budget_mb!r}")
    if memory_budget_mb < 1:
        raise ValueError(f"{op}: memory_budget_mb must be >= 1, got {memory_budget_mb}")


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
    """Log-softmax of (hidden weight^T + bias) / temperature at the targets, in nats, and entropy.

    Both are differentiable in hidden, weight and bias; what needs no gradient costs no product,
    and a row without upstream gradient none in the backward.  On CUDA the products run in half
    precision when hidden and weight share that dtype, with float32 logits and sums; else in
    float32.

    Args:
        targets: int32 or int64, [*rows] or [*rows, K].
        temperature: > 0, one number or one per row; gets no gradient.
        memory_budget_mb: MiB of workspace beside the results and tensors of N x hidden: tiles,
            and the logits of as many rows as fit.  None means 112 on a CPU and 2048 on CUDA.

    Raises:
        TypeError: type or dtype of an argument, or a DTensor.
        IndexError: a target outside the vocabulary on a CPU; on CUDA, which is not waited for, it
            gives NaN.
        ValueError: shape, device, memory_budget_mb < 1 or temperature <= 0.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    check_head("linear_logp", hidden, weight, bias)
    temperatures = rs.check_query("linear_logp", targets, temperature, hidden)
    if memory_budget_mb is None:
        memory_budget_mb = CUDA_BUDGET_MB if hidden.is_cuda else CPU_BUDGET_MB
    check_budget("linear_logp", memory_budget_mb)
    triton = use_triton("linear_logp", impl, hidden)
    if triton and hidden.dtype == torch.float64:
        raise TypeError("linear_logp: impl='triton' computes in float32, got float64 hidden")
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    options = _Options(return_entropy, save, memory_budget_mb, triton)
    logp, entropy, _, _ = _linear_logp(hidden, weight, bias, targets, temperatures, *options)
    return TokenLogp(logp, entropy if return_entropy else None)
