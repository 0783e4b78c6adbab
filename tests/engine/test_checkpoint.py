"""Checkpoints that are whole or not there: damage, full disks, leftovers of a kill."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tercet.engine.checkpoint import find_fault, load_latest, read_run, save_checkpoint

FILES = {"model.safetensors", "config.json", "tercet.json", "optimizer.pt", "rng.pt"}
FILES |= {"trainer_state.json"}
RUN = {"tercet": "0", "settings": {"model": "möbius", "rate": 1e-6}}


@pytest.fixture
def trained(tiny_policy):
    """A policy and an AdamW that has moments."""
    optimizer = torch.optim.AdamW(tiny_policy.model.parameters(), lr=1e-3)
    nudge(tiny_policy, optimizer)
    return tiny_policy, optimizer


def save(folder, step, trained, state, save_total_limit=None) -> Path:
    policy, optimizer = trained
    return save_checkpoint(
        folder, step, policy, optimizer, state, run=RUN, save_total_limit=save_total_limit
    )


def nudge(policy, optimizer):
    for parameter in policy.model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()


def weights(policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def moments(optimizer) -> list[torch.Tensor]:
    return [s["exp_avg"].clone() for s in optimizer.state_dict()["state"].values()]


def two_checkpoints(folder, trained) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """checkpoint-1 and checkpoint-2; returns the weights of both."""
    save(folder, 1, trained, {"told": ["a"]})
    first = weights(trained[0])
    nudge(*trained)
    save(folder, 2, trained, {"told": ["a", "b"]})
    return first, weights(trained[0])


def restore(folder, trained):
    """Loads after spoiling everything in memory.  Returns what was found and what was said."""
    nudge(*trained)
    said: list[str] = []
    return load_latest(folder, trained[0], trained[1], warn=said.append), said


def test_a_checkpoint_is_a_hugging_face_folder_with_a_true_manifest(tmp_path, trained):
    path = save(tmp_path, 7, trained, {"told": []})
    assert path == tmp_path / "checkpoint-7"
    assert (tmp_path / "latest").read_text() == "checkpoint-7\n"
    manifest = json.loads((path / "manifest.json").read_text())
    names = {p.name for p in path.iterdir()}
    assert names - {"manifest.json"} == set(manifest["files"]) >= FILES
    assert any(name.startswith("tokenizer") for name in names)
    assert find_fault(path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-7", "latest"]
    model = AutoModelForCausalLM.from_pretrained(path)
    for ours, theirs in zip(weights(trained[0]), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_a_checkpoint_says_about_its_run_goes_where_it_goes(tmp_path, trained):
    save(tmp_path / "run", 7, trained, {}).rename(tmp_path / "elsewhere")
    assert read_run(tmp_path / "elsewhere") == RUN
    assert read_run(tmp_path) == {}
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / "tercet.json").write_text(text)
        with pytest.raises(ValueError, match=r"^read_run: .*tercet\.json must be a JSON object"):
            read_run(tmp_path)


def test_everything_comes_back_bit_for_bit(tmp_path, trained):
    before, state = weights(trained[0]), moments(trained[1])
    save(tmp_path, 3, trained, {"told": ["x"]})
    drawn = torch.rand(4)
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert (found.folder.name, found.step, found.state) == ("checkpoint-3", 3, {"told": ["x"]})
    assert said == []
    assert all(map(torch.equal, before, weights(trained[0])))
    assert all(map(torch.equal, state, moments(trained[1])))
    assert torch.equal(drawn, torch.rand(4))


def test_the_optimiser_keeps_its_present_settings(tmp_path, trained):
    save(tmp_path, 1, trained, {})
    policy, _ = trained
    other = torch.optim.AdamW(policy.model.parameters(), lr=5.0, weight_decay=0.5)
    load_latest(tmp_path, policy, other, warn=pytest.fail)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (5.0, 0.5)
    assert all(map(torch.equal, moments(trained[1]), moments(other)))


def test_a_folder_without_checkpoints_gives_none(tmp_path, trained):
    assert restore(tmp_path, trained) == (None, [])


def cut(name):
    def damage(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return damage


def flip(name):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        data[-1] ^= 1
        (path / name).write_bytes(data)

    return damage


def resign(path):
    """Makes the manifest true again."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        data = (path / name).read_bytes()
        entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (path / "manifest.json").write_text(json.dumps(manifest))


def write(name, text):
    def damage(path):
        (path / name).write_text(text)
        if name != "manifest.json":
            resign(path)

    return damage


def list_as(entry):
    def damage(path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"]["optimizer.pt"] = entry
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def remove(name):
    return lambda path: (path / name).unlink()


DAMAGE = {
    "weights cut in half": (cut("model.safetensors"), r"model\.safetensors has \d+ bytes"),
    "optimiser cut in half": (cut("optimizer.pt"), r"optimizer\.pt has \d+ bytes"),
    "one bit flipped": (flip("model.safetensors"), r"model\.safetensors has another checksum"),
    "weights missing": (remove("model.safetensors"), r"model\.safetensors is missing"),
    "manifest missing": (remove("manifest.json"), r"manifest\.json is missing"),
    "manifest cut in half": (cut("manifest.json"), r"manifest\.json cannot be read"),
    **{
        f"manifest {text}": (write("manifest.json", text), r"manifest\.json cannot be read")
        for text in ("[]", "null", '{"files": ["a"]}', '{"files": {}}', "[" * 100_000)
    },
    **{
        f"manifest entry {entry}": (list_as(entry), r"manifest\.json cannot be read")
        for entry in (None, 3, {"size": 3})
    },
    **{
        f"state {text}": (write("trainer_state.json", text), r"state\.json does not hold step 2")
        for text in ("{}", "[]", '{"step": "2"}', '{"step": 1}', '{"step": true}', "{")
    },
    "run cut in half": (write("tercet.json", "{"), r"tercet\.json must be a JSON object"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, trained, kind):
    damage, fault = DAMAGE[kind]
    first, _ = two_checkpoints(tmp_path, trained)
    damage(tmp_path / "checkpoint-2")
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert found.step == 1
    assert found.state == {"told": ["a"]}
    assert all(map(torch.equal, first, weights(trained[0])))
    assert len(said) == 1
    assert "checkpoint-2 is damaged" in said[0]
    assert re.search(fault, said[0])


WRONG = {
    "text": lambda path: path.write_text("hello"),
    "nothing": lambda path: path.write_bytes(b""),
    "list": lambda path: torch.save([1, 2], path),
    "dict": lambda path: torch.save({"a": 1}, path),
    "code": lambda path: torch.save(Path("x"), path),
    "half": lambda path: torch.save(
        {"param_groups": 3, "state": {}, "cpu": torch.ones(2), "cuda": []}, path
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["optimizer.pt", "rng.pt"])
def test_a_file_that_is_something_else_is_named(tmp_path, trained, name, kind):
    path = save(tmp_path, 1, trained, {})
    WRONG[kind](path / name)
    resign(path)
    before = weights(trained[0])
    with pytest.raises(ValueError, match=rf"^load_latest: .*checkpoint-1/{name} must be") as caught:
        load_latest(tmp_path, trained[0], trained[1], warn=pytest.fail)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(map(torch.equal, before, weights(trained[0])))


def test_moments_of_another_model_are_refused(tmp_path, trained):
    path = save(tmp_path, 1, trained, {})
    state = trained[1].state_dict()
    state["state"][0] = state["state"][0] | {"exp_avg_sq": torch.zeros(3)}
    torch.save(state, path / "optimizer.pt")
    resign(path)
    with pytest.raises(ValueError, match=r"optimizer\.pt must be an AdamW state of this model"):
        restore(tmp_path, trained)


def test_only_damaged_checkpoints_is_an_error(tmp_path, trained):
    two_checkpoints(tmp_path, trained)
    for step in (1, 2):
        cut("model.safetensors")(tmp_path / f"checkpoint-{step}")
    with pytest.raises(RuntimeError, match="must hold a whole checkpoint"):
        restore(tmp_path, trained)


def test_latest_decides(tmp_path, trained):
    first, _ = two_checkpoints(tmp_path, trained)
    (tmp_path / "latest").write_text("checkpoint-1\n")
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "checkpoint-2 in " in said[0]
    assert "come after checkpoint-1" in said[0]
    assert all(map(torch.equal, first, weights(trained[0])))


@pytest.mark.parametrize("text", [None, "", "checkpoint-9"], ids=["gone", "empty", "wrong"])
def test_without_a_true_latest_the_newest_is_found(tmp_path, trained, text):
    _, second = two_checkpoints(tmp_path, trained)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_text(text)
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert found.step == 2
    assert "names no checkpoint" in said[0]
    assert all(map(torch.equal, second, weights(trained[0])))


def test_the_oldest_leave(tmp_path, trained):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, trained, {}, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-11",
    ]


def test_a_stop_while_old_ones_are_removed_leaves_no_damaged_one(tmp_path, trained, monkeypatch):
    two_checkpoints(tmp_path, trained)
    save(tmp_path, 8, trained, {})
    remove = os.unlink

    def stop(*args, **kwargs):
        remove(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4, trained, {}, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-?")] == ["checkpoint-4"]
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert (found.step, said) == (4, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "latest"]


@pytest.mark.parametrize("by", ["load", "save"])
def test_leftovers_of_a_kill_are_swept(tmp_path, trained, by):
    save(tmp_path, 1, trained, {})
    own = ("checkpoint-2.tercet.tmp", ".checkpoint-2.tercet.tmp-x1", "checkpoint-1.tercet.old")
    mine = ("checkpoint-5.old", "checkpoint-2.tmp", "checkpoint-best.tercet.tmp")
    files = ("checkpoint-7", "checkpoint-3.tercet.tmp")
    for name in (*own, *mine):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    for name in files:
        (tmp_path / name).write_text("mine")
    if by == "load":
        found, said = restore(tmp_path, trained)
        assert found is not None
        assert (found.step, said) == (1, [])
    else:
        save(tmp_path, 1, trained, {})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(["checkpoint-1", "latest", *mine, *files])


@pytest.mark.parametrize(
    ("limit", "left"), [(1, ["4"]), (2, ["2", "4"]), (None, ["1", "2", "4"])], ids=str
)
def test_what_was_just_saved_stays_and_later_steps_leave(tmp_path, trained, limit, left):
    for step in (1, 2, 8):
        save(tmp_path, step, trained, {})
    (tmp_path / "latest").write_text("checkpoint-2\n")
    path = save(tmp_path, 4, trained, {}, save_total_limit=limit)
    assert find_fault(path) is None
    names = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert names == [f"checkpoint-{step}" for step in left]


def test_a_step_can_be_saved_again(tmp_path, trained):
    two_checkpoints(tmp_path, trained)
    nudge(*trained)
    third = weights(trained[0])
    save(tmp_path, 2, trained, {"told": []})
    found, said = restore(tmp_path, trained)
    assert found is not None
    assert (found.step, said) == (2, [])
    assert all(map(torch.equal, third, weights(trained[0])))


def test_an_error_that_is_not_a_full_disk_stays_itself_and_leaves_nothing(tmp_path, trained):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, trained, {"told": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def expect_full(folder, trained, before):
    """Saving fails with a clear message, and checkpoint-1 is what it was."""
    nudge(*trained)
    with pytest.raises(OSError, match=r"it is full \(\d+ MB free.*save_total_limit") as caught:
        save(folder, 2, trained, {})
    assert str(folder) in str(caught.value)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-1", "latest"]
    found, said = restore(folder, trained)
    assert found is not None
    assert (found.step, said) == (1, [])
    assert all(map(torch.equal, before, weights(trained[0])))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.pt"])
def test_no_file_may_grow_any_more(tmp_path, trained, file):
    """The limit on a file's size stands in for a full disk, just before `file` is complete."""
    first = save(tmp_path, 1, trained, {})
    before = weights(trained[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((first / file).stat().st_size - 1, hard))
    try:
        expect_full(tmp_path, trained, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def small_disk(folder: Path, pages: int) -> bool:
    """Mounts a file system of so many pages of 4 KiB; False where this user may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={4 * pages}k", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("room", [1.1, 1.4, 1.7], ids=lambda r: f"room for {r} checkpoints")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, trained, room):
    """On a real small disk where the user may mount one, else under a limit of file size."""
    probe = save(tmp_path / "probe", 1, trained, {})
    pages = sum(-(-p.stat().st_size // 4096) + 1 for p in probe.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    if not small_disk(disk, round(pages * room)):
        test_no_file_may_grow_any_more(disk, trained, "optimizer.pt")
        return
    try:
        save(disk, 1, trained, {})
        expect_full(disk, trained, weights(trained[0]))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
