"""The bench harness measures what it says."""

import itertools
import json
import math
import time
from functools import partial

import accuracy
import harness
import machine
import measure
import peers
import pytest
import torch
from peers import Peer


def _case(**changes):
    fields = {
        "op": "toy",
        "name": "toy",
        "sides": {"ours": lambda: torch.zeros(10), "peer": lambda: torch.zeros(10)},
        "gate": lambda: None,
        "rounds": 3,
    }
    return harness.Case(**(fields | changes))


def _written(out):
    return {line["side"]: line for line in map(json.loads, out.read_text().splitlines())}


def test_extra_bytes_counts_what_dies_and_not_what_is_returned(device):
    def side():
        temporary = torch.ones(1_000_000, device=device)  # 4 MB
        return temporary[:250_000] + 1.0  # 1 MB

    assert harness.extra_bytes(side) == pytest.approx(4e6, rel=0.05)
    assert harness.extra_bytes(lambda: torch.ones(1_000_000, device=device)) < 1e5
    x = torch.ones(10, device=device)
    assert harness.extra_bytes(x.neg_) < 100


def test_a_run_judges_times_and_writes_every_side(tmp_path, capsys):
    out = tmp_path / "results" / "toy.jsonl"
    harness.run(_case(), out=out)
    changes = {"bytes_moved": 40, "formula": "bytes = 40", "sizes": {"N": 10}, "mode": "fwd"}
    lines = harness.run(_case(**changes), out=out)  # in their place
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["side"] for line in written] == ["ours", "peer"]
    assert written[1]["slower"] == written[1]["ms"] / written[0]["ms"]
    assert written[0]["gb_per_s"] == pytest.approx(40 / written[0]["ms"] / 1e6)
    assert written[0]["ms_p20"] <= written[0]["ms"] <= written[0]["ms_p80"]
    assert written[0]["sizes"] == {"N": 10}
    assert {"machine", "commit", "versions", "load_1min", "timestamp"} <= lines["ours"].keys()
    assert "toy" in capsys.readouterr().out


def test_a_measured_case_replaces_all_its_older_lines(tmp_path):
    out = tmp_path / "toy.jsonl"
    harness.run(_case(sides={**_case().sides, "gone": lambda: torch.zeros(10)}), out=out)
    other = {"op": "toy", "case": "toy", "side": "gone", "machine": "another machine"}
    harness.emit(other, out)
    harness.run(_case(), out=out)
    kept = harness.read(out)
    assert [line["side"] for line in kept] == ["gone", "ours", "peer"]
    assert kept[0] == other


def test_cases_that_are_no_longer_benched_leave_the_results(tmp_path):
    out = tmp_path / "toy.jsonl"
    for case, machine_name in (("old", "here"), ("new", "here"), ("old", "there")):
        harness.emit({"op": "toy", "case": case, "side": "ours", "machine": machine_name}, out)
    harness.drop_other_cases([{"op": "toy", "case": "new", "machine": "here"}], out)
    assert [(line["case"], line["machine"]) for line in harness.read(out)] == [
        ("new", "here"), ("old", "there"),
    ]  # fmt: skip


def test_share_of_the_floor_is_the_roof_over_what_was_reached(tmp_path):
    flops = 10**6
    line = harness.run(_case(flops=flops, bytes_moved=8), out=tmp_path / "toy.jsonl")["ours"]
    floor = flops / machine.matmul_gflop_per_s() / 1e6  # 8 bytes take less
    assert line["floor_ms"] == pytest.approx(floor)
    assert line["share_of_floor"] == pytest.approx(
        line["gflop_per_s"] / machine.matmul_gflop_per_s()
    )
    traffic = machine.floor_ms(10**12, flops)
    assert traffic == pytest.approx(10**6 / machine.copy_gb_per_s())


def test_a_wrong_result_is_not_timed(tmp_path):
    def gate():
        raise AssertionError("ours is wrong")

    with pytest.raises(AssertionError, match="ours is wrong"):
        harness.run(_case(gate=gate), out=tmp_path / "toy.jsonl")
    wrong = {"gate": None, "truth": lambda: torch.ones(10), "outputs": ("y",), "limit": 0.5}
    with pytest.raises(AssertionError, match=r"toy toy: error of y is 1\.0e\+00"):
        harness.run(_case(**wrong), out=tmp_path / "toy.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_case_without_gate_and_truth_is_refused():
    with pytest.raises(ValueError, match="needs a gate, or a truth and a limit"):
        _case(gate=None, truth=lambda: torch.ones(10))


def test_error_stands_beside_the_time_of_every_side(tmp_path, capsys):
    truth = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64), torch.eye(2).double()
    sides = {
        "ours": lambda: (truth[0].float(), truth[1].float() + 1e-3),
        "drops an output": lambda: (truth[0].float() + 0.4, None),
        "poisoned": lambda: (truth[0] * math.nan, truth[1]),
        "bound": lambda: torch.zeros(1),
    }
    out = tmp_path / "toy.jsonl"
    harness.run(
        _case(
            sides=sides, gate=None, truth=lambda: truth, outputs=("y", "dx"), limit=1e-2,
            bounds=("bound",),
        ),
        out=out,
    )  # fmt: skip
    lines = _written(out)
    assert lines["ours"]["error"] == pytest.approx(1e-3, rel=1e-3)
    assert lines["ours"]["error_in"] == "dx"
    assert lines["drops an output"]["errors"] == {"y": pytest.approx(0.1)}
    assert lines["poisoned"]["error"] is None
    assert lines["poisoned"]["error_in"] == "y"
    assert "error" not in lines["bound"]
    assert lines["bound"]["bound"] is True
    shown = capsys.readouterr().out
    assert "1.0e-03 in dx" in shown
    assert "not finite in y" in shown


def test_probes_are_judged_in_place_of_the_sides(tmp_path):
    sides = {"ours": lambda: torch.zeros(1000)}
    probes = {"ours": lambda: torch.ones(2)}
    out = tmp_path / "toy.jsonl"
    facts = {"gate": None, "truth": lambda: torch.ones(2), "outputs": ("y",), "limit": 1e-6}
    harness.run(_case(sides=sides, probes=probes, **facts), out=out)
    assert _written(out)["ours"]["error"] == 0.0


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([1.0, 2.2], [1.0, 2.0], 0.1),  # a vector is one row
        ([[1.0, 0.0], [0.0, 1.5e-6]], [[1.0, 0.0], [0.0, 1e-6]], 0.5),  # each row by its own size
        ([[1.0], [1e-9]], [[1.0], [0.0]], 1e-9 / torch.finfo(torch.float32).eps),
        ([[0.0], [0.0]], [[0.0], [0.0]], 0.0),
        ([[1e-30]], [[0.0]], math.inf),
        ([1.0, math.inf], [1.0, 1.0], math.inf),
        (2.0, 1.0, 1.0),
        ([], [], 0.0),
    ],
)
def test_relative_error(got, truth, error):
    found = accuracy.relative_error(torch.tensor(got), torch.tensor(truth, dtype=torch.float64))
    assert found == pytest.approx(error, rel=1e-3)


def test_results_of_another_shape_or_number_are_refused():
    with pytest.raises(ValueError, match="relative_error: the truth is"):
        accuracy.relative_error(torch.ones(2, 1), torch.ones(2))
    with pytest.raises(ValueError, match="zip"):
        accuracy.relative_errors((torch.ones(2),), (torch.ones(2), torch.ones(2)), ("y", "dx"))


def test_peers_that_cannot_run_are_named_with_the_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(peers, "cxx_compiler", lambda: None)
    roster = peers.roster(
        {
            "here": Peer(torch.zeros),
            "a GPU's": Peer(torch.zeros, cuda=True),
            "neither": Peer(torch.zeros, "no-such-package", cuda=True),
            "compiled": Peer(torch.zeros, compile=True),
            "too old": Peer(torch.zeros, missing="needs torch 9"),
        }
    )
    assert list(roster.functions) == ["here"]
    assert roster.not_run == {
        "a GPU's": "needs CUDA",
        "neither": "needs CUDA, no-such-package is not installed",
        "compiled": "needs a C++ compiler",
        "too old": "needs torch 9",
    }
    assert roster.packages == ("torch", "no-such-package")
    assert roster.absent == ()  # with the package it could not run either
    out = tmp_path / "toy.jsonl"
    harness.run(_case(roster=roster), out=out)
    lines = _written(out)
    assert set(lines) == {"ours", "peer", *roster.not_run}
    assert lines["neither"]["not_run"] == "needs CUDA, no-such-package is not installed"
    assert "no-such-package" not in lines["ours"]["versions"]
    shown = capsys.readouterr().out
    assert "not run: needs a C++ compiler" in shown


def test_what_peers_lack_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: "2.0" if package == "torch" else None)
    found = peers.roster(
        {"ours": Peer(torch.zeros), "a": Peer(torch.zeros, "trl"), "b": Peer(torch.ones, "trl")}
    )
    assert found.absent == ("trl",)
    assert peers.remedy([]) == ""
    assert peers.remedy(["trl", "liger-kernel", "trl"]) == (
        "not installed: liger-kernel, trl; pip install -e '.[bench]'"
    )
    assert peers.remedy(["other"]) == "not installed: other; pip install other"
    assert peers.remedy(["trl", "other"]) == (
        "not installed: other, trl; pip install -e '.[bench]' and pip install other"
    )


def test_a_bench_ends_with_what_its_columns_mean_and_where_it_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs" / "toy.jsonl"
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(out)])
    lacking = peers.Roster({}, {"peer": "trl is not installed"}, (), (), ("trl",))
    harness.main({"toy": lambda: _case(roster=lacking)})
    *shown, lack, last = capsys.readouterr().out.splitlines()
    assert last == "wrote runs/toy.jsonl"
    assert lack == "not installed: trl; pip install -e '.[bench]'"
    assert out.exists()
    hot = harness.DEVICE.type == "cuda"
    for column in ("p20-p80", "x ours", "of floor", "extra MB", "largest error"):
        assert sum(column in line for line in shown) == 2  # in the table's head and explained
    assert ("hot ms" in "".join(shown)) == hot
    monkeypatch.chdir(tmp_path / "runs")
    assert harness.wrote(tmp_path / "a.jsonl", out) == f"wrote {tmp_path / 'a.jsonl'}, toy.jsonl"


@pytest.mark.parametrize(("load", "warned"), [(2.0, False), (2.1, True)])
def test_a_bench_warns_of_a_busy_machine_and_says_how_long_it_will_take(
    load, warned, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path / "toy.jsonl")])
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    ours = {"op": "toy", "case": "toy", "machine": "here"}
    monkeypatch.setattr(harness, "run", lambda case, out: {"ours": ours})
    clock = iter([0.0, 10.0, 16.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    harness.main(dict.fromkeys("abc", _case))
    shown = capsys.readouterr().out
    assert [line.strip() for line in shown.splitlines() if " cases in " in line] == [
        "1 of 3 cases in 10 s; about 20 s left",
        "2 of 3 cases in 16 s; about 8 s left",
        "3 of 3 cases in 21 s; about 0 s left",
    ]
    assert shown.startswith(f"warning: load {load} on 2 cores") == warned


def test_sides_and_rounds_may_be_left_out_and_are_named(tmp_path, capsys, monkeypatch):
    out = tmp_path / "toy.jsonl"
    arguments = ["toy.py", "--out", str(out), "--rounds", "2", "--skip", "slow", "no such side"]
    monkeypatch.setattr("sys.argv", arguments)
    sides = dict.fromkeys(("ours", "slow", "other"), lambda: torch.zeros(10))
    harness.main({"toy": lambda: _case(sides=sides)})
    lines = _written(out)
    assert lines["ours"]["rounds"] == lines["other"]["rounds"] == 2
    assert lines["slow"]["not_run"] == "left out by --skip"
    with pytest.raises(ValueError, match="ours is what the others are compared with"):
        harness.without(_case(), ["ours"])


def test_a_bench_that_is_stopped_says_so_in_a_line(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["toy.py"])
    with pytest.raises(SystemExit, match=r"^stopped; the cases that ran are written$"):
        harness.main({"toy": interrupted})


def test_every_round_has_an_order_of_its_own():
    turns = []
    sides = {name: partial(turns.append, name) for name in ("ours", "a", "b", "c")}
    measure.time_sides(_case(sides=sides, rounds=9), dict.fromkeys(sides, 0.0))
    hot = 1 + (harness.DEVICE.type == "cuda")
    rounds = [tuple(turns[i : i + 4 * hot : hot]) for i in range(0, len(turns), 4 * hot)]
    assert len(rounds) == 9
    assert all(sorted(turn) == ["a", "b", "c", "ours"] for turn in rounds)
    assert len(set(rounds)) > 3


def test_a_bench_names_its_cases_and_runs_none(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy.py", "--list"])
    harness.main({"one": _case, "the other": _case})
    assert capsys.readouterr().out == "one\nthe other\n"


def test_a_case_that_is_none_is_told_with_those_that_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["toy", "none", "one"])
    with pytest.raises(SystemExit) as stop:
        harness.main({"one": _case, "other": _case})
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith("error: case must be one of one, other; got none\n")
    assert "[]" not in said


def test_compilation_is_reported_apart_and_not_in_the_median(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(harness, "forget_compiled_code", lambda: None)
    roster = peers.roster({"torch.compile": Peer(compiles_once(0.2), compile=True)})
    sides = {"ours": lambda: torch.zeros(10), **roster.functions}
    line = harness.run(_case(sides=sides, roster=roster), out=tmp_path / "toy.jsonl")
    assert line["torch.compile"]["compile_s"] == pytest.approx(0.2, rel=0.3)
    assert line["torch.compile"]["ms"] < 50
    assert "compile_s" not in line["ours"]


def test_a_peer_that_fails_is_reported_and_ours_is_not_excused(tmp_path):
    def out_of_memory():
        raise torch.OutOfMemoryError("no room for the logits\nand a long story")

    truth = {"gate": None, "truth": lambda: torch.zeros(10), "outputs": ("y",), "limit": 1.0}
    sides = {"ours": lambda: torch.zeros(10), "peer": out_of_memory}
    for name, facts in (("judged", truth), ("warmed up", {}), ("probed", {**truth, "probes": {}})):
        out = tmp_path / f"{name}.jsonl"
        harness.run(_case(sides=sides, **facts), out=out)
        failure = _written(out)["peer"]["not_run"]
        assert failure == "failed: OutOfMemoryError: no room for the logits"
    with pytest.raises(torch.OutOfMemoryError):
        harness.run(_case(sides={"ours": out_of_memory}), out=tmp_path / "toy.jsonl")


def compiles_once(seconds):
    todo = [seconds]

    def call():
        if todo:
            time.sleep(todo.pop())
        return torch.zeros(10)

    return call


def test_a_slow_side_runs_fewer_rounds_spread_over_the_run(monkeypatch):
    order = []

    def side(name, ms):
        def call():
            order.append(name)
            return ms

        return call

    monkeypatch.setattr(measure, "time_once", lambda call, cold=True: float(call()))
    sides = {"ours": side("ours", 1), "slow": side("slow", measure.SIDE_BUDGET_MS / 4)}
    found = measure.time_sides(_case(sides=sides, rounds=12), {})
    assert found["ours"]["rounds"] == 12
    assert found["slow"]["rounds"] == 4
    turns = [i for i, name in enumerate(order) if name == "slow"]
    assert max(b - a for a, b in itertools.pairwise(turns)) <= 5
    assert turns[-1] > 8
