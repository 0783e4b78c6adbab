"""Policy.from_pretrained on folders and devices that cannot be used: one line that says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tercet.engine.model import Policy
from tercet.engine.pretrained import no_file_bars


@pytest.fixture(scope="module")
def whole(make_tiny_model, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    Policy(make_tiny_model("qwen3", num_hidden_layers=1), tiny_tokenizer).save(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def half(text: bytes) -> bytes:
    return text[: len(text) // 2]


DAMAGE = {
    "half the weights": ("model.safetensors", half, "model, got SafetensorError: "),
    "garbage": ("model.safetensors", lambda _: b"garbage" * 9, "model, got SafetensorError: "),
    "no weights": ("model.safetensors", lambda _: b"", "model, got SafetensorError: "),
    "empty object": ("tokenizer.json", lambda _: b"{}", "tokenizer, got KeyError: 'added_tokens';"),
    "half a tokenizer": ("tokenizer.json", half, "tokenizer, got JSONDecodeError: "),
    "no vocabulary": (
        "tokenizer.json",
        lambda _: b'{"model": {"type": "BPE"}, "added_tokens": []}',
        "tokenizer, got Exception: Missing vocab",
    ),
    "a list": ("tokenizer_config.json", lambda _: b"[]", "tokenizer, got AttributeError: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(copy, damage):
    name, change, message = DAMAGE[damage]
    (copy / name).write_bytes(change((copy / name).read_bytes()))
    with pytest.raises(ValueError, match=r"^Policy\.from_pretrained: .*must hold a load") as caught:
        Policy.from_pretrained(copy)
    told = str(caught.value)
    assert f"{copy} must hold a loadable {message}" in told
    assert told.endswith("or save it again")
    assert "\n" not in told


CONTRADICTIONS = {
    "expected int, got str (value: 'two')": {"num_hidden_layers": "two"},
    "must be equal to the number of `layer_types` (3)": {"layer_types": ["full_attention"] * 3},
    "got ValueError: The checkpoint you are trying to load has model type `no`": {
        "model_type": "no"
    },
    "got ZeroDivisionError: ": {"num_attention_heads": 0},
    "another shape for ['lm_head.weight', 'model.embed_tokens.weight']; compare config.json": {
        "vocab_size": 400
    },
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_a_contradictory_config_is_named(copy, message):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | CONTRADICTIONS[message]))
    with pytest.raises(ValueError, match=r"^Policy\.from_pretrained: ") as caught:
        Policy.from_pretrained(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["foo", "cuda:x", "", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named_before_anything_is_read(device, tmp_path):
    message = r"^Policy\.from_pretrained: device must be one that torch can use here \(\['cpu'"
    with pytest.raises(ValueError, match=message) as caught:
        Policy.from_pretrained(tmp_path / "nowhere", device=device)
    assert f"got '{device}'" in str(caught.value)
    assert "mkldnn" not in str(caught.value)


def test_weights_that_are_not_finite_are_named_first(whole):
    policy = Policy.from_pretrained(whole)
    with torch.no_grad():
        next(policy.model.parameters())[5, 0] = torch.inf
    message = r"weights of Qwen3ForCausalLM must be finite, got .* first model\.embed_tokens\.weig"
    with pytest.raises(RuntimeError, match=message):
        policy.prove_isolation()


@pytest.fixture
def no_network(monkeypatch):
    """Fails the test when the hub is asked."""

    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", ask)


@pytest.mark.usefixtures("no_network")
def test_what_is_no_model_fails_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (9, 60):
        (tmp_path / "runs" / "first" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("")
    here = rf"\(a relative path, looked for in {tmp_path}\)"
    (tmp_path / "runs" / "first" / "run.lock").touch()  # as any run has
    newest = r"; did you mean runs/first/checkpoint-60\?"
    for path, got in {
        "runs/nothing": rf"no folder runs/nothing {here}; check the path",
        "runs/notes.txt": rf"no folder runs/notes\.txt {here}; check the path",
        "runs/first": "no config.json in runs/first" + newest,
        Path("runs/first"): "no config.json in runs/first" + newest,
        "runs/first/checkpoint-61": "no folder runs/first/checkpoint-61" + newest,
        "some/where/else": f"no folder some/where/else {here}; check the path",
        "../other": rf"no folder \.\./other {here}; check the path",
        "~/no such": "no folder .*/no such; check the path",
        "": "no config.json in",
    }.items():
        with pytest.raises(FileNotFoundError, match=rf"^find_model: .* got {got}"):
            Policy.from_pretrained(path)
    for name in ("Qwen/Qwen3-0.6B", "gpt2"):
        with pytest.raises(AssertionError, match="the hub was asked"):
            Policy.from_pretrained(name)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        OSError, match=r"^Policy\.from_pretrained: some/model must be a hub"
    ) as caught:
        Policy.from_pretrained("some/model")
    assert str(caught.value).endswith("the name and the network, or name a folder")
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_one_line(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model must be a folder with a readable model") as caught:
        Policy.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_hub_id_in_the_cache_is_one_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    cache = tmp_path / "hub" / "models--some--model"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "snapshots" / "abc" / "config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    with pytest.raises(FileNotFoundError, match="got no folder some/model"):
        Policy.from_pretrained("some/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(AssertionError, match="the hub was asked"):
        Policy.from_pretrained("some/model")


def test_files_have_no_progress_bars_and_downloads_keep_theirs(whole, tmp_path, capsys):
    Policy.from_pretrained(whole).save(tmp_path / "copy")
    assert capsys.readouterr().err == ""
    assert transformers_logging.is_progress_bar_enabled()
    with no_file_bars():
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
