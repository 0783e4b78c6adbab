"""A run on disk and on screen.

A run is a folder: config.yaml, env.json, and one JSON object per line in metrics.jsonl (every
step), samples.jsonl (a few readable rows) and events.jsonl (warnings); tensorboard/ mirrors the
metrics; run.lock names the process that writes.  Keys that the trainer writes carry their unit
where it is not plain:

    reward/mean  reward/std  reward/spread  reward/<part>  reward/<part>_spread
    completions/{mean_length,max_length} (tokens)  completions/clipped_ratio (share without an end)
    loss  kl  entropy (nats per token)  clip_ratio  grad_norm  learning_rate
    tokens_per_s (prompt and completion tokens of all rows, over the whole step)
    padding_saved (share of a padded batch that packing leaves out)  memory_gb (1e9 bytes)
    time/{sample,score,update}_s  time/step_s  eval/<what the system measured>
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tercet.engine.config import changes, to_plain, to_yaml
from tercet.engine.environment import environment
from tercet.engine.files import (
    LOCK,
    append_jsonl,
    lock,
    read_jsonl,
    read_object,
    replace_text,
    rewind_jsonl,
)

EVENTS = "events.jsonl"
ROW_FILES = ("metrics.jsonl", "samples.jsonl", EVENTS)
# what the screen shows of an evaluation; of one without these, its first measures
HEADLINES = ("eval/recall@1", "eval/distinct_share", "eval/anisotropy", "eval/held_out_loss")
NUM_HEADLINES = 4
SPEED = {"tokens_per_s": "{:.0f} tok/s"}
COST = {
    "padding_saved": "padding saved {:.0%}",
    "memory_gb": "{:.1f} GB",
    "time/sample_s": "sample {:.1f}s",
    "time/score_s": "score {:.1f}s",
    "time/update_s": "update {:.1f}s",
}


class RunLog:
    """Writes a run's folder and shows its progress; one process writes, any number may read.

    The folder is locked until `close`, or until the process ends in whatever way.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, file: IO[str] | io.TextIOBase | None = None
    ) -> None:
        self.folder = folder
        self.step = 0  # the step that warnings belong to; the trainer moves it on
        self.total_steps = total_steps
        self.about: dict[str, Any] = {}  # of the run; every checkpoint holds it
        self._console = Console(file=cast("IO[str] | None", file), highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._tensorboard = None
        self._held = ExitStack()  # the folder, unless the caller holds it
        self._started = time.monotonic()
        self._first_step: int | None = None  # of this process; the ETA counts from there

    @classmethod
    def create(
        cls,
        folder: str | Path,
        config: Any,
        *,
        total_steps: int,
        resume: bool = False,
        about: Mapping[str, Any] | None = None,
        held: bool = False,
        file: IO[str] | io.TextIOBase | None = None,
    ) -> RunLog:
        """Opens a run's folder and writes config.yaml and env.json.

        Args:
            folder: made if it is not there.
            config: the dataclass the run was started from.
            total_steps: for the estimate of the time that is left.
            resume: go on with the run in the folder; an empty folder starts from the beginning.
            about: what checkpoints are to say about the run besides its settings; as JSON holds it.
            held: the caller has the folder (`hold_folder`); else the log has it until `close`.
            file: where progress is shown; None: standard output.

        Raises:
            FileExistsError: the folder holds a run and resume is false; or as `hold_folder`.
            RuntimeError: another process writes to the folder.
        """
        import tercet

        folder = Path(folder)
        log = cls(folder, total_steps=total_steps, file=file)
        log.about = {"tercet": tercet.__version__, "settings": to_plain(config), **(about or {})}
        if not held:
            log._held.enter_context(hold_folder(folder))
        try:
            log._open(config, resume=resume)
        except BaseException:
            log.close()
            raise
        return log

    def log(self, step: int, metrics: Mapping[str, float], *, show: bool = True) -> None:
        """Appends a step's metrics; `show` prints its line where no live line can be drawn."""
        self.step = step
        if self._first_step is None and step > 0:  # step 0 is an evaluation, not a pace
            self._first_step = step - 1
            self._started = time.monotonic() - metrics.get("time/step_s", 0.0)
        append_jsonl(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
        self._write_tensorboard(step, metrics)
        line = progress_line(step, self.total_steps, metrics, eta_s=self._eta(step))
        if self._console.is_interactive:
            self._live.start()
            self._live.update(Text(line, overflow="ellipsis", no_wrap=True), refresh=True)
        elif show:
            self._print(line)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends readable rows of a step."""
        append_jsonl(self.folder / "samples.jsonl", [{"step": step, **row} for row in rows])

    def warn(self, message: str) -> None:
        """Shows a warning and keeps it, with the step, in events.jsonl."""
        self._event("warning", message)

    def info(self, message: str) -> None:
        """Shows something worth knowing and keeps it, with the step, in events.jsonl."""
        self._event("info", message)

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after `step`, which a resumed run is about to write again.

        -1 drops all but the events of step 0, which may be about the data.
        """
        dropped = {
            name: rewind_jsonl(
                self.folder / name, last_step=max(step, 0) if name == EVENTS else step
            )
            for name in ROW_FILES
        }
        self.step = max(step, 0)
        if any(dropped.values()):
            told = ", ".join(f"{count} of {name}" for name, count in dropped.items() if count)
            after = f"the lines after step {step}" if step >= 0 else "all lines"
            self.info(f"dropped {after} ({told}): those steps come again")

    def last_metrics(self) -> dict[str, float]:
        """The last row of metrics.jsonl, without its step; empty when there is none."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        return {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}

    def close(self) -> None:
        """Ends the live line and flushes tensorboard; nothing else is ever left unwritten."""
        self._live.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        self._held.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, config: Any, *, resume: bool) -> None:
        folder = self.folder
        found = [name for name in ("config.yaml", *ROW_FILES) if (folder / name).exists()]
        if found and not resume:
            raise FileExistsError(
                f"RunLog.create: {folder} must not hold a run yet, got one ({found[0]}); "
                "choose another output folder, or resume it"
            )
        if found:
            for name in ROW_FILES:
                rewind_jsonl(folder / name, last_step=None)
            self._warn_changes(folder / "config.yaml", config)
        env = folder / "env.json"
        before = read_object(env, "RunLog.create", "restore or delete it") if env.exists() else {}
        started = before.get(
            "started", datetime.now(UTC).isoformat()
        )  # a resumed run keeps its own
        replace_text(folder / "config.yaml", to_yaml(config))
        facts = {"started": started, **environment()}
        replace_text(env, json.dumps(facts, indent=2) + "\n")

    def _event(self, kind: str, message: str) -> None:
        append_jsonl(self.folder / EVENTS, [{"step": self.step, "kind": kind, "message": message}])
        self._print(f"{'warning: ' if kind == 'warning' else ''}{message}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def _eta(self, step: int) -> float | None:
        """Seconds left, from the pace of this process; None before the first step is done."""
        done = step - (self._first_step if self._first_step is not None else step)
        if step < 1 or done < 1:
            return None
        return (time.monotonic() - self._started) / done * (self.total_steps - step)

    def _warn_changes(self, path: Path, config: Any) -> None:
        if not path.exists():
            return
        if changed := changes(path, config):
            self.warn(
                "resuming with other settings than the run was started with "
                f"({', '.join(changed)}): the result is not that of one uninterrupted run"
            )

    def _write_tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self.folder / "tensorboard", purge_step=step)
        for key, value in metrics.items():
            self._tensorboard.add_scalar(key, value, step)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Within, this process alone writes to a run's folder, which is made if it is not there.

    When nothing came into it, what was made is gone afterwards.

    Raises:
        FileExistsError, NotADirectoryError: as `check_run_folder`.
        RuntimeError: another process writes to it (or this one, already).
    """
    check_run_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = lock(folder / LOCK)
    except BlockingIOError as error:
        raise RuntimeError(
            f"hold_folder: one process may write to {folder}, got process {error.strerror} at "
            "work in it; stop that one, or choose another output folder"
        ) from error
    try:
        yield
    finally:
        if [path.name for path in folder.glob("*")] == [LOCK]:
            (folder / LOCK).unlink()
            with suppress(OSError):  # somebody put something else beside it
                for path in made:
                    path.rmdir()
        os.close(descriptor)


def check_run_folder(folder: Path) -> None:
    """Refuses a folder that holds files and is no run.

    Raises:
        FileExistsError: so.
        NotADirectoryError: a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"check_run_folder: the output folder must be a folder, got the file {folder}; "
            "choose another"
        )
    found = folder.iterdir() if folder.exists() else []
    names = sorted(path.name for path in found if path.suffix != ".tmp")  # .tmp: left by a kill
    if names and LOCK not in names:  # every run begins with it
        raise FileExistsError(
            "check_run_folder: the output folder must be new, empty or a run, got other files in "
            f"{folder} ({', '.join(names[:3])}{', ...' if names[3:] else ''}); "
            "choose another, such as a new folder inside"
        )


def progress_line(
    step: int, total_steps: int, metrics: Mapping[str, float], *, eta_s: float | None
) -> str:
    """One line about a step; what was not measured is left out.

    A step with an evaluation shows its headlines in place of what the step cost.
    """
    rewarded = "reward/mean" in metrics  # then the loss, a policy gradient's, says nothing
    learnt = {"reward/mean": "reward {:.3f}"} if rewarded else {"loss": "loss {:.3f}"}
    measured = [key for key in metrics if key.startswith("eval/")]
    headlines = [key for key in HEADLINES if key in measured] or measured[:NUM_HEADLINES]
    shown = learnt | {"kl": "kl {:.4f}"} | {key: f"{key} {{:.3f}}" for key in headlines}
    shown |= SPEED if headlines else SPEED | COST
    parts = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
    if eta_s is not None:
        minutes, seconds = divmod(round(eta_s), 60)
        parts.append(f"eta {minutes}:{seconds:02}")
    return "  ".join([f"step {step}/{total_steps}", *parts])
