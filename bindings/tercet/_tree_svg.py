"""Drawing of a tree as SVG: where its nodes go, and what they look like."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

CELL = 7.3  # pixels of a character of the monospaced fonts below, at 12 px, and some
HEIGHT, PITCH, GAP = 24, 31, 64  # of a card; from one to the next; between columns
APART = 9  # more between cards of one depth that have other parents
MARGIN, HEADER, FOOTER = 20, 58, 44
CUT = 28  # cells of a label on a card
TOOLTIP = 600  # characters of a label in its tooltip
ORANGE, CREAM, BLUE = (241, 180, 138), (247, 243, 234), (138, 189, 228)
INK, GREY, LINE, BEST = "#1f2d3a", "#3d4c59", "#c9d2da", "#4a6f91"
FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
TITLE_FONT = "system-ui, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What is drawn of a node."""

    row: int
    parent: int | None  # its row
    depth: int
    visits: int
    value: float | None  # None: nobody was there
    in_flight: int
    hidden: int  # children that are left out
    label: str  # one line
    full_label: str
    is_end: bool
    is_best: bool  # on the path of most visits

    @property
    def numbers(self) -> str:
        """Visits, value, what is in flight, and how many children are left out."""
        parts = [f"{self.visits}"]
        if self.value is not None:
            parts.append(number(self.value))
        if self.in_flight:
            parts.append(f"{self.in_flight} out")
        if self.hidden:
            parts.append(f"+{self.hidden}")
        return " · ".join(parts)


def number(value: float) -> str:
    """A value in few digits."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.3g}"


@dataclass(frozen=True, slots=True)
class ColourScale:
    """Values as colours: cream to blue, orange to cream, or orange to blue about zero."""

    low: float
    high: float

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> ColourScale:
        """From the lowest to the highest value there is; the same on both sides of zero."""
        values = [node.value for node in nodes if node.value is not None] or [0.0]
        low, high = min(values), max(values)
        if low < 0 < high:
            high = max(-low, high)
            low = -high
        return cls(low, high)

    @property
    def stops(self) -> tuple[tuple[int, int, int], ...]:
        if self.low >= 0:
            return CREAM, BLUE
        return (ORANGE, CREAM) if self.high <= 0 else (ORANGE, CREAM, BLUE)

    def colour(self, value: float | None) -> str:
        """As #rrggbb; white where there is no value."""
        if value is None:
            return "#ffffff"
        stops = self.stops
        span = self.high / 2 - self.low / 2  # in halves: a difference might overflow
        place = (value / 2 - self.low / 2) / span if span > 0 else 0.5
        place = min(max(place, 0.0), 1.0) * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        mix = place - left
        channels = zip(stops[left], stops[left + 1], strict=True)
        return "#" + "".join(f"{round(a + (b - a) * mix):02x}" for a, b in channels)


def draw(nodes: Sequence[Node], *, title: str, summary: str) -> str:
    """The picture of a tree.

    Args:
        nodes: parents before their children, the root first.
        title: above it; one line, or empty.
        summary: below the title.
    """
    scale, places = ColourScale.of(nodes), tidy(nodes)
    lefts, widths = _columns(nodes)
    by_row = {node.row: node for node in nodes}
    top = HEADER - min(places.values()) + HEIGHT / 2
    centre = {row: place + top for row, place in places.items()}
    bottom = max(centre.values()) + HEIGHT / 2
    legend, legend_width = _legend(nodes, scale, bottom + FOOTER / 2 + 8)
    width = max(
        lefts[-1] + widths[-1],
        legend_width,
        MARGIN + 6.6 * len(summary),
        MARGIN + 9 * _cells(title),
    )
    lines, cards = [], []
    for node in sorted(nodes, key=lambda node: node.is_best):  # the best path over the others
        at = lefts[node.depth], centre[node.row], widths[node.depth]
        cards.append(_card(node, at, scale.colour(node.value)))
        if node.parent is not None:
            parent = by_row[node.parent]
            start = lefts[parent.depth] + widths[parent.depth], centre[parent.row]
            share = node.visits / max(nodes[0].visits, 1)
            lines.append(_line(start, at[:2], share, node.is_best))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + MARGIN:.0f}" '
            f'height="{bottom + FOOTER:.0f}" '
            f'viewBox="0 0 {width + MARGIN:.0f} {bottom + FOOTER:.0f}" '
            f'role="img" font-family="{FONT}" font-size="12">',
            f"<title>{_text(title or 'search tree')}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *_header(title, summary),
            '<g fill="none" stroke-linecap="butt">',
            *lines,
            "</g>",
            *cards,
            *legend,
            "</svg>",
            "",
        ]
    )


def tidy(nodes: Sequence[Node]) -> dict[int, float]:
    """Height of each node: siblings as close as no two cards of one depth overlap, parents midway.

    After Reingold & Tilford 1981, with the outline of a subtree as its highest and lowest card at
    each depth.
    """
    children: dict[int, list[int]] = {node.row: [] for node in nodes}
    for node in nodes[1:]:
        assert node.parent is not None
        children[node.parent].append(node.row)
    offset: dict[int, float] = {}  # of a subtree, from its parent
    outline: dict[int, list[tuple[float, float]]] = {}  # from a node on down, from itself
    for node in reversed(nodes):
        merged: list[tuple[float, float]] = []
        shifts = []
        for child in children[node.row]:
            own = outline.pop(child)
            shift = 0.0
            for level, ((_, low), (high, _)) in enumerate(zip(merged, own, strict=False)):
                shift = max(shift, low - high + PITCH + (APART if level else 0))
            shifts.append(shift)
            moved = [(high + shift, low + shift) for high, low in own]
            both = [(a, d) for (a, _), (_, d) in zip(merged, moved, strict=False)]
            merged = both + merged[len(both) :] + moved[len(both) :]
        middle = (shifts[0] + shifts[-1]) / 2 if shifts else 0.0
        for child, shift in zip(children[node.row], shifts, strict=True):
            offset[child] = shift - middle
        outline[node.row] = [(0.0, 0.0), *((a - middle, b - middle) for a, b in merged)]
    places = {nodes[0].row: 0.0}
    for node in nodes[1:]:
        assert node.parent is not None
        places[node.row] = places[node.parent] + offset[node.row]
    return places


def _columns(nodes: Sequence[Node]) -> tuple[list[float], list[float]]:
    """Left edge and width of the cards of each depth: as wide as the longest text."""
    depths = 1 + max(node.depth for node in nodes)
    widths = [0.0] * depths
    for node in nodes:
        cells = _cells(node.label) + 2 + 0.85 * _cells(node.numbers)
        widths[node.depth] = max(widths[node.depth], CELL * cells + 20)
    lefts = [float(MARGIN)]
    for width in widths[:-1]:
        lefts.append(lefts[-1] + width + GAP)
    return lefts, widths


def _cells(text: str) -> int:
    """Characters of a monospaced font that a text takes; East Asian ones and emoji take two."""
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def shortened(text: str) -> str:
    """A label as it stands on a card, with … where it was cut."""
    if _cells(text) <= CUT and len(text) <= 2 * CUT:
        return text
    kept = text[: 2 * CUT]
    while _cells(kept) >= CUT:
        kept = kept[:-1]
    return kept + "…"


def _text(text: str) -> str:
    return escape(text, quote=True)


def _header(title: str, summary: str) -> list[str]:
    """Title and summary, or the summary alone."""
    lines = []
    if title:
        lines.append(
            f'<text x="{MARGIN}" y="26" font-family="{TITLE_FONT}" font-size="15" '
            f'font-weight="600" fill="{INK}">{_text(title)}</text>'
        )
    lines.append(
        f'<text x="{MARGIN}" y="{44 if title else 30}" font-family="{TITLE_FONT}" '
        f'fill="{GREY}">{_text(summary)}</text>'
    )
    return lines


def _line(start: tuple[float, float], end: tuple[float, float], share: float, is_best: bool) -> str:
    """A curve from a parent's right side to a child's left side."""
    (x, y), (to_x, to_y) = start, end
    bend = (to_x - x) / 2
    return (
        f'<path d="M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} '
        f'{to_x:.1f} {to_y:.1f}" stroke="{BEST if is_best else LINE}" '
        f'stroke-width="{max(1.0, (HEIGHT - 6) * share):.1f}"/>'
    )


def _card(node: Node, at: tuple[float, float, float], colour: str) -> str:
    """A node: its label on the left, its numbers on the right."""
    x, y, width = at
    outline = f'stroke="{INK}" stroke-width="1.8"' if node.is_best else 'stroke="#9aa8b4"'
    if node.value is None:
        outline += ' stroke-dasharray="3 3"'
    more = len(node.full_label) - TOOLTIP
    tooltip = node.full_label[:TOOLTIP] + (f"… ({more} more characters)" if more > 0 else "")
    value = "never visited" if node.value is None else f"value {node.value:.6g}"
    facts = [f"{node.visits} visits", value]
    facts += [f"{node.in_flight} in flight"] if node.in_flight else []
    facts += [f"{node.hidden} children left out"] if node.hidden else []
    facts += ["an end"] if node.is_end else []
    mark = ""
    if node.is_end:
        mark = f'<rect x="{x + width - 4:.1f}" y="{y - 8:.1f}" width="4" height="16" fill="{INK}"/>'
    # What a label draws outside of its card (marks upon marks) is cut off by an element of its own.
    label = (
        f'<svg x="{x:.1f}" y="{y - HEIGHT / 2:.1f}" width="{width:.1f}" height="{HEIGHT}">'
        f'<text x="9" y="16" fill="{INK}"'
        + (' font-weight="600"' if node.is_best else "")
        + f">{_text(node.label)}</text></svg>"
    )
    return (
        f"<g><title>{_text(tooltip)}\n{', '.join(facts)}</title>"
        f'<rect x="{x:.1f}" y="{y - HEIGHT / 2:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="5" '
        f'fill="{colour}" {outline}/>{mark}{label}'
        f'<text x="{x + width - 9:.1f}" y="{y + 4:.1f}" text-anchor="end" font-size="10.5" '
        f'fill="{GREY}">{_text(node.numbers)}</text></g>'
    )


def _legend(nodes: Sequence[Node], scale: ColourScale, y: float) -> tuple[list[str], float]:
    """What colours, widths and marks mean, as far as they occur; and where it ends."""
    stops = scale.stops
    colours = "".join(
        f'<stop offset="{i / (len(stops) - 1):.0%}" stop-color="rgb{stop}"/>'
        for i, stop in enumerate(stops)
    )
    out = [f'<defs><linearGradient id="values">{colours}</linearGradient></defs>']
    x = float(MARGIN)
    low, high = number(scale.low), number(scale.high)
    grey = f'<path d="M{{x:.0f}} {y:.0f}l34 -5v10z" fill="{LINE}"/>'
    for kind, text in [
        ("text", "visits · value:"),
        ("text", low),
        ("bar", high),
        ("width", "visits"),
        *([("best", "path of most visits")] if len(nodes) > 1 else []),
        *([("end", "end")] if any(node.is_end for node in nodes) else []),
        *([("text", "n out: in flight")] if any(node.in_flight for node in nodes) else []),
        *([("text", "+n: children left out")] if any(node.hidden for node in nodes) else []),
    ]:
        drawn, wide = {
            "text": ("", 0),
            "bar": (_swatch(x, y, 90, 'fill="url(#values)" rx="2" stroke="#9aa8b4"'), 90),
            "width": (grey.format(x=x), 34),
            "best": (
                _swatch(x, y, 26, f'fill="none" rx="3" stroke="{INK}" stroke-width="1.8"'),
                26,
            ),
            "end": (_swatch(x, y, 4, f'fill="{INK}"'), 4),
        }[kind]
        x += wide + (6 if wide else 0)
        out.append(
            f'{drawn}<text x="{x:.0f}" y="{y + 4:.0f}" font-size="11" fill="{GREY}">'
            f"{_text(text)}</text>"
        )
        x += 6.8 * len(text) + (8 if text in ("visits · value:", low) else 24)
    return out, x


def _swatch(x: float, y: float, width: float, style: str) -> str:
    return f'<rect x="{x:.0f}" y="{y - 6:.0f}" width="{width:.0f}" height="12" {style}/>'
