"""What the benches' results become: tables between markers, Liger's columns, plots."""

import csv
import json
import re
import sys

import growth
import liger_csv
import pytest
import table


def line(side, slower=1.0, **changes):
    facts = {
        "op": "linear_logp", "case": "N=8 V=16 float32, fwd+bwd", "side": side, "ms": 10.0 * slower,
        "ms_p20": 9.0, "ms_p80": 12.0, "slower": slower, "extra_mb": 1.048576, "device": "cpu",
        "machine": "a machine", "versions": {"torch": "2.13"}, "commit": "abc", "mode": "fwd+bwd",
        "sizes": {"N": 8, "V": 16, "dtype": "float32"}, "timestamp": "2026-01-01 00:00:00",
        "error": 3e-7, "error_in": "dhidden", "share_of_floor": 0.5,
        "errors": {"logp": 0.0, "dhidden": 3e-7},
    }  # fmt: skip
    return facts | changes


LINES = [
    line("slow", 2.0, error=None),
    line("bound", 0.1, bound=True),
    line("ours"),
    line("fast", 0.5),
    {"op": "linear_logp", "case": "N=8 V=16 float32, fwd+bwd", "side": "a GPU's", "device": "cpu",
     "not_run": "needs CUDA", "machine": "a machine", "versions": {}, "commit": "abc"},
]  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes results files; the tables read them."""
    monkeypatch.setattr(table, "RESULTS", tmp_path)

    def write(name, lines):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))

    return write


def test_tables_hold_ours_then_the_fastest_and_no_side_that_did_not_run(results):
    results("linear_logp", LINES)
    shown = table.block("speed", "linear_logp")
    assert (
        "| N=8 V=16 float32, fwd+bwd | 10.00 ms, 50% of the floor, 1 MB, 3e-7 "
        "| bound 0.10x, 1 MB, 3e-7<br>fast 0.50x, 1 MB, 3e-7<br>slow 2.00x, 1 MB, not finite |"
    ) in shown
    assert "CUDA: not measured." in shown
    assert "bound" not in table.readme_table()
    assert table.block("speed", "token_logp").startswith("CPU: not measured.")


def test_the_readme_shows_few_cases(results):
    results("linear_logp", [*LINES, *(x | {"case": "N=8 V=16 float32, fwd"} for x in LINES)])
    results("policy_head", [line("ours", op="policy_head")])
    shown = table.readme_table()
    assert shown.count("\n| `") == 1  # linear_logp is shown with entropy alone
    assert "`policy_head` N=8 V=16 float32, fwd+bwd" in shown


def test_every_peer_that_is_faster_is_listed_and_only_those(results):
    results("linear_logp", LINES)
    assert re.findall(r"\| (\w+) +\| 0\.50x", table.block("losses", "")) == ["fast"]
    assert "slow" not in table.block("losses", "")
    assert "bound" not in table.block("losses", "")
    results("linear_logp", [line("ours")])
    assert table.block("losses", "") == "Nowhere."


def test_what_was_not_run_is_listed_with_the_reason(results):
    results("linear_logp", LINES)
    assert "| a GPU's | cpu    | needs CUDA | `linear_logp` |" in table.block("not-run", "")


def test_errors_stand_side_by_side(results):
    poisoned = {"errors": {"dhidden": None}, "error": None}
    cases = [line("ours", case="float32 peaked"), line("peer", case="float32 peaked", **poisoned)]
    results("errors", [*cases, line("ours", case="bfloat16 peaked"), *LINES[-1:]])
    shown = [row.split("|")[1:-1] for row in table.block("errors", "linear_logp").splitlines()]
    assert [[cell.strip() for cell in row] for row in shown] == [
        ["logp / dhidden", "ours", "peer"],
        ["-" * 17, "-" * 10, "-" * 16],
        ["float32 peaked", "0 / 3e-7", "- / not finite"],
        ["bfloat16 peaked", "0 / 3e-7", "-"],
    ]


def test_only_what_stands_between_markers_is_rewritten(results):
    results("linear_logp", LINES)
    page = "before\n<!-- losses -->\nold\n<!-- /losses -->\nafter\n<!-- other -->\n"
    new = table.filled(page)
    assert new.startswith("before\n<!-- losses -->\n| case")
    assert new.endswith("\n<!-- /losses -->\nafter\n<!-- other -->\n")
    assert "old" not in new
    assert table.filled(new) == new


def test_liger_columns(results, tmp_path, monkeypatch):
    grown = [line("eager", op="token_logp", x="V", versions={"liger-kernel": "0.8.5"})]
    results("linear_logp", LINES)
    results("growth", grown)
    monkeypatch.setattr(sys, "argv", ["liger_csv.py", "--out", str(tmp_path / "all.csv")])
    liger_csv.main()
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 5
    ours = [row for row in rows if row["kernel_provider"] == "tercet"]
    assert [(row["metric_name"], row["metric_unit"]) for row in ours] == [
        ("speed", "ms"), ("memory", "MB"),
    ]  # fmt: skip
    assert (ours[0]["y_value_20"], ours[0]["y_value_50"]) == ("9.0", "10.0")
    assert ours[1]["y_value_50"] == "1.0"  # MiB
    assert ours[0]["kernel_operation_mode"] == "full"
    assert (ours[0]["x_name"], ours[0]["x_value"]) == ("N", "8")
    config = json.loads(ours[0]["extra_benchmark_config_str"])
    assert config == {"V": 16, "dtype": "float32", "case": "N=8 V=16 float32, fwd+bwd"}
    assert (rows[-1]["x_name"], rows[-1]["x_label"]) == ("V", "vocabulary size")
    assert rows[-1]["liger_version"] == "0.8.5"
    assert ours[0]["liger_version"] == ""


def test_growth_is_drawn_for_every_sweep_of_an_op(tmp_path):
    sweeps = [sweep for sweep in growth.SWEEPS if sweep.op == "linear_logp"]
    lines = [
        line(side, x=sweep.axis, sizes={"N": 8, "V": 16, sweep.axis: value}, ms=value / 100,
             floor_ms=value / 1000, stored_mb=value)
        for sweep in sweeps for value in sweep.values for side in ("ours", "eager")
    ]  # fmt: skip
    file = growth.plot("linear_logp", lines, tmp_path)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size < 200_000


def test_exponent_of_a_power_law():
    x = [1.0, 2.0, 4.0, 8.0]
    assert growth.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
