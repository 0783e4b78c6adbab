"""Settings of the demo.  Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from tercet.engine.train_config import LARGEST_RATE, Schedule

MAX_COMPLETION_LENGTH = 64  # tokens that the tiny model's positions leave beside a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Supervised training of the tiny model: until `accuracy`, then `noisy_steps` more.

    Small batches and a high learning rate: with larger batches the same seconds teach it nothing.
    """

    accuracy: float = 0.93  # share of fresh texts whose topic the first name word hits
    max_steps: int = 1500  # without reaching it is an error
    batch_size: int = 32  # texts per step
    learning_rate: float = 5e-3  # of AdamW, after warm-up
    warmup_steps: int = 30  # the rate rises linearly over these
    text_weight: float = 1.0  # of the text's own tokens; below it, texts become too easy to tell
    noisy_steps: int = 100  # on rationales that are vague or wrong as often as the next two say
    p_vague: float = 0.5  # of a noisy rationale that says nothing
    p_right: float = 0.6  # of the others: the right topic, else any

    def __post_init__(self) -> None:
        if not 0.0 < self.accuracy < 1.0:
            raise ValueError(f"PretrainConfig: accuracy must be in (0, 1), got {self.accuracy}")
        for name in ("max_steps", "batch_size", "noisy_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"PretrainConfig: {name} must be >= 1, got {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"PretrainConfig: warmup_steps must be >= 0, got {self.warmup_steps}")
        for name in ("learning_rate", "text_weight"):
            _check_rate("PretrainConfig", name, getattr(self, name))
        for name in ("p_vague", "p_right"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"PretrainConfig: {name} must be in [0, 1], got {getattr(self, name)}"
                )


def _check_rate(owner: str, name: str, value: float) -> None:
    if not 0.0 <= value <= LARGEST_RATE:
        raise ValueError(f"{owner}: {name} must be in [0, 1e30], got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraceDemoConfig:
    """What the demo does; the defaults take a few minutes on two CPU cores."""

    output_dir: str = "runs/demo"
    seed: int = 0  # of the world, the model and everything drawn
    max_steps: int = 100  # of each of the three trainings
    learning_rate: float = 1e-3  # of both GRACE runs; 2e-3 merges topics, 3e-4 is slower
    warmup_steps: int = 20  # of all three; without, Adam's first steps ended in collapse (seed 1)
    lr_scheduler_type: Schedule = "linear"  # of all three; constant spreads seeds twice as far
    contrastive_learning_rate: float = 1e-3  # of the InfoNCE baseline
    num_generations: int = 8  # G, rollouts of each document
    groups_per_step: int = 16  # B, rows of the data per step
    max_completion_length: int = 14  # tokens; rationales take 8 to 11
    logging_steps: int = 20  # also between evaluations on 40 held-out pairs
    eval_repeats: int = 2  # samplings of every held-out text, averaged in the table
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ValueError(
                f"GraceDemoConfig: output_dir must not be empty, got {self.output_dir!r}; "
                "name a folder"
            )
        least = {
            "seed": 0,
            "max_steps": 1,
            "warmup_steps": 0,
            "num_generations": 2,  # a group of one is its own baseline
            "groups_per_step": 2,  # the other rows are InfoNCE's negatives
            "max_completion_length": 1,
            "logging_steps": 1,
            "eval_repeats": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise ValueError(f"GraceDemoConfig: {name} must be >= {bound}, got {value}")
        if self.max_completion_length > MAX_COMPLETION_LENGTH:
            raise ValueError(
                f"GraceDemoConfig: max_completion_length must be <= {MAX_COMPLETION_LENGTH} (the "
                f"tiny model's positions), got {self.max_completion_length}"
            )
        for name in ("learning_rate", "contrastive_learning_rate"):
            _check_rate("GraceDemoConfig", name, getattr(self, name))
