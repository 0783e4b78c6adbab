"""`tercet bench`: runs the benches of the source checkout, each in a process of its own.

Results go to runs/bench/ of the current folder.  The checkout's own, which README.md and
docs/kernels.md show, lie in bench/results/; `make bench` measures those again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tercet.engine.command_line import OneLineParser

FOLDER = Path(__file__).parents[1] / "bench"  # of the checkout that this is an editable install of
OPS = {
    "masked_mean": "masked_mean and segment_mean",
    "contrastive_reward": "the reward matrix of GRACE",
    "info_nce": "the contrastive loss, and statistics of its similarities",
    "token_logp": "log-probs and entropy from logits",
    "linear_logp": "the same from hidden states and the LM head",
    "policy_head": "the policy loss inside the LM head",
}
SYSTEMS = {
    "packed_forward": "packed rows through a model, beside padded ones",
    "grace_step": "a whole training step, beside TRL",
}
SUMMARIES = {
    "errors": "errors of every op against float64, beside the peers",
    "growth": "time and memory as the sizes grow, plotted",
}
SCRIPTS = OPS | SYSTEMS | SUMMARIES
WITHOUT_CASES = {"grace_step", *SUMMARIES}
RESULTS = Path("runs/bench")  # bench/results/ is tracked, and is not for a visitor to change


def parse(argv: list[str], prog: str) -> argparse.Namespace:
    """The options of one call; wrong usage exits with status 2."""
    listed = "\n".join(f"  {name:<20}{what}" for name, what in SCRIPTS.items())
    parser = OneLineParser(
        prog=prog,
        description=__doc__,
        epilog=f"what there is:\n{listed}\n\nWithout a name: {', '.join(OPS)}; "
        "the others want to be named.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="*", help="what to run")
    parser.add_argument("--case", nargs="+", default=[], help="of one op; default: all")
    parser.add_argument("--list", action="store_true", help="name the cases and run nothing")
    parser.add_argument("--out", type=Path, help=f"JSON lines file (default: {RESULTS}/OP.jsonl)")
    args = parser.parse_args(argv)
    unknown = [op for op in args.op if op not in SCRIPTS]
    if unknown:
        parser.error(f"op must be one of {', '.join(SCRIPTS)}; got {', '.join(unknown)}")
    if args.case and len(args.op) != 1:
        parser.error(f"--case belongs to one op, got {len(args.op)}")
    without = [op for op in args.op if op in WITHOUT_CASES]
    if args.list and without:
        parser.error(f"--list is for a bench that has cases, got {', '.join(without)}")
    return args


def main(argv: list[str], prog: str) -> int:
    """Runs benches.  Returns 0, 1 when one of them failed, or 2 when it did not know a case.

    Raises:
        RuntimeError: there is no source checkout.
    """
    args = parse(argv, prog)
    if not (FOLDER / "harness.py").exists():
        raise RuntimeError(
            f"the benches must lie in a source checkout, got no folder {FOLDER}; "
            "clone the repository and install it with pip install -e '.[bench]'"
        )
    failed = {}
    for op in args.op or OPS:
        # The script's own folder, not the current one, must lead the import path: the benches
        # import their harness from it, and a top-level `kernels` would shadow another package.
        out = (args.out or RESULTS / f"{op}.jsonl").resolve()
        command = [sys.executable, str(FOLDER / f"{op}.py"), *args.case, "--out", str(out)]
        command += ["--images", str(out.parent)] if op == "growth" else []
        if args.list:
            sys.stdout.write(f"cases of {op}:\n")
            sys.stdout.flush()
            command.append("--list")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        status = subprocess.run(command, check=False, env=environment).returncode
        if status:
            failed[op] = status
    if not args.op:
        rest = [name for name in SCRIPTS if name not in OPS]
        sys.stdout.write(f"left out, unless they are named: {', '.join(rest)}\n")
    if failed:
        sys.stderr.write(f"{prog}: failed: {', '.join(failed)}\n")
    return 0 if not failed else 2 if 2 in failed.values() else 1
