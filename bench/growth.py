"""Time and extra memory of every op as its sizes grow, ours beside eager, on double logarithms.

    python bench/growth.py              measures all ops, then draws docs/images/growth_OP.png
    python bench/growth.py linear_logp
    python bench/growth.py --plot       draws what bench/results/growth.jsonl holds

A dashed line is what the formula says: the floor of the time on this machine, and the size of the
largest tensor that eager PyTorch stores.  Exponents are fitted to the larger half of the sizes.
"""

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import contrastive_reward
import harness
import linear_logp
import machine
import masked_mean
import matplotlib as mpl
import policy_head
import token_logp

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

IMAGES = machine.ROOT / "docs" / "images"
LABELS = {"N": "tokens N", "V": "vocabulary V", "B": "batch B"}
COLOURS = {"ours": "#0a6b52", "eager": "#d1702f", "formula": "#7d7d7d"}
Sizes = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One size of one op grows, the others stay."""

    op: str
    axis: str
    values: tuple[int, ...]
    make: Callable[[int], harness.Case]
    eager: str  # name of that side
    stored: Callable[[Sizes], int]  # bytes of the largest tensor that eager stores
    stored_name: str


def _logits(sizes: Sizes) -> int:
    return sizes["N"] * sizes["V"] * 4


def _over_vocabulary(op: str, eager: str, make: Callable[[int, int], harness.Case]) -> list[Sweep]:
    """Sweeps of an op on [N, V] logits: over N, then over V."""
    of_logits = partial(
        Sweep, op=op, eager=eager, stored=_logits, stored_name="the N V logits, once"
    )
    return [
        of_logits(axis="N", values=_powers(128, 4096), make=lambda n: make(n, 8192)),
        of_logits(axis="V", values=_powers(2048, 65_536), make=lambda v: make(512, v)),
    ]


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(2**k for k in range(first.bit_length() - 1, last.bit_length()))


SWEEPS = [
    Sweep(
        op="masked_mean",
        axis="B",
        values=_powers(4, 128),
        make=lambda b: masked_mean.case(b, 256, 512),
        eager="bmm",
        stored=lambda s: s["B"] * s["H"] * 4,
        stored_name="the means",
    ),
    Sweep(
        op="contrastive_reward",
        axis="B",
        values=_powers(32, 1024),
        make=lambda b: contrastive_reward.case(b, 8, 256),
        eager="eager",
        stored=lambda s: s["B"] ** 2 * s["G"] * 4,
        stored_name="the B B G cosines",
    ),
    *_over_vocabulary(
        "token_logp",
        "log_softmax + gather",
        lambda n, v: token_logp.case(n, v, harness.DTYPE, entropy=True, backward=True),
    ),
    *_over_vocabulary(
        "linear_logp",
        "full logits",
        lambda n, v: linear_logp.case(n, 256, v, "fwd+bwd", entropy=True),
    ),
    *_over_vocabulary(
        "policy_head", "full logits", lambda n, v: policy_head.case(n, 256, v, "fwd+bwd")
    ),
]


def measure(sweep: Sweep, out: Path) -> list[dict[str, Any]]:
    """Times and weighs ours and eager at every size."""
    lines = []
    for value in sweep.values:
        case = sweep.make(value)
        sides = {"ours": case.sides["ours"], "eager": case.sides[sweep.eager]}
        case = replace(case, sides=sides)
        first_s = harness.warm_up(case, {})[0]
        case = replace(case, rounds=min(51, max(7, int(1 / first_s["ours"]))))  # a second or more
        facts = {"op": sweep.op, "case": f"{sweep.axis}={value}, {case.name}", "x": sweep.axis}
        facts |= {"sizes": dict(case.sizes), "mode": case.mode, "formula": case.formula}
        facts |= {"floor_ms": machine.floor_ms(case.bytes_moved, case.flops)}
        facts |= {"stored_mb": sweep.stored(dict(case.sizes)) / 1e6}
        facts |= {"device": harness.DEVICE.type, **harness.environment()}
        times = harness.time_sides(case, first_s)
        for name, side in sides.items():
            extra_mb = harness.extra_bytes(side) / 1e6
            lines.append({**facts, "side": name, **times[name], "extra_mb": extra_mb})
        shown = ", ".join(
            f"{x['side']} {x['ms']:.2f} ms {x['extra_mb']:.1f} MB" for x in lines[-2:]
        )
        print(f"{sweep.op} {sweep.axis}={value}: {shown}")
        harness.emit_case(lines[-2:], out)
        del case, sides
        gc.collect()
    return lines


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ~ x^p, fitted to the larger half of the points."""
    logs = [[math.log(v) for v in values[len(values) // 2 :]] for values in (x, y)]
    return statistics.linear_regression(*logs).slope


def draw(
    ax: Axes, sweep: Sweep, lines: list[dict[str, Any]], key: str, formula: str, label: str
) -> None:
    """One panel: ours, eager and the formula."""
    axis = sweep.axis
    names = {"ours": "Tercet", "eager": sweep.eager}
    for side in ("ours", "eager"):
        points = sorted((x["sizes"][axis], x[key]) for x in lines if x["side"] == side)
        x, y = zip(*points, strict=True)
        power = f"{axis}$^{{{exponent(x, y):.2f}}}$"
        ax.plot(x, y, "o-", color=COLOURS[side], label=f"{names[side]}: {power}", markersize=4)
    points = sorted({(x["sizes"][axis], x[formula]) for x in lines})
    x, y = zip(*points, strict=True)
    label = f"{label}: {axis}$^{{{exponent(x, y):.2f}}}$"
    ax.plot(x, y, "--", color=COLOURS["formula"], label=label, linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(x, [f"{v:,}" for v in x])
    ax.tick_params(labelsize=8)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    ax.grid(alpha=0.25, which="major")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.5)  # a third of the height is the legend's
    ax.legend(frameon=False, fontsize=8, loc="upper left")


def plot(op: str, lines: list[dict[str, Any]], images: Path) -> Path:
    """Draws all sweeps of an op: time on the left, memory on the right."""
    sweeps = [sweep for sweep in SWEEPS if sweep.op == op]
    figure, panels = plt.subplots(
        len(sweeps), 2, figsize=(8, 2.9 * len(sweeps)), squeeze=False, layout="constrained"
    )
    for sweep, (left, right) in zip(sweeps, panels, strict=True):
        found = [line for line in lines if line["x"] == sweep.axis]
        draw(left, sweep, found, "ms", "floor_ms", "floor of this machine")
        draw(right, sweep, found, "extra_mb", "stored_mb", sweep.stored_name)
        sizes = found[0]["sizes"]
        fixed = ", ".join(
            f"{k}={v:,}" if isinstance(v, int) else str(v)
            for k, v in sizes.items()
            if k not in (sweep.axis, "kept")  # kept tokens grow with the batch
        )
        left.set(ylabel="time per call, ms", title=fixed)
        right.set(ylabel="extra memory, MB", title=fixed)
        for panel in (left, right):
            panel.set_xlabel(LABELS[sweep.axis])
            panel.title.set_fontsize(9)
    figure.suptitle(f"{op} {lines[0]['mode']} on {lines[0]['machine']}", fontsize=10)
    images.mkdir(parents=True, exist_ok=True)
    file = images / f"growth_{op}.png"
    figure.savefig(file, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)
    return file


def of_newest_machine(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = list(lines)
    return [line for line in lines if line["machine"] == lines[-1]["machine"]]


def main() -> None:
    ops = list(dict.fromkeys(sweep.op for sweep in SWEEPS))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="*", choices=[[], *ops], help="default: all")
    parser.add_argument("--plot", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=harness.results_file("growth"))
    parser.add_argument("--images", type=Path, default=IMAGES)
    args = parser.parse_args()
    chosen = args.op or ops
    if not args.plot:
        ran = [line for s in SWEEPS if s.op in chosen for line in measure(s, args.out)]
        harness.drop_other_cases(ran, args.out)
        print(harness.wrote(args.out))
    for op in chosen:
        lines = [line for line in harness.read(args.out) if line["op"] == op]
        if lines:
            print(f"drew {plot(op, of_newest_machine(lines), args.images)}")


if __name__ == "__main__":
    main()
