"""The GRACE demo: files, figures, going on after a stop, and (slow) that it learns."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tercet.engine.cli import main
from tercet.engine.config import read_yaml
from tercet.engine.demo import evidence
from tercet.engine.demo.config import MAX_COMPLETION_LENGTH, GraceDemoConfig, PretrainConfig
from tercet.engine.demo.evidence import markdown, run_evidence
from tercet.engine.demo.grace import MAX_PROMPT_LENGTH, _claim, run_demo
from tercet.engine.demo.results import MODELS, read_results
from tercet.engine.demo.show import LABELS
from tercet.engine.demo.tiny import MAX_LENGTH
from tercet.engine.demo.world import World
from tercet.engine.files import read_jsonl
from tercet.engine.glossary import general
from tercet.engine.grace.config import GraceConfig


def smoke(folder) -> GraceDemoConfig:
    return GraceDemoConfig(
        output_dir=str(folder),
        max_steps=2,
        groups_per_step=4,
        num_generations=2,
        logging_steps=1,
        eval_repeats=1,
        pretrain=PretrainConfig(accuracy=0.02, noisy_steps=2),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny demo, run once: its config, what it printed, its results."""
    config = smoke(tmp_path_factory.mktemp("runs") / "seed-0")
    out = io.StringIO()
    results = run_demo(config, console=Console(file=out, width=80))
    return config, out.getvalue(), results


def test_folder_holds_runs_results_and_report(finished):
    config, _, results = finished
    folder = Path(config.output_dir)
    for form in ("paper", "document"):
        settings = read_yaml(folder / form / "config.yaml", GraceConfig)
        assert settings.reward.form == form
        assert (folder / form / "checkpoint-2" / "model.safetensors").exists()
        assert len((folder / form / "metrics.jsonl").read_text().splitlines()) == 3  # 0, 1, 2
    assert (folder / "infonce" / "checkpoint-2" / "model.safetensors").exists()
    found = [row.get("eval/recall@1") for row in read_jsonl(folder / "infonce" / "metrics.jsonl")]
    assert len(found) == 3
    assert None not in found
    assert (folder / "base" / "tokenizer.json").exists()
    page = (folder / "report.html").read_text()
    for reading in results.readings:
        run = reading.model if (folder / reading.model / "metrics.jsonl").exists() else ""
        row = f"<td>{LABELS[reading.model]}</td><td>{run}</td>"
        assert f'{row}<td class="n">{reading.topic_hit_at_1:.3f}</td>' in page
    assert all(sample.text in page for sample in results.samples)
    rows = [row for path in folder.glob("*/metrics.jsonl") for row in read_jsonl(path)]
    assert not [key for row in rows for key in row if key != "step" and not general(key)]
    assert read_results(folder / "results.json") == results
    assert set(results.seconds) == {
        "pretrain", "paper", "document", "infonce", "evaluate", "report", "total"
    }  # fmt: skip


@pytest.mark.parametrize("model", ["paper", "infonce"])
def test_its_checkpoints_are_measured_as_their_runs_did(finished, tmp_path, capsys, model):
    folder, output = Path(finished[0].output_dir) / model, tmp_path / "figures.json"
    argv = ["grace", "eval", "--model", str(folder / "checkpoint-2"), "--output", str(output)]
    assert main(argv) == 0
    found = json.loads(output.read_text())
    trained = {k: v for k, v in read_jsonl(folder / "metrics.jsonl")[-1].items() if "eval/" in k}
    assert (found["rows"], found["rows_trained_on"]) == (40, 0)
    alone = "the run trained no rationales, so the texts alone are measured" in (
        capsys.readouterr().err
    )
    assert alone == (model == "infonce") == ("rationale" not in found)
    assert {**found.get("rationale", found["no_rationale"]), **trained} == pytest.approx(
        found.get("rationale", found["no_rationale"]), rel=1e-5
    )
    if alone:
        assert main([*argv, "--max-completion-length", "3"]) == 0
        assert json.loads(output.read_text())["rationale"]["eval/mean_length"] <= 3


def test_every_model_is_measured(finished):
    _, _, results = finished
    assert tuple(reading.model for reading in results.readings) == MODELS
    for reading in results.readings:
        assert 0 <= reading.topic_hit_at_1 <= 1
        assert -1 <= reading.mean_cosine <= 1
        written = [reading.names_topic, reading.distinct, reading.truncated]
        if reading.model in ("base", "infonce"):
            assert written == [None] * 3
            assert reading.topic_hit_at_1_greedy is None
        else:
            assert all(value is not None and 0 <= value <= 1 for value in written)
    world = World(seed=0)
    for sample in results.samples:
        assert sample.text in [t.text for t in world.held_out()]
        assert sample.base
        assert sample.document


def test_the_tables_fit_80_columns_and_name_the_folder(finished):
    config, printed, _ = finished
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if "200 held-out queries" in line)
    table = lines[start : start + 12]
    assert all(len(line) <= 80 for line in table)
    for label in ("base + reasoning", "GRACE, paper form", "GRACE, repaired form", "InfoNCE"):
        assert sum(label in line for line in table) == 1
    assert f"{config.output_dir}/report.html" in lines[-1]


def test_a_finished_demo_is_shown_again_and_not_run(finished):
    config, _, results = finished
    out = io.StringIO()
    assert run_demo(config, console=Console(file=out, width=80)) == results
    assert f"{config.output_dir} holds this demo, finished: showing it again (delete the" in (
        out.getvalue()
    )
    assert "topic named right" not in out.getvalue()


def test_a_folder_with_another_demo_is_refused(finished, tmp_path):
    config, _, _ = finished
    with pytest.raises(
        FileExistsError, match=r"got one with other settings in .* \(max_steps 2 -> 3\);"
    ):
        run_demo(replace(config, max_steps=3))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="got other files"):
        run_demo(smoke(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_kill_left_half_written_is_no_other_file(tmp_path):
    (tmp_path / "demo.yaml.tmp").write_text("output_d")
    _claim(tmp_path, smoke(tmp_path))
    assert "max_steps: 2" in (tmp_path / "demo.yaml").read_text()


def test_a_stopped_demo_goes_on_and_ends_the_same(finished, tmp_path):
    config, _, whole = finished
    mine = replace(config, output_dir=str(tmp_path / "demo"))

    class Interrupted(io.StringIO):
        """A terminal at which somebody presses Ctrl-C when the fourth stage begins."""

        def write(self, text: str) -> int:
            if "4  InfoNCE" in text:
                raise KeyboardInterrupt
            return super().write(text)

    first = Interrupted()
    console = Console(file=first)
    with pytest.raises(KeyboardInterrupt):
        run_demo(mine, console=console)
    base = tmp_path / "demo" / "base" / "model.safetensors"
    written = base.stat().st_mtime_ns
    out = io.StringIO()
    results = run_demo(mine, console=Console(file=out))
    assert base.stat().st_mtime_ns == written
    assert "unfinished" not in first.getvalue()
    assert "holds this demo, unfinished: going on with what is there (delete the folder" in (
        out.getvalue()
    )
    kept = re.findall(r"(\S+) is there from before: kept", out.getvalue())
    assert kept == [
        str(tmp_path / "demo" / name)
        for name in ("base/pretrain.json", "paper/checkpoint-2", "document/checkpoint-2")
    ]
    assert "topic named right" not in out.getvalue()
    assert results.readings == whole.readings  # seeded: two folders, the same figures
    assert results.samples == whole.samples


def test_evidence_keeps_lines_per_seed_and_model(finished, tmp_path):
    config, _, _ = finished
    runs = Path(config.output_dir).parent  # seed-0 is already there, and is shown again
    mine = replace(config, output_dir=str(runs))
    path = tmp_path / "bench" / "demo.jsonl"
    console = Console(file=io.StringIO())
    table = run_evidence(mine, seeds=(0,), results=path, console=console)
    run_evidence(mine, seeds=(0,), results=path, console=console)  # replaces its own lines
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert tuple(line["side"] for line in lines) == MODELS
    assert {line["case"] for line in lines} == {"seed 0"}
    assert all(line["machine"] and line["versions"]["torch"] for line in lines)
    assert (runs / "evidence.md").read_text() == table + "\n"
    with pytest.raises(ValueError, match="at least one seed, got none"):
        run_evidence(mine, seeds=(), results=path)


def test_evidence_lies_where_the_repository_keeps_it_only_there(finished, tmp_path, monkeypatch):
    runs = Path(finished[0].output_dir).parent
    mine = replace(finished[0], output_dir=str(runs))
    kept = tmp_path / "bench" / "results" / "demo_grace.jsonl"
    kept.parent.mkdir(parents=True)
    kept.touch()
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    run_evidence(mine, seeds=(0,), console=Console(file=out, width=80))
    assert kept.read_text() == ""
    assert len(read_jsonl(runs / "demo_grace.jsonl")) == len(MODELS)
    assert f"wrote {runs / 'demo_grace.jsonl'} and {runs}/evidence.md" in out.getvalue()
    monkeypatch.setattr(evidence, "CHECKOUT", tmp_path)
    run_evidence(mine, seeds=(0,), console=Console(file=out))
    assert len(read_jsonl(kept)) == len(MODELS)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda d: d["readings"][0].pop("topic_hit_at_1"), r"version \(results: readings"),
        (lambda d: d["samples"][0].update(text=3), r"version \(results: samples\.0\.text"),
        (lambda d: d.update(readings=[]), "readings of no model"),
        (lambda d: d["readings"].pop(), "readings of base, base_reasoning, paper, document"),
        (lambda d: d["readings"][0].update(model="x"), "readings of x, base_reasoning, paper"),
        (lambda d: d["seconds"].clear(), r"no seconds\.total"),
    ],
)
def test_results_that_are_none_of_ours_are_told(finished, tmp_path, capsys, change, got):
    shutil.copytree(finished[0].output_dir, tmp_path / "demo")
    path = tmp_path / "demo" / "results.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    settings = tmp_path / "demo" / "demo.yaml"
    settings.write_text(settings.read_text().replace(finished[0].output_dir, str(path.parent)))
    assert main(["demo", "grace", "--config", str(settings)]) == 1
    said = capsys.readouterr().err
    assert re.search(f"^tercet demo grace: {path} must be what .*, got .*{got}.*; delete it", said)


@pytest.mark.parametrize(("text", "got"), [('{"folder": "a",', "Expecting"), ("[]", "list")])
def test_results_cut_in_half_are_named_and_can_be_deleted(tmp_path, text, got):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} must be a JSON object, got {got}.*; delete it"):
        read_results(path)


def test_markdown_gives_mean_and_range(finished):
    _, _, results = finished
    readings = [replace(r, topic_hit_at_1=r.topic_hit_at_1 + 0.25) for r in results.readings]
    facts = results.environment | {"commit": "0123456789abcdef+changes"}
    results = replace(results, environment=facts)
    other = replace(results, seed=1, readings=readings)
    low = results.reading("document").topic_hit_at_1
    table = markdown([results, other])
    assert "commit 0123456+changes." in table
    row = next(line for line in table.splitlines() if "repaired" in line)
    assert f"{low + 0.125:.3f} ({low:.3f}-{low + 0.25:.3f})" in row


BAD_SETTINGS = {
    "max_steps must be >= 1, got 0": {"max_steps": 0},
    "num_generations must be >= 2, got 1": {"num_generations": 1},
    "groups_per_step must be >= 2, got 1": {"groups_per_step": 1},
    r"learning_rate must be in \[0, 1e30\], got nan": {"learning_rate": float("nan")},
    r"learning_rate must be in \[0, 1e30\], got 1e\+300": {"learning_rate": 1e300},
    r"contrastive_learning_rate must be in \[0, 1e30\], got -1.0": {
        "contrastive_learning_rate": -1.0
    },
    "max_completion_length must be >= 1, got 0": {"max_completion_length": 0},
    "max_completion_length must be <= 64 .*, got 65": {"max_completion_length": 65},
    "output_dir must not be empty, got ''": {"output_dir": ""},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_bad_settings_are_named(message):
    with pytest.raises(ValueError, match=f"^GraceDemoConfig: {message}"):
        GraceDemoConfig(**BAD_SETTINGS[message])


BAD_PRETRAINING = {
    r"accuracy must be in \(0, 1\), got 1.0": {"accuracy": 1.0},
    "noisy_steps must be >= 1, got 0": {"noisy_steps": 0},
    "warmup_steps must be >= 0, got -1": {"warmup_steps": -1},
    r"learning_rate must be in \[0, 1e30\], got -1.0": {"learning_rate": -1.0},
    r"text_weight must be in \[0, 1e30\], got inf": {"text_weight": float("inf")},
    r"p_right must be in \[0, 1\], got 1.5": {"p_right": 1.5},
}


@pytest.mark.parametrize("message", BAD_PRETRAINING)
def test_bad_settings_of_pretraining_are_named(message):
    with pytest.raises(ValueError, match=f"^PretrainConfig: {message}"):
        PretrainConfig(**BAD_PRETRAINING[message])


def test_settings_know_the_tiny_model():
    assert MAX_COMPLETION_LENGTH == MAX_LENGTH - MAX_PROMPT_LENGTH


@pytest.mark.slow
def test_repaired_form_learns_and_paper_form_collapses(tmp_path):
    """Lowest and highest seen over seeds 0, 1, 2 at 100 steps stand in docs/grace.md."""
    config = GraceDemoConfig(output_dir=str(tmp_path / "demo"), max_steps=40, eval_repeats=1)
    results = run_demo(config, console=Console(file=io.StringIO()))
    base, paper, repaired = (results.reading(m) for m in ("base_reasoning", "paper", "document"))
    assert repaired.topic_hit_at_1 > base.topic_hit_at_1 + 0.3
    assert (repaired.names_topic or 0) > 0.5
    assert (base.names_topic or 1) < 0.35
    assert (repaired.distinct or 0) > 0.6
    assert (paper.distinct or 1) < 0.3
    assert paper.names_topic is not None
    assert paper.names_topic < 0.1
    assert results.pretrain_accuracy >= 0.93
