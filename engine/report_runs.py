"""Run folders as a report reads them; a file that cannot be used is an error with its name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from tercet.engine.config import ConfigError, read_record
from tercet.engine.files import read_jsonl

Series = dict[int, float]  # step -> value
LARGEST = 1e30  # a metric beyond it cannot be drawn
LARGEST_STEP = 2**53  # nor a step beyond it; JSON's integers have no end
DEPTH = 3  # folders below the named one that a report looks for runs in
TABLES = "tables.json"  # finished figures of a folder of runs; see `load_tables`


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says about itself."""

    name: str
    metrics: dict[str, Series]
    samples: list[dict]
    events: list[dict]
    config: str
    env: dict

    def points(self, key: str) -> list[tuple[int, float]]:
        """Steps and finite values of a metric, in the order of the steps; none without it."""
        found = sorted(self.metrics.get(key, {}).items())
        return [(step, value) for step, value in found if math.isfinite(value)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTable:
    """Figures that a folder of runs ends with."""

    title: str
    rows: list[dict[str, Any]]  # column -> text, number, or None for a dash
    notes: list[str]  # what the columns mean, one sentence each


def load_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: no metrics.jsonl in it.
        ValueError: a file that is not UTF-8, a record (or env.json) that is not an object, or a
            record whose step is not an integer.
    """
    if not (folder / "metrics.jsonl").exists():
        got = (
            f"no metrics.jsonl in it, nor {DEPTH} folders deep" if folder.is_dir() else "no folder"
        )
        raise FileNotFoundError(
            f"report: {folder} must be a run folder or hold some, got {got}; check the path"
        )
    metrics: dict[str, Series] = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        for key, value in record.items():
            if key != "step" and is_number(value) and abs(value) < LARGEST:
                metrics.setdefault(drawable(key), {})[step_of(record, folder)] = float(value)
    env = _json(folder / "env.json", dict)
    return Run(
        name=folder.name,
        metrics=metrics,
        samples=read_jsonl(folder / "samples.jsonl"),
        events=read_jsonl(folder / "events.jsonl"),
        config=_text(folder / "config.yaml"),
        env=env,
    )


def load_tables(folder: Path) -> list[ResultTable]:
    """The tables.json of a folder: objects with a title, rows and notes; none without the file.

    Raises:
        ValueError: it holds something else.
    """
    path = folder / TABLES
    return [_table(table, path) for table in _json(path, list)]


def _table(table: object, path: Path) -> ResultTable:
    try:
        if isinstance(table, dict):
            return read_record(ResultTable, table, str(path))
        why = "no object"
    except ConfigError as error:
        why = str(error).removeprefix(f"{path}: ")
    raise ValueError(
        f"report: {path} must hold objects with a title, rows (objects) and notes (texts), got "
        f"{_cut(table)} ({why[:120]}); restore or delete it"
    )


def step_of(record: dict, where: Path) -> int:
    """The step of a record, 0 without one.

    Raises:
        ValueError: it is no integer, or one beyond 2**53.
    """
    step = record.get("step", 0)
    if type(step) is not int or abs(step) > LARGEST_STEP:  # True is an int, too
        raise ValueError(
            f"report: the step of a record must be an integer, got {_cut(step)} in {where}; "
            "give it one within 2**53, or delete the line"
        )
    return step


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a table shows the value as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def drawable(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which no font can draw."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text(path: Path) -> str:
    """The text of a file that may be absent, then empty."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(
            f"report: {path} must be UTF-8, got {error}; restore or delete it"
        ) from error


def _json(path: Path, kind: type) -> Any:
    """What a JSON file holds, an empty dict or list where it is absent."""
    name = {dict: "object", list: "list"}[kind]
    text = _text(path)
    if not text:
        return kind()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"report: {path} must be a JSON {name}, got {_cut(text)} ({error}); "
            "restore or delete it"
        ) from error
    if not isinstance(found, kind):
        raise ValueError(
            f"report: {path} must be a JSON {name}, got {_cut(text)}; restore or delete it"
        )
    return found
