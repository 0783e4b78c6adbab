"""Trains GRACE from one config: data, policy, sampler, the loop, and a folder with the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tercet.engine.checkpoint import read_run, resumable
from tercet.engine.config import changes
from tercet.engine.files import checkpoints
from tercet.engine.grace.config import GraceConfig
from tercet.engine.grace.data import Dataset, data_digests, drop_overlong, load_dataset
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.grace.readout import candidates, corpus_of
from tercet.engine.grace.system import GraceSystem
from tercet.engine.metrics import RunLog, hold_folder
from tercet.engine.model import Policy
from tercet.engine.sampler import TransformersSampler
from tercet.engine.trainer import Trainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a training run left behind."""

    folder: Path  # config.yaml, env.json, metrics.jsonl, samples.jsonl, events.jsonl, checkpoints
    checkpoint: Path  # the last one: a Hugging Face folder plus what a resume needs
    metrics: dict[str, float]  # of the last step


def train(config: GraceConfig, *, resume: bool | None = None) -> Run:
    """Trains up to train.max_steps and returns where the result lies.

    Args:
        config: see `GraceConfig`.
        resume: go on with the run in output_dir.  None: do so when it is unfinished and has these
            very settings and data, as after a kill; True: whatever they are; False: never.

    Raises:
        FileExistsError: output_dir holds a run that is not to be resumed, or files of others.
        FileNotFoundError: no such data file or model folder.
        ValueError: the data, the model or a setting cannot be used, or the run in output_dir is
            already past train.max_steps or was trained on other data; nothing was written.
        RuntimeError: another process writes to output_dir, or the model fails
            `Policy.prove_isolation` (nothing was written); NaN or infinity during training; see
            `Trainer.train`.
    """
    with hold_folder(Path(config.output_dir)):
        return _train(config, resume)


def _train(config: GraceConfig, resume: bool | None) -> Run:
    folder = Path(config.output_dir)
    resumes = _resumes(folder, config, resume)
    dataset = load_dataset(config.data)
    digests = data_digests(config.data)
    changed = _changed_data(folder, config, digests) if resumes else []
    if changed and not resume:
        raise ValueError(
            f"train: the data must be what the run in {folder} was trained on so far, got another "
            f"{' and '.join(changed)}; restore it, choose another output_dir, or go on with the "
            "new data (--resume, train(config, resume=True))"
        )
    torch.manual_seed(config.train.seed)  # dropout, if the model has any; sampling has own seeds
    policy = load_policy(config)
    sampler = TransformersSampler(policy, max_batch_size=config.max_batch_size)
    dataset = _fitting(dataset, policy, config)
    system = GraceSystem(policy, sampler, dataset, config)
    _prove_isolation(policy, config)
    with RunLog.create(
        folder,
        config,
        total_steps=config.train.max_steps,
        resume=resumes,
        about={"data_sha256": digests},
        held=True,
    ) as log:
        if not resumes:
            _tell(log, dataset, config)
        for path in changed:
            log.warn(f"{path} is not the data that this run has had until now")
        metrics = Trainer(policy, sampler, system, config.train, log).train()
        checkpoint = folder / f"checkpoint-{config.train.max_steps}"
        log.info(f"wrote {checkpoint} (a Hugging Face folder) and the run's records in {folder}")
    return Run(folder=folder, checkpoint=checkpoint, metrics=metrics)


def load_policy(config: GraceConfig) -> Policy:
    """The model and tokenizer of a config, on its device.

    Raises:
        FileNotFoundError, ValueError: as `Policy.from_pretrained`.
    """
    return Policy.from_pretrained(
        config.model,
        dtype=DTYPES[config.dtype],
        device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        attn=config.attn,
        activation_checkpointing=config.activation_checkpointing,
    )


def _resumes(folder: Path, config: GraceConfig, resume: bool | None) -> bool:
    """Whether to go on with what is in the folder."""
    settings = folder / "config.yaml"
    if not settings.exists():
        return False
    finished = (folder / f"checkpoint-{config.train.max_steps}").exists()
    changed = changes(settings, config)
    if resume or (resume is None and not changed and not finished):
        _check_not_past(folder, config.train.max_steps)
        return True
    kind = "a finished run" if finished else "a run"
    if changed:
        kind = f"a run with other settings ({', '.join(changed)})"
    raise FileExistsError(
        f"train: output_dir must be new or hold this run unfinished, got {kind} in {folder}; "
        "choose another output_dir, or resume it (--resume, train(config, resume=True))"
    )


def _check_not_past(folder: Path, max_steps: int) -> None:
    found = checkpoints(folder)
    last = int(found[0].name.partition("-")[2]) if found else 0
    if last > max_steps:
        raise ValueError(
            f"train: train.max_steps must be at least {last} to resume the run in {folder}, which "
            f"has checkpoint-{last}, got {max_steps}; raise it, or use that checkpoint"
        )


def _changed_data(folder: Path, config: GraceConfig, digests: Mapping[str, str]) -> list[str]:
    """The data files whose content is not what the checkpoint to go on from was trained on."""
    found = resumable(folder)
    before = None if found is None else read_run(found).get("data_sha256")
    if not isinstance(before, dict):
        return []
    return [getattr(config.data, name) for name in digests if before.get(name) != digests[name]]


def _prove_isolation(policy: Policy, config: GraceConfig) -> None:
    """In the precision that training will compute in, before anything is written."""
    try:
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=config.train.bf16):
            policy.prove_isolation()
    except FloatingPointError as error:
        raise RuntimeError(str(error)) from error


def _fitting(dataset: Dataset, policy: Policy, config: GraceConfig) -> Dataset:
    if config.data.overlong != "drop" or policy.tokenizer is None:
        return dataset
    builder = PromptBuilder(
        policy.tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        system_prompt=config.data.system_prompt,
    )
    return drop_overlong(dataset, builder)


def _tell(log: RunLog, dataset: Dataset, config: GraceConfig) -> None:
    """What a user should know before the first step."""
    log.info(f"{len(dataset.train)} training rows, {len(dataset.test)} held out")
    for note in dataset.notes:
        log.warn(note)
    if config.groups_per_step > len(dataset.train):
        log.warn(
            f"a step takes {config.groups_per_step} rows and the data has {len(dataset.train)}: "
            "rows repeat within a step (counted in groups/sharing_a_text)"
        )
    if config.groups_per_step == 1:
        log.warn("one group per step: there are no other groups, the hard term is 0")
    measured = min(len(dataset.test), config.evaluation.num_texts)
    if not dataset.test:
        log.warn(
            f"no row is held out (data.test_fraction {config.data.test_fraction} of "
            f"{len(dataset.train)} rows), so nothing can be measured, now or by tercet grace eval; "
            "raise data.test_fraction or set data.test_path"
        )
    elif config.train.eval_steps and measured < 2:
        log.warn(
            f"no evaluation: it needs two held-out rows, got {measured} ({len(dataset.test)} held "
            f"out, evaluation.num_texts {config.evaluation.num_texts})"
        )
    elif config.train.eval_steps:
        log.info(f"evaluations: {candidates(corpus_of(dataset.test[:measured]))}")
