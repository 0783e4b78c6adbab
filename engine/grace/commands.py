"""`tercet grace train`, `encode`, `eval` and `experiment`.

torch and transformers are loaded once the command line is read and its paths are looked at.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.engine.choices import Pooling
from tercet.engine.command_line import load_config
from tercet.engine.data import check_file, check_text, read_rows
from tercet.engine.files import (
    check_output,
    checkpoints,
    follow_umask,
    removed_on_failure,
    replace_text,
)
from tercet.engine.glossary import MEANINGS, general
from tercet.engine.grace.config import GraceConfig
from tercet.engine.grace.experiment_config import ExperimentConfig
from tercet.engine.grace.held_out import EvalData, HeldOut, held_out
from tercet.engine.model_paths import find_model

if TYPE_CHECKING:
    from tercet.engine.grace.encoder import Encoded, GraceEncoder
    from tercet.engine.grace.readout import Corpus

# how a text becomes a vector: options here, and fields of EncoderSettings
EMBEDDING = ("system_prompt", "max_prompt_length", "max_completion_length", "pooling")
NO_RATIONALES = "the run trained no rationales, so the texts alone are"
StsPairs = tuple[list[str], list[str], list[float]]  # both sides of every pair, and their scores


def train(argv: Sequence[str], prog: str) -> int:
    """`tercet grace train [--resume] [--config FILE.yaml] [--key.subkey VALUE ...]`.

    Raises:
        ConfigError: as `load_config`.
        FileNotFoundError, ValueError: as `check_file` and `find_model`.
        KeyboardInterrupt: says what is saved.
        Whatever `training.train` raises.
    """
    rest = [word for word in argv if word != "--resume"]
    config = load_config(GraceConfig, rest, prog=prog, beside=["--resume"])
    for path in (config.data.path, config.data.test_path):
        if path is not None:
            check_file(Path(path))
    find_model(config.model)

    from tercet.engine.grace.training import train

    try:
        train(config, resume=True if len(rest) < len(argv) else None)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(_what_is_saved(Path(config.output_dir))) from stop
    return 0


def _what_is_saved(folder: Path) -> str:
    from tercet.engine.checkpoint import resumable

    if found := resumable(folder, checksums=False):
        return f"{found} is the last that was saved whole; the same command goes on from it"
    if checkpoints(folder):
        return (
            f"the checkpoints in {folder} are damaged; restore one from a copy, or start again in "
            "another folder"
        )
    return "nothing was saved (there is no checkpoint yet); the same command starts over"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """Write a rationale about each text, and its embedding, into a new folder."""

    model: str  # checkpoint folder, or any causal LM with a chat template
    input: str  # .txt (one text per line), .jsonl or .parquet
    output_dir: str  # gets vectors.safetensors (float32 [n, hidden]) and rationales.jsonl
    column: str = "text"  # of .jsonl and .parquet
    generate: bool | None = None  # False: embed the prompt alone; None: as the model was trained
    system_prompt: str | None = None  # before every text; None: as in training, else GRACE's own
    # tokens, template included; None: as in training, else 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None  # None: as the model was trained, else 256
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0  # of the samples
    pooling: Pooling | None = None  # how hidden states become a vector; None: as in training
    normalize: bool = True  # vectors of length 1
    max_batch_size: int = 64  # texts written about at once; memory and speed only
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: CUDA where there is one


def encode(argv: Sequence[str], prog: str) -> int:
    """Encodes a file of texts.

    Raises:
        ConfigError: as `load_config`.
        FileExistsError: output_dir is there already.
        FileNotFoundError, OSError: no such input or model, or one that cannot be read; a full disk.
        ValueError: as `read_rows`, `GraceEncoder.from_pretrained` and `GraceEncoder.encode`; a text
            that is not there or no string.
    """
    config = load_config(EncodeConfig, argv, prog=prog)
    folder = Path(config.output_dir)
    if os.path.lexists(folder):  # a link to nowhere too
        raise FileExistsError(f"encode: output_dir must be new, got {folder}; name another")
    rows = read_rows(config.input)
    texts = [_text(row, config.column, rows.where(i)) for i, row in enumerate(rows)]
    find_model(config.model)

    encoder = _encoder(config, prog)
    generate = _writes(encoder, config) if config.generate is None else config.generate
    if config.generate is None and not generate:
        sys.stderr.write(f"{prog}: {NO_RATIONALES} embedded; --generate True adds rationales\n")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        encoded = encoder.encode(
            texts,
            generate=generate,
            temperature=config.temperature,
            seed=config.seed,
            normalize=config.normalize,
            warn=False,  # said below
        )
        partial = Path(scratch) / folder.name
        with removed_on_failure(
            partial,
            folder.parent,
            function="encode",
            content=str(folder),
            remedy="free some space or name another folder with --output-dir",
        ):
            _write(partial, texts, encoded)
        partial.rename(folder)
    sys.stdout.write(
        f"{len(texts)} texts in {folder}; {encoded.num_truncated} rationales cut off, "
        f"{encoded.num_prompts_truncated} texts cut to fit the prompt, "
        f"{rows.blank_lines} blank lines skipped\n"
    )
    return 0


def _write(folder: Path, texts: Sequence[str], encoded: Encoded) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"vectors": encoded.vectors.cpu()}, folder / "vectors.safetensors")
    lines = [
        json.dumps({"text": text, "rationale": rationale}, ensure_ascii=False) + "\n"
        for text, rationale in zip(texts, encoded.rationales, strict=True)
    ]
    (folder / "rationales.jsonl").write_text("".join(lines), encoding="utf-8")
    follow_umask(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Measure an encoder on held-out rows, without and with rationales.

    A checkpoint is measured as its run measured it during training: on the rows that the run held
    out, with its seeds and its sampling, so that the figures are those of its last evaluation.
    Other rows or settings can be given; what differs is said, and so is the number of rows that
    the run trained on.
    """

    model: str  # checkpoint folder, or any causal LM with a chat template
    data: EvalData = field(default_factory=EvalData)
    sts: str | None = None  # .jsonl or .parquet with sentence1, sentence2 and score
    output: str | None = None  # a JSON file that gets the figures too
    system_prompt: str | None = None  # before every text; None: as in training, else GRACE's own
    # tokens, template included; None: as in training, else 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None  # None: as the model was trained, else 256
    temperature: float | None = None  # 0 is greedy; None: as the run measured, else 1
    seed: int | None = None  # of the samples; None: as the run measured, else 0
    pooling: Pooling | None = None  # how hidden states become a vector; None: as in training
    max_batch_size: int = 64  # texts written about at once; memory and speed only
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: CUDA where there is one


def evaluate(argv: Sequence[str], prog: str) -> int:
    """Prints a table of what training logs as eval/..., without and with rationales.

    Raises:
        ConfigError: as `load_config`.
        FileNotFoundError, OSError: no such data or model, or one that cannot be read; output cannot
            be written, which is tried before all else.
        ValueError: as `held_out`, `read_rows`, `GraceEncoder.from_pretrained` and
            `GraceEncoder.encode`; fewer than two rows to measure; a score that is no finite number;
            output is there and no file.
    """
    config = load_config(EvalConfig, argv, prog=prog)
    output = None if config.output is None else Path(config.output)
    if output is not None:
        _check_output(output)
    find_model(config.model)  # a wrong path is not a model that names no rows
    found = held_out(config.model, config.data)
    if len(found.examples) < 2:
        raise ValueError(
            f"eval: there must be at least two held-out rows, got {len(found.examples)}; name "
            "rows that were not trained on with --data.test-path"
        )
    sts = None if config.sts is None else _read_sts(config.sts)

    from tercet.engine.grace.evaluate import held_out_loss
    from tercet.engine.grace.readout import corpus_of, sampling_of

    how = {"temperature": 1.0, "seed": 0} if found.run is None else sampling_of(found.run)
    how |= _given(config, ("temperature", "seed"))
    encoder = _encoder(config, prog, found.run)
    writes = _writes(encoder, config)
    notes = [*found.notes, *_notes(found, how, config, writes)]
    sys.stderr.writelines(f"{prog}: {note}\n" for note in notes)
    how["max_completion_length"] = encoder.max_completion_length
    corpus = corpus_of(found.examples)
    with _precision(encoder, found.run):
        columns = {
            name: _measured(encoder, corpus, sts, {**how, "generate": generate})
            for name, generate in (("no_rationale", False), ("rationale", True))
            if writes or not generate
        }
    plain = held_out_loss(encoder.policy, corpus.documents)
    columns["no_rationale"] |= {f"eval/{name}": value for name, value in plain.items()}
    rows = {"rows": len(found.examples), "rows_trained_on": found.num_trained_on}
    told = _told(how) if "rationale" in columns else "texts alone"
    _show(f"{config.model}: {len(found.examples)} rows, {told}", columns)
    for line in _to_read_it(found, corpus):
        sys.stdout.write(f"{line}\n")
    if output is not None:
        facts = {"model": config.model, **rows, "settings": how | asdict(encoder.settings)}
        before = " (in place of the file of that name)" if output.exists() else ""
        replace_text(output, json.dumps(facts | columns, indent=2) + "\n")
        sys.stdout.write(f"wrote {output}{before}\n")
    return 0


def _check_output(path: Path) -> None:
    """Refuses what cannot be written in the end; a look at permissions would not tell."""
    check_output(path, "eval: output")
    folder = path.resolve().parent  # of a link, its file's
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"eval: output must be a file in a folder that can be written to, got {path} "
            f"({error.strerror}); name another"
        ) from error


def _given(config: EncodeConfig | EvalConfig, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that were set."""
    return {name: v for name in names if (v := getattr(config, name)) is not None}


def _writes(encoder: GraceEncoder, config: EncodeConfig | EvalConfig) -> bool:
    """Whether rationales are written: not by a baseline, unless it is given a budget."""
    return encoder.generate or config.max_completion_length is not None


def _notes(found: HeldOut, how: dict[str, Any], config: EvalConfig, writes: bool) -> list[str]:
    """What a reader of the figures should know."""
    from tercet.engine.grace.readout import sampling_of

    before, now = {}, how
    if (run := found.run) is not None:
        before = sampling_of(run) | {
            "system_prompt": run.data.system_prompt,
            "max_prompt_length": run.data.max_prompt_length,
            "max_completion_length": run.max_completion_length,
            "pooling": run.pooling,
        }
        now = before | how | _given(config, EMBEDDING)
    changed = [f"{k} {v!r} -> {now[k]!r}" for k, v in before.items() if now[k] != v]
    notes = [f"not as the run measured ({', '.join(changed)})"] if changed else []
    if not writes:
        notes.append(
            f"{NO_RATIONALES} measured; "
            "--max-completion-length N adds rationales of at most N tokens"
        )
    if how["temperature"] == 0 and all(example.query is None for example in found.examples):
        notes.append(
            "greedy rationales of a text are all the same, so each text finds itself: retrieval "
            "says nothing; set --temperature"
        )
    return notes


def _to_read_it(found: HeldOut, corpus: Corpus) -> list[str]:
    """What the figures depend on, one line each."""
    from tercet.engine.grace.readout import candidates

    lines = [f"rows: from {found.source}", candidates(corpus)]
    if corpus.queries == corpus.documents:
        lines.append(
            "without a rationale the samples of a text are the same, so there is no retrieval (-)"
        )
    return lines


def _told(how: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in how.items())


def _text(row: dict[str, object], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(
            f"encode: column {column!r} must be there, got only {sorted(row)} at {where}; "
            "name the one to encode with --column"
        )
    return check_text("encode", column, row[column], where)


def _encoder(
    config: EncodeConfig | EvalConfig, prog: str, run: GraceConfig | None = None
) -> GraceEncoder:
    """The encoder of a command; says which settings are mere defaults."""
    import torch

    from tercet.engine.checkpoint import RUN
    from tercet.engine.grace.encoder import GraceEncoder

    given = _given(config, EMBEDDING)
    encoder = GraceEncoder.from_pretrained(
        config.model,
        dtype=torch.bfloat16 if run is not None and run.dtype == "bfloat16" else torch.float32,
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        max_batch_size=config.max_batch_size,
        **given,
    )
    settings = asdict(encoder.settings) | {"system_prompt": "GRACE's own"}
    defaults = {name: settings[name] for name in EMBEDDING if name not in given}
    if defaults and not (Path(config.model).expanduser() / RUN).is_file():
        sys.stderr.write(f"{prog}: {config.model} has no {RUN}, so by default {_told(defaults)}\n")
    return encoder


def _precision(encoder: GraceEncoder, run: GraceConfig | None) -> AbstractContextManager[object]:
    """That in which the run trained."""
    import torch

    bf16 = run is not None and run.train.bf16
    return torch.autocast(encoder.policy.device.type, torch.bfloat16, enabled=bf16)


def _measured(
    encoder: GraceEncoder, corpus: Corpus, sts: StsPairs | None, how: dict[str, Any]
) -> dict[str, float]:
    """One column of the table, under the names that training uses."""
    from tercet.engine.grace.readout import measures, read_out

    found = measures(corpus, *read_out(encoder, corpus, **how))
    if sts is not None:
        found |= _sts(encoder, sts, how)
    return {f"eval/{name}": value for name, value in found.items()}


def _show(title: str, columns: dict[str, dict[str, float]]) -> None:
    """The measures as a table, and below it what each means."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    keys = list(dict.fromkeys(key for column in reversed(columns.values()) for key in column))
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for key in keys:
        table.add_row(key, *[f"{c[key]:.3f}" if key in c else "-" for c in columns.values()])
    console = Console(highlight=False)
    console.print(title, table, sep="\n", markup=False, soft_wrap=True)
    names = list(dict.fromkeys(map(general, keys)))
    width = max(map(len, names)) + 2
    for name in names:
        console.print(f"{name:<{width}}{MEANINGS[name]}", style="dim", markup=False, soft_wrap=True)


def _read_sts(path: str) -> StsPairs:
    """Both sides of every pair, and their scores."""
    rows = read_rows(path, required=["sentence1", "sentence2"])
    scores = [_number(row.get("score"), rows.where(i)) for i, row in enumerate(rows)]
    return [str(r["sentence1"]) for r in rows], [str(r["sentence2"]) for r in rows], scores


def _sts(encoder: GraceEncoder, pairs: StsPairs, how: dict[str, Any]) -> dict[str, float]:
    """How cosines follow the scores, and what of both sides was cut."""
    import torch

    from tercet.engine.grace.evaluate import sts_spearman

    first, second = (encoder.encode(texts, warn=False, **how) for texts in pairs[:2])
    found = {
        "sts_spearman": sts_spearman(first.vectors, second.vectors, torch.tensor(pairs[2])),
        "sts_prompts_truncated": float(first.num_prompts_truncated + second.num_prompts_truncated),
    }
    if first.lengths:
        cut = first.num_truncated + second.num_truncated
        found["sts_clipped_ratio"] = cut / (len(first) + len(second))
    return found


def _number(value: object, where: str) -> float:
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not abs(value) < 1e300  # NaN is not below it either
    ):
        raise ValueError(
            f"eval: column 'score' must be a finite number, got {repr(value)[:80]} at {where}; "
            "correct or delete the row"
        )
    return float(value)


def experiment(argv: Sequence[str], prog: str) -> int:
    """`tercet grace experiment --config FILE.yaml --data FILE.jsonl`.

    Raises:
        ConfigError: as `load_config`.
        FileNotFoundError, ValueError: as `check_file`.
        Whatever `experiment.run` raises.
    """
    config = load_config(ExperimentConfig, argv, prog=prog)
    check_file(Path(config.data))

    from tercet.engine.grace.experiment import run

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    say(run(config, say))
    say(f"wrote {config.output_dir}/table.md and results.json; each run's folder is beside them")
    return 0
