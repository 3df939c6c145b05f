"""The code in README and docs runs, and so do the examples in docstrings.

Each file's Python blocks run in order in one namespace: those of the pages that a newcomer reads first in an empty
folder, the others in one that holds what their reader would have:

    my-model         a checkpoint (here a tiny random CLIP)
    my-vlm           a VLM that was not made for embeddings (here a tiny random LLaVA)
    pages.parquet    one row per page: id, query, image, negatives
    page.png         a page as a file

A block that needs the Hub or a GPU is fenced as ``python no-run``.
"""

import doctest
import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmtune
from conftest import TORCHVISION_WORKS
from mmtune.testing import generated_pages, tiny_clip, tiny_llava

PROJECT = Path(__file__).parent.parent
PACKAGE = Path(mmtune.__file__).parent
BLOCK = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
TUTORIALS = ("audio_tutorial.md", "video_tutorial.md")
AS_THEY_STAND = ("README.md", "index.md", "quickstart.md", "pdfs.md", "layouts.md", *TUTORIALS)
"""Their code makes what it needs."""
NO_RUN_AT_MOST = 2
"""How many blocks of all pages may stay unrun: code that is not run goes stale."""


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """First line, options and code of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("code")) + 1, match["options"].strip(), match["code"])
        for match in BLOCK.finditer(text)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    rows = generated_pages(48)
    rows.to_parquet(folder / "pages.parquet")
    rows[0]["image"].save(folder / "page.png")
    tiny_clip(folder / "my-model")
    tiny_llava(folder / "my-vlm")
    return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of the prepared folder, as the current directory."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.relative_to(PROJECT).as_posix()
)
def test_code_blocks_run(
    page: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page.name == "video_tutorial.md" and not TORCHVISION_WORKS:
        pytest.skip("models of clips need torchvision, which is not installed")
    if page.name in AS_THEY_STAND:
        monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    namespace = {"__name__": "__docs__"}
    for line, options, code in blocks(page):
        if options == "no-run":
            continue
        # Empty lines in front give errors the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_blocks_are_fenced_in_a_known_way() -> None:
    options = [option for page in PAGES for _, option, _ in blocks(page)]
    assert set(options) <= {"", "no-run"}
    assert options.count("no-run") <= NO_RUN_AT_MOST


def modules_with_examples() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = ("mmtune", *path.relative_to(PACKAGE).with_suffix("").parts)
            yield ".".join(parts).removesuffix(".__init__")


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_docstring_examples_run(name: str, workplace: Path) -> None:
    module = importlib.import_module(name)
    assert any(found.examples for found in doctest.DocTestFinder().find(module)), "examples that doctest does not find"
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not outcome.failed, "doctest printed the difference above"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
