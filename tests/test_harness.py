"""The bench harness measures what it says."""

import json

import harness
import pytest
import torch


def _case(**changes):
    fields = {
        "op": "toy",
        "name": "toy",
        "sides": {"ours": lambda: torch.zeros(10), "peer": lambda: torch.zeros(10)},
        "gate": lambda: None,
        "rounds": 3,
    }
    return harness.Case(**(fields | changes))


def test_extra_bytes_counts_what_dies_and_not_what_is_returned(device):
    def side():
        temporary = torch.ones(1_000_000, device=device)  # 4 MB
        return temporary[:250_000] + 1.0  # 1 MB

    assert harness.extra_bytes(side) == pytest.approx(4e6, rel=0.05)
    assert harness.extra_bytes(lambda: torch.ones(1_000_000, device=device)) < 1e5


def test_a_run_gates_times_and_writes_every_side(tmp_path, capsys):
    out = tmp_path / "results" / "toy.jsonl"
    harness.run(_case(), out=out)
    lines = harness.run(_case(bytes_moved=40, formula="bytes = 40"), out=out)  # in their place
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["side"] for line in written] == ["ours", "peer"]
    assert written[1]["slower"] == written[1]["ms"] / written[0]["ms"]
    assert written[0]["gb_per_s"] == pytest.approx(40 / written[0]["ms"] / 1e6)
    assert written[0]["ms_p20"] <= written[0]["ms"] <= written[0]["ms_p80"]
    assert {"machine", "commit", "versions", "load_1min"} <= lines["ours"].keys()
    assert "toy" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(tmp_path):
    def gate():
        raise AssertionError("ours is wrong")

    with pytest.raises(AssertionError, match="ours is wrong"):
        harness.run(_case(gate=gate), out=tmp_path / "toy.jsonl")
    assert not list(tmp_path.iterdir())
