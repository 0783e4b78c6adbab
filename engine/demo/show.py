"""The demo's tables on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tercet.engine.demo.results import DemoResults, Reading

LABELS = {
    "base": "base model, no rationale",
    "base_reasoning": "base + reasoning",
    "paper": "GRACE, paper's reward",
    "document": "GRACE, repaired reward",
    "infonce": "InfoNCE, no rationale",
}
COLUMNS = {
    "recall_at_1": "recall@1",
    "recall_at_1_greedy": "recall@1 greedy",
    "names_topic": "names topic",
    "distinct": "distinct rationales",
    "mean_cosine": "mean cosine",
    "truncated": "truncated",
}


def show_results(results: DemoResults, console: Console) -> None:
    """Prints the measures, the rationales before and after, and where everything lies."""
    console.print(measures(results.readings))
    console.print(
        "recall@1: queries whose best document is of their topic, rationales sampled at "
        "temperature 1 (greedy: at 0).  names topic: the right one and no other.  mean cosine: of "
        "two documents.  Recall alone hides a collapse: look at distinct rationales too.",
        style="dim",
    )
    console.print(rationales(results))
    total = results.seconds.get("total", 0.0)
    console.print(f"took {total:.0f} s; runs, checkpoints and results.json: {results.folder}")
    console.print(f"curves and samples: {results.folder}/report.html", soft_wrap=True)


def measures(readings: list[Reading]) -> Table:
    """One row per model."""
    table = Table(title="Held-out texts: 200 queries, 200 documents, 40 topics")
    table.add_column("")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for reading in readings:
        cells = [_cell(getattr(reading, name)) for name in COLUMNS]
        style = "bold" if reading.model == "document" else None
        table.add_row(LABELS[reading.model], *cells, style=style)
    return table


def rationales(results: DemoResults) -> Table:
    """What the models write about a few held-out texts."""
    table = Table(title="What the models write about held-out texts", show_lines=True)
    table.add_column("text")
    table.add_column("model")
    table.add_column("rationale")
    for sample in results.samples:
        written = {"base": sample.base, "paper": sample.paper, "document": sample.document}
        labels = {"base": "base", "paper": "paper's", "document": "repaired"}
        table.add_row(
            f"{sample.text}\n[dim]({sample.topic})[/dim]",
            "\n".join(labels.values()),
            "\n".join(written.values()),
        )
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
