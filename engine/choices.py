"""Choices of settings that parts of the engine share.  Loads no torch."""

from typing import Literal

Pooling = Literal["mean", "penultimate_mean", "max", "last_token"]  # see engine/pooling.py
