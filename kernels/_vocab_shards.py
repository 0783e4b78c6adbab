"""Rows of a softmax whose vocabulary is cut over the ranks of a process group.

Each rank holds the logits of tokens [start, start + size) and their row state (m, rest, spread, see
`_row_softmax.py`).  One all-reduce finds the maximum M of each row, another adds

    rest   = sum over ranks of (1 + rest_r) s_r - 1,          s_r = exp((m_r - M) / temperature)
    spread = sum over ranks of s_r (spread_r + (1 + rest_r) (M - m_r) / temperature)

and the targets' logits.  A rank whose m_r is M gives rest_r, and the -1 is left out: so rest, and
with it 1 - p, stays precise when p -> 1.  Every rank ends with the same bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tercet.kernels import _row_softmax as rs

NO_GROUP = ""


def check_group(op: str, group: object, vocab_start: int | None) -> "Shards":
    """Raises TypeError or ValueError unless both are given, or neither."""
    if group is None and vocab_start is None:
        return Shards(NO_GROUP, 0)
    if group is None or vocab_start is None:
        raise ValueError(
            f"{op}: group and vocab_start must be given together, "
            f"got group={group} and vocab_start={vocab_start}"
        )
    name = getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise TypeError(f"{op}: group must be a ProcessGroup, got {type(group).__name__}")
    if not isinstance(vocab_start, int):
        raise TypeError(f"{op}: vocab_start must be a whole number, got {vocab_start!r}")
    if vocab_start < 0:
        raise ValueError(f"{op}: vocab_start must be >= 0, got {vocab_start}")
    return Shards(name, vocab_start)


class Shards(NamedTuple):
    """The part of the vocabulary that this rank holds, as the ops' schema can carry it."""

    group_name: str  # NO_GROUP: the vocabulary is whole
    start: int

    def __bool__(self) -> bool:
        return self.group_name != NO_GROUP

    def all_reduce(self, x: Tensor, how: str) -> Tensor:
        """Reduction of contiguous x over the ranks; "max" or "sum"."""
        if x.numel() == 0:
            return x
        ops = torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x, how, self.group_name))

    def merge(self, op: str, state: rs.RowState, query: rs.Query, size: int) -> rs.RowState:
        """State of the whole rows from that of this rank, which holds `size` tokens.

        Raises IndexError on every rank, on a CPU, unless each target lies in one rank's shard; on
        CUDA, which is not waited for, such a target gives NaN.
        """
        m, rest, spread = state.stats
        top = self.all_reduce(m.contiguous(), "max")
        total = 1 + rest
        fall = ((top - m) * query.scale).clamp(max=-rs.MIN_LOG)  # m is -inf in a masked shard
        shrink, highest = (-fall).exp(), m == top
        inside = (query.targets >= 0) & (query.targets < size)
        sums = torch.cat(
            [
                torch.stack(
                    [
                        torch.where(highest, rest, total * shrink),
                        torch.where(highest, spread, shrink * (spread + total * fall)),
                        highest.to(m.dtype),
                    ]
                ),
                torch.where(inside, state.picked, 0.0).t(),
                inside.t().to(m.dtype),
            ]
        )
        sums = self.all_reduce(sums, "sum")
        picked, found = sums[3:].t().chunk(2, dim=1)
        self._check_found(op, query, found)
        rest = sums[0] + (sums[2] - 1)
        picked = picked.masked_fill(found != 1, torch.nan).contiguous()
        return rs.RowState(torch.stack([top, rest, sums[1]]), picked)

    def _check_found(self, op: str, query: rs.Query, found: Tensor) -> None:
        if found.device.type != "cpu" or bool((found == 1).all()):
            return
        row, k = (found != 1).nonzero()[0].tolist()
        raise IndexError(
            f"{op}: every target must lie in the shard [vocab_start, vocab_start + len(weight)) "
            f"of one rank, got {int(query.targets[row, k]) + self.start}, which "
            f"{int(found[row, k])} ranks hold; give ignored rows any valid target"
        )
