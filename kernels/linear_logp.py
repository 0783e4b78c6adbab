r"""Log-probability of chosen tokens and entropy of each row, from hidden states and the LM head.

    x = logit_scale (hidden weight^T + bias),  capped where softcap is given,  then as token_logp

The N V logits never exist as a whole.  Vocabulary chunks of them pass through a tile, and each
row's maximum and sum are carried from chunk to chunk.  The backward recomputes them: given the
row's sum the gradient of a chunk is final, so a chunk of the weight's gradient is written once
while that of `hidden` accumulates in float32.  As many rows as the memory budget allows keep their
logits instead, so that a step costs 3 to 4 products of 2 N H V FLOPs; rows without upstream
gradient leave before the backward's.
Related: arXiv:2411.09009 (recompute from saved sums), arXiv:2410.10989 (chunks of rows).
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from tercet.kernels import _linear_tiles as lt
from tercet.kernels import _row_softmax as rs
from tercet.kernels._checks import Impl, RowImpl, check_float, check_same_device, choose_rows
from tercet.kernels._memory import empty_huge
from tercet.kernels._typing import Float, Int
from tercet.kernels._vocab_shards import Shards, check_group
from tercet.kernels.reference import TokenLogp, accumulator_dtype
from tercet.kernels.token_logp import flat_grads

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CPU_BUDGET_MB = 168
CUDA_BUDGET_MB = 2048


class _Options(NamedTuple):
    """What the ops take besides tensors; part of the operators' schema, in this order."""

    entropy: bool
    save: bool  # keep logits for the backward
    memory_budget_mb: int
    impl: RowImpl
    logit_scale: float
    softcap: float | None
    group_name: str
    vocab_start: int

    @property
    def shards(self) -> Shards:
        return Shards(self.group_name, self.vocab_start)

    @property
    def cap(self) -> lt.Cap:
        return lt.Cap(self.logit_scale, self.softcap)

    @property
    def buffers(self) -> int:
        """Tiles that `lt.Tiles` holds: of logits, for the entropy in PyTorch, for the cap."""
        return 1 + (self.entropy and self.impl == "torch") + (self.softcap is not None)


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
    impl: str,
    logit_scale: float,
    softcap: float | None,
    group_name: str,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _Options(
        entropy,
        save,
        memory_budget_mb,
        cast(RowImpl, impl),
        logit_scale,
        softcap,
        group_name,
        vocab_start,
    )
    query = _query(hidden, weight, targets, temperature, options)
    head = lt.Head.of(hidden, weight, bias)
    plan = _plan(hidden, weight, options)
    kept = empty_huge([plan.kept, len(weight)], dtype=head.accumulator, device=hidden.device)
    tiles = lt.Tiles(plan, options.buffers, kept)
    result = rs.finish(_forward(head, query, tiles, options), query)
    rows = hidden.shape[:-1]
    no_entropy = result.stats.new_empty(0)
    return (
        result.logp.view(targets.shape),
        result.entropy.view(rows) if entropy else no_entropy,
        result.stats,
        kept,
    )


@_linear_logp.register_fake
def _(hidden, weight, bias, targets, temperature, *options):
    dtype = accumulator_dtype(hidden)
    rows = hidden.shape[:-1]
    chosen = _Options(*options)
    plan = _plan(hidden, weight, chosen)
    return (
        hidden.new_empty(targets.shape, dtype=dtype),
        hidden.new_empty(rows if chosen.entropy else (0,), dtype=dtype),
        hidden.new_empty((2, rows.numel()), dtype=dtype),
        hidden.new_empty((plan.kept, weight.shape[0]), dtype=dtype),
    )


def _query(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, options: _Options
) -> rs.Query:
    shape = torch.Size((*hidden.shape[:-1], len(weight)))
    query = rs.flatten_query(
        "linear_logp", shape, targets, temperature, hidden, sharded=bool(options.shards)
    )
    if options.shards:
        query = query._replace(targets=query.targets - options.vocab_start)
    return options.cap.query(query)


def _plan(hidden: Tensor, weight: Tensor, options: _Options) -> lt.Plan:
    wide = accumulator_dtype(hidden)
    half = lt.half_products(hidden, weight)
    parts = (weight.dtype != wide) + (weight.dtype != wide and not half)
    plan = lt.make_plan(
        hidden.shape[:-1].numel(),
        weight,
        wide.itemsize,
        options.buffers + half,  # where the gradient of a tile is cast
        parts,  # of the gradient, and of the weight where it is cast
        options.memory_budget_mb,
    )
    return plan if options.save else plan._replace(kept=0)


def _forward(head: lt.Head, query: rs.Query, tiles: lt.Tiles, options: _Options) -> rs.RowState:
    whole = rs.empty_state(query)
    if options.shards:  # other ranks' targets have no share in this rank's sums
        elsewhere = (query.targets < 0) | (query.targets >= len(head.weight))
        whole.picked.masked_fill_(elsewhere, -torch.inf)
    blocks = tiles.blocks(len(head.hidden))
    parts = [
        (rows, query.rows(rows), rs.RowState(whole.stats[:, rows], whole.picked[rows]))
        for rows in blocks
    ]
    scratch = options.entropy and options.impl == "torch"
    for columns in lt.cuts(0, len(head.weight), tiles.plan.width):
        chunk = head.chunk(columns)
        for rows, part, state in parts:
            work = tiles.buffer(0, rows, columns)
            x = tiles.kept(rows, columns) if rows.stop <= tiles.plan.kept else work
            head.logits(rows, chunk, out=x)
            options.cap.apply(x)
            lt.add_tile(
                options.impl, state, x, part,
                first_column=columns.start, entropy=options.entropy,
                work=work, scratch=tiles.buffer(1, rows, columns) if scratch else None,
            )  # fmt: skip
    if options.impl == "torch":
        rs.close(whole, query)
    if options.shards:
        return options.shards.merge("linear_logp", whole, query, len(head.weight))
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
    entropies: Tensor,
    stats: Tensor,
    kept: Tensor,
    needs: list[bool],
    entropy: bool,
    save: bool,
    memory_budget_mb: int,
    impl: str,
    logit_scale: float,
    softcap: float | None,
    group_name: str,
    vocab_start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _Options(
        entropy,
        save,
        memory_budget_mb,
        cast(RowImpl, impl),
        logit_scale,
        softcap,
        group_name,
        vocab_start,
    )
    query = _query(hidden, weight, targets, temperature, options)
    grads = flat_grads(g, g_entropy, logp, entropies, stats, query)
    head = lt.Head.of(hidden, weight, bias)
    tiles = lt.Tiles(_plan(hidden, weight, options), options.buffers, kept)
    index, blocks = lt.live_blocks(grads.live, tiles)
    if index is not None:
        query, grads = query.rows(index), grads.rows(index)
        head = head._replace(hidden=head.hidden[index])
    elif lt.capturing(hidden):  # dead rows stay, and must not spread their NaN
        head = head._replace(hidden=head.hidden.masked_fill(~grads.live[:, None], 0.0))
    todo = _Backward(head, query, grads, tiles, g_entropy is not None, options)
    d_live, d_weight, d_bias = todo.run(blocks, *needs)
    if options.shards and blocks and needs[0]:  # the same rows live on every rank
        d_live = options.shards.all_reduce(d_live, "sum")
    return _scatter(d_live, index, hidden) if needs[0] else d_live, d_weight, d_bias


@_linear_logp_backward.register_fake
def _(
    g, g_entropy, hidden, weight, bias, targets, temperature, logp, entropies, stats, kept,
    needs, *options,
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
    entropy: bool  # has an upstream gradient
    options: _Options

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
                del tile
            if need_weight and blocks and weight.dtype != wide:
                d_weight[columns] = d_chunk
            del chunk, d_chunk  # which would live beside the next ones
        if need_weight and not blocks:
            d_weight = torch.zeros_like(weight)
        return d_hidden, d_weight, d_bias if bias is None else d_bias.to(bias.dtype)

    def tile(
        self, block: lt.LiveBlock, columns: slice, chunk: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """Gradient of the products of a tile, in the dtype of theirs."""
        rows, cap, impl = block.rows, self.options.cap, self.options.impl
        x = out = self.tiles.buffer(0, rows, columns)
        if block.source is None:
            self.head.logits(rows, chunk, out=x)
            cap.apply(x)
        elif block.inside is None:
            x = self.tiles.kept(block.source, columns)
        else:
            torch.index_select(self.tiles.kept(block.source, columns), 0, block.inside, out=x)
        slope = None
        if cap.softcap is not None:
            slope = cap.slope(x, out=self.tiles.buffer(-1, rows, columns))
        elif impl == "triton" and out.dtype != self.head.hidden.dtype:  # casts on its way
            out = torch.empty_like(out, dtype=self.head.hidden.dtype)
        lt.grad_tile(
            impl, out, x, self.query.rows(rows), self.grads.rows(rows),
            first_column=columns.start, entropy=self.entropy,
            scratch=self.tiles.buffer(1, rows, columns)
            if self.entropy and impl == "torch" else None,
        )  # fmt: skip
        if slope is not None:
            out.mul_(slope)
        return out.to(self.head.hidden.dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = _Options(*inputs[5:])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, g_entropy, *_):
    none = (None,) * len(ctx.options)
    g_entropy = g_entropy if ctx.options.entropy else None
    needs = list(ctx.needs_input_grad[:3])
    if (g is None and g_entropy is None) or not any(needs):
        return (None,) * 5 + none
    grads = _linear_logp_backward(g, g_entropy, *ctx.saved_tensors, needs, *ctx.options)
    return *(d if need else None for d, need in zip(grads, needs, strict=True)), None, None, *none


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
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    memory_budget_mb: int | None = None,
    group: "ProcessGroup | None" = None,
    vocab_start: int | None = None,
    impl: Impl = "auto",
) -> TokenLogp:
    """Log-softmax of (hidden weight^T + bias) / temperature at the targets, in nats, and entropy.

    A log-prob is never above 0.  Both are differentiable in hidden, weight and bias; what needs
    no gradient costs no product, and a row without upstream gradient none in the backward.  On
    CUDA the products run in half precision when hidden and weight share that dtype, with float32
    logits and sums; else in float32.

    Args:
        targets: int32 or int64, [*rows] or [*rows, K].
        temperature: > 0, one number or one per row; gets no gradient.
        softcap: logits are softcap * tanh(logits / softcap), as in Gemma 2.
        logit_scale: > 0, factor on the logits before the cap, as in Cohere.
        memory_budget_mb: MiB of workspace beside the results and tensors of N x hidden: tiles,
            parts of a weight in half precision that are cast, and the logits of as many rows as
            fit: with all of them a step costs three products, with none four.  None means 168 on
            a CPU and 2048 on CUDA.
        group: process group over whose ranks the vocabulary is cut; weight and bias are then this
            rank's rows [vocab_start, vocab_start + len(weight)).  Every rank gives the same
            hidden, targets, options and upstream gradients, and asks for the gradient of hidden
            or does not, as the others; it gets the same results and gradient of hidden, and the
            gradient of its own rows.  The forward all-reduces N + (3 + 2 K) N numbers, the
            backward N x hidden.
        vocab_start: first token of this rank's rows; given with group.

    Raises:
        TypeError: type or dtype of an argument, or a DTensor.
        IndexError: a target outside the vocabulary, or in no or several ranks' shards, on a CPU;
            on CUDA, which is not waited for, it gives NaN.
        ValueError: shape, device, memory_budget_mb < 1, or temperature, softcap or logit_scale
            <= 0; group without vocab_start.
        RuntimeError: impl="triton" where Triton cannot run.
    """
    check_head("linear_logp", hidden, weight, bias)
    temperatures = rs.check_query("linear_logp", targets, temperature, hidden)
    if memory_budget_mb is None:
        memory_budget_mb = CUDA_BUDGET_MB if hidden.is_cuda else CPU_BUDGET_MB
    check_budget("linear_logp", memory_budget_mb)
    lt.Cap(logit_scale, softcap).check("linear_logp")
    shards = check_group("linear_logp", group, vocab_start)
    tensors = [x for x in (hidden, weight, bias) if x is not None]
    options = _Options(
        entropy=return_entropy,
        save=torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        memory_budget_mb=memory_budget_mb,
        impl=choose_rows("linear_logp", impl, hidden),
        logit_scale=float(logit_scale),
        softcap=None if softcap is None else float(softcap),
        group_name=shards.group_name,
        vocab_start=shards.start,
    )
    logp, entropy, _, _ = _linear_logp(hidden, weight, bias, targets, temperatures, *options)
    return TokenLogp(logp, entropy if return_entropy else None)
