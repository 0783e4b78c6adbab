"""Settings of the demo.  Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Supervised training of the tiny model: until `accuracy`, then `noisy_steps` more.

    Small batches and a high learning rate: with larger batches the same seconds teach it nothing.
    """

    accuracy: float = 0.93  # share of fresh texts whose topic the first name word hits
    max_steps: int = 1500  # without reaching it is an error
    batch_size: int = 32
    learning_rate: float = 5e-3
    warmup_steps: int = 30
    text_weight: float = 1.0  # of the text's own tokens; below it, texts become too easy to tell
    noisy_steps: int = 100
    p_vague: float = 0.5  # of a noisy rationale that says nothing
    p_right: float = 0.6  # of the others: the right topic, else any

    def __post_init__(self) -> None:
        if not 0.0 < self.accuracy < 1.0:
            raise ValueError(f"PretrainConfig: accuracy must be in (0, 1), got {self.accuracy}")
        for name in ("max_steps", "batch_size", "noisy_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"PretrainConfig: {name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceDemoConfig:
    """What the demo does; the defaults take a few minutes on two CPU cores."""

    output_dir: str = "runs/demo"
    seed: int = 0  # of the world, the model and everything drawn
    max_steps: int = 100  # of each of the three trainings
    learning_rate: float = 1e-3  # of both GRACE runs; 2e-3 merges topics, 3e-4 is slower
    warmup_steps: int = 20  # of all three; without, Adam's first steps ended in collapse (seed 1)
    contrastive_learning_rate: float = 1e-3  # of the InfoNCE baseline
    num_generations: int = 8  # G, rollouts of each document
    groups_per_step: int = 16  # B
    max_completion_length: int = 14  # tokens; rationales take 8 to 11
    logging_steps: int = 20  # also between evaluations on 40 held-out pairs
    eval_repeats: int = 2  # samplings of every held-out text, averaged in the table
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        for name in ("max_steps", "groups_per_step", "logging_steps", "eval_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"GraceDemoConfig: {name} must be >= 1, got {getattr(self, name)}")
