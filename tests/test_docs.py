"""What README.md and docs/ show runs, and what they link to is there."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from tercet.engine.cli import COMMANDS, main
from tercet.engine.demo.config import GraceDemoConfig
from tercet.engine.demo.evidence import SEEDS, markdown
from tercet.engine.demo.grace import GraceDemo
from tercet.engine.demo.results import DemoResults, Reading
from tercet.engine.demo.show import LABELS
from tercet.engine.demo.tiny import SYSTEM_PROMPT, build_policy, build_tokenizer
from tercet.engine.demo.world import World
from tercet.engine.environment import torch_threads
from tercet.engine.files import read_jsonl
from tercet.engine.grace import scratch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def blocks(page: str, language: str = "") -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.S | re.M)
    return [text for name, text in fenced if name == language]


@pytest.fixture
def after_the_demo(tmp_path, monkeypatch):
    """A folder as `make demo` leaves it, but that its model is untaught; MODEL has longer rows."""
    monkeypatch.chdir(tmp_path)
    GraceDemo(GraceDemoConfig(), Console()).write_data()
    demo, checkpoint = Path("runs/demo"), re.search(r'from_pretrained\("(.*?)"\)', README)
    assert checkpoint is not None
    tokenizer = build_tokenizer(World(0).corpus())
    settings = {
        "data": {"system_prompt": SYSTEM_PROMPT, "max_prompt_length": 64},
        "max_completion_length": 14,
    }
    for folder in (demo / "base", Path(checkpoint[1])):
        build_policy(tokenizer).save(folder)
    (folder / "tercet.json").write_text(json.dumps({"settings": settings}))
    sizes = scratch.ScratchModel(vocab_size=512, max_position_embeddings=2048)
    scratch.build_policy(tokenizer, sizes).save(Path("MODEL"))
    Path("configs").symlink_to(ROOT / "configs")
    Path("pairs.jsonl").write_text((demo / "data" / "train.jsonl").read_text())
    with torch_threads(1):
        yield


def shorter(text: str) -> str:
    """Two steps in place of 60 or 100, and fewer tokens."""
    for long, short in {
        r"(max.steps[= ])\d+": r"\g<1>2",
        r"checkpoint-60": "checkpoint-2",
        r"(--max-completion-length) 128": r"\1 4",
    }.items():
        text = re.sub(long, short, text)
    return text


@pytest.mark.parametrize(("page", "number"), [("README.md", 3), ("docs/grace.md", 1)])
def test_python_of_the_pages_runs(after_the_demo, capsys, page, number):
    for block in blocks(page, "python"):
        exec(compile(shorter(block), page, "exec"), {})
    assert len(blocks(page, "python")) == number
    assert "tensor" in (said := capsys.readouterr().out) or "torch.Size([1, 64])" in said
    for shown in re.findall(
        r"^print\(.*\)  # (\(.*)$", "".join(blocks(page, "python")), flags=re.M
    ):
        assert f"{shown}\n" in said


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), [("README.md", 6), ("docs/grace.md", 4)])
def test_commands_of_the_pages_run(after_the_demo, page, number):
    lines = [line for block in blocks(page) for line in block.splitlines()]
    commands = [line.split(maxsplit=1)[1] for line in lines if line.startswith("tercet ")]
    left_out = ("grace_paper", "grace_gsm8k", "--help")  # other data; ends the process
    runs = [line for line in commands if not any(word in line for word in left_out)]
    for line in runs:
        argv = shlex.split(shorter(line))
        argv += ["--train.max-steps", "2"] if "--config" in argv else []
        assert main(argv) == 0, line
    assert len(runs) == number


def test_words_of_the_readme_are_words_of_the_world():
    known = set(" ".join(World(0).corpus()).lower().split())
    sentences = re.findall(r'^        "(.*)",$', README, flags=re.M)
    assert len(sentences) == 3
    assert {word for s in sentences for word in s.strip(" ?.").split()} <= known


def demo_results(seed: int) -> DemoResults:
    """What was kept of a seed last."""
    kept = read_jsonl(ROOT / "bench" / "results" / "demo_grace.jsonl")
    of_seed = [row for row in kept if row["case"] == f"seed {seed}"]
    last = of_seed[-1]
    cpu, cores = last["machine"].rsplit(", ", 1)
    names = [field.name for field in fields(Reading) if field.name != "model"]
    return DemoResults(
        folder="",
        seed=seed,
        pretrain_steps=last["pretrain_steps"],
        pretrain_accuracy=last["pretrain_accuracy"],
        readings=[
            Reading(model=row["side"], **{name: row[name] for name in names})
            for row in of_seed
            if row["machine"] == last["machine"]
        ],
        samples=[],
        seconds=last["seconds"],
        environment={"cpu": cpu, "cpu_cores": int(cores.split()[0]), "commit": last["commit"]},
    )


def test_figures_of_the_demo_are_those_that_were_kept():
    table = markdown([demo_results(seed) for seed in SEEDS])
    assert table in (ROOT / "docs" / "grace.md").read_text()
    shown, seed_0 = ("topic_hit_at_1", "names_topic", "distinct", "mean_cosine"), demo_results(0)
    machine, commit = seed_0.environment["cpu"], str(seed_0.environment["commit"])[:7]
    assert f"{machine}, {seed_0.environment['cpu_cores']} cores, commit {commit};" in README
    for reading in seed_0.readings:
        values = [getattr(reading, name) for name in shown]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        assert f"| {LABELS[reading.model]} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for group, command in re.findall(r"`?tercet (grace|demo) (\w+)", text):
        assert f"{group} {command}" in COMMANDS, f"{page.name} names tercet {group} {command}"
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).exists(), f"{page.name} names {config}"
