"""Runs pytest many times from one process that has imported torch: each run is a fork of it.

Reads lines of JSON: "tree" (a copy of the repository, see mutation.py), "tests" (arguments for
pytest), "output" (a file for what it prints) and "timeout_s".  Answers each with an exit status,
below 0 where a signal ended the run.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

if shutil.which("nvidia-smi") is None:  # as conftest.py does, and before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

# Imported here once: this, and not the tests, takes the time.
import beartype  # noqa: F401
import jaxtyping  # noqa: F401
import pytest
import torch
import transformers.models.llama
import transformers.models.qwen2
import transformers.models.qwen3  # noqa: F401


class SlowLast:
    """Tests in Triton's interpreter come after the others, which notice most breaks sooner."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: "triton" in item.name)


def run(tree: str, tests: list[str], output: str, timeout_s: int) -> None:
    """Ends this process, a child, with the exit status of pytest in the tree."""
    signal.alarm(timeout_s)  # whose default is to end the process
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.chdir(tree)
    path = str(Path(tree) / "path")
    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = path  # of processes that tests start
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    options = ["-x", "-q", "-p", "no:cacheprovider", *quiet, *tests]
    sys.exit(int(pytest.main(options, plugins=[SlowLast()])))


def main() -> None:
    torch.set_num_threads(1)  # a fork has no threads but the one
    sys.meta_path[:] = [f for f in sys.meta_path if "tercet" not in type(f).__module__]
    answers = os.dup(sys.stdout.fileno())
    fork = multiprocessing.get_context("fork")
    for line in sys.stdin:
        child = fork.Process(target=run, kwargs=json.loads(line))
        child.start()
        child.join()
        os.write(answers, f"{child.exitcode}\n".encode())


if __name__ == "__main__":
    main()
