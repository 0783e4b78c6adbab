"""The real-text experiment on a handful of made-up problems."""

import json

import pytest

from tercet.engine.config import ConfigError
from tercet.engine.grace.commands import experiment
from tercet.engine.grace.experiment import (
    Experiment,
    Pairs,
    read_pairs,
    run,
    worked_answer,
)
from tercet.engine.grace.experiment_config import ExperimentConfig, Generation, ScratchModel
from tercet.engine.grace.fit_config import ContrastiveConfig, FitConfig, PretrainConfig
from tercet.engine.train_config import TrainConfig

NAMES = ["Martha", "Toby", "Ahito", "Wanda", "Pedro", "Ingrid", "Kofi", "Lena"]


@pytest.fixture
def data(tmp_path):
    rows = [
        {
            "question": f"{name} buys {n} boxes of {3 * n} plums. How many plums?",
            "answer": f"{name} has {n}*{3 * n}=<<{n}*{3 * n}={3 * n * n}>>{3 * n * n} plums.\n"
            f"#### {3 * n * n}",
        }
        for n, name in enumerate(NAMES * 2, start=2)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(data, tmp_path):
    return ExperimentConfig(
        data=data,
        output_dir=str(tmp_path / "out"),
        num_train=12,
        max_prompt_length=160,
        model=ScratchModel(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        pretrain=PretrainConfig(per_device_train_batch_size=4, fit=FitConfig(max_steps=2)),
        generation=Generation(num_generations=2, generation_batch_size=4, max_completion_length=4),
        grace=TrainConfig(max_steps=2),
        info_nce=ContrastiveConfig(per_device_train_batch_size=4, fit=FitConfig(max_steps=2)),
        simcse=ContrastiveConfig(
            method="simcse",
            attention_dropout=0.3,
            per_device_train_batch_size=4,
            fit=FitConfig(max_steps=2),
        ),
    )


def test_marks_and_the_line_of_the_result_are_removed():
    answer = "She sells 16 - 3 = <<16-3=13>>13 eggs.\nShe makes $<<13*2=26>>26.\n#### 26"
    assert worked_answer(answer) == "She sells 16 - 3 = 13 eggs. She makes $26."
    assert worked_answer("no marks #### here\n#### 1,234\n") == "no marks #### here"
    assert worked_answer("#### 5") == ""


def test_pairs_are_shuffled_once_and_split(data):
    pairs = read_pairs(data, 12)
    assert (len(pairs.train), len(pairs.test)) == (12, 4)
    assert read_pairs(data, 12) == pairs
    assert read_pairs(data, 12, split_seed=1).test != pairs.test
    assert len({*pairs.train, *pairs.test}) == 16
    assert [q.split()[0] for q, _ in pairs.train] != (NAMES * 2)[:12]
    for question, answer in [*pairs.train, *pairs.test]:
        assert answer.startswith(question.split()[0])
        assert "<<" not in answer
        assert "#" not in answer


def test_bad_data_is_named(data, tmp_path):
    with pytest.raises(ValueError, match="must leave two of the 16 rows held out, got 15"):
        read_pairs(data, 15)
    (tmp_path / "empty.jsonl").write_text('{"question": "Why?", "answer": "#### 3"}\n')
    with pytest.raises(ValueError, match=r"must have text, got none at .*empty.jsonl:1"):
        read_pairs(str(tmp_path / "empty.jsonl"), 1)


def test_a_run_that_was_stopped_ends_with_the_same_table(config, tmp_path, capsys):
    from dataclasses import replace

    lines: list[str] = []
    whole = run(replace(config, output_dir=str(tmp_path / "whole")), lines.append)
    names = [line.split("|")[1].strip() for line in whole.splitlines()[2:]]
    assert names == [
        "BM25",
        "base: prompt",
        "base: greedy",
        "base: sampled",
        "InfoNCE: prompt",
        "InfoNCE: greedy",
        "GRACE, document form: prompt",
        "GRACE, document form: greedy",
        "GRACE, document form: sampled",
        "GRACE, paper form: prompt",
        "GRACE, paper form: greedy",
        "GRACE, paper form: sampled",
        "SimCSE, questions: prompt",
        "GRACE, questions: prompt",
        "GRACE, questions: greedy",
        "GRACE, questions: sampled",
    ]

    def stop_at(name):
        def say(line):
            if name in line:
                raise KeyboardInterrupt

        return say

    for name in ("base: greedy", "InfoNCE: prompt", "paper form: sampled"):
        with pytest.raises(KeyboardInterrupt):
            run(config, stop_at(name))
    assert run(config, lines.append) == whole
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(seeds) for seeds in results.values()] == [1] * len(names)
    trained = json.loads((tmp_path / "out" / "seed-0" / "rows.json").read_text())
    assert trained["base: prompt"]["held_out_loss"] != trained["InfoNCE: prompt"]["held_out_loss"]
    assert "texts cut" in whole
    assert trained["base: prompt"]["held_out_truncated"] == 0


def test_other_settings_are_not_mixed_into_one_folder(config):
    from dataclasses import replace
    from pathlib import Path

    from tercet.engine.grace.experiment import _claim

    folder = Path(config.output_dir)
    _claim(folder, config)
    _claim(folder, replace(config, seeds=[0, 1]))
    with pytest.raises(ConfigError, match=r"got other settings or .* \(num_train \d+ -> 11\);"):
        _claim(folder, replace(config, num_train=11))
    (folder / "config.yaml").rename(folder / "notes.yaml")
    with pytest.raises(FileExistsError, match=r"got other files in .*notes\.yaml"):
        _claim(folder, config)


def test_other_data_are_not_mixed_into_one_folder(config, tmp_path):
    from dataclasses import replace
    from pathlib import Path

    from tercet.engine.grace.experiment import _claim

    folder, data = Path(config.output_dir), Path(config.data)
    _claim(folder, config)
    moved = data.rename(tmp_path / "moved.jsonl")
    _claim(folder, replace(config, data=str(moved)))
    lines = moved.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[::-1]))
    message = r"got other settings or data in .*config\.yaml \(data 'sha256:.* restore them$"
    with pytest.raises(ConfigError, match=message):
        run(config, print)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text", ["{", "\ufeff", "[" * 100_000, "[]", "3", '{"BM25": 3}', '{"BM25": {"recall@1": 0}}']
)
def test_finished_rows_that_cannot_be_read_are_named(config, tmp_path, text):
    folder = tmp_path / "out" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "rows.json").write_text(text)
    message = r"^experiment: .*seed-0/rows\.json must hold numbers per row, .*; delete it, and"
    with pytest.raises(ValueError, match=message):
        Experiment(config, Pairs(train=[], test=[]), 0).rows()


def test_seeds_and_methods_are_checked(config, data):
    from dataclasses import replace

    with pytest.raises(ValueError, match="seeds must differ"):
        replace(config, seeds=[1, 1])
    with pytest.raises(ValueError, match="must be what they are called"):
        replace(config, info_nce=config.simcse)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        experiment(["--data", "nowhere.jsonl"], "tercet grace experiment")
