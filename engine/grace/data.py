"""Rows of GRACE from the column names that people have, split, and dealt out in shuffled epochs.

supervised     query, positive, negative (string or list)     GRACE's JSON lines
               anchor, positive, negative, negative_1, ...    sentence-transformers
               query, pos (list), neg (list)                  FlagEmbedding; one row per positive
               multi_input {query, instruction, negative_document}          GRACE's Parquet
unsupervised   text, or prompt [system, user]                 GRACE's text and Parquet files
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tercet.engine.data import Rows, check_text, read_rows
from tercet.engine.files import sha256
from tercet.engine.grace.config import GraceData
from tercet.engine.grace.prompts import PromptBuilder

QUERY, POSITIVE = ("query", "anchor"), ("positive", "pos")
NEGATIVE = re.compile(r"(neg|negatives?)(_\d+)?")  # negative, negative_1, ..., neg
GRACE_PARQUET = {"query": "query", "positive": "instruction", "negative": "negative_document"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One group: a document whose rationale is trained, and what it is compared with."""

    document: str
    query: str | None = None  # None: unsupervised, another sample of the document takes its place
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Training and held-out rows, and what was noticed on the way."""

    train: list[Example]
    test: list[Example]
    notes: list[str]  # one sentence each: what was skipped, expanded, cut or switched off

    @property
    def num_negatives(self) -> int:
        """Negatives of every training row."""
        return len(self.train[0].negatives)


def load_dataset(config: GraceData) -> Dataset:
    """Reads, cleans and splits the rows; the same config gives the same split.

    Departs from the released code, which takes the first 1 % of the file without a shuffle.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_rows`, with file and line; a row without the columns of its mode, or
            with fewer negatives than num_negatives; no training rows left.
    """
    notes: list[str] = []
    train = _read(config, config.path, notes)
    if config.test_path is not None:
        test = _read(config, config.test_path, notes)
    else:
        random.Random(f"split {config.split_seed}").shuffle(train)
        num_test = round(len(train) * config.test_fraction)
        train, test = train[num_test:], train[:num_test]
    if not train:
        raise ValueError(
            f"load_dataset: there must be at least one training row, got none of {len(test)} in "
            f"{config.path}; lower test_fraction or give more data"
        )
    if config.mode == "supervised":
        train, test = _even_negatives(config, train, test, notes)
    num_equal = len(train) - len({example.document for example in train})
    if num_equal:
        notes.append(f"{num_equal} of {len(train)} training rows repeat another row's document")
    if shared := num_shared(test, train):
        notes.append(f"{shared} of {len(test)} held-out rows are training rows too")
    return Dataset(train=train, test=test, notes=notes)


def data_digests(config: GraceData) -> dict[str, str]:
    """The SHA-256 of each data file, under the name of its setting."""
    files = {"path": config.path, "test_path": config.test_path}
    return {name: sha256(file) for name, file in files.items() if file is not None}


def num_shared(test: Sequence[Example], train: Sequence[Example]) -> int:
    """How many rows of `test` are in `train`: as the same pair, or by a text trained on alone."""
    pairs = {(example.query, example.document) for example in train}
    alone = {example.document for example in train if example.query is None}
    return sum(
        (e.query, e.document) in pairs or not alone.isdisjoint((e.query, e.document)) for e in test
    )


def drop_overlong(dataset: Dataset, builder: PromptBuilder) -> Dataset:
    """The dataset without training rows whose document does not fit its prompt.

    Raises:
        ValueError: none fits.
    """
    kept = [example for example in dataset.train if not builder(example.document).truncated]
    if not kept:
        raise ValueError(
            f"drop_overlong: a document must fit max_prompt_length={builder.max_prompt_length}, "
            f"got {len(dataset.train)} longer ones; raise it or set overlong: truncate"
        )
    dropped = len(dataset.train) - len(kept)
    note = f"{dropped} of {len(dataset.train)} training rows dropped: document above the limit"
    notes = [*dataset.notes, note] if dropped else dataset.notes
    return Dataset(train=kept, test=dataset.test, notes=notes)


class Epochs:
    """Row numbers in shuffled epochs without replacement; position p is a pure function of seed.

    A step that reaches the end of an epoch goes on with the next one: nothing is dropped.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._epoch, self._order = -1, list[int]()

    def rows(self, start: int, count: int) -> list[int]:
        """Row numbers at positions start .. start + count - 1 of the endless sequence."""
        return [self._row(position) for position in range(start, start + count)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self._epoch:
            order = list(range(self.num_rows))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order[place]


def _read(config: GraceData, path: str, notes: list[str]) -> list[Example]:
    rows = read_rows(path, columns=config.columns)
    if rows.blank_lines:
        notes.append(f"{path}: {rows.blank_lines} blank lines skipped")
    read = _supervised if config.mode == "supervised" else _unsupervised
    examples, blank, expanded = [], [], 0
    for index, row in enumerate(rows):
        where = rows.where(index)
        found = list(read(row, where, rows))
        expanded += len(found) > 1
        for example in found:
            cleaned = _cleaned(example, config.remove)
            if cleaned is None:
                blank.append(where)
                continue
            _check_negatives(config, cleaned, where)
            examples.append(cleaned)
    if expanded:
        notes.append(f"{path}: {expanded} rows with several positives became one row for each")
    if blank:
        notes.append(f"{path}: {len(blank)} rows with a blank text skipped, first {blank[0]}")
    _check_any(examples, rows)
    return examples


def _supervised(row: dict[str, object], where: str, rows: Rows) -> Iterator[Example]:
    row, others = _pair(row), map(_pair, rows)
    query = check_text("load_dataset", "query", _pick(row, QUERY, where, others), where)
    positives = _texts("positive", _pick(row, POSITIVE, where, others), where)
    if not positives:
        raise ValueError(f"load_dataset: a row must have a positive, got an empty list at {where}")
    names = sorted((name for name in row if NEGATIVE.fullmatch(name)), key=_suffix_number)
    negatives = [text for name in names for text in _texts(name, row[name], where, optional=True)]
    for positive in positives:
        yield Example(document=positive, query=query, negatives=tuple(negatives))


def _pair(row: dict[str, object]) -> dict[str, object]:
    """The row, or what its multi_input holds, under our names."""
    inner = row.get("multi_input")
    if not isinstance(inner, dict):
        return row
    return {ours: inner.get(theirs) for ours, theirs in GRACE_PARQUET.items()}


def _unsupervised(row: dict[str, object], where: str, rows: Rows) -> Iterator[Example]:
    text = _pick(_alone(row), ("text",), where, map(_alone, rows))
    yield Example(document=check_text("load_dataset", "text", text, where))


def _alone(row: dict[str, object]) -> dict[str, object]:
    """The row, or the last message of its prompt, under our name."""
    prompt = row.get("prompt")
    if "text" in row or not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)):
        return row
    return {"text": prompt[-1].get("content")}


def _pick(
    row: dict[str, object], names: Sequence[str], where: str, others: Iterable[dict[str, object]]
) -> object:
    for name in names:
        if name in row:
            return row[name]
    remedy = "set data.columns (--data.columns) to the names in the file, or --data.mode"
    if any(name in other for other in others for name in names):  # the file is of this kind
        remedy = "correct or delete the row"
    raise ValueError(
        f"load_dataset: column {' or '.join(map(repr, names))} must be there, got only "
        f"{sorted(row)} at {where}; {remedy}"
    )


def _texts(name: str, value: object, where: str, *, optional: bool = False) -> list[str]:
    """A string or a list of strings, as a list."""
    if optional and value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [check_text("load_dataset", name, text, where) for text in values]


def _suffix_number(name: str) -> tuple[int, str]:
    number = name.rpartition("_")[2]
    return (int(number) if number.isdigit() else -1, name)


def _cleaned(example: Example, remove: str | None) -> Example | None:
    """The row without what `remove` matches; None when its document or query is blank."""

    def clean(text: str) -> str:
        return re.sub(remove, "", text) if remove else text

    document = clean(example.document)
    query = None if example.query is None else clean(example.query)
    if not document.strip() or (query is not None and not query.strip()):
        return None
    negatives = tuple(text for text in map(clean, example.negatives) if text.strip())
    return Example(document=document, query=query, negatives=negatives)


def _check_negatives(config: GraceData, example: Example, where: str) -> None:
    wanted = config.num_negatives
    if wanted is not None and len(example.negatives) < wanted:
        raise ValueError(
            f"load_dataset: every row must have num_negatives={wanted} negatives, "
            f"got {len(example.negatives)} at {where}; lower it, or leave it out"
        )


def _check_any(examples: list[Example], rows: Rows) -> None:
    if not examples:
        raise ValueError(
            f"load_dataset: the dataset must have a row that is not blank, got {len(rows)} blank "
            f"ones in {rows.path}"
        )


def _even_negatives(
    config: GraceData, train: list[Example], test: list[Example], notes: list[str]
) -> tuple[list[Example], list[Example]]:
    """Cuts every row to the same number of negatives, and says what that leaves out."""
    counts = [len(example.negatives) for example in train]
    wanted = min(counts) if config.num_negatives is None else config.num_negatives
    if wanted == 0:
        without = counts.count(0)
        notes.append(
            f"the negative term is off: {without} of {len(train)} training rows have no negative"
            if config.num_negatives is None
            else "the negative term is off: num_negatives is 0"
        )
    elif max(counts) > wanted:
        notes.append(f"{wanted} negatives per row are used, of {min(counts)} to {max(counts)}")

    def cut(examples: list[Example]) -> list[Example]:
        return [
            Example(document=e.document, query=e.query, negatives=e.negatives[:wanted])
            for e in examples
        ]

    return cut(train), cut(test)
