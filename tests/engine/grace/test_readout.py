"""What is measured of queries and documents, whoever asks."""

import pytest
import torch

from tercet.engine.grace.config import GraceConfig, GraceData, GraceEval
from tercet.engine.grace.data import Example
from tercet.engine.grace.encoder import Encoded, GraceEncoder
from tercet.engine.grace.readout import Corpus, corpus_of, measures, read_out, sampling_of
from tercet.engine.train_config import TrainConfig

TEXTS = ["a red boat on the river", "roses in the garden", "warm bread"]


def test_a_text_stands_once_on_each_side():
    rows = [("q", "a"), ("p", "b"), ("q", "b"), ("q", "a")]
    corpus = corpus_of([Example(query=q, document=d) for q, d in rows])
    assert corpus == Corpus(queries=["q", "p"], documents=["a", "b"], relevant=[{0, 1}, {1}])
    alone = corpus_of([Example(document=d) for d in ("a", "b", "a")])
    assert alone == Corpus(queries=["a", "b"], documents=["a", "b"], relevant=[{0}, {1}])


def test_a_text_on_both_sides_is_written_about_twice(tiny_policy):
    encoder = GraceEncoder(tiny_policy, max_completion_length=8)
    corpus = corpus_of([Example(document=text) for text in TEXTS])
    queries, documents = read_out(encoder, corpus, temperature=1.0, seed=2)
    assert all(a != b for a, b in zip(queries.rationales, documents.rationales, strict=True))
    again = read_out(encoder, corpus, temperature=1.0, seed=2)
    assert [side.rationales for side in again] == [queries.rationales, documents.rationales]
    other, _ = read_out(encoder, corpus, temperature=1.0, seed=3)
    assert other.rationales != queries.rationales


def test_held_out_rationales_are_written_as_the_run_writes():
    config = GraceConfig(
        model="m",
        data=GraceData(path="d.jsonl"),
        evaluation=GraceEval(temperature=0.3),
        train=TrainConfig(seed=7),
        temperature=0.9,
        top_p=0.8,
        top_k=5,
    )
    assert sampling_of(config) == {"temperature": 0.3, "top_p": 0.8, "top_k": 5, "seed": 7}


def test_measures_by_hand():
    corpus = Corpus(queries=["q", "r"], documents=["a", "b"], relevant=[{0}, {1}])
    queries = Encoded(
        vectors=torch.tensor([[1.0, 0.0], [1.0, 0.1]]),
        rationales=["x", "y"],
        lengths=[3, 4],
        num_truncated=1,
        num_prompts_truncated=2,
    )
    documents = Encoded(
        vectors=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        rationales=["z", "z"],
        lengths=[6, 7],
        num_truncated=2,
    )
    assert measures(corpus, queries, documents) == pytest.approx(
        {
            "recall@1": 0.5,
            "recall@10": 1.0,
            "ndcg@10": (1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 2,
            "mrr": 0.75,
            "prompts_truncated": 2.0,
            "anisotropy": 0.0,
            "distinct_share": 0.5,
            "mean_length": 5.0,
            "clipped_ratio": 0.75,
        }
    )


def test_texts_alone_do_not_search_themselves_and_one_has_no_spread():
    texts = Encoded(vectors=torch.eye(2), rationales=["", ""], lengths=[])
    same = Corpus(queries=["a", "b"], documents=["a", "b"], relevant=[{0}, {1}])
    assert measures(same, texts, texts) == {
        "prompts_truncated": 0.0,
        "anisotropy": 0.0,
    }
    one = Corpus(queries=["q", "r"], documents=["a"], relevant=[{0}, {0}])
    document = Encoded(vectors=torch.eye(2)[:1], rationales=[""], lengths=[])
    assert measures(one, texts, document)["recall@1"] == 1.0
    assert "anisotropy" not in measures(one, texts, document)
