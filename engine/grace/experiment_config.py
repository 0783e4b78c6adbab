"""Settings of the real-text experiment.  Loads no torch, so that a command line can show them."""

from __future__ import annotations

from dataclasses import dataclass, field

from tercet.engine.choices import Pooling
from tercet.engine.grace.fit_config import ContrastiveConfig, PretrainConfig
from tercet.engine.train_config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ScratchModel:
    """Sizes of a Qwen3 with tied embeddings, float32."""

    vocab_size: int = 4096  # of a byte-level BPE
    hidden_size: int = 96  # of a token's state
    intermediate_size: int = 288  # of the feed-forward layers
    num_hidden_layers: int = 3  # of attention and feed-forward
    num_attention_heads: int = 4  # of queries; a divisor of hidden_size
    num_key_value_heads: int = 2  # shared by the heads of queries
    max_position_embeddings: int = 512  # tokens of prompt and rationale, at most
    initializer_range: float = 0.05  # standard deviation of the random weights

    def __post_init__(self) -> None:
        if self.vocab_size < 512:
            raise ValueError(f"ScratchModel: vocab_size must be >= 512, got {self.vocab_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                "ScratchModel: hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How rationales are written, in training and when read out."""

    num_generations: int = 8  # G, rollouts of each document
    generation_batch_size: int = 128  # rollouts per step: groups times num_generations
    max_completion_length: int = 32  # new tokens, the end token included
    temperature: float = 1.0  # of the rollouts
    anchor_temperature: float = 0.5  # of queries, and of anchors where there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """The table of docs/grace.md; the same command goes on after a kill.

    data holds one JSON object per line with "question" and "answer".  Lists of seeds may grow
    between calls, other settings may not.
    """

    data: str = "gsm8k_test.jsonl"  # {"question": ..., "answer": ...} per line
    output_dir: str = "runs/grace_gsm8k"  # gets table.md, results.json and a folder per seed
    seeds: list[int] = field(default_factory=lambda: [0])  # of model and training, one run each
    num_train: int = 1000  # pairs, after a shuffle; the others are held out
    split_seed: int = 0  # of that shuffle
    max_prompt_length: int = 320  # tokens, template included
    system_prompt: str = "Name what matters."  # before every text; left out of the embedding
    pooling: Pooling = "mean"  # how hidden states become a vector, of every method
    model: ScratchModel = field(default_factory=ScratchModel)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    generation: Generation = field(default_factory=Generation)
    grace: TrainConfig = field(default_factory=lambda: TrainConfig(max_steps=100))
    info_nce: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    simcse: ContrastiveConfig = field(
        default_factory=lambda: ContrastiveConfig(method="simcse", attention_dropout=0.3)
    )

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"ExperimentConfig: seeds must differ, and be given, got {self.seeds}")
        if self.info_nce.method != "info_nce" or self.simcse.method != "simcse":
            raise ValueError(
                "ExperimentConfig: info_nce.method and simcse.method must be what they are called, "
                f"got {self.info_nce.method!r} and {self.simcse.method!r}"
            )
