"""An encoder read out on held-out rows: the one measurement of training, `grace eval` and tables.

Supervised rows: queries search the documents.  Unsupervised rows: one sample of a text searches
the others' and its own second sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tercet.engine.grace.config import GraceConfig
from tercet.engine.grace.data import Example
from tercet.engine.grace.encoder import Encoded, GraceEncoder
from tercet.engine.grace.evaluate import anisotropy, distinct_share, retrieval_metrics
from tercet.engine.rollout import request_seed

EVAL_STEP = 0  # of the seeds: training counts from 1
FEW = 20  # queries, below which each is more than a twentieth of recall
RETRIEVAL = ("recall@1", "recall@10", "ndcg@10", "mrr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What is searched and by what; a text stands once on each side."""

    queries: list[str]
    documents: list[str]
    relevant: list[set[int]]  # documents of each query, by their places


def corpus_of(examples: Sequence[Example]) -> Corpus:
    """The texts of rows; without a query the document takes its place."""
    documents = list(dict.fromkeys(example.document for example in examples))
    place = {text: i for i, text in enumerate(documents)}
    relevant: dict[str, set[int]] = {}  # a query may have several documents
    for example in examples:
        query = example.document if example.query is None else example.query
        relevant.setdefault(query, set()).add(place[example.document])
    return Corpus(queries=list(relevant), documents=documents, relevant=list(relevant.values()))


def candidates(corpus: Corpus) -> str:
    """What recall depends on besides the model, and of texts alone what it says; one sentence."""
    n, queries = len(corpus.documents), len(corpus.queries)
    few = f"; a single query is {1 / queries:.3f} of recall" if queries < FEW else ""
    alone = (
        "; each text searches another sample of itself, so that 1 says that the samples of a text "
        "agree, not that texts of one meaning are found"
    )
    return (
        f"retrieval is among {n} candidates (by chance recall@1 is {1 / n:.3f}): with more of them "
        f"it is lower{few}{alone if corpus.queries == corpus.documents else ''}"
    )


def sampling_of(config: GraceConfig) -> dict[str, Any]:
    """How a run writes held-out rationales, for `read_out`; the budget is the encoder's."""
    return {
        "temperature": config.evaluation.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.train.seed,
    }


def read_out(
    encoder: GraceEncoder, corpus: Corpus, *, seed: int = 0, **how: Any
) -> tuple[Encoded, Encoded]:
    """Queries and documents, encoded alike; a text that is both is written about twice.

    Args:
        encoder: see `GraceEncoder`.
        corpus: what is searched.
        seed: of the samples, which depend on it, on the side and on the text alone.
        how: the other options of `GraceEncoder.encode`; generate=False embeds texts alone.  What
            was cut stands among the `measures`.

    Raises:
        ValueError: as `GraceEncoder.encode`.
    """
    sides = (corpus.queries, corpus.documents)
    queries, documents = (
        encoder.encode(texts, seed=request_seed(seed, EVAL_STEP, side), warn=False, **how)
        for side, texts in enumerate(sides)
    )
    return queries, documents


def measures(corpus: Corpus, queries: Encoded, documents: Encoded) -> dict[str, float]:
    """Retrieval, the spread of the documents' vectors and, of rationales, variety and length.

    Recall alone hides a collapse: anisotropy is the mean cosine of two documents (of one alone
    there is none), distinct_share the share of different rationales among theirs.  Texts that
    search themselves without a rationale have no retrieval: each is its own nearest.

    Raises:
        ValueError: vectors that are not finite.
    """
    found: dict[str, float] = {}
    if documents.lengths or corpus.queries != corpus.documents:
        all_found = retrieval_metrics(queries.vectors, documents.vectors, corpus.relevant)
        found |= {name: all_found[name] for name in RETRIEVAL}
    cut = queries.num_prompts_truncated + documents.num_prompts_truncated
    found["prompts_truncated"] = float(cut)
    if len(documents) > 1:
        found["anisotropy"] = anisotropy(documents.vectors)
    if documents.lengths:
        lengths = [*queries.lengths, *documents.lengths]
        found["distinct_share"] = distinct_share(documents.rationales)
        found["mean_length"] = sum(lengths) / len(lengths)
        found["clipped_ratio"] = (queries.num_truncated + documents.num_truncated) / len(lengths)
    return found
