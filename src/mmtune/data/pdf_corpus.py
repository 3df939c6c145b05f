"""From files, folders and globs of PDFs to the tables of a dataset, and from pages of PDFs to files of images."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from mmtune.arguments import nearest_name, require_mapping, require_one_of, require_path, require_whole
from mmtune.data.arrow import column, table_dataset, with_columns, with_encoded_images
from mmtune.data.images import EncodedImages, decode_page
from mmtune.data.page_queries import find_table, read_page_queries, resolve_page_queries
from mmtune.data.pdfs import PdfPage, inspect_pdf, read_text_layer, require_pdfium
from mmtune.data.tables import Tables, check_tables
from mmtune.errors import DatasetError

logger = logging.getLogger(__name__)

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class PdfSource:
    """A file and the name that the dataset has for it.

    Attributes:
        path: Absolute.
        name: The name of the file, with as many folders before it as tell it from the others.
    """

    path: Path
    name: str


def build_from_pdfs(
    paths: Paths,
    queries: Any = None,
    *,
    max_pixels: int = 1_500_000,
    store: str | os.PathLike[str] | None = None,
    passwords: str | Mapping[str, str] | None = None,
    on_bad_file: str = "report",
) -> Tables:
    """One document a page; see ``RetrievalDataset.from_pdfs``."""
    max_pixels = require_whole("max_pixels", max_pixels)
    require_one_of("on_bad_file", on_bad_file, ("report", "error"))
    if store is not None:
        require_path("store", store)
    if passwords is not None and not isinstance(passwords, str):
        require_mapping("passwords", passwords, expected="one password for all, or passwords by file name", of=str)
    require_pdfium()
    files, folders = find_pdfs(paths)
    sources = name_sources(files)
    given = [(None, queries)] if queries is not None else [(folder, find_table(folder)) for folder in folders]
    rows = [row for folder, table in given if table is not None for row in read_page_queries(table, folder)]

    columns, num_pages, unreadable = _read_pages(sources, max_pixels, passwords)
    names = {source.path: source.name for source in sources}
    asked = resolve_page_queries(rows, names, num_pages, {name for name, _ in unreadable})
    _report(unreadable, len(sources), asked.num_unreadable, on_bad_file)
    if not len(columns["document_id"]):
        raise DatasetError(f"No page of {len(sources)} PDFs can be read, e.g. {': '.join(unreadable[0])}.")
    corpus = with_encoded_images(table_dataset(columns), "image")
    if store is not None:
        corpus = store_pages(corpus, store)
    notes = replace(asked.notes, unreadable_sources=tuple(unreadable))
    return check_tables(corpus, asked.queries, asked.qrels, notes=notes)


def find_pdfs(paths: Paths) -> tuple[list[Path], list[Path]]:
    """The files, each once, and the folders among what was given.

    Args:
        paths: Files, folders (all PDFs below them), or globs.

    Raises:
        DatasetError: Something does not exist, or there is no PDF.
        ConfigError: It is no path.
    """
    advice = "Pass e.g. paths='reports/' or paths=['a.pdf', 'b.pdf']."
    given = [paths] if isinstance(paths, (str, os.PathLike)) or not isinstance(paths, Iterable) else list(paths)
    files: dict[Path, None] = {}
    folders: dict[Path, None] = {}
    for each in given:
        require_path("paths", each, what="a PDF or of a folder of PDFs", advice=advice)
        for path in _expand(os.fspath(each)):
            found = [path]
            if path.is_dir():
                folders[path] = None
                found = _list_pdfs(path)
            files |= dict.fromkeys(found)
    if not files:
        raise DatasetError(f"There is no PDF in paths={paths!r:.200}: files are found by the ending '.pdf'. {advice}")
    return list(files), list(folders)


def _list_pdfs(folder: Path) -> list[Path]:
    """All PDFs below a folder, sorted."""

    def refuse(error: OSError) -> None:
        # Path.rglob would leave the folder out without a word
        raise DatasetError(
            f"The folder {error.filename!r} can't be read: {error.strerror}. Mend its permissions, or pass the other "
            "folders and files alone."
        ) from error

    return [file for file in list_files(folder, refuse) if file.suffix.lower() == ".pdf"]


def list_files(folder: Path, onerror: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files below a folder, sorted, also in folders that are links.

    Args:
        folder: Where to look.
        onerror: Takes what a folder can't be listed for; ``None`` leaves such a folder out.
    """
    found: list[Path] = []
    seen: set[str] = set()
    links = [folder]
    # Links last: a link to what lies in the folder anyway, or back up to it, then adds no second name.
    while links:
        for root, folders, names in os.walk(links.pop(0), onerror=onerror):
            if (real := os.path.realpath(root)) in seen:
                folders.clear()
                continue
            seen.add(real)
            found += (Path(root, name) for name in names)
            links += sorted(link for name in folders if (link := Path(root, name)).is_symlink())
    # a link to nothing is listed, and then named among what can't be read
    return sorted(file for file in found if file.is_file() or not file.exists())


def _expand(path: str) -> list[Path]:
    """The absolute paths of a file, a folder or a glob."""
    # not resolved: a link keeps the name that it has
    absolute = Path(os.path.normpath(Path(path).expanduser().absolute()))
    try:
        found = [absolute] if absolute.exists() else sorted(Path(absolute.anchor).glob(str(Path(*absolute.parts[1:]))))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path!r:.200} can't be the path of PDFs: {error}.") from error
    if not found:
        near = absolute.parent
        entries = sorted(entry.name for entry in near.iterdir()) if near.is_dir() else []
        alike = nearest_name(absolute.name, entries, cutoff=0.6)
        hint = f" Did you mean {str(near / alike)!r}?" if alike else ""
        raise DatasetError(
            f"The path {path!r} does not exist, and as a glob it matches nothing. Expected a PDF, a folder of PDFs, or "
            f"a glob such as 'reports/**/*.pdf'.{hint}"
        )
    return found


def name_sources(files: Sequence[Path]) -> list[PdfSource]:
    """The files with names that differ: where they clash, with as many folders before them as it takes."""
    clashing: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        clashing[path.name].append(path)
    names: dict[Path, str] = {}
    for group in clashing.values():
        depth = 1
        while len({path.parts[-depth:] for path in group}) < len(group):
            depth += 1
        names |= {path: str(Path(*path.parts[-depth:])) for path in group}
    return [PdfSource(path, names[path]) for path in files]


def _read_pages(
    sources: Sequence[PdfSource], max_pixels: int, passwords: str | Mapping[str, str] | None
) -> tuple[dict[str, pa.Array], dict[str, int], list[tuple[str, str]]]:
    """The columns of the corpus, the pages of each file, and what can't be read: a file's or a page's name, and why."""
    rows: list[tuple[str, dict[str, Any], str | None, str, int]] = []
    num_pages: dict[str, int] = {}
    unreadable: list[tuple[str, str]] = []
    for source in tqdm(sources, desc="Reading PDFs", leave=False, delay=1):
        path = str(source.path)
        try:
            # what Arrow can't hold could not be asked for
            path.encode()
            file = inspect_pdf(path, _password_of(source, passwords))
        except ValueError as error:
            why = "its name is no UTF-8: rename it" if isinstance(error, UnicodeEncodeError) else str(error)
            unreadable.append((source.name.encode(errors="replace").decode(), why))
            continue
        num_pages[source.name] = file.num_pages
        for page_number in range(1, file.num_pages + 1):
            document_id = f"{source.name}#{page_number}"
            try:
                text = read_text_layer(path, page_number, file.password)
            except ValueError as error:
                unreadable.append((document_id, str(error)))
                continue
            content = PdfPage(file.digest, page_number, max_pixels, file.password).encode()
            rows.append((document_id, {"bytes": content, "path": path}, text, source.name, page_number))
    ids, images, texts, names, numbers = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "document_id": pa.array(ids, pa.string()),
        "image": pa.array(images, image_type),
        "text": pa.array(texts, pa.string()),
        "source": pa.array(names, pa.string()),
        "page_number": pa.array(numbers, pa.int64()),
    }
    return columns, num_pages, unreadable


def _password_of(source: PdfSource, passwords: str | Mapping[str, str] | None) -> str | None:
    """The password of a file: by its path, its name in the dataset, or its own name."""
    if passwords is None or isinstance(passwords, str):
        return passwords
    return next((passwords[key] for key in (str(source.path), source.name, source.path.name) if key in passwords), None)


def _report(unreadable: Sequence[tuple[str, str]], num_files: int, num_judged: int, on_bad_file: str) -> None:
    """Say what can't be read, by name.

    Raises:
        DatasetError: There is something, and ``on_bad_file="error"``.
    """
    if not unreadable:
        return
    message = f"{len(unreadable)} files or pages of {num_files} PDFs can't be read:" + "".join(
        f"\n  {name}: {why}" for name, why in unreadable
    )
    if on_bad_file == "error":
        raise DatasetError(f'{message}\nRepair or remove them, or pass on_bad_file="report" to leave them out.')
    asked = f", with {num_judged} rows of queries about them" if num_judged else ""
    logger.warning("%s\nThey are left out%s; dataset.audit() counts them.", message, asked)


def store_pages(corpus: Dataset, folder: str | os.PathLike[str], *, id_column: str = "document_id") -> Dataset:
    """A corpus with files of images in place of pages of PDFs; other images stay as they are.

    A page is rendered once, by the content of its file, its number and its size: what the folder holds is not rendered
    again. A file appears there when it is whole, and only one process at a time renders the pages of one PDF.

    Args:
        corpus: Any corpus, or queries.
        folder: For PNG files; made where it does not exist.
        id_column: The column of ids, for errors.

    Raises:
        DatasetError: A file can't be written.
        ImageDecodeError: A page can't be rendered; the message names the document.
    """
    if "image" not in corpus.column_names:
        return corpus
    images, root = EncodedImages(corpus), Path(folder).absolute()
    if not len(images.pdf_rows):
        return corpus
    document_ids = column(corpus, id_column)
    pages = [PdfPage.decode(images.read(int(row))) for row in images.pdf_rows]
    rows_by_file: defaultdict[str, list[int]] = defaultdict(list)
    for at, page in enumerate(pages):
        rows_by_file[page.file_digest].append(at)
    files = [root / page.file_digest / f"{page.page_number}-{page.max_pixels}.png" for page in pages]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(files), desc="Rendering pages", leave=False, delay=1) as bar:
            for digest in _take_turns(root, list(rows_by_file)):
                for at in rows_by_file[digest]:
                    if not files[at].exists():
                        row = int(images.pdf_rows[at])
                        _write_page(images.encoded(row), document_ids[row].as_py(), files[at])
                    bar.update()
    except OSError as error:
        raise DatasetError(
            f"Pages can't be written to {str(folder)!r}: {error.strerror or error}. What was rendered stays there. "
            "Make room or mend the permissions and call again, or name another folder."
        ) from error
    return _with_files(corpus, images.pdf_rows, [str(file) for file in files])


def _write_page(encoded: Mapping[str, Any], document_id: str, file: Path) -> None:
    page = decode_page(encoded, document_id)
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        page.save(partial, "PNG")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _take_turns(root: Path, digests: Sequence[str]) -> Iterator[str]:
    """Each file while no other process renders it: those that are free, and then those that were not."""
    busy: list[str] = []
    for timeout, waiting in ((0, digests), (-1, busy)):
        for digest in waiting:
            try:
                # held by the process, so that one that was killed holds nothing
                with FileLock(root / f"{digest}.lock", timeout=timeout):
                    yield digest
            except Timeout:
                busy.append(digest)


def _with_files(corpus: Dataset, rows: np.ndarray, files: Sequence[str]) -> Dataset:
    """The corpus with the images of some rows in files; the others are not copied."""
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    structs = pa.array([{"bytes": None, "path": file} for file in files], image_type)
    others = corpus.select(rows).remove_columns("image")
    changed = with_encoded_images(with_columns(others, {"image": structs}), "image").select_columns(corpus.column_names)
    if len(rows) == len(corpus):
        return changed
    kept = np.setdiff1d(np.arange(len(corpus)), rows)
    return concatenate_datasets([changed, corpus.select(kept)]).select(np.argsort(np.concatenate([rows, kept])))
