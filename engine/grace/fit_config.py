"""Settings of what is fitted to a loss: contrastive baselines, language modelling of rationales.

Loads no torch, so that a command line can show them at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from tercet.engine.choices import Pooling
from tercet.engine.grace.prompts import SYSTEM_PROMPT
from tercet.engine.train_config import LoopConfig

Method = Literal["info_nce", "simcse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig(LoopConfig):
    """How a policy is fitted to an objective; one step is one batch and one update."""

    learning_rate: float = 1e-4  # of AdamW, after warm-up
    logging_steps: int = 10  # between lines shown; metrics are kept at every step
    save_total_limit: int | None = 2  # newest checkpoints kept; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveConfig:
    """A contrastive baseline; temperature and dropout as published for language models."""

    method: Method = "info_nce"  # on pairs; simcse: on texts alone
    temperature: float = 0.05  # divides cosines
    symmetric: bool = False  # also document -> query; SimCSE is one-sided
    attention_dropout: float | None = None  # during training; None: the model's own
    per_device_train_batch_size: int = 64  # rows of the data per step
    max_tokens_per_batch: int = 16_384  # of a forward pass; memory only (see `Contrastive`)
    max_prompt_length: int = 1024  # tokens, template included
    system_prompt: str = SYSTEM_PROMPT  # before every text; left out of the embedding
    pooling: Pooling = "mean"  # how hidden states become a vector
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(
                f"ContrastiveConfig: method must be one of {get_args(Method)}, got {self.method!r}"
            )
        if self.pooling not in get_args(Pooling):
            raise ValueError(
                f"ContrastiveConfig: pooling must be one of {get_args(Pooling)}, "
                f"got {self.pooling!r}"
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"ContrastiveConfig: temperature must be finite and > 0, got {self.temperature}"
            )
        if self.attention_dropout is not None and not 0 <= self.attention_dropout < 1:
            raise ValueError(
                "ContrastiveConfig: attention_dropout must be in [0, 1), "
                f"got {self.attention_dropout}"
            )
        if self.per_device_train_batch_size < 2:
            raise ValueError(
                "ContrastiveConfig: per_device_train_batch_size must be >= 2 (the other rows are "
                f"the negatives), got {self.per_device_train_batch_size}"
            )
        if self.max_tokens_per_batch < 1:
            raise ValueError(
                f"ContrastiveConfig: max_tokens_per_batch must be >= 1, "
                f"got {self.max_tokens_per_batch}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Language modelling of texts and rationales."""

    per_device_train_batch_size: int = 32  # texts per step
    text_weight: float = 0.5  # of the texts' mean token loss beside the rationales'
    min_words: int = 3  # of a rationale
    max_words: int = 6  # of a rationale
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            max_steps=1000,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=50,
            adam_beta2=0.98,
            logging_steps=50,
            save_steps=100,
        )
    )

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                "PretrainConfig: 1 <= min_words <= max_words must hold, "
                f"got {self.min_words} and {self.max_words}"
            )
        finite = 0 <= self.text_weight < float("inf")
        if not finite or self.per_device_train_batch_size < 1:
            raise ValueError(
                "PretrainConfig: text_weight must be finite and >= 0, per_device_train_batch_size "
                f">= 1, got {self.text_weight} and {self.per_device_train_batch_size}"
            )
