"""What the demo found: the record that results.json holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tercet.engine.config import ConfigError, read_record
from tercet.engine.files import read_object

MODELS = ("base", "base_reasoning", "paper", "document", "infonce")  # a reading of each
REMEDY = "delete it, and the same command measures the models anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One row of the table: shares in [0, 1] over the held-out texts; None where not applicable."""

    model: str
    topic_hit_at_1: float  # queries whose best document is of their topic
    mean_cosine: float  # of two different documents; 1 is a full collapse
    topic_hit_at_1_greedy: float | None = None  # the same with greedy rationales
    names_topic: float | None = None  # rationales that name the right topic and no other
    distinct: float | None = None  # different rationales / rationales
    truncated: float | None = None  # rationales cut off by the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the models write about one held-out text."""

    text: str
    topic: str
    base: str
    paper: str
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResults:
    """Everything the demo found; results.json of its folder."""

    folder: str
    seed: int
    pretrain_steps: int
    pretrain_accuracy: float
    readings: list[Reading]
    samples: list[Sample]
    seconds: dict[str, float] = field(default_factory=dict)  # per stage, of the last start
    environment: dict[str, object] = field(default_factory=dict)

    def reading(self, model: str) -> Reading:
        """The row of one model."""
        return next(r for r in self.readings if r.model == model)


def read_results(path: Path) -> DemoResults:
    """The results.json of a finished demo.

    Raises:
        ValueError: it is no JSON object, or not what this version of the demo writes.
    """
    data = read_object(path, "read_results", REMEDY)
    try:
        found = read_record(DemoResults, data, "results")
    except ConfigError as error:
        raise ValueError(_bad(path, f"one of another version ({str(error)[:120]})")) from error
    models = tuple(reading.model for reading in found.readings)
    if models != MODELS:
        raise ValueError(_bad(path, f"readings of {', '.join(models) or 'no model'}"))
    if "total" not in found.seconds:
        raise ValueError(_bad(path, "no seconds.total"))
    return found


def _bad(path: Path, got: str) -> str:
    return f"read_results: {path} must be what this demo writes, got {got}; {REMEDY}"
