"""Writes the table of measurements in README.md from bench/results/*.jsonl.

python bench/table.py            rewrites what stands between the two markers of README.md
python bench/table.py --check    fails when README.md does not hold what the results say
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- measurements -->", "<!-- /measurements -->"
OPS = (
    "masked_mean", "segment_mean", "contrastive_reward", "token_logp", "linear_logp",
    "packed_forward", "grace_step",
)  # fmt: skip


def load() -> list[dict]:
    files = [RESULTS / f"{op}.jsonl" for op in OPS]
    lines = [line for f in files if f.exists() for line in f.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def row(sides: list[dict]) -> str:
    """One case: our time, then each other side as a multiple of it and its extra memory."""
    ours = next(s for s in sides if s["side"] == "ours")
    others = sorted((s for s in sides if s is not ours), key=lambda s: s["slower"])
    peers = "; ".join(f"{s['side']} {s['slower']:.2f}x{memory(s)}" for s in others)
    time = f"{ours['ms']:.2f}" if ours["ms"] < 100 else f"{ours['ms']:.0f}"
    return f"| `{ours['op']}` {ours['case']} | {time} ms{memory(ours)} | {peers} |"


def memory(side: dict) -> str:
    return f", {side['extra_mb']:.0f} MB" if "extra_mb" in side else ""


def facts(lines: list[dict]) -> str:
    """Machines, versions and commits that the rows come from."""
    machines = sorted({line["machine"] for line in lines})
    versions: dict[str, str] = {}
    for line in lines:
        versions |= line["versions"]
    commits = sorted({line["commit"] for line in lines})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{'; '.join(machines)}; {listed}; commit {', '.join(commits)}."


def table(lines: list[dict], device: str) -> str:
    """All cases measured on a device, in the order of OPS."""
    lines = [line for line in lines if line["device"] == device]
    if not lines:
        return f"{device.upper()}: not measured."
    cases: dict[tuple[str, str, str], list[dict]] = {}
    for line in lines:
        cases.setdefault((line["op"], line["case"], line["machine"]), []).append(line)
    rows = [row(sides) for _, sides in sorted(cases.items(), key=lambda c: OPS.index(c[0][0]))]
    head = "| operation, case | Tercet | others: time as a multiple of ours, extra memory |"
    return "\n".join([head, "|---|---|---|", *rows, "", f"{device.upper()}: {facts(lines)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n\n".join(table(load(), device) for device in ("cpu", "cuda"))
    new = f"{before}{BEGIN}\n{tables}\n{END}{after}"
    if args.check:
        sys.exit("README.md is behind bench/results; run bench/table.py" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
