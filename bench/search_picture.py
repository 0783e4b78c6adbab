"""A search for 24 from four numbers, drawn as docs/images/search_tree.svg.

    python bench/search_picture.py

A state is the numbers that are left and the step that led there; a step puts two of them together.
The value of a state is a rough guess, as a model's would be: how near to 24 one more step leads.
"""

from fractions import Fraction
from itertools import combinations
from pathlib import Path

from tercet import SearchResult, search, tree_to_svg

NUMBERS = (1, 5, 5, 5)
TARGET = 24
State = tuple[str, tuple[Fraction, ...]]


def written(number: Fraction) -> str:
    return str(number) if number.denominator == 1 else f"({number})"


def steps(numbers: tuple[Fraction, ...]) -> list[State]:
    """What two of the numbers can become, each with the numbers that are then left."""
    found: dict[tuple[Fraction, ...], str] = {}
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        low, high = sorted((numbers[i], numbers[j]))
        x, y = written(low), written(high)
        results = {f"{y} - {x}": high - low, f"{x} + {y}": low + high, f"{x} × {y}": low * high}
        results |= {f"{y} / {x}": high / low} if low else {}
        results |= {f"{x} / {y}": low / high} if high else {}
        for text, result in results.items():
            found.setdefault(tuple(sorted([*rest, result])), text)
    return [(text, left) for left, text in found.items()]


def guess(numbers: tuple[Fraction, ...]) -> float:
    """1 for a way to 24 in one step, less the further the nearest result is from it."""
    nearest = min(abs(left[-1] - TARGET) for _, left in steps(numbers))
    return float(1 / (1 + nearest / 8))


def expand(state: State) -> tuple[float, list[State]]:
    _, numbers = state
    if len(numbers) == 1:
        return float(numbers[0] == TARGET), []
    return guess(numbers) * (1 if len(numbers) == 2 else 0.5), steps(numbers)


def label(state: State) -> str:
    step, numbers = state
    left = " ".join(map(written, numbers))
    return f"{step} → {left}" if step else left


def find() -> SearchResult[State]:
    """The search that is drawn."""
    root = ("", tuple(map(Fraction, NUMBERS)))
    return search(root, expand, simulations=400, c_uct=0.4)


def picture() -> str:
    found = find()
    labels = [label(state) for state in found.states]
    return tree_to_svg(found.columns, labels, max_nodes=36, title="24 from 1, 5, 5 and 5")


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "images" / "search_tree.svg"
    path.write_text(picture(), encoding="utf-8")
