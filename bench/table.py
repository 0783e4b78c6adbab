"""Writes the tables of README.md and docs/kernels.md from bench/results/*.jsonl.

    python bench/table.py            rewrites what stands between the markers of both pages
    python bench/table.py --check    fails when a page does not hold what the results say

Markers are pairs of comments: `<!-- speed linear_logp -->` ... `<!-- /speed -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
OPS = (
    "masked_mean", "segment_mean", "contrastive_reward", "info_nce", "similarity_stats",
    "token_logp", "linear_logp", "policy_head", "packed_forward", "grace_step",
)  # fmt: skip
README_CASES = (  # op, and what the name of a case holds
    ("masked_mean", "fwd+bwd, 64%"),
    ("segment_mean", "fwd+bwd, 64%"),
    ("contrastive_reward", "sum document"),
    ("contrastive_reward", "loop"),
    ("info_nce", "fwd+bwd"),
    ("token_logp", "with entropy fwd+bwd"),
    ("linear_logp", "with entropy, fwd+bwd"),
    ("policy_head", ", fwd+bwd"),
    ("packed_forward", "8-512"),
    ("grace_step", ""),
)
DEVICES = ("cpu", "cuda")
Line = dict[str, Any]


def load(name: str) -> list[Line]:
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def speed_lines() -> list[Line]:
    return [line for op in OPS for line in load(op)]


def by_case(lines: Iterable[Line]) -> list[list[Line]]:
    """Lines that were measured together, ours first, then the fastest; those not run last."""
    cases: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        cases.setdefault((line["op"], line["case"], line["machine"]), []).append(line)

    def order(line: Line) -> tuple[bool, float]:
        return line["side"] != "ours", line.get("slower", float("inf"))

    return [sorted(sides, key=order) for sides in cases.values()]


def number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.2f}"


def size_of(error: float | None) -> str:
    if error is None:
        return "not finite"
    digit, _, power = f"{error:.0e}".partition("e")
    return "0" if error == 0 else f"{digit}e{int(power)}"


def facts_of(line: Line) -> str:
    """Extra memory and largest error of one side."""
    shown = [f"{line['extra_mb']:.0f} MB"] if "extra_mb" in line else []
    if "error" in line:
        shown.append(size_of(line["error"]))
    return "".join(f", {fact}" for fact in shown)


def row(sides: list[Line], *, short: bool) -> str:
    """One case: our time, then each other side as a multiple of it."""
    ours, *others = sides
    ran = [s for s in others if "not_run" not in s and not (short and s.get("bound"))]
    peers = "<br>".join(f"{s['side']} {s['slower']:.2f}x{facts_of(s)}" for s in ran)
    floor = f", {ours['share_of_floor']:.0%} of the floor" if "share_of_floor" in ours else ""
    name = f"`{ours['op']}` {ours['case']}" if short else ours["case"]
    return f"| {name} | {number(ours['ms'])} ms{floor}{facts_of(ours)} | {peers} |"


def machines(lines: list[Line]) -> str:
    """Machines, versions and commits that the rows come from."""
    versions: dict[str, str] = {}
    for line in lines:
        versions |= line["versions"]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    names = "; ".join(sorted({line["machine"] for line in lines}))
    commits = ", ".join(sorted({line["commit"] for line in lines}))
    return f"{names}; {listed}; commit {commits}."


def speed_table(lines: list[Line], *, short: bool) -> str:
    """One table per device that was measured."""
    head = "| case | Tercet | others: time as a multiple of ours, extra memory, largest error |"
    tables = []
    for device in DEVICES:
        found = [line for line in lines if line["device"] == device]
        rows = [row(sides, short=short) for sides in by_case(found)]
        if rows:
            tables.append("\n".join([head, "|---|---|---|", *rows]))
        if short or not rows:
            tables.append(f"{device.upper()}: {machines(found) if found else 'not measured.'}")
    return "\n\n".join(tables)


def readme_table() -> str:
    lines = speed_lines()
    return speed_table(
        [x for op, part in README_CASES for x in lines if x["op"] == op and part in x["case"]],
        short=True,
    )


def grid(rows: list[list[str]]) -> str:
    """A Markdown table that is readable as it stands; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = (
        "| " + " | ".join(f"{c:{w}}" for c, w in zip(r, widths, strict=True)) + " |" for r in rows
    )
    return "\n".join([head, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *body])


def shown_errors(line: Line | None, outputs: list[str]) -> str:
    """The error of every output."""
    if line is None:
        return "-"
    found = line["errors"]
    return " / ".join(size_of(found[name]) if name in found else "-" for name in outputs)


def errors_table(lines: list[Line]) -> str:
    """Cases down, sides that ran across; the corner names the outputs."""
    ran = [line for line in lines if "not_run" not in line]
    sides = list(dict.fromkeys(line["side"] for line in ran))
    outputs = list(max((line["errors"] for line in ran), key=len))
    cases: dict[str, dict[str, Line]] = {}
    for line in ran:
        cases.setdefault(line["case"], {})[line["side"]] = line
    rows = [
        [case, *(shown_errors(found.get(side), outputs) for side in sides)]
        for case, found in cases.items()
    ]
    return grid([[" / ".join(outputs), *sides], *rows])


def errors_of(op: str) -> str:
    lines = [line for line in load("errors") if line["op"] == op]
    tables = [errors_table([x for x in lines if x["device"] == device]) for device in DEVICES
              if any(x["device"] == device for x in lines)]  # fmt: skip
    return "\n\n".join(tables) or "Not measured."


def losses() -> str:
    """Every case in which a peer that does the same work takes less time than we do."""
    rows = [
        [f"`{s['op']}` {s['case']}", s["device"], s["side"], f"{s['slower']:.2f}x"]
        for s in speed_lines()
        if s.get("slower", 1.0) < 1.0 and not s.get("bound")
    ]
    return grid([["case", "device", "faster", "its time / ours"], *rows]) if rows else "Nowhere."


def not_run() -> str:
    """Which peers were left out, and why."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for line in speed_lines():
        if "not_run" in line:
            ops = found.setdefault((line["side"], line["device"], line["not_run"]), [])
            if line["op"] not in ops:
                ops.append(line["op"])
    rows = [
        [side, device, why, ", ".join(f"`{op}`" for op in ops)]
        for (side, device, why), ops in found.items()
    ]
    return grid([["peer", "device", "why", "of"], *rows]) if rows else "None."


def block(kind: str, op: str) -> str:
    """What belongs between the markers `kind op` and `/kind`."""
    if kind == "measurements":
        return readme_table()
    if kind == "speed":
        return speed_table([x for x in speed_lines() if x["op"] == op], short=False)
    if kind == "errors":
        return errors_of(op)
    if kind == "machines":
        lines = [x for x in speed_lines() if x["op"] in OPS[:7]] + load("errors")
        return machines(lines) if lines else "Not measured."
    return {"losses": losses, "not-run": not_run}[kind]()


KINDS = "measurements|speed|errors|machines|losses|not-run"
MARKED = re.compile(rf"<!-- ({KINDS})(?: (\w+))? -->\n(.*?)<!-- /\1 -->", re.DOTALL)


def filled(text: str) -> str:
    """The page with every block as the results say."""

    def fill(found: re.Match[str]) -> str:
        kind, op = found[1], found[2] or ""
        begin = found[0].partition("\n")[0]
        return f"{begin}\n{block(kind, op)}\n<!-- /{kind} -->"

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for page in (ROOT / "README.md", ROOT / "docs" / "kernels.md"):
        text = page.read_text()
        new = filled(text)
        if args.check and new != text:
            sys.exit(f"{page.name} is behind bench/results; run bench/table.py")
        if new != text:
            page.write_text(new)


if __name__ == "__main__":
    main()
