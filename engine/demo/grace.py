"""The GRACE demo: a model is made, rewarded in the paper's form and in the repaired one, and shown.

Five readings of the same held-out texts (topics are known, word pairs are new):

    base          the taught model, text alone          base_reasoning   with a rationale
    paper         trained with the paper's reward       document         with the repaired one
    infonce       the same rows, a contrastive loss on embeddings of the text alone

Everything runs through the same path as a real run: data files, `train`, `GraceEncoder`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from tercet.engine.config import changes, to_plain, to_yaml
from tercet.engine.demo.config import GraceDemoConfig
from tercet.engine.demo.measure import read_with_rationales, read_without_rationales
from tercet.engine.demo.results import DemoResults, Reading, Sample, read_results
from tercet.engine.demo.show import report_tables, show_results
from tercet.engine.demo.tiny import SYSTEM_PROMPT, pretrain
from tercet.engine.demo.world import World, write_triples
from tercet.engine.environment import environment, torch_threads
from tercet.engine.files import replace_text
from tercet.engine.grace.baselines import held_out_measures, train_contrastive
from tercet.engine.grace.config import GraceConfig, GraceData
from tercet.engine.grace.data import data_digests, load_dataset
from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.fit_config import ContrastiveConfig, FitConfig
from tercet.engine.grace.reward_config import Form, RewardConfig
from tercet.engine.grace.training import train
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.report import write_report
from tercet.engine.report_runs import TABLES
from tercet.engine.train_config import TrainConfig

MAX_PROMPT_LENGTH = 64  # tokens; the longest prompt of the world has 19
NUM_TRIPLES = 2048  # training rows
AFRESH = "delete the folder, or name another with --output-dir, to start afresh"
SHOWN_TEXTS = (0, 70, 340)  # of the held-out ones: two queries and a document, chosen beforehand


class Stopwatch:
    """Seconds per named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what happens within."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


class GraceDemo:
    """The stages of the demo; a stage whose result lies in the folder is not done again."""

    def __init__(self, config: GraceDemoConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.folder = Path(config.output_dir)
        self.world = World(config.seed)
        self.texts = self.world.held_out()

    def write_data(self) -> None:
        """Training rows, and one held-out pair per topic to watch retrieval during training."""
        write_triples(self.folder / "data" / "train.jsonl", self.world.triples(NUM_TRIPLES))
        write_triples(self.folder / "data" / "test.jsonl", self.world.held_out_triples())

    def make_base(self) -> dict[str, float]:
        """The taught model in base/; returns the steps it took and the accuracy it reached."""
        folder = self.folder / "base"
        facts = folder / "pretrain.json"
        if not self._kept(facts):
            config = self.config
            made = pretrain(
                self.world, config.pretrain, seed=config.seed, progress=self._tell_accuracy
            )
            made.policy.save(folder)
            text = json.dumps({"steps": made.steps, "accuracy": made.accuracy})
            replace_text(facts, text + "\n")
        read = json.loads(facts.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in read.items()}

    def grace_config(self, form: Form) -> GraceConfig:
        """The settings of one GRACE run; what is not named here is the product's default."""
        config = self.config
        return GraceConfig(
            model=str(self.folder / "base"),
            data=self._data(),
            output_dir=str(self.folder / form),
            reward=RewardConfig(form=form),
            train=TrainConfig(
                max_steps=config.max_steps,
                seed=config.seed,
                learning_rate=config.learning_rate,
                warmup_steps=config.warmup_steps,
                lr_scheduler_type=config.lr_scheduler_type,
                logging_steps=config.logging_steps,
                eval_steps=config.logging_steps,
                save_steps=50,
                save_total_limit=1,
            ),
            num_generations=config.num_generations,
            generation_batch_size=config.num_generations * config.groups_per_step,
            max_completion_length=config.max_completion_length,
            device="cpu",
        )

    def train_grace(self, form: Form) -> Path:
        """Runs GRACE with one form of the reward; returns its last checkpoint."""
        config = self.grace_config(form)
        checkpoint = Path(config.output_dir) / f"checkpoint-{config.train.max_steps}"
        return checkpoint if self._kept(checkpoint) else train(config).checkpoint

    def train_infonce(self) -> Path:
        """Trains the contrastive baseline on the same rows; returns its last checkpoint."""
        config, folder = self.config, self.folder / "infonce"
        checkpoint = folder / f"checkpoint-{config.max_steps}"
        if self._kept(checkpoint):
            return checkpoint
        settings = ContrastiveConfig(
            per_device_train_batch_size=config.groups_per_step,
            max_prompt_length=MAX_PROMPT_LENGTH,
            system_prompt=SYSTEM_PROMPT,
            fit=FitConfig(
                max_steps=config.max_steps,
                seed=config.seed,
                learning_rate=config.contrastive_learning_rate,
                warmup_steps=config.warmup_steps,
                lr_scheduler_type=config.lr_scheduler_type,
                logging_steps=config.logging_steps,
                eval_steps=config.logging_steps,
                save_total_limit=1,
            ),
        )
        policy = Policy.from_pretrained(self.folder / "base", device="cpu")
        where = self._data()
        data = load_dataset(where)
        about = {"data": to_plain(where), "data_sha256": data_digests(where)}
        evaluate = held_out_measures(policy, data.test, settings)
        with RunLog.create(
            folder, settings, total_steps=config.max_steps, resume=folder.exists(), about=about
        ) as log:
            train_contrastive(policy, data.train, settings, log, evaluate=evaluate)
        return checkpoint

    def read(self, model: str, path: Path) -> tuple[Reading, list[str]]:
        """One row of the table, and the rationales of the first sampling."""
        encoder = GraceEncoder.from_pretrained(
            path,
            device="cpu",
            max_prompt_length=MAX_PROMPT_LENGTH,
            system_prompt=SYSTEM_PROMPT,
            max_batch_size=256,
        )
        if model in ("base", "infonce"):
            return read_without_rationales(model, encoder, self.texts), []
        return read_with_rationales(
            model,
            encoder,
            self.world,
            max_completion_length=self.config.max_completion_length,
            repeats=self.config.eval_repeats,
        )

    def _data(self) -> GraceData:
        return GraceData(
            path=str(self.folder / "data" / "train.jsonl"),
            test_path=str(self.folder / "data" / "test.jsonl"),
            max_prompt_length=MAX_PROMPT_LENGTH,
            system_prompt=SYSTEM_PROMPT,
        )

    def _kept(self, result: Path) -> bool:
        """Whether the result of a stage is there already; says so."""
        if found := result.exists():
            self.console.print(f"{result} is there from before: kept", soft_wrap=True)
        return found

    def _tell_accuracy(self, step: int, accuracy: float) -> None:
        if step % self.config.logging_steps == 0:
            self.console.print(f"step {step}  topic named right {accuracy:.2f}")


def run_demo(config: GraceDemoConfig, *, console: Console | None = None) -> DemoResults:
    """Makes, trains, measures and shows; the folder holds the runs, results.json and report.html.

    A demo that was stopped goes on where it was; a finished one is shown again.

    Raises:
        FileExistsError: output_dir holds a demo with other settings.
        ValueError: or the results of an older version, or half of them.
        RuntimeError: the base model does not reach its accuracy; see `pretrain`.
    """
    console = Console(highlight=False) if console is None else console
    demo = GraceDemo(config, console)
    results = demo.folder / "results.json"
    goes_on = _claim(demo.folder, config)
    if not results.exists():
        if goes_on:
            console.print(
                f"{demo.folder} holds this demo, unfinished: going on with what is there "
                f"({AFRESH})",
                soft_wrap=True,
            )
        with torch_threads(1):
            found = _run_stages(demo, console)
        replace_text(results, json.dumps(asdict(found), indent=2) + "\n")
    else:
        console.print(
            f"{demo.folder} holds this demo, finished: showing it again ({AFRESH})", soft_wrap=True
        )
    found = read_results(results)
    show_results(found, console)
    return found


def _run_stages(demo: GraceDemo, console: Console) -> DemoResults:
    watch = Stopwatch()
    console.rule("1  A small world, and a tiny model that learns to write about it")
    demo.write_data()
    with watch.stage("pretrain"):
        base = demo.make_base()
    paths = {"base": demo.folder / "base", "base_reasoning": demo.folder / "base"}
    console.rule("2  GRACE, the paper's reward: watch eval/distinct_share")
    with watch.stage("paper"):
        paths["paper"] = demo.train_grace("paper")
    console.rule("3  GRACE, the repaired reward: what is written pays for being like others")
    with watch.stage("document"):
        paths["document"] = demo.train_grace("document")
    console.rule("4  InfoNCE: no rationale, gradient through the embedding")
    with watch.stage("infonce"):
        paths["infonce"] = demo.train_infonce()
    console.rule("5  Held-out texts")
    with watch.stage("evaluate"):
        read = {model: demo.read(model, path) for model, path in paths.items()}
    found = DemoResults(
        folder=str(demo.folder),
        seed=demo.config.seed,
        pretrain_steps=int(base["steps"]),
        pretrain_accuracy=base["accuracy"],
        readings=[reading for reading, _ in read.values()],
        samples=[
            Sample(
                text=demo.texts[i].text,
                topic=demo.world.topics[demo.texts[i].topic].names[0],
                base=read["base_reasoning"][1][i],
                paper=read["paper"][1][i],
                document=read["document"][1][i],
            )
            for i in SHOWN_TEXTS
        ],
        environment=environment(),
    )
    with watch.stage("report"):
        tables = [asdict(table) for table in report_tables(found)]
        replace_text(demo.folder / TABLES, json.dumps(tables, indent=2) + "\n")
        write_report(demo.folder)
    return replace(found, seconds={**watch.seconds, "total": sum(watch.seconds.values())})


def _claim(folder: Path, config: GraceDemoConfig) -> bool:
    """Writes the settings into a new folder, or checks that the folder has these very ones.

    Returns:
        Whether it had them.
    """
    settings = folder / "demo.yaml"
    if changed := changes(settings, config) if settings.exists() else []:
        raise FileExistsError(
            f"run_demo: output_dir must be new or hold this demo, got one with other settings in "
            f"{folder} ({', '.join(changed)}); choose another --output-dir"
        )
    goes_on = settings.exists()
    # what a kill left half-written is nobody's
    kept = [p for p in folder.glob("*") if p.suffix != ".tmp"]
    if kept and not goes_on:
        raise FileExistsError(
            f"run_demo: output_dir must be new or hold this demo, got other files in {folder}; "
            "choose another --output-dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(settings, to_yaml(config))
    return goes_on
