"""The `tercet` command as a user calls it."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tercet.engine import doctor, files
from tercet.engine.cli import COMMANDS, _unprefixed, main
from tercet.engine.grace import GraceConfig
from tercet.engine.model import Policy

TERCET = str(Path(sys.executable).with_name("tercet"))


def tercet(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TERCET, *args], capture_output=True, text=True, check=False)


def test_help_lists_every_command():
    done = tercet("--help")
    assert done.returncode == 0
    assert all(f"tercet {name}" in done.stdout for name in COMMANDS)
    assert len(done.stdout.splitlines()) <= 25


def test_no_command_is_wrong_usage():
    assert tercet().returncode == 2


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["grace", "trian"]) == 2
    assert "no command 'grace trian'; did you mean 'grace train'?" in capsys.readouterr().err


def test_an_unknown_option_is_named(capsys):
    assert main(["--bogus"]) == 2
    assert "no command '--bogus'" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tercet 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    done = tercet(*name.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.parametrize("name", [name for name in COMMANDS if "grace" in name])
def test_every_option_says_what_it_is(name):
    shown = " ".join(tercet(*name.split(), "--help").stdout.replace("│", " ").split())
    options = re.findall(r" (--[a-z][^(]*)\((?:default|required)", shown)
    spelt = re.compile(r"--[\w.-]+|\{[^}]*\}")
    bare = [option for option in options if not re.search("[a-z]{2}", spelt.sub("", option))]
    assert "default: )" not in shown
    assert "likewise" not in shown
    assert len(options) > 8
    assert bare == []


def test_a_failure_is_one_line_and_exit_status_1(tmp_path):
    done = tercet("report", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"tercet report: {tmp_path}")  # and not "report: " once more
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(
        " must be a run folder or hold some, got no folder; check the path\n"
    )


def test_a_missing_yaml_is_named_once(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    assert main(["grace", "train", "--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"tercet grace train: {path} must be a readable YAML file, got: No such file or directory\n"
    )


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"tercet a b: {files.sha256.__name__}: x", "x"),
        (f"{Policy.__name__}.from_pretrained: x: y", "x: y"),
        (f"{GraceConfig.__name__}: x", "x"),
        ("eval: x", "x"),  # the command, not its function
        (str(OSError(28, "replace_text: x")), "x"),
        *((message, message) for message in ("data.jsonl: x", "mat1: and mat2", "RuntimeError: x")),
    ],
)
def test_a_message_names_no_function_of_ours(message, shown):
    assert _unprefixed(message, "tercet a b") == shown


def test_wrong_usage_is_one_line_and_exit_status_2():
    for args, said in {
        ("grace", "train", "--modle", "x"): "unknown option '--modle'; the nearest known one is",
        ("demo", "grace", "--evidenc"): "the nearest known one is '--evidence'",
        ("report", "runs", "--bogus"): "unrecognized arguments: --bogus",
    }.items():
        done = tercet(*args)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(
            f"tercet {' '.join(args[: 1 if args[0] == 'report' else 2])}: "
        )
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_name_of_the_command_stands_once(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: a\n")
    (tmp_path / "d.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 20)
    argv = ["grace", "experiment", "--data", str(tmp_path / "d.jsonl"), "--num-train", "9"]
    assert main([*argv, "--output-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("tercet grace experiment: output_dir must be new")
    (tmp_path / "c.yaml").write_text("mod: x\n")
    assert main(["grace", "train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"tercet grace train: {tmp_path}")
    assert main(["grace", "train", "--modle", "x"]) == 2
    assert capsys.readouterr().err.count("tercet grace train") == 2  # and in "see ... --help"


@pytest.mark.parametrize("args", [["doctor"], ["--help"], ["grace", "eval", "--help"]])
def test_a_reader_that_goes_away_is_no_failure(args):
    with subprocess.Popen(
        [TERCET, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 141


def test_an_unreachable_hub_warns_once_and_the_error_names_the_model(tmp_path):
    (tmp_path / "t.txt").write_text("the sea\n")
    command = (
        "import sys, huggingface_hub.utils._http as http; http.time.sleep = lambda s: None;"
        "from tercet.engine.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    reach_nothing = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    argv = ["grace", "encode", "--model", "no-one/nothing", "--input", str(tmp_path / "t.txt")]
    done = subprocess.run(
        [sys.executable, "-c", command, *argv, "--output-dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **reach_nothing, "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 1
    *warnings, last = done.stderr.splitlines()
    assert last.startswith("tercet grace encode: no-one/nothing must be a ")
    assert sum("[Retry 1/5]" in line for line in warnings) == 1


def test_only_what_resumes_says_so_after_ctrl_c(monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    resuming = {"demo grace", "grace train", "grace experiment"}
    for name, command in COMMANDS.items():
        monkeypatch.setitem(
            COMMANDS, name, command._replace(target=f"{doctor.__name__}:{stop.__name__}")
        )
        monkeypatch.setattr(doctor, stop.__name__, stop, raising=False)
        assert main(name.split()) == 130
        told = "; the same command goes on from the last checkpoint, if there is one"
        more = told if name in resuming else ""
        assert capsys.readouterr().err == f"\ntercet {name}: stopped{more}\n"


@pytest.fixture
def command(monkeypatch):
    """Lets a function be what `tercet doctor` runs."""

    def runs(function):
        target = f"{doctor.__name__}:{function.__name__}"
        monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(target=target))
        monkeypatch.setattr(doctor, function.__name__, function, raising=False)

    return runs


def test_a_second_sigterm_does_not_end_the_cleaning_up(command, capsys):
    done = []

    def terminated(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)  # `timeout` sends two
            done.append("cleaned")

    command(terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["doctor"]) == 143
    assert done == ["cleaned"]
    assert capsys.readouterr().err == "\ntercet doctor: stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_who_ignores_sigterm_goes_on(command):
    def ignoring(*_):
        signal.raise_signal(signal.SIGTERM)
        return 0

    command(ignoring)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert main(["doctor"]) == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_runs_in_a_thread(tmp_path, capsys):
    found = []
    thread = threading.Thread(target=lambda: found.append(main(["report", str(tmp_path / "none")])))
    thread.start()
    thread.join()
    assert found == [1]
    assert "got no folder" in capsys.readouterr().err


def test_doctor_says_what_each_op_runs():
    done = tercet("doctor")
    assert done.returncode == 0, done.stderr
    for word in ("torch", "triton", "segment_mean", "attention"):
        assert word in done.stdout


@pytest.mark.parametrize(("args", "status"), [(["grace"], 2), (["grace", "--help"], 0)])
def test_a_group_lists_its_commands(args, status, capsys):
    assert main(args) == status
    shown = capsys.readouterr().out
    assert "tercet grace train" in shown
    assert "tercet report" not in shown
