"""Rows of a retrieval table: BM25, and an encoder read out with and without rationales."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.evaluate import (
    anisotropy,
    distinct_share,
    mean_and_spread,
    retrieval_metrics,
    score_metrics,
)
from tercet.kernels._typing import Float

WORD = re.compile(r"[A-Za-z][A-Za-z'’]+|\d[\d.,/]*\d|\d")  # two letters or more, or a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Held-out texts; document i answers query i."""

    queries: list[str]
    documents: list[str]

    @property
    def relevant(self) -> Tensor:
        """The document of each query."""
        return torch.arange(len(self.queries))


def encoder_row(encoder: GraceEncoder, corpus: Corpus, **how: Any) -> dict[str, float]:
    """Retrieval and spread of an encoder's vectors, queries and documents encoded alike.

    Recall alone hides a collapse: anisotropy is the mean cosine of two documents, distinct_share
    the share of different rationales among the documents'.  words_in_text and words_in_partner are
    the share of a rationale's words that its text has, and that the text it belongs to has.

    Args:
        encoder: see `GraceEncoder`.
        corpus: what is searched.
        how: of `GraceEncoder.encode`; generate=False is the untrained literature's "base" row.
    """
    queries = encoder.encode(corpus.queries, **how)
    documents = encoder.encode(corpus.documents, **how)
    row = retrieval_metrics(queries.vectors, documents.vectors, corpus.relevant)
    row["anisotropy"] = anisotropy(documents.vectors)
    row["prompts_truncated"] = float(
        queries.num_prompts_truncated + documents.num_prompts_truncated
    )
    if how.get("generate", True):
        row["distinct_share"] = distinct_share(documents.rationales)
        rationales = [*queries.rationales, *documents.rationales]
        texts = [*corpus.queries, *corpus.documents]
        partners = [*corpus.documents, *corpus.queries]
        row["words_in_text"] = word_overlap(rationales, texts)
        row["words_in_partner"] = word_overlap(rationales, partners)
        cut = queries.num_truncated + documents.num_truncated
        row["truncated_share"] = cut / (len(queries) + len(documents))
    return row


def word_overlap(rationales: Sequence[str], texts: Sequence[str]) -> float:
    """Mean share of a rationale's words that stand in its text; 0 for one without words.

    Raises:
        ValueError: no rationales, or not one text for each.
    """
    if not rationales or len(rationales) != len(texts):
        raise ValueError(
            "word_overlap: there must be rationales, and one text for each, "
            f"got {len(rationales)} and {len(texts)}"
        )
    shares = []
    for rationale, text in zip(rationales, texts, strict=True):
        known, words = set(_words(text)), _words(rationale)
        shares.append(sum(word in known for word in words) / max(len(words), 1))
    return sum(shares) / len(shares)


def _words(text: str) -> list[str]:
    return [word.lower() for word in WORD.findall(text)]


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> Float[Tensor, "n m"]:
    """BM25 of every query against every document (bm25s: Lucene's form, k1 1.5, b 0.75).

    Raises:
        ModuleNotFoundError: the optional dependency is not installed.
        ValueError: no queries or no documents.
    """
    if not queries or not documents:
        raise ValueError(
            "bm25_scores: there must be queries and documents, "
            f"got {len(queries)} and {len(documents)}"
        )
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "bm25_scores: bm25s must be installed, got none; pip install 'tercet[eval]'"
        ) from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    index = bm25s.BM25()
    split = {"stopwords": "en", "show_progress": False}
    index.index(bm25s.tokenize(list(documents), **split), show_progress=False)
    words = cast(list[list[str]], bm25s.tokenize(list(queries), return_ids=False, **split))
    return torch.stack([torch.from_numpy(index.get_scores(w)) for w in words]).float()


def bm25_row(corpus: Corpus) -> dict[str, float]:
    """Retrieval by shared words alone.

    Raises:
        ModuleNotFoundError, ValueError: as `bm25_scores`.
    """
    return score_metrics(bm25_scores(corpus.queries, corpus.documents), corpus.relevant)


def markdown_table(
    rows: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, str]
) -> str:
    """Rows of mean ± sample standard deviation over seeds, as Markdown.

    Args:
        rows: name -> one measurement per seed.
        columns: key of a measurement -> heading; a row without the key shows a dash.
    """
    lines = [["", *columns.values(), "seeds"]]
    for name, seeds in rows.items():
        cells = [_cell([row[key] for row in seeds if key in row]) for key in columns]
        lines.append([name, *cells, str(len(seeds))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    ruler = ["-" * width for width in widths]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [lines[0], ruler, *lines[1:]]
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"
