"""What README.md shows runs, and what it links to is there."""

import json
import re
from pathlib import Path

import pytest

from tercet.engine.cli import COMMANDS
from tercet.engine.demo.tiny import SYSTEM_PROMPT, build_policy, build_tokenizer
from tercet.engine.demo.world import World

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = re.search(r'from_pretrained\("(.*?)"\)', README)
    assert checkpoint is not None
    folder = Path(checkpoint[1])
    build_policy(build_tokenizer(World(0).corpus())).save(folder)  # untaught
    settings = {
        "data": {"system_prompt": SYSTEM_PROMPT, "max_prompt_length": 64},
        "max_completion_length": 14,
    }
    (folder / "tercet.json").write_text(json.dumps({"settings": settings}))
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert len(blocks("python")) == 2
    assert "tensor" in capsys.readouterr().out


def test_words_of_the_readme_are_words_of_the_world():
    known = set(" ".join(World(0).corpus()).lower().split())
    sentences = re.findall(r'^        "(.*)",$', README, flags=re.M)
    assert len(sentences) == 3
    assert {word for s in sentences for word in s.strip(" ?.").split()} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for group, command in re.findall(r"`?tercet (grace|demo) (\w+)", text):
        assert f"{group} {command}" in COMMANDS, f"{page.name} names tercet {group} {command}"
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).exists(), f"{page.name} names {config}"
