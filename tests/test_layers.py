"""Imports point one way: errors < data < models, evaluation, report < training < the door; nothing imports testing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmtune

PACKAGE = Path(mmtune.__file__).parent
LEVEL = {"errors": 0, "data": 1, "models": 2, "evaluation": 2, "report": 2, "training": 3}
DOOR = ""
"""``mmtune/__init__.py``: above every layer."""

HOSTS = ("sentence_transformers", "transformers", "datasets", "accelerate", "torch", "PIL")
MAY_IMPORT_UNDOCUMENTED: frozenset[str] = frozenset({"data/internals.py"})
"""The modules (``"models/host.py"``) that may import underscore names of the packages below mmtune. Each such import
carries a comment with the version that allows its removal."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports, anywhere in it."""
    package = ("mmtune", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer_of(dotted_name: str) -> str:
    """``mmtune.data.rows`` is in ``data``; ``mmtune`` and ``mmtune.finetune`` are the door."""
    part = [*dotted_name.split("."), DOOR][1]
    return part if part in LEVEL or part == "testing" else DOOR


def forbidden(importer: str, imported: str) -> bool:
    if importer == imported:
        return False
    if imported in ("testing", DOOR):
        return imported == "testing" or importer != "testing"
    return importer in LEVEL and LEVEL[imported] >= LEVEL[importer]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    importer = layer_of(".".join(("mmtune", *path.relative_to(PACKAGE).with_suffix("").parts)))
    wrong = [
        f"{path.name}:{line} imports {name}"
        for line, name in imports(path)
        if name.split(".")[0] == "mmtune" and forbidden(importer, layer_of(name))
    ]
    assert not wrong, f"The layers are {LEVEL}, and a layer imports itself and those below it."


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_undocumented_names_of_the_host_stay_in_one_place(path: Path) -> None:
    undocumented = [
        f"{path.name}:{line} imports {name}"
        for line, name in imports(path)
        if name.split(".")[0] in HOSTS and any(part.startswith("_") for part in name.split("."))
    ]
    assert not undocumented or path.relative_to(PACKAGE).as_posix() in MAY_IMPORT_UNDOCUMENTED


def test_every_folder_and_module_has_a_layer() -> None:
    found = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if "__" not in path.name}
    assert found - {"py"} == {*LEVEL, "testing"}


@pytest.mark.parametrize(
    ("importer", "imported", "is_forbidden"),
    [
        ("data", "errors", False),
        ("data", "data", False),
        ("training", "evaluation", False),
        (DOOR, "training", False),
        ("testing", "data", False),
        ("data", "models", True),
        ("models", "evaluation", True),
        ("report", "training", True),
        ("training", DOOR, True),
        (DOOR, "testing", True),
        ("errors", "data", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, is_forbidden: bool) -> None:
    assert forbidden(importer, imported) is is_forbidden
