"""`tercet demo ...`; torch is loaded once the command line is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tercet.engine.command_line import load_config
from tercet.engine.demo.config import GraceDemoConfig


def grace(argv: Sequence[str], prog: str) -> int:
    """`tercet demo grace [--evidence] [--config FILE.yaml] [--key.subkey VALUE ...]`.

    --evidence runs seeds 10, 11 and 12 and keeps the table; see `run_evidence`.
    """
    rest = [word for word in argv if word != "--evidence"]
    config = load_config(GraceDemoConfig, rest, prog=prog, beside=["--evidence"])

    from tercet.engine.demo.evidence import run_evidence
    from tercet.engine.demo.grace import run_demo

    if len(rest) == len(argv):
        run_demo(config)
    else:
        run_evidence(replace(config, output_dir=f"{config.output_dir}-evidence"))
    return 0
