"""`tercet tree`: a tree of a saved forest, with the labels of a file."""

import json
import os

import pytest

from tercet import Forest, search, tree_to_dot, tree_to_json, tree_to_svg
from tercet.engine.cli import main


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A forest of two trees, of which the first is removed, and labels by handle."""
    monkeypatch.chdir(tmp_path)
    found = search("", lambda s: (0.5, [s + "a", s + "b"]), simulations=30)
    found.forest.save("search.forest")
    both = Forest.from_bytes(found.forest.to_bytes())
    both.remove_tree(0)
    both.add_tree(7, 5)
    both.save("second.forest")
    labels = dict(zip(found.columns.handle.tolist(), found.states, strict=True))
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "list.json").write_text(json.dumps(["root", "first <b>"]))
    (tmp_path / "cut.json").write_text('{"0": ')
    (tmp_path / "number.json").write_text("3")
    return found


def test_prints_what_python_would(saved, capsys):
    columns, title = saved.columns, "search.forest, tree 0"
    for options, text in {
        (): tree_to_svg(columns, title=title),
        ("--format", "dot"): tree_to_dot(columns, title=title),
        ("--format", "json"): tree_to_json(columns),
        ("--labels", "labels.json"): tree_to_svg(columns, saved.states, title=title),
        ("--max-nodes", "4"): tree_to_svg(columns, max_nodes=4, title=title),
        ("--format", "json", "--labels", "labels.json"): tree_to_json(columns, saved.states),
    }.items():
        assert main(["tree", "search.forest", *options]) == 0
        assert capsys.readouterr().out == text


def test_labels_may_be_a_list_and_be_too_few(saved, capsys):
    assert main(["tree", "search.forest", "--labels", "list.json", "--format", "json"]) == 0
    labels = [node["label"] for node in json.loads(capsys.readouterr().out)]
    assert labels[:2] == ["root", "first <b>"]
    assert labels[2:] == [f"#{handle}" for handle in saved.columns.handle[2:]]


def test_writes_a_file_and_names_it(saved, tmp_path, capsys):
    assert main(["tree", "second.forest", "--tree", "1", "--output", "tree.svg"]) == 0
    assert capsys.readouterr().out == "tree.svg\n"
    drawn = (tmp_path / "tree.svg").read_text()
    assert "second.forest, tree 1" in drawn
    assert "#7" in drawn


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["none.forest"], "No such file or directory: 'none.forest'"),
        (["labels.json"], "does not begin as one"),
        (["second.forest"], "a tree that was not removed, got 0; trees in second.forest: 1"),
        (["search.forest", "--tree", "1"], "got 1; trees in search.forest: 1"),
        (["search.forest", "--tree", "-1"], "got -1"),
        (["search.forest", "--tree", str(2**32)], f"got {2**32}"),
        (["search.forest", "--max-nodes", "0"], "max_nodes must be >= 1, got 0"),
        (["search.forest", "--labels", "cut.json"], "cut.json must be JSON"),
        (["search.forest", "--labels", "search.forest"], "search.forest must be JSON"),
        (["search.forest", "--labels", "number.json"], "list of labels, or an object"),
        (["search.forest", "--output", "none/t.svg"], "got no none; make it"),
        (["search.forest", "--output", "."], "a folder, pipe or device"),
        (["search.forest", "--output", "fifo"], "a folder, pipe or device"),
        (["search.forest", "--output", "search.forest"], "another file than search.forest"),
        (["search.forest", "--output", "link"], "another file than search.forest"),
        (["search.forest", "--labels", "list.json", "--output", "list.json"], "than list.json"),
    ],
)
def test_what_is_wrong_is_one_line(saved, capsys, options, said):
    os.mkfifo("fifo")
    os.symlink("search.forest", "link")
    assert main(["tree", *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tercet tree: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1
