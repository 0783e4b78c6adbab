"""Rows of the retrieval table."""

import pytest
import torch

from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.evaluate import anisotropy, retrieval_metrics
from tercet.engine.grace.readout import RETRIEVAL, Corpus
from tercet.engine.grace.table import (
    _partners,
    bm25_row,
    bm25_scores,
    encoder_row,
    markdown_table,
    word_overlap,
)

DOCUMENTS = ["a red boat on the river", "roses in the garden", "warm bread in the kitchen"]
QUERIES = ["red boat ?", "garden of roses ?", "who eats bread ?"]
CORPUS = Corpus(queries=QUERIES, documents=DOCUMENTS, relevant=[{0}, {1}, {2}])


def test_bm25_finds_the_document_that_shares_words():
    scores = bm25_scores(["bread", "red garden", "nothing known"], DOCUMENTS)
    assert scores.shape == (3, 3)
    assert (scores > 0).tolist() == [[False, False, True], [True, True, False], [False] * 3]
    assert bm25_row(CORPUS)["recall@1"] == 1.0
    with pytest.raises(ValueError, match="got 1 and 0"):
        bm25_scores(["bread"], [])


def test_bm25_prefers_rare_words():
    documents = ["cat dog", "cat bird", "cat fish"]
    assert bm25_scores(["cat bird"], documents).argmax().item() == 1


def test_a_row_is_the_metrics_of_the_vectors(tiny_policy):
    encoder = GraceEncoder(tiny_policy, max_prompt_length=64, system_prompt="Read.")
    row = encoder_row(encoder, CORPUS, generate=False)
    queries = encoder.encode(CORPUS.queries, generate=False).vectors
    documents = encoder.encode(DOCUMENTS, generate=False).vectors
    expected = retrieval_metrics(queries, documents, torch.arange(3))
    assert {key: row[key] for key in RETRIEVAL} == pytest.approx(
        {key: expected[key] for key in RETRIEVAL}
    )
    assert row["anisotropy"] == pytest.approx(anisotropy(documents))
    assert "distinct_share" not in row
    written = encoder_row(encoder, CORPUS, max_completion_length=1)
    assert 0 < written["distinct_share"] <= 1
    assert written["clipped_ratio"] > 0


def test_everything_that_belongs_to_a_text_is_its_partner():
    corpus = Corpus(
        queries=["red boat", "blue sea"],
        documents=["boat wood", "sea salt", "red wine"],
        relevant=[{0, 2}, {1}],
    )
    documents, queries = ["boat wood red wine", "sea salt"], ["red boat", "blue sea", "red boat"]
    assert _partners(corpus) == [*documents, *queries]


def test_word_overlap_by_hand():
    assert word_overlap(["Red boat 12 sky", ""], ["the red boat", "x"]) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="one text for each"):
        word_overlap(["a"], [])


def test_markdown_shows_mean_and_spread():
    rows = {"one": [{"a": 0.5, "b": 1.0}, {"a": 0.7, "b": 1.0}], "another": [{"a": 0.25}]}
    lines = markdown_table(rows, {"a": "A", "b": "B"}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["", "A", "B", "seeds"]
    assert set("".join(cells[1])) == {"-"}
    assert cells[2] == ["one", "0.600 ± 0.141", "1.000 ± 0.000", "2"]
    assert cells[3] == ["another", "0.250", "-", "1"]
    assert len({len(line) for line in lines}) == 1
