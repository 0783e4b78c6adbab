"""`tercet bench` runs what lies in the checkout's bench folder, and says when there is none."""

import json
from pathlib import Path

import pytest

from tercet.engine import bench
from tercet.engine.cli import main

ECHO = """import json, os, sys
from pathlib import Path
import harness
given = {"argv": sys.argv[1:], "path": sys.path[0], "cwd": os.getcwd()}
Path(sys.argv[-1]).write_text(json.dumps(given))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "bench"
    path.mkdir()
    (path / "harness.py").touch()
    monkeypatch.setattr(bench, "FOLDER", path)
    return path


def test_every_script_is_there_and_every_bench_is_listed():
    assert (bench.FOLDER / "harness.py").exists()
    for name in bench.SCRIPTS:
        assert (bench.FOLDER / f"{name}.py").exists(), name
    benches = {
        path.stem for path in bench.FOLDER.glob("*.py") if "harness.main(CASES)" in path.read_text()
    }
    assert benches - {"harness"} <= set(bench.SCRIPTS)


def test_a_bench_runs_with_its_own_folder_first_on_the_import_path(folder, tmp_path, monkeypatch):
    (folder / "token_logp.py").write_text(ECHO)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "token_logp", "--case", "a", "b", "--out", "given.json"]) == 0
    given = json.loads((tmp_path / "given.json").read_text())
    assert given["argv"] == ["a", "b", "--out", str(tmp_path / "given.json")]
    assert Path(given["path"]) == folder
    assert given["cwd"] == str(tmp_path)


def test_without_a_name_every_op_runs_and_failures_are_named(folder, capfd):
    for op in bench.OPS:
        (folder / f"{op}.py").write_text(f"print('ran {op}', flush=True)")
    (folder / "linear_logp.py").write_text("raise SystemExit(1)")
    assert main(["bench"]) == 1
    shown = capfd.readouterr()
    assert {line for line in shown.out.splitlines() if line.startswith("ran ")} == {
        f"ran {op}" for op in bench.OPS if op != "linear_logp"
    }
    assert shown.err.splitlines()[-1] == "tercet bench: failed: linear_logp"
    left_out = "left out, unless they are named: packed_forward, grace_step, errors, growth"
    assert shown.out.splitlines()[-1] == left_out
    assert main(["bench", "token_logp"]) == 0
    assert "left out" not in capfd.readouterr().out


def test_a_case_that_a_bench_does_not_know_is_wrong_usage(folder):
    (folder / "token_logp.py").write_text("raise SystemExit(2)")
    assert main(["bench", "token_logp", "--case", "none"]) == 2


def test_cases_are_named_by_the_benches_themselves(folder, capfd):
    for op in ("token_logp", "linear_logp"):
        (folder / f"{op}.py").write_text("import sys\nprint(sys.argv[-1])")
    assert main(["bench", "token_logp", "linear_logp", "--list"]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "cases of token_logp:", "--list", "cases of linear_logp:", "--list"
    ]  # fmt: skip


def test_results_go_to_the_current_folder_and_not_into_the_checkout(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for op in ("token_logp", "growth"):
        script = "import sys\nfrom pathlib import Path\n"
        script += "Path('said').write_text(' '.join(sys.argv[1:]))"
        (folder / f"{op}.py").write_text(script)
        assert main(["bench", op]) == 0
        results = tmp_path / "runs" / "bench"
        images = f" --images {results}" if op == "growth" else ""
        assert Path("said").read_text() == f"--out {results / op}.jsonl{images}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_op"], "op must be one of masked_mean, "),
        (["--case", "a"], "--case belongs to one op, got 0"),
        (["linear_logp", "token_logp", "--case", "a"], "--case belongs to one op, got 2"),
        (["token_logp", "growth", "--list"], "a bench that has cases, got growth"),
    ],
)
def test_wrong_usage(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wheel_says_where_the_benches_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "FOLDER", tmp_path / "bench")
    assert main(["bench", "token_logp"]) == 1
    assert "must lie in a source checkout" in capsys.readouterr().err
