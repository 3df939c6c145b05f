"""Imports point one way, and what is private in other packages is touched in one module.

errors, arguments, host < data, models < inference, report < evaluation < serving < training < command_line < the door;
nothing imports testing.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmtune

PACKAGE = Path(mmtune.__file__).parent
LEVEL = {
    "errors": 0,
    "arguments": 1,
    "host": 1,
    "data": 2,
    "models": 2,
    "inference": 3,
    "report": 3,
    "evaluation": 4,
    "serving": 5,
    "training": 6,
    "command_line": 7,
}
DOOR = ""
"""``mmtune/__init__.py``: above every layer."""

HOST_MODULE = "host.py"
"""The one module that may touch what is private in the packages below mmtune."""
WITHOUT_MODELS = ("data", "errors", "arguments", "report")
MODEL_PACKAGES = ("torch", "sentence_transformers", "transformers", "accelerate", "peft")

HOSTS = ("sentence_transformers", "transformers", "datasets", "accelerate", "torch", "PIL")
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
    assert not undocumented or path.relative_to(PACKAGE).as_posix() == HOST_MODULE


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Everything that mmtune itself defines or assigns."""
    names: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls", "dataset")


def foreign_touches(source: str, own: set[str]) -> list[str]:
    """Private attributes that mmtune does not define itself, read, written or named for ``getattr`` and its like."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            names = [part.value for part in node.args if isinstance(part, ast.Constant) and is_private(part.value)]
            found += [f"line {node.lineno}: {name}" for name in names if name not in own]
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            text = ast.unparse(node)
            if text.startswith("vars(") and "'_" in text:
                found.append(f"line {node.lineno}: {text}")
    return found


def test_private_attributes_of_other_packages_stay_in_one_place() -> None:
    own = own_names()
    found = {name_of(path): foreign_touches(path.read_text(encoding="utf-8"), own) for path in MODULES}
    assert found.pop(HOST_MODULE), "the search finds nothing any more"
    assert {name: touches for name, touches in found.items() if touches} == {}


def test_private_methods_of_other_packages_are_overridden_in_one_place() -> None:
    names = [".".join(("mmtune", *Path(name_of(path)).with_suffix("").parts)) for path in MODULES]
    modules = [importlib.import_module(name.removesuffix(".__init__")) for name in names]
    overridden = [
        f"{kind.__name__}.{method} overrides that of {base.__module__}"
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__
        for method in vars(kind)
        if is_private(method) and not method.startswith("_abc")
        for base in kind.__mro__[1:]
        if method in vars(base) and base.__module__.split(".")[0] in HOSTS
    ]
    assert not overridden


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("rows._indices", True),
        ("getattr(model, '_orig_mod', model)", True),
        ("vars(model).pop('_weight_conversions', None)", True),
        ("self._own", False),
        ("part._own", False),
        ("rows.public", False),
        ("name.startswith('_')", False),
    ],
)
def test_the_search_for_private_attributes(source: str, is_found: bool) -> None:
    assert bool(foreign_touches(source, {"_own"})) is is_found


def test_the_layers_without_models_import_none() -> None:
    found = [
        f"{name_of(path)}:{line} imports {name}"
        for path in MODULES
        if Path(name_of(path)).with_suffix("").parts[0] in WITHOUT_MODELS
        for line, name in imports(path)
        if name.split(".")[0] in MODEL_PACKAGES
    ]
    assert not found


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
        ("inference", "data", False),
        ("evaluation", "inference", False),
        ("data", "models", True),
        ("models", "inference", True),
        ("report", "inference", True),
        ("host", "data", True),
        ("inference", "evaluation", True),
        ("report", "training", True),
        ("training", DOOR, True),
        (DOOR, "testing", True),
        ("errors", "data", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, is_forbidden: bool) -> None:
    assert forbidden(importer, imported) is is_forbidden
