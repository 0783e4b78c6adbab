"""train(config): from a file of texts to a checkpoint, resumed, refused, and told about."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tercet.engine.checkpoint import read_run
from tercet.engine.config import read_yaml, to_plain, to_yaml
from tercet.engine.files import read_jsonl
from tercet.engine.grace import GraceConfig, GraceEncoder, train
from tercet.engine.grace.commands import _what_is_saved
from tercet.engine.grace.commands import train as main
from tercet.engine.grace.config import GraceData, GraceEval
from tercet.engine.grace.prompts import PromptBuilder
from tercet.engine.metrics import hold_folder
from tercet.engine.model import Policy
from tercet.engine.train_config import TrainConfig

ROWS = [
    {
        "query": f"is the {a} in the {b}",
        "positive": f"a {a} and the {b}",
        "negative": f"the {b} and the sea",
    }
    for a in ("boat", "rose", "river", "bread")
    for b in ("kitchen", "garden", "sun")
]


@pytest.fixture
def model_folder(make_tiny_model, tiny_tokenizer, tmp_path):
    Policy(make_tiny_model("qwen3"), tiny_tokenizer).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def make_config(model_folder, tmp_path):
    """make_config(rows=ROWS, data={}, train={}, **GraceConfig fields) -> GraceConfig."""

    def make(rows=ROWS, data=None, train=None, **settings):
        path = tmp_path / "data.jsonl"
        path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
        return GraceConfig(
            model=str(model_folder),
            data=GraceData(
                path=str(path), max_prompt_length=200, **{"test_fraction": 0.0, **(data or {})}
            ),
            train=TrainConfig(learning_rate=1e-2, **{"max_steps": 2, **(train or {})}),
            **{
                "output_dir": str(tmp_path / "run"),
                "num_generations": 3,
                "generation_batch_size": 6,
                "max_completion_length": 8,
                "device": "cpu",
                **settings,
            },
        )

    return make


MODES = {
    "supervised": {"mode": "supervised"},
    "unsupervised": {"mode": "unsupervised", "columns": {"text": "positive"}},
}


@pytest.mark.parametrize("mode", MODES)
def test_training_moves_the_weights_and_leaves_a_folder(make_config, model_folder, mode):
    config = make_config(data={"test_fraction": 0.25, **MODES[mode]}, train={"eval_steps": 2})
    run = train(config)
    names = {path.name for path in run.folder.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "latest"} <= names
    steps = {row["step"]: row for row in read_jsonl(run.folder / "metrics.jsonl")}
    assert list(steps) == [0, 1, 2]
    assert {"eval/recall@1", "eval/anisotropy", "eval/distinct_share"} <= set(steps[0]) & set(
        steps[2]
    )
    assert steps[2]["prompts/truncated"] == 0
    assert run.metrics["reward/mean"] == steps[2]["reward/mean"]
    samples = read_jsonl(run.folder / "samples.jsonl")
    assert ("query" in samples[0]) == (mode == "supervised")

    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.checkpoint).state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert AutoTokenizer.from_pretrained(run.checkpoint).chat_template


def test_a_checkpoint_embeds_as_its_run_did_wherever_it_is_copied(make_config, tmp_path):
    config = make_config(
        data={"system_prompt": "Think."}, pooling="penultimate_mean", train={"max_steps": 1}
    )
    run = train(config)
    assert run.metrics["grad_norm"] > 0
    assert read_run(run.checkpoint)["settings"] == to_plain(config)
    shutil.move(run.checkpoint, tmp_path / "elsewhere")
    shutil.rmtree(run.folder)
    encoder = GraceEncoder.from_pretrained(tmp_path / "elsewhere", device="cpu")
    assert (encoder.prompt.system_prompt, encoder.prompt.max_prompt_length) == ("Think.", 200)
    assert (encoder.max_completion_length, encoder.pooling) == (8, "penultimate_mean")


@pytest.mark.wrong_types
def test_no_such_pooling(make_config):
    with pytest.raises(ValueError, match=r"GraceConfig: pooling must be one of \('mean', .*'cls'"):
        make_config(pooling="cls")


def test_a_killed_run_goes_on_exactly(make_config, tmp_path):
    config = make_config(train={"max_steps": 4, "save_steps": 2})
    whole = train(config)
    shutil.copytree(whole.folder, tmp_path / "whole")
    shutil.rmtree(whole.folder / "checkpoint-4")  # killed in step 4, after its row was logged
    (whole.folder / "latest").write_text("checkpoint-2\n")

    again = train(config)  # the same command
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = (read_jsonl(f / name) for f in (again.folder, tmp_path / "whole"))
        assert [untimed(row) for row in ours] == [untimed(row) for row in theirs]
    ours, theirs = (
        load_file(folder / "checkpoint-4" / "model.safetensors")
        for folder in (again.folder, tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["path", "test_path"])
def test_a_run_goes_on_with_other_data_only_when_told_to(make_config, tmp_path, name):
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    config = make_config(
        data={"test_path": str(tmp_path / "test.jsonl")}, train={"max_steps": 2, "save_steps": 1}
    )
    run = train(config)
    shutil.rmtree(run.folder / "checkpoint-2")
    changed = Path(getattr(config.data, name))
    changed.write_text("\n".join(map(json.dumps, ROWS[3:])))
    before = {path: path.read_bytes() for path in run.folder.iterdir() if path.is_file()}
    message = rf"^train: the data must .* so far, got another {changed}; .*\(--resume, "
    with pytest.raises(ValueError, match=message):
        train(config)
    assert {path: path.read_bytes() for path in before} == before
    assert train(config, resume=True).checkpoint.name == "checkpoint-2"
    assert f"{changed} is not the data that this run has had until now" in events(run)
    shutil.rmtree(run.folder / "checkpoint-2")
    (run.folder / "latest").write_text("checkpoint-1\n")
    with pytest.raises(ValueError, match=message):
        train(config)


def test_a_newest_checkpoint_with_a_cut_account_of_its_run_is_passed_over(make_config):
    config = make_config(train={"max_steps": 3, "save_steps": 1})
    run = train(config)
    shutil.rmtree(run.checkpoint)
    (run.folder / "latest").write_text("checkpoint-2\n")
    (run.folder / "checkpoint-2" / "tercet.json").write_text("{")
    assert train(config).checkpoint == run.checkpoint
    assert "checkpoint-2 is damaged (tercet.json has " in events(run)


def test_a_run_killed_before_its_first_checkpoint_starts_over(make_config):
    config = make_config(train={"max_steps": 1, "eval_steps": 1}, data={"test_fraction": 0.25})
    run = train(config)
    shutil.rmtree(run.checkpoint)
    (run.folder / "latest").unlink()
    again = train(config)
    assert [row["step"] for row in read_jsonl(again.folder / "metrics.jsonl")] == [0, 1]
    assert events(again).count("9 training rows, 3 held out") == 1


def untimed(row):
    return {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s", "memory"))}


def test_settings_that_no_step_can_have_are_refused_before_the_folder_is_claimed(make_config):
    with pytest.raises(ValueError, match=r"^GraceConfig: train\.mini_batches .* = 2, got 3; lower"):
        make_config(train={"mini_batches": 3})
    assert make_config(train={"mini_batches": 2}).groups_per_step == 2
    with pytest.raises(ValueError, match=r"^GraceConfig: top_k must be in \[0, 2\^31\), got 9223"):
        make_config(top_k=2**63)


def test_a_folder_of_other_files_is_refused_at_once_and_left(make_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: true\n")
    for resume in (None, True, False):
        with pytest.raises(FileExistsError, match=r"got other files in .*run \(config\.yaml\)"):
            train(replace(make_config(), model="/no/such/model"), resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine: true\n"


def test_output_folder_exists(make_config, tmp_path):
    config = make_config(train={"max_steps": 1})
    train(config)
    message = r"^train: output_dir must be new or hold this run unfinished, got {} in .*run; choose"
    with pytest.raises(FileExistsError, match=message.format("a finished run")):
        train(config)
    longer = make_config(train={"max_steps": 2})
    other = r"a run with other settings \(train\.max_steps 1 -> 2\)"
    with pytest.raises(FileExistsError, match=message.format(other)):
        train(longer)
    assert train(longer, resume=True).checkpoint.name == "checkpoint-2"
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(FileExistsError, match=message.format("a run")):
        train(longer, resume=False)


BAD_DATA = {
    "empty": ("", r"^read_rows: .* got an empty file .*data\.jsonl"),
    "not JSON": ('{"query": "a", "positive": "b"}\n{"query": \n', r"got not JSON .*data\.jsonl:2"),
    "no column": ('{"query": "a", "answer": "b"}\n', r"'positive' .* must be there.*data\.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_writes_nothing(make_config, tmp_path, name):
    text, message = BAD_DATA[name]
    with pytest.raises(ValueError, match=message):
        train(make_config(rows=text))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_chat_template_writes_nothing(make_config, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    (model_folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"^build_prompt: the tokenizer must have a chat template"):
        train(make_config())
    assert not (tmp_path / "run").exists()


def test_rows_above_the_positions_write_nothing(make_config, tmp_path):
    with pytest.raises(
        ValueError, match=r"at most 512 \(the model's positions\), got 600; lower one of them \(--d"
    ):
        train(make_config(max_completion_length=400))
    assert not (tmp_path / "run").exists()


def test_a_system_prompt_above_the_positions_is_what_to_shorten(
    make_config, make_tiny_model, tiny_tokenizer, model_folder
):
    frame = PromptBuilder(tiny_tokenizer).frame
    for positions, remedy in {
        frame + 1: rf"alone are {frame} tokens: shorten the .* \(--data\.system-prompt\)$",
        frame + 2: r"lower one of them \(--data\.max-prompt-length, --max-completion-length\)$",
    }.items():
        policy = Policy(make_tiny_model(max_position_embeddings=positions), tiny_tokenizer)
        policy.save(model_folder)
        with pytest.raises(ValueError, match=rf"at most {positions} .* got [0-9]*; .*{remedy}"):
            train(make_config())


def test_hidden_states_that_overflow_write_nothing(make_config, model_folder, tmp_path):
    policy = Policy.from_pretrained(model_folder)
    with torch.no_grad():
        policy.model.get_parameter("model.norm.weight").fill_(3e38)
    policy.save(model_folder)
    with pytest.raises(RuntimeError, match=r"^Policy: hidden states of .* must be finite"):
        train(make_config())
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_write_nothing(make_config, model_folder, tmp_path):
    policy = Policy.from_pretrained(model_folder)
    with torch.no_grad():
        policy.head().weight[7, 3] = float("nan")
    policy.save(model_folder)
    with pytest.raises(RuntimeError, match=r"must be finite, got .* 1 of .*, first lm_head\.wei"):
        train(make_config())
    assert not (tmp_path / "run").exists()


def test_a_folder_is_held_before_anything_is_decided(make_config):
    config = replace(make_config(), model="/no/such/model")
    folder = Path(config.output_dir)
    with hold_folder(folder):
        with pytest.raises(RuntimeError, match=r"^hold_folder: one process may write to .*; stop"):
            train(config)
        assert [path.name for path in folder.iterdir()] == ["run.lock"]


def test_a_run_is_not_resumed_into_its_past(make_config):
    config = make_config(train={"max_steps": 2})
    run = train(config)
    settings = (run.folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"^train: .* at least 2 to resume .*checkpoint-2, got 1;"):
        train(make_config(train={"max_steps": 1}), resume=True)
    assert (run.folder / "config.yaml").read_text() == settings
    assert train(config, resume=True).checkpoint == run.checkpoint
    assert run.checkpoint.exists()


def events(run):
    return " | ".join(row["message"] for row in read_jsonl(run.folder / "events.jsonl"))


def test_a_run_goes_on_when_every_rollout_is_cut_off(make_config):
    run = train(make_config(max_completion_length=1))
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [row["completions/clipped_ratio"] for row in rows] == [1.0, 1.0]
    assert all(row["reward/spread"] == 0 for row in rows)  # the relative rule: no signal
    assert "no rollout of the batch ended" in events(run)


def test_long_texts_are_counted(make_config):
    rows = [{"query": "the sea", "positive": f"river {i} " * 100} for i in range(8)]
    run = train(make_config(rows=rows))
    # Each step has two documents above the limit; its two queries fit.
    assert [r["prompts/truncated"] for r in read_jsonl(run.folder / "metrics.jsonl")] == [2.0, 2.0]
    config = make_config(
        rows=[*rows, *ROWS], data={"overlong": "drop"}, output_dir=f"{run.folder}2"
    )
    run = train(config)
    assert [r["prompts/truncated"] for r in read_jsonl(run.folder / "metrics.jsonl")] == [0.0, 0.0]
    assert "8 of 20 training rows dropped: document above the limit" in events(run)


def test_one_text_per_step_trains_without_other_groups(make_config):
    run = train(
        make_config(
            data=MODES["unsupervised"],
            train={"eval_steps": 1},
            generation_batch_size=3,
        )
    )
    assert run.metrics["reward/hard"] == 0
    assert "one group per step: there are no other groups" in events(run)
    assert "no row is held out (data.test_fraction 0.0 of 12 rows), so nothing can be" in events(
        run
    )


def test_what_recall_depends_on_is_told_once(make_config):
    config = make_config(train={"eval_steps": 1, "max_steps": 2}, data={"test_fraction": 0.5})
    told = events(train(config))
    sentence = (
        "evaluations: retrieval is among 6 candidates (by chance recall@1 is 0.167): with more of "
        "them it is lower; a single query is 0.167 of recall"
    )
    assert told.count(sentence) == 1
    config = replace(config, output_dir=f"{config.output_dir}2", evaluation=GraceEval(num_texts=4))
    assert "evaluations: retrieval is among 4 candidates" in events(train(config))
    config = replace(
        config, output_dir=f"{config.output_dir}3", train=replace(config.train, eval_steps=0)
    )
    assert "candidates" not in events(train(config))


def test_a_tenth_is_held_out_and_one_row_is_not_enough_to_measure(make_config):
    config = make_config(train={"eval_steps": 1, "max_steps": 1})
    run = train(replace(config, data=GraceData(path=config.data.path, max_prompt_length=200)))
    assert "11 training rows, 1 held out" in events(run)
    assert "needs two held-out rows, got 1 (1 held out, evaluation.num_texts 256)" in events(run)
    assert not any(key.startswith("eval/") for key in run.metrics)


def test_a_batch_larger_than_the_data_is_told(make_config):
    rows = [{k: row[k] for k in ("query", "positive")} for row in ROWS[:2]]
    run = train(make_config(rows=rows, generation_batch_size=9))
    assert run.metrics["groups/sharing_a_text"] == 1
    assert "a step takes 3 rows and the data has 2: rows repeat" in events(run)
    assert "the negative term is off: 2 of 2 training rows have no negative" in events(run)


def test_remax_trains_groups_of_one(make_config):
    config = make_config(
        train={"advantage_estimator": "remax"}, num_generations=1, generation_batch_size=6
    )
    first, _ = read_jsonl(train(config).folder / "metrics.jsonl")
    assert first["reward/consistency"] == 0
    assert first["grad_norm"] > 0


def test_the_command_line(make_config, tmp_path, capsys):
    config = make_config(train={"max_steps": 1})
    (tmp_path / "c.yaml").write_text(
        f"model: {config.model}\ndata:\n  path: {config.data.path}\n  max_prompt_length: 200\n"
        "num_generations: 2\ngeneration_batch_size: 4\nmax_completion_length: 4\n"
    )
    argv = ["--config", str(tmp_path / "c.yaml"), "--output-dir", str(tmp_path / "cli")]
    assert main([*argv, "--train.max-steps", "1", "--device", "cpu"], "tercet grace train") == 0
    assert f"wrote {tmp_path / 'cli' / 'checkpoint-1'}" in capsys.readouterr().out.replace("\n", "")
    assert main([*argv, "--train.max-steps", "2", "--resume", "--device", "cpu"], "t") == 0


@pytest.mark.parametrize(
    ("save_steps", "said"),
    [
        (0, r"nothing was saved \(there is no checkpoint yet\); the same command starts over"),
        (1, r"{}/run/checkpoint-\d+ is the last that was saved whole; the same .* goes on from it"),
    ],
)
def test_ctrl_c_says_what_was_saved(make_config, tmp_path, save_steps, said):
    config = make_config(train={"max_steps": 100_000, "save_steps": save_steps})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("tercet")), "grace", "train"]
    command += ["--config", str(tmp_path / "c.yaml")]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is deaf
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, preexec_fn=heard) as run:
        assert run.stdout is not None
        assert any(line.startswith("step 3/") for line in run.stdout)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert re.search(rf"\ntercet grace train: stopped; {said.format(tmp_path)}\n", err)
    assert "Traceback" not in err


def test_what_was_saved_is_what_a_resume_goes_on_from(make_config, tmp_path):
    config = make_config(train={"max_steps": 2, "save_steps": 1})
    folder = train(config).folder
    first, second = folder / "checkpoint-1", folder / "checkpoint-2"
    assert f"{second} is the last that was saved whole" in _what_is_saved(folder)
    (second / "config.json").unlink()
    assert f"{first} is the last that was saved whole" in _what_is_saved(folder)
    (first / "optimizer.pt").write_bytes(b"")
    said = _what_is_saved(folder)
    assert f"the checkpoints in {folder} are damaged; restore one from a copy" in said


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_shipped_settings_are_valid(name, tmp_path):
    path = Path(__file__).parents[3] / "configs" / f"grace_{name}.yaml"
    config = read_yaml(path, GraceConfig)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert read_yaml(tmp_path / "again.yaml", GraceConfig) == config
    if name == "paper":
        assert config.groups_per_step == 64
        assert (config.reward.form, config.reward.temperature) == ("paper", 0.1)


def test_the_package_names_what_it_has():
    package = importlib.import_module("tercet.engine.grace")
    assert package.train is train is importlib.import_module("tercet.engine.grace.training").train
    assert dir(package) == package.__all__
    with pytest.raises(AttributeError, match=r"^module 'tercet\.engine\.grace' has no .* 'tarin'"):
        package.tarin  # noqa: B018
