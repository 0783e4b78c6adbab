"""Test set-up: Triton's interpreter without a GPU, poisoned empty tensors, no network, seed 0."""

import os
import shutil

HAS_NVIDIA = shutil.which("nvidia-smi") is not None
if not HAS_NVIDIA:  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # pinned: it changes numerics
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import beartype  # noqa: F401
    import jaxtyping
except ModuleNotFoundError:  # on a bare GPU image
    jaxtyping = None
if jaxtyping:  # before anything imports the engine; kernels have functions that Triton rewrites
    jaxtyping.install_import_hook("tercet.engine", "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> None:
    """Arguments of the engine are checked, but for a test that passes wrong ones on purpose."""
    wrong = request.node.get_closest_marker("wrong_types") is not None
    if jaxtyping:
        jaxtyping.config.update("jaxtyping_disable", wrong)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh float tensor with NaN, so that an element a kernel skips shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.is_meta else out

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
