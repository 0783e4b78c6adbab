"""Proof that the tests of kernels, engine and search core notice every broken line.

    python tests/mutation.py [--only masked_mean ...] [--item 9] [--list]

tests/mutations/<op>.toml lists small edits: [old text, new text, ..., number], where the number,
if any, is the item of tests/kernels/REGRESSIONS.md whose fix the edit removes.  Each edit is
applied to a copy of the tree, where its test files must then fail.  Exit status 1: an edit
survived, an old text does not occur exactly once, or the tests fail without any edit.
"""

import argparse
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import tercet._mcts  # pyright: ignore[reportMissingModuleSource]

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "engine", "bindings", "bench", "csrc", "tests")
TIMEOUT_S = 900
FAILED = 1  # exit status of pytest and of our C++ runs; higher ones say that nothing was tested


class Mutation(NamedTuple):
    op: str  # name of the table
    path: str
    tests: tuple[str, ...]
    edits: tuple[tuple[str, str], ...]
    item: int  # of REGRESSIONS.md; 0: none

    def edited(self, source: Path) -> str:
        """Text of the file under the edit; raises ValueError where an old text is not unique."""
        text = (source / self.path).read_text()
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(f"{self.path}: {old!r} occurs {text.count(old)} times, not once")
            text = text.replace(old, new)
        return text

    def __str__(self) -> str:
        old, new = self.edits[0]
        item = f" (item {self.item})" if self.item else ""
        return f"{self.path}{item}: {' '.join(old.split())}  ->  {' '.join(new.split())}"


def load(only: list[str], item: int) -> list[Mutation]:
    found = []
    for table in sorted((ROOT / "tests" / "mutations").glob("*.toml")):
        for file in tomllib.loads(table.read_text())["file"]:
            for *texts, last in file["mutations"]:
                number = last if isinstance(last, int) else 0
                texts = texts if number else [*texts, last]
                edits = tuple(zip(texts[::2], texts[1::2], strict=True))
                found.append(
                    Mutation(table.stem, file["path"], tuple(file["tests"]), edits, number)
                )
    return [m for m in found if (not only or m.op in only) and (not item or m.item == item)]


def copy_tree(tree: Path) -> None:
    """A tree whose tests import its own `tercet` instead of the installed one."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    package = tree / "path" / "tercet"
    shutil.copytree(ROOT / "bindings" / "tercet", package)
    for name in ("kernels", "engine"):
        (package / name).symlink_to(tree / name)
    for extension in Path(tercet._mcts.__file__).parent.glob("*.so"):
        shutil.copy(extension, package)
    for finder in sys.meta_path:  # an editable install finds `tercet` by a hook of its own
        if "tercet" in type(finder).__module__:
            (package.parent / f"{type(finder).__module__}.py").touch()


class Worker:
    """A tree, and a process that runs Python tests in it; see forked_pytest.py."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        copy_tree(tree)
        self._server: subprocess.Popen[str] | None = None

    def run(self, tests: tuple[str, ...]) -> tuple[int, str]:
        """Exit status and output of pytest, or of the C++ tests where `tests` names a C++ file."""
        if tests[0].endswith(".cpp"):
            return self._run_cpp([Path(test).stem for test in tests])
        output = self.tree / "output"
        call = {"tree": str(self.tree), "tests": tests, "output": str(output)}
        server = self._started()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(call | {"timeout_s": TIMEOUT_S}) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline()), output.read_text()

    def close(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.wait()

    def _run_cpp(self, names: list[str]) -> tuple[int, str]:
        script = CXX_TESTS.format(targets=" ".join(names), pattern="|".join(names))
        try:
            done = subprocess.run(
                ["nice", "-n", "10", "sh", "-c", script], cwd=self.tree, timeout=TIMEOUT_S,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return FAILED, "FAILED timeout"
        return done.returncode, done.stdout

    def _started(self) -> "subprocess.Popen[str]":
        if self._server is None:
            program = str(ROOT / "tests" / "forked_pytest.py")
            environment = os.environ | {
                "PYTHONDONTWRITEBYTECODE": "1",  # a stale .pyc would undo an equally long edit
                "OMP_NUM_THREADS": "1",
            }
            self._server = subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-P", program], env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        return self._server


CXX_TESTS = """
cmake -S csrc -B build -DTERCET_BUILD_TESTS=ON -DTERCET_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug &&
cmake --build build --target {targets} || exit 2
ctest --test-dir build --tests-regex '^({pattern})$' --output-on-failure --stop-on-failure || exit 1
"""


def judge(mutation: Mutation, source: Path, workers: "queue.Queue[Worker]") -> bool:
    """Whether the tests fail under the mutation; prints one line."""
    worker, start = workers.get(), time.monotonic()
    try:
        (worker.tree / mutation.path).write_text(mutation.edited(source))
        status, output = worker.run(mutation.tests)
    finally:
        shutil.copy(source / mutation.path, worker.tree / mutation.path)
        workers.put(worker)
    caught = status == FAILED or status < 0  # a crash is noticed, too
    verdict = "killed" if caught else "INVALID" if status else "SURVIVED"
    by = re.search(r"^(?:FAILED|ERROR) (?:\S+?::)?(.*?)(?: - .*)?$", output, re.M)
    killer = by[1] if by else f"status {status}" if caught else ""
    seconds = time.monotonic() - start
    print(f"{verdict:8} {seconds:5.0f} s  {mutation}  {killer}", flush=True)
    if verdict == "INVALID":
        print(output[-2000:], flush=True)
    return caught


def out_of_date(mutations: list[Mutation], source: Path) -> list[str]:
    found = []
    for mutation in mutations:
        try:
            mutation.edited(source)
        except ValueError as error:
            found.append(str(error))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="OP", help="these tables alone")
    parser.add_argument("--item", type=int, default=0, help="of REGRESSIONS.md, alone")
    parser.add_argument(
        "--match", nargs="+", default=[""], metavar="TEXT", help="lines of --list that hold one"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="check the tables, run nothing")
    args = parser.parse_args()
    mutations = [
        m for m in load(args.only, args.item) if any(text in str(m) for text in args.match)
    ]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        source = Path(scratch) / "source"
        copy_tree(source)
        if stale := out_of_date(mutations, source):  # an error before all else
            sys.exit("\n".join(stale))
        if args.list:
            print(*mutations, f"{len(mutations)} mutations", sep="\n")
            return
        copies = [Worker(Path(scratch) / str(number)) for number in range(args.jobs)]
        workers: queue.Queue[Worker] = queue.Queue()
        for worker in copies:
            stack.callback(worker.close)
            workers.put(worker)
        for tests in sorted({m.tests for m in mutations}):
            status, output = copies[0].run(tests)
            if status:
                sys.exit(f"{' '.join(tests)} fail without a mutation:\n{output[-4000:]}")
            print(f"green    {' '.join(tests)}", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            killed = list(pool.map(lambda mutation: judge(mutation, source, workers), mutations))
    print(f"{sum(killed)} of {len(killed)} killed")
    sys.exit(0 if all(killed) else 1)


if __name__ == "__main__":
    main()
