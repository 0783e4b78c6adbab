"""One self-contained HTML page about a run, or about several runs side by side."""

from __future__ import annotations

import html
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from tercet.engine.command_line import OneLineParser
from tercet.engine.files import read_jsonl, replace_text
from tercet.engine.glossary import MEANINGS, general

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = dict[int, float]  # step -> value

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5c6876; --line: #dfe4ea; --wash: #f6f8fa; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 1240px;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
p.lead { color: var(--soft); margin: .25rem 0 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .75rem; }
figcaption { font-weight: 600; font-size: .92rem; } figcaption span { color: var(--soft);
  font-weight: 400; display: block; font-size: .82rem; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--soft); font-weight: 600; }
th.n, td.n { text-align: right; } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--wash); padding: .8rem; border-radius: 8px; overflow-x: auto;
  font-size: .8rem; } details { margin: .5rem 0; }
details > summary { cursor: pointer; color: var(--soft); }
.wide { overflow-x: auto; } .samples { font-size: .8rem; } .samples th, .samples td {
  padding: .35rem .4rem; } dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0; }
.note { color: var(--soft); margin: .3rem 0; }
.warn { background: #fff6e5; border: 1px solid #f0d9a8; border-radius: 8px;
  padding: .5rem .8rem; margin: .4rem 0; }
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: which metrics it shows, and what a reader should look for."""

    title: str
    hint: str
    shows: Callable[[str], bool]


RETRIEVAL = "Retrieval on held-out texts"
QUALITY = ("recall@1", "recall@10", "ndcg@10", "mrr", "sts_spearman")


def _last(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _is_part(key: str) -> bool:
    total = {"reward/mean", "reward/std", "reward/spread"}
    return key.startswith("reward/") and not key.endswith("_spread") and key not in total


PANELS = (
    Panel("Reward", "mean over the batch", lambda k: k == "reward/mean"),
    Panel("Reward components", "as they enter the total", _is_part),
    Panel(
        "Spread inside the groups",
        "a component at zero is cancelled by the baseline: it teaches nothing",
        lambda k: k.endswith("_spread") or k in ("reward/std", "reward/spread"),
    ),
    Panel(RETRIEVAL, "", lambda k: k.startswith("eval/") and _last(k) in QUALITY),
    Panel(
        "Collapse on held-out texts",
        "distinct rationales falling, or anisotropy (mean cosine) rising, to 1 text for all",
        lambda k: k in ("eval/distinct_share", "eval/anisotropy"),
    ),
    Panel("Completion length", "tokens", lambda k: k.startswith("completions/") and "length" in k),
    Panel(
        "Truncated completions",
        "share cut off by the limit",
        lambda k: k == "completions/clipped_ratio",
    ),
    Panel("Entropy", "nats per token; a fall to zero is a collapse", lambda k: "entropy" in k),
    Panel("KL", "to the reference, nats per token", lambda k: _last(k) == "kl"),
    Panel(
        "Sampler against trainer",
        "difference of their log-probs, nats",
        lambda k: _last(k).startswith("logp_mismatch"),
    ),
    Panel("Loss", "", lambda k: k == "loss"),
    Panel("Gradient norm", "before clipping", lambda k: "grad_norm" in k),
    Panel("Seconds per phase", "", lambda k: k.startswith("time/")),
    Panel("Throughput", "tokens per second", lambda k: "tokens_per_s" in k),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says about itself."""

    name: str
    metrics: dict[str, Series]
    samples: list[dict]
    events: list[dict]
    config: str
    env: dict


LARGEST = 1e30  # a metric beyond it cannot be drawn
LARGEST_STEP = 2**53  # nor a step beyond it; JSON's integers have no end


def _step(record: dict, where: Path) -> int:
    step = record.get("step", 0)
    if not isinstance(step, int) or abs(step) > LARGEST_STEP:
        raise ValueError(
            f"report: the step of a record must be an integer, got {_cut(step)} in {where}; "
            "give it one within 2**53, or delete the line"
        )
    return step


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _drawable(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which no font can draw."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _read(path: Path) -> str:
    """The text of a file that may be absent, then empty."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise ValueError(
            f"report: {path} must be UTF-8, got {error}; restore or delete it"
        ) from error


def _rows(path: Path) -> list[dict]:
    try:
        return read_jsonl(path)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(
            f"report: {path} must hold one JSON object per line in UTF-8, got {error}; "
            "restore or delete it"
        ) from error


def _read_env(path: Path) -> dict:
    text = _read(path)
    try:
        env = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"report: {path} must be a JSON object, got {_cut(text)} ({error}); "
            "restore or delete it"
        ) from error
    if not isinstance(env, dict):
        raise ValueError(
            f"report: {path} must be a JSON object, got {_cut(text)}; restore or delete it"
        )
    return env


def load_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        FileNotFoundError: no metrics.jsonl in it.
        ValueError: a file that is not UTF-8, a record (or env.json) that is not an object, or a
            record whose step is not an integer.
    """
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"report: {folder} must be a run folder, got no metrics.jsonl in it"
        )
    metrics: dict[str, Series] = {}
    for record in _rows(folder / "metrics.jsonl"):
        for key, value in record.items():
            if key != "step" and is_number(value) and abs(value) < LARGEST:
                metrics.setdefault(_drawable(key), {})[_step(record, folder)] = float(value)
    return Run(
        name=_drawable(folder.name),
        metrics=metrics,
        samples=_rows(folder / "samples.jsonl"),
        events=_rows(folder / "events.jsonl"),
        config=_read(folder / "config.yaml"),
        env=_read_env(folder / "env.json"),
    )


def _points(series: Series) -> list[tuple[int, float]]:
    return [(step, value) for step, value in sorted(series.items()) if math.isfinite(value)]


def plot(panel: Panel, runs: Sequence[Run]) -> str | None:
    """The panel as an SVG element: a colour per metric, a line style per run.

    None when no run has such a metric.
    """
    from matplotlib import rc_context

    # Text stays text (smaller, searchable), and a "$" in a name stays a "$".
    with rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        return _draw(panel, runs)


def _draw(panel: Panel, runs: Sequence[Run]) -> str | None:
    from matplotlib.figure import Figure

    drawn = [run for run in runs if any(_points(run.metrics[key]) for key in _keys(panel, [run]))]
    if not drawn:
        return None
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colours = {key: f"C{i % 10}" for i, key in enumerate(_keys(panel, drawn))}
    styles = dict(zip([run.name for run in drawn], itertools.cycle(("-", "--", ":", "-."))))
    for run in drawn:
        for key in _keys(panel, [run]):
            steps, values = zip(*_points(run.metrics[key]) or [((), ())], strict=True)
            marker = "o" if len(steps) < 30 else None
            line = {"color": colours[key], "linewidth": 1.3, "marker": marker, "markersize": 3}
            axes.plot(steps, values, styles[run.name], **line)
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, colours, styles)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _keys(panel: Panel, runs: Sequence[Run]) -> list[str]:
    return sorted({key for run in runs for key in run.metrics if panel.shows(key)})


def _legend(figure: Figure, colours: Mapping[str, str], styles: Mapping[str, str]) -> None:
    """Names each colour and each line style once, where there are several."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=colour, label=key.split("/", 1)[-1])
        for key, colour in colours.items()
        if len(colours) > 1
    ] + [
        Line2D([], [], color="0.3", ls=style, label=name)
        for name, style in styles.items()
        if len(styles) > 1
    ]
    if entries:
        columns = min(len(entries), 3)
        figure.legend(
            handles=entries, loc="outside lower center", ncols=columns, fontsize=8.5, frameon=False
        )


def plots_html(runs: Sequence[Run]) -> str:
    """All panels for which there is something to show."""
    figures = []
    for panel in PANELS:
        svg = plot(panel, runs)
        if svg:
            hint = f"<span>{html.escape(panel.hint)}</span>" if panel.hint else ""
            caption = f"<figcaption>{html.escape(panel.title)}{hint}</figcaption>"
            figures.append(f"<figure>{caption}{svg}</figure>")
    return f'<div class="plots">{"".join(figures)}</div>'


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a table shows the value as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: object) -> str:
    """A table cell; numbers are aligned and shortened."""
    if is_number(value) and (isinstance(value, float) or abs(value) < LARGEST):
        return f'<td class="n">{value:.4g}</td>'
    text = str(value)
    return f"<td{' class=t' if len(text) > 24 else ''}>{html.escape(text)}</td>"


def head_cell(column: str, rows: Sequence[dict]) -> str:
    """A column's head, aligned as its values are."""
    numbers = all(is_number(row[column]) for row in rows if column in row)
    return f"<th{' class=n' if numbers else ''}>{html.escape(column)}</th>"


def table(rows: Sequence[dict], kind: str = "") -> str:
    """Records as a table; the columns are the keys in the order in which they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(head_cell(column, rows) for column in columns)
    body = "".join(f"<tr>{''.join(cell(row.get(c, '')) for c in columns)}</tr>" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide {kind}"><table>{inside}</table></div>'


def last_values(runs: Sequence[Run]) -> str:
    """First and last value of the metrics that people ask for first, one column per run."""
    titles = ("Reward", RETRIEVAL, "Collapse on held-out texts", "Entropy")
    wanted = [panel for panel in PANELS if panel.title in titles]
    keys = [
        key for p in wanted for key in sorted({k for r in runs for k in r.metrics if p.shows(k)})
    ]
    shown = [run for run in runs if any(key in run.metrics for key in keys)]
    rows = [
        {"metric": key} | {run.name: _first_and_last(run.metrics.get(key, {})) for run in shown}
        for key in keys
    ]
    return table(rows) if rows else "<p>No metrics yet.</p>"


def _first_and_last(series: Series) -> str:
    points = _points(series)
    return f"{points[0][1]:.3g} → {points[-1][1]:.3g}" if points else ""


def samples_html(run: Run, count: int = 6) -> str:
    """Samples of the first and of the last step that wrote some."""
    if not run.samples:
        return "<p>No samples were written.</p>"
    steps = sorted({_step(row, Path(run.name)) for row in run.samples})
    parts = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        rows = [
            {key.removeprefix("reward/"): value for key, value in row.items() if key != "step"}
            for row in run.samples
            if row.get("step", 0) == step
        ]
        parts.append(f"<h3>Step {html.escape(str(step))}</h3>{table(rows[:count], 'samples')}")
    return "".join(parts)


def meanings_html(runs: Sequence[Run]) -> str:
    """What the metrics of these runs mean."""
    names = {general(key) for run in runs for key in run.metrics}
    listed = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(meaning)}</dd>"
        for name, meaning in MEANINGS.items()
        if name in names
    )
    return f"<details><summary>What the metrics mean</summary><dl>{listed}</dl></details>"


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


def render(title: str, runs: Sequence[Run], lead: str = "") -> str:
    """The whole page."""
    steps = [max(s) for run in runs for s in run.metrics.values() if s]
    lead = lead or f"{len(runs)} run{'s' * (len(runs) > 1)}, {max(steps, default=0)} steps"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
        f"<h2>Where it began and where it ended</h2>{last_values(runs)}{meanings_html(runs)}"
        f"<h2>Curves</h2>{plots_html(runs)}{''.join(map(run_html, runs))}</body></html>"
    )


def _run_folders(folder: Path) -> list[Path]:
    """The folder when it is a run, or else those of its subfolders that are."""
    subfolders = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    return [folder] if (folder / "metrics.jsonl").exists() or not subfolders else subfolders


def write_report(*folders: str | Path, output: str | Path | None = None) -> Path:
    """Writes one page about all runs that the folders are or have as subfolders; returns its path.

    Args:
        folders: at least one.
        output: default: report.html in the folder, or in the one that holds all folders.

    Raises:
        FileNotFoundError: neither a folder nor a subfolder of it holds a run; no folder for output.
        ValueError: as `load_run`; output is there and no file.
    """
    if output:
        _check_output(Path(output))
    found = [Path(folder).resolve() for folder in folders]
    paths = list(dict.fromkeys(path for folder in found for path in _run_folders(folder)))
    common = Path(os.path.commonpath(found))
    runs = [load_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):  # told apart by their place
        runs = [
            replace(run, name=_drawable(path.relative_to(common).as_posix()))
            for run, path in zip(runs, paths, strict=True)
        ]
    target = Path(output) if output else Path(os.path.relpath(common)) / "report.html"
    replace_text(target, render(", ".join(folder.name for folder in found), runs))
    return target


def _check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"report: the page must go into a folder that exists, got no {path.parent}; make it"
        )
    if path.exists() and not path.is_file():
        raise ValueError(
            f"report: the page must be a file, got {path}, a folder, pipe or device; name a file"
        )


def main(argv: list[str], prog: str) -> int:
    """Writes the page and prints its path."""
    parser = OneLineParser(prog=prog, description=__doc__)
    parser.add_argument("run", nargs="+", help="a run folder, or a folder of run folders")
    parser.add_argument("--output", help="default: report.html where the runs are")
    args = parser.parse_args(argv)
    sys.stdout.write(f"{write_report(*args.run, output=args.output)}\n")
    return 0
