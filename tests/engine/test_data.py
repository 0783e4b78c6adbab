"""read_rows: three formats, column names, and errors that name file and line."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from tercet.engine.data import read_rows


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_keeps_order_lines_and_counts_blank_lines(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n  \n{"text": "two", "n": 3}\r\n')
    with caplog.at_level(logging.INFO):
        rows = read_rows(path, ["text"])
    assert rows == [{"text": "one"}, {"text": "two", "n": 3}]
    assert (rows.lines, rows.blank_lines) == ([1, 4], 2)
    assert rows.where(1) == f"{path}:4"
    assert "2 blank lines skipped" in caplog.text


def test_txt_is_one_text_per_line_with_its_own_spaces(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff first \u2028 line\n\nlast line without end")
    rows = read_rows(path, ["text"])
    assert rows == [{"text": " first \u2028 line"}, {"text": "last line without end"}]
    assert (rows.lines, rows.blank_lines) == ([1, 3], 1)


def test_parquet_equals_jsonl(tmp_path):
    table = [{"query": f"q{i}", "neg": [f"n{i}", "x"]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    jsonl = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in table))
    from_parquet, from_jsonl = read_rows(tmp_path / "a.parquet", ["query"]), read_rows(jsonl)
    assert from_parquet == from_jsonl == table
    assert from_parquet.lines == [1, 2, 3, 4, 5]


def test_columns_rename_ours_from_theirs(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "why", "answer": "so", "query": "old"}\n')
    rows = read_rows(path, ["query", "positive"], {"query": "question", "positive": "answer"})
    assert rows == [{"query": "why", "positive": "so"}]


LINES = {
    "not JSON": ('{"text": "a"}\n{"text": \n', r"got not JSON \(.*\) at .*a\.jsonl:2"),
    "too deep": ('{"text": "a"}\n' + "[" * 100_000, r"got not JSON \(.*\) at .*a\.jsonl:2"),
    "long number": ("9" * 5000, r"got not JSON \(.*\) at .*a\.jsonl:1"),
    "not an object": ('{"text": "a"}\n\n["b"]\n', r"one JSON object, got list at .*a\.jsonl:3"),
    "missing": (
        '{"text": "a"}\n{"body": "b"}\n',
        r"'text' must be there, got only \['body'\] at .*:2; call it so in the file",
    ),
    "not a string": ('{"text": "a"}\n{"text": 7}\n', r"'text' must be a string, got int at .*:2"),
    "null": ('{"text": null}\n', r"'text' must be a string, got NoneType at .*:1"),
    "half a surrogate": ('{"text": "\\ud800"}\n', r"'text' must be Unicode text, got .* at .*:1"),
    "not UTF-8": (
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"must be UTF-8, got .* at .*a\.jsonl:2",
    ),
    "empty": ("", r"at least one row, got an empty file .*a\.jsonl \(0 blank lines\)"),
    "only blank lines": (
        "\n \n",
        r"at least one row, got an empty .*a\.jsonl \(2 blank lines\)",
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_line_is_named(tmp_path, name):
    text, message = LINES[name]
    with pytest.raises(ValueError, match=f"^read_rows: .*{message}"):
        read_rows(write(tmp_path / "a.jsonl", text), ["text"])


def test_bad_path_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"^read_rows: the data file must exist, got .*no"):
        read_rows(tmp_path / "no.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"got no no.jsonl \(a .* {tmp_path}\); check"):
        read_rows("no.jsonl")
    with pytest.raises(ValueError, match=r"^read_rows: path must be a file, got the folder"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"^read_rows: the file name must end in .*a\.csv"):
        read_rows(write(tmp_path / "a.csv", "text\na\n"))
    with pytest.raises(ValueError, match=r"^read_rows: .* readable Parquet, got .*a\.parquet"):
        read_rows(write(tmp_path / "a.parquet", "no parquet"))
    with pytest.raises(ValueError, match=r"^read_rows: path must be a file, got the device"):
        read_rows("/dev/null")
    with pytest.raises(
        ValueError, match=r"'question' \(as 'query'\) must .*:1; set columns \(--data\."
    ):
        read_rows(write(tmp_path / "a.jsonl", '{"q": "a"}\n'), ["query"], {"query": "question"})


def damaged(path):
    data = path.read_bytes()
    path.write_bytes(b"PAR1" + b"\xff" * (len(data) - 12) + data[-8:])


def not_utf8(path):
    table = pyarrow.table({"text": pyarrow.array([b"\xff"]).view(pyarrow.string())})
    pyarrow.parquet.write_table(table, path)


@pytest.mark.parametrize("change", [damaged, not_utf8])
def test_a_damaged_parquet_file_is_one_line_with_its_name(tmp_path, change):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), path)
    change(path)
    with pytest.raises(ValueError, match=r"readable Parquet, got .*a\.parquet; write it") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
