"""Held-out figures of one model: retrieval by topic, what rationales name, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tercet.engine.demo.results import Reading
from tercet.engine.demo.world import Text, World
from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.evaluate import anisotropy, distinct_share, retrieval_metrics
from tercet.kernels._typing import Float


def read_without_rationales(model: str, encoder: GraceEncoder, texts: Sequence[Text]) -> Reading:
    """The figures of embeddings of the texts alone."""
    vectors = encoder.encode([text.text for text in texts], generate=False).vectors
    return Reading(model=model, **spread(vectors, texts))


def read_with_rationales(
    model: str, encoder: GraceEncoder, world: World, *, max_completion_length: int, repeats: int
) -> tuple[Reading, list[str]]:
    """The figures of one greedy reading and the mean of `repeats` sampled ones at temperature 1.

    Returns:
        The figures, and the rationales of the first sampled reading.
    """
    texts = world.held_out()
    sentences = [text.text for text in texts]
    how = {"max_completion_length": max_completion_length, "warn": False}  # see "truncated" below
    greedy = encoder.encode(sentences, **how)
    sampled = [
        encoder.encode(sentences, temperature=1.0, seed=seed, **how) for seed in range(repeats)
    ]
    measures = [
        {
            **spread(encoded.vectors, texts),
            "names_topic": names_topic(world, texts, encoded.rationales),
            "distinct": distinct_share(encoded.rationales),
            "truncated": encoded.num_truncated / len(encoded),
        }
        for encoded in sampled
    ]
    means = {key: sum(m[key] for m in measures) / repeats for key in measures[0]}
    at_zero = spread(greedy.vectors, texts)["topic_hit_at_1"]
    return Reading(model=model, topic_hit_at_1_greedy=at_zero, **means), sampled[0].rationales


def spread(vectors: Float[Tensor, "n hidden"], texts: Sequence[Text]) -> dict[str, float]:
    """Retrieval of documents by queries, a hit being the same topic, and the documents' cosine."""
    topic = torch.tensor([text.topic for text in texts])
    query = torch.tensor([text.side == "query" for text in texts])
    relevant = topic[query][:, None] == topic[~query][None, :]
    found = retrieval_metrics(vectors[query], vectors[~query], relevant)
    return {"topic_hit_at_1": found["hit@1"], "mean_cosine": anisotropy(vectors[~query])}


def names_topic(world: World, texts: Sequence[Text], rationales: Sequence[str]) -> float:
    """Share of rationales that name the topic of their text and no other."""
    pairs = zip(texts, rationales, strict=True)
    right = [world.topics_named(rationale) == {text.topic} for text, rationale in pairs]
    return sum(right) / len(right)
