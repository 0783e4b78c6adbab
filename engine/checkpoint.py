"""Checkpoints: Hugging Face folders plus what an exact resume needs.

checkpoint-N/ holds the model and tokenizer as `save_pretrained` writes them, tercet.json with the
settings of the run, optimizer.pt, rng.pt, trainer_state.json, and manifest.json with the size and
SHA-256 of every other file.  It is written
as checkpoint-N.tercet.tmp, flushed to the disk, then renamed; only then does `latest` name it, and
an old one is renamed before it is removed.  So a kill or a full disk at any moment leaves the
checkpoint before it as it was, and no checkpoint that lacks files.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from tercet.engine.files import checkpoints, read_object, removed_on_failure, replace_text, sha256
from tercet.engine.model import Policy

MANIFEST, STATE, OPTIMIZER, RNG = "manifest.json", "trainer_state.json", "optimizer.pt", "rng.pt"
RUN = "tercet.json"
OURS = re.compile(r"\.?checkpoint-\d+\.tercet\.(tmp(-\w+)?|old)")  # folders a kill leaves behind


class Checkpoint(NamedTuple):
    """What was resumed from."""

    folder: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    *,
    run: Mapping[str, Any],
    save_total_limit: int | None = None,
) -> Path:
    """Writes folder/checkpoint-{step}, points `latest` at it, and removes the oldest ones.

    Checkpoints of later steps, left behind by a resume from an earlier one, are removed too: they
    belong to another course of the training.

    Args:
        folder: of the run.
        state: the trainer's own, as JSON can hold it.
        run: what `read_run` gives back, wherever the checkpoint is copied to; as JSON can hold it.
        save_total_limit: how many checkpoints stay; None: all.

    Raises:
        OSError: the disk is full (ENOSPC); names the folder and the free space.  What was half
            written is gone, and the checkpoints before it are as they were.
    """
    final = folder / f"checkpoint-{step}"
    temporary = folder / f"checkpoint-{step}.tercet.tmp"
    with removed_on_failure(
        temporary,
        folder,
        function="save_checkpoint",
        content="the checkpoint",
        remedy="the checkpoints before it are untouched; free some space or set save_total_limit, "
        "then resume",
    ):
        _sweep(folder)
        temporary.mkdir(parents=True)
        policy.save(temporary)
        _save_tensors(temporary / OPTIMIZER, optimizer.state_dict())
        _save_tensors(temporary / RNG, _rng_state())
        (temporary / RUN).write_text(json.dumps(run, indent=2) + "\n")
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        files = {str(p.relative_to(temporary)): _fingerprint(p) for p in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=2))
        for path in (*_files(temporary), temporary):
            _flush(path)
        _move(temporary, final)
        replace_text(folder / "latest", final.name + "\n")
        _flush(folder)
    found = checkpoints(folder)
    here = found.index(final)
    kept = None if save_total_limit is None else here + save_total_limit
    _remove([*found[:here], *([] if kept is None else found[kept:])])
    return final


def load_latest(
    folder: Path, policy: Policy, optimizer: Optimizer, *, warn: Callable[[str], None]
) -> Checkpoint | None:
    """Restores weights, optimiser and random state from the checkpoint that `latest` names.

    A checkpoint that does not match its manifest (cut in half, edited) is passed over for the one
    before it, and `warn` is told, as it is of later checkpoints, which the next save removes.  What
    a kill left half-written or half-removed is removed.  The optimiser keeps its present settings
    (rate, decay).

    Returns:
        What was restored; None when the folder has no checkpoint.

    Raises:
        RuntimeError: there are checkpoints, and none of them is whole.
        ValueError: optimizer.pt or rng.pt is not what it should be, though as the manifest says.
    """
    _sweep(folder)
    candidates = _candidates(folder, warn)
    if later := [path.name for path in checkpoints(folder) if path not in candidates]:
        warn(
            f"{', '.join(later)} in {folder} come after {candidates[0].name}, which `latest` "
            "names: the next save removes them"
        )
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return _restore(path, policy, optimizer)
        warn(
            f"{path} is damaged ({fault}); going on from the checkpoint before it, and the next "
            "save removes this one"
        )
    if checkpoints(folder):
        raise RuntimeError(
            f"load_latest: {folder} must hold a whole checkpoint, got only damaged ones; "
            "restore one from a copy, or start again in another folder"
        )
    return None


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it (`RunLog.about`); {} when it says nothing.

    Raises:
        ValueError: its tercet.json is not a JSON object.
    """
    path = checkpoint / RUN
    if not path.is_file():
        return {}
    return read_object(path, "read_run", "copy the checkpoint again")


def find_fault(checkpoint: Path, *, checksums: bool = True) -> str | None:
    """What is wrong with a checkpoint, by its manifest and records; None when it is whole.

    Without checksums, which read every byte, what has the right size passes.
    """
    try:
        files = _manifest(checkpoint)
        for name, expected in files.items():
            size = (checkpoint / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
        for name, expected in files.items() if checksums else ():
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} has another checksum than when it was written"
        _read_state(checkpoint)
        read_run(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def resumable(folder: Path, *, checksums: bool = True) -> Path | None:
    """The checkpoint that `load_latest` would go on from; None when there is no whole one.

    Args:
        folder: of the run.
        checksums: as `find_fault`.
    """
    for path in _candidates(folder, lambda _: None):
        if find_fault(path, checksums=checksums) is None:
            return path
    return None


def _manifest(checkpoint: Path) -> dict[str, dict[str, int | str]]:
    """Size and checksum by file name, of all files that a checkpoint must have."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        if files.keys() >= {STATE, OPTIMIZER, RNG, RUN, "config.json"} and all(
            entry.keys() == {"size", "sha256"} for entry in files.values()
        ):
            return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{MANIFEST} cannot be read")


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own state, and the step that the folder's name says."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        state = None
    step = state.get("step") if isinstance(state, dict) else None
    number = checkpoint.name.partition("-")[2]
    if not isinstance(state, dict) or type(step) is not int or f"{step}" != number:
        raise ValueError(f"{STATE} does not hold step {number}, which the folder's name says")
    return state


def _restore(path: Path, policy: Policy, optimizer: Optimizer) -> Checkpoint:
    state = _read_state(path)
    saved = Policy.from_pretrained(path, dtype=policy.dtype).model
    with _readable(path / OPTIMIZER, "an AdamW state of this model"):
        optimizer_state = _load_tensors(path / OPTIMIZER)
        for old, now in zip(optimizer_state["param_groups"], optimizer.param_groups, strict=True):
            old.update({key: value for key, value in now.items() if key != "params"})
        optimizer.load_state_dict(optimizer_state)
        for parameter, moments in optimizer.state.items():
            if moments["exp_avg"].shape != parameter.shape:
                raise ValueError(f"moments {list(moments['exp_avg'].shape)}")
            if moments["exp_avg_sq"].shape != parameter.shape:
                raise ValueError(f"moments {list(moments['exp_avg_sq'].shape)}")
    with _readable(path / RNG, "the state of torch's random generators"):
        rng = _load_tensors(path / RNG)
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and rng["cuda"]:
            torch.cuda.set_rng_state_all(rng["cuda"])
    policy.model.load_state_dict(saved.state_dict())
    return Checkpoint(path, state.pop("step"), state)


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Within, what torch raises for a file that is something else takes one form.

    Its own text advises weights_only=False, which runs whatever code the file holds.
    """
    try:
        yield
    except (
        *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, RuntimeError),
        *(TypeError, ValueError),
    ) as error:
        raise ValueError(
            f"load_latest: {path} must be {what}, got another kind of file "
            f"({type(error).__name__}); restore the folder from a copy, or delete it to go on from "
            "the checkpoint before it"
        ) from None


def _candidates(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoint that `latest` names and those before it, newest first."""
    found = checkpoints(folder)
    pointer = folder / "latest"
    name = pointer.read_text().strip() if pointer.exists() else ""
    names = [path.name for path in found]
    if name in names:
        return found[names.index(name) :]
    if found:
        warn(f"{pointer} names no checkpoint ({name!r}); looking for the newest whole one")
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sweep(folder: Path) -> None:
    """Removes what a kill left half-written, by us or by Policy.save, or half-removed."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*")]:
        if OURS.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _rng_state() -> dict[str, Tensor | list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _save_tensors(path: Path, value: object) -> None:
    with path.open("wb") as file:
        torch.save(value, file)


def _load_tensors(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _fingerprint(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def _flush(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(found: Sequence[Path]) -> None:
    """Removes checkpoints under other names, so that none is ever seen with files missing."""
    for path in [path.rename(_aside(path)) for path in found]:
        shutil.rmtree(path)


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".tercet.old")


def _move(source: Path, target: Path) -> None:
    """Renames a folder over another one of its name (left of a resume)."""
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    source.rename(target)
    shutil.rmtree(aside, ignore_errors=True)
