"""What the stubs promise is what the compiled module has: names, arguments, defaults, choices."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import tercet
from tercet import Forest, _mcts

STUBS = ast.parse((Path(tercet.__file__).with_name("_mcts.pyi")).read_text())
CLASSES = {node.name: node for node in STUBS.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}
CHOICES = {
    node.target.id: ast.literal_eval(node.value.slice)
    for node in STUBS.body
    if isinstance(node, ast.AnnAssign)
    and isinstance(node.target, ast.Name)
    and isinstance(node.value, ast.Subscript)
}
OWN = {"__init__", "__len__"}  # of what every object has; stubs name these two alone
FROM_KEYWORDS = {"Forest.__init__", "Forest.add_tree"}  # the module's take any


def members(stub: ast.ClassDef) -> set[str]:
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    for node in stub.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def method(name: str) -> ast.FunctionDef:
    where, _, called = name.rpartition(".")
    found = [n for n in CLASSES[where].body if isinstance(n, ast.FunctionDef) and n.name == called]
    assert len(found) == 1
    return found[0]


def arguments(stub: ast.FunctionDef) -> tuple[list[str], dict[str, str]]:
    """Positional names and keyword-only ones with their defaults as written."""
    keyword = zip(stub.args.kwonlyargs, stub.args.kw_defaults, strict=True)
    return [a.arg for a in stub.args.args if a.arg != "self"], {
        a.arg: "" if default is None else ast.unparse(default) for a, default in keyword
    }


def bound(function: Any) -> tuple[list[str], dict[str, str]]:
    """The same of what pybind11 wrote as the first line of a docstring."""
    line = function.__doc__.splitlines()[0]
    inside = line[line.index("(") + 1 : line.rindex(") ->")]
    positional: list[str] = []
    keyword: dict[str, str] = {}
    only = False
    for part in re.split(r", (?=\w+:|\*)", inside):
        if part == "*" or part.startswith("**"):
            only = only or part == "*"
        elif part and not part.startswith("self"):
            name, default = part.split(":")[0], part.rpartition(" = ")[2] if " = " in part else ""
            if only:
                keyword[name] = default
            else:
                positional.append(name)
    return positional, keyword


def literals(annotation: ast.expr | None) -> list[tuple[str, ...]]:
    """The choices that an annotation names."""
    assert annotation is not None
    names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return [CHOICES[name] for name in names if name in CHOICES]


def test_stubs_name_what_the_module_has():
    theirs = {name for name in vars(_mcts) if not name.startswith("_")}
    assert set(CLASSES) | set(FUNCTIONS) == theirs
    assert set(tercet.__all__) <= set(dir(tercet))


@pytest.mark.parametrize("name", CLASSES)
def test_stubs_of_a_class_name_its_members(name):
    stub, cls = CLASSES[name], getattr(_mcts, name)
    if issubclass(cls, Exception):
        assert [base.__name__ for base in cls.__bases__] == [ast.unparse(b) for b in stub.bases]
        return  # attributes are set when one is raised
    own = {each for each in vars(cls) if not each.startswith("_") or each in OWN}
    if name == "TicketKind":
        assert {each.name: each.value for each in cls} == {
            ast.unparse(node.targets[0]): ast.literal_eval(node.value)
            for node in stub.body
            if isinstance(node, ast.Assign)
        }
        return
    if name in ("RewardForm", "Aggregation"):
        own -= {"name", "value"}  # of all enumerations
    assert members(stub) - OWN == own - OWN
    assert ("__len__" in members(stub)) == ("__len__" in own)


@pytest.mark.parametrize(
    "name",
    [
        f"Forest.{node.name}"
        for node in CLASSES["Forest"].body
        if isinstance(node, ast.FunctionDef) and node.name != "settings"
    ],
)
def test_stubs_of_the_forest_have_its_arguments(name):
    positional, keyword = arguments(method(name))
    their_positional, their_keyword = bound(getattr(Forest, name.partition(".")[2]))
    if name in FROM_KEYWORDS:
        keyword = {each: keyword[each] for each in their_keyword}
    assert (positional, keyword) == (their_positional, their_keyword)


def test_stubs_have_every_setting_with_its_default():
    _, keyword = arguments(method("Forest.__init__"))
    settings = Forest().settings
    assert list(keyword) == list(settings)
    for name, default in keyword.items():
        if name == "reward":
            assert repr(settings[name]) == repr(_mcts.RewardConfig())
        else:
            wanted = ast.literal_eval(default)
            assert settings[name] == (list(wanted) if name == "channels" else wanted), name


def test_stubs_of_add_tree_have_every_budget():
    _, keyword = arguments(method("Forest.add_tree"))
    budgets = [name for name, default in keyword.items() if default == "None"]
    assert ["seed", *budgets] == list(keyword)
    assert budgets == [name for name, value in Forest().settings.items() if value is None]
    forest = Forest()
    for name in budgets:
        budget: dict[str, Any] = {name: 1}
        forest.add_tree(1, 1, **budget)
        assert Forest(**budget).settings[name] == 1
        with pytest.raises(ValueError, match=f"Forest: {name} must be > 0, or none, got 0"):
            forest.add_tree(1, 1, **budget | {name: 0})


def test_stubs_name_the_choices_that_the_module_lists():
    chosen = 0
    stub = method("Forest.__init__")
    for argument in stub.args.kwonlyargs:
        for place, choices in enumerate(literals(argument.annotation)):
            bad: list[Any] = ["value", "mean", 1.0]
            bad[place] = "no such"
            value: Any = [tuple(bad)] if argument.arg == "channels" else "no such"
            with pytest.raises(ValueError, match=f"Forest: {argument.arg} must be one of ") as why:
                Forest(**{argument.arg: value})
            assert re.findall(r'"([^"]*)"', str(why.value)) == [*choices, "no such"]
            chosen += 1
    assert chosen == 8
