"""The demo's figures on vectors and rationales whose figures are known."""

import pytest
import torch

from tercet.engine.demo.measure import names_topic, spread
from tercet.engine.demo.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


def test_a_vector_per_topic_finds_everything(world):
    texts = world.held_out()
    found = spread(torch.eye(40)[[t.topic for t in texts]], texts)
    assert found["topic_hit_at_1"] == 1.0
    assert found["mean_cosine"] == pytest.approx(40 * 5 * 4 / (200 * 199))  # within topics: 1


def test_one_vector_for_all_finds_nothing(world):
    texts = world.held_out()
    assert spread(torch.ones(400, 8), texts) == pytest.approx(
        {"topic_hit_at_1": 0.0, "mean_cosine": 1.0}
    )


def test_half_of_the_topics_swapped_is_half_of_the_queries(world):
    texts = world.held_out()
    vectors = torch.eye(40)[[t.topic for t in texts]]
    for i, text in enumerate(texts):
        if text.side == "query" and text.topic < 20:
            vectors[i] = torch.eye(40)[(text.topic + 1) % 20]
    assert spread(vectors, texts)["topic_hit_at_1"] == 0.5


def test_only_the_right_topic_and_no_other_counts(world):
    texts = world.held_out()[:5]  # all of topic 0
    right, wrong = world.topics[0].names[0], world.topics[1].names[0]
    written = [
        f"it is about {w}" for w in (right, f"{right} {right}", f"{right} {wrong}", wrong, "")
    ]
    assert names_topic(world, texts, written) == 2 / 5
