"""The run's folder: what is written, what a kill may do to it, what the screen shows."""

import fcntl
import io
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest
import yaml

from tercet.engine.environment import cpu_model, git_commit
from tercet.engine.files import append_jsonl, lock, read_jsonl, rewind_jsonl
from tercet.engine.metrics import RunLog, hold_folder, progress_line


@dataclass(frozen=True)
class Inner:
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class Settings:
    model: str = "tiny"
    train: Inner = field(default_factory=Inner)


METRICS = {
    "reward/mean": 0.41234,
    "kl": 0.0031,
    "tokens_per_s": 31234.6,
    "padding_saved": 0.625,
    "memory_gb": 1.27,
    "time/sample_s": 1.94,
    "time/score_s": 0.06,
    "time/update_s": 0.81,
    "time/step_s": 2.81,
    "eval/recall@1": 0.5,
}


def run_log(folder, *, total_steps=10, resume=False, config=None, held=False) -> RunLog:
    return RunLog.create(
        folder,
        config or Settings(),
        total_steps=total_steps,
        resume=resume,
        held=held,
        file=io.StringIO(),
    )


def shown_text(log: RunLog) -> str:
    file = log._console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def shown(log: RunLog) -> list[str]:
    return shown_text(log).splitlines()


def test_a_fresh_run_writes_its_settings_and_its_machine(tmp_path):
    with run_log(tmp_path / "a" / "run"):
        pass
    run = tmp_path / "a" / "run"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == "tiny"
    assert float(config["train"]["learning_rate"]) == 1e-6
    env = json.loads((run / "env.json").read_text())
    assert env["versions"]["torch"].startswith("2.")
    assert env["cpu"] == cpu_model() != ""
    assert datetime.fromisoformat(env["started"]).utcoffset() == timedelta(0)
    assert set(env["implementations"]) >= {"linear_logp", "segment_mean", "attention"}


def test_a_resumed_run_was_started_when_it_began(tmp_path):
    run_log(tmp_path).close()
    before = json.loads((tmp_path / "env.json").read_text())
    (tmp_path / "env.json").write_text(json.dumps({**before, "cpu": "another"}))
    run_log(tmp_path, resume=True).close()
    assert json.loads((tmp_path / "env.json").read_text()) == before
    (tmp_path / "env.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"env\.json must be a JSON object, .*; restore or delete"):
        run_log(tmp_path, config=Settings(model="other"), resume=True)
    assert "tiny" in (tmp_path / "config.yaml").read_text()


def test_environment_variables_stay_out_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with run_log(tmp_path) as log:
        log.log(1, METRICS)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"verysecret" in p.read_bytes()]


def test_commit_is_that_of_the_code():
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_a_second_run_is_refused_and_the_first_untouched(tmp_path):
    with run_log(tmp_path) as log:
        log.log(1, METRICS)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"must not hold a run yet, .*resume it"):
        run_log(tmp_path, config=Settings(model="other"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "tiny" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_other_files_is_refused_and_left(tmp_path, resume):
    for name in ("a", "b", "config.yaml", "d"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"got other files in .* \(a, b, config\.yaml, \.\.\.\)"
    ):
        run_log(tmp_path, resume=resume)
    with pytest.raises(NotADirectoryError, match=r"must be a folder, got the file .*/a;"):
        run_log(tmp_path / "a", resume=resume)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] * 4


@pytest.mark.parametrize("left", [["run.lock", "config.yaml.tmp"], ["config.yaml.tmp"]])
def test_what_a_kill_left_at_once_is_no_other_file(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("1")
    with run_log(tmp_path):
        pass


HOLDER = """
import sys, time
from dataclasses import dataclass
from tercet.engine.metrics import RunLog

@dataclass
class Settings:
    model: str = "tiny"

log = RunLog.create(sys.argv[1], Settings(), total_steps=1)
print("ready", flush=True)
time.sleep(600)
"""


def test_one_process_writes_and_a_killed_one_no_longer(tmp_path):
    command = [sys.executable, "-P", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            before = {path: path.read_bytes() for path in tmp_path.iterdir()}
            with pytest.raises(RuntimeError, match=rf"got process {other.pid} at work in it; stop"):
                run_log(tmp_path, resume=True)
            assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        finally:
            other.kill()
    with run_log(tmp_path, resume=True):
        assert (tmp_path / "run.lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(RuntimeError, match=rf"got process {os.getpid()} at work"):
            run_log(tmp_path, resume=True)
    with pytest.raises(FileExistsError, match="must not hold a run yet"):
        run_log(tmp_path)
    with run_log(tmp_path, resume=True):  # a refusal keeps no lock
        pass


def test_a_folder_that_nothing_came_into_is_gone_again(tmp_path):
    folder = tmp_path / "new" / "deep"
    with hold_folder(folder):
        assert (folder / "run.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []
    with hold_folder(folder):
        (tmp_path / "new" / "other").write_text("mine")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]
    with hold_folder(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "config.yaml").write_text("a: 1")
    assert (tmp_path / "new" / "run" / "run.lock").exists()


def test_a_log_in_a_held_folder_leaves_it_held(tmp_path):
    with hold_folder(tmp_path):
        with run_log(tmp_path, held=True) as log:
            log.log(1, METRICS)
        with pytest.raises(RuntimeError, match="at work in it"), hold_folder(tmp_path):
            pass
    with run_log(tmp_path, resume=True):
        pass


def test_a_lock_whose_file_is_gone_is_none(tmp_path, monkeypatch):
    """Between opening and locking, the holder may remove the file."""
    path, flock = tmp_path / "run.lock", fcntl.flock

    def remove_once(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_once)
    descriptor = lock(path)
    assert path.read_text() == f"{os.getpid()}\n"
    os.close(descriptor)


def test_rows_are_written_at_once(tmp_path):
    log = run_log(tmp_path)
    log.log(1, METRICS)
    log.samples(1, [{"text": "Rosen — 薔薇"}, {"text": "b"}])
    log.warn("a reward part is dead")
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, **METRICS}]
    assert [r["text"] for r in read_jsonl(tmp_path / "samples.jsonl")] == ["Rosen — 薔薇", "b"]
    assert read_jsonl(tmp_path / "events.jsonl") == [
        {"step": 1, "kind": "warning", "message": "a reward part is dead"}
    ]
    assert log.last_metrics() == METRICS
    log.close()


def test_tensorboard_has_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with run_log(tmp_path) as log:
        log.log(1, {"reward/mean": 0.25})
        log.log(2, {"reward/mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_not_on_a_terminal_each_shown_step_is_one_plain_line(tmp_path):
    with run_log(tmp_path) as log:
        log.log(1, {key: value for key, value in METRICS.items() if "eval" not in key})
        log.log(2, METRICS, show=False)
        log.warn("[bold]careful[/bold]")
    lines = shown(log)
    assert lines[0].startswith(
        "step 1/10  reward 0.412  kl 0.0031  31235 tok/s  padding saved 62%  1.3 GB  "
        "sample 1.9s  score 0.1s  update 0.8s  eta 0:"
    )
    assert lines[1:] == ["warning: [bold]careful[/bold]"]


def test_on_a_terminal_one_live_line_is_redrawn(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the file for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    log = run_log(tmp_path)
    log.log(1, METRICS, show=False)
    log.log(2, METRICS, show=False)
    log.close()
    text = shown_text(log)
    assert "step 1/10" in text
    assert "step 2/10" in text
    assert text.count("\n") == 1  # drawn over itself, and left standing at the end


def test_progress_line_leaves_out_what_was_not_measured():
    assert progress_line(0, 5, {"eval/x": 1.0}, eta_s=None) == "step 0/5  eval/x 1.000"
    assert progress_line(3, 5, {}, eta_s=125.4) == "step 3/5  eta 2:05"


def test_progress_line_shows_the_headlines_of_an_evaluation():
    found = {"eval/recall@10": 0.9, "eval/mrr": 0.6, "eval/prompts_truncated": 0.0}
    headlines = {"eval/anisotropy": 0.4, "eval/recall@1": 0.5, "eval/distinct_share": 1.0}
    line = progress_line(20, 100, {**METRICS, **found, **headlines}, eta_s=21.0)
    assert line == (
        "step 20/100  reward 0.412  kl 0.0031  eval/recall@1 0.500  eval/distinct_share 1.000  "
        "eval/anisotropy 0.400  31235 tok/s  eta 0:21"
    )
    others = {f"eval/{name}": 1.0 for name in "abcde"}
    line = progress_line(1, 5, others, eta_s=None)
    assert line == "step 1/5  eval/a 1.000  eval/b 1.000  eval/c 1.000  eval/d 1.000"


def test_progress_line_shows_the_reward_or_without_one_the_loss():
    assert progress_line(1, 5, {"loss": 0.5}, eta_s=None) == "step 1/5  loss 0.500"
    both = {"loss": 0.5, "reward/mean": 2.0}
    assert progress_line(1, 5, both, eta_s=None) == "step 1/5  reward 2.000"


def test_a_full_disk_names_the_file_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": 1}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path} must hold metrics\.jsonl, but .*; no new"):
            append_jsonl(path, [{"step": 2, "text": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    append_jsonl(path, [{"step": 3}])
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_not_finite_becomes_null(tmp_path):
    append_jsonl(tmp_path / "a.jsonl", [{"x": float("nan"), "y": [float("inf"), 1.0]}])
    assert (tmp_path / "a.jsonl").read_text() == '{"x": null, "y": [null, 1.0]}\n'


@pytest.mark.parametrize("cut", ['{"step": 3, "rew', '{"step": 3}', "{"])
def test_a_line_cut_by_a_kill_is_dropped_on_resume(tmp_path, cut):
    with run_log(tmp_path) as log:
        for step in (1, 2):
            log.log(step, {"reward/mean": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    with run_log(tmp_path, resume=True) as log:
        log.log(3, {"reward/mean": 3.0})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


BROKEN = {"half": b'{"step": ', "not UTF-8": b'{"a": "\xff"}', "deep": b"[" * 10**5, "list": b"[1]"}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + BROKEN[kind] + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"^read_jsonl: .*:2 must be .* UTF-8, got .*; restore"):
        read_jsonl(path)


def test_rewind_drops_later_rows_of_every_file_and_says_so(tmp_path):
    with run_log(tmp_path) as log:
        log.log(0, {"eval/x": 0.0})
        for step in (1, 2, 3, 4):
            log.log(step, {"reward/mean": float(step)})
            log.samples(step, [{"text": "a"}])
        log.warn("late")
    with run_log(tmp_path, resume=True) as log:
        log.rewind(2)
        assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
        assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2]
        events = read_jsonl(tmp_path / "events.jsonl")
        assert [(e["step"], e["kind"]) for e in events] == [(2, "info")]
        assert events[0]["message"] == (
            "dropped the lines after step 2 (2 of metrics.jsonl, 2 of samples.jsonl, "
            "1 of events.jsonl): those steps come again"
        )
        log.rewind(-1)
        assert read_jsonl(tmp_path / "metrics.jsonl") == []
        assert read_jsonl(tmp_path / "events.jsonl")[-1]["message"].startswith("dropped all lines")


@pytest.mark.parametrize("row", ['{"a": 1}', '{"step": "1"}', '{"step": null}', '{"step": true}'])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_row_without_a_step_is_an_error_that_names_it(tmp_path, name, row):
    with run_log(tmp_path) as log:
        log.log(1, {})
        log.warn("a")
    (tmp_path / name).write_text(f'{{"step": 1}}\n{row}\n')
    with pytest.raises(ValueError, match=rf"{name}:2 must have a whole number as its step, got"):
        run_log(tmp_path, resume=True)


def test_rewinding_nothing_is_silent(tmp_path):
    with run_log(tmp_path) as log:
        log.warn("3 rows were skipped")
        log.rewind(-1)
    assert [e["message"] for e in read_jsonl(tmp_path / "events.jsonl")] == ["3 rows were skipped"]
    assert rewind_jsonl(tmp_path / "none.jsonl", last_step=0) == 0


def test_resuming_with_other_settings_is_said(tmp_path):
    with run_log(tmp_path):
        pass
    with run_log(tmp_path, resume=True) as log:
        assert shown(log) == []
    changed = Settings(train=Inner(learning_rate=2e-6))
    with run_log(tmp_path, resume=True, config=changed) as log:
        assert "other settings" in shown(log)[0]
        assert "(train.learning_rate 1e-06 -> 2e-06)" in shown(log)[0]


def test_eta_counts_the_steps_of_this_process(tmp_path):
    with run_log(tmp_path, total_steps=101) as log:
        log.log(0, {"eval/x": 1.0})
        assert log._eta(0) is None
        log.log(51, {"time/step_s": 2.0})
        left = float(log._eta(51) or 0)
    assert 100.0 <= left < 110.0  # 50 steps of 2 s
