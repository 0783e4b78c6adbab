"""A small English world: forty topics whose questions and statements share no telling word.

A text is a plain sentence that holds two words of one topic.  Queries and documents draw theirs
from different lists, so words alone cannot bring them together; a rationale that names the topic
can.  Each list of five words gives ten pairs, laid out as two five-cycles: five pairs for
training, five held out, every word twice in each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

Side = Literal["query", "document"]

# Neutral words, shared by both sides.  "{a}" and "{b}" take the two topic words.
_WHO = (
    "grandma",
    "grandpa",
    "father",
    "mother",
    "uncle",
    "maria",
    "peter",
    "anna",
    "tom",
    "ruth",
    "someone",
    "everyone",
)
_WHERE = ("near", "behind", "beside", "under", "beyond", "without", "before", "after")
_WHICH = ("old", "new", "small", "broken", "second", "other", "strange", "good")
_WHEN = ("once", "often", "finally", "sometimes", "again", "later", "quietly", "suddenly")
_DID = ("left", "found", "wanted", "showed", "kept", "moved", "carried", "forgot")
_DO = ("leave", "find", "want", "show", "keep", "move", "carry", "forget")
_TEMPLATES: dict[Side, tuple[str, ...]] = {
    "query": (
        "did {who} {do} the {which} {a} {where} the {b} ?",
        "why should {who} {do} the {a} {where} this {b} ?",
        "would {who} {do} the {a} {where} that {which} {b} ?",
        "can {who} {do} this {a} and that {which} {b} ?",
    ),
    "document": (
        "{when} {who} {did} the {a} {where} the {which} {b} .",
        "{who} {did} this {which} {a} {where} the {b} .",
        "{who} {when} {did} the {a} {where} that {b} .",
        "the {which} {a} and that {b} {when} helped {who} .",
    ),
}
_SURE = ("clearly", "plainly", "surely", "certainly")
_UNSURE = "perhaps"
_VAGUE = (
    "this and that",
    "something or other",
    "many things",
    "daily life",
    "nothing much",
    "whatever comes along",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """The three name words of a topic and the five words that each side may use."""

    names: tuple[str, ...]
    query: tuple[str, ...]
    document: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One sentence with the topic it is about."""

    text: str
    topic: int
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Triple:
    """One row of GRACE's supervised data, with the topics of its positive and its negative."""

    query: str
    positive: str
    negative: str
    topic: int
    negative_topic: int


def _topics() -> tuple[Topic, ...]:
    lines = Path(__file__).with_name("topics.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("|") for line in lines if not line.startswith("#")]
    return tuple(
        Topic(names=tuple(n.split()), query=tuple(q.split()), document=tuple(d.split()))
        for n, q, d in rows
    )


TOPICS = _topics()


def _two_cycles(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The ten pairs of five words as a pentagon and its pentagram."""
    ring, star = [*words, words[0]], [words[i % 5] for i in (0, 2, 4, 1, 3, 0)]
    return list(pairwise(ring)), list(pairwise(star))


class World:
    """Sentences, rationales and data rows, all drawn from one seed."""

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(f"world {seed}")
        self.seed = seed
        self.topics = TOPICS
        self.train_pairs: dict[tuple[int, Side], list[tuple[str, str]]] = {}
        self.held_out_pairs: dict[tuple[int, Side], list[tuple[str, str]]] = {}
        sides: tuple[Side, Side] = ("query", "document")
        for topic, words in enumerate(self.topics):
            for side in sides:
                order = list(words.query if side == "query" else words.document)
                rng.shuffle(order)
                train, held_out = _two_cycles(order)
                self.train_pairs[topic, side] = train
                self.held_out_pairs[topic, side] = held_out
        self._topic_of_name = {n: k for k, t in enumerate(self.topics) for n in t.names}

    def sentence(self, pair: tuple[str, str], side: Side, rng: random.Random) -> str:
        """A sentence of this side that holds the two words, in either order."""
        a, b = rng.sample(pair, 2)
        return rng.choice(_TEMPLATES[side]).format(
            a=a,
            b=b,
            who=rng.choice(_WHO),
            where=rng.choice(_WHERE),
            which=rng.choice(_WHICH),
            when=rng.choice(_WHEN),
            did=rng.choice(_DID),
            do=rng.choice(_DO),
        )

    def train_text(self, topic: int, side: Side, rng: random.Random) -> str:
        """A sentence with a training pair of the topic."""
        return self.sentence(rng.choice(self.train_pairs[topic, side]), side, rng)

    def held_out(self) -> list[Text]:
        """Queries, then documents, one for each held-out pair; the same for the same seed."""
        rng = random.Random(f"held-out {self.seed}")
        return [
            Text(text=self.sentence(pair, side, rng), topic=topic, side=side)
            for side in ("query", "document")
            for topic in range(len(self.topics))
            for pair in self.held_out_pairs[topic, side]
        ]

    def rationale(
        self, topic: int, rng: random.Random, *, p_vague: float, p_right: float = 1.0
    ) -> str:
        """What the untrained writer says of a text about `topic`.

        Args:
            p_vague: chance of a phrase that fits every text.
            p_right: else, chance that the topic named is the right one and not any of the forty.
        """
        if rng.random() < p_vague:
            return f"<think> {_UNSURE} </think> it is about {rng.choice(_VAGUE)}"
        if rng.random() >= p_right:
            topic = rng.randrange(len(self.topics))
        words = rng.sample(self.topics[topic].names, rng.randint(2, 3))
        return f"<think> {rng.choice(_SURE)} </think> it is about {' '.join(words)}"

    def triples(self, count: int) -> list[Triple]:
        """Training rows {query, positive, negative}: no document twice, negatives off the topic."""
        rng = random.Random(f"triples {self.seed}")
        rows: dict[str, Triple] = {}
        while len(rows) < count:
            topic, other = rng.sample(range(len(self.topics)), 2)
            row = Triple(
                query=self.train_text(topic, "query", rng),
                positive=self.train_text(topic, "document", rng),
                negative=self.train_text(other, "document", rng),
                topic=topic,
                negative_topic=other,
            )
            rows.setdefault(row.positive, row)
        return list(rows.values())

    def held_out_triples(self) -> list[Triple]:
        """One row per topic, of its first held-out query and document: recall@1 is by topic."""
        texts = self.held_out()
        first = {(t.topic, t.side): t.text for t in reversed(texts)}
        count = len(self.topics)
        return [
            Triple(
                query=first[k, "query"],
                positive=first[k, "document"],
                negative=first[(k + 1) % count, "document"],
                topic=k,
                negative_topic=(k + 1) % count,
            )
            for k in range(count)
        ]

    def topics_named(self, rationale: str) -> set[int]:
        """Topics whose name words occur in the rationale."""
        words = rationale.replace("<", " <").replace(">", "> ").split()
        return {self._topic_of_name[w] for w in words if w in self._topic_of_name}

    def corpus(self) -> list[str]:
        """Every word of the world at least once: what the tokenizer is trained on."""
        lines = [" ".join((*t.names, *t.query, *t.document)) for t in self.topics]
        lines += [t for templates in _TEMPLATES.values() for t in templates]
        lines += [" ".join(w) for w in (_WHO, _WHERE, _WHICH, _WHEN, _DID, _DO, _SURE, _VAGUE)]
        lines += [_UNSURE, "it is about"]
        return [line.format_map(_Blank()) for line in lines]


class _Blank(dict[str, str]):
    """Leaves the slots of a template empty."""

    def __missing__(self, key: str) -> str:
        return ""


def write_triples(path: Path, rows: Sequence[Triple]) -> None:
    """Writes the rows as JSONL with the columns query, positive and negative."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"query": r.query, "positive": r.positive, "negative": r.negative}) for r in rows
    ]
    partial = path.with_suffix(".tmp")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.rename(path)
