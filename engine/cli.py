"""The `tercet` command: finds the subcommand and hands it the rest of the line."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Command(NamedTuple):
    """A subcommand and the function (arguments, program name) -> exit status that runs it."""

    target: str
    summary: str
    resumes: bool = False  # whether the same command goes on from where it was stopped


COMMANDS = {
    "demo grace": Command(
        "tercet.engine.demo.commands:grace",
        "train GRACE on a small world and show what it learnt",
        resumes=True,
    ),
    "grace train": Command(
        "tercet.engine.grace.commands:train",
        "reward rationales contrastively and train on them",
        resumes=True,
    ),
    "grace encode": Command(
        "tercet.engine.grace.commands:encode", "texts in, vectors and rationales out"
    ),
    "grace eval": Command(
        "tercet.engine.grace.commands:evaluate",
        "retrieval, STS, anisotropy, kept generation ability",
    ),
    "grace experiment": Command(
        "tercet.engine.grace.commands:experiment",
        "all rows of the real-text table from one file",
        resumes=True,
    ),
    "bench": Command(
        "tercet.engine.bench:main", "every kernel beside its peers: time, memory, error"
    ),
    "report": Command("tercet.engine.report:main", "one self-contained page about a run folder"),
    "tree": Command("tercet.engine.tree:main", "a search tree of a saved forest as a picture"),
    "doctor": Command(
        "tercet.engine.doctor:main", "versions, devices, and what each operation will run"
    ),
}


def usage(group: str = "") -> str:
    """The list of commands, or of those whose first word is `group`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [
        f"  tercet {name:<{width}}{command.summary}"
        for name, command in COMMANDS.items()
        if not group or name.startswith(f"{group} ")
    ]
    return "\n".join(
        ["usage: tercet COMMAND [--config FILE.yaml] [--key.subkey VALUE ...]", "", *lines, "",
         "tercet COMMAND --help lists the settings of a command."]
    )  # fmt: skip


def find_command(argv: list[str]) -> tuple[str, list[str]] | None:
    """The command that the first words of argv name, and what stands behind them."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    return None


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 after a failure, 2 after wrong usage, 130 after Ctrl-C, 141 where nobody reads on, 143
        after SIGTERM.
    """
    try:
        status = _dispatch(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted; Python would complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


def _dispatch(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage() + "\n")
        return 0 if argv else 2
    if argv[0] == "--version":
        from tercet import __version__

        sys.stdout.write(f"tercet {__version__}\n")
        return 0
    found = find_command(argv)
    if found is None:
        asked = argv[1:] in (["-h"], ["--help"])
        if (asked or not argv[1:]) and any(name.startswith(f"{argv[0]} ") for name in COMMANDS):
            sys.stdout.write(usage(argv[0]) + "\n")
            return 0 if asked else 2
        words = argv[:2]
        near = difflib.get_close_matches(" ".join(words), COMMANDS, n=1, cutoff=0.0)[0]
        sys.stderr.write(
            f"tercet: there is no command '{' '.join(words)}'; did you mean '{near}'?\n"
        )
        return 2
    name, rest = found
    return _run(COMMANDS[name], rest, f"tercet {name}")


def _run(command: Command, argv: list[str], prog: str) -> int:
    """Calls a command and turns the errors that a user can mend into one line each."""
    from tercet.engine.config import ConfigError

    module, _, function = command.target.partition(":")
    terminated: list[int] = []
    try:
        with _sigterm_as_ctrl_c(terminated):
            return getattr(importlib.import_module(module), function)(argv, prog)
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError, ArithmeticError, OSError) as error:
        logging.getLogger(__name__).debug("%s failed", prog, exc_info=True)
        sys.stderr.write(f"{prog}: {_unprefixed(str(error), prog)}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as stop:
        told = str(stop)
        if command.resumes and not told:
            told = "the same command goes on from the last checkpoint, if there is one"
        sys.stderr.write(f"\n{prog}: stopped{'; ' if told else ''}{told}\n")
        return 143 if terminated else 130


@contextmanager
def _sigterm_as_ctrl_c(came: list[int]) -> Iterator[None]:
    """Within, SIGTERM unwinds as Ctrl-C does, so that nothing is left half-written.

    The first alone: `timeout` sends two, and the second would cut the cleaning up short.  Nothing
    changes in a thread, where Python allows no handler, nor for who ignores SIGTERM or handles it
    outside Python.

    Args:
        came: gets the signals that come.
    """

    def stop(number: int, _: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    in_thread = threading.current_thread() is not threading.main_thread()
    if in_thread or before is None or before == signal.SIG_IGN:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, stop)
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unprefixed(message: str, prog: str) -> str:
    """A message without the names of command and function before it; any other word stays."""
    message = message.removeprefix(f"{prog}: ")
    found = re.match(r"(\[Errno \d+\] )?(\w+)(\.\w+)?: ", message)
    return message[found.end() :] if found and _is_ours(found[2]) else message


def _is_ours(name: str) -> bool:
    """Whether a command, or a function or class of a module that is loaded, has this name."""
    if any(command.split()[-1] == name for command in COMMANDS):
        return True
    modules = [module for key, module in sys.modules.items() if key.startswith("tercet.")]
    found = [getattr(module, name, None) for module in modules]
    return any(str(getattr(thing, "__module__", "")).startswith("tercet.") for thing in found)
