"""Which rows a checkpoint may be measured on: those that its run held out, unless others are given.

What the run trained on is known from the checkpoint's tercet.json; rows that were trained on and
are measured nevertheless are counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tercet.engine.config import read_record
from tercet.engine.files import placed, sha256
from tercet.engine.grace.config import GraceConfig, GraceData, Mode
from tercet.engine.grace.data import Example, load_dataset, num_shared

SPLIT = ("path", "mode", "columns", "remove", "test_path", "test_fraction", "split_seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalData:
    """Which rows are measured; what is left out is as in the run that wrote the checkpoint.

    A path, fraction or seed other than the run's, without test_path, splits `path` anew.
    """

    path: str | None = None  # .jsonl or .parquet; the training rows and, without test_path, these
    test_path: str | None = None  # held-out rows
    mode: Mode | None = None  # pairs (supervised), or texts alone (unsupervised)
    # pairs of our name and the file's: --data.columns query question positive answer
    columns: dict[str, str] | None = None
    remove: str | None = None  # regular expression; what it matches is deleted from every text
    test_fraction: float | None = None  # of the rows of path, after a shuffle
    split_seed: int | None = None  # of that shuffle
    num_texts: int | None = None  # rows measured, at most; None: as many as the run, else all

    def __post_init__(self) -> None:
        if self.num_texts is not None and self.num_texts < 2:
            raise ValueError(f"EvalData: num_texts must be >= 2, got {self.num_texts}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Rows to measure, and what is known about them."""

    examples: list[Example]
    num_trained_on: int | None  # of the examples; None: nobody knows
    run: GraceConfig | None  # settings of the run that wrote the checkpoint, if GRACE did
    notes: list[str]  # one sentence each
    source: str  # where the examples come from, a phrase


def held_out(model: str, given: EvalData) -> HeldOut:
    """The rows to measure a model on.

    Args:
        model: a checkpoint folder, or any other model: then `given` must say where rows are.
        given: settings that go before those of the run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_dataset`; no rows are known; a tercet.json that cannot be used.
    """
    run, trained_on, digests, notes = _run_of(Path(model).expanduser())
    before = None if trained_on is None else _where_it_is(trained_on, digests, given)
    data = _merged(before, given)
    loaded = load_dataset(data)
    examples = loaded.test
    if before is not None:
        changed = [
            f"{name} {old!r} -> {new!r}"
            for name in SPLIT
            if (old := getattr(before, name)) != (new := getattr(data, name))
        ]
        if changed:
            notes.append(f"not the held-out rows of the run ({', '.join(changed)})")
    source = data.test_path or (
        f"the {len(examples)} of {len(examples) + len(loaded.train)} rows of {data.path} that a "
        f"shuffle holds out (test_fraction {data.test_fraction}, split_seed {data.split_seed})"
    )
    examples = _first(examples, run, given, notes)
    trained = None if before is None else _rows_of_run(before, digests, notes)
    num_trained_on = None if trained is None else num_shared(examples, trained)
    if num_trained_on:
        notes.append(
            f"{num_trained_on} of {len(examples)} rows measured are rows that the run trained on"
        )
    return HeldOut(
        examples=examples,
        num_trained_on=num_trained_on,
        run=run,
        notes=notes,
        source=source,
    )


def _first(
    examples: list[Example], run: GraceConfig | None, given: EvalData, notes: list[str]
) -> list[Example]:
    """As many rows as are asked for, or as the run measured."""
    limit = given.num_texts or (run.evaluation.num_texts if run else 0) or len(examples)
    if given.num_texts is None and limit < len(examples):
        notes.append(
            f"the first {limit} of {len(examples)} held-out rows are measured, as in training; "
            f"--data.num-texts {len(examples)} measures all"
        )
    return examples[:limit]


def _run_of(
    checkpoint: Path,
) -> tuple[GraceConfig | None, GraceData | None, dict[str, str], list[str]]:
    """Settings, data and data digests of the run of a checkpoint, and what to know without.

    A GRACE run has the data among its settings; a baseline, which learns no rationales, beside.
    """
    from tercet.engine.checkpoint import RUN, read_run  # loads torch

    about, where = read_run(checkpoint), f"eval: {checkpoint / RUN}"
    settings, digests = about.get("settings"), about.get("data_sha256", {})
    if isinstance(settings, dict) and isinstance(digests, dict):
        if isinstance(settings.get("data"), dict):
            run = read_record(GraceConfig, settings, where)
            # negatives are not measured
            run = replace(run, data=replace(run.data, num_negatives=None))
            return run, run.data, digests, []
        if isinstance(about.get("data"), dict):
            data = read_record(GraceData, about["data"], where)
            return None, replace(data, num_negatives=None), digests, []
    unknown = f"{checkpoint / RUN} does not say which rows the model was trained on"
    return None, None, {}, [unknown] if about else []


def _where_it_is(run: GraceData, digests: dict[str, str], given: EvalData) -> GraceData:
    """The run's settings, with its files where they are given under another name."""
    moved = {"path": given.path, "test_path": given.test_path}
    return replace(
        run,
        **{
            name: file
            for name, file in moved.items()
            if file is not None and Path(file).is_file() and sha256(file) == digests.get(name)
        },
    )


def _merged(run: GraceData | None, given: EvalData) -> GraceData:
    chosen = {name: value for name in SPLIT if (value := getattr(given, name)) is not None}
    if run is None:
        path = given.path or given.test_path
        if path is None:
            raise ValueError(
                "eval: the rows to measure must be known, got a model that names none; "
                "set --data.path or --data.test-path"
            )
        return GraceData(**{**chosen, "path": path})
    if any(
        name in chosen and chosen[name] != getattr(run, name)
        for name in ("path", "test_fraction", "split_seed")
    ):
        chosen.setdefault("test_path", None)
    data = replace(run, **chosen)
    for name in ("path", "test_path"):
        file = getattr(data, name)
        if file is not None and not Path(file).exists():
            raise FileNotFoundError(
                f"eval: the data file of the run must be here, got no {placed(file)}; "
                f"set --data.{name.replace('_', '-')} to where it is now"
            )
    return data


def _rows_of_run(run: GraceData, digests: dict[str, str], notes: list[str]) -> list[Example] | None:
    """The rows that a run trained on; None, with a note, where its file is gone or another one."""
    files = {"path": run.path, "test_path": run.test_path}
    for name, file in files.items():
        if file is None or (Path(file).is_file() and sha256(file) == digests.get(name)):
            continue
        why = "has changed since" if Path(file).exists() else "is not here"
        notes.append(f"whether the run trained on these rows is not known: its {file} {why}")
        return None
    return load_dataset(run).train
