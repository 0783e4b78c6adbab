"""Models and tokenizers from files: safetensors only, no remote code, clear refusals."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tercet.engine.model_paths import find_model

log = logging.getLogger(__name__)

# What transformers raises for damaged or contradictory files, beside OSErrors.
UNLOADABLE = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None,
    activation_checkpointing: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and, where there is one, the tokenizer of a folder or a hub id.

    Raises:
        FileNotFoundError: `path` is a folder without config.json, or looks like a folder and is
            none; names the checkpoints that are near.
        OSError: a file is not there or cannot be read.
        ValueError: no such device here, damaged or contradictory files, or weights that are missing
            from them.
    """
    if device is not None:
        _check_device(device)
    source = find_model(path)
    with _Loading(source, "model", "config.json and *.safetensors"), no_file_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"Policy.from_pretrained: {source} must hold every weight of "
            f"{type(model).__name__}, got none or another shape for {lacking[:5]}; "
            "compare config.json with the weights"
        )
    if activation_checkpointing:
        _checkpoint_activations(model)
    if device is not None:
        nn.Module.to(model, device)
    return model, _load_tokenizer(source)


@contextmanager
def no_file_bars() -> Iterator[None]:
    """Within, transformers draws no bar for each file of weights; downloads keep theirs."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:  # transformers before 5.20 knows it by its older name
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        log.warning("Policy.from_pretrained: no tokenizer in %s", source)
        return None
    with _Loading(source, "tokenizer", "tokenizer.json and tokenizer_config.json"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@dataclass(frozen=True, slots=True)
class _Loading:
    """Within, what transformers raises for unusable files takes one form."""

    source: str
    what: str
    files: str

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        # tokenizers raises Exception itself, no subclass, for a tokenizer.json that it cannot use
        if isinstance(error, OSError):
            place = "folder" if Path(self.source).is_dir() else "hub id"
            raise OSError(
                f"Policy.from_pretrained: {self.source} must be a {place} with a readable "
                f"{self.what}, got {_first_line(error)}; check {self.files}"
                + ("" if place == "folder" else ", the name and the network, or name a folder")
            ) from error
        if error is not None and (isinstance(error, UNLOADABLE) or kind is Exception):
            raise ValueError(
                f"Policy.from_pretrained: {self.source} must hold a loadable {self.what}, got "
                f"{_first_line(error)}; compare {self.files} with the original, or save it again"
            ) from error


def _check_device(device: torch.device | str) -> None:
    seen = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    must = f"Policy.from_pretrained: device must be one that torch can use here ({seen}), got"
    try:
        device = torch.device(device)
    except RuntimeError as error:  # lists every kind of device there is
        raise ValueError(f"{must} {device!r}; name one of them") from error
    if device.type == "meta":
        raise ValueError(f"{must} {str(device)!r}, which holds no values; name one of them")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"{must} {str(device)!r} ({_first_line(error)}); name one of them, or install the "
            "torch build for it"
        ) from error


def _first_line(error: BaseException) -> str:
    """The kind of an error and its first line, and the next where that one only leads to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {told[:300]}"
