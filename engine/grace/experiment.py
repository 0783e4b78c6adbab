"""Worked problems as a retrieval task: every method of the table, on a model made on the spot.

A problem's question is the query, its worked answer the document.  Per seed: a tokenizer and a tiny
model are made from the training pairs alone, then trained once with each method from the same
weights, and read out on the held-out pairs.  Every stage keeps checkpoints and every finished row
is kept, so the same command goes on after a kill.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tercet.engine.config import ConfigError, changes, to_yaml
from tercet.engine.data import read_rows
from tercet.engine.files import replace_text, sha256
from tercet.engine.grace.baselines import held_out_measures, train_contrastive
from tercet.engine.grace.config import GraceConfig, GraceData
from tercet.engine.grace.data import Example
from tercet.engine.grace.encoder import GraceEncoder
from tercet.engine.grace.evaluate import held_out_loss
from tercet.engine.grace.experiment_config import ExperimentConfig
from tercet.engine.grace.fit import fit
from tercet.engine.grace.fit_config import ContrastiveConfig, FitConfig
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.grace.readout import Corpus, corpus_of
from tercet.engine.grace.reward_config import Form, RewardConfig
from tercet.engine.grace.scratch import RationaleModelling, build_policy, build_tokenizer
from tercet.engine.grace.table import bm25_row, encoder_row, markdown_table
from tercet.engine.grace.training import train
from tercet.engine.metrics import RunLog, check_run_folder
from tercet.engine.model import Policy

CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
FINAL_LINE = re.compile(r"\n?####[^\n]*\s*\Z")
COLUMNS = {
    "recall@1": "recall@1",
    "recall@10": "recall@10",
    "ndcg@10": "nDCG@10",
    "anisotropy": "mean cosine",
    "distinct_share": "distinct",
    "words_in_text": "words in text",
    "words_in_partner": "in partner",
    "clipped_ratio": "cut off",
    "held_out_loss": "nats/token",
    "held_out_truncated": "texts cut",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Question and worked answer of each problem."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]

    @property
    def corpus(self) -> Corpus:
        """The held-out pairs."""
        return corpus_of([Example(query=q, document=a) for q, a in self.test])


def worked_answer(answer: str) -> str:
    """The steps of a worked answer in one paragraph: no calculator marks, no line of the result.

    The line ("#### 18") repeats what the last step says in words.
    """
    return one_paragraph(FINAL_LINE.sub("", CALCULATOR_MARK.sub("", answer)))


def one_paragraph(text: str) -> str:
    """The text with single spaces and nothing else between its words."""
    return " ".join(text.split())


def read_pairs(path: str, num_train: int, *, split_seed: int = 0) -> Pairs:
    """The problems of a file, shuffled, the first num_train of them for training.

    Raises:
        FileNotFoundError, ValueError: as `read_rows`; too few rows; an answer without a step.
    """
    rows = read_rows(path, required=("question", "answer"))
    pairs = [
        (one_paragraph(str(row["question"])), worked_answer(str(row["answer"]))) for row in rows
    ]
    empty = [rows.where(i) for i, pair in enumerate(pairs) if not all(pair)]
    if empty:
        raise ValueError(
            f"read_pairs: a question and a worked answer must have text, got none at {empty[0]}"
        )
    if not 1 <= num_train <= len(pairs) - 2:
        raise ValueError(
            f"read_pairs: num_train must leave two of the {len(pairs)} rows held out, "
            f"got {num_train}"
        )
    random.Random(f"split {split_seed}").shuffle(pairs)
    return Pairs(train=pairs[:num_train], test=pairs[num_train:])


class Experiment:
    """The stages of one seed, each skipped when it is finished."""

    def __init__(self, config: ExperimentConfig, pairs: Pairs, seed: int) -> None:
        self.config, self.pairs, self.seed = config, pairs, seed
        self.folder = Path(config.output_dir) / f"seed-{seed}"
        self.results = self.folder / "rows.json"

    def rows(self) -> dict[str, dict[str, float]]:
        """What is known so far: name of the row -> measures.

        Raises:
            ValueError: rows.json is not what this class writes.
        """
        if not self.results.exists():
            return {}
        try:
            found = json.loads(self.results.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(self._bad_rows(f"not JSON ({error})")) from error
        known = found.values() if isinstance(found, dict) else [found]
        if not all(isinstance(row, dict) and _is_row(row) for row in known):
            raise ValueError(self._bad_rows("something else"))
        return found

    def _bad_rows(self, got: str) -> str:
        return (
            f"experiment: {self.results} must hold numbers per row, recall@1 and recall@10 among "
            f"them, got {got}; delete it, and the rows are measured again"
        )

    def run(self, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Runs what is missing.  Returns all rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._row("BM25", lambda: bm25_row(self.pairs.corpus), say)
        base = self.base()
        self._rows("base", base, ("prompt", "greedy", "sampled"), say)
        self._rows("InfoNCE", self.contrastive("info_nce", base), ("prompt", "greedy"), say)
        for form in ("document", "paper"):
            trained = self.grace(f"grace_{form}", base, form)
            self._rows(f"GRACE, {form} form", trained, ("prompt", "greedy", "sampled"), say)
        self._rows("SimCSE, questions", self.contrastive("simcse", base), ("prompt",), say)
        trained = self.grace("grace_questions", base, "document", questions_only=True)
        self._rows("GRACE, questions", trained, ("prompt", "greedy", "sampled"), say)
        return self.rows()

    def base(self) -> Path:
        """Tokenizer and model from the training pairs, taught to read and to name shared words."""
        config = replace(
            self.config.pretrain, fit=replace(self.config.pretrain.fit, seed=self.seed)
        )
        folder = self.folder / "base"
        final = folder / f"checkpoint-{config.fit.max_steps}"
        if final.exists():
            return final
        texts = [text for pair in self.pairs.train for text in pair]
        template = ["system\nuser\nassistant\n" + self.config.system_prompt] * (len(texts) // 10)
        tokenizer = build_tokenizer([*texts, *template], self.config.model.vocab_size)
        policy = build_policy(tokenizer, self.config.model, seed=self.seed)
        prompt = PromptBuilder(
            tokenizer,
            max_prompt_length=self.config.max_prompt_length,
            system_prompt=self.config.system_prompt,
        )
        objective = RationaleModelling(policy, self.pairs.train, prompt, config)
        with self._log(folder, config, config.fit) as log:
            log.info(f"{objective.num_skipped} texts share no word with their partner, left out")
            fit(policy, objective, config.fit, log)
        return final

    def contrastive(self, method: str, base: Path) -> Path:
        """InfoNCE on the pairs, or SimCSE on the questions alone."""
        config: ContrastiveConfig = getattr(self.config, method)
        config = replace(
            config,
            max_prompt_length=self.config.max_prompt_length,
            system_prompt=self.config.system_prompt,
            pooling=self.config.pooling,
            fit=replace(config.fit, seed=self.seed),
        )
        folder = self.folder / method
        final = folder / f"checkpoint-{config.fit.max_steps}"
        if final.exists():
            return final
        supervised = method == "info_nce"
        train, test = (
            [Example(document=a, query=q) if supervised else Example(document=q) for q, a in pairs]
            for pairs in (self.pairs.train, self.pairs.test)
        )
        policy = Policy.from_pretrained(base)
        evaluate = held_out_measures(policy, test, config)
        with self._log(folder, config, config.fit) as log:
            train_contrastive(policy, train, config, log, evaluate=evaluate)
        return final

    def grace(self, name: str, base: Path, form: Form, *, questions_only: bool = False) -> Path:
        """GRACE from the base model, on the pairs or on the questions alone."""
        config, kind = self.config, "questions" if questions_only else "pairs"
        files = {part: self.folder / f"{kind}_{part}.jsonl" for part in ("train", "test")}
        for part, path in files.items():
            rows = getattr(self.pairs, part)
            lines = [
                {"text": q} if questions_only else {"query": q, "positive": a} for q, a in rows
            ]
            replace_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        run = GraceConfig(
            model=str(base),
            data=GraceData(
                path=str(files["train"]),
                test_path=str(files["test"]),
                mode="unsupervised" if questions_only else "supervised",
                max_prompt_length=config.max_prompt_length,
                system_prompt=config.system_prompt,
            ),
            output_dir=str(self.folder / name),
            pooling=config.pooling,
            reward=RewardConfig(form=form),
            train=replace(config.grace, seed=self.seed),
            **asdict(config.generation),
        )
        final = self.folder / name / f"checkpoint-{config.grace.max_steps}"
        return final if final.exists() else train(run).checkpoint

    def _log(self, folder: Path, config: Any, steps: FitConfig) -> RunLog:
        return RunLog.create(folder, config, total_steps=steps.max_steps, resume=folder.exists())

    def _rows(
        self, name: str, model: Path, readouts: Sequence[str], say: Callable[[str], None]
    ) -> None:
        named = {readout: f"{name}: {readout}" for readout in readouts}
        if all(row in self.rows() for row in named.values()):
            return
        policy = Policy.from_pretrained(model)
        encoder = GraceEncoder(
            policy,
            max_prompt_length=self.config.max_prompt_length,
            system_prompt=self.config.system_prompt,
            pooling=self.config.pooling,
        )
        texts = [text for pair in self.pairs.test for text in pair]
        for readout, row in named.items():
            how = self._readout(readout)
            self._row(
                row,
                lambda how=how: {
                    **encoder_row(encoder, self.pairs.corpus, **how),
                    **held_out_loss(policy, texts),
                },
                say,
            )

    def _readout(self, readout: str) -> dict[str, Any]:
        length = self.config.generation.max_completion_length
        return {
            "prompt": {"generate": False},
            "greedy": {"max_completion_length": length},
            "sampled": {"max_completion_length": length, "temperature": 1.0, "seed": self.seed},
        }[readout]

    def _row(
        self, name: str, measure: Callable[[], dict[str, float]], say: Callable[[str], None]
    ) -> None:
        rows = self.rows()
        if name not in rows:
            rows[name] = measure()
            replace_text(self.results, json.dumps(rows, indent=2) + "\n")
        say(
            f"seed {self.seed}  {name}: recall@1 {rows[name]['recall@1']:.3f}, "
            f"recall@10 {rows[name]['recall@10']:.3f}"
        )


def run(config: ExperimentConfig, say: Callable[[str], None]) -> str:
    """Runs all seeds; writes results.json and table.md.  Returns the table.

    Raises:
        ConfigError: output_dir holds the experiment with other settings, or on other data.
        FileNotFoundError, ValueError, RuntimeError: as `read_pairs`, `fit` and `train`.
    """
    folder = Path(config.output_dir)
    pairs = read_pairs(config.data, config.num_train, split_seed=config.split_seed)
    _claim(folder, config)
    say(f"{len(pairs.train)} pairs for training, {len(pairs.test)} held out")
    seeds = [Experiment(config, pairs, seed).run(say) for seed in config.seeds]
    names = list(dict.fromkeys(name for rows in seeds for name in rows))
    rows = {name: [of_seed[name] for of_seed in seeds if name in of_seed] for name in names}
    table = markdown_table(rows, COLUMNS)
    replace_text(folder / "results.json", json.dumps(rows, indent=2) + "\n")
    replace_text(folder / "table.md", table)
    return table


def _is_row(row: dict[str, object]) -> bool:
    measured = {"recall@1", "recall@10"} <= row.keys()
    return measured and all(isinstance(value, int | float) for value in row.values())


def _claim(folder: Path, config: ExperimentConfig) -> None:
    """Writes config.yaml, or compares with the one that is there; data is known by its content."""
    path = folder / "config.yaml"
    settings = replace(config, seeds=[0], data=f"sha256:{sha256(config.data)}", output_dir="")
    if not path.exists():
        check_run_folder(folder)
    elif changed := changes(path, settings):
        raise ConfigError(
            "experiment: output_dir must be new or hold this experiment, got other settings or "
            f"data in {path} ({', '.join(changed)}); choose another output_dir, or restore them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(path, to_yaml(settings))
