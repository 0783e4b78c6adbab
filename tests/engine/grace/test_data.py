"""GRACE's rows: column names that people have, split, negatives, shuffled epochs."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from tercet.engine.grace.config import GraceData
from tercet.engine.grace.data import Epochs, Example, drop_overlong, load_dataset
from tercet.engine.grace.prompts import PromptBuilder


@pytest.fixture
def dataset(tmp_path):
    """dataset(rows, **GraceData fields) -> Dataset, from JSON lines with nothing held out."""

    def load(rows, **settings):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_dataset(GraceData(path=str(path), **{"test_fraction": 0.0, **settings}))

    return load


WANTED = Example(query="q", document="d", negatives=("n1", "n2"))
FORMATS = {
    "grace": {"query": "q", "positive": "d", "negative": ["n1", "n2"]},
    "sentence-transformers": {
        "anchor": "q",
        "positive": "d",
        "negative_1": "n1",
        "negative_2": "n2",
    },
    "unordered": {"anchor": "q", "positive": "d", "negative_10": "n2", "negative_9": "n1"},
    "FlagEmbedding": {"query": "q", "pos": ["d"], "neg": ["n1", "n2"], "pos_scores": [1.0]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_column_names_that_people_have(dataset, name):
    found = dataset([FORMATS[name]])
    assert (found.train, found.notes, found.num_negatives) == ([WANTED], [], 2)


def test_graces_own_parquet(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "d"}]
    inner = {"query": "q", "instruction": "d", "negative_document": "n"}
    path = tmp_path / "train.parquet"
    table = pyarrow.Table.from_pylist([{"prompt": messages, "multi_input": inner}])
    pyarrow.parquet.write_table(table, path)
    found = load_dataset(GraceData(path=str(path)))
    assert found.train == [Example(query="q", document="d", negatives=("n",))]
    found = load_dataset(GraceData(path=str(path), mode="unsupervised"))
    assert found.train == [Example(document="d")]


def test_unsupervised_texts(tmp_path, dataset):
    (tmp_path / "wiki.txt").write_text("one\n\ntwo\n")
    with pytest.raises(ValueError, match=r"got .*wiki\.txt, a text .*; set --data\.mode unsuperv"):
        GraceData(path=str(tmp_path / "wiki.txt"))
    found = load_dataset(GraceData(path=str(tmp_path / "wiki.txt"), mode="unsupervised"))
    assert sorted(e.document for e in found.train) == ["one", "two"]
    assert all(e.query is None for e in found.train)
    assert found.notes == [f"{tmp_path / 'wiki.txt'}: 1 blank lines skipped"]
    found = dataset([{"question": "why"}], mode="unsupervised", columns={"text": "question"})
    assert found.train == [Example(document="why")]


def test_one_bad_row_is_no_matter_of_settings(dataset):
    with pytest.raises(
        ValueError, match=r"got only \['text'\] at .*:2; correct or delete the row$"
    ):
        dataset([{"query": "q", "positive": "a"}, {"text": "b"}])
    inner = {"query": "q", "instruction": "a"}
    with pytest.raises(ValueError, match=r"got only \['x'\] at .*:2; correct or delete the row$"):
        dataset([{"multi_input": inner}, {"x": "b"}])
    with pytest.raises(ValueError, match=r"got only \['x'\] at .*:2; correct or delete the row$"):
        dataset([{"prompt": [{"content": "a"}]}, {"x": "b"}], mode="unsupervised")
    with pytest.raises(
        ValueError, match=r"got only \['prompt'\] at .*:1; set data\.columns \(--data\.c"
    ):
        dataset([{"prompt": "a"}, {"x": "b"}], mode="unsupervised")


def test_every_positive_becomes_a_row(dataset):
    found = dataset([{"query": "q", "pos": ["a", "b"], "neg": []}])
    assert {e.document for e in found.train} == {"a", "b"}
    assert "1 rows with several positives became one row for each" in found.notes[0]
    assert "the negative term is off: 2 of 2 training rows have no negative" in found.notes


def test_rows_are_cut_to_the_negatives_that_all_have(dataset):
    rows = [{"query": f"q{i}", "pos": [f"d{i}"], "neg": list("abcd"[: 2 + i])} for i in range(3)]
    found = dataset(rows)
    assert {e.negatives for e in found.train} == {("a", "b")}
    assert found.notes == ["2 negatives per row are used, of 2 to 4"]
    assert dataset(rows, num_negatives=0).notes == ["the negative term is off: num_negatives is 0"]
    with pytest.raises(ValueError, match=r"^load_dataset: .*num_negatives=3 .*got 2 at .*jsonl:1;"):
        dataset(rows, num_negatives=3)


def test_remove_and_blank_rows_are_counted(dataset):
    rows = [
        {"query": "why", "positive": "2+2 = <<2+2=4>>4"},
        {"query": "<<x>> ", "positive": "lost"},
        {"query": "who", "positive": "  "},
    ]
    found = dataset(rows, remove="<<.*?>>")
    assert found.train == [Example(query="why", document="2+2 = 4")]
    assert "2 rows with a blank text skipped, first" in found.notes[0]
    assert found.notes[0].endswith("rows.jsonl:2")


def test_blank_negatives_are_none(dataset):
    row = {"query": "q", "positive": "d", "negative": [" ", "n", "<<x>>"]}
    found = dataset([row], remove="<.*>")
    assert found.train[0].negatives == ("n",)


def test_split_is_shuffled_seeded_and_loses_nothing(dataset):
    rows = [{"text": str(i)} for i in range(100)]
    settings = {"mode": "unsupervised", "test_fraction": 0.25}
    found = dataset(rows, **settings)
    test = [e.document for e in found.test]
    assert len(test) == 25
    assert sorted(test + [e.document for e in found.train], key=int) == [str(i) for i in range(100)]
    assert test != [str(i) for i in range(25)]
    assert dataset(rows, **settings) == found
    assert dataset(rows, split_seed=1, **settings).test != found.test


def test_held_out_rows_from_a_file_of_their_own(dataset, tmp_path):
    (tmp_path / "test.txt").write_text("held out\n")
    found = dataset([{"text": "a"}], mode="unsupervised", test_path=str(tmp_path / "test.txt"))
    assert (found.train, found.test) == ([Example(document="a")], [Example(document="held out")])


def test_repeated_documents_are_counted(dataset):
    found = dataset([{"text": "a"}, {"text": "a"}, {"text": "b"}], mode="unsupervised")
    assert found.notes == ["1 of 3 training rows repeat another row's document"]


BAD_ROWS = {
    "no query": (
        {"positive": "d"},
        r"column 'query' or 'anchor' must be there, .*:1; set data\.columns \(--data\.columns\) to",
    ),
    "no positive": ({"query": "q"}, r"column 'positive' or 'pos' must be there, .*rows\.jsonl:1"),
    "empty list": ({"query": "q", "pos": []}, r"must have a positive, got an empty list at .*:1"),
    "number": ({"query": "q", "pos": [3]}, r"column 'positive' must be a string, got int at .*:1"),
    "null": ({"query": None, "pos": ["d"]}, r"'query' must be a string, got NoneType at .*:1"),
    "bad negative": (
        {"query": "q", "positive": "d", "negative": {"a": 1}},
        r"column 'negative' must be a string, got dict at .*:1",
    ),
    "all blank": ({"query": " ", "positive": "d"}, r"a row that is not blank, got 1 blank ones in"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named(dataset, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(ValueError, match=f"^load_dataset: .*{message}"):
        dataset([row])


def test_texts_without_the_text_column_are_named(dataset):
    with pytest.raises(ValueError, match=r"column 'text' must be there, got only .* at .*:1"):
        dataset([{"query": "q"}], mode="unsupervised")


def test_no_training_rows_left(dataset):
    with pytest.raises(ValueError, match=r"^load_dataset: .* one training row, got none of 1 in"):
        dataset([{"text": "a"}], mode="unsupervised", test_fraction=0.9)


BAD_SETTINGS = {
    "test_fraction must be in [0, 1), got 1.0": {"test_fraction": 1.0},
    "mode must be one of ('supervised', 'unsupervised'), got 'both'": {"mode": "both"},
    "overlong must be one of ('truncate', 'drop'), got 'cut'": {"overlong": "cut"},
    "num_negatives must be >= 0, got -1": {"num_negatives": -1},
    "unsupervised data has no negatives, got num_neg": {"mode": "unsupervised", "num_negatives": 2},
    "remove must be a regular expression, got '('": {"remove": "("},
    "got 'question' as ours for 'query'; write query before question": {
        "columns": {"question": "query"}
    },
    "columns (--data.columns) must name ours (query, positive, negative, negative_1, ..., text) "
    "and behind each the file's, "
    "got 'title' as ours for 'body'; name what body is to us before it": {
        "columns": {"title": "body"}
    },
}


@pytest.mark.wrong_types
@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings(message):
    with pytest.raises(ValueError, match=r"^GraceData: ") as caught:
        GraceData(path="x.jsonl", **BAD_SETTINGS[message])
    assert message in str(caught.value)


def test_an_epoch_holds_every_row_once_and_nothing_is_dropped():
    epochs = Epochs(10, seed=0)
    dealt = [row for step in range(10) for row in epochs.rows(step * 3, 3)]  # three epochs
    for epoch in range(3):
        assert sorted(dealt[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert dealt[:10] != dealt[10:20] != dealt[20:]
    assert Epochs(10, seed=0).rows(21, 6) == dealt[21:27]  # a pure function of the position
    assert Epochs(10, seed=1).rows(0, 10) != dealt[:10]


def test_overlong_documents_can_be_dropped(dataset, tiny_tokenizer):
    builder = PromptBuilder(tiny_tokenizer, max_prompt_length=160)
    rows = [{"text": "the sea"}, {"text": "the river " * 50}]
    found = drop_overlong(dataset(rows, mode="unsupervised"), builder)
    assert found.train == [Example(document="the sea")]
    assert found.notes == ["1 of 2 training rows dropped: document above the limit"]
    with pytest.raises(ValueError, match=r"^drop_overlong: .* max_prompt_length=160, got 1 longer"):
        drop_overlong(dataset(rows[1:], mode="unsupervised"), builder)
