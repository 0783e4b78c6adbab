"""The curves of a report: one small chart per metric, and one colour per run on the whole page."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tercet.engine.glossary import MEANINGS, general
from tercet.engine.report_runs import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#9b4f96", "#b58900", "#4d4d4d")  # told apart by all
DASHES = ("solid", "dashed", "dotted")  # the runs after the sixth begin the colours again
FEW = 30  # points; up to here each is marked


@dataclass(frozen=True, slots=True)
class Style:
    """How a run is drawn."""

    colour: str
    dash: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Charts that belong together, and what a reader should look for."""

    title: str
    hint: str
    shows: Callable[[str], bool]
    one_scale: bool = False  # of all its charts, from 0 on, so that heights can be compared


def _in(*groups: str) -> Callable[[str], bool]:
    return lambda key: key.partition("/")[0] in groups


def _is_spread(key: str) -> bool:
    return key.startswith("reward/") and key.endswith("spread")


PANELS = (  # a metric belongs to the first one that shows it
    Panel(
        "Held-out texts",
        "Collapse shows as distinct_share falling or anisotropy (mean cosine) rising to 1; "
        "retrieval alone can hide it.",
        _in("eval"),
    ),
    Panel(
        "Reward",
        "of the rollouts of a step, all parts together",
        lambda k: k in ("reward/mean", "reward/std", "frac_reward_zero_std"),
    ),
    Panel(
        "Spread inside the groups",
        "Standard deviation among the rollouts of one text, on one scale: what can be learnt from. "
        "A part whose spread is 0 is cancelled by the group's baseline and teaches nothing.",
        _is_spread,
        one_scale=True,
    ),
    Panel("Reward parts", "mean of each, as it enters the total", _in("reward")),
    Panel(
        "Cosines in the batch",
        "A query should be nearer to its own document than to the others.",
        _in("cosine"),
    ),
    Panel(
        "What was sampled", "lengths in tokens", _in("completions", "anchors", "prompts", "groups")
    ),
    Panel(
        "Policy",
        "Entropy falling to 0 is a collapse.",
        lambda k: k in ("entropy", "kl", "clip_ratio") or k.startswith("sampling/"),
    ),
    Panel(
        "Update",
        "Losses of different objectives cannot be compared.",
        lambda k: k in ("loss", "grad_norm", "learning_rate", "rows_left_out", "updates_skipped"),
    ),
    Panel("Seconds per phase", "on one scale", _in("time"), one_scale=True),
    Panel("Speed and memory", "", lambda k: k in ("tokens_per_s", "padding_saved", "memory_gb")),
    Panel("Other metrics", "", lambda _: True),
)


def styles_of(runs: Sequence[Run]) -> dict[str, Style]:
    """Name of each run -> how it is drawn wherever it is drawn."""
    return {
        run.name: Style(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)])
        for i, run in enumerate(runs)
    }


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """All metrics that have a finite value, in the glossary's order, then the unknown ones."""
    order = {name: place for place, name in enumerate(MEANINGS)}
    keys = {key for run in runs for key in run.metrics if run.points(key)}
    return sorted(keys, key=lambda key: (order.get(general(key), len(order)), key))


def charts_html(runs: Sequence[Run]) -> str:
    """All panels for which there is something to show, under a legend of the runs."""
    styles = styles_of(runs)
    keys: dict[Panel, list[str]] = {panel: [] for panel in PANELS}
    for key in metrics_of(runs):
        keys[next(panel for panel in PANELS if panel.shows(key))].append(key)
    return _legend(styles) + "".join(
        _panel_html(panel, found, runs, styles) for panel, found in keys.items() if found
    )


def _panel_html(
    panel: Panel, keys: Sequence[str], runs: Sequence[Run], styles: Mapping[str, Style]
) -> str:
    """One panel; metrics that never leave 0 are named instead of drawn."""
    values = {key: [value for run in runs for _, value in run.points(key)] for key in keys}
    drawn = [key for key in keys if any(values[key])]
    top = max((max(values[key]) for key in drawn), default=0.0) if panel.one_scale else None
    figures = "".join(_figure(key, runs, styles, top) for key in drawn)
    zeros = ", ".join(f"<code>{html.escape(key)}</code>" for key in keys if key not in drawn)
    return (
        f'<section><h3>{html.escape(panel.title)}</h3><p class="note">{html.escape(panel.hint)}</p>'
        f'<div class="charts">{figures}</div>'
        + (f'<p class="note">0 at every step: {zeros}</p>' if zeros else "")
        + "</section>"
    )


def _figure(key: str, runs: Sequence[Run], styles: Mapping[str, Style], top: float | None) -> str:
    """A chart under the metric's name and each run's last value."""
    last = "".join(
        f' <b style="color:{styles[run.name].colour}">{short(points[-1][1])}</b>'
        for run in runs
        if (points := run.points(key))
    )
    meaning = html.escape(MEANINGS.get(general(key), ""))
    caption = f"<figcaption><span>{html.escape(key)}</span><div>{last}</div></figcaption>"
    return f'<figure title="{meaning}">{caption}{draw(key, runs, styles, top)}</figure>'


def short(value: float) -> str:
    """A number in three digits, or all of those before its point."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def _legend(styles: Mapping[str, Style]) -> str:
    """Which colour is which run; nothing where there is only one."""
    entries = "".join(
        f'<span><i style="border-top:3px {style.dash} {style.colour}"></i>'
        f"{html.escape(name)}</span>"
        for name, style in styles.items()
    )
    return f'<p class="legend">{entries}</p>' if len(styles) > 1 else ""


def draw(
    key: str, runs: Sequence[Run], styles: Mapping[str, Style], top: float | None = None
) -> str:
    """A metric of all runs as an SVG element; `top` draws it from 0 up to there."""
    from matplotlib import rc_context

    # Text stays text (smaller, searchable), a "$" in a name stays a "$", and the page is the same
    # each time.
    with rc_context({"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "tercet"}):
        return _draw(key, runs, styles, top)


def _draw(key: str, runs: Sequence[Run], styles: Mapping[str, Style], top: float | None) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.2, 1.7))
    axes = figure.add_axes((0.15, 0.13, 0.83, 0.78))
    for run in runs:
        if points := run.points(key):
            style = styles[run.name]
            marker = "o" if len(points) < FEW else None
            axes.plot(
                *zip(*points, strict=True),
                linestyle=style.dash,
                color=style.colour,
                linewidth=1.3,
                marker=marker,
                markersize=2.5,
            )
    if top:
        axes.set_ylim(0, 1.05 * top)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useOffset=False)
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.tick_params(labelsize=7, length=2, colors="0.35")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
