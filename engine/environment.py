"""What a run's numbers depend on besides its settings: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.engine.doctor import devices, implementations, package_versions

if TYPE_CHECKING:
    import torch


def environment() -> dict[str, Any]:
    """What a run's numbers depend on besides its settings.  Holds no environment variables."""
    import tercet

    return {
        "tercet": tercet.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "devices": devices(),
        "implementations": implementations(),
    }


def git_commit() -> str | None:
    """Commit this code was checked out at, with "+changes" behind it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", str(Path(__file__).resolve())],
            capture_output=True,
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:  # git is not installed
        return None
    if commit.returncode or tracked.returncode:
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def short_commit(commit: str) -> str:
    """A commit as `git_commit` gives it, cut to seven digits."""
    digits, plus, changes = commit.partition("+")
    return f"{digits[:7]}{plus}{changes}"


def cpu_model() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Runs torch on so many CPU threads within; None: on as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in 1e9 bytes: torch's own on CUDA, else of this process since it started."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
