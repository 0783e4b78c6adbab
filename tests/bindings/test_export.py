"""Trees as JSON, DOT and SVG: complete, true to the columns, and safe from what labels say."""

import json
import math
import random
import re
import runpy
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from tercet import Forest, search, tree_to_dot, tree_to_json, tree_to_svg
from tercet._tree_svg import HEIGHT, ColourScale, Node, tidy

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]> & &lt; <!-- --> ' \\",
    "a\x00b\x1b[31m\ud800\ufffe",
    "\u202egnirts desrever",
    r'quote " and \" end ' + "\\",
    "one\r\ntwo\n\n  three\u2028four",
    "長" * 80,
    "z" + "\u0336" * 4000,
    "x" * 5000,
    "",
]


def grow(simulations, seed=1, **settings):
    """A search over strings with values of both signs, some ends, and four children at most."""
    rng = random.Random(seed)

    def look(state: str):
        number = 0 if state and rng.random() < 0.15 else rng.randint(2, 4)
        return rng.uniform(-1, 1), [f"{state}{i}" for i in range(number)]

    return search("", look, simulations=simulations, **settings)


def chain(length: int):
    return search("", lambda s: (0.5, [s + "a"][: length - len(s)]), simulations=length + 1)


def cards(svg: str) -> list[str]:
    """The first line of each tooltip: the labels of the nodes that are drawn."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    titles = [group.find(f"{SVG}title") for group in groups]
    return [(title.text or "").split("\n")[0] for title in titles if title is not None]


def test_json_has_every_node_as_the_columns_have_it():
    forest = Forest(max_in_flight=2, visits_per_flight=1)
    tree = forest.add_tree(2**62 + 1, 50)
    for _ in range(3):
        leaves = forest.ask(2)
        n = len(leaves)
        handles = np.arange(2 * n) + 10 * int(leaves.ticket[0])
        forest.tell(leaves.ticket, np.linspace(-1, 1, n), np.full(n, 2, np.uint32), handles)
    forest.ask(1)
    columns = forest.columns(tree)
    nodes = json.loads(tree_to_json(columns, HOSTILE[: len(columns)]))
    assert [node["row"] for node in nodes] == list(range(len(columns)))
    assert nodes[0]["parent"] is None
    assert nodes[0]["handle"] == 2**62 + 1
    assert [node["parent"] for node in nodes[1:]] == columns.parent[1:].tolist()
    for name in ("depth", "visits", "in_flight", "total", "handle"):
        assert [node[name] for node in nodes] == getattr(columns, name).tolist(), name
    assert sum(node["in_flight"] for node in nodes) > 0
    assert [node["label"] for node in nodes] == HOSTILE[: len(columns)]
    for node in nodes:
        mean = node["total"] / node["visits"] if node["visits"] else None
        assert node["value"] == mean
    assert "label" not in json.loads(tree_to_json(columns))[0]


def test_json_says_which_nodes_are_ends():
    found = grow(60)
    nodes = json.loads(tree_to_json(found.columns, found.states))
    assert [node["terminal"] for node in nodes] == [bool(t) for t in found.columns.terminal]
    assert len({node["terminal"] for node in nodes}) == 2


@pytest.mark.parametrize("limit", [1, 2, 7, 30])
def test_a_picture_shows_the_best_path_and_the_most_visited_and_counts_the_others(limit):
    found = grow(200, c_uct=100.0)
    assert len(found.states) > 60
    svg = tree_to_svg(found.columns, found.states, max_nodes=limit)
    drawn = cards(svg)
    rows = [found.states.index(label) for label in drawn]
    assert len(set(rows)) == len(rows) == limit
    path = found.best_nodes
    assert set(path[:limit]) <= set(rows)
    assert {int(found.columns.parent[row]) for row in rows} - {-1} <= set(rows)
    others = sorted(set(range(len(found.states))) - set(rows))
    least = min((found.visits[row] for row in set(rows) - set(path)), default=math.inf)
    assert least >= max(found.visits[row] for row in set(others) - set(path))
    total, never = len(found.states), int((found.visits == 0).sum())
    said = f"{limit} most visited are drawn, {total - limit} are left out ({never} were never"
    assert said in svg
    assert said in tree_to_dot(found.columns, max_nodes=limit)
    stubs = re.findall(r"(\d+) children left out", svg)
    parents = [found.columns.parent[row] for row in others]
    assert sum(map(int, stubs)) == sum(parent in rows for parent in parents)


def test_the_best_path_is_drawn_before_nodes_with_more_visits():
    def look(state: str):
        return float(state == "33"), [state + digit for digit in "0123" if len(state) < 2]

    found = search("", look, simulations=21, c_uct=1e6)
    assert found.visits.tolist() == [21, *[5] * 4, *[1] * 16]
    drawn = cards(tree_to_svg(found.columns, found.states, max_nodes=5))
    assert sorted(drawn) == ["", "0", "1", "3", "33"]


def test_a_whole_tree_says_so():
    found = grow(8)
    svg = tree_to_svg(found.columns, found.states, max_nodes=500)
    assert sorted(cards(svg)) == sorted(found.states)
    assert f"8 visits, {len(found.states)} nodes, all drawn" in svg
    assert "children left out" not in svg


def test_without_labels_the_handles_are_drawn():
    assert cards(tree_to_svg(chain(2).columns)) == ["#0", "#1", "#2"]


@pytest.mark.parametrize("label", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_label_stays_text(label):
    columns = chain(1).columns
    svg = tree_to_svg(columns, [label, "other"], title=label)
    tree = ElementTree.fromstring(svg.encode("utf-8"))
    assert {element.tag.removeprefix(SVG) for element in tree.iter()} <= {
        "svg", "title", "rect", "g", "path", "text", "defs", "linearGradient", "stop",
    }  # fmt: skip
    for element in tree.iter():
        assert not [name for name in element.attrib if name.startswith("on") or "href" in name]
    shown = "".join(tree.itertext())
    assert not set(shown) & set("\x00\x1b\u202e\ufffe\u2028\r")
    card = next(tree.iter(f"{SVG}g"))
    assert card is not None
    texts = [t.text or "" for t in tree.iter(f"{SVG}text")]
    assert all(len(text) <= 60 for text in texts[2:])
    assert len(svg) < 30_000


def test_invisible_and_broken_characters_are_seen_and_joined_emoji_stay():
    columns = chain(2).columns
    labels = ["a\x00b\u202ec\ud800", "👩\u200d🔬", "one\n\ttwo"]
    assert cards(tree_to_svg(columns, labels)) == ["a�b�c�", "👩\u200d🔬", "one two"]


def test_a_long_label_is_cut_where_one_sees_it_and_counted_in_the_tooltip():
    svg = tree_to_svg(chain(1).columns, ["x" * 5000, "長" * 80])
    assert f">{'x' * 27}…<" in svg
    assert f">{'長' * 13}…<" in svg
    assert f">{'x' * 600}… (4400 more characters)\n" in svg
    assert f">{'長' * 80}\n" in svg
    accents = "e\u0301" * 26  # as wide as 26 letters
    assert f">{accents}<" in tree_to_svg(chain(1).columns, [accents, ""])


def test_dot_quotes_labels_and_draws_each_edge_once(tmp_path):
    found = chain(len(HOSTILE) - 1)
    dot = tree_to_dot(found.columns, HOSTILE, title='a "title" \\')
    strings = r'"(?:[^"\\]|\\.)*"'
    bare = re.sub(strings, "S", dot)  # what is left outside of quoted strings
    assert re.fullmatch(r"[\w\s\[\]={};,>.-]+", bare)
    assert re.findall(r"n(\d+) -> n(\d+)", bare) == [
        (str(i), str(i + 1)) for i in range(len(HOSTILE) - 1)
    ]
    assert r'[label="quote \" and \\\" end \\\n' in dot  # " and \" and \, each with one \ more
    assert '[label="]]> &amp; &amp;lt; <!-- -->' in dot  # Graphviz reads entities in any string
    assert dot.count("fillcolor") == len(HOSTILE)
    if program := shutil.which("dot"):
        subprocess.run([program, "-Tsvg"], input=dot.encode(), check=True, capture_output=True)


def node(row: int, parent: int | None, depth: int, value: float | None = 0.0) -> Node:
    return Node(
        row=row, parent=parent, depth=depth, visits=1, value=value, in_flight=0, hidden=0,
        label="", full_label="", is_end=False, is_best=False,
    )  # fmt: skip


def test_cards_of_a_depth_do_not_overlap_and_parents_stand_midway():
    for seed in range(50):
        rng = random.Random(seed)
        parents = [None] + [rng.randrange(max(0, i - 6), i) for i in range(1, 60)]
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent is None else depths[parent] + 1)
        places = tidy([node(i, parents[i], depths[i]) for i in range(60)])
        for depth in set(depths):
            ys = [places[i] for i in range(60) if depths[i] == depth]
            assert all(np.diff(sorted(ys)) >= HEIGHT + 4)
        for i in range(60):
            own = [places[j] for j in range(60) if parents[j] == i]
            assert own == sorted(own)
            if own:
                assert places[i] == pytest.approx((own[0] + own[-1]) / 2)


def test_a_deep_tree_is_drawn_without_recursion():
    found = chain(3000)
    svg = tree_to_svg(found.columns, max_nodes=5000)
    assert len(cards(svg)) == 3001
    assert json.loads(tree_to_json(found.columns))[-1]["depth"] == 3000


def test_colours_are_values_and_the_same_on_both_sides_of_zero():
    def scale(*values):
        return ColourScale.of([node(i, 0, 1, value=value) for i, value in enumerate(values)])

    both = scale(-0.5, 0.0, 2.0, None)
    assert (both.low, both.high) == (-2, 2)
    assert both.colour(-2) == "#f1b48a"
    assert both.colour(0) == "#f7f3ea"
    assert both.colour(2) == "#8abde4"
    assert both.colour(None) == "#ffffff"
    up, down = scale(0.2, 0.6), scale(-0.6, -0.2)
    assert (up.colour(0.2), up.colour(0.6)) == ("#f7f3ea", "#8abde4")
    assert (down.colour(-0.6), down.colour(-0.2)) == ("#f1b48a", "#f7f3ea")
    assert up.colour(0.4) == "#c0d8e7"
    assert scale(1.0, 1.0).colour(1.0) == scale(3.0).colour(3.0) == "#c0d8e7"
    assert scale(-1e300, 1e300).colour(0.0) == "#f7f3ea"
    assert scale().colour(None) == "#ffffff"


def test_a_tree_that_nobody_visited_is_drawn():
    forest = Forest()
    forest.add_tree(5, 3)
    svg = tree_to_svg(forest.columns(0))
    assert cards(svg) == ["#5"]
    assert "never visited" in svg
    assert "->" not in tree_to_dot(forest.columns(0))
    assert json.loads(tree_to_json(forest.columns(0)))[0]["value"] is None


def test_what_is_in_flight_is_named():
    forest = Forest(max_in_flight=4, visits_per_flight=1)
    forest.add_tree(0, 9)
    leaves = forest.ask(1)
    forest.tell(leaves.ticket, np.zeros(1), np.array([2], np.uint32), np.array([1, 2]))
    assert " out" not in tree_to_svg(forest.columns(0))
    forest.ask(2)
    svg = tree_to_svg(forest.columns(0))
    assert "1 · 0.00 · 2 out" in svg
    assert "2 in flight" in svg


@pytest.mark.parametrize("draw", [tree_to_json, tree_to_dot, tree_to_svg])
def test_labels_must_be_as_many_as_nodes(draw):
    with pytest.raises(ValueError, match=rf"{draw.__name__}: labels must be .* 3, got 1"):
        draw(chain(2).columns, ["a"])


@pytest.mark.parametrize("draw", [tree_to_dot, tree_to_svg])
def test_no_nodes_at_all_are_refused(draw):
    with pytest.raises(ValueError, match=f"{draw.__name__}: max_nodes must be >= 1, got 0"):
        draw(chain(2).columns, max_nodes=0)


def test_the_picture_of_the_page_is_what_its_command_draws():
    script = runpy.run_path(str(ROOT / "bench" / "search_picture.py"))
    drawn = (ROOT / "docs" / "images" / "search_tree.svg").read_text(encoding="utf-8")
    assert script["picture"]() == drawn
    assert [script["label"](state) for state in script["find"]().best_path] == [
        "1 5 5 5", "1 / 5 → (1/5) 5 5", "5 - (1/5) → (24/5) 5", "(24/5) × 5 → 24",
    ]  # fmt: skip
