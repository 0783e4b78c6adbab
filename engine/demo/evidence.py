"""The demo over several seeds: a table with spread, and one JSON line per seed and model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from tercet.engine.demo.config import GraceDemoConfig
from tercet.engine.demo.grace import run_demo
from tercet.engine.demo.results import DemoResults
from tercet.engine.demo.show import COLUMNS, LABELS
from tercet.engine.environment import short_commit
from tercet.engine.files import read_jsonl, replace_text

SEEDS = (10, 11, 12)  # no setting was chosen on them
CHECKOUT = Path(__file__).parents[2]  # of an editable install
KEPT = Path("bench/results/demo_grace.jsonl")  # there; what README.md and docs/grace.md show
_KEY = ("op", "case", "side", "machine")  # a newer line with the same key replaces the older one


def run_evidence(
    config: GraceDemoConfig,
    *,
    seeds: Sequence[int] = SEEDS,
    results: Path | None = None,
    console: Console | None = None,
) -> str:
    """Runs the demo once per seed and returns the Markdown table, also kept in evidence.md.

    Args:
        config: of every run; output_dir gets one folder per seed, seed is replaced.
        seeds: at least one.
        results: JSON lines, one per seed and model, with machine and commit; None: those that
            the repository keeps where it is the current folder, else in output_dir.

    Raises:
        ValueError: no seeds.
        FileExistsError, RuntimeError: as `run_demo`.
    """
    if not seeds:
        raise ValueError("run_evidence: there must be at least one seed, got none")
    console = Console(highlight=False) if console is None else console
    if results is None:
        at_home = Path.cwd() == CHECKOUT.resolve() and KEPT.exists()
        results = KEPT if at_home else Path(config.output_dir) / KEPT.name
    found = []
    for seed in seeds:
        folder = Path(config.output_dir) / f"seed-{seed}"
        settings = replace(config, seed=seed, output_dir=str(folder))
        found.append(run_demo(settings, console=console))
    table = markdown(found)
    replace_text(Path(config.output_dir) / "evidence.md", table + "\n")
    _keep(found, results)
    console.print(table, markup=False, soft_wrap=True)
    console.print(f"wrote {results} and {config.output_dir}/evidence.md", soft_wrap=True)
    return table


def markdown(found: Sequence[DemoResults]) -> str:
    """Mean over the seeds of every measure, lowest and highest behind it."""
    lines = [
        f"| model | {' | '.join(title.replace(chr(10), ' ') for title in COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for reading in found[0].readings:
        cells = []
        for name in COLUMNS:
            values = [getattr(results.reading(reading.model), name) for results in found]
            cells.append("-" if None in values else _mean_and_range(values))
        lines.append(f"| {LABELS[reading.model]} | " + " | ".join(cells) + " |")
    seconds = [results.seconds["total"] for results in found]
    steps = ", ".join(f"{r.pretrain_steps} ({r.pretrain_accuracy:.2f})" for r in found)
    lines += [
        "",
        f"Mean (lowest-highest) over seeds {', '.join(str(r.seed) for r in found)}; "
        f"steps of pre-training (accuracy reached) {steps}; "
        f"{min(seconds):.0f}-{max(seconds):.0f} s per seed; {_machine(found[0])}, "
        f"commit {short_commit(str(found[0].environment['commit']))}.",
    ]
    return "\n".join(lines)


def _mean_and_range(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


def _machine(results: DemoResults) -> str:
    facts = results.environment
    return f"{facts['cpu']}, {facts['cpu_cores']} cores"


def _keep(found: Sequence[DemoResults], path: Path) -> None:
    """Adds the lines of these runs in place of older ones of the same machine."""
    new = [
        {
            "op": "demo_grace",
            "case": f"seed {results.seed}",
            "side": reading.model,
            **{name: value for name, value in asdict(reading).items() if name != "model"},
            "pretrain_steps": results.pretrain_steps,
            "pretrain_accuracy": results.pretrain_accuracy,
            "seconds": results.seconds,
            "machine": _machine(results),
            "versions": results.environment["versions"],
            "commit": results.environment["commit"],
        }
        for results in found
        for reading in results.readings
    ]
    keys = {tuple(line[k] for k in _KEY) for line in new}
    old = [line for line in read_jsonl(path) if tuple(line.get(k) for k in _KEY) not in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(line) + "\n" for line in [*old, *new]))
