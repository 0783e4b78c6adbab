"""Settings from the command line, over those of a file; and one line about what is wrong."""

import io
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from tercet.engine.command_line import load_config
from tercet.engine.config import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-6
    max_steps: int = 10
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"Inner: learning_rate must be >= 0, got {self.learning_rate}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """A record with a required field."""

    data: str
    mode: Literal["supervised", "unsupervised"] = "supervised"
    seed: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    columns: dict[str, str] = field(default_factory=dict)
    train: Inner = field(default_factory=Inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A record whose nested record has a required field."""

    outer: Outer


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_file_then_command_line(yaml_file):
    path = yaml_file("data: a.jsonl\ntrain:\n  learning_rate: 1e-5\n  max_steps: 3\n")
    config = load_config(Outer, ["--config", path, "--train.max-steps", "7"], prog="t")
    assert config == Outer(data="a.jsonl", train=Inner(learning_rate=1e-5, max_steps=7))


def test_spellings():
    argv = ["--data=--x", "--train.max_steps=7", "--train.bf16", "--seeds", "1", "2"]
    expected = Outer(data="--x", seeds=[1, 2], train=Inner(max_steps=7, bf16=True))
    assert load_config(Outer, argv, prog="t") == expected
    assert not load_config(Outer, [*argv, "--train.no-bf16"], prog="t").train.bf16


def test_a_required_key_may_come_from_the_command_line(yaml_file):
    path = yaml_file("mode: unsupervised\n")
    config = load_config(Outer, [f"--config={path}", "--data", "x"], prog="t")
    assert config == Outer(data="x", mode="unsupervised")


def test_a_nested_required_key_may_come_from_the_command_line(yaml_file):
    path = yaml_file("outer: {mode: unsupervised}")
    config = load_config(Nested, ["--config", path, "--outer.data", "x"], prog="t")
    assert config == Nested(outer=Outer(data="x", mode="unsupervised"))
    assert load_config(Nested, ["--outer.data", "x"], prog="t") == Nested(outer=Outer(data="x"))


WRONG = {
    "--train.max-step 3": "unknown option '--train.max-step'; the nearest known one is "
    "'--train.max-steps'",
    "--train.max_step=3": "unknown option '--train.max_step'; the nearest known one is "
    "'--train.max-steps'",
    "--dta y": "unknown option '--dta'; the nearest known one is '--data'",
    "--confg c.yaml": "unknown option '--confg'; the nearest known one is '--config'",
    "--resum": "unknown option '--resum'; the nearest known one is '--resume'",
    "--train.no-bf17": "unknown option '--train.no-bf17'; the nearest known one is "
    "'--train.no-bf16'",
    "--train.max-steps abc --sed 3": "unknown option '--sed'; the nearest known one is '--seed'",
    "--train.max-steps abc": "--train.max-steps: invalid literal for int() with base 10: 'abc'",
    "--train.max-steps 1.5": "--train.max-steps: invalid literal for int() with base 10: '1.5'",
    "--train.max-steps": "Missing value for argument '--train.max-steps'. Expected 1 values",
    "--mode x": "invalid choice 'x' for argument '--mode'. Expected one of "
    "('supervised', 'unsupervised')",
    "--train.learning-rate -1": "Inner: learning_rate must be >= 0, got -1.0",
    "--columns a b c": "--columns: must be pairs, NAME VALUE NAME VALUE",
    "extra": "a value must stand behind its option, got 'extra'",
    "--seed 1 2": "a value must stand behind its option, got '2'",
    "--train.bf16 yes": "--train.bf16 must stand alone (it is a flag), got 'yes' behind it",
    "--resume=1": "--resume must stand alone (it is a flag), got '=' behind it",
    "--train.bf16=yes": "--train.bf16 must stand alone (it is a flag), got 'yes' behind it",
}


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_usage_is_one_line(argv, capsys):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, ["--data", "x", *argv.split()], prog="t", beside=["--resume"])
    assert str(caught.value) == f"t: {WRONG[argv]}; see t --help"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])  # tyro frames its messages by it
def test_a_frame_around_the_message_leaves_no_trace(encoding, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ConfigError, match=r"^t: --seed: no type .*'abc'; see t --help$"):
        load_config(Outer, ["--data", "x", "--seed", "abc"], prog="t")


def test_required_options_that_nobody_gives_are_named(yaml_file):
    path = yaml_file("seed: 1")
    message = "t: --data must be given, here or in the file behind --config; see t --help"
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, ["--config", path], prog="t")
    with pytest.raises(
        ConfigError, match="unknown option '--dat'; the nearest known one is '--dat"
    ):
        load_config(Outer, ["--dat", "x"], prog="t")


@pytest.mark.parametrize("argv", [["--config"], ["--config", "a", "--config", "b"]])
def test_config_option_is_given_once_with_a_file(argv):
    got = {1: "none behind it", 4: "a and b"}[len(argv)]
    with pytest.raises(ConfigError, match=f"must be given once, with one YAML file, got {got}"):
        load_config(Outer, argv, prog="t")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(Nested, ["--help"], prog="t")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--outer.data", "--outer.train.max-steps", "--config"):
        assert option in shown
