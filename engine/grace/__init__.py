"""GRACE: a language model that writes rationales and is paid for what their embeddings can do.

Source: arXiv:2510.04506.  Loading this package loads no torch; its names do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tercet.engine.grace.config import GraceConfig
    from tercet.engine.grace.encoder import GraceEncoder
    from tercet.engine.grace.training import train

_HOMES = {
    "GraceConfig": "tercet.engine.grace.config",
    "GraceEncoder": "tercet.engine.grace.encoder",
    "train": "tercet.engine.grace.training",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)


__all__ = ["GraceConfig", "GraceEncoder", "train"]
