"""How linear_logp cuts rows and vocabulary into tiles, the products, and the rows of a tile."""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _row_softmax as rs
from tercet.kernels import _row_softmax_cpu as compiled
from tercet.kernels import _row_softmax_triton as fused
from tercet.kernels._checks import RowImpl, check_number
from tercet.kernels.reference import accumulator_dtype

MEBI = 2**20
CPU_TILE_BYTES = 8 * MEBI  # stays in the last cache between the product and the row arithmetic
CPU_HEIGHT = 2048
CUDA_TILE_BYTES = 256 * MEBI
CUDA_HEIGHT = 16384  # cuBLAS wants thousands of rows
CUDA_BLOCK = 128  # rows and columns that it computes at a time


class Plan(NamedTuple):
    """Tiles of height x width logits, and how many leading rows keep theirs for the backward."""

    height: int
    width: int
    kept: int


def columns_of(vocab: int, most: int) -> int:
    """Width of a tile of at most `most` columns."""
    width = max(1, min(vocab, most))
    return width - width % 64 if 64 < width < vocab else width


def even_columns(vocab: int, most: int) -> int:
    """As columns_of, for cuBLAS: of the fewest tiles none is much narrower than the others."""
    widest = columns_of(vocab, most)
    even = -(-vocab // -(-vocab // widest))
    return min(whole_blocks(even), widest)


def whole_blocks(size: int) -> int:
    """The next multiple of what cuBLAS computes at a time."""
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK


def make_plan(
    rows: int, weight: Tensor, itemsize: int, tiles: int, parts: int, budget_mb: int
) -> Plan:
    """Cuts the logits so that the tiles, the parts of the weight and the kept rows fit the budget.

    At a time there are `tiles` tiles of logits and `parts` cast parts of the weight, each as many
    of its rows as a tile has columns.
    """
    vocab, hidden = weight.shape
    most_bytes, most_rows = CPU_TILE_BYTES, CPU_HEIGHT
    if weight.is_cuda:
        most_bytes, most_rows = CUDA_TILE_BYTES, CUDA_HEIGHT
    tile_bytes = min(most_bytes, budget_mb * MEBI // (tiles + parts))
    height = max(1, min(rows, most_rows))
    longest = max(height, hidden) if parts else height
    cut = even_columns if weight.is_cuda else columns_of
    width = cut(vocab, tile_bytes // (longest * itemsize))
    spare = budget_mb * MEBI - (tiles * height + parts * hidden) * width * itemsize
    return Plan(height, width, max(0, min(rows, spare // (vocab * itemsize))))


def cuts(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


def size(part: slice) -> int:
    return part.stop - part.start


def product(a: Tensor, b: Tensor, *, out: Tensor, add: bool = False) -> Tensor:
    """Computes a b, or out + a b, into `out`; half-precision operands accumulate in float32."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if add:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def half_products(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the operands stay in half precision, and only their products are float32."""
    return hidden.is_cuda and hidden.dtype == weight.dtype != accumulator_dtype(hidden)


class Head(NamedTuple):
    """Operands of the products: half precision stays so on CUDA, else all is float32 (float64)."""

    hidden: Tensor  # [N, H], cast
    weight: Tensor  # [V, H], cast chunk by chunk
    bias: Tensor | None
    accumulator: torch.dtype

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Head":
        accumulator = accumulator_dtype(hidden)
        half = half_products(hidden, weight)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return Head(flat if half else flat.to(accumulator), weight, bias, accumulator)

    def chunk(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[columns].to(self.accumulator)
        return self.weight[columns].to(self.hidden.dtype), bias

    def casts(self) -> bool:
        """Whether the weight is cast, part by part."""
        return self.weight.dtype != self.hidden.dtype

    def logits(self, rows: slice, chunk: tuple[Tensor, Tensor | None], *, out: Tensor) -> Tensor:
        weight, bias = chunk
        product(self.hidden[rows], weight.t(), out=out)
        return out if bias is None else out.add_(bias)


class Cap(NamedTuple):
    """Logits are logit_scale times the products, then softcap tanh(x / softcap) if there is one."""

    logit_scale: float
    softcap: float | None

    def query(self, query: rs.Query) -> rs.Query:
        """Without a cap the scale joins that of the rows."""
        if self.softcap is not None:
            return query
        return query._replace(scale=query.scale * self.logit_scale)

    def apply(self, x: Tensor) -> None:
        """Caps products in place."""
        if self.softcap is not None:
            x.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap)

    def slope(self, x: Tensor, *, out: Tensor) -> Tensor:
        """Derivative of capped logits x by the products."""
        assert self.softcap is not None
        torch.mul(x, x, out=out)
        return out.mul_(-self.logit_scale / self.softcap**2).add_(self.logit_scale)

    def check(self, op: str) -> None:
        """Raises TypeError or ValueError unless both are positive numbers."""
        named = {"logit_scale": self.logit_scale}
        named |= {} if self.softcap is None else {"softcap": self.softcap}
        check_number(op, **named)
        for name, value in named.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{op}: {name} must be > 0 and finite, got {value}")


def add_tile(
    impl: RowImpl,
    state: rs.RowState,
    x: Tensor,
    query: rs.Query,
    *,
    first_column: int,
    entropy: bool,
    work: Tensor,
    scratch: Tensor | None,
) -> None:
    """Adds a tile of logits to the state; "torch" writes over work and, for entropy, scratch."""
    if impl == "torch":
        rs.add_tile(state, x, query, first_column=first_column, work=work, scratch=scratch)
        return
    forward = fused.forward if impl == "triton" else compiled.forward
    at = fused.rows_of("linear", "tile", x)
    forward(x, at, *query, state, first_column=first_column, entropy=entropy)


def grad_tile(
    impl: RowImpl,
    out: Tensor,
    x: Tensor,
    query: rs.Query,
    grads: rs.RowGrads,
    *,
    first_column: int,
    entropy: bool,
    scratch: Tensor | None,
) -> None:
    """Gradient of a tile of logits into `out`, which may be x; scratch: "torch" with entropy."""
    if impl == "torch":
        rs.grad_tile(out, x, query, grads, first_column=first_column, scratch=scratch)
        return
    backward = fused.backward if impl == "triton" else compiled.backward
    at, parts = fused.rows_of("linear", "tile", x), (grads.coef, grads.target)
    backward(out, x, at, query.targets, parts, first_column=first_column, entropy=entropy)


class Tiles:
    """Workspace: tiles that every step reuses, and the logits of the kept rows.

    The kept rows lie tile by tile: block [i, i + h) of them fills h V elements, in which the
    chunk of columns [c, c + w) is the contiguous [h, w] from element h c on.
    """

    def __init__(self, plan: Plan, buffers: int, kept: Tensor) -> None:
        self.plan = plan
        self._kept = kept
        area = plan.height * plan.width
        self._buffers = [kept.new_empty(area) for _ in range(buffers)]

    def buffer(self, index: int, rows: slice, columns: slice) -> Tensor:
        shape = (size(rows), size(columns))
        return self._buffers[index][: shape[0] * shape[1]].view(shape)

    def kept(self, block: slice, columns: slice) -> Tensor:
        height = size(block)
        flat = self._kept[block].view(-1)
        return flat[height * columns.start : height * columns.stop].view(height, size(columns))

    def blocks(self, rows: int) -> list[slice]:
        """Blocks of rows that are wholly kept or wholly not."""
        kept, height = self.plan.kept, self.plan.height
        return cuts(0, kept, height) + cuts(kept, rows, height)


def capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class LiveBlock(NamedTuple):
    """A block of rows of the backward, which sees live rows only."""

    rows: slice  # among the live rows
    source: slice | None  # the kept block that holds their logits
    inside: Tensor | None  # which of its rows are live; None means all


def live_blocks(live: Tensor, tiles: Tiles) -> tuple[Tensor | None, list[LiveBlock]]:
    """Indices of the live rows (None: all of them) and their blocks.

    The sizes of the backward's products depend on the count of live rows, so a CUDA device is
    waited for once; under capture of a CUDA graph all rows count as live instead.
    """
    rows, kept = len(live), tiles.plan.kept
    sources = cuts(0, kept, tiles.plan.height)
    edges = [*(block.start for block in sources), kept, rows]
    if capturing(live):
        before = edges
    else:
        before = torch.nn.functional.pad(live.cumsum(0), (1, 0))[edges].tolist()
    index = None if before[-1] == rows else live.nonzero().squeeze(1)
    blocks = []
    for source, low, high in zip(sources, before, before[1:], strict=False):
        inside = None
        if index is not None and high - low < size(source):
            inside = index[low:high] - source.start
        if high > low:
            blocks.append(LiveBlock(slice(low, high), source, inside))
    rest = cuts(before[-2], before[-1], tiles.plan.height)
    return index, blocks + [LiveBlock(block, None, None) for block in rest]
