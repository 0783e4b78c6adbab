"""Rows of text from JSON lines, plain text or Parquet, each with the place it came from."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tercet.engine.files import placed

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".txt", ".parquet")


class Rows(list[dict[str, object]]):
    """A list of rows that also knows its file, each row's line, and how many lines were blank."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.lines: list[int] = []  # 1-based line (or Parquet row) of each row
        self.blank_lines = 0  # lines without text, which are not rows

    def where(self, index: int) -> str:
        """`file:line` of row `index`, for error messages."""
        return f"{self.path}:{self.lines[index]}"


def read_rows(
    path: str | Path,
    required: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """All rows of one file as dictionaries, in file order.

    Blank lines are no rows: they are counted in `blank_lines`, for the caller to show.

    `.jsonl` holds one JSON object per line, `.txt` one text per line (column `text`), `.parquet` a
    table.

    Args:
        path: one file; the suffix says the format.
        required: columns that every row must have as a string (names after `columns` is applied).
        columns: our name -> the file's name, for files that call a column otherwise; the other
            columns keep their names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file, unknown suffix, no rows, or, with file and line: text that is not
            UTF-8, not JSON, not a JSON object, a column that is missing or not a string.
    """
    path = Path(path)
    check_file(path)
    rows = Rows(path)
    numbered = _parquet_rows(path) if path.suffix == ".parquet" else _text_rows(path, rows)
    for line, row in numbered:
        rows.append(_renamed(row, columns or {}, f"{path}:{line}"))
        rows.lines.append(line)
        _check_columns(rows[-1], required, columns or {}, f"{path}:{line}")
    if not rows:
        raise ValueError(
            f"read_rows: the dataset must have at least one row, got an empty file {path} "
            f"({rows.blank_lines} blank lines)"
        )
    if rows.blank_lines:
        logger.info("read_rows: %s: %d blank lines skipped", path, rows.blank_lines)
    return rows


def check_file(path: Path) -> None:
    """Refuses what `read_rows` cannot open.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file, or an unknown suffix.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"read_rows: the data file must exist, got no {placed(path)}; check the path"
        )
    if not path.is_file():
        got = f"the folder {path}; name one file in it"
        if not path.is_dir():
            got = f"the device or pipe {path}; write its rows into a file"
        raise ValueError(f"read_rows: path must be a file, got {got}")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"read_rows: the file name must end in {', '.join(SUFFIXES)}, got {path}; "
            "convert or rename the file"
        )


def check_text(function: str, column: str, value: object, where: str) -> str:
    """`value` as a string that can be encoded.

    Raises:
        ValueError: not a string, or one with half of a surrogate pair, which JSON can spell.
    """
    if not isinstance(value, str):
        raise ValueError(
            f"{function}: column {column!r} must be a string, got {type(value).__name__} at {where}"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{function}: column {column!r} must be Unicode text, got {error.reason} at {where}"
            ) from error
    return value


def _text_rows(path: Path, rows: Rows) -> Iterator[tuple[int, dict[str, object]]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            where = f"{path}:{line}"
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"read_rows: text must be UTF-8, got {error} at {where}"
                ) from error
            if not text.strip():
                rows.blank_lines += 1
            elif path.suffix == ".txt":
                yield line, {"text": text}
            else:
                yield line, _json_object(text, where)


def _json_object(text: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or a 5,000-digit number
        raise ValueError(
            f"read_rows: every line must be one JSON object, got not JSON ({error}) at {where}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"read_rows: every line must be one JSON object, got {type(row).__name__} at {where}"
        )
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow  # lazily: JSON lines and text need no pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            row = 0
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = " ".join(str(error).split())  # damaged files are told in several lines
        raise ValueError(
            f"read_rows: the file must be readable Parquet, got {what} at {path}; write it again"
        ) from error


def _renamed(row: dict[str, object], columns: Mapping[str, str], where: str) -> dict[str, object]:
    for name, theirs in columns.items():
        if theirs not in row:
            raise ValueError(
                f"read_rows: column {theirs!r} (as {name!r}) must be there, got only {sorted(row)} "
                f"at {where}; set columns (--data.columns) to the names in the file"
            )
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    return renamed | {name: row[theirs] for name, theirs in columns.items()}


def _check_columns(
    row: dict[str, object], required: Sequence[str], columns: Mapping[str, str], where: str
) -> None:
    for name in required:
        if name not in row:
            raise ValueError(
                f"read_rows: column {name!r} must be there, got only {sorted(row)} at {where}; "
                "call it so in the file"
            )
        check_text("read_rows", columns.get(name, name), row[name], where)
