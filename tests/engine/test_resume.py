"""kill -9 in the middle of a run: going on gives the uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tercet.engine.files import read_jsonl
from tercet.engine.model import Policy

PROGRAM = Path(__file__).with_name("toy_run.py")
MEASURED = ("time/", "tokens_per_s", "memory_gb")  # of the machine, not of the training


@pytest.fixture(scope="module")
def model(make_tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    Policy(make_tiny_model("qwen3")).save(folder)
    return folder


@pytest.fixture(scope="module")
def run(model) -> Iterator[Callable[..., int]]:
    """run(folder, kill_at=0) trains in a process of its own; its exit status, -9 for SIGKILL."""
    command = [sys.executable, "-P", str(PROGRAM)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        ask, answer = server.stdin, server.stdout

        def run_one(folder: Path, *, kill_at: int = 0) -> int:
            ask.write(f"{model} {folder} {kill_at}\n")
            ask.flush()
            return os.waitstatus_to_exitcode(int(answer.readline()))

        yield run_one


def rows(folder: Path, name: str) -> list[dict]:
    found = read_jsonl(folder / name)
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in found]


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> Path:
    """The run that nobody interrupts: 6 steps, saved at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert run(folder) == 0
    return folder


def expect_the_same_run(folder: Path, straight: Path) -> None:
    assert rows(folder, "metrics.jsonl") == rows(straight, "metrics.jsonl")
    assert rows(folder, "samples.jsonl") == rows(straight, "samples.jsonl")
    for name in ("model.safetensors", "optimizer.pt"):
        ours, theirs = (f / "checkpoint-6" / name for f in (folder, straight))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_killed_run_goes_on_exactly(run, straight, tmp_path):
    folder = tmp_path / "run"
    assert run(folder, kill_at=4) == -signal.SIGKILL
    assert [row["step"] for row in rows(folder, "metrics.jsonl")] == [0, 1, 2, 3]
    assert run(folder) == 0  # from checkpoint-2: step 3 is done again
    expect_the_same_run(folder, straight)
    told = [e["message"] for e in read_jsonl(folder / "events.jsonl") if e["kind"] == "warning"]
    assert len(told) == len(set(told))


def test_killed_before_the_first_checkpoint_and_again_after_half_a_checkpoint(
    run, straight, tmp_path
):
    folder = tmp_path / "run"
    assert run(folder, kill_at=1) == -signal.SIGKILL
    assert run(folder, kill_at=5) == -signal.SIGKILL
    weights = folder / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')
    assert run(folder) == 0
    expect_the_same_run(folder, straight)
    events = [e["message"] for e in read_jsonl(folder / "events.jsonl")]
    assert any("checkpoint-4 is damaged (model.safetensors has" in m for m in events)
    assert any(m == f"going on from {folder / 'checkpoint-2'}" for m in events)


def test_the_uninterrupted_run_has_something_to_repeat(straight):
    steps = rows(straight, "metrics.jsonl")[1:]
    assert all(row["grad_norm"] > 0 for row in steps)
    assert len({row["reward/share"] for row in steps}) > 2
    assert json.loads((straight / "checkpoint-6" / "trainer_state.json").read_text())["step"] == 6
