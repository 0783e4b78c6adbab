"""REGRESSIONS.md names tests that exist, and each of its items has a mutation."""

import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \|(.*)$", (HERE / "REGRESSIONS.md").read_text(), re.M)


def test_named_tests_exist():
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    exist = set(re.findall(r"^def (test_\w+)", sources, re.M))
    named = {name for _, text in ROWS for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 40
    assert named <= exist, f"no longer there: {sorted(named - exist)}"


def test_every_item_has_a_mutation():
    tables = (HERE.parent / "mutations").glob("*.toml")
    files = [file for table in tables for file in tomllib.loads(table.read_text())["file"]]
    last = [mutation[-1] for file in files for mutation in file["mutations"]]
    removed = {item for item in last if isinstance(item, int)}
    wanted = {int(item) for item, text in ROWS if "does not apply" not in text}
    assert len(wanted) == 18
    assert removed == wanted
