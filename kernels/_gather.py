"""Rows of all ranks of a process group, with their gradients."""

import torch
import torch.distributed as dist
from torch import Tensor


class Gather:
    """Gathers tensors of one number of rows per rank, which may differ between ranks."""

    def __init__(self, group: dist.ProcessGroup, rows: Tensor) -> None:
        """Learns everyone's number of rows: a small exchange, waited for."""
        self.group, self.rank = group, dist.get_rank(group)
        here = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, here, group=group)
        self.sizes = torch.cat(counts).tolist()
        self.first = sum(self.sizes[: self.rank])  # row 0 of this rank among all

    @property
    def own(self) -> slice:
        return slice(self.first, self.first + self.sizes[self.rank])

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of every rank, one below the other in the order of ranks; differentiable."""
        return _Rows.apply(x, self)  # pyright: ignore[reportReturnType]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        padded = x.new_zeros((max(gather.sizes), *x.shape[1:]))  # equal sizes for every backend
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in gather.sizes]
        dist.all_gather(found, padded, group=gather.group)
        return torch.cat([rows[:size] for rows, size in zip(found, gather.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.to(wide).contiguous()
        total = total.clone() if total is gradient else total
        dist.all_reduce(total, group=ctx.gather.group)
        return total[ctx.gather.own].to(gradient.dtype), None
