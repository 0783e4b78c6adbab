"""One training step of the demo's size: Tercet's GRACE and GRPO against TRL's GRPOTrainer.

    python bench/grace_step.py            # makes the demo's model first, once (a minute or two)

Same taught model, same document prompts in the same order, same group size, limits and optimiser
work (one AdamW step per batch, no reference model, float32, no activation checkpointing):

    GRACE      128 rollouts of 16 documents, 16 queries, 16 negatives; embeddings and contrastive
               reward.  TRL has no counterpart of the 32 extra texts and of the embeddings
    GRPO       the 128 rollouts alone, paid by their length
    TRL GRPO   the same rollouts, the same reward

The sides take turns step by step, so that a busy machine slows all of them alike.  One thread, as
in the demo: matrices this small wait for a second one.
"""

# Peers are installed for benches only.
# pyright: reportMissingImports=false

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console

from tercet.engine.demo.config import GraceDemoConfig
from tercet.engine.demo.grace import GraceDemo
from tercet.engine.grace.data import load_dataset
from tercet.engine.grace.system import GraceSystem
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.records import Request, Rewards, Rollouts
from tercet.engine.sampler import TransformersSampler
from tercet.engine.trainer import Trainer

WARM_UP = 2
LEARNING_RATE = 1e-6  # hardly moves the model, so that lengths stay alike; the work is the same
WANTED_LENGTH = 10

Numbers = dict[str, float]


def length_reward(lengths: list[int]) -> list[float | None]:
    return [-float(abs(length - WANTED_LENGTH)) for length in lengths]


class LengthSystem:
    """GRACE's rollouts without queries, negatives and embeddings; paid by length."""

    def __init__(self, grace: GraceSystem) -> None:
        self.grace = grace

    def requests(self, step: int) -> list[Request]:
        rows = self.grace.requests(step)
        return [replace(r, pool_from=None) for r in rows if r.role == "rollout"]

    def rewards(self, rollouts: Rollouts) -> Rewards:
        lengths = [len(c.ids) for c in rollouts.completions]
        return Rewards(total=torch.tensor(length_reward(lengths), dtype=torch.float32))

    def evaluate(self, step: int) -> dict[str, float]:
        return {}

    def samples(self, rollouts: Rollouts, rewards: Rewards) -> list[dict[str, Any]]:
        return []


def our_side(demo: GraceDemo, folder: Path, *, grace: bool) -> tuple[GraceSystem, Callable]:
    """The GRACE system, and a function that runs one step and returns its numbers."""
    base = demo.grace_config("document")
    train = replace(base.train, learning_rate=LEARNING_RATE, logging_steps=10**6, eval_steps=0)
    config = replace(base, train=train, output_dir=str(folder))
    policy = Policy.from_pretrained(config.model)
    sampler = TransformersSampler(policy)
    system = GraceSystem(policy, sampler, load_dataset(config.data), config)
    chosen = system if grace else LengthSystem(system)
    trainer = Trainer(
        policy, sampler, chosen, train, RunLog.create(folder, config, total_steps=train.max_steps)
    )

    def step(number: int) -> Numbers:
        m = trainer.step(number)
        tokens = m["tokens_per_s"] * m["time/step_s"]
        return {
            "step_s": m["time/step_s"],
            "sample_s": m["time/sample_s"],
            "score_s": m["time/score_s"],
            "update_s": m["time/update_s"],
            "tokens_per_s": tokens / m["time/step_s"],
            "padding_saved": m["padding_saved"],
            "completion_length": m["completions/mean_length"],
        }

    return system, step


def run_trl(demo: GraceDemo, system: GraceSystem, steps: int, after: Callable[[int], None]):
    """Trains with TRL; `after(step)` runs between its steps.  Returns each step's numbers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings = demo.config
    rows = [example for step in range(1, steps + 1) for example in system.examples(step)]
    texts = [example.document for example in rows]
    prompts = [
        [
            {"role": "system", "content": system.config.data.system_prompt},
            {"role": "user", "content": text},
        ]
        for text in texts
    ]
    folder = str(demo.folder / "base")
    expected = {tuple(system.prompt(text).ids) for text in texts}
    numbers: list[Numbers] = []
    clock: defaultdict[str, float] = defaultdict(float)

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            clock["sample_s"] = time.perf_counter() - start
            return out

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            clock["score_s"] = time.perf_counter() - start - clock["sample_s"]
            masks = out["prompt_mask"], out["completion_mask"]
            clock["tokens"] = sum(float(mask.sum()) for mask in masks)
            clock["cells"] = sum(mask.numel() for mask in masks)
            clock["completion_length"] = float(out["completion_mask"].sum(1).float().mean())
            for ids, mask in zip(out["prompt_ids"], out["prompt_mask"].bool(), strict=True):
                if tuple(ids[mask].tolist()) not in expected:
                    raise AssertionError("TRL's prompts are not ours: the comparison is void")
            return out

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock["start"] = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            total = time.perf_counter() - clock["start"]
            numbers.append(
                {
                    "step_s": total,
                    "sample_s": clock["sample_s"],
                    "score_s": clock["score_s"],
                    "update_s": total - clock["sample_s"] - clock["score_s"],
                    "tokens_per_s": clock["tokens"] / total,
                    "padding_saved": 0.0,
                    "padding_share": 1 - clock["tokens"] / clock["cells"],
                    "completion_length": clock["completion_length"],
                }
            )
            after(state.global_step)

    rollouts = settings.num_generations * settings.groups_per_step
    with tempfile.TemporaryDirectory() as out:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=lambda completion_ids, **_: length_reward(
                [len(c) for c in completion_ids]
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            callbacks=[Turns()],
            args=GRPOConfig(
                output_dir=out,
                max_steps=steps,
                per_device_train_batch_size=rollouts,
                num_generations=settings.num_generations,
                max_completion_length=settings.max_completion_length,
                temperature=1.0,
                learning_rate=LEARNING_RATE,
                scale_rewards="none",
                beta=0.0,
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=harness.DEVICE.type == "cpu",
                shuffle_dataset=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
        )
        trainer.train()
    return numbers


def summary(numbers: list[Numbers]) -> Numbers:
    kept = numbers[WARM_UP:]
    medians = {key: statistics.median(n[key] for n in kept) for key in kept[0]}
    fifths = statistics.quantiles([n["step_s"] * 1e3 for n in kept], n=5, method="inclusive")
    return {"ms": medians["step_s"] * 1e3, "ms_p20": fifths[0], "ms_p80": fifths[3], **medians}


def report(sides: dict[str, list[Numbers]], demo: GraceDemo, out: Path) -> None:
    config = demo.config
    name = (
        f"{config.groups_per_step} groups x {config.num_generations} rollouts of at most "
        f"{config.max_completion_length} tokens, Qwen3 of 140k parameters, float32"
    )
    facts = harness.environment(("trl", "accelerate"))
    shown = {side: summary(numbers) for side, numbers in sides.items()}
    ours = shown["ours"]["ms"]
    load = round(os.getloadavg()[0], 2)
    print(f"grace_step: {name}; load {load}; threads {facts['threads']}; {facts['versions']}")
    for side, s in shown.items():
        line = {"op": "grace_step", "case": name, "side": side, **s, "slower": s["ms"] / ours}
        line |= {"rounds": len(sides[side]) - WARM_UP, "load_1min": load}
        harness.emit({**line, "device": harness.DEVICE.type, **facts}, out)
        saved = s.get("padding_share", s["padding_saved"])
        word = "of cells are padding" if "padding_share" in s else "of padding saved"
        print(
            f"  {side:10s} {s['ms']:7.1f} ms/step ({s['ms_p20']:.0f}-{s['ms_p80']:.0f}) "
            f"x{s['ms'] / ours:.2f}: sample {s['sample_s'] * 1e3:.0f}, score "
            f"{s['score_s'] * 1e3:.0f}, update {s['update_s'] * 1e3:.0f} ms; "
            f"{s['tokens_per_s']:.0f} tokens/s; {saved:.0%} {word}; "
            f"completions {s['completion_length']:.1f} tokens"
        )
    if "TRL GRPO" not in shown:
        print(f"  TRL GRPO not run: {harness.remedy(['trl'])}")
    print(harness.wrote(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the demo runs on one")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_grace_step"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "grace_step.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    demo = GraceDemo(GraceDemoConfig(output_dir=str(args.folder)), Console())
    demo.write_data()
    demo.make_base()
    steps = WARM_UP + args.steps
    sides: dict[str, list[Numbers]] = {"ours": [], "ours GRPO": []}
    with tempfile.TemporaryDirectory() as runs:
        system, grace_step = our_side(demo, Path(runs) / "grace", grace=True)
        _, grpo_step = our_side(demo, Path(runs) / "grpo", grace=False)

        def turn(step: int) -> None:
            sides["ours"].append(grace_step(step))
            sides["ours GRPO"].append(grpo_step(step))

        if find_spec("trl") is None:
            for step in range(1, steps + 1):
                turn(step)
        else:
            sides["TRL GRPO"] = run_trl(demo, system, steps, turn)
    report(sides, demo, args.out)


if __name__ == "__main__":
    main()
