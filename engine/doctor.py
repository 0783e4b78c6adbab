"""What this machine has, and which implementation each operation will use on it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "pyarrow", "flash-attn")
OPS = (
    "masked_mean",
    "segment_mean",
    "contrastive_reward",
    "info_nce",
    "similarity_stats",
    "token_logp",
    "linear_logp",
    "policy_head",
    "policy_loss",
)


def package_versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed version of each package, or "not installed"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The devices that torch can compute on."""
    import torch

    found = {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        found[f"cuda:{index}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"
    return found


def attention_choice() -> str:
    """The attention that packed rows get with attn="auto"."""
    import torch

    if not torch.cuda.is_available():
        return "per-segment SDPA"
    if importlib.util.find_spec("flash_attn"):
        return "flash_attention_2 (float16, bfloat16); per-segment SDPA (float32)"
    return "torch varlen_attn (float16, bfloat16); per-segment SDPA (float32)"


def implementations() -> dict[str, str]:
    """What impl="auto" runs, per op, on this machine's best device."""
    import torch

    kernel = "Triton on CUDA" if torch.cuda.is_available() else "PyTorch on CPU"
    found = {**dict.fromkeys(OPS, kernel), "attention": attention_choice()}
    if not torch.cuda.is_available():
        from tercet.kernels._row_softmax_cpu import INSTRUCTION_SETS

        best = INSTRUCTION_SETS[-1]
        found["token_logp"] = f"compiled rows on CPU ({best}); PyTorch in float64"
    return found


def main(argv: list[str], prog: str) -> int:
    """Prints versions, devices and implementations."""
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: {prog}\n\n{__doc__}\n")
        return 0
    if argv:
        sys.stderr.write(f"{prog}: takes no arguments, got {argv}\n")
        return 2
    import tercet

    compiler = shutil.which("c++") or "none (only needed to install from source)"
    sections = {
        "versions": {"tercet": tercet.__version__, "python": platform.python_version()}
        | package_versions(),
        "devices": devices() | {"C++ compiler": compiler},
        "implementations": implementations() | {"search core": tercet.Forest.__module__},
    }
    for title, rows in sections.items():
        sys.stdout.write(f"{title}\n")
        for name, value in rows.items():
            sys.stdout.write(f"  {name:<20}{value}\n")
    return 0
