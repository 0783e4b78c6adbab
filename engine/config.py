"""Settings: frozen dataclasses, filled from a YAML file and from the command line.

A YAML file is validated strictly (an unknown key is an error that names the nearest known one),
then every field can be overridden by `--key.subkey VALUE`.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
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


def _reject_unknown(cls: type, data: dict, where: str, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: unknown key '{prefix}{key}'; "
                f"the nearest known one is '{prefix}{near[0]}'"
            )


def _yaml_loader() -> type:
    """PyYAML's safe loader, but 1e-6 is a number as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def read_yaml(path: str | Path, cls: type[ConfigT]) -> ConfigT:
    """The settings in a YAML file; keys that the file leaves out keep their defaults.

    Raises:
        ConfigError: not readable, not a mapping, an unknown key, a value of the wrong kind, or a
            required key that is not there.
    """
    try:
        return _checked(_partial(cls, _load(path), str(path)))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"read_yaml: {path}: {error}") from error


def _load(path: str | Path) -> dict:
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"read_yaml: {path} must be a readable YAML file, got: {what}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            f"read_yaml: {path} must hold key: value lines, got {type(data).__name__}"
        )
    return data


def _partial(cls: type[ConfigT], data: dict, where: str, prefix: str = "") -> ConfigT:
    """A record with what `data` sets and with defaults; tyro.MISSING where neither has a value.

    Its own checks do not run yet: the command line may still change every field.
    """
    import tyro

    _reject_unknown(cls, data, where, prefix)
    record, hints = object.__new__(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, nested = field.name, _nested_dataclass(hints[field.name])
        if nested and isinstance(data.get(name), dict):
            value = _partial(nested, data[name], where, f"{prefix}{name}.")
        elif name in data:
            value = _validated(hints[name], data[name], f"{where}: {prefix}{name}")
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = _partial(nested, {}, where, f"{prefix}{name}.") if nested else tyro.MISSING
        object.__setattr__(record, name, value)
    return record


def _validated(annotation: Any, value: object, where: str) -> object:
    import pydantic

    try:
        return pydantic.TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except (ValueError, TypeError, RecursionError) as error:  # ValidationError is a ValueError
        raise ConfigError(f"read_yaml: {_readable(error, where)}") from error


def _checked(record: ConfigT) -> ConfigT:
    """The record built anew by its class, so that the class's own checks run."""
    import tyro

    values = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if value is tyro.MISSING:
            raise ValueError(f"{type(record).__name__}: the key {field.name!r} is required")
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


def split_config_option(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Takes `--config FILE` (or `--config=FILE`) out of the arguments.

    Raises:
        ConfigError: --config without a file, or given twice.
    """
    path, rest, items = None, [], iter(argv)
    for item in items:
        if item == "--config" or item.startswith("--config="):
            value = item.partition("=")[2] or next(items, None)
            if value is None or path is not None:
                raise ConfigError("--config: must be given once, with a YAML file behind it")
            path = value
        else:
            rest.append(item)
    return path, rest


def load_config(cls: type[ConfigT], argv: Sequence[str], *, prog: str) -> ConfigT:
    """Defaults, then `--config FILE.yaml`, then `--key.subkey VALUE`, each over the one before.

    Raises:
        ConfigError: see `read_yaml`; also a value that a settings class refuses.
        SystemExit: 0 after --help, 2 after an argument that cannot be parsed.
    """
    import tyro

    path, rest = split_config_option(argv)
    default = _partial(cls, {} if path is None else _load(path), str(path))
    text = f"{inspect.cleandoc(cls.__doc__ or '')}\n"
    text += "--config FILE.yaml sets what the other options override."
    try:
        return tyro.cli(cls, args=rest, prog=prog, description=text, default=default)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{prog}: {error}") from error


def to_yaml(config: object) -> str:
    """The settings as YAML that `read_yaml` reads back to an equal record."""
    import yaml

    data = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[arg-type]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
