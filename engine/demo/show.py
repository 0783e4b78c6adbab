"""The demo's tables on a terminal; they fit into 80 columns."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tercet.engine.demo.results import DemoResults, Reading
from tercet.engine.report_runs import ResultTable

LABELS = {
    "base": "base, no rationale",
    "base_reasoning": "base + reasoning",
    "paper": "GRACE, paper form",
    "document": "GRACE, repaired form",
    "infonce": "InfoNCE, no rationale",
}
RUNS = ("paper", "document", "infonce")  # whose curves the page has
COLUMNS = {
    "topic_hit_at_1": "topic\nhit@1",
    "topic_hit_at_1_greedy": "greedy",
    "names_topic": "names\ntopic",
    "distinct": "distinct",
    "mean_cosine": "mean\ncosine",
    "truncated": "cut\noff",
}
LEGEND = {
    "topic hit@1": "queries whose best document is of their topic; chance: 0.025",
    "greedy": "the same with greedy rationales; all else samples at temperature 1",
    "names topic": "rationales that name the right topic and no other",
    "distinct": "different rationales / rationales; one sentence for all: 0.003",
    "mean cosine": "of two different documents; 1: the vectors say nothing",
    "cut off": "rationales that ran out of their token budget",
}
TITLE = "200 held-out queries and 200 documents, 40 topics"


def show_results(results: DemoResults, console: Console) -> None:
    """Prints the measures, the rationales before and after, and where everything lies."""
    console.print(measures(results.readings))
    for column, meaning in LEGEND.items():
        console.print(f"{column:<11}  {meaning}", style="dim", soft_wrap=True)
    console.print()
    for line in rationales(results):
        console.print(line, soft_wrap=True)
    total = results.seconds["total"]
    console.print(f"{total:.0f} s; runs, checkpoints and results.json: {results.folder}")
    console.print(f"curves and samples: {results.folder}/report.html", soft_wrap=True)


def measures(readings: list[Reading]) -> Table:
    """One row per model."""
    table = Table(title=TITLE, box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for reading in readings:
        cells = [_cell(getattr(reading, name)) for name in COLUMNS]
        style = "bold" if reading.model == "document" else None
        table.add_row(LABELS[reading.model], *cells, style=style)
    return table


def report_tables(results: DemoResults) -> list[ResultTable]:
    """The same for the page: the measures, and the rationales before and after."""
    return [
        ResultTable(
            title=TITLE,
            rows=[
                {"": LABELS[reading.model], "run": reading.model if reading.model in RUNS else ""}
                | {
                    title.replace("\n", " "): getattr(reading, name)
                    for name, title in COLUMNS.items()
                }
                for reading in results.readings
            ],
            notes=[f"{column}: {meaning}" for column, meaning in LEGEND.items()],
        ),
        ResultTable(
            title="What they write about held-out texts",
            rows=[
                {
                    "text": sample.text,
                    "topic": sample.topic,
                    "base, before training": sample.base,
                    LABELS["paper"]: sample.paper,
                    LABELS["document"]: sample.document,
                }
                for sample in results.samples
            ],
            notes=[],
        ),
    ]


def rationales(results: DemoResults) -> list[str]:
    """What the models write about a few held-out texts, line by line."""
    lines = ["What they write about held-out texts:"]
    for sample in results.samples:
        lines += [
            "",
            f'  [bold]"{escape(sample.text)}"[/bold]  ({sample.topic})',
            f"    before    {escape(sample.base)}",
            f"    paper     {escape(sample.paper)}",
            f"    repaired  {escape(sample.document)}",
        ]
    return [*lines, ""]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
