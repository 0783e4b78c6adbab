"""One self-contained HTML page about a run, or about several runs side by side."""

from __future__ import annotations

import html
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tercet.engine.command_line import OneLineParser
from tercet.engine.environment import short_commit
from tercet.engine.files import check_output, replace_text
from tercet.engine.glossary import MEANINGS, general
from tercet.engine.report_charts import charts_html, metrics_of, short
from tercet.engine.report_runs import (
    DEPTH,
    LARGEST,
    ResultTable,
    Run,
    is_number,
    load_run,
    load_tables,
    step_of,
)

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5c6876; --line: #dfe4ea; --wash: #f6f8fa; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 1240px;
  padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; } code { font-size: .9em; }
.note { color: var(--soft); margin: .2rem 0; font-size: .88rem; max-width: 60rem; }
.notes { columns: 2 27rem; margin-top: .5rem; }
.warn { background: #fff6e5; border: 1px solid #f0d9a8; border-radius: 8px;
  padding: .4rem .8rem; margin: .4rem 0; font-size: .88rem; }
.legend { position: sticky; top: 0; background: #fffd; padding: .5rem 0; margin: 0; z-index: 1;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
.legend i { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr));
  gap: .75rem; margin-top: .4rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .5rem .6rem .2rem;
  display: flex; flex-direction: column; justify-content: space-between; }
figcaption { font-size: .84rem; display: flex; flex-wrap: wrap; gap: 0 .6rem; }
figcaption > span { margin-right: auto; overflow-wrap: anywhere; }
figcaption div { display: flex; flex-wrap: wrap; gap: 0 .6rem; margin-left: auto; }
figcaption b { font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; min-width: 50%; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--soft); font-weight: 600; }
th.n, td.n { text-align: right; } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { min-width: 11rem; max-width: 36rem; } .samples { font-size: .78rem; }
.samples td.t { min-width: 8.5rem; max-width: 22rem; }
.samples th, .samples td { padding: .3rem .35rem; }
pre { background: var(--wash); padding: .8rem; border-radius: 8px; overflow-x: auto;
  font-size: .8rem; } details { margin: .5rem 0; }
details > summary { cursor: pointer; color: var(--soft); }
dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0; }
"""
LONG = 24  # characters; a longer text gets a column of some width
FIRST = ("reward/mean", "entropy", "loss", "cosine/positive", "cosine/others")  # behind eval/
SAMPLES = 6  # shown of a step


def cell(value: object, digits: str = ".4g") -> str:
    """A table cell; numbers are aligned and shortened, None is a dash."""
    if value is None:
        return '<td class="n">-</td>'
    if is_number(value) and (isinstance(value, float) or abs(value) < LARGEST):
        return f'<td class="n">{value:{digits if isinstance(value, float) else ".4g"}}</td>'
    text = str(value)
    return f"<td{' class=t' if len(text) > LONG else ''}>{html.escape(text)}</td>"


def head_cell(column: str, rows: Sequence[dict]) -> str:
    """A column's head, aligned as its values are."""
    values = [row[column] for row in rows if row.get(column) is not None]
    numbers = all(is_number(value) for value in values)
    return f"<th{' class=n' if numbers else ''}>{html.escape(column)}</th>"


def table(rows: Sequence[dict], kind: str = "", digits: str = ".4g") -> str:
    """Records as a table; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(head_cell(column, rows) for column in columns)
    lines = ["".join(cell(row.get(c, ""), digits) for c in columns) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide {kind}"><table>{inside}</table></div>'


def results_html(found: ResultTable) -> str:
    """A table of finished figures and what its columns mean."""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in found.notes)
    rows = table(found.rows, digits=".3f") if found.rows else "<p>No rows.</p>"
    return f'<h2>{html.escape(found.title)}</h2>{rows}<div class="notes">{notes}</div>'


def last_values(runs: Sequence[Run]) -> str:
    """First and last value of the metrics that people ask for first, one column per run."""
    found = metrics_of(runs)
    keys = [key for key in found if key.startswith("eval/")] + [k for k in FIRST if k in found]
    shown = [run for run in runs if any(run.points(key) for key in keys)]
    rows = [
        {"metric": key}
        | {run.name: _first_and_last(run, key) for run in shown}
        | {"what it is": MEANINGS.get(general(key), "")}
        for key in keys
    ]
    return table(rows) if rows else "<p>No metrics yet.</p>"


def _first_and_last(run: Run, key: str) -> str:
    points = run.points(key)
    return f"{short(points[0][1])} → {short(points[-1][1])}" if points else "-"


def samples_html(run: Run) -> str:
    """Samples of the first and of the last step that wrote some."""
    if not run.samples:
        return '<p class="note">No samples were written.</p>'
    steps = sorted({step_of(row, Path(run.name)) for row in run.samples})
    parts = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        rows = [
            {key.removeprefix("reward/"): value for key, value in row.items() if key != "step"}
            for row in run.samples
            if row.get("step", 0) == step
        ]
        shown = table(_without_repeats(rows[:SAMPLES]), "samples")
        parts.append(f"<h3>Step {html.escape(str(step))}</h3>{shown}")
    return "".join(parts)


def _without_repeats(rows: Sequence[dict]) -> list[dict]:
    """The rows with a ditto mark for a long text that stands in the row above as well."""
    return [
        {
            key: "″" if isinstance(value, str) and len(value) > LONG and value == above.get(key)
            else value
            for key, value in row.items()
        }
        for above, row in zip([{}, *rows], rows, strict=False)
    ]  # fmt: skip


def meanings_html(runs: Sequence[Run]) -> str:
    """What the metrics of these runs mean."""
    names = {general(key) for run in runs for key in run.metrics}
    listed = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>"
        for name, meaning in MEANINGS.items()
        if name in names
    )
    return f"<details><summary>What all metrics mean</summary><dl>{listed}</dl></details>"


def run_html(run: Run) -> str:
    """What concerns one run: what was told, samples, settings, machine."""
    events = "".join(
        f'<div class="{"warn" if event.get("kind") == "warning" else "note"}">'
        f"step {html.escape(str(event.get('step', '?')))}: "
        f"{html.escape(str(event.get('message', event)))}</div>"
        for event in run.events
    )
    env = json.dumps(run.env, indent=2, ensure_ascii=False)
    return (
        f"<h2>{html.escape(run.name)}</h2>{events}{samples_html(run)}"
        f"<details><summary>Settings</summary><pre>{html.escape(run.config)}</pre></details>"
        f"<details><summary>Machine and versions</summary><pre>{html.escape(env)}</pre></details>"
    )


def _lead(runs: Sequence[Run]) -> str:
    """How much there is to see, and on which machines and commits it was made."""
    steps = [max(series) for run in runs for series in run.metrics.values() if series]
    facts = [f"{len(runs)} run{'s' * (len(runs) > 1)}, {max(steps, default=0)} steps"]
    envs = [run.env for run in runs]
    machines = dict.fromkeys(str(env["cpu"]) for env in envs if env.get("cpu"))
    commits = dict.fromkeys(short_commit(str(env["commit"])) for env in envs if env.get("commit"))
    facts += [", ".join(machines)] if machines else []
    facts += [f"commit {', '.join(commits)}"] if commits else []
    return "; ".join(facts)


def render(title: str, runs: Sequence[Run], tables: Sequence[ResultTable] = ()) -> str:
    """The whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(_lead(runs))}</p>'
        f"{''.join(map(results_html, tables))}"
        f"<h2>Where training began and where it ended</h2>{last_values(runs)}{meanings_html(runs)}"
        '<h2>Curves</h2><p class="note">Over training steps; beside each name stands the last '
        f"value.</p>{charts_html(runs)}{''.join(map(run_html, runs))}</body></html>"
    )


def _runs_in(folder: Path) -> list[tuple[Path, Run]]:
    """The runs that a folder is or holds, in the order in which they were started."""
    found = [(path, load_run(path)) for path in _run_folders(folder)]
    return sorted(found, key=lambda each: str(each[1].env.get("started", "")))


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """Each path's shortest end that no other path has; half characters in it are escaped."""
    ends = {
        path: [str(Path(*path.parts[-n:])) for n in range(1, len(path.parts) + 1)] for path in paths
    }
    count = Counter(end for each in ends.values() for end in each)
    shortest = {path: next(e for e in each if count[e] == 1) for path, each in ends.items()}
    return {
        path: end.encode("utf-8", "backslashreplace").decode() for path, end in shortest.items()
    }


def _labels(folder: Path, tables: Iterable[ResultTable], paths: Iterable[Path]) -> dict[Path, str]:
    """What the first column of a folder's tables calls its runs, where a column "run" names them.

    It names a run by its place in the folder, or else all runs of one name there.
    """
    rows = [row for found in tables for row in found.rows if row.get("run")]
    named = {str(row["run"]): str(next(iter(row.values()))) for row in rows}
    labels = {}
    for path in paths:
        if path.is_relative_to(folder):
            place = path.relative_to(folder).as_posix()
            label = named.get(place, named.get(path.name, path.name))
            if label not in (place, path.name):
                labels[path] = label
    return labels


def _run_folders(folder: Path) -> list[Path]:
    """The folder when it is a run, or else the runs up to DEPTH folders below it."""
    if (folder / "metrics.jsonl").exists():
        return [folder]
    patterns = ["*/" * depth + "metrics.jsonl" for depth in range(1, DEPTH + 1)]
    found = {path.parent for pattern in patterns for path in folder.glob(pattern)}
    return sorted(run for run in found if found.isdisjoint(run.parents)) or [folder]


def default_page(*folders: str | Path) -> Path:
    """Where `write_report` writes when nobody says where."""
    common = os.path.commonpath([Path(folder).resolve() for folder in folders])
    return Path(os.path.relpath(common)) / "report.html"


def write_report(*folders: str | Path, output: str | Path | None = None) -> Path:
    """Writes one page about all runs that the folders are or hold; returns its path.

    Runs are looked for up to DEPTH folders deep, those inside a run excepted; those of one folder
    stand in the order in which they were started.  A folder's tables.json, if there is one, stands
    at the page's top (see `load_tables`), and a run that its column "run" names, by place or by
    name, is called what the table's first column calls it.  Runs of one name are told apart by the
    folders they lie in.

    Args:
        folders: at least one.
        output: default: report.html in the folder, or in the one that holds all folders.

    Raises:
        FileNotFoundError: a folder neither is a run nor holds one; no folder for output.
        ValueError: as `load_run` and `load_tables`; output is there and no file.
    """
    if output:
        check_output(Path(output), "report: the page")
    found = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    by_path = dict(each for folder in found for each in _runs_in(folder))
    target = Path(output) if output else default_page(*folders)
    tables, labels = [], {}
    for folder in found:
        tables += (own := load_tables(folder))
        labels |= _labels(folder, own, by_path)
    names = _names(by_path)
    names |= {path: f"{label} ({names[path]})" for path, label in labels.items()}
    runs = [replace(run, name=names[path]) for path, run in by_path.items()]
    replace_text(target, render(", ".join(folder.name for folder in found), runs, tables))
    return target


def main(argv: list[str], prog: str) -> int:
    """Writes the page and says where, and whether it took the place of another file."""
    parser = OneLineParser(prog=prog, description=__doc__)
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("--output", help="default: report.html where the runs are")
    args = parser.parse_args(argv)
    page = Path(args.output) if args.output else default_page(*args.run)
    before = " (in place of the file of that name)" if page.exists() else ""
    sys.stdout.write(f"wrote {write_report(*args.run, output=args.output)}{before}\n")
    return 0
