"""How linear_logp cuts rows and vocabulary into tiles, and the products on them."""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels.reference import accumulator_dtype

MEBI = 2**20
CPU_TILE_BYTES = 8 * MEBI  # stays in the last cache between the product and the row arithmetic
CPU_HEIGHT = 2048
CUDA_TILE_BYTES = 512 * MEBI
CUDA_HEIGHT = 16384  # cuBLAS wants thousands of rows


class Plan(NamedTuple):
    """Tiles of height x width logits, and how many leading rows keep theirs for the backward."""

    height: int
    width: int
    kept: int


def make_plan(
    rows: int, vocab: int, itemsize: int, buffers: int, budget_mb: int, cuda: bool
) -> Plan:
    """Cuts rows x vocab logits so that `buffers` tiles and the kept rows stay within the budget."""
    tile_bytes = min(CUDA_TILE_BYTES if cuda else CPU_TILE_BYTES, budget_mb * MEBI // buffers)
    height = max(1, min(rows, CUDA_HEIGHT if cuda else CPU_HEIGHT))
    width = max(1, min(vocab, tile_bytes // (height * itemsize)))
    if 64 < width < vocab:
        width -= width % 64
    spare = budget_mb * MEBI - buffers * height * width * itemsize
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


class Head(NamedTuple):
    """Operands of the products: half precision stays so on CUDA, else all is float32 (float64)."""

    hidden: Tensor  # [N, H], cast
    weight: Tensor  # [V, H], cast chunk by chunk
    bias: Tensor | None
    accumulator: torch.dtype

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> "Head":
        accumulator = accumulator_dtype(hidden)
        half = hidden.is_cuda and hidden.dtype == weight.dtype
        flat = hidden.reshape(-1, hidden.shape[-1])
        return Head(flat if half else flat.to(accumulator), weight, bias, accumulator)

    def chunk(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias[columns].to(self.accumulator)
        return self.weight[columns].to(self.hidden.dtype), bias

    def logits(self, rows: slice, chunk: tuple[Tensor, Tensor | None], *, out: Tensor) -> Tensor:
        weight, bias = chunk
        product(self.hidden[rows], weight.t(), out=out)
        return out if bias is None else out.add_(bias)


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
