"""Results as JSON lines on disk: one line per side of a case."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from machine import ROOT

RESULTS = ROOT / "bench" / "results"
KEY = ("op", "case", "side", "machine")  # a newer line with the same key replaces the older one


def results_file(op: str) -> Path:
    return RESULTS / f"{op}.jsonl"


def shown(out: Path) -> str:
    """The path as a person in the current folder would write it."""
    return str(out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out)


def read(out: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none when there is no file."""
    return [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []


def _write(lines: Iterable[Mapping[str, Any]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".tmp")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part.replace(out)


def emit(line: Mapping[str, Any], out: Path) -> None:
    """Adds a JSON line to `out`, in place of an older one with the same key."""
    kept = [old for old in read(out) if any(old.get(k) != line.get(k) for k in KEY)]
    _write([*kept, line], out)


def emit_case(lines: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Adds the lines of one case to `out`, in place of all older ones of the case and machine."""
    lines = list(lines)
    key = KEY[0], KEY[1], KEY[3]
    cases = {tuple(line[k] for k in key) for line in lines}
    kept = [old for old in read(out) if tuple(old.get(k) for k in key) not in cases]
    _write([*kept, *lines], out)


def drop_other_cases(ran: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Removes from `out` what this machine measured of the same ops in cases that did not run."""
    cases: dict[tuple[str, str], set[str]] = {}
    for line in ran:
        cases.setdefault((line["op"], line["machine"]), set()).add(line["case"])
    lines = read(out)
    keep = [x for x in lines if x["case"] in cases.get((x["op"], x["machine"]), {x["case"]})]
    if len(keep) < len(lines):
        _write(keep, out)
