"""The Sphinx configuration. Build with `make docs`; warnings are errors there, and nothing is fetched."""

from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "mmtune"
author = "The mmtune contributors"
copyright = "2026, " + author  # noqa: A001, RUF100 - Sphinx reads this name
release = installed_version("mmtune")
version = ".".join(release.split(".")[:2])

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Markdown pages: definition lists for the glossary, anchors on headings down to the third level.
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

# The types stand in the signatures, and nowhere else.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# As plain text: napoleon would take what stands before a colon for a type, and ours are in the signature.
napoleon_custom_sections = ["Returns"]
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"mmtune {release}"


def tables_as_directives(*event: Any) -> None:
    """Rewrite the Markdown tables of a docstring, which help() shows well, as what docutils reads; in place."""
    lines: list[str] = event[-1]
    source, lines[:] = list(lines), []
    in_table = False
    for line in source:
        indent, content = line[: len(line) - len(line.lstrip())], line.strip()
        is_row = len(content) > 1 and content[0] == content[-1] == "|"
        if is_row and not in_table:
            lines += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        if is_row and not set(content) <= set("|-: "):
            cells = [cell.strip() for cell in content[1:-1].split("|")]
            lines += [f"{indent}   {'* -' if k == 0 else '  -'} {cell}" for k, cell in enumerate(cells)]
        if not is_row:
            lines += ["", line] if in_table else [line]
        in_table = is_row


def setup(app: Sphinx) -> None:
    """Connect the hook after napoleon, which reads the sections of a docstring at the default priority of 500."""
    app.connect("autodoc-process-docstring", tables_as_directives, priority=600)
