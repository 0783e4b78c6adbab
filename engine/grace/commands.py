"""`tercet grace encode` and `tercet grace eval`: a trained encoder from the command line."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.engine.command_line import load_config
from tercet.engine.data import check_text, read_rows
from tercet.engine.files import follow_umask
from tercet.engine.grace.held_out import EvalData, held_out
from tercet.engine.records import Pooling

if TYPE_CHECKING:
    from tercet.engine.grace.encoder import GraceEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeConfig:
    """Write a rationale about each text, and its embedding, into a new folder."""

    model: str  # checkpoint folder, or any causal LM with a chat template
    input: str  # .txt (one text per line), .jsonl or .parquet
    output_dir: str  # gets vectors.safetensors (float32 [n, hidden]) and rationales.jsonl
    column: str = "text"
    generate: bool = True  # False: embed the prompt alone
    max_completion_length: int | None = None  # None: as the model was trained, else 256
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0
    pooling: Pooling | None = None  # None: as the model was trained
    normalize: bool = True
    max_batch_size: int = 64
    device: str | None = None  # None: CUDA where there is one


def encode(argv: Sequence[str], prog: str) -> int:
    """Encodes a file of texts.

    Raises:
        ConfigError: as `load_config`.
        FileExistsError: output_dir is there already.
        FileNotFoundError, OSError: no such input or model, or one that cannot be read.
        ValueError: as `read_rows`, `GraceEncoder.from_pretrained` and `GraceEncoder.encode`; a text
            that is not there or no string.
    """
    config = load_config(EncodeConfig, argv, prog=prog)
    folder = Path(config.output_dir)
    if folder.exists():
        raise FileExistsError(f"encode: output_dir must be new, got {folder}; name another")
    rows = read_rows(config.input)
    texts = [_text(row, config.column, rows.where(i)) for i, row in enumerate(rows)]

    from safetensors.torch import save_file

    encoder = _encoder(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        options = _options(config, generate=config.generate)
        encoded = encoder.encode(texts, normalize=config.normalize, **options)
        partial = Path(scratch) / folder.name
        partial.mkdir()
        save_file({"vectors": encoded.vectors.cpu()}, partial / "vectors.safetensors")
        lines = [
            json.dumps({"text": text, "rationale": rationale}, ensure_ascii=False) + "\n"
            for text, rationale in zip(texts, encoded.rationales, strict=True)
        ]
        (partial / "rationales.jsonl").write_text("".join(lines), encoding="utf-8")
        follow_umask(partial)
        partial.rename(folder)
    sys.stdout.write(
        f"{len(texts)} texts in {folder}; {encoded.num_truncated} rationales cut off, "
        f"{encoded.num_prompts_truncated} texts cut to fit the prompt, "
        f"{rows.blank_lines} blank lines skipped\n"
    )
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Measure an encoder on held-out pairs, without and with rationales.

    A checkpoint is measured on the rows that its run held out.  Other rows can be given; if the
    run trained on some of them, their number is said.
    """

    model: str  # checkpoint folder, or any causal LM with a chat template
    data: EvalData = field(default_factory=EvalData)
    sts: str | None = None  # .jsonl or .parquet with sentence1, sentence2 and score
    max_completion_length: int | None = None  # None: as the model was trained, else 256
    temperature: float = 1.0
    seed: int = 0
    pooling: Pooling | None = None  # None: as the model was trained
    max_batch_size: int = 64
    device: str | None = None  # None: CUDA where there is one


def evaluate(argv: Sequence[str], prog: str) -> int:
    """Prints one JSON object per mode: rows, retrieval, anisotropy, distinct rationales, loss.

    Raises:
        ConfigError: as `load_config`.
        FileNotFoundError, OSError: no such data or model, or one that cannot be read.
        ValueError: as `held_out`, `read_rows`, `GraceEncoder.from_pretrained` and
            `GraceEncoder.encode`; fewer than two rows to measure; a score that is no finite number.
    """
    config = load_config(EvalConfig, argv, prog=prog)

    from tercet.engine.grace.evaluate import held_out_loss

    found = held_out(config.model, config.data)
    pairs = found.pairs
    sys.stderr.writelines(f"{prog}: {note}\n" for note in found.notes)
    if len(pairs) < 2:
        raise ValueError(
            f"eval: there must be at least two held-out rows with a query, got {len(pairs)}; "
            "raise data.test_fraction or set data.test_path, with data.mode supervised"
        )
    sts = None if config.sts is None else _read_sts(config.sts)
    encoder = _encoder(config)
    documents = [document for _, document in pairs]
    loss = held_out_loss(encoder.policy, documents)
    for generate in (False, True):
        measures = _retrieval(encoder, pairs, config, generate=generate)
        if sts is not None:
            measures["sts_spearman"] = _sts(encoder, sts, _options(config, generate=generate))
        rows = {"rows": len(pairs), "rows_trained_on": found.num_trained_on}
        line = {"rationales": generate, **rows, **measures, "held_out_loss_nats": loss}
        sys.stdout.write(json.dumps(line) + "\n")
    return 0


def _text(row: dict[str, object], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(
            f"encode: column {column!r} must be there, got only {sorted(row)} at {where}; "
            "name the one to encode with --column"
        )
    return check_text("encode", column, row[column], where)


def _encoder(config: EncodeConfig | EvalConfig) -> GraceEncoder:
    import torch

    from tercet.engine.grace.encoder import GraceEncoder

    return GraceEncoder.from_pretrained(
        config.model,
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        pooling=config.pooling,
        max_batch_size=config.max_batch_size,
    )


def _options(config: EncodeConfig | EvalConfig, *, generate: bool) -> dict[str, Any]:
    return {
        "generate": generate,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "seed": config.seed,
    }


def _retrieval(
    encoder: GraceEncoder, pairs: list[tuple[str, str]], config: EvalConfig, *, generate: bool
) -> dict[str, float]:
    from tercet.engine.grace.evaluate import anisotropy, distinct_share, retrieval_metrics

    distinct = list(dict.fromkeys(document for _, document in pairs))
    place = {document: i for i, document in enumerate(distinct)}
    options = _options(config, generate=generate)
    queries = encoder.encode([query for query, _ in pairs], **options)
    documents = encoder.encode(distinct, **options)
    relevant = [{place[document]} for _, document in pairs]
    measures = retrieval_metrics(queries.vectors, documents.vectors, relevant)
    measures["anisotropy"] = anisotropy(documents.vectors)
    if generate:
        measures["distinct_rationales"] = distinct_share(documents.rationales)
        measures["truncated"] = documents.num_truncated / len(distinct)
    return measures


def _read_sts(path: str) -> tuple[list[str], list[str], list[float]]:
    """Both sides of every pair, and their scores."""
    rows = read_rows(path, required=["sentence1", "sentence2"])
    scores = [_number(row.get("score"), rows.where(i)) for i, row in enumerate(rows)]
    return [str(r["sentence1"]) for r in rows], [str(r["sentence2"]) for r in rows], scores


def _sts(
    encoder: GraceEncoder,
    pairs: tuple[list[str], list[str], list[float]],
    options: dict[str, Any],
) -> float:
    import torch

    from tercet.engine.grace.evaluate import sts_spearman

    first, second = (encoder.encode(texts, **options).vectors for texts in pairs[:2])
    return sts_spearman(first, second, torch.tensor(pairs[2]))


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
