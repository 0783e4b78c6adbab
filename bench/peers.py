"""Whom the benches compare with, and why one of them cannot run here.

A bench lists its `Peer`s; `roster` turns them into functions to time, and names what is left out
with the reason.  Versions: constraints.txt.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import tomllib
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from machine import DEVICE, ROOT, installed


class Peer(NamedTuple):
    """One way to do a bench's work."""

    function: Callable[..., Any]
    package: str = "torch"
    cuda: bool = False  # has no path on a CPU
    compile: bool = False  # through torch.compile
    missing: str = ""  # why it cannot run although its package is there


class Roster(NamedTuple):
    """What can run here, by name, and what cannot."""

    functions: dict[str, Callable[..., Any]]
    not_run: dict[str, str]
    packages: tuple[str, ...]  # whose versions belong to the result
    compiled: tuple[str, ...]  # whose first call compiles
    absent: tuple[str, ...]  # packages that are all that some peer lacks


def cxx_compiler() -> str | None:
    """What torch.compile would call on a CPU."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def _not_installed(package: str) -> str:
    return f"{package} is not installed"


def _reason(peer: Peer) -> str:
    """Why the peer cannot run here; empty when it can."""
    reasons = []
    if peer.cuda and DEVICE.type != "cuda":
        reasons.append("needs CUDA")
    if installed(peer.package) is None:
        reasons.append(_not_installed(peer.package))
    if peer.compile and DEVICE.type == "cpu" and cxx_compiler() is None:
        reasons.append("needs a C++ compiler")
    if peer.missing:
        reasons.append(peer.missing)
    return ", ".join(reasons)


@cache
def _compiled_code() -> str:
    """Folder for this process's compiled code.  What every first compilation pays is paid here."""
    folder = tempfile.mkdtemp(prefix="bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")
    torch.compile(torch.sin)(torch.zeros(1, device=DEVICE))
    return folder


def forget_compiled_code() -> None:
    """Makes the next compilation a whole one, so that its time means something."""
    folder = tempfile.mkdtemp(dir=_compiled_code())
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at the first call, so that what is not called does not load the compiler."""

    @cache
    def ready() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return lambda *args, **options: ready()(*args, **options)


def roster(peers: Mapping[str, Peer]) -> Roster:
    """Splits peers into those that run here and those that do not."""
    reasons = {name: _reason(peer) for name, peer in peers.items()}
    able = {name: peer for name, peer in peers.items() if not reasons[name]}
    return Roster(
        functions={
            name: _compiled(peer.function) if peer.compile else peer.function
            for name, peer in able.items()
        },
        not_run={name: reason for name, reason in reasons.items() if reason},
        packages=tuple(dict.fromkeys(peer.package for peer in peers.values())),
        compiled=tuple(name for name, peer in able.items() if peer.compile),
        absent=tuple(
            dict.fromkeys(
                peer.package
                for name, peer in peers.items()
                if reasons[name] == _not_installed(peer.package)
            )
        ),
    )


@cache
def verl_linear_cross_entropy() -> Callable[..., Any]:
    """verl's fused head, without importing the trainer around it and what that needs."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    for name, path in (("verl", folder), ("verl.utils", f"{folder}/utils")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    return importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy


def remedy(absent: Iterable[str]) -> str:
    """How to install what peers lack; empty when they lack nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = {re.split(r"[^\w-]", r)[0] for r in project["optional-dependencies"]["bench"]}
    absent = sorted(set(absent))
    commands = ["pip install -e '.[bench]'"] if extra & set(absent) else []
    commands += [f"pip install {package}" for package in absent if package not in extra]
    return f"not installed: {', '.join(absent)}; {' and '.join(commands)}" if absent else ""
