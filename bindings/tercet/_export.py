"""A tree for other programs and for eyes: as JSON, as DOT for Graphviz, and as an SVG picture.

Labels may be what a model wrote: whatever is in them, they stay text.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tercet._mcts import TreeColumns
from tercet._search import most_visited_path
from tercet._tree_svg import ColourScale, Node, draw, shortened

JOINERS = "\u200c\u200d"  # of letters and emoji: the only invisible characters that may stay


def tree_to_json(columns: TreeColumns, labels: Sequence[object] | None = None) -> str:
    """All nodes as a JSON list with one object a line, parents before their children.

    Keys: `row`, `parent` (its row; null for the root), `depth`, `visits`, `in_flight`, `total`,
    `handle`, `terminal`, `value` (null where nobody was), and `label` if there are any.

    Args:
        labels: one for each node, in the order of the columns; made strings with `str`.

    Raises:
        ValueError: another number of labels than of nodes.
    """
    texts = _checked("tree_to_json", columns, labels)
    names = ("parent", "depth", "visits", "in_flight", "total", "handle", "terminal", "value")
    lists = [getattr(columns, name).tolist() for name in names]
    lines = []
    for row, values in enumerate(zip(*lists, strict=True)):
        node = {"row": row} | dict(zip(names, values, strict=True))
        node["parent"] = None if row == 0 else node["parent"]
        node["terminal"] = bool(node["terminal"])
        node["value"] = node["value"] if node["visits"] else None
        if texts is not None:
            node["label"] = texts[row]
        lines.append(json.dumps(node, allow_nan=False))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def tree_to_dot(
    columns: TreeColumns,
    labels: Sequence[object] | None = None,
    *,
    max_nodes: int = 60,
    title: str = "",
) -> str:
    """The most visited nodes as a graph for Graphviz: `dot -Tpdf`.

    Colours are values and widths are visits, as in `tree_to_svg`; a line below the graph says
    how many nodes are left out.

    Args:
        labels: as in `tree_to_json`, made one line and cut after 28 characters; None: the handles.
        max_nodes: >= 1.

    Raises:
        ValueError: as `tree_to_json`; max_nodes.
    """
    shown = _most_visited("tree_to_dot", columns, labels, max_nodes)
    scale = ColourScale.of(shown.nodes)
    below = " - ".join(filter(None, (_plain(title), shown.summary)))
    lines = [
        "digraph tree {",
        f"  graph [rankdir=LR, label={_quoted(below)}, fontname=monospace];",
        "  node [shape=box, style=filled, fontname=monospace];",
        "  edge [arrowhead=none, color=gray60];",
    ]
    for node in shown.nodes:
        text = f"{node.label}\n{node.numbers}"
        style = '"filled,dashed"' if node.value is None else "filled"
        lines.append(
            f"  n{node.row} [label={_quoted(text)}, tooltip={_quoted(node.full_label)}, "
            f'fillcolor="{scale.colour(node.value)}", style={style}, '
            f"penwidth={2 if node.is_best else 1}, peripheries={2 if node.is_end else 1}];"
        )
        if node.parent is not None:
            width = max(0.5, 12 * node.visits / max(shown.nodes[0].visits, 1))
            lines.append(f"  n{node.parent} -> n{node.row} [penwidth={width:.2f}];")
    return "\n".join([*lines, "}"]) + "\n"


def tree_to_svg(
    columns: TreeColumns,
    labels: Sequence[object] | None = None,
    *,
    max_nodes: int = 60,
    title: str = "",
) -> str:
    """The most visited nodes as a picture, the root on the left.

    A node's colour is its value, the width of a line the share of the root's visits; the path
    of most visits is outlined.  The picture says how many nodes are left out, and at which nodes.

    Args:
        labels: as in `tree_to_dot`; a tooltip has 600 characters.
        max_nodes: >= 1.
        title: one line above the picture.

    Raises:
        ValueError: as `tree_to_dot`.
    """
    shown = _most_visited("tree_to_svg", columns, labels, max_nodes)
    return draw(shown.nodes, title=_plain(title), summary=shown.summary)


@dataclass(frozen=True, slots=True)
class _Shown:
    nodes: list[Node]  # parents before their children
    summary: str  # of what is drawn and what is not


def _most_visited(
    function: str, columns: TreeColumns, labels: Sequence[object] | None, max_nodes: int
) -> _Shown:
    """The path of most visits, then the most visited others, of equal ones those made first.

    A node has at least the visits of its children, so the parent of each of them is among them.
    """
    texts = _checked(function, columns, labels)
    if max_nodes < 1:
        raise ValueError(f"{function}: max_nodes must be >= 1, got {max_nodes}")
    visits, parents, values = columns.visits, columns.parent, columns.value
    best = most_visited_path(columns)
    rank = -visits.astype(np.int64)
    rank[best] = np.iinfo(np.int64).min
    rows = np.sort(np.argsort(rank, kind="stable")[:max_nodes])
    hidden = np.bincount(parents[1:], minlength=len(visits))
    hidden -= np.bincount(parents[rows[1:]], minlength=len(visits))
    nodes = []
    for row in rows.tolist():
        text = _plain(f"#{columns.handle[row]}" if texts is None else texts[row])
        nodes.append(
            Node(
                row=row,
                parent=int(parents[row]) if row else None,
                depth=int(columns.depth[row]),
                visits=int(visits[row]),
                value=float(values[row]) if visits[row] else None,
                in_flight=int(columns.in_flight[row]),
                hidden=int(hidden[row]),
                label=shortened(text),
                full_label=text,
                is_end=bool(columns.terminal[row]),
                is_best=row in best,
            )
        )
    return _Shown(nodes, _summary(visits, len(rows)))


def _summary(visits: NDArray[np.uint32], drawn: int) -> str:
    """How many nodes there are, and how many are not drawn."""
    said = f"{visits[0]} visits, {len(visits)} nodes"
    if drawn == len(visits):
        return f"{said}, all drawn"
    never = int((visits == 0).sum())
    return (
        f"{said}: the {drawn} most visited are drawn, {len(visits) - drawn} are left out"
        f" ({never} were never visited)"
    )


def _checked(
    function: str, columns: TreeColumns, labels: Sequence[object] | None
) -> list[str] | None:
    if labels is None:
        return None
    if len(labels) != len(columns):
        raise ValueError(
            f"{function}: labels must be as many as the tree has nodes, {len(columns)}, "
            f"got {len(labels)}"
        )
    return [str(label) for label in labels]


def _plain(text: str) -> str:
    """One line that XML and a terminal can hold; what is invisible or no character becomes �."""
    words = " ".join(text.split())
    return "".join(
        char if char in JOINERS or unicodedata.category(char)[0] != "C" else "\ufffd"
        for char in words
    )


def _quoted(text: str) -> str:
    """A string of the DOT language, in which a backslash or an entity of HTML means nothing."""
    escaped = (
        text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    )
    return f'"{escaped}"'
