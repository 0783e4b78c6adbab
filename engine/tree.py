"""One search tree of a saved forest, as a picture, for Graphviz, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tercet import Forest, tree_to_dot, tree_to_json, tree_to_svg
from tercet._mcts import TreeColumns
from tercet.engine.command_line import OneLineParser
from tercet.engine.files import check_output, replace_text


def read_labels(path: Path, handles: Sequence[int]) -> list[str]:
    """A label for each handle from a JSON list, or from an object with handles for keys.

    A handle without one is written as #handle.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tree: {path} must be JSON, got {error}; see --help") from error
    if isinstance(found, list):
        found = {str(handle): label for handle, label in enumerate(found)}
    if not isinstance(found, dict):
        raise ValueError(
            f"tree: {path} must hold a list of labels, or an object with handles for keys, "
            f"got {type(found).__name__}"
        )
    return [str(found.get(str(handle), f"#{handle}")) for handle in handles]


def export(
    snapshot: Path, *, tree: int, form: str, labels: Path | None = None, max_nodes: int = 60
) -> str:
    """A tree of the forest in a file that `Forest.save` wrote.

    Args:
        form: svg, dot or json.
        labels: see `read_labels`.
        max_nodes: of a picture; JSON has all.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no snapshot; the forest has no such tree; labels; max_nodes.
    """
    columns = _columns(Forest.load(snapshot), tree, snapshot)
    texts = None if labels is None else read_labels(labels, columns.handle.tolist())
    if form == "json":
        return tree_to_json(columns, texts)
    draw = tree_to_dot if form == "dot" else tree_to_svg
    return draw(columns, texts, max_nodes=max_nodes, title=f"{snapshot.name}, tree {tree}")


def _columns(forest: Forest, tree: int, snapshot: Path) -> TreeColumns:
    try:
        if 0 <= tree < 2**32:
            return forest.columns(tree)
    except IndexError:
        pass
    raise ValueError(
        f"tree: --tree must be a number that add_tree gave for a tree that was not removed, got "
        f"{tree}; trees in {snapshot}: {forest.counters().trees}"
    )


def _check_output(path: Path, read: Sequence[Path]) -> None:
    check_output(path, "tree: --output")
    for source in read:
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(
                f"tree: --output must be another file than {source}, which is read, got {path}; "
                "name another"
            )


def main(argv: list[str], prog: str) -> int:
    """Writes the tree to a file, or prints it."""
    parser = OneLineParser(prog=prog, description=__doc__)
    parser.add_argument("snapshot", type=Path, help="a file that Forest.save wrote")
    parser.add_argument("--tree", type=int, default=0, help="its number in the forest; default: 0")
    parser.add_argument("--format", choices=["svg", "dot", "json"], default="svg")
    parser.add_argument(
        "--labels", type=Path, help="JSON: labels by handle, as a list or an object"
    )
    parser.add_argument(
        "--max-nodes", type=int, default=60, help="that are drawn, the most visited; JSON has all"
    )
    parser.add_argument("--output", type=Path, help="default: standard output")
    args = parser.parse_args(argv)
    if args.output is not None:
        _check_output(args.output, [args.snapshot, *([args.labels] if args.labels else [])])
    text = export(
        args.snapshot,
        tree=args.tree,
        form=args.format,
        labels=args.labels,
        max_nodes=args.max_nodes,
    )
    if args.output is None:
        sys.stdout.write(text)
    else:
        replace_text(args.output, text)
        sys.stdout.write(f"{args.output}\n")
    return 0
