"""Settings: frozen dataclasses, filled from a YAML file and, in command_line.py, from options.

A YAML file is validated strictly: an unknown key is an error that names the nearest known one, and
so is a key that is there twice, or an alias (a few lines of them can stand for billions of values).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


class ConfigError(ValueError):
    """A setting that is unknown or has a value it cannot have."""


def _nested_dataclass(annotation: object) -> type | None:
    """The dataclass in an annotation such as `C` or `C | None`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    for option in options or (annotation,):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like this one."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def _reject_unknown(cls: type, data: dict, where: str, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            inside = _places(cls, prefix)
            raise ConfigError(
                f"{where}: unknown key '{prefix}{key}'; "
                f"the nearest known one is '{inside[nearest(str(key), list(inside))]}'"
            )


def _places(cls: type, prefix: str) -> dict[str, str]:
    """Where each key of a dataclass stands; its own go before those of dataclasses inside it."""
    places = {f.name: f"{prefix}{f.name}" for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name, place in list(places.items()):
        inner = _nested_dataclass(hints[name])
        places = places if inner is None else _places(inner, f"{place}.") | places
    return places


def _yaml_loader(path: str | Path) -> type:
    """PyYAML's safe loader, but 1e-6 is a number as in YAML 1.2, a key stands once, no aliases."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                alias = self.peek_event()
                raise ConfigError(
                    f"read_yaml: settings must have no aliases, got '*{alias.anchor}' at "
                    f"{path}:{alias.start_mark.line + 1}; write the value out"
                )
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor):
            node = super().compose_mapping_node(anchor)
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            first: dict[tuple[str, str], yaml.ScalarNode] = {}
            for key in keys:
                other = first.setdefault((key.tag, key.value), key)
                if other is not key:
                    raise ConfigError(
                        f"read_yaml: a key must stand once, got {key.value!r} at "
                        f"{path}:{key.start_mark.line + 1} and before that at line "
                        f"{other.start_mark.line + 1}; delete one of them"
                    )
            return node

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def read_yaml(path: str | Path, cls: type[ConfigT]) -> ConfigT:
    """The settings in a YAML file; keys that the file leaves out keep their defaults.

    Raises:
        ConfigError: as `read_mapping`; an unknown key, a value of the wrong kind, or a required key
            that is not there.
    """
    return read_record(cls, read_mapping(path), f"read_yaml: {path}")


def read_record(cls: type[ConfigT], data: dict, where: str) -> ConfigT:
    """A record from plain values, each checked strictly; what is left out keeps its default.

    Args:
        cls: a dataclass.
        data: as JSON or YAML hold it.
        where: `function: file`, for error messages.

    Raises:
        ConfigError: as `read_yaml`.
    """
    try:
        return _checked(partial_record(cls, data, where))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where}: {error}") from error


def read_mapping(path: str | Path) -> dict:
    """What a YAML file holds; {} for an empty one.

    Raises:
        ConfigError: not readable, not a mapping, a key that stands twice, or an alias.
    """
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader(path))
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        what = " ".join(told.split())
        raise ConfigError(f"read_yaml: {path} must be a readable YAML file, got: {what}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            f"read_yaml: {path} must hold key: value lines, got {type(data).__name__}"
        )
    return data


def partial_record(cls: type[ConfigT], data: dict, where: str, prefix: str = "") -> ConfigT:
    """A record with what `data` sets and with defaults; tyro.MISSING where neither has a value.

    Its own checks do not run yet: the command line may still change every field.
    """
    import tyro

    _reject_unknown(cls, data, where, prefix)
    record, hints = object.__new__(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, nested = field.name, _nested_dataclass(hints[field.name])
        if nested and isinstance(data.get(name), dict):
            value = partial_record(nested, data[name], where, f"{prefix}{name}.")
        elif name in data:
            value = _validated(hints[name], data[name], f"{where}: {prefix}{name}")
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = (
                partial_record(nested, {}, where, f"{prefix}{name}.") if nested else tyro.MISSING
            )
        object.__setattr__(record, name, value)
    return record


def _validated(annotation: Any, value: object, where: str) -> object:
    import pydantic

    try:
        return pydantic.TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValueError, TypeError, RecursionError) as error:  # ValidationError is a ValueError
        raise ConfigError(_readable(error, where)) from error


def _checked(record: ConfigT) -> ConfigT:
    """The record built anew by its class, so that the class's own checks run."""
    import tyro

    values = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if value is tyro.MISSING:
            raise ValueError(
                f"{type(record).__name__}: the key {field.name!r} must be there, got none; add it"
            )
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        values[field.name] = _checked(value) if nested else value
    return type(record)(**values)


def _readable(error: Exception, where: str) -> str:
    """A validation error as 'key: what is wrong, got value', one after the other."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return f"{where}: {error}"
    parts = []
    for item in errors(include_url=False):
        key = ".".join([where, *map(str, item["loc"])])
        parts.append(f"{key}: {item['msg']}, got {item['input']!r}")
    return "; ".join(parts)


def changes(path: Path, config: object) -> list[str]:
    """What a file of `to_yaml` and settings differ in, as `key old -> new`; long values are cut.

    Raises:
        ConfigError: as `read_mapping`.
    """
    before, after = _flat(read_mapping(path)), _flat(to_plain(config))
    return [
        f"{key} {_short(before, key)} -> {_short(after, key)}"
        for key in before | after
        if key not in before or key not in after or before[key] != after[key]
    ]


def _short(settings: dict[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "(none)"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _flat(data: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings with their keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return found


def to_plain(config: object) -> dict[str, Any]:
    """The settings as JSON can hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[arg-type]


def to_yaml(config: object) -> str:
    """The settings as YAML that `read_yaml` reads back to an equal record."""
    import yaml

    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
