"""The demo's world: two sides without a common telling word, held-out pairs, one seed."""

import json
import random
from itertools import combinations

import pytest

from tercet.engine.demo.world import TOPICS, World, write_triples

SIDES = ("query", "document")


def words_of(text: str) -> set[str]:
    return set(text.split())


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3)


def test_no_word_belongs_to_two_lists():
    words = [w for t in TOPICS for w in (*t.names, *t.query, *t.document)]
    assert len(TOPICS) == 40
    assert len(words) == len(set(words)) == 40 * 13
    assert all((len(t.names), len(t.query), len(t.document)) == (3, 5, 5) for t in TOPICS)


def test_neutral_words_name_no_topic(world):
    topic_words = {w for t in TOPICS for w in (*t.names, *t.query, *t.document)}
    rng = random.Random(0)
    for _ in range(500):
        topic, side = rng.randrange(40), rng.choice(SIDES)
        own = set(getattr(TOPICS[topic], side))
        found = words_of(world.train_text(topic, side, rng)) & topic_words
        assert len(found) == 2
        assert found <= own
    vague = world.rationale(0, rng, p_vague=1.0)
    assert not words_of(vague) & topic_words


def test_query_and_positive_share_only_neutral_words(world):
    for row in world.triples(200):
        own = TOPICS[row.topic]
        shared = words_of(row.query) & words_of(row.positive)
        assert not shared & {*own.query, *own.document, *own.names}
        assert row.negative_topic != row.topic
        assert len(words_of(row.negative) & set(TOPICS[row.negative_topic].document)) == 2


def test_held_out_pairs_are_never_trained_on(world):
    for topic, words in enumerate(TOPICS):
        for side in SIDES:
            train = {frozenset(p) for p in world.train_pairs[topic, side]}
            held_out = {frozenset(p) for p in world.held_out_pairs[topic, side]}
            every = {frozenset(p) for p in combinations(getattr(words, side), 2)}
            assert not train & held_out
            assert train | held_out == every
            for word in getattr(words, side):  # each word is learnt, each word is asked
                assert sum(word in p for p in train) == sum(word in p for p in held_out) == 2
    pairs = {frozenset(p) for pairs in world.held_out_pairs.values() for p in pairs}
    content = {w for t in TOPICS for w in (*t.query, *t.document)}
    for row in world.triples(300):
        for text in (row.query, row.positive, row.negative):
            assert frozenset(words_of(text) & content) not in pairs


def test_held_out_texts_are_five_per_topic_and_side(world):
    texts = world.held_out()
    assert [t.side for t in texts] == ["query"] * 200 + ["document"] * 200
    assert [t.topic for t in texts[:200]] == [k for k in range(40) for _ in range(5)]
    assert len({t.text for t in texts}) == 400
    for text in texts:
        pairs = [set(pair) for pair in world.held_out_pairs[text.topic, text.side]]
        own = set(getattr(TOPICS[text.topic], text.side))
        assert words_of(text.text) & own in pairs


def test_held_out_triples_are_one_per_topic(world):
    rows, texts = world.held_out_triples(), {t.text: t for t in world.held_out()}
    assert [row.topic for row in rows] == list(range(40))
    for row in rows:
        query, positive, negative = (texts[t] for t in (row.query, row.positive, row.negative))
        assert query.topic == positive.topic == row.topic != negative.topic
        assert (query.side, positive.side, negative.side) == ("query", "document", "document")


def test_one_seed_gives_one_world():
    a, b, other = World(seed=1), World(seed=1), World(seed=2)
    assert a.held_out() == b.held_out() != other.held_out()
    assert a.triples(50) == b.triples(50) != other.triples(50)
    assert len({row.positive for row in a.triples(8000)}) == 8000  # about 7 would be drawn twice
    assert a.triples(60)[:50] == a.triples(50)  # a longer run starts as a shorter one


def test_rationales_name_at_most_one_topic(world):
    rng = random.Random(0)
    right = [world.topics_named(world.rationale(7, rng, p_vague=0.0)) for _ in range(50)]
    assert right == [{7}] * 50
    noisy = [
        world.topics_named(world.rationale(7, rng, p_vague=0.5, p_right=0.6)) for _ in range(2000)
    ]
    assert max(len(named) for named in noisy) == 1
    assert sum(not named for named in noisy) / 2000 == pytest.approx(0.5, abs=0.05)
    assert sum(named == {7} for named in noisy) / 2000 == pytest.approx(0.305, abs=0.05)


def test_topics_named_reads_words_and_not_parts_of_words(world):
    bread = next(k for k, t in enumerate(TOPICS) if "bread" in t.names)
    law = next(k for k, t in enumerate(TOPICS) if "law" in t.names)
    assert world.topics_named("<think>surely</think>it is about bread") == {bread}
    assert world.topics_named("it is about flaw lawn breadth") == set()
    assert world.topics_named("it is about law bread") == {law, bread}


def test_triples_are_written_whole(tmp_path, world):
    path = tmp_path / "data" / "train.jsonl"
    rows = world.triples(5)
    write_triples(path, rows)
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert read == [
        {"query": r.query, "positive": r.positive, "negative": r.negative} for r in rows
    ]
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"]
