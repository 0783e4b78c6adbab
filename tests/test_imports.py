"""Which part may import which, and how much an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SYSTEMS = {"grace", "think_rm", "grounded_prm"}
KERNELS_MAY = {"tercet.kernels", "tercet._rows", "torch", "triton", "numpy", "jaxtyping"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
    return names


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_kernels_import_only_torch_triton_numpy_and_their_compiled_rows():
    for path in (ROOT / "kernels").rglob("*.py"):
        for name in imports(path):
            allowed = name.split(".")[0] in sys.stdlib_module_names or any(
                under(name, package) for package in KERNELS_MAY
            )
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_the_engine_imports_no_system_except_the_front_ends():
    front_ends = {"cli.py"}
    for path in (ROOT / "engine").glob("*.py"):
        if path.name not in front_ends:
            for name in imports(path):
                part = name.removeprefix("tercet.engine.").split(".")[0]
                assert part not in SYSTEMS | {"demo"}, f"{path.name} imports {name}"


def test_systems_do_not_import_each_other():
    for system in SYSTEMS:
        for path in (ROOT / "engine" / system).rglob("*.py"):
            for name in imports(path):
                for other in SYSTEMS - {system} | {"demo"}:
                    assert not under(name, f"tercet.engine.{other}"), f"{path} imports {name}"


def test_nothing_installed_imports_tests_or_bench():
    for top in ("kernels", "engine", "bindings"):
        for path in (ROOT / top).rglob("*.py"):
            assert not {n.split(".")[0] for n in imports(path)} & {"tests", "bench"}, path


def fresh_python(code: str, *argv: str) -> str:
    """Runs code in a new interpreter that does not see the working directory."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *argv],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_top_level_package_shadows_a_stranger():
    """`kernels` and `engine` exist only as tercet.kernels and tercet.engine."""
    find = "import importlib.util as u; "
    assert fresh_python(find + "print([n for n in ('engine', 'bench') if u.find_spec(n)])") == "[]"
    origin = find + "s = u.find_spec('kernels'); print(s.origin if s else '')"
    assert str(ROOT) not in fresh_python(origin)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tercet", {"torch", "triton", "transformers"}),
        ("import tercet.engine.cli", {"torch", "triton", "transformers"}),
        ("import tercet.kernels", {"transformers", "datasets"}),
        ("import tercet.engine.integrations.treequest", {"torch", "treequest"}),
        ("import tercet.engine.integrations.llm_reasoners", {"torch", "reasoners"}),
        ("from tercet.engine.grace import GraceConfig", {"torch", "transformers", "datasets"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement, absent):
    loaded = fresh_python(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert not absent & set(loaded)


@pytest.mark.parametrize(
    "line",
    [
        "grace train --help",
        "grace train --model m --data.path nowhere.jsonl",
        "grace train --model ./nowhere --data.path bench/results/errors.jsonl",
        "grace train --model m --data.path a.jsonl --data.test-fraction 2",
        "grace encode --model m --input nowhere.txt --output-dir nowhere",
        "grace encode --model ./nowhere --input engine/demo/topics.txt --output-dir nowhere",
        "grace eval --help",
        "grace eval --model ./nowhere",
        "tree nowhere.forest",
        "grace experiment --help",
        "grace experiment --data nowhere.jsonl",
        "demo grace --max-steps 0",
    ],
)
def test_wrong_usage_is_told_before_torch_is_loaded(line):
    code = "import sys; from tercet.engine.cli import main\ntry: main(sys.argv[1:])\n"
    code += "except SystemExit: pass\nprint(*sys.modules)"
    loaded = fresh_python(code, *line.split()).splitlines()[-1].split()
    assert "tercet.engine.command_line" in loaded
    assert not {"torch", "transformers"} & set(loaded)


def test_the_kernels_and_the_policy_run_without_the_rest():
    """A GPU image may hold torch, triton, transformers, numpy and safetensors, and no more."""
    blocked = [
        "jaxtyping",
        "datasets",
        "tyro",
        "pydantic",
        "rich",
        "matplotlib",
        "tensorboard",
    ]
    fresh_python(
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import tercet.kernels, tercet.engine.model, tercet.engine.sampler, tercet.engine.records"
    )


def test_type_checkers_see_an_editable_install():
    typing = ROOT / "build" / "typing" / "tercet"
    if not typing.exists():
        pytest.fail("build/typing is missing; install with `pip install --no-build-isolation -e .`")
    for name in (
        "kernels",
        "engine",
        "_mcts.pyi",
        "_rows.pyi",
        "_search.py",
        "__init__.py",
        "py.typed",
    ):
        assert (typing / name).exists(), f"{name} is not linked into build/typing"
