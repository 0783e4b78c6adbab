"""What `tercet grace eval` measures on: the run's held-out rows, and what is said about others."""

import json
from dataclasses import replace

import pytest

from tercet.engine.config import to_plain
from tercet.engine.grace.config import GraceConfig, GraceData, GraceEval
from tercet.engine.grace.data import Example, data_digests, load_dataset, num_shared
from tercet.engine.grace.held_out import EvalData, held_out

ROWS = [{"question": f"cat {i}?", "positive": f"dog {i}"} for i in range(10)]
RUN = {"columns": {"query": "question"}, "test_fraction": 0.4, "split_seed": 3, "remove": r"\?"}


@pytest.fixture
def make_run(tmp_path):
    """make_run(**GraceData fields): a checkpoint that says it was trained so; its data settings."""

    def make(rows=ROWS, evaluation=None, **settings):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = GraceData(path=str(path), **{**RUN, **settings})
        folder = tmp_path / "checkpoint-1"
        folder.mkdir(exist_ok=True)
        saved = {
            "settings": to_plain(
                GraceConfig(model="m", data=data, evaluation=evaluation or GraceEval())
            ),
            "data_sha256": data_digests(data),
        }
        (folder / "tercet.json").write_text(json.dumps(saved))
        return str(folder), data

    return make


def pairs_of(data):
    return pairs(load_dataset(data).test)


def pairs(examples):
    return [(e.query, e.document) for e in examples]


def test_the_rows_are_those_that_the_run_held_out(make_run):
    model, data = make_run(num_negatives=0)
    found = held_out(model, EvalData())
    other = pairs_of(GraceData(path=data.path, columns=RUN["columns"]))
    assert pairs(found.examples) == pairs_of(data) != other
    assert len(found.examples) == 4
    assert (found.num_trained_on, found.notes) == (0, [])
    assert found.run == GraceConfig(model="m", data=replace(data, num_negatives=None))


def test_texts_alone_are_held_out_as_pairs_are(make_run):
    model, data = make_run(mode="unsupervised", columns={"text": "positive"}, remove=None)
    found = held_out(model, EvalData())
    assert pairs(found.examples) == pairs_of(data)
    assert {query for query, _ in pairs(found.examples)} == {None}
    assert len(found.examples) == 4
    assert (found.num_trained_on, found.notes) == (0, [])


def test_as_many_rows_are_measured_as_the_run_did(make_run):
    model, data = make_run(evaluation=GraceEval(num_texts=3))
    found = held_out(model, EvalData())
    assert pairs(found.examples) == pairs_of(data)[:3]
    assert found.notes == [
        "the first 3 of 4 held-out rows are measured, as in training; --data.num-texts 4 "
        "measures all"
    ]
    for wanted in (4, 2):
        found = held_out(model, EvalData(num_texts=wanted))
        assert (pairs(found.examples), found.notes) == (pairs_of(data)[:wanted], [])
    model, data = make_run(evaluation=GraceEval(num_texts=0))  # in training: none
    assert pairs(held_out(model, EvalData()).examples) == pairs_of(data)
    with pytest.raises(ValueError, match=r"^EvalData: num_texts must be >= 2, got 1"):
        EvalData(num_texts=1)


def test_another_split_is_said_and_what_it_shares_with_training_is_counted(make_run):
    model, data = make_run()
    found = held_out(model, EvalData(test_fraction=0.9, split_seed=0))
    trained = {(e.query, e.document) for e in load_dataset(data).train}
    expected = sum(pair in trained for pair in pairs(found.examples))
    assert found.num_trained_on == expected > 0
    assert found.notes == [
        "not the held-out rows of the run (test_fraction 0.4 -> 0.9, split_seed 3 -> 0)",
        f"{expected} of 9 rows measured are rows that the run trained on",
    ]


def test_another_removal_is_said(make_run):
    model, _ = make_run()
    found = held_out(model, EvalData(remove="cat"))
    assert "not the held-out rows of the run (remove '\\\\?' -> 'cat')" in found.notes


def test_negatives_that_the_rows_lack_are_not_asked_for(make_run, tmp_path):
    model, _ = make_run([{**row, "negative": "fish"} for row in ROWS], num_negatives=1)
    (tmp_path / "test.jsonl").write_text('{"question": "a", "positive": "b"}\n')
    found = held_out(model, EvalData(test_path=str(tmp_path / "test.jsonl")))
    assert pairs(found.examples) == [("a", "b")]


def test_another_fraction_splits_the_training_file_and_not_the_runs_test_file(make_run, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "a", "positive": "b"}) + "\n")
    model, data = make_run(test_path=str(tmp_path / "test.jsonl"))
    found = held_out(model, EvalData())
    assert (pairs(found.examples), found.source) == ([("a", "b")], data.test_path)
    assert pairs(held_out(model, EvalData(path=data.path)).examples) == [("a", "b")]
    found = held_out(model, EvalData(test_fraction=0.3))
    assert (len(found.examples), found.num_trained_on) == (3, 3)
    assert found.source == (
        f"the 3 of 10 rows of {data.path} that a shuffle holds out (test_fraction 0.3, "
        "split_seed 3)"
    )


def test_equal_rows_on_both_sides_of_the_split_are_counted(make_run):
    model, data = make_run([*ROWS, *ROWS, *ROWS], test_fraction=0.2)
    found = held_out(model, EvalData())
    assert found.num_trained_on
    both = f"{found.num_trained_on} of 6 held-out rows are training rows too"
    assert both in load_dataset(data).notes
    assert found.notes == [
        f"{found.num_trained_on} of 6 rows measured are rows that the run trained on"
    ]


def test_a_text_trained_on_alone_counts_on_either_side():
    train = [Example(document="a"), Example(document="b", query="c")]
    test = [("a", "x"), ("x", "a"), ("c", "b"), ("c", "x"), ("x", "b")]
    shared = [num_shared([Example(query=q, document=d)], train) for q, d in test]
    assert shared == [1, 1, 1, 0, 0]


def test_what_cannot_be_known_is_said(make_run, tmp_path, monkeypatch):
    model, _ = make_run()
    moved = str((tmp_path / "pairs.jsonl").rename(tmp_path / "moved.jsonl"))
    with pytest.raises(
        FileNotFoundError, match=r"got no .*pairs\.jsonl; set --data\.path to where"
    ):
        held_out(model, EvalData())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no no.jsonl \(a .* {tmp_path}\); set --data\."):
        held_out(model, EvalData(path="no.jsonl"))
    before = held_out(model, EvalData(path=moved))
    assert (len(before.examples), before.num_trained_on, before.notes) == (
        4,
        0,
        [],
    )  # the same file
    (tmp_path / "other.jsonl").write_text((tmp_path / "moved.jsonl").read_text() + "\n")
    found = held_out(model, EvalData(path=str(tmp_path / "other.jsonl")))
    assert found.num_trained_on is None
    assert "not the held-out rows of the run (path " in found.notes[0]
    assert found.notes[1].endswith(
        "not known: its " + moved.replace("moved", "pairs") + " is not here"
    )
    (tmp_path / "other.jsonl").rename(tmp_path / "pairs.jsonl")
    found = held_out(model, EvalData())
    assert found.num_trained_on is None
    assert found.notes[0].endswith("pairs.jsonl has changed since")
    (tmp_path / "checkpoint-1" / "tercet.json").write_text('{"settings": {"method": "info_nce"}}')
    found = held_out(model, EvalData(path=moved, columns=RUN["columns"], test_fraction=0.5))
    assert (len(found.examples), found.num_trained_on) == (5, None)
    assert "does not say which rows" in found.notes[0]


def test_a_model_without_a_run_needs_a_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"^eval: the rows .*set --data\.path or --data\.test-path"
    ):
        held_out("some/model", EvalData())
    (tmp_path / "t.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    found = held_out("some/model", EvalData(test_path=str(tmp_path / "t.jsonl")))
    assert (pairs(found.examples), found.num_trained_on, found.notes) == ([("a", "b")], None, [])
