"""Text files that a kill cannot leave half-written, and JSON lines that survive one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "run.lock"  # in the folder of every run, from its first moment on
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def append_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows behind the others, one JSON object per line; what is not finite becomes null.

    Raises:
        OSError: the disk is full (ENOSPC); names the file and the free space.  No row is written.
    """
    text = "".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows)
    told = {"content": path.name, "remedy": "no new line was written; free some space, then resume"}
    with _named_when_full(path.parent, function="append_jsonl", **told):
        file = path.open("ab")
        size = file.tell()
        try:
            with file:
                file.write(text.encode("utf-8"))
        except OSError:
            os.truncate(path, size)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a kill is left out.

    Raises:
        ValueError: another line is not JSON in UTF-8; names the file and the line.
    """
    if not path.exists():
        return []
    *lines, _cut = path.read_bytes().split(b"\n")  # _cut: nothing, or half a line
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _no_object(path, number, line, f" ({error})") from error
        if not isinstance(row, dict):
            raise _no_object(path, number, line)
        rows.append(row)
    return rows


def _no_object(path: Path, number: int, line: bytes, why: str = "") -> ValueError:
    return ValueError(
        f"read_jsonl: {path}:{number} must be a JSON object in UTF-8, got "
        f"{line[:80].decode('utf-8', 'replace')!r}{why}; "
        "restore the file from a copy, or delete the line"
    )


def rewind_jsonl(path: Path, *, last_step: int | None) -> int:
    """Drops a cut last line and, given last_step, the rows after it.  Returns their number.

    Raises:
        ValueError: a row is no JSON object with a whole number as its step.
    """
    if not path.exists():
        return 0
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if type(row.get("step")) is not int:
            raise ValueError(
                f"rewind_jsonl: {path}:{number} must have a whole number as its step, got "
                f"{row.get('step')!r}; restore the file from a copy, or delete the line"
            )
    kept = [r for r in rows if last_step is None or r["step"] <= last_step]
    replace_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    return len(rows) - len(kept)


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new one, never half of it.

    A link stays one: the file behind it is written.

    Raises:
        OSError: as `removed_on_failure`; it cannot be made.
    """
    data = text.encode("utf-8", "replace")  # half a surrogate pair becomes "?"
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    told = {
        "function": "replace_text",
        "content": path.name,
        "remedy": "nothing of it was written; free some space",
    }
    file = temporary.open("wb")
    with removed_on_failure(temporary, path.parent, **told), file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(path)


def check_output(path: Path, name: str) -> None:
    """Refuses what `replace_text` cannot write to, before the work whose result goes there.

    Args:
        path: to be written.
        name: of what it was given as, in the error.

    Raises:
        ValueError: there is something that is no file.
        FileNotFoundError: there is no folder for it, of a link: for the file behind it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{name} must be a file, got {path}, a folder, pipe or device; name a file"
        )
    folder = path.resolve().parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must be a file in a folder that exists, got no {folder}; make it"
        )


def read_object(path: Path, function: str, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: of the file.
        function: whose errors these are.
        remedy: what to do with a file that holds none.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{function}: {path} must be a JSON object, got {error}; {remedy}"
        ) from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(f"{function}: {path} must be a JSON object, got {kind}; {remedy}")
    return found


@contextmanager
def removed_on_failure(
    temporary: Path, folder: Path, *, function: str, content: str, remedy: str
) -> Iterator[None]:
    """Leaves no half-written file or folder behind, and names the folder of a full disk.

    Args:
        temporary: what is removed; a file or a folder.
        folder: one that is there; its disk is the one that is written to.
        function: whose error it is.
        content: what is written.
        remedy: what to do about a full disk.

    Raises:
        OSError: the disk is full (ENOSPC); names the folder and the free space.
    """
    with _named_when_full(folder, function=function, content=content, remedy=remedy):
        try:
            yield
        except BaseException:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def _named_when_full(folder: Path, *, function: str, content: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not _disk_is_full(error):
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(
            errno.ENOSPC,
            f"{function}: the disk of {folder} must hold {content}, but it is full "
            f"({free:.0f} MB free without it); {remedy}",
        ) from error


def _disk_is_full(error: BaseException | None) -> bool:
    """Python, torch and safetensors each report it in their own way."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if re.search(r"No space left|File too large|os error (28|27|122)\b", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def placed(path: str | Path) -> str:
    """A path as an error names it: a relative one with the folder that it begins in."""
    relative = not Path(path).is_absolute()
    return f"{path} (a relative path, looked for in {Path.cwd()})" if relative else f"{path}"


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoint-N folders in a run's folder, newest first."""
    numbered = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in folder.glob("checkpoint-*")]
    found = [(int(match[1]), path) for match, path in numbered if match and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def lock(path: Path) -> int:
    """Takes the lock that a file is, until the descriptor is closed or the process ends.

    Returns:
        The descriptor.

    Raises:
        BlockingIOError: another process has it (or this one, already); the message is its number.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise BlockingIOError(errno.EWOULDBLOCK, holder or "unknown") from None
    if not (path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))):
        os.close(descriptor)  # its holder removed the file while we opened it
        return lock(path)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def follow_umask(folder: Path) -> None:
    """Gives a folder and the files in it the modes of new ones.

    `tempfile` and safetensors keep what they make to their owner.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
