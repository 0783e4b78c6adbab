"""`tercet grace encode` and `eval` on a tiny model."""

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tercet.engine.cli import main
from tercet.engine.files import sha256
from tercet.engine.glossary import MEANINGS, general
from tercet.engine.grace import GraceConfig, GraceEncoder, train
from tercet.engine.grace.commands import _read_sts
from tercet.engine.grace.config import GraceData, GraceEval
from tercet.engine.metrics import RunLog
from tercet.engine.model import Policy
from tercet.engine.train_config import TrainConfig

PAIRS = [{"query": f"cat {i}", "positive": f"dog {i}"} for i in range(6)]


@pytest.fixture
def checkpoint(tiny_policy, tmp_path):
    run = tmp_path / "run"
    tiny_policy.save(run / "checkpoint-1")
    data = write_rows(tmp_path / "d.jsonl", PAIRS)
    settings = {
        "data": {
            "path": data,
            "test_fraction": 0.1,
            "system_prompt": "think about it",
            "max_prompt_length": 48,
        },
        "max_completion_length": 5,
        "model": "m",
    }
    about = {"settings": settings, "data_sha256": {"path": sha256(data)}}
    (run / "checkpoint-1" / "tercet.json").write_text(json.dumps(about))
    return str(run / "checkpoint-1")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_encoder_prompts_as_its_run_did(checkpoint):
    encoder = GraceEncoder.from_pretrained(checkpoint)
    assert encoder.prompt.system_prompt == "think about it"
    assert encoder.prompt.max_prompt_length == 48
    other = GraceEncoder.from_pretrained(checkpoint, system_prompt="be brief")
    assert other.prompt.system_prompt == "be brief"


def test_encode_writes_vectors_and_rationales(checkpoint, tmp_path, capsys):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}, {"text": "a dog barks"}])
    out = tmp_path / "out"
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts, "--output-dir", str(out)]
    assert main(argv) == 0
    vectors = load_file(out / "vectors.safetensors")["vectors"]
    expected = GraceEncoder.from_pretrained(checkpoint).encode(
        ["the cat", "a dog barks"], max_completion_length=5
    )
    assert vectors.allclose(expected.vectors, atol=1e-5)
    rows = [json.loads(line) for line in (out / "rationales.jsonl").read_text().splitlines()]
    assert [row["rationale"] for row in rows] == expected.rationales
    said = capsys.readouterr().out
    assert f"2 texts in {out}; {expected.num_truncated} rationales" in said
    assert "0 blank lines skipped" in said
    assert list(tmp_path.glob(".out-*")) == []
    other = [*argv[:-1], str(tmp_path / "max"), "--max-completion-length", "4", "--pooling", "max"]
    assert main(other) == 0
    pooled = load_file(tmp_path / "max" / "vectors.safetensors")["vectors"]
    assert not pooled.allclose(vectors, atol=1e-2)
    assert main(argv) == 1
    assert "output_dir must be new" in capsys.readouterr().err


def test_a_baseline_encodes_as_it_was_trained(checkpoint, tmp_path, capsys):
    file = Path(checkpoint) / "tercet.json"
    run = json.loads(file.read_text())
    settings = run["settings"]
    file.write_text(json.dumps(run | {"settings": settings["data"] | {"pooling": "mean"}}))
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}, {"text": "a dog barks"}])
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts, "--output-dir"]
    assert main([*argv, str(tmp_path / "alone")]) == 0
    said = capsys.readouterr().err
    assert "trained no rationales, so the texts alone are embedded; --generate True" in said
    alone = load_file(tmp_path / "alone" / "vectors.safetensors")["vectors"]
    encoder = GraceEncoder.from_pretrained(checkpoint)
    assert alone.allclose(encoder.encode(["the cat", "a dog barks"]).vectors, atol=1e-5)
    assert encoder.encode(["the cat"]).rationales == [""]
    for name, more in {"told": ["--generate", "True"], "given": []}.items():
        out = tmp_path / name
        assert main([*argv, str(out), *more, "--max-completion-length", "5"]) == 0
        assert "texts alone" not in capsys.readouterr().err
        vectors = load_file(out / "vectors.safetensors")["vectors"]
        assert not vectors.allclose(alone, atol=1e-3)


def test_encode_names_the_column_that_is_not_there(checkpoint, tmp_path, capsys):
    texts = write_rows(tmp_path / "t.jsonl", [{"body": "the cat"}, {"body": None}])
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts]
    argv += ["--output-dir", str(tmp_path / "out")]
    assert main(argv) == 1
    assert capsys.readouterr().err == (
        f"tercet grace encode: column 'text' must be there, got only ['body'] at {texts}:1; "
        "name the one to encode with --column\n"
    )
    assert main([*argv, "--column", "body"]) == 1
    assert f"'body' must be a string, got NoneType at {texts}:2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_written_follows_the_umask(checkpoint, tmp_path, mask):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}])
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts]
    before = os.umask(mask)
    try:
        assert main([*argv, "--output-dir", str(tmp_path / "out")]) == 0
        Policy.from_pretrained(checkpoint).save(tmp_path / "copy")
    finally:
        os.umask(before)
    for folder in (tmp_path / "out", tmp_path / "copy"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert {"vectors.safetensors", "rationales.jsonl"} == set(os.listdir(tmp_path / "out"))


def test_a_failed_encode_leaves_nothing(checkpoint, tmp_path, capsys):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}])
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts, "--temperature", "-1"]
    assert main([*argv, "--output-dir", str(tmp_path / "deep" / "out")]) == 1
    assert "temperature" in capsys.readouterr().err
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_terminated_encode_leaves_nothing(checkpoint, tmp_path):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": f"the cat {i}"} for i in range(100_000)])
    out = tmp_path / "deep" / "out"
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts, "--output-dir", str(out)]
    tercet = str(Path(sys.executable).with_name("tercet"))
    with subprocess.Popen([tercet, *argv], stderr=subprocess.PIPE, text=True) as run:
        while run.poll() is None and not list(tmp_path.glob("deep/.out-*")):
            time.sleep(0.01)
        run.terminate()
        assert run.stderr is not None
        assert run.stderr.read() == "\ntercet grace encode: stopped\n"
    assert run.returncode == 143
    assert list(out.parent.iterdir()) == []


@pytest.fixture
def full_disk():
    """No file can grow beyond 64 bytes, which stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_leaves_nothing(checkpoint, full_disk, tmp_path, capsys):
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}])
    out = tmp_path / "deep" / "out"
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts, "--output-dir", str(out)]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"tercet grace encode: the disk of {out.parent} must hold {out}, but it")
    assert said.endswith("free some space or name another folder with --output-dir\n")
    assert list(out.parent.iterdir()) == []
    out = out.with_name("figures.json")
    out.write_text("before")
    argv = ["grace", "eval", "--model", checkpoint, "--data.test-fraction", "0.5"]
    assert main([*argv, "--output", str(out)]) == 1
    assert f"eval: the disk of {out.parent} must hold figures.json, but" in capsys.readouterr().err
    assert [path.read_text() for path in out.parent.iterdir()] == ["before"]


def test_a_place_that_is_taken_is_refused_before_the_model_is_loaded(tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    argv = ["--model", str(tmp_path / "none")]
    encode = ["grace", "encode", "--input", str(tmp_path / "none"), "--output-dir", str(link)]
    assert main([*encode, *argv]) == 1
    assert f"output_dir must be new, got {link}; name another" in capsys.readouterr().err
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output in (tmp_path, pipe):
        assert main(["grace", "eval", *argv, "--output", str(output)]) == 1
        assert f"output must be a file, got {output}, a folder, pipe" in capsys.readouterr().err
    link = tmp_path / "deep"
    link.symlink_to(tmp_path / "no" / "file")
    assert main(["grace", "eval", *argv, "--output", str(link)]) == 1
    assert "output must be a file in a folder that exists, got" in capsys.readouterr().err
    assert main(["grace", "eval", *argv, "--output", "/proc/figures.json"]) == 1  # not even root's
    assert "in a folder that can be written to, got /proc/figures" in capsys.readouterr().err
    assert main(["grace", "eval", *argv, "--output", str(tmp_path / "figures.json")]) == 1
    assert "output" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "link", "pipe"]


def run_eval(tmp_path, *argv):
    """The figures of `tercet grace eval`, as its JSON file has them."""
    output = tmp_path / "figures.json"
    assert main(["grace", "eval", *argv, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def test_eval_measures_without_and_with_rationales(checkpoint, tmp_path, capsys):
    pairs = [{"sentence1": "the cat", "sentence2": "a dog", "score": i / 2} for i in range(3)]
    pairs[1]["sentence2"] = "the cat"
    argv = ["--model", checkpoint, "--max-completion-length", "3", "--pooling", "max"]
    argv += ["--data.test-fraction", "0.5", "--data.columns", "query", "query"]
    found = run_eval(tmp_path, *argv, "--sts", write_rows(tmp_path / "s.jsonl", pairs))
    said = capsys.readouterr()
    # the run held 1 of the 6 rows out
    assert (found["rows"], found["rows_trained_on"]) == (3, 2)
    assert "grace eval: not the held-out rows of the run (columns {} -> {'query': " in said.err
    assert "grace eval: 2 of 3 rows measured are rows that the run trained on" in said.err
    assert found["settings"]["max_completion_length"] == 3
    assert found["settings"]["pooling"] == "max"
    assert said.out.endswith(f"wrote {tmp_path / 'figures.json'}\n")
    run_eval(tmp_path, *argv)
    assert capsys.readouterr().out.endswith("figures.json (in place of the file of that name)\n")
    for column in ("no_rationale", "rationale"):
        assert 0 <= found[column]["eval/recall@1"] <= 1
        assert -1 <= found[column]["eval/sts_spearman"] <= 1
    assert found["no_rationale"]["eval/held_out_loss"] > 0
    assert found["no_rationale"]["eval/held_out_truncated"] == 0
    assert 0 < found["rationale"]["eval/mean_length"] <= 3


def test_what_is_cut_of_sts_pairs_is_counted_and_not_logged(checkpoint, tmp_path, caplog):
    pair = {"sentence1": "the cat " * 40, "sentence2": "a dog", "score": 1}
    other = {"sentence1": "a cat", "sentence2": "the dog", "score": 0}
    sts = ["--sts", write_rows(tmp_path / "s.jsonl", [pair, other])]
    argv = ["--model", checkpoint, "--data.test-fraction", "0.5", *sts]
    found = run_eval(tmp_path, *argv, "--max-completion-length", "1")
    assert found["no_rationale"]["eval/sts_prompts_truncated"] == 1
    assert "eval/sts_clipped_ratio" not in found["no_rationale"]
    assert found["rationale"]["eval/sts_prompts_truncated"] == 1
    assert found["rationale"]["eval/sts_clipped_ratio"] == 1
    assert caplog.records == []


def test_every_figure_is_shown_and_explained(checkpoint, tmp_path, capsys):
    pair = {"sentence1": "the cat", "sentence2": "a dog", "score": 1}
    sts = ["--sts", write_rows(tmp_path / "s.jsonl", [pair, pair])]
    argv = ["--model", checkpoint, "--data.test-fraction", "0.5", *sts]
    found = run_eval(tmp_path, *argv)
    shown = capsys.readouterr().out
    assert f"{checkpoint}: 3 rows, temperature 1.0, " in shown
    for key in found["rationale"] | found["no_rationale"]:
        cells = [
            f"{found[column][key]:.3f}" if key in found[column] else "-"
            for column in ("no_rationale", "rationale")
        ]
        assert [key, *cells] in [line.split() for line in shown.splitlines()]
        assert MEANINGS[general(key)] in shown


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("supervised", {}),
        ("supervised", {"train": {"bf16": True}, "top_k": 7, "pooling": "max"}),
        ("supervised", {"dtype": "bfloat16", "evaluation": {"temperature": 0.0}}),
        ("unsupervised", {"evaluation": {"num_texts": 3, "temperature": 0.8}}),
    ],
)
def test_eval_gives_the_figures_of_the_last_evaluation_of_training(
    tiny_policy, tmp_path, capsys, mode, settings
):
    tiny_policy.save(tmp_path / "model")
    columns = {} if mode == "supervised" else {"text": "positive"}
    config = GraceConfig(
        model=str(tmp_path / "model"),
        data=GraceData(
            path=write_rows(tmp_path / "d.jsonl", PAIRS),
            mode=mode,
            columns=columns,
            test_fraction=0.7,
            max_prompt_length=200,
        ),
        output_dir=str(tmp_path / "run"),
        num_generations=2,
        generation_batch_size=4,
        max_completion_length=6,
        device="cpu",
        train=TrainConfig(max_steps=1, seed=3, eval_steps=1, **settings.pop("train", {})),
        evaluation=GraceEval(**settings.pop("evaluation", {})),
        **settings,
    )
    run = train(config)
    trained = {key: value for key, value in run.metrics.items() if key.startswith("eval/")}
    capsys.readouterr()
    found = run_eval(tmp_path, "--model", str(run.checkpoint))
    assert found["rationale"] == pytest.approx(trained, rel=1e-6)
    assert found["rows_trained_on"] == 0
    assert ("eval/recall@1" in found["no_rationale"]) == (mode == "supervised")
    said = capsys.readouterr()
    assert ("as in training" in said.err) == (found["rows"] == 3)
    assert (
        f"rows: from the 4 of 6 rows of {config.data.path} that a shuffle holds out "
        "(test_fraction 0.7, split_seed 0)\n"
    ) in said.out
    rows = found["rows"]
    assert f"among {rows} candidates (by chance recall@1 is {1 / rows:.3f})" in said.out
    assert ("so there is no retrieval (-)\n" in said.out) == (mode == "unsupervised")
    events = (run.folder / "events.jsonl").read_text()
    for told in (said.out, events):
        assert ("1 says that the samples of a text agree, not that" in told) == (
            mode == "unsupervised"
        )


def test_what_is_not_as_the_run_measured_is_said(checkpoint, tmp_path, capsys):
    texts = ["--data.mode", "unsupervised", "--data.columns", "text", "positive"]
    argv = ["--model", checkpoint, *texts, "--data.test-fraction", "0.5"]
    run_eval(tmp_path, *argv, "--temperature", "0", "--seed", "4")
    said = capsys.readouterr().err
    assert "not as the run measured (temperature 1.0 -> 0.0, seed 0 -> 4)\n" in said
    assert "each text finds itself" in said
    run_eval(tmp_path, *argv, "--temperature", "1")
    said = capsys.readouterr().err
    assert "not as the run measured" not in said
    assert "each text finds itself" not in said


EMBEDDING = {
    "--system-prompt": "be brief",
    "--max-prompt-length": "60",
    "--max-completion-length": "3",
    "--pooling": "max",
}
GIVEN = [word for option in EMBEDDING.items() for word in option]


def test_how_texts_are_embedded_can_be_set_and_what_differs_from_the_run_is_said(
    checkpoint, tmp_path, capsys
):
    found = run_eval(tmp_path, "--model", checkpoint, *GIVEN, "--data.test-fraction", "0.5")
    assert found["settings"] == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
        "system_prompt": "be brief",
        "max_prompt_length": 60,
        "max_completion_length": 3,
        "pooling": "max",
        "generate": True,
    }
    assert (
        "not as the run measured (system_prompt 'think about it' -> 'be brief', max_prompt_length "
        "48 -> 60, max_completion_length 5 -> 3, pooling 'mean' -> 'max')\n"
    ) in capsys.readouterr().err


def test_the_defaults_of_a_model_without_a_run_are_said(checkpoint, tmp_path, capsys):
    Path(checkpoint, "tercet.json").unlink()
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "the cat"}])
    argv = ["grace", "encode", "--model", checkpoint, "--input", texts]
    assert main([*argv, *GIVEN[:-2], "--output-dir", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().err == (
        f"tercet grace encode: {checkpoint} has no tercet.json, so by default pooling mean\n"
    )
    assert main([*argv, *GIVEN, "--output-dir", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().err == ""
    vectors = load_file(tmp_path / "b" / "vectors.safetensors")["vectors"]
    encoder = GraceEncoder.from_pretrained(
        checkpoint,
        system_prompt="be brief",
        max_prompt_length=60,
        max_completion_length=3,
        pooling="max",
    )
    assert vectors.allclose(encoder.encode(["the cat"]).vectors, atol=1e-5)
    assert main([*argv, "--output-dir", str(tmp_path / "c")]) == 0
    assert "by default system_prompt GRACE's own, max_prompt_length 1024" in capsys.readouterr().err


def test_eval_of_what_is_no_checkpoint_names_the_one_that_is(checkpoint, tmp_path, capsys):
    assert main(["grace", "eval", "--model", str(tmp_path / "run")]) == 1
    assert f"did you mean {checkpoint}?" in capsys.readouterr().err
    other = Path(checkpoint).rename(tmp_path / "run" / "checkpoint-2")
    shutil.copytree(tmp_path / "run", tmp_path / "ran")
    (tmp_path / "ran" / "checkpoint-1").mkdir()  # older, not named
    with pytest.raises(FileNotFoundError) as error:
        GraceEncoder.from_pretrained(str(tmp_path))
    assert f"did you mean {tmp_path}/ran/checkpoint-2 or {other}?" in str(error.value)
    assert main(["grace", "eval", "--model", str(tmp_path / "nope" / "checkpoint-1")]) == 1
    assert f"no folder {tmp_path / 'nope'}" in capsys.readouterr().err


def test_eval_of_a_run_without_a_checkpoint_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    with RunLog.create(run, GraceData(path="d.jsonl"), total_steps=1):
        pass
    for model in (run, run / "checkpoint-50"):
        assert main(["grace", "eval", "--model", str(model)]) == 1
        said = capsys.readouterr().err
        assert (
            f"got {model}, and the run in {run} has no checkpoint yet; wait for its first" in said
        )
    (run / "checkpoint-50.tercet.tmp").mkdir()
    assert main(["grace", "eval", "--model", str(run / "checkpoint-50.tercet.tmp")]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_eval_needs_two_held_out_rows_and_a_place_for_its_output(checkpoint, tmp_path, capsys):
    argv = ["grace", "eval", "--model", checkpoint]
    assert main(argv) == 1
    assert capsys.readouterr().err.endswith(
        "there must be at least two held-out rows, got 1; name rows that were not trained on with "
        "--data.test-path\n"
    )
    assert main([*argv, "--output", str(tmp_path / "none" / "x.json")]) == 1
    assert "output must be a file in a folder that exists, got" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["1" + "0" * 400, "NaN", "1e999", "true", "null", '"1"'])
def test_a_score_that_is_no_finite_number_is_named(tmp_path, score):
    path = tmp_path / "s.jsonl"
    path.write_text(f'{{"sentence1": "a", "sentence2": "b", "score": {score}}}\n')
    with pytest.raises(ValueError, match=r"must be a finite number, got .* at .*s\.jsonl:1; corr"):
        _read_sts(str(path))
