"""The append-only log of a forest: every call that changes it, in a file that outlives a crash.

A file is the 20 bytes of `HEADER` and then records, all little-endian:

    length u64 | check u32 | payload, of that length | crc u32

`check` is the CRC32 of the length and `crc` that of the payload, each begun with the CRC before it,
so that a record stands only where it was written. A payload is the number of a call, and its
arguments in the order of `CALLS`, each behind a byte that says what it is. The first record holds
the settings as JSON.
"""

from __future__ import annotations

import fcntl
import json
import operator
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tercet._mcts import (
    Counters,
    Forest,
    Leaves,
    RewardConfig,
    RewardForm,
    TreeColumns,
    TreeStatus,
)

PathLike: TypeAlias = str | os.PathLike[str]

HEADER = b"tercet event log" + struct.pack("<I", 1)  # and the version
HEAD, TAIL = struct.Struct("<QI"), struct.Struct("<I")
MOST_SETTINGS = 1 << 20  # bytes of JSON

BUDGETS = ("evaluations", "nodes", "model_calls", "tokens", "tool_calls", "seconds")
CALLS: dict[str, tuple[str, ...]] = {  # a call's number is its place here: new ones come last
    "settings": ("json",),
    "add_tree": ("root_handle", "simulations", "seed", *BUDGETS),
    "add_tree_along": ("root_handle", "simulations", "landings", "seed"),
    "remove_tree": ("tree",),
    "extend": ("tree", "simulations"),
    "reroot": ("tree", "node", "simulations"),
    "reallocate": (),
    "ask": ("max_leaves", "leaves"),  # the latter: `leaves_check` of what it gave
    "tell": (
        *("tickets", "values", "num_children", "handles", "priors", "terminal", "outcomes"),
        *("channels", "costs"),
    ),
    "tell_children": ("tickets", "num_children", "handles", "priors", "terminal", "costs"),
    "tell_values": ("tickets", "values", "outcomes", "channels", "costs"),
    "tell_verdicts": ("tickets", "steps", "verdicts"),
    "tell_outcome": ("tickets", "num_steps", "outcomes", "start_verdicts", "costs"),
    "fail": ("tickets", "costs"),
    "cancel": ("tickets", "costs"),
    "recall": (),
}
NAMES = tuple(CALLS)
NONE, INTEGER, FLOAT, ARRAY, TEXT = range(5)
DTYPES = tuple(np.dtype(code) for code in ("<u8", "<u4", "<i8", "<f8", "<f4", "?"))
REWARD = ("outcome_weight", "step_decay", "truncated_outcome", "add_start_verdict")
FORMS = {"paper": RewardForm.paper, "released": RewardForm.released}
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError)  # what a forest raises


class LogError(ValueError):
    """A file that is no log, is damaged, or does not fit; `position` is the byte, if there is one.

    Also a log that cannot be gone on with.
    """

    def __init__(self, message: str, position: int | None = None):
        super().__init__(message)
        self.position = position


# Payloads.


def encoded(name: str, arguments: dict[str, Any]) -> bytes:
    parts = [bytes([NAMES.index(name)])]
    for argument in CALLS[name]:
        parts += encoded_argument(argument, arguments.get(argument))
    return b"".join(parts)


def encoded_argument(name: str, x: Any) -> list[bytes]:
    if x is None:
        return [bytes([NONE])]
    if isinstance(x, str):
        text = x.encode()
        return [bytes([TEXT]), struct.pack("<Q", len(text)), text]
    if isinstance(x, np.ndarray):
        little = x.dtype.newbyteorder("<")
        shape = struct.pack(f"<BBB{x.ndim}Q", ARRAY, DTYPES.index(little), x.ndim, *x.shape)
        return [shape, x.astype(little, copy=False).tobytes()]
    if name in BUDGETS:
        return [struct.pack("<Bd", FLOAT, x)]
    return [bytes([INTEGER]), operator.index(x).to_bytes(9, "little", signed=True)]


class Payload:
    """Takes a payload apart; it is whole, but whoever wrote it may have been anybody."""

    def __init__(self, data: bytes, position: int):
        self.data, self.at, self.position = data, 0, position

    def malformed(self, what: str) -> LogError:
        return LogError(f"the record at byte {self.position} has {what}", self.position)

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.malformed("an argument that is longer than itself")
        self.at += size
        return self.data[self.at - size : self.at]

    def call(self) -> tuple[str, dict[str, Any]]:
        number = self.take(1)[0]
        if number >= len(NAMES):
            raise self.malformed(f"an unknown call, {number}")
        arguments = {name: self.argument() for name in CALLS[NAMES[number]]}
        if self.at != len(self.data):
            raise self.malformed("bytes behind its arguments")
        return NAMES[number], arguments

    def argument(self) -> Any:
        what = self.take(1)[0]
        if what == NONE:
            return None
        if what == INTEGER:
            return int.from_bytes(self.take(9), "little", signed=True)
        if what == FLOAT:
            return struct.unpack("<d", self.take(8))[0]
        if what == ARRAY:
            return self.array()
        if what == TEXT:
            return self.text()
        raise self.malformed(f"an argument of an unknown sort, {what}")

    def array(self) -> NDArray[Any]:
        code, dimensions = self.take(2)
        if code >= len(DTYPES) or dimensions > 2:
            raise self.malformed("an array of an unknown sort")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        size = DTYPES[code].itemsize
        for length in shape:
            size *= length
        data = self.take(size)
        if DTYPES[code] == np.bool_ and data.strip(b"\0\1"):
            raise self.malformed("an array of truth values that are none")
        if not size and max(shape, default=0) > len(self.data):
            raise self.malformed("an empty array of an impossible shape")
        return (
            np.frombuffer(data, DTYPES[code]).reshape(shape).astype(DTYPES[code].newbyteorder("="))
        )

    def text(self) -> str:
        data = self.take(struct.unpack("<Q", self.take(8))[0])
        if len(data) > MOST_SETTINGS:
            raise self.malformed(f"a text of {len(data)} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.malformed("a text that is no UTF-8") from error


# Settings.


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON has them; equal for equal ones."""
    reward = settings["reward"]
    shown = {name: getattr(reward, name) for name in REWARD}
    shown["form"] = next(name for name, form in FORMS.items() if form == reward.form)
    channels = [list(channel) for channel in settings["channels"]]
    return settings | {"reward": shown, "channels": channels}


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Names of settings, with commas between."""
    one, other = plain(one), plain(other)
    return ", ".join(name for name, x in one.items() if x != other[name])


def settings_from_json(text: str) -> dict[str, Any]:
    """Raises what reading them raises: ValueError, TypeError, KeyError, RecursionError."""
    settings = json.loads(text)
    if not isinstance(settings, dict) or not isinstance(settings.get("reward"), dict):
        raise TypeError("settings must be an object, and so the reward in them")
    reward = settings["reward"]
    settings["reward"] = RewardConfig(**reward | {"form": FORMS[reward["form"]]})
    settings["channels"] = [tuple(channel) for channel in settings["channels"]]
    return settings


# Files.


class LogReader:
    """Reads the calls of a log; afterwards `end` is where the next record belongs.

    Attributes:
        end: byte behind the last whole record.
        crc: of that record.
        torn_bytes: of a last record that was being written; also zeros, as some file systems leave
            them after a power cut.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.end, self.crc = 0, 0

    @property
    def torn_bytes(self) -> int:
        return self.size - self.end

    def calls(self) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Position, name and arguments."""
        header = self.file.read(len(HEADER))
        if header != HEADER[: len(header)]:
            if header[:16] == HEADER[:16]:
                version = struct.unpack("<I", header[16:].ljust(4, b"\0"))[0]
                raise LogError(f"a log of version {version}; this program reads 1", 16)
            raise LogError("this file is no log of a forest", 0)
        if len(header) < len(HEADER):
            return
        position, crc = len(HEADER), 0
        while (record := self.record(position, crc)) is not None:
            payload, crc = record
            call = Payload(payload, position).call()
            if (call[0] == "settings") != (position == len(HEADER)):
                raise LogError(f"settings belong first, not at byte {position}", position)
            start, position = position, position + HEAD.size + len(payload) + TAIL.size
            self.end, self.crc = position, crc
            yield start, *call

    def record(self, position: int, crc: int) -> tuple[bytes, int] | None:
        head = self.file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        length, check = HEAD.unpack(head)
        if check != zlib.crc32(head[:8], crc):
            if not any(head) and self.only_zeros():
                return None
            raise self.damaged(position)
        if length > self.size - position - HEAD.size - TAIL.size:
            return None
        payload = self.file.read(length)
        tail = self.file.read(TAIL.size)
        if len(payload) < length or len(tail) < TAIL.size:  # somebody cut it in the meantime
            raise self.damaged(position)
        crc = zlib.crc32(payload, check)
        if TAIL.unpack(tail)[0] != crc:
            raise self.damaged(position)
        return payload, crc

    def only_zeros(self) -> bool:
        while chunk := self.file.read(1 << 20):
            if any(chunk):
                return False
        return True

    def damaged(self, position: int) -> LogError:
        return LogError(
            f"the record at byte {position} is damaged; all before it is whole, so cutting the "
            f"file there loses only the rest",
            position,
        )


def first_settings(calls: Iterator[tuple[int, str, dict[str, Any]]]) -> dict[str, Any] | None:
    """None: the log ends before them."""
    for position, _, arguments in calls:
        try:
            return Forest(**settings_from_json(arguments["json"])).settings
        except (*REFUSALS, KeyError, RecursionError) as error:
            raise LogError(f"settings that no forest has: {error}", position) from error
    return None


def leaves_check(leaves: Leaves) -> int:
    check = 0
    for column in (leaves.ticket, leaves.node, leaves.handle, leaves.attempt):
        check = zlib.crc32(column.tobytes(), check)
    return check


def replayed(forest: Forest, position: int, name: str, arguments: dict[str, Any]) -> Any:
    """What the call gives this time.

    Raises:
        LogError: the forest refuses it, or hands out other leaves than at the time.
    """
    given = {argument: x for argument, x in arguments.items() if x is not None}
    check = given.pop("leaves", None)
    try:
        result = getattr(forest, name)(**given)
    except REFUSALS as error:
        raise LogError(f"{name} at byte {position} does not fit: {error}", position) from error
    if name == "ask" and leaves_check(result) != check:
        raise LogError(
            f"ask at byte {position} hands out other leaves than at the time; scores and noise "
            "are the same only with the same version and mathematical library",
            position,
        )
    return result


class LoggedForest:
    """A `Forest` whose changes are in a file, to be gone on with bit for bit.

    Every call that changes the forest is made, and then appended to the file; one that the forest
    refuses is not. Each is handed to the operating system before the call returns, so that killing
    the process loses nothing; `sync` makes it outlive a power cut. The methods are those of
    `Forest`, which says what they do. Opening a file makes all its calls again: the forest is the
    same, tickets that are out included; `recall` has them handed out again.

    Args:
        path: of a new log, or of one to go on with. One process at a time can have it open.
        settings: of a new forest. With a file that is there, those given must be the same as in
            the file. `record` is True.

    Raises:
        LogError: another file, a damaged record (`position` says where), calls that do not fit,
            settings that differ, or another process has it open.
        OSError: the file. After one while writing, every call that changes the forest is a
            LogError; opening the file again gives the forest as it was before that call.
        RuntimeError: another thread is in such a call.
    """

    def __init__(self, path: PathLike, **settings: Any):
        self._path = Path(path)
        self._lock = threading.Lock()
        self._behind = False  # the forest may have changed, and the file not
        self._idle = False  # nothing has changed since an ask got nothing
        self.torn_bytes = 0  # cut off the end when it was opened
        if not settings.setdefault("record", True):
            raise ValueError("LoggedForest: record must be True, got False")
        if not self._path.exists():
            Forest(**settings)  # refuses settings before there is a file
        elif not stat.S_ISREG(self._path.stat().st_mode):
            raise LogError(f"{path}: not a regular file")
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._open(settings)
        except BaseException:
            self.close()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LogError(f"{self._path}: somebody else has it open") from error
        with open(self._descriptor, "rb", closefd=False) as file:
            reader = LogReader(file)
            calls = reader.calls()
            known = first_settings(calls)
            if known is None:
                self._forest = Forest(**settings)
            else:
                self._forest = Forest(**known)
                if differ := differing(known, Forest(**known | settings).settings):
                    raise LogError(f"{self._path}: the log has other settings: {differ}")
            for call in calls:
                replayed(self._forest, *call)
        self.torn_bytes = reader.torn_bytes
        self._end, self._crc = reader.end, reader.crc
        os.ftruncate(self._descriptor, self._end)
        if known is None:
            self._end = self._crc = 0
            shown = json.dumps(plain(self._forest.settings))
            self._append(encoded("settings", {"json": shown}), before=HEADER)

    # The file.

    def _append(self, payload: bytes, before: bytes = b"") -> None:
        length = struct.pack("<Q", len(payload))
        check = zlib.crc32(length, self._crc)
        crc = zlib.crc32(payload, check)
        record = before + length + struct.pack("<I", check) + payload + struct.pack("<I", crc)
        rest = memoryview(record)
        end = self._end
        while rest:
            written = os.pwrite(self._descriptor, rest, end)
            rest, end = rest[written:], end + written
        self._end, self._crc = end, crc

    def _logged(self, name: str, **arguments: Any) -> Any:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"LoggedForest.{name}: another thread is in a call of this forest")
        try:
            return self._call(name, arguments)
        finally:
            self._lock.release()

    def _call(self, name: str, arguments: dict[str, Any]) -> Any:
        if self._descriptor < 0:
            raise LogError(f"LoggedForest.{name}: the log is closed")
        if self._behind:
            raise LogError(
                f"LoggedForest.{name}: a call before was not written, or not to its end; open "
                "the log again"
            )
        self._behind = True
        try:
            given = {argument: x for argument, x in arguments.items() if x is not None}
            result = getattr(self._forest, name)(**given)
        except (*REFUSALS, MemoryError):
            self._behind = False
            raise
        if name == "ask":
            arguments["leaves"] = leaves_check(result)
            repeated = self._idle
            self._idle = len(result) == 0 and arguments["max_leaves"] > 0
        else:
            repeated = self._idle = False
        if not repeated:  # asking again where nothing was left to ask changes nothing
            self._append(encoded(name, arguments))
        self._behind = False
        return result

    def sync(self) -> None:
        """Waits until all that was done so far is on the disk."""
        if self._descriptor < 0:
            raise LogError("LoggedForest.sync: the log is closed")
        os.fsync(self._descriptor)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Closes the file; the forest can still be looked at."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> LoggedForest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What changes the forest.

    def add_tree(
        self, root_handle: int, simulations: int, *, seed: int = 0, **budgets: float | None
    ) -> int:
        return self._logged(
            "add_tree", root_handle=root_handle, simulations=simulations, seed=seed, **budgets
        )

    def add_tree_along(
        self,
        root_handle: int,
        simulations: int,
        landings: NDArray[np.uint32],
        *,
        seed: int = 0,
    ) -> int:
        return self._logged(
            "add_tree_along",
            root_handle=root_handle,
            simulations=simulations,
            landings=landings,
            seed=seed,
        )

    def remove_tree(self, tree: int) -> None:
        self._logged("remove_tree", tree=tree)

    def extend(self, tree: int, simulations: int) -> None:
        self._logged("extend", tree=tree, simulations=simulations)

    def reroot(self, tree: int, node: int, simulations: int) -> None:
        self._logged("reroot", tree=tree, node=node, simulations=simulations)

    def reallocate(self) -> int:
        return self._logged("reallocate")

    def ask(self, max_leaves: int) -> Leaves:
        return self._logged("ask", max_leaves=max_leaves)

    def tell(
        self,
        tickets: NDArray[np.uint64],
        values: NDArray[np.float64],
        num_children: NDArray[np.uint32],
        handles: NDArray[np.int64],
        *,
        priors: NDArray[np.float32] | None = None,
        terminal: NDArray[np.bool_] | None = None,
        outcomes: NDArray[np.float64] | None = None,
        channels: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        self._logged(
            "tell",
            tickets=tickets,
            values=values,
            num_children=num_children,
            handles=handles,
            priors=priors,
            terminal=terminal,
            outcomes=outcomes,
            channels=channels,
            costs=costs,
        )

    def tell_children(
        self,
        tickets: NDArray[np.uint64],
        num_children: NDArray[np.uint32],
        handles: NDArray[np.int64],
        *,
        priors: NDArray[np.float32] | None = None,
        terminal: NDArray[np.bool_] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        self._logged(
            "tell_children",
            tickets=tickets,
            num_children=num_children,
            handles=handles,
            priors=priors,
            terminal=terminal,
            costs=costs,
        )

    def tell_values(
        self,
        tickets: NDArray[np.uint64],
        values: NDArray[np.float64],
        *,
        outcomes: NDArray[np.float64] | None = None,
        channels: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        self._logged(
            "tell_values",
            tickets=tickets,
            values=values,
            outcomes=outcomes,
            channels=channels,
            costs=costs,
        )

    def tell_verdicts(
        self,
        tickets: NDArray[np.uint64],
        steps: NDArray[np.uint32],
        verdicts: NDArray[np.float64],
    ) -> None:
        self._logged("tell_verdicts", tickets=tickets, steps=steps, verdicts=verdicts)

    def tell_outcome(
        self,
        tickets: NDArray[np.uint64],
        num_steps: NDArray[np.uint32],
        outcomes: NDArray[np.float64],
        *,
        start_verdicts: NDArray[np.float64] | None = None,
        costs: NDArray[np.float64] | None = None,
    ) -> None:
        self._logged(
            "tell_outcome",
            tickets=tickets,
            num_steps=num_steps,
            outcomes=outcomes,
            start_verdicts=start_verdicts,
            costs=costs,
        )

    def fail(
        self, tickets: NDArray[np.uint64], *, costs: NDArray[np.float64] | None = None
    ) -> None:
        self._logged("fail", tickets=tickets, costs=costs)

    def cancel(
        self, tickets: NDArray[np.uint64], *, costs: NDArray[np.float64] | None = None
    ) -> None:
        self._logged("cancel", tickets=tickets, costs=costs)

    def recall(self) -> int:
        return self._logged("recall")

    # What only looks at it.

    @property
    def settings(self) -> dict[str, Any]:
        return self._forest.settings

    def is_finished(self, tree: int) -> bool:
        return self._forest.is_finished(tree)

    def status(self, tree: int) -> TreeStatus:
        return self._forest.status(tree)

    def columns(self, tree: int) -> TreeColumns:
        return self._forest.columns(tree)

    def landings(self, tree: int) -> NDArray[np.uint32]:
        return self._forest.landings(tree)

    def choice(self, tree: int) -> int | None:
        return self._forest.choice(tree)

    def counters(self) -> Counters:
        return self._forest.counters()

    def to_bytes(self) -> bytes:
        return self._forest.to_bytes()

    def save(self, path: PathLike) -> None:
        self._forest.save(path)
