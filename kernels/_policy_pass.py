"""The chunks, sweeps and products of policy_head: loss, metrics and gradients in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _linear_tiles as lt
from tercet.kernels import _policy_terms as pt
from tercet.kernels import _policy_triton as fused
from tercet.kernels import _row_softmax as rs
from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels._checks import RowImpl
from tercet.kernels._memory import empty_huge
from tercet.kernels._row_softmax_triton import rows_of

MIN_DEAD = 1 / 32  # of a chunk: moving the other rows costs about what the dead ones would
MOVED = 1 / 32  # of a tile: the rows that move at a time


class Needs(NamedTuple):
    """Which inputs need a gradient; what needs none costs no product."""

    hidden: bool
    weight: bool
    bias: bool


class Options(NamedTuple):
    kind: pt.Kind
    cap: lt.Cap
    needs: Needs
    memory_budget_mb: int
    impl: RowImpl


class Plan(NamedTuple):
    """Rows whose logits are kept at a time, columns of their tiles; the same for other rows."""

    height: int
    width: int
    forward_height: int
    forward_width: int

    @staticmethod
    def of(live: int, other: int, head: lt.Head, tiles: int, gradient: int, budget: int) -> "Plan":
        """Equal chunks that fit, with `tiles` tiles, into `budget` bytes.

        Beside them lie hidden states of the chunk's rows, of its live rows, and their gradient.
        An element of a tile of the gradient takes `gradient` bytes.
        """
        weight, itemsize = head.weight, head.accumulator.itemsize
        vocab, hidden = weight.shape
        most_bytes, most_rows, cut = lt.CPU_TILE_BYTES, lt.CPU_HEIGHT, lt.columns_of
        if weight.is_cuda:
            most_bytes, most_rows, cut = lt.CUDA_TILE_BYTES, lt.CUDA_HEIGHT, lt.even_columns
        tile_bytes = min(most_bytes, budget // (4 * tiles))
        area = tile_bytes // itemsize
        fit = (budget - tiles * tile_bytes) // ((vocab + 3 * hidden) * itemsize)
        whole = weight.is_cuda and fit >= lt.CUDA_BLOCK
        fit -= fit % lt.CUDA_BLOCK if whole else 0
        height = _even(live, max(1, fit))
        height = lt.whole_blocks(height) if whole else height
        kept = height * vocab * itemsize
        copied = (budget - tiles * tile_bytes - kept) // (2 * hidden * itemsize)
        forward_height = _even(other, max(1, min(most_rows, area, copied)))
        return Plan(
            height,
            cut(vocab, tile_bytes // gradient // max(height, hidden)),  # so wide is a cast part
            forward_height,
            cut(vocab, area // max(forward_height, hidden)),
        )

    @staticmethod
    def whole_rows(live: int, other: int, head: lt.Head, copies: int, budget: int) -> "Plan":
        """Chunks of whole rows of logits, whose memory is that of the other rows' tiles, too.

        Beside them lie `copies` of the chunk's hidden states, rows on their way, and a cast part
        of the weight.
        """
        (vocab, hidden), itemsize = head.weight.shape, head.accumulator.itemsize
        tile_bytes = min(lt.CPU_TILE_BYTES, budget // 4)
        area = tile_bytes // itemsize
        beside = int(lt.CPU_TILE_BYTES * MOVED) + head.casts() * tile_bytes
        fit = (budget - beside) // ((vocab + copies * hidden) * itemsize)
        height = _even(live, max(1, fit))
        width = lt.columns_of(vocab, area // hidden) if head.casts() else vocab
        kept = max(height * vocab * itemsize, tile_bytes)
        copied = (budget - beside - kept) // (2 * hidden * itemsize)  # as they are, and cast
        forward_height = _even(other, max(1, min(lt.CPU_HEIGHT, area, copied)))
        forward_width = lt.columns_of(vocab, area // max(forward_height, hidden))
        return Plan(height, width, forward_height, forward_width)

    def tile_bytes(self, gradient: int, itemsize: int) -> int:
        whole = self.height * self.width * gradient
        return max(whole, self.forward_height * self.forward_width * itemsize)


def _even(rows: int, most: int) -> int:
    """Size of the fewest parts of at most `most` rows, all but the last equal."""
    parts = max(1, -(-rows // most))
    return max(1, -(-rows // parts))


class _Order(NamedTuple):
    """Rows worth a gradient first, then other rows that count, then the rest."""

    index: Tensor | None  # None: all rows, in their order
    live: int
    counted: int

    @staticmethod
    def of(tokens: pt.Tokens, options: Options) -> "_Order":
        """Waits for a CUDA device once; under capture of a graph all rows count as live."""
        rows, wanted = len(tokens.counted), any(options.needs)
        if lt.capturing(tokens.counted):
            return _Order(None, rows if wanted else 0, rows)
        live = tokens.maybe_live(options.kind) if wanted else torch.zeros_like(tokens.counted)
        num_live, counted = torch.stack([live.sum(), tokens.counted.sum()]).tolist()
        if rows in (num_live, counted - num_live):  # all alike
            return _Order(None, num_live, counted)
        last = (~live).to(torch.uint8) + (~tokens.counted).to(torch.uint8)
        return _Order(last.argsort(stable=True), num_live, counted)

    def chunks(self, plan: Plan) -> list[tuple[slice | Tensor, bool]]:
        """Rows of each chunk, and whether it is to have gradients."""
        parts = [(part, True) for part in lt.cuts(0, self.live, plan.height)]
        others = lt.cuts(self.live, self.counted, plan.forward_height)
        parts += [(part, False) for part in others]
        if self.index is None:
            return [*parts]
        return [(self.index[part], gradient) for part, gradient in parts]


def policy_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    tokens: pt.Tokens,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, sums of the metrics, gradients of hidden, weight and bias, and their unit."""
    shape = torch.Size((*hidden.shape[:-1], len(weight)))
    query = options.cap.query(rs.flatten_query("policy_head", shape, targets, temperature, hidden))
    unit = _unit(tokens.weights, hidden, weight)
    tokens = tokens._replace(weights=tokens.weights / unit)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if lt.capturing(hidden):  # rows that do not count stay, and must not spread their NaN
        flat = flat.masked_fill(~tokens.counted[:, None], 0.0)
    head = lt.Head.of(flat[:0], weight, bias)  # a chunk casts its own rows
    order = _Order.of(tokens, options)
    plain = options.cap.softcap is None and options.kind.entropy_coef == 0
    sweeps_once = options.impl == "cpp" and plain
    pass_of = _ExponentialPass if sweeps_once else _Pass
    work = pass_of(flat, head, query, tokens, options, order)
    for rows, gradient in order.chunks(work.plan):
        work.chunk(rows, gradient)
    return work.stats[0] * unit, work.stats, *work.gradients(hidden.shape), unit


def _unit(weights: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """What gradients are measured in: 1 / (tokens of a step) would underflow in float16."""
    if torch.float16 not in (hidden.dtype, weight.dtype) or len(weights) == 0:
        return weights.new_ones(())
    most = weights.abs().amax()
    return torch.where(most > 0, most, 1.0)


class _Pass:
    """One call: workspace, what is summed over chunks, and the gradients."""

    def __init__(
        self,
        hidden: Tensor,
        head: lt.Head,
        query: rs.Query,
        tokens: pt.Tokens,
        options: Options,
        order: _Order,
    ) -> None:
        self.hidden, self.head, self.query = hidden, head, query
        self.tokens, self.options = tokens, options
        weight, wide, needs = head.weight, head.accumulator, options.needs
        self.bonus = options.kind.entropy_coef > 0
        self.stats = query.scale.new_zeros(pt.NUM_STATS)
        shape = hidden.shape if needs.hidden else (0,)
        self.d_hidden = torch.zeros(shape, dtype=wide, device=weight.device)
        self.d_weight = empty_huge(
            weight.shape if needs.weight else [0], dtype=wide, device=weight.device
        )
        self.started = False  # d_weight holds a sum
        self.d_bias = self.stats.new_zeros(len(weight) if needs.bias else 0)
        self.allocate(order, options.memory_budget_mb * lt.MEBI)

    def allocate(self, order: _Order, budget: int) -> None:
        """The plan, tiles, and logits of a chunk."""
        head, options, wide = self.head, self.options, self.head.accumulator
        capped = options.cap.softcap is not None and options.impl != "triton"
        buffers = 1 + (options.impl == "torch") + capped
        tiles = buffers + head.casts()  # one is a cast part of the weight
        others = order.counted - order.live
        itemsize = head.hidden.itemsize if options.impl == "triton" else wide.itemsize
        self.plan = Plan.of(order.live, others, head, tiles, itemsize, budget)
        area = -(-self.plan.tile_bytes(itemsize, wide.itemsize) // wide.itemsize)
        self.buffers = [self.query.scale.new_empty(area) for _ in range(buffers)]
        kept = self.plan.height * len(head.weight) if order.live else 0
        self.kept = empty_huge([kept], dtype=wide, device=head.weight.device)

    def gradients(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        if not self.started:
            self.d_weight.zero_()
        d_hidden = self.d_hidden.view(shape) if self.options.needs.hidden else self.d_hidden
        return d_hidden, self.d_weight, self.d_bias

    def chunk(self, rows: slice | Tensor, gradient: bool) -> None:
        hidden, query = self.hidden[rows].to(self.head.hidden.dtype), self.query.rows(rows)
        tokens, kind = self.tokens.rows(rows), self.options.kind
        result = self.forward(hidden, query, keep=gradient)
        logp = result.logp.squeeze(1)
        slopes_of = fused.slopes if self.options.impl == "triton" else pt.slopes
        slopes = slopes_of(logp, result.entropy, tokens, kind)
        pt.merge(self.stats, slopes.stats)
        if gradient:
            self.backward(rows, hidden, query, result, slopes)

    def buffer(
        self, number: int, height: int, columns: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        width = lt.size(columns)
        flat = self.buffers[number].view(dtype or self.head.accumulator)
        return flat[: height * width].view(height, width)

    def kept_tile(self, height: int, columns: slice) -> Tensor:
        """Tiles of the chunk's logits lie one behind the other, each [height, columns]."""
        part = self.kept[height * columns.start : height * columns.stop]
        return part.view(height, lt.size(columns))

    def forward(self, hidden: Tensor, query: rs.Query, *, keep: bool) -> rs.RowResult:
        state, height = rs.empty_state(query), len(hidden)
        head = self.head._replace(hidden=hidden)
        width = self.plan.width if keep else self.plan.forward_width
        for columns in lt.cuts(0, len(head.weight), width):
            x = self.kept_tile(height, columns) if keep else self.buffer(0, height, columns)
            work = self.buffer(0, height, columns) if self.options.impl == "torch" else x
            head.logits(slice(None), head.chunk(columns), out=x)
            self.options.cap.apply(x)
            lt.add_tile(
                self.options.impl, state, x, query, first_column=columns.start, entropy=True,
                work=work, scratch=self.scratch(height, columns),
            )  # fmt: skip
        if self.options.impl == "torch":
            rs.close(state, query)
        return rs.finish(state, query)

    def scratch(self, height: int, columns: slice) -> Tensor | None:
        return self.buffer(1, height, columns) if self.options.impl == "torch" else None

    def live(self, grads: rs.RowGrads) -> Tensor | None:
        """Rows to keep for the products, None for all; a CUDA device is waited for."""
        rows = len(grads.live)
        if lt.capturing(grads.live):
            return None
        live = grads.live.nonzero().squeeze(1)
        dead = rows - len(live)
        few = self.options.impl != "triton" and dead < MIN_DEAD * rows
        return None if dead == 0 or few else live

    def backward(
        self,
        rows: slice | Tensor,
        hidden: Tensor,
        query: rs.Query,
        result: rs.RowResult,
        slopes: pt.Slopes,
    ) -> None:
        """Drops the rows without gradient, and adds the products of the others."""
        needs, head, height = self.options.needs, self.head, len(hidden)
        grads = rs.row_grads(result, query, slopes.logp[:, None], slopes.entropy)
        live = self.live(grads)
        if live is not None:
            if len(live) == 0:
                return
            hidden, query, grads = hidden[live], query.rows(live), grads.rows(live)
        direct = isinstance(rows, slice) and live is None
        shape = hidden.shape if needs.hidden else (0,)
        d_hidden = self.d_hidden[rows] if direct else self.stats.new_empty(shape)
        for columns in lt.cuts(0, len(head.weight), self.plan.width):
            tile = self.tile(height, columns, live, query, grads)
            if needs.hidden:
                weight = head.chunk(columns)[0]
                lt.product(tile, weight, out=d_hidden, add=columns.start > 0)
                del weight  # a cast part, before the next one comes
            if needs.weight:
                lt.product(tile.t(), hidden, out=self.d_weight[columns], add=self.started)
            if needs.bias:
                self.d_bias[columns] += tile.sum(0, dtype=head.accumulator)
        self.started |= needs.weight
        if needs.hidden and not direct:
            at = rows if live is None else _pick(rows, live)
            self.d_hidden[at] = d_hidden

    def tile(
        self,
        height: int,
        columns: slice,
        live: Tensor | None,
        query: rs.Query,
        grads: rs.RowGrads,
    ) -> Tensor:
        """Gradient of the live rows' logits, in the dtype of the products."""
        first, cap = columns.start, self.options.cap
        x = self.kept_tile(height, columns)
        if self.options.impl == "triton":
            out = self.buffer(0, len(query.scale), columns, self.head.hidden.dtype)
            fused.row_gradient(
                out, x, live, query, grads, first_column=first, entropy=self.bonus,
                logit_scale=cap.logit_scale, softcap=cap.softcap,
            )  # fmt: skip
            return out
        out = self.buffer(0, len(query.scale), columns)
        if live is not None:
            x = torch.index_select(x, 0, live, out=out)
        factor = None
        if cap.softcap is not None:
            factor = cap.slope(x, out=self.buffer(-1, len(out), columns))
        lt.grad_tile(
            self.options.impl, out, x, query, grads, first_column=first, entropy=self.bonus,
            scratch=self.scratch(len(out), columns) if self.bonus else None,
        )  # fmt: skip
        if factor is not None:
            out.mul_(factor)
        return out.to(self.head.hidden.dtype)


def _pick(rows: slice | Tensor, live: Tensor) -> Tensor:
    return live + rows.start if isinstance(rows, slice) else rows[live]


class _Packing(NamedTuple):
    """Live rows to the front of a chunk, in place: the last ones move into the holes."""

    count: int
    holes: Tensor
    last: Tensor

    @staticmethod
    def of(live: Tensor) -> "_Packing":
        count = int(live.sum())
        holes = (~live[:count]).nonzero().squeeze(1)
        return _Packing(count, holes, live[count:].nonzero().squeeze(1) + count)

    def pack(self, x: Tensor) -> Tensor:
        step = max(1, int(lt.CPU_TILE_BYTES * MOVED) // (x.shape[1] * x.itemsize))
        for part in lt.cuts(0, len(self.holes), step):
            x[self.holes[part]] = x[self.last[part]]
        return x[: self.count]

    def unpack(self, x: Tensor) -> None:
        """Zeros in the holes."""
        x[self.last] = x[self.holes]
        x[self.holes] = 0.0


class _ExponentialPass(_Pass):
    """On a CPU, where neither entropy bonus nor cap wants the logits again: one sweep, not two.

    It leaves e_j = exp(z_j - max z) in place of the logits, and minus the sum of the other e at
    the target.  The gradient of the logits is e times a number c per row, which stays out of the
    products: dhidden = c (e weight), dweight = e^T (c hidden).
    """

    def allocate(self, order: _Order, budget: int) -> None:
        head, other = self.head, order.counted - order.live
        cast = self.hidden.dtype != head.hidden.dtype
        copies = 1 + cast if order.index is None else 3  # times c; cast or picked; its gradient
        self.plan = Plan.whole_rows(order.live, other, head, copies, budget)
        kept = self.plan.height * len(head.weight) if order.live else 0
        tile = self.plan.forward_height * self.plan.forward_width if other else 0
        self.kept = empty_huge([max(kept, tile)], dtype=head.accumulator, device=head.weight.device)
        self.buffers = [self.kept]

    def logits_of(self, height: int) -> Tensor:
        return self.kept[: height * len(self.head.weight)].view(height, -1)

    def forward(self, hidden: Tensor, query: rs.Query, *, keep: bool) -> rs.RowResult:
        if not keep:
            return super().forward(hidden, query, keep=False)
        x, head, state = self.logits_of(len(hidden)), self.head, rs.empty_state(query)
        head = head._replace(hidden=hidden)
        for columns in lt.cuts(0, len(head.weight), self.plan.width):
            head.logits(slice(None), head.chunk(columns), out=x[:, columns])
        at = rows_of("linear", "logits", x)
        compiled.forward(x, at, *query, state, first_column=0, entropy=True, exponentials=True)
        result = rs.finish(state, query)
        rest = state.stats[1]
        x.scatter_(1, query.targets, result.logp.expm1() * (1 + rest)[:, None])
        return result

    def backward(
        self,
        rows: slice | Tensor,
        hidden: Tensor,
        query: rs.Query,
        result: rs.RowResult,
        slopes: pt.Slopes,
    ) -> None:
        needs, packing = self.options.needs, _Packing.of(slopes.logp != 0)
        c = (-slopes.logp * query.scale * (-result.stats[1]).exp())[:, None]
        e = packing.pack(self.logits_of(len(hidden)))
        if needs.weight:
            self.add_weight(e, packing.pack(hidden * c))
        c = packing.pack(c)
        if needs.hidden:
            self.add_hidden(rows, e, c, packing)
        if needs.bias:
            self.d_bias.addmv_(e.t(), c.squeeze(1))

    def add_weight(self, e: Tensor, scaled: Tensor) -> None:
        for columns in lt.cuts(0, len(self.head.weight), self.plan.width):
            lt.product(e[:, columns].t(), scaled, out=self.d_weight[columns], add=self.started)
        self.started = True

    def add_hidden(self, rows: slice | Tensor, e: Tensor, c: Tensor, packing: _Packing) -> None:
        out = self.d_hidden[rows]
        for columns in lt.cuts(0, len(self.head.weight), self.plan.width):
            weight = self.head.chunk(columns)[0]
            lt.product(e[:, columns], weight, out=out[: len(e)], add=columns.start > 0)
            del weight  # a cast part, before the next one comes
        out[: len(e)].mul_(c)
        packing.unpack(out)
        if not isinstance(rows, slice):
            self.d_hidden[rows] = out
