"""How good embeddings are: retrieval, similarity, spread; and whether the model still writes.

Everything here is deterministic; similarities and ranks are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.engine.model import Policy, evaluating, score
from tercet.engine.records import pack, split_by_tokens
from tercet.kernels._typing import Bool, Float

TIE = 1e-9  # cosines closer than this are the same number: float64 rounding of equal vectors
SCORES_PER_CHUNK = 1 << 22  # similarities held at once; memory only


def _unit(name: str, op: str, vectors: Tensor) -> Tensor:
    """The rows with length 1 in float64; a zero row stays zero."""
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be a floating-point tensor [n, hidden], "
            f"got {vectors.dtype} {tuple(vectors.shape)}"
        )
    bad = (~vectors.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity in rows {bad[:8]}")
    return F.normalize(vectors.detach().double(), dim=-1)


def _relevance(
    relevant: Sequence[set[int]] | Tensor, shape: tuple[int, int]
) -> Bool[Tensor, "n m"]:
    num_queries, num_documents = shape
    if len(relevant) != num_queries:
        raise ValueError(
            f"retrieval_metrics: relevant must have one entry per query ({num_queries}), "
            f"got {len(relevant)}"
        )
    if isinstance(relevant, Tensor) and relevant.dtype == torch.bool:
        mask = relevant.cpu()
    else:
        sets = [{int(r)} for r in relevant] if isinstance(relevant, Tensor) else list(relevant)
        pairs = [(i, j) for i, found in enumerate(sets) for j in found]
        outside = [pair for pair in pairs if not 0 <= pair[1] < num_documents]
        if outside:
            raise ValueError(
                f"retrieval_metrics: document indices must be in [0, {num_documents}), "
                f"got {outside[0][1]} for query {outside[0][0]}"
            )
        mask = torch.zeros(shape, dtype=torch.bool)
        if pairs:
            mask[tuple(torch.tensor(pairs).T)] = True
    without = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(
            "retrieval_metrics: every query must have a relevant document, "
            f"got none for queries {without[:8]}; drop them first"
        )
    return mask


def _ranks(scores: Float[Tensor, "n m"], relevant: Bool[Tensor, "n m"]) -> list[list[int]]:
    """1-based ranks of each query's relevant documents, ascending; ties go against them."""
    ranks = []
    for row, mask in zip(scores, relevant, strict=True):
        wrong = row[~mask].sort().values
        right = row[mask].sort(descending=True).values
        ahead = len(wrong) - torch.searchsorted(wrong, right - TIE)
        ranks.append((ahead + torch.arange(1, len(right) + 1)).tolist())
    return ranks


def metrics_of_ranks(
    ranks: Sequence[Sequence[int]], ks: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """recall@k, hit@k, ndcg@10 and mrr, each a mean over the queries in [0, 1].

    recall@k is the share of a query's relevant documents among its first k, hit@k whether there
    is one, ndcg@10 has binary gains, mrr looks at the whole ranking.

    Args:
        ranks: per query, the 1-based ranks of all its relevant documents, ascending.
        ks: cut-offs of recall and hit.

    Raises:
        ValueError: no queries, or a cut-off below 1.
    """
    if not ranks or min(ks, default=1) < 1:
        raise ValueError(
            "metrics_of_ranks: there must be a query and every k >= 1, "
            f"got {len(ranks)} queries and k {list(ks)}"
        )
    n = len(ranks)
    result = {}
    for k in ks:
        inside = [sum(rank <= k for rank in found) for found in ranks]
        result[f"recall@{k}"] = sum(i / len(r) for i, r in zip(inside, ranks, strict=True)) / n
        result[f"hit@{k}"] = sum(i > 0 for i in inside) / n
    discounts = [1 / math.log2(rank + 1) for rank in range(1, 11)]
    ndcg = 0.0
    for found in ranks:
        gain = sum(discounts[rank - 1] for rank in found if rank <= 10)
        ndcg += gain / sum(discounts[: len(found)])
    result["ndcg@10"] = ndcg / n
    result["mrr"] = sum(1 / found[0] for found in ranks) / n
    return result


def retrieval_metrics(
    query_vectors: Float[Tensor, "n hidden"],
    document_vectors: Float[Tensor, "m hidden"],
    relevant: Sequence[set[int]] | Tensor,
    ks: Sequence[int] = (1, 10),
) -> dict[str, float]:
    """Retrieval by cosine: recall@k, hit@k, ndcg@10 and mrr, each in [0, 1].

    A tie counts against the relevant document: it is ranked behind every other document of the
    same cosine (to 1e-9).  So the order of the documents cannot matter, and a model that gives
    all texts the same vector finds nothing.  A zero vector has cosine 0 with everything.

    Args:
        query_vectors: need not be normalised.
        document_vectors: need not be normalised.
        relevant: a set of document indices per query; or an int tensor [n], one document each; or
            a bool tensor [n, m].
        ks: cut-offs of recall and hit.

    Raises:
        ValueError: shapes that do not fit, NaN, an index outside, or a query with nothing relevant.
    """
    queries = _unit("query_vectors", "retrieval_metrics", query_vectors).cpu()
    documents = _unit("document_vectors", "retrieval_metrics", document_vectors).cpu()
    if queries.shape[1] != documents.shape[1] or not len(queries):
        raise ValueError(
            "retrieval_metrics: there must be queries, as wide as the documents, "
            f"got {tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    mask = _relevance(relevant, (len(queries), len(documents)))
    step = max(1, SCORES_PER_CHUNK // len(documents))
    ranks = []
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        ranks += _ranks(queries[part] @ documents.T, mask[part])
    return metrics_of_ranks(ranks, ks)


def score_metrics(
    scores: Float[Tensor, "n m"], relevant: Sequence[set[int]] | Tensor, ks: Sequence[int] = (1, 10)
) -> dict[str, float]:
    """The metrics of retrieval_metrics from scores that exist already, as BM25 gives them.

    Raises:
        ValueError: as retrieval_metrics.
    """
    if scores.ndim != 2 or not scores.isfinite().all():
        raise ValueError(
            f"score_metrics: scores must be a finite [n, m], got {tuple(scores.shape)}"
        )
    scores = scores.double().cpu()
    mask = _relevance(relevant, (scores.shape[0], scores.shape[1]))
    return metrics_of_ranks(_ranks(scores, mask), ks)


def _average_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: Float[Tensor, " n"], second: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation in [-1, 1], ties with their average rank.

    NaN when one side is constant, where the correlation does not exist (a collapsed model does
    that: look at anisotropy).

    Raises:
        ValueError: not two vectors of one length >= 2, or NaN among them.
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            "spearman: first and second must be vectors of one length >= 2, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    x, y = first.detach().double().cpu(), second.detach().double().cpu()
    if x.isnan().any() or y.isnan().any():
        raise ValueError("spearman: values must be numbers, got NaN")
    x, y = (r - r.mean() for r in (_average_ranks(x), _average_ranks(y)))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return float((x * y).sum() / scale) if scale > 0 else math.nan


def sts_spearman(
    first: Float[Tensor, "n hidden"], second: Float[Tensor, "n hidden"], gold: Float[Tensor, " n"]
) -> float:
    """Spearman correlation of the pairs' cosines with people's scores, the metric of STS tasks.

    Cosines are rounded to 1e-9 first, so that equal pairs tie.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    a, b = _unit("first", "sts_spearman", first), _unit("second", "sts_spearman", second)
    if a.shape != b.shape or gold.shape != a.shape[:1]:
        raise ValueError(
            "sts_spearman: first, second and gold must have one row per pair, "
            f"got {tuple(a.shape)}, {tuple(b.shape)} and {tuple(gold.shape)}"
        )
    return spearman(((a * b).sum(-1) / TIE).round().cpu(), gold)


def anisotropy(vectors: Float[Tensor, "n hidden"]) -> float:
    """Mean cosine of two different rows, in [-1/(n-1), 1]; 1 is a full collapse.

    From |sum u|^2 = sum |u|^2 + sum over pairs, so memory is that of the vectors.

    Raises:
        ValueError: fewer than two rows, or values that are not finite.
    """
    unit = _unit("vectors", "anisotropy", vectors)
    n = len(unit)
    if n < 2:
        raise ValueError(f"anisotropy: there must be at least two vectors, got {n}")
    pairs = unit.sum(0).square().sum() - unit.square().sum()
    return float(pairs / (n * (n - 1)))


def distinct_share(rationales: Sequence[str]) -> float:
    """Number of different rationales over their number, in (0, 1]; 1/n when all are the same.

    Raises:
        ValueError: no rationales.
    """
    if not rationales:
        raise ValueError("distinct_share: there must be at least one rationale, got none")
    return len(set(rationales)) / len(rationales)


def completion_loss(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    max_tokens_per_batch: int = 16_384,
) -> float:
    """Mean next-token loss of the completions given the prompts, nats per completion token.

    A plain token mean over all rows; rows are packed, and max_tokens_per_batch changes memory only.

    Raises:
        ValueError: no rows, an empty prompt, or no completion token at all.
    """
    if not prompts or not all(prompts) or not any(completions):
        raise ValueError(
            "completion_loss: there must be rows, each with a prompt token, and completion tokens, "
            f"got {len(prompts)} rows"
        )
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    total, count = 0.0, 0
    with evaluating(policy.model), torch.no_grad():
        for part in split_by_tokens(lengths, max_tokens_per_batch):
            packed = pack([prompts[i] for i in part], [completions[i] for i in part])
            logp = score(policy, packed.to(policy.device)).logp
            total -= float(logp.double().sum())
            count += logp.numel()
    return total / count


def held_out_loss(
    policy: Policy,
    texts: Sequence[str],
    *,
    max_length: int = 1024,
    max_tokens_per_batch: int = 16_384,
) -> dict[str, float]:
    """Mean next-token loss of plain texts, nats per token: is the ability to write kept?

    Compare before and after training on the same texts; exp() of it is the perplexity.  The first
    token of a text is given, not predicted, so that a text of one token counts for nothing.

    Args:
        policy: with a tokenizer.
        texts: at least one of two tokens or more.
        max_length: tokens at which a text is cut; the model's positions, where they are fewer.
        max_tokens_per_batch: memory only.

    Returns:
        held_out_loss, and in held_out_truncated the number of texts that were cut.

    Raises:
        ValueError: no tokenizer, or no text of at least two tokens.
    """
    if policy.tokenizer is None:
        raise ValueError(
            "held_out_loss: the policy must have a tokenizer, got None; "
            "save one beside the model, or pass it to Policy"
        )
    limit = min(max_length, policy.max_length or max_length)
    whole = [list(policy.tokenizer.encode(text, verbose=False)) for text in texts]
    rows = [row[:limit] for row in whole if len(row) > 1]
    if not rows:
        raise ValueError(
            f"held_out_loss: there must be a text of at least two tokens, got none in {len(texts)}"
        )
    loss = completion_loss(
        policy,
        [row[:1] for row in rows],
        [row[1:] for row in rows],
        max_tokens_per_batch=max_tokens_per_batch,
    )
    cut = sum(len(row) > limit for row in whole)
    return {"held_out_loss": loss, "held_out_truncated": float(cut)}


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the deviation of one value is 0.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("mean_and_spread: there must be at least one value, got none")
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) if len(x) > 1 else 0.0


__all__ = [
    "anisotropy",
    "completion_loss",
    "distinct_share",
    "held_out_loss",
    "mean_and_spread",
    "metrics_of_ranks",
    "retrieval_metrics",
    "score_metrics",
    "spearman",
    "sts_spearman",
]
