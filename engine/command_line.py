"""Settings from the command line: tyro reads them, and whatever is wrong is said in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from tercet.engine.config import ConfigError, nearest, partial_record, read_mapping

ConfigT = TypeVar("ConfigT")


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, as `load_config` does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def load_config(
    cls: type[ConfigT], argv: Sequence[str], *, prog: str, beside: Sequence[str] = ()
) -> ConfigT:
    """Defaults, then `--config FILE.yaml`, then `--key.subkey VALUE`, each over the one before.

    Args:
        cls: a dataclass.
        argv: options; `--key=VALUE` is understood, and flags are `--key` and `--no-key`.
        prog: the command's name.
        beside: options that the caller has taken out of argv, for who misspells them.

    Raises:
        ConfigError: see `read_yaml`; an unknown option, a value that is not there or cannot be, a
            required option that nobody gives, settings that a class refuses.
        SystemExit: 0 after --help.
    """
    import tyro

    path, rest = split_config_option(argv)
    default = partial_record(cls, {} if path is None else read_mapping(path), f"read_yaml: {path}")
    text = f"{inspect.cleandoc(cls.__doc__ or '')}\n"
    text += "--config FILE.yaml sets what the other options override."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, unplaced = tyro.cli(
                cls,
                args=rest,
                prog=prog,
                description=text,
                default=default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        why = _why_it_stopped(rest, default, said.getvalue(), beside)
        raise ConfigError(f"{prog}: {why}; see {prog} --help") from stop
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{prog}: {error}") from error
    if unplaced:
        why = _why_it_is_unplaced(unplaced[0], rest, default, beside)
        raise ConfigError(f"{prog}: {why}; see {prog} --help")
    return config


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
                got = "none behind it" if value is None else f"{path} and {value}"
                raise ConfigError(f"--config: must be given once, with one YAML file, got {got}")
            path = value
        else:
            rest.append(item)
    return path, rest


def _options(record: object, prefix: str = "--") -> dict[str, object]:
    """Every option of a record, and its value there."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        value, name = getattr(record, field.name), field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= _options(value, f"{prefix}{name}.")
            continue
        found[f"{prefix}{name}"] = value
        if isinstance(value, bool):
            found[f"{prefix}no-{name}"] = value
    return found


def _spelt(word: str) -> str:
    """An option's name as `_options` spells it."""
    return word.partition("=")[0].replace("_", "-")


def _unknown(word: str, options: Sequence[str], beside: Sequence[str]) -> str:
    word, known = word.partition("=")[0], [*options, *beside, "--config", "--help"]
    if word in (*beside, "--help"):
        return f"{word} must stand alone (it is a flag), got '=' behind it"
    return f"unknown option {word!r}; the nearest known one is {nearest(word, known)!r}"


def _why_it_stopped(argv: Sequence[str], default: object, said: str, beside: Sequence[str]) -> str:
    """What was wrong with an argv that tyro could not make settings of."""
    import tyro

    options, given = _options(default), [word for word in argv if word.startswith("--")]
    for word in given:
        if _spelt(word) not in options:
            return _unknown(word, list(options), beside)
    names = {_spelt(word) for word in given}
    missing = [n for n, value in options.items() if value is tyro.MISSING and n not in names]
    if missing:
        return f"{' and '.join(missing)} must be given, here or in the file behind --config"
    return _first_sentence(said)


def _why_it_is_unplaced(
    word: str, argv: Sequence[str], default: object, beside: Sequence[str]
) -> str:
    """What is wrong with a word that tyro left over."""
    options = _options(default)
    if word.startswith("--"):
        return _unknown(word, list(options), beside)
    before = ["", *argv][argv.index(word)] if word in argv else _joined(word, argv)
    if isinstance(options.get(_spelt(before)), bool):
        return f"{before} must stand alone (it is a flag), got {word!r} behind it"
    return f"a value must stand behind its option, got {word!r}"


def _joined(word: str, argv: Sequence[str]) -> str:
    """The option that has this value behind an equals sign."""
    return next((o for o, _, value in (w.partition("=") for w in argv) if value == word), "")


def _first_sentence(box: str) -> str:
    """What a message of tyro says between its title and its first rule; frames may be ASCII."""
    parts: list[list[str]] = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines():
        inner = line.strip("│╭╮╰╯ ")
        if re.fullmatch(r"─.*─|-{3,}", inner):
            parts.append([])
        else:
            parts[-1].append(inner)
    text = " ".join(" ".join(parts[min(1, len(parts) - 1)]).split()).rstrip(".!")
    text = re.sub(r"^Error parsing (?!--)\S+: ", "", text)  # our records name themselves
    text = text.replace("Failed to parse key-value pairs", "must be pairs, NAME VALUE NAME VALUE")
    return text.removeprefix("Error parsing ")
