"""Similarities of queries with every candidate, a tile of rows at a time: sums and gradients.

Shared by info_nce and similarity_stats.  A tile [rows, columns] holds inner products.  PyTorch, or
the kernels of `_similarity_triton`, turn them into logits, mask, sum and derive them; operands of
half precision stay so for Triton, and products accumulate in float32 either way.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _similarity_triton as fused
from tercet.kernels.reference import NORM_EPS, accumulator_dtype

CPU_TILE = 1 << 21  # products in memory at once
CUDA_TILE = 1 << 26
NUM_MARKS = 5
HALF_TOP = 2.0**14  # largest weight of a float16 product; float16 ends at 2^16


class Rows(NamedTuple):
    """Queries [rows, hidden]."""

    x: Tensor
    inv: Tensor  # 1 / norm, or 1
    ids: Tensor | None
    limit: Tensor | None  # logits above it are no negatives of this row

    def part(self, rows: slice) -> "Rows":
        x, inv, ids, limit = (None if x is None else x[rows] for x in self)
        assert x is not None
        assert inv is not None
        return Rows(x, inv, ids, limit)


class Columns(NamedTuple):
    """Candidates: keys or a pool [columns, hidden], or every row's own [rows, columns, hidden]."""

    x: Tensor
    inv: Tensor  # 1 / norm, or 1
    ids: Tensor | None  # a row of the same id is not repelled
    limit: Tensor | None  # logits above it are no negatives of this key
    first: int | None  # column of row 0's positive; None: there are no positives here

    @property
    def own(self) -> bool:
        return self.x.ndim == 3

    def part(self, rows: slice) -> "Columns":
        if self.own:
            ids = None if self.ids is None else self.ids[rows]
            return self._replace(x=self.x[rows], inv=self.inv[rows], ids=ids)
        return self if self.first is None else self._replace(first=self.first + rows.start)


class Problem(NamedTuple):
    """Queries, their keys (the first source), and negatives, if any (the second)."""

    query: Rows
    sources: list[Columns]
    scale: Tensor  # 1 / temperature, 0-dimensional; of what is not an operand, it has the dtype
    normalize: bool
    triton: bool

    def parts(self) -> list[slice]:
        """Slices of rows whose products are in memory at once."""
        rows = len(self.query.x)
        width = max(c.x[:1].numel() if c.own else len(c.x) for c in self.sources)
        height = (CUDA_TILE if self.query.x.is_cuda else CPU_TILE) // max(width, 1)
        height = max(1, min(height, rows))
        return [slice(i, min(i + height, rows)) for i in range(0, rows, height)]


class Tile(NamedTuple):
    """Products of some rows with a source; PyTorch turns them into logits in place."""

    rows: Rows
    columns: Columns
    x: Tensor  # [rows, columns]

    def frame(self) -> fused.Frame:
        """What the kernels need to know of the rows and columns."""
        rows, columns = self.rows, self.columns
        return fused.Frame(
            rows.inv, columns.inv, rows.ids, columns.ids, rows.limit, columns.limit, columns.first
        )


class Lse(NamedTuple):
    """Logit of each positive, and log-sum-exp of the negatives of each row and of each key."""

    positive: Tensor  # [rows]
    row: Tensor  # [rows]
    col: Tensor  # [keys], over these rows; empty unless symmetric


class Slopes(NamedTuple):
    """Gradients with respect to an Lse."""

    positive: Tensor
    row: Tensor
    col: Tensor | None

    def times(self, gain: Tensor | None) -> "Slopes":
        if gain is None:
            return self
        col = None if self.col is None else self.col * gain
        return Slopes(self.positive * gain, self.row * gain, col)


class Gradients(NamedTuple):
    """float32 (float64), with respect to the arguments; None where not asked for."""

    q: Tensor | None
    k: Tensor | None
    n: Tensor | None
    temperature: Tensor


def inverse_norms(x: Tensor, normalize: bool) -> Tensor:
    """1 / norm of each vector, in the accumulator's dtype; ones without normalize."""
    dtype = accumulator_dtype(x)
    if not normalize:
        return x.new_ones(x.shape[:-1], dtype=dtype)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).clamp_min(NORM_EPS).reciprocal()


def marks(
    queries: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    negative_ids: Tensor | None,
    limit: Tensor | None = None,
    key_limit: Tensor | None = None,
) -> list[Tensor]:
    """What an operator takes beside embeddings, as a list; an empty tensor stands for None."""
    given = (ids, key_ids, negative_ids, limit, key_limit)
    return [queries.new_empty(0) if x is None else x for x in given]


def prepare(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    marks: Sequence[Tensor],
    first: int,
    normalize: bool,
    triton: bool,
) -> Problem:
    """The problem of an operator's arguments; limits are similarities there, and logits here."""
    scale = temperature.reciprocal()
    ids, key_ids, negative_ids, *limits = (x.contiguous() if x.numel() else None for x in marks)
    limit, key_limit = (None if x is None else x * scale for x in limits)

    def operand(x: Tensor) -> Tensor:
        return (x if triton else x.to(accumulator_dtype(x))).contiguous()

    query = Rows(operand(queries), inverse_norms(queries, normalize), ids, limit)
    sources = [Columns(operand(keys), inverse_norms(keys, normalize), key_ids, key_limit, first)]
    if negatives is not None and negatives.shape[-2]:
        inv = inverse_norms(negatives, normalize)
        sources.append(Columns(operand(negatives), inv, negative_ids, None, None))
    return Problem(query, sources, scale, normalize, triton)


class _Workspace:
    """Buffers that every tile reuses."""

    def __init__(self, pad: int) -> None:
        self._pad, self._held = pad, {}

    def take(self, name: object, like: Tensor, height: int, width: int) -> Tensor:
        stride = -(-width // self._pad) * self._pad
        if name not in self._held:  # the first tile is the highest
            self._held[name] = like.new_empty(height * stride)
        return self._held[name][: height * stride].view(height, stride)[:, :width]


def _workspace(p: Problem) -> _Workspace:
    return _Workspace(fused.BLOCK_C if p.triton else 1)  # the kernels read whole blocks


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Computes a b, or out + a b, into `out`; half-precision operands accumulate in float32."""
    if a.dtype != out.dtype and not a.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _of_each(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Product of every matrix [rows, a, b] with its vector [rows, b]."""
    return torch.bmm(matrices.to(vectors.dtype), vectors[..., None]).squeeze(-1)


def _tiles(p: Problem, part: slice, space: _Workspace) -> list[Tile]:
    """The products of some rows."""
    query, found = p.query.part(part), []
    for number, source in enumerate(p.sources):
        columns = source.part(part)
        out = space.take(number, p.scale, len(query.x), columns.x.shape[-2])
        if columns.own:
            out.copy_(_of_each(columns.x, query.x.to(out.dtype)))
        else:
            _product(query.x, columns.x.mT, out)
        found.append(Tile(query, columns, out))
    return found


def _positives(keys: Tile) -> Tensor:
    """Similarity of each row with its positive, from products."""
    rows, columns, x = keys
    first = columns.first
    assert first is not None
    return x.diagonal(first)[: len(x)] * rows.inv * columns.inv[first : first + len(x)]


def _mask(tile: Tile, scale: Tensor | float) -> Tensor:
    """Turns products into scale * similarity in place, -inf where a column is no negative."""
    rows, columns, z = tile
    z.mul_((rows.inv * scale)[:, None]).mul_(columns.inv)
    if rows.ids is not None and columns.ids is not None:
        z.masked_fill_(rows.ids[:, None] == columns.ids, -torch.inf)
    if columns.first is not None:
        z.diagonal(columns.first)[: len(z)].fill_(-torch.inf)
    return z


def _row_negatives(tile: Tile) -> Tensor:
    """Logits below the limits of their rows, else -inf; NaN stays NaN."""
    limit = tile.rows.limit
    return tile.x if limit is None else tile.x.masked_fill(tile.x > limit[:, None], -torch.inf)


def _col_negatives(tile: Tile) -> Tensor:
    limit = tile.columns.limit
    return tile.x if limit is None else tile.x.masked_fill(tile.x > limit, -torch.inf)


def _reduce(p: Problem, tiles: list[Tile], symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of the negatives of each row and, if symmetric, of each key."""
    if p.triton:
        found = [
            fused.reduce(t.x, t.frame(), p.scale, symmetric=symmetric and t is tiles[0])
            for t in tiles
        ]
        rows, of_keys = [row for row, _ in found], found[0][1]
    else:
        for tile in tiles:
            _mask(tile, p.scale)
        rows = [_row_negatives(tile).logsumexp(1) for tile in tiles]
        of_keys = _col_negatives(tiles[0]).logsumexp(0) if symmetric else None
    return rows[0] if len(rows) == 1 else torch.logaddexp(*rows), of_keys


def _shift(lse: Tensor) -> Tensor:
    """What to take off logits before exp: not -inf, where nothing was summed."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _weigh(tile: Tile, scale: Tensor, lse: Lse, d: Slopes, work: Tensor) -> Tensor:
    """Gradient with respect to the products of a tile of logits."""
    rows, columns, z = tile
    of_keys = None
    if columns.first is not None and d.col is not None:
        of_keys = torch.sub(_col_negatives(tile), _shift(lse.col), out=work).exp_().mul_(d.col)
    z = _row_negatives(tile).sub_(_shift(lse.row)[:, None]).exp_().mul_(d.row[:, None])
    if of_keys is not None:
        z.add_(of_keys)
    if columns.first is not None:
        z.diagonal(columns.first)[: len(z)].copy_(d.positive)
    return z.mul_((rows.inv * scale)[:, None]).mul_(columns.inv)


class _Sums:
    """Gradients, gathered tile by tile."""

    def __init__(self, p: Problem, needs: list[bool]) -> None:
        def zeros(x: Tensor, needed: bool) -> Tensor | None:
            return x.new_zeros(x.shape, dtype=p.scale.dtype) if needed else None

        self._problem, self._space = p, _workspace(p)
        self.q = zeros(p.query.x, needs[0])
        self.of_sources = [zeros(c.x, need) for c, need in zip(p.sources, needs[1:], strict=False)]

    def add(self, part: slice, tiles: list[Tile], lse: Lse, d: Slopes) -> None:
        """What the rows of some tiles add; `lse.row` and `d` are those of these rows."""
        for number, tile in enumerate(tiles):
            w = self._weights(number, tile, lse, d)
            x = self.of_sources[number]
            if self.q is not None and tile.columns.own:
                self.q[part] += _of_each(tile.columns.x.mT, w)
            elif self.q is not None:
                _product(w, tile.columns.x, self.q[part], add=True)
            if x is not None and tile.columns.own:
                torch.mul(w[..., None], tile.rows.x[:, None].to(w.dtype), out=x[part])
            elif x is not None:
                _product(w.mT, tile.rows.x, x, add=True)

    def _weights(self, number: int, tile: Tile, lse: Lse, d: Slopes) -> Tensor:
        p = self._problem
        like = p.query.x if p.triton and not tile.columns.own else p.scale
        work = self._space.take(number, like, *tile.x.shape)
        if not p.triton:
            return _weigh(tile, p.scale, lse, d, work)
        return fused.weigh(tile.x, tile.frame(), p.scale, lse[1:], d, work)

    def finish(self, gain: Tensor | None) -> Gradients:
        p = self._problem
        found = [self.q, *self.of_sources]
        if gain is not None:
            found = [None if x is None else x.div_(gain) for x in found]
        temperature = p.scale.new_zeros(())
        if self.q is not None:  # gradient of the logits times the logits
            temperature = -p.scale * (p.query.x * self.q).sum()
        for given, gradient in zip([p.query, *p.sources], found, strict=True):
            if p.normalize and gradient is not None:
                _through_norm(gradient, given.x, given.inv)
        q, k, n = [*found, None][:3]
        return Gradients(q, k, n, temperature)


def _through_norm(gradient: Tensor, x: Tensor, inv: Tensor) -> None:
    """Takes off the part along x, in place, unless the norm is at its floor."""
    unit = x * inv[..., None]
    along = (unit * gradient).sum(-1).masked_fill_(inv * NORM_EPS > 1 - 1e-6, 0.0)
    gradient.addcmul_(unit, along[..., None], value=-1)


def _gain(p: Problem, *slopes: Tensor | None) -> Tensor | None:
    """What brings the weights into the range of float16, where products are of that dtype."""
    if p.query.x.dtype != torch.float16 or not len(p.query.x):
        return None
    bound = torch.stack([c.inv.amax() for c in p.sources]).amax() * p.query.inv.amax() * p.scale
    bound = bound * torch.stack([x.abs().amax() for x in slopes if x is not None]).sum()
    return torch.where((bound > 0) & bound.isfinite(), HALF_TOP / bound, 1.0)


def forward(p: Problem, symmetric: bool) -> Lse:
    """The log-sum-exps, from one pass over the products."""
    positive, row = torch.empty_like(p.query.inv), torch.empty_like(p.query.inv)
    col = p.query.inv.new_full((len(p.sources[0].x) if symmetric else 0,), -torch.inf)
    space = _workspace(p)
    for part in p.parts():
        tiles = _tiles(p, part, space)
        positive[part] = _positives(tiles[0]) * p.scale
        row[part], of_keys = _reduce(p, tiles, symmetric)
        if of_keys is not None:
            col = torch.logaddexp(col, of_keys)
    return Lse(positive, row, col)


def backward(p: Problem, lse: Lse, d: Slopes, needs: list[bool]) -> Gradients:
    """Gradients of queries, keys, negatives (where needed) and temperature: the products again."""
    sums, space, gain = _Sums(p, needs), _workspace(p), _gain(p, *d)
    d = d.times(gain)
    for part in p.parts():
        tiles = _tiles(p, part, space)
        if not p.triton:
            for tile in tiles:
                _mask(tile, p.scale)
        at = lse._replace(row=lse.row[part])
        sums.add(part, tiles, at, Slopes(d.positive[part], d.row[part], d.col))
    return sums.finish(gain)


def losses_and_gradients(p: Problem, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Gradients]:
    """Loss of each row, and gradients of their sum times weight, from one pass over the products.

    A row's log-sum-exp is complete once its tile is, so its gradients need no second pass.
    """
    sums, space, gain = _Sums(p, needs), _workspace(p), _gain(p, weight)
    losses = torch.empty_like(p.query.inv)
    for part in p.parts():
        tiles = _tiles(p, part, space)
        positive = _positives(tiles[0]) * p.scale
        row, _ = _reduce(p, tiles, False)
        losses[part] = torch.nn.functional.softplus(row - positive)
        missed = (row - positive).sigmoid() * weight[part]
        d = Slopes(-missed, missed, None).times(gain)
        sums.add(part, tiles, Lse(positive, row, row), d)
    return losses, sums.finish(gain)


class Stats(NamedTuple):
    """Of each row; similarities are not divided by the temperature."""

    positive: Tensor
    lse: Tensor  # of the logits of the negatives
    hardest: Tensor  # largest similarity of a negative, -inf without one
    index: Tensor  # its column, counted through the sources; -1 without one
    above: Tensor  # negatives that are not below the positive, int64


def stats(p: Problem) -> Stats:
    """Statistics from one pass over the products."""
    dtypes = [p.scale.dtype] * 3 + [torch.int64] * 2
    space, found = _workspace(p), []
    for part in p.parts():
        tiles = _tiles(p, part, space)
        positive, base, of_rows = _positives(tiles[0]), 0, None
        for tile in tiles:
            new = _tile_stats(p, tile, positive, base)
            of_rows = new if of_rows is None else _join(of_rows, new)
            base += tile.x.shape[1]
        found.append(of_rows)
    if not found:
        return Stats._make(p.query.inv.new_empty((0,), dtype=dtype) for dtype in dtypes)
    return Stats._make(torch.cat(column) for column in zip(*found, strict=True))


def _tile_stats(p: Problem, tile: Tile, positive: Tensor, base: int) -> Stats:
    if p.triton:
        lse, hardest, index, above = fused.describe(tile.x, tile.frame(), p.scale, positive)
    else:
        s = _mask(tile, 1.0)
        above = (~(s <= positive[:, None]) & (s != -torch.inf)).sum(1)
        hardest, index = s.max(1)
        lse = s.mul_(p.scale).logsumexp(1)
    index = (index + base).masked_fill(hardest == -torch.inf, -1)
    return Stats(positive, lse, hardest, index, above)


def _join(a: Stats, b: Stats) -> Stats:
    """Of the candidates of both; the first of equal ones is the hardest, NaN above all."""
    later = (b.hardest > a.hardest) | (b.hardest.isnan() & ~a.hardest.isnan())
    return Stats(
        a.positive,
        torch.logaddexp(a.lse, b.lse),
        torch.where(later, b.hardest, a.hardest),
        torch.where(later, b.index, a.index),
        a.above + b.above,
    )
