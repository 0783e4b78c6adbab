"""Settings from YAML and from the command line."""

from dataclasses import dataclass, field

import pytest

from tercet.engine.config import ConfigError, load_config, read_yaml, to_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-6
    max_steps: int = 10

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must be >= 0, got {self.learning_rate}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """A record with a required field."""

    data: str
    mode: str = "supervised"
    seed: int | None = None
    train: Inner = field(default_factory=Inner)


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


def test_a_required_key_may_come_from_the_command_line(yaml_file):
    path = yaml_file("mode: unsupervised\n")
    config = load_config(Outer, [f"--config={path}", "--data", "x"], prog="t")
    assert config == Outer(data="x", mode="unsupervised")


def test_a_required_key_that_nobody_gives_is_a_usage_error(yaml_file, capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(Outer, ["--config", yaml_file("seed: 1")], prog="t")
    assert stop.value.code == 2
    assert "--data" in capsys.readouterr().err


def test_round_trip(yaml_file):
    config = Outer(data="ü: #1", train=Inner(learning_rate=3e-7))
    assert read_yaml(yaml_file(to_yaml(config)), Outer) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nmod: x", "unknown key 'mod'; the nearest known one is 'mode'"),
        ("data: a\ntrain: {learning_rat: 1}", "'train.learning_rat'; .* 'train.learning_rate'"),
        ("data: 3", "data: Input should be a valid string, got 3"),
        ("data: a\ntrain: {max_steps: 1.5}", "train.max_steps: .*integer.*, got 1.5"),
        ("data: a\nseed: '1'", "seed: .*integer.*, got '1'"),
        ("data: a\ntrain: {learning_rate: -1}", "learning_rate must be >= 0, got -1.0"),
        ("[1]", "must hold key: value lines, got list"),
        ("a: b: c", "must be a readable YAML file"),
        ("data: !!python/object/apply:os.getcwd []", "must be a readable YAML file"),
        ("mode: x", "'data'"),
        ("data: &a {x: *a}", "data: .*"),
        ("data: " + "[" * 3000, "must be a readable YAML file"),
    ],
)
def test_a_bad_file_is_named_with_its_remedy(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(yaml_file(text), Outer)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml must be a readable YAML file"):
        load_config(Outer, ["--config", "nowhere.yaml"], prog="t")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A record whose nested record has a required field."""

    outer: Outer


def test_a_nested_required_key_may_come_from_the_command_line(yaml_file):
    path = yaml_file("outer: {mode: unsupervised}")
    config = load_config(Nested, ["--config", path, "--outer.data", "x"], prog="t")
    assert config == Nested(outer=Outer(data="x", mode="unsupervised"))
    assert load_config(Nested, ["--outer.data", "x"], prog="t") == Nested(outer=Outer(data="x"))
    with pytest.raises(ConfigError, match="'data' is required"):
        read_yaml(path, Nested)


@pytest.mark.parametrize("argv", [["--config"], ["--config", "a", "--config", "b"]])
def test_config_option_is_given_once_with_a_file(argv):
    with pytest.raises(ConfigError, match="must be given once"):
        load_config(Outer, argv, prog="t")


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(Outer, ["--data", "x", "--train.max-step", "3"], prog="t")
    assert stop.value.code == 2
    assert "--train.max-steps" in capsys.readouterr().err


def test_a_value_that_the_settings_refuse_is_a_usage_error(capsys):
    with pytest.raises((SystemExit, ConfigError)):
        load_config(Outer, ["--data", "x", "--train.learning-rate", "-1"], prog="t")
    assert "learning_rate must be >= 0" in capsys.readouterr().err
