"""Error of every op against float64, ours beside each peer that runs here.

    python bench/errors.py              all ops, into bench/results/errors.jsonl
    python bench/errors.py token_logp

Small problems of each kind, in every dtype, with random inputs and with inputs that are hard.  An
error is the largest in a row of the result as a share of the row's largest value (`accuracy.py`).
"""

import argparse
import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import table

OPS = ("masked_mean", "contrastive_reward", "info_nce", "token_logp", "linear_logp", "policy_head")


def lines_of(bench: str, absent: list[str]) -> Iterator[dict[str, Any]]:
    """One line per side of each of the op's cases; adds what peers lack to `absent`."""
    for (kind, dtype, inputs), make in importlib.import_module(bench).ACCURACY.items():
        case = make()
        probes = case.sides if case.probes is None else case.probes
        eager = {side: fn for side, fn in probes.items() if side not in case.roster.compiled}
        label = f"{kind} {str(dtype)[6:]} {inputs}"
        facts = {"op": case.op, "case": label, "kind": kind, "dtype": str(dtype)[6:]}
        facts |= {"inputs": inputs, "sizes": dict(case.sizes), "device": harness.DEVICE.type}
        facts |= harness.environment(case.roster.packages)
        absent += case.roster.absent
        judged_case = replace(case, probes=eager, limit=math.inf)  # shown, not refused
        judged = harness.judge(judged_case)
        failures = {side: found.failure for side, found in judged.items() if found.failure}
        for side in [side for side in judged if side not in failures]:
            yield {**facts, "side": side, **harness.error_facts(judged[side].errors)}
        for side, reason in (case.roster.not_run | failures).items():
            yield {**facts, "side": side, "not_run": reason}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", choices=[[], *OPS], help="default: all")
    parser.add_argument("--out", type=Path, default=harness.results_file("errors"))
    args = parser.parse_args()
    ran, absent = [], []
    for bench in args.op or OPS:
        found = list(lines_of(bench, absent))
        ran += found
        harness.emit_case(found, args.out)
        for op in dict.fromkeys(line["op"] for line in found):
            print(f"\n{op}\n{table.errors_table([x for x in found if x['op'] == op])}")
    harness.drop_other_cases(ran, args.out)
    print(f"\n{harness.wrote(args.out, absent=absent)}")


if __name__ == "__main__":
    main()
