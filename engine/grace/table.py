"""Rows of a retrieval table: BM25, and an encoder read out with and without rationales."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.evaluate import mean_and_spread, score_metrics
from tercet.engine.grace.readout import Corpus, measures, read_out
from tercet.kernels._typing import Float

WORD = re.compile(r"[A-Za-z][A-Za-z'’]+|\d[\d.,/]*\d|\d")  # two letters or more, or a number


def encoder_row(encoder: GraceEncoder, corpus: Corpus, **how: Any) -> dict[str, float]:
    """`measures` of an encoder on a corpus, and how much its rationales copy.

    words_in_text and words_in_partner are the share of a rationale's words that its text has, and
    that the text it belongs to has.

    Args:
        encoder: see `GraceEncoder`.
        corpus: what is searched.
        how: of `read_out`; generate=False is the untrained literature's "base" row.
    """
    queries, documents = read_out(encoder, corpus, **how)
    row = measures(corpus, queries, documents)
    if documents.lengths:
        rationales = [*queries.rationales, *documents.rationales]
        row["words_in_text"] = word_overlap(rationales, [*corpus.queries, *corpus.documents])
        row["words_in_partner"] = word_overlap(rationales, _partners(corpus))
    return row


def _partners(corpus: Corpus) -> list[str]:
    """What belongs to each query and to each document, as one text."""
    documents = [[corpus.documents[j] for j in found] for found in corpus.relevant]
    queries: list[list[str]] = [[] for _ in corpus.documents]
    for query, found in zip(corpus.queries, corpus.relevant, strict=True):
        for j in found:
            queries[j].append(query)
    return [" ".join(texts) for texts in (*documents, *queries)]


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
