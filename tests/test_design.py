"""The map of the house is complete: every module stands in it, and nothing that is gone."""

import re
from pathlib import Path

import mmtune

PACKAGE = Path(mmtune.__file__).parent
DESIGN = Path(__file__).parent.parent / "docs" / "design.md"


def test_every_module_stands_in_the_table_of_what_to_change_where() -> None:
    table = DESIGN.read_text(encoding="utf-8").split("## Where to change what")[1]
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", table)) - {"test_layers.py", "test_design.py"}
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    assert named == {name for name in modules if not name.endswith("__init__.py")}


def test_the_table_is_short() -> None:
    table = DESIGN.read_text(encoding="utf-8").split("## Where to change what")[1]
    assert len([line for line in table.splitlines() if line.startswith("| ")]) - 1 <= 28
