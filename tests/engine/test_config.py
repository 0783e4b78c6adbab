"""Settings from YAML."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tercet.engine.config import ConfigError, changes, read_mapping, read_yaml, to_yaml


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


def test_round_trip(yaml_file):
    config = Outer(data="ü: #1", train=Inner(learning_rate=3e-7))
    assert read_yaml(yaml_file(to_yaml(config)), Outer) == config


def test_changes_name_each_key_with_both_values(yaml_file):
    config = Outer(data="d", train=Inner(learning_rate=3e-7))
    path = Path(yaml_file(to_yaml(config)))
    assert changes(path, config) == []
    other = Outer(data="long " * 20, seed=1, train=Inner(max_steps=9))
    assert changes(path, other) == [
        "data 'd' -> 'long long long long long long long l...",
        "seed None -> 1",
        "train.learning_rate 3e-07 -> 1e-06",
        "train.max_steps 10 -> 9",
    ]
    path.write_text("data: d\nmode: supervised\nold: 1\ntrain: {}\n")
    absent = ["old 1 -> (none)", "train {} -> (none)", "seed (none) -> None"]
    assert changes(path, Outer(data="d"))[:3] == absent
    with pytest.raises(ConfigError, match="must be a readable YAML file"):
        changes(Path(yaml_file("{")), config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nmod: x", "unknown key 'mod'; the nearest known one is 'mode'"),
        ("data: a\nlearning_rat: 1", "the nearest known one is 'train.learning_rate'"),
        ("data: a\ntrain: {learning_rat: 1}", "'train.learning_rat'; .* 'train.learning_rate'"),
        ("data: 3", "data: Input should be a valid string, got 3"),
        ("data: a\ntrain: {max_steps: 1.5}", "train.max_steps: .*integer.*, got 1.5"),
        ("data: a\nseed: '1'", "seed: .*integer.*, got '1'"),
        ("data: a\ntrain: {learning_rate: -1}", "learning_rate must be >= 0, got -1.0"),
        ("[1]", "must hold key: value lines, got list"),
        ("a: b: c", "must be a readable YAML file"),
        ("data: !!python/object/apply:os.getcwd []", "must be a readable YAML file"),
        ("mode: x", "'data'"),
        ("data: a\nmode: &a {x: *a}", r"must have no aliases, got '\*a' at .*c\.yaml:2; write"),
        ("data: " + "[" * 3000, "must be a readable YAML file"),
        (
            "data: a\nseed: 1\ndata: b",
            r"once, got 'data' at .*c\.yaml:3 and before .* line 1; delete",
        ),
        (
            "data: a\ntrain:\n  max_steps: 1\n  learning_rate: 1\n  max_steps: 1",
            r"^read_yaml: a key must stand once, got 'max_steps' at .*c\.yaml:5 and .* line 3",
        ),
        ("data: a\ntrain: {max_steps: 1, max_steps: 2}", r"got 'max_steps' at .*c\.yaml:2 and"),
    ],
)
def test_a_bad_file_is_named_with_its_remedy(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(yaml_file(text), Outer)


def test_a_key_may_stand_again_elsewhere_and_over_a_merged_one(yaml_file):
    path = yaml_file(
        "outer: {data: a, train: {max_steps: 3}}\n"
        "other: {<<: {data: a, train: {max_steps: 2}}, data: b, train: {max_steps: 3}}"
    )
    assert read_mapping(path) == {
        "outer": {"data": "a", "train": {"max_steps": 3}},
        "other": {"data": "b", "train": {"max_steps": 3}},
    }


def test_aliases_of_aliases_are_refused_before_they_are_written_out(yaml_file):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigError, match=r"no aliases, got '\*a0' at .*c\.yaml:2; write"):
        read_mapping(yaml_file("\n".join(lines)))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml must be a readable YAML file"):
        read_yaml("nowhere.yaml", Outer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """A record whose nested record has a required field."""

    outer: Outer


def test_a_nested_required_key_is_named(yaml_file):
    with pytest.raises(ConfigError, match="Outer: the key 'data' must be there, got none"):
        read_yaml(yaml_file("outer: {mode: unsupervised}"), Nested)
