"""Where each query's key stands among its candidates, without storing the B x B similarities.

One pass over the similarities, 2 B^2 D FLOPs, no gradient; memory is O(B D).  The plain definition
is `similarity_stats_ref`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tercet.kernels import _similarity as tiled
from tercet.kernels._checks import Impl
from tercet.kernels._gather import Gather
from tercet.kernels._typing import Float, Int
from tercet.kernels.info_nce import (
    Candidates,
    check_candidates,
    choose_triton,
    scalar_temperature,
)
from tercet.kernels.reference import SimilarityStats, accumulator_dtype


@torch.library.custom_op("tercet::similarity_stats", mutates_args=())
def _similarity_stats(
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    temperature: Tensor,
    marks: Sequence[Tensor],
    first: int,
    normalize: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(queries):  # launches go to the current device
        problem = tiled.prepare(
            queries, keys, negatives, temperature, marks, first, normalize, triton
        )
        positive, lse, hardest, index, above = tiled.stats(problem)
    lse = torch.logaddexp(lse, positive * problem.scale)
    return positive, lse, hardest, index, above + 1, positive - hardest


@_similarity_stats.register_fake
def _(queries, *_others):
    row = queries.new_empty(queries.shape[:1], dtype=accumulator_dtype(queries))
    whole = torch.empty_like(row, dtype=torch.int64)
    positive, lse, hardest, margin = (torch.empty_like(row) for _ in range(4))
    return positive, lse, hardest, whole, torch.empty_like(whole), margin


def similarity_stats(
    queries: Float[Tensor, "batch hidden"],
    keys: Float[Tensor, "batch hidden"],
    negatives: Float[Tensor, "*batch m hidden"] | None = None,
    *,
    temperature: float | Float[Tensor, ""] = 0.05,
    normalize: bool = True,
    ids: Int[Tensor, " batch"] | None = None,
    negative_ids: Int[Tensor, "*batch m"] | None = None,
    group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> SimilarityStats:
    """Similarity of each positive, log-sum-exp, hardest negative, rank and margin; no gradient.

    Arguments as in `info_nce`; fields as in `tercet.kernels.SimilarityStats`.  With a group, the
    index of the hardest negative counts the keys of all ranks, then the pool of all ranks, each
    in the order of ranks.

    Raises:
        TypeError: a type or dtype.
        ValueError: a shape, device or option.
    """
    op = "similarity_stats"
    check_candidates(op, queries, keys, negatives, ids, negative_ids, temperature)
    triton = choose_triton(op, impl, queries)
    with torch.no_grad():
        t = scalar_temperature(temperature, queries)
        candidates = Candidates(keys, ids, negatives, negative_ids)
        if group is not None:
            candidates = candidates.of_every_rank(Gather(group, queries))
        keys, key_ids, negatives, negative_ids, first = candidates
        marks = tiled.marks(queries, ids, key_ids, negative_ids)
        found = _similarity_stats(queries, keys, negatives, t, marks, first, normalize, triton)
    return SimilarityStats(*found)
