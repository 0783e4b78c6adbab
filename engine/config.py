"""Settings: frozen dataclasses, filled from a YAML file and from the command line.

A YAML file is validated strictly (an unknown key is an error that names the nearest known one),
then every field can be overridden by `--key.subkey VALUE`.
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
from typing import TypeVar

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


def _reject_unknown(cls: type, data: dict, where: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{where}: unknown key '{prefix}{key}'; "
                f"the nearest known one is '{prefix}{near[0]}'"
            )
        nested = _nested_dataclass(hints[key])
        if nested and isinstance(value, dict):
            _reject_unknown(nested, value, where, f"{prefix}{key}.")


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
        ConfigError: not readable, not a mapping, an unknown key, or a value of the wrong kind.
    """
    values = _read_values(path, cls)
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"read_yaml: {path}: {error}") from error


def _read_values(path: str | Path, cls: type) -> dict[str, object]:
    """The top-level fields that a YAML file sets, validated."""
    import pydantic
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _yaml_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"read_yaml: {path} must be a readable YAML file, got: {error}"
        ) from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            f"read_yaml: {path} must hold key: value lines, got {type(data).__name__}"
        )
    _reject_unknown(cls, data, str(path))
    values, hints = {}, typing.get_type_hints(cls)
    for key, value in data.items():
        try:
            field = pydantic.TypeAdapter(hints[key])
            values[key] = field.validate_json(json.dumps(value), strict=True)
        except (pydantic.ValidationError, TypeError) as error:
            raise ConfigError(f"read_yaml: {path}: {_readable(error, key)}") from error
    return values


def _defaults(cls: type[ConfigT], values: dict[str, object]) -> ConfigT:
    """A record to start the command line from; what nobody has set yet is marked as missing."""
    import tyro

    record = object.__new__(cls)  # the checks of __post_init__ wait for the command line
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value = values[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(record, field.name, value)
    return record


def _readable(error: Exception, key: str) -> str:
    """A validation error as 'key: what is wrong, got value', one after the other."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return f"{key}: {error}"
    parts = []
    for item in errors(include_url=False):
        where = ".".join([key, *map(str, item["loc"])])
        parts.append(f"{where}: {item['msg']}, got {item['input']!r}")
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
    values = {} if path is None else _read_values(path, cls)
    text = (
        f"{(cls.__doc__ or '').strip()}\n\n--config FILE.yaml sets what the other options override."
    )
    try:
        return tyro.cli(cls, args=rest, prog=prog, description=text, default=_defaults(cls, values))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{prog}: {error}") from error


def to_yaml(config: object) -> str:
    """The settings as YAML that `read_yaml` reads back to an equal record."""
    import yaml

    data = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[arg-type]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
