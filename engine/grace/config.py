"""Settings of a GRACE run: the paper's where they work, else see docs/departures.md."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import tyro

from tercet.engine.choices import Pooling
from tercet.engine.grace.prompts import SYSTEM_PROMPT
from tercet.engine.grace.reward_config import RewardConfig
from tercet.engine.train_config import TrainConfig

COLUMN = re.compile(r"query|anchor|positive|pos|text|(neg|negatives?)(_\d+)?")
Columns = Annotated[dict[str, str], tyro.conf.arg(help_behavior_hint="(default: as in the file)")]
Mode = Literal["supervised", "unsupervised"]
Overlong = Literal["truncate", "drop"]
Dtype = Literal["float32", "bfloat16"]
Attention = Literal["auto", "flash_attention_2", "varlen", "sdpa"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceData:
    """Where the texts come from, and how one becomes a prompt."""

    path: str  # .jsonl, .txt (one text per line) or .parquet
    mode: Mode = "supervised"  # pairs, or texts alone
    # pairs of our name and the file's: --data.columns query question positive answer;
    # in YAML {query: question, positive: answer}
    columns: Columns = field(default_factory=dict)
    num_negatives: int | None = None  # per row; None: as many as every row has
    remove: str | None = None  # regular expression; what it matches is deleted from every text
    test_path: str | None = None  # held-out rows; None: split off `path`
    test_fraction: float = 0.1  # of the rows, after a shuffle
    split_seed: int = 0  # of that shuffle: not train.seed, so that seeds share their test rows
    max_prompt_length: int = 1024  # tokens, template included
    overlong: Overlong = "truncate"  # cut longer texts, or drop training rows with such a document
    system_prompt: str = SYSTEM_PROMPT  # before every text; left out of the embedding

    def __post_init__(self) -> None:
        _check_named("GraceData", "path", self.path)
        if self.test_path is not None:
            _check_named("GraceData", "test_path", self.test_path)
        if self.max_prompt_length < 1:
            raise ValueError(
                f"GraceData: max_prompt_length must be >= 1, got {self.max_prompt_length}"
            )
        _check_choice("GraceData", "mode", self.mode, get_args(Mode))
        _check_choice("GraceData", "overlong", self.overlong, get_args(Overlong))
        for file in (self.path, self.test_path):
            if self.mode == "supervised" and file is not None and file.endswith(".txt"):
                raise ValueError(
                    "GraceData: supervised data must be pairs (.jsonl or .parquet), got "
                    f"{file}, a text per line; set --data.mode unsupervised (mode: unsupervised)"
                )
        if not 0.0 <= self.test_fraction < 1.0:
            raise ValueError(
                f"GraceData: test_fraction must be in [0, 1), got {self.test_fraction}"
            )
        if self.num_negatives is not None and self.num_negatives < 0:
            raise ValueError(f"GraceData: num_negatives must be >= 0, got {self.num_negatives}")
        if self.mode == "unsupervised" and self.num_negatives:
            raise ValueError(
                "GraceData: unsupervised data has no negatives, "
                f"got num_negatives={self.num_negatives}; leave it out"
            )
        for name, theirs in self.columns.items():
            if not COLUMN.fullmatch(name):
                turned = f"write {theirs} before {name}"
                other = f"name what {theirs} is to us before it"
                raise ValueError(
                    "GraceData: columns (--data.columns) must name ours (query, positive, negative"
                    f", negative_1, ..., text) and behind each the file's, got {name!r} as ours "
                    f"for {theirs!r}; {turned if COLUMN.fullmatch(theirs) else other}"
                )
        try:
            re.compile(self.remove or "")
        except re.error as error:
            raise ValueError(
                f"GraceData: remove must be a regular expression, got {self.remove!r} ({error})"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceEval:
    """Retrieval on held-out rows, every train.eval_steps steps."""

    num_texts: int = 256  # held-out rows, at most; 0: none
    temperature: float = 1.0  # seeded, so equal weights give equal figures; 0 is greedy

    def __post_init__(self) -> None:
        if self.num_texts < 0:
            raise ValueError(f"GraceEval: num_texts must be >= 0, got {self.num_texts}")
        _check_temperature("GraceEval", "temperature", self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """How a trained model embeds texts; a checkpoint holds them among the settings of its run."""

    system_prompt: str = SYSTEM_PROMPT
    max_prompt_length: int = 1024  # tokens, template included
    max_completion_length: int = 256  # tokens of a rationale; 256 is the knee that the paper saw
    pooling: Pooling = "mean"
    generate: bool = True  # False: of a run that trained no rationales, but the texts alone

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"EncoderSettings: {name} must be >= 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceConfig:
    """Train a language model to write rationales whose pooled hidden states embed the text.

    One step takes generation_batch_size / num_generations rows of the data; the document of each
    is sampled num_generations times, its query and its negatives once.  An unfinished run with the
    same settings in output_dir goes on; --resume goes on with one whose settings were others.
    """

    model: str  # folder or hub id of a causal language model with a chat template
    data: GraceData
    output_dir: str = "runs/grace"  # the run's folder: checkpoints, metrics, samples, settings
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: GraceEval = field(default_factory=GraceEval)

    num_generations: int = 8  # G, rollouts of each document
    generation_batch_size: int = 512  # rollouts per step: groups times num_generations
    max_completion_length: int = 2048  # new tokens, the end token included
    temperature: float = 1.0  # of the rollouts
    anchor_temperature: float = 0.5  # of queries, negatives, and unsupervised anchors
    top_p: float = 1.0  # nucleus: the likeliest tokens that hold this share; 1 keeps all
    top_k: int = 0  # 0 keeps the whole vocabulary
    # what the hidden states of text and rationale become: their mean, that of the layer before the
    # last, their largest value in each dimension, or the last token's
    pooling: Pooling = "mean"

    device: str | None = None  # cpu, cuda, cuda:1, ...; None: CUDA where there is one
    dtype: Dtype = "float32"  # of the weights; train.bf16 computes in bfloat16 beside them
    # attention over packed rows: flash_attention_2 and varlen (torch's own) want CUDA and bfloat16,
    # sdpa goes row by row and runs everywhere; auto is the first of them that can run
    attn: Attention = "auto"
    activation_checkpointing: bool = False  # less memory; the backward pass computes them again
    max_batch_size: int = 256  # rows sampled at once; memory only

    def __post_init__(self) -> None:
        _check_named("GraceConfig", "model", self.model)
        _check_named("GraceConfig", "output_dir", self.output_dir)
        _check_choice("GraceConfig", "dtype", self.dtype, get_args(Dtype))
        _check_choice("GraceConfig", "attn", self.attn, get_args(Attention))
        _check_choice("GraceConfig", "pooling", self.pooling, get_args(Pooling))
        for name in (
            "num_generations",
            "generation_batch_size",
            "max_completion_length",
            "max_batch_size",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"GraceConfig: {name} must be >= 1, got {value}")
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                "GraceConfig: generation_batch_size must be a multiple of num_generations "
                f"({self.num_generations}), got {self.generation_batch_size}"
            )
        if self.train.mini_batches > self.groups_per_step:
            raise ValueError(
                "GraceConfig: train.mini_batches must be at most the groups of a step, "
                f"generation_batch_size / num_generations = {self.groups_per_step}, got "
                f"{self.train.mini_batches}; lower it or raise generation_batch_size"
            )
        estimator = self.train.advantage_estimator
        if self.num_generations == 1 and estimator in ("grpo", "rloo", "dapo"):
            raise ValueError(
                f"GraceConfig: num_generations must be >= 2 under {estimator!r} "
                "(a group of one is its own baseline: every advantage is 0), got 1; raise it, or "
                "use advantage_estimator 'reinforce++' or 'remax'"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"GraceConfig: top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"GraceConfig: top_k must be in [0, 2^31), got {self.top_k}")
        _check_temperature("GraceConfig", "anchor_temperature", self.anchor_temperature)
        _check_temperature("GraceConfig", "temperature", self.temperature)
        if self.temperature == 0:
            raise ValueError(
                "GraceConfig: temperature must be > 0, got 0 (greedy rollouts of a group are all "
                "the same); anchor_temperature may be 0"
            )

    @property
    def groups_per_step(self) -> int:
        """B, rows of the data per step."""
        return self.generation_batch_size // self.num_generations


def _check_choice(owner: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def _check_named(owner: str, name: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{owner}: {name} must not be empty, got {value!r}; name a file or folder")


def _check_temperature(owner: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{owner}: {name} must be finite and >= 0, got {value}")
