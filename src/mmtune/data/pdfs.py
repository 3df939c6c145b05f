"""Pages of PDFs: measured, read and rendered by PDFium when they are used, one at a time.

In a corpus such a page is a short text among the encoded images, which names the content of its file, the page, and
then how it is read; the path beside it says where the file lay. So one file under two names holds the same pages, at
any size, and rows carry no pixels.
"""

import atexit
import importlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from mmtune.arguments import item_of, name_item
from mmtune.errors import ImageDecodeError, MissingExtraError

_START = b"%mmtune-pdf-page "
LONGEST_REFERENCE = 4096
"""In bytes, what ``PdfPage.encode`` gives at most: what is longer is an image."""
_POINTS_PER_INCH, _MOST_DPI = 72, 300
_MOST_OPEN = 8
_CHUNK_BYTES = 1 << 20
_NEEDS_PASSWORD = 4
# No pages are a success to PDFium, so that the code is that of the file before.
_DAMAGED = "it is no PDF, is damaged, or has no pages"
_REASONS = {
    0: _DAMAGED,
    2: "it can't be opened",
    3: _DAMAGED,
    _NEEDS_PASSWORD: "it is encrypted: pass its password in passwords=",
    5: "it is encrypted in a way that PDFium does not know",
}
"""By error codes of PDFium (fpdfview.h)."""

_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class PdfPage:
    """One page of one file, as a corpus holds it.

    Attributes:
        file_digest: Of the bytes of the file.
        page_number: From 1.
        max_pixels: Upper bound of width times height where nobody asks for less.
        password: Of an encrypted file.
    """

    file_digest: str
    page_number: int
    max_pixels: int
    password: str | None = None

    def encode(self) -> bytes:
        """The page in place of the bytes of an image."""
        how = {"max_pixels": self.max_pixels} | ({} if self.password is None else {"password": self.password})
        return _START + f"{self.file_digest} {self.page_number} {json.dumps(how, sort_keys=True)}".encode()

    @classmethod
    def decode(cls, content: Any) -> "PdfPage":
        """The page that ``encode`` gave.

        Raises:
            ValueError: It is none.
        """
        try:
            file_digest, page_number, how = bytes(content[len(_START) :]).decode().split(" ", 2)
            return cls(file_digest, int(page_number), **json.loads(how))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the reference to a page of a PDF is damaged: {error}") from None


def is_pdf_page(content: Any) -> bool:
    """Whether what stands in place of the bytes of an image names a page of a PDF."""
    return content is not None and len(content) <= LONGEST_REFERENCE and bytes(content[: len(_START)]) == _START


def name_page(reference: Any) -> bytes:
    """Of what ``PdfPage.encode`` gave the part that names file and page, whatever the page is read at."""
    return b" ".join(bytes(reference).split(b" ", 3)[:3])


def name_file(reference: Any) -> bytes:
    """Of what ``PdfPage.encode`` gave the part that names the content of the file."""
    return b" ".join(bytes(reference).split(b" ", 2)[:2])


@dataclass(frozen=True)
class PdfFile:
    """What is known of a file that opens.

    Attributes:
        digest: Of its bytes.
        num_pages: How many pages it says that it has.
        password: What it opens with; ``None`` where it needs none.
    """

    digest: str
    num_pages: int
    password: str | None


def require_pdfium() -> None:
    """Make sure that pages can be read.

    Raises:
        MissingExtraError: pypdfium2 is not installed.
    """
    _pdfium()


def inspect_pdf(path: str, password: str | None = None) -> PdfFile:
    """What is known of a file.

    Args:
        path: Of the file.
        password: Tried where the file does not open without one.

    Raises:
        ValueError: It can't be read as a PDF, or has no pages; the message says why.
    """
    digest = _DOCUMENTS.digest(path)
    try:
        return PdfFile(digest, _DOCUMENTS.count_pages(path, None), None)
    except _PasswordNeededError:
        if password is None:
            raise
    try:
        return PdfFile(digest, _DOCUMENTS.count_pages(path, password), password)
    except _PasswordNeededError:
        raise ValueError("it is encrypted, and the password of passwords= does not open it") from None


def read_text_layer(path: str, page_number: int, password: str | None) -> str | None:
    """The text of a page, ``None`` where it has none, as a scan.

    Raises:
        ValueError: The page can't be loaded.
    """
    with _DOCUMENTS.page(path, page_number, password) as page:
        text_page = page.get_textpage()
        try:
            text = text_page.get_text_bounded()
        finally:
            text_page.close()
    # PDFium writes U+FFFE for a hyphen at the end of a line, and NUL for a glyph that it can't name.
    text = text.replace("\r\n", "\n").replace("\ufffe", "").replace("\x00", "").strip()
    return text or None


def measure_page(page: PdfPage, path: str, document_id: str) -> tuple[int, int]:
    """Width and height of a page where nobody asks for less than its ``max_pixels``, at 300 dpi at most.

    Raises:
        ImageDecodeError: The file is gone or has changed, or the page can't be loaded.
        MissingExtraError: pypdfium2 is not installed.
    """
    with _naming(page, path, document_id), _DOCUMENTS.page(path, page.page_number, page.password, page) as opened:
        return _full_size(opened, page.max_pixels)


def render_page(
    page: PdfPage, path: str, document_id: str, choose_size: Callable[[tuple[int, int]], tuple[int, int]]
) -> Image.Image:
    """A page as an RGB image, with the values of its forms.

    Args:
        page: What is rendered.
        path: Where its file lies.
        document_id: Named in errors.
        choose_size: From the size of ``measure_page`` to the size to render at.

    Raises:
        ImageDecodeError: The file is gone or has changed, or the page can't be loaded.
        MissingExtraError: pypdfium2 is not installed.
    """
    with _naming(page, path, document_id), _DOCUMENTS.page(path, page.page_number, page.password, page) as opened:
        width, height = choose_size(_full_size(opened, page.max_pixels))
        return _render(opened, width, height)


def _full_size(opened: Any, max_pixels: int) -> tuple[int, int]:
    points = max(opened.get_width(), 1e-3), max(opened.get_height(), 1e-3)
    scale = min((max_pixels / (points[0] * points[1])) ** 0.5, _MOST_DPI / _POINTS_PER_INCH)
    width, height = (max(1, int(side * scale)) for side in points)
    # A strip a pixel wide keeps that pixel and must be shortened more than the scale says.
    width = min(width, max_pixels)
    return width, min(height, max(1, max_pixels // width))


def _render(opened: Any, width: int, height: int) -> Image.Image:
    # Not by PdfPage.render, which takes a scale and rounds the sides up: beyond what was asked for.
    raw = _pdfium().raw
    bitmap = _pdfium().PdfBitmap.new_native(width, height, format=raw.FPDFBitmap_BGR, rev_byteorder=True)
    try:
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        options = bitmap, opened, 0, 0, width, height, 0, raw.FPDF_ANNOT | raw.FPDF_REVERSE_BYTE_ORDER
        raw.FPDF_RenderPageBitmap(*options)
        if opened.formenv:
            raw.FPDF_FFLDraw(opened.formenv, *options)
        return bitmap.to_pil().copy()
    finally:
        bitmap.close()


@contextmanager
def _naming(page: PdfPage, path: str, document_id: str) -> Iterator[None]:
    """Errors of reading a page as those of a document."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:
        if isinstance(error, MissingExtraError):
            raise
        raise ImageDecodeError(
            f"{name_item(document_id)} can't be rendered (page {page.page_number} of {path!r}): {error}. Restore the "
            f"file and build the dataset again with from_pdfs, or leave the {item_of(document_id)} out."
        ) from error


class _PasswordNeededError(ValueError):
    """A file does not open without a password, or not with this one."""


class _Documents:
    """The files that this process holds open. PDFium is not thread-safe: all is done under one lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._opened: OrderedDict[tuple[str, str | None], tuple[_Stamp, Any]] = OrderedDict()
        self._digests: dict[str, tuple[_Stamp, str]] = {}
        self._inherited: list[Any] = []
        self._is_known = False

    def _make_known(self) -> None:
        """Have files closed at the end, before pypdfium2 complains of them, and forks wait for the page at hand."""
        self._is_known = True
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):

            def wait() -> None:
                self.lock.acquire()  # by its name: a child has another one

            def go_on() -> None:
                self.lock.release()

            os.register_at_fork(before=wait, after_in_parent=go_on, after_in_child=self.start_anew)

    def close(self) -> None:
        """Close all files, as at the end of the process."""
        with self.lock:
            while self._opened:
                self._opened.popitem()[1][1].close()

    def start_anew(self) -> None:
        """After a fork: what the parent holds open has one place in the file for both, and is never touched again."""
        self._inherited += self._opened.values()
        self._opened.clear()
        self.lock = threading.RLock()

    def digest(self, path: str) -> str:
        """Of the bytes of a file, read again only where its size or time has changed.

        Raises:
            ValueError: The file can't be read.
        """
        try:
            stamp = _stamp(path)
            if not stamp[0]:
                raise ValueError("it is empty")
            known = self._digests.get(path)
            if known is None or known[0] != stamp:
                digest = xxhash.xxh3_128()
                with Path(path).open("rb") as file:
                    while chunk := file.read(_CHUNK_BYTES):
                        digest.update(chunk)
                known = self._digests[path] = stamp, digest.hexdigest()
            return known[1]
        except OSError as error:
            raise ValueError(f"it can't be read: {error.strerror or error}") from error

    def count_pages(self, path: str, password: str | None) -> int:
        """How many pages a file has.

        Raises:
            ValueError: It can't be opened, or has none.
        """
        with self.lock:
            count = len(self._open(path, password))
        if not count:
            raise ValueError("it has no pages")
        return count

    @contextmanager
    def page(self, path: str, page_number: int, password: str | None, expected: PdfPage | None = None) -> Iterator[Any]:
        """A loaded page, for as long as the block runs.

        Raises:
            ValueError: The file can't be opened, has another content than expected, or the page can't be loaded.
        """
        if expected is not None and self.digest(path) != expected.file_digest:
            raise ValueError("the file has changed since the dataset was built")
        pdfium = _pdfium()
        with self.lock:
            document = self._open(path, password)
            try:
                page = document.get_page(page_number - 1)
            except pdfium.PdfiumError as error:
                raise ValueError(f"the page can't be loaded ({error})") from error
            try:
                yield page
            finally:
                page.close()

    def _open(self, path: str, password: str | None) -> Any:
        """The document, from those that are open where the file is as it was."""
        if not self._is_known:
            self._make_known()
        stamp, key = _stamp(path), (path, password)
        opened = self._opened.pop(key, None)
        if opened is not None and opened[0] != stamp:
            opened[1].close()
            opened = None
        if opened is None:
            opened = stamp, _load_document(path, password)
        self._opened[key] = opened
        while len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)[1][1].close()
        return opened[1]


_DOCUMENTS = _Documents()


def _load_document(path: str, password: str | None) -> Any:
    pdfium = _pdfium()
    try:
        document = pdfium.PdfDocument(Path(path), password=password)
        # Right after opening, or the values in forms are not drawn.
        document.init_forms()
    except pdfium.PdfiumError as error:
        code = getattr(error, "err_code", None) or 0
        kind = _PasswordNeededError if code == _NEEDS_PASSWORD else ValueError
        raise kind(_REASONS.get(code, f"PDFium says: {error}")) from error
    return document


def _stamp(path: str) -> _Stamp:
    found = Path(path).stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


@cache
def _pdfium() -> Any:
    """The package, which is an extra."""
    try:
        return importlib.import_module("pypdfium2")
    except ImportError as error:
        raise MissingExtraError(
            "Pages of PDFs need pypdfium2, which is not installed. Run: pip install pypdfium2 (in a clone of mmtune: "
            'pip install ".[pdf]")'
        ) from error
