"""Encoded images: read where they lie, checked, and in one place made into pixels."""

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from mmtune.arguments import item_of, name_item, require_whole, require_wholes
from mmtune.data.arrow import column, stored_image_column
from mmtune.data.pdfs import LONGEST_REFERENCE, PdfPage, is_pdf_page, measure_page, name_page, render_page
from mmtune.errors import ConfigError, ImageDecodeError, MediaDecodeError

MAX_DECODED_PIXELS = 2 * 89_478_485
"""Pages above this are refused as decompression bombs; the same bound at which Pillow raises."""

MAX_FILE_BYTES = 1 << 30
"""Files above this are not read: more than the pixels that are decoded take. Of sounds and clips a part is decoded, so
that nothing limits their files."""

WHAT = {"image": "an image", "audio": "a sound", "video": "a clip"}
"""What a file is said to be, by the column that it stands in."""

DECODING = 2
"""Raise it when the same bytes become other pixels: what is stored of a page is then made anew."""

ENOUGH_PIXELS = 8_000_000
"""What a huge JPEG may be scaled down to: an A4 page at 300 dpi, beyond any encoder's input."""

Enough: TypeAlias = int | tuple[int, int]
"""What a JPEG may be scaled down to by its own decoder, and what a page of a PDF is rendered at: a number of pixels, or
a width and a height of at least."""

InputSize: TypeAlias = int | tuple[int, int]
"""What a model reads a page at: a width and a height, or a largest number of pixels where it keeps a page's shape."""

_ENOUGH_SIDES, _ENOUGH_AREA = 2.5, 1.5
"""A decoder may leave 2.5 times the sides of a fixed input, or 1.5 times the area of a limit: seen from the mean page,
embeddings of scanned receipts then keep a cosine of 0.985 to those of whole pages at worst (benchmarks/RESULTS.md)."""

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
_HEADER_BYTES = 1 << 16
_TAIL_BYTES = 64
_END_BY_FORMAT = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def enough_for(input_size: InputSize | None) -> Enough:
    """What a JPEG may be scaled down to for a model; ``None`` for a model that is not known."""
    if input_size is None:
        return ENOUGH_PIXELS
    if isinstance(input_size, tuple):
        return (math.ceil(_ENOUGH_SIDES * input_size[0]), math.ceil(_ENOUGH_SIDES * input_size[1]))
    return int(_ENOUGH_AREA * input_size)


def require_input_size(input_size: object) -> InputSize:
    """``input_size`` in Python's integers.

    Raises:
        ConfigError: It is neither a width and a height nor a number of pixels.
    """
    if not isinstance(input_size, (tuple, list)):
        return require_whole("input_size", input_size, or_else="(width, height)")
    sides = require_wholes("input_size", input_size)
    if len(sides) != 2:
        raise ConfigError(f"input_size={input_size!r}: expected (width, height), or a largest number of pixels.")
    return sides[0], sides[1]


def decode_page(
    encoded: Mapping[str, Any] | None,
    document_id: str,
    *,
    max_pixels: int | None = None,
    at_least: tuple[int, int] = (1, 1),
    enough: Enough | None = None,
) -> Image.Image:
    """The page as an upright RGB image: the one place where what is encoded becomes pixels.

    A page of a PDF is rendered at the size that is asked for. Of an image EXIF orientation is applied, transparency is
    laid on white, 16-bit grey is scaled to 8 bits, and of several frames the first is taken, with a warning.

    Args:
        encoded: A row of an ``Image(decode=False)`` column: ``{"bytes": bytes | None, "path": str | None}``.
        document_id: Named in errors.
        max_pixels: Upper bound of width times height. A larger page is scaled down with its aspect ratio; a JPEG is
            then decoded at a fraction of its size, which is faster. ``None`` keeps every pixel.
        at_least: Width and height that ``max_pixels`` leaves, where the page has them.
        enough: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least as much, and a page of a PDF
            is rendered with as much; nothing else is scaled. ``None`` decodes it whole.

    Raises:
        ImageDecodeError: There is nothing to read, it is no image, it is damaged, or it has more than
            ``MAX_DECODED_PIXELS`` pixels; or the PDF of a page is gone or has changed.
    """
    if (pdf_page := _pdf_page(encoded, document_id)) is not None:
        choose_size = partial(_size_to_render, max_pixels, at_least, enough)
        return render_page(*pdf_page, document_id, choose_size)
    with _opened(encoded, document_id) as image:
        _check_size(image, document_id)
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            warnings.warn(
                f"{name_item(document_id)} holds {frames} frames; only the first is used. "
                "Give each page a row of its own to use all of them.",
                stacklevel=2,
            )
        # Bounds are of the upright page, and a draft is of the image as it lies in the file.
        on_its_side = _lies_on_its_side(image)
        upright = _turn(image.size, on_its_side)
        # Of the file's own size: a draft rounds, and rounding twice would change the aspect of small pages.
        size = _fit_within(upright, max_pixels, at_least) if max_pixels is not None else upright
        wanted = max_pixels or enough
        if isinstance(wanted, tuple):
            image.draft(image.mode, _turn(wanted, on_its_side))
        elif wanted is not None:
            image.draft(image.mode, _fit_within(image.size, wanted, _turn(at_least, on_its_side)))
        ImageOps.exif_transpose(image, in_place=True)
        page = _convert_to_rgb(image)
    if max_pixels is None or page.width * page.height <= max_pixels:
        return page
    return page.resize(size, Image.Resampling.BICUBIC)


def stored_size(encoded: Mapping[str, Any] | None, document_id: str) -> tuple[int, int]:
    """Width and height of a page as it is stored, upright, from its header.

    Args:
        encoded: As for ``decode_page``.
        document_id: Named in errors.

    Raises:
        ImageDecodeError: There is no header to read.
    """
    if (pdf_page := _pdf_page(encoded, document_id)) is not None:
        return measure_page(*pdf_page, document_id)
    with _opened(encoded, document_id) as image:
        return _turn(image.size, _lies_on_its_side(image))


def _turn(size: tuple[int, int], on_its_side: bool) -> tuple[int, int]:
    return size[::-1] if on_its_side else size


def _lies_on_its_side(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE


@contextmanager
def _opened(encoded: Mapping[str, Any] | None, document_id: str) -> Iterator[Image.Image]:
    """The image, for as long as the block runs, whose errors are those of the document."""
    encoded = encoded or {}
    content = encoded.get("bytes")
    if content is None and not encoded.get("path"):
        raise missing_content(document_id)
    if content is None:
        require_file(str(encoded["path"]), document_id)
    try:
        with Image.open(io.BytesIO(content) if content is not None else str(encoded["path"])) as image:
            yield image
    except ImageDecodeError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything from inside a codec
        found = f"file {encoded['path']!r}" if content is None else f"{len(content)} bytes, starting {content[:8]!r}"
        raise ImageDecodeError(
            f"{name_item(document_id)} can't be decoded as an image ({found}): {error}. "
            f"Replace the file, or leave the {item_of(document_id)} out."
        ) from error


def _pdf_page(encoded: Mapping[str, Any] | None, document_id: str) -> tuple[PdfPage, str] | None:
    """The page of a PDF that stands in place of an image, and where its file lies; ``None`` for an image."""
    content = (encoded or {}).get("bytes")
    if not is_pdf_page(content):
        return None
    try:
        return PdfPage.decode(content), str((encoded or {}).get("path"))
    except ValueError as error:
        raise ImageDecodeError(f"{name_item(document_id)} can't be read: {error}. Build the dataset again.") from error


def _size_to_render(
    max_pixels: int | None, at_least: tuple[int, int], enough: Enough | None, size: tuple[int, int]
) -> tuple[int, int]:
    """The size at which a page of a PDF is read, which has no pixels of its own."""
    wanted = max_pixels or enough
    if isinstance(wanted, tuple):
        scale = min(1.0, max(least / side for least, side in zip(wanted, size, strict=True)))
        return math.ceil(size[0] * scale), math.ceil(size[1] * scale)
    return size if wanted is None else _fit_within(size, wanted, at_least)


def decode_error(kind: str, message: str) -> MediaDecodeError:
    """The error for what can't be decoded: an ``ImageDecodeError`` where it is a page."""
    return (ImageDecodeError if kind == "image" else MediaDecodeError)(message)


def missing_content(document_id: str, kind: str = "image") -> MediaDecodeError:
    """The error for a document that has neither bytes nor a path where it is read."""
    return decode_error(
        kind,
        f"{name_item(document_id)} has no {kind}: neither bytes nor a path. Give it one, or "
        f"leave the {item_of(document_id)} out.",
    )


def require_file(path: str, document_id: str, kind: str = "image") -> None:
    """Make sure that a path leads to a file that can be read to its end: no folder, pipe or device.

    Raises:
        MediaDecodeError: It does not, or the file of an image has more than ``MAX_FILE_BYTES`` bytes.
    """
    try:
        found = Path(path).stat()
        problem = None if stat.S_ISREG(found.st_mode) else "it is no file, but a folder, a pipe or a device"
        if kind == "image" and found.st_size > MAX_FILE_BYTES:
            problem = f"its {found.st_size:,} bytes are more than the {MAX_FILE_BYTES:,} that are read"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        remedy = f"Restore the file, or leave the {item_of(document_id)} out."
        if re.match(r"\w+://", path):
            problem = "it is a URL, and documents are read from files or bytes"
            remedy = f"Download it first, e.g. with urllib.request.urlretrieve({path!r:.200}, 'page.png')."
        elif not Path(path).is_absolute():
            problem += f", looked for from the working directory {str(Path.cwd())!r}"
            remedy = "Write absolute paths into the column, or run from the folder that they begin in."
        raise decode_error(
            kind, f"{name_item(document_id)} can't be decoded as {WHAT[kind]} (file {path!r}): {problem}. {remedy}"
        )


def _check_size(image: Image.Image, document_id: str) -> None:
    if image.width * image.height <= MAX_DECODED_PIXELS:
        return
    raise ImageDecodeError(
        f"{name_item(document_id)} is {image.width} x {image.height} pixels, more than the {MAX_DECODED_PIXELS:,} "
        "that are decoded. Scale the file down before, e.g. to 2,000 pixels on the long side."
    )


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip grey values of 16 bits at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no defined range; convert the file to 8 or 16 bits")
        has_16_bits = "16" in image.mode or values.max() > 255
        return Image.fromarray((values // 257 if has_16_bits else values).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the file to 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    # convert() would copy the pixels of an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit_within(size: tuple[int, int], max_pixels: int, at_least: tuple[int, int] = (1, 1)) -> tuple[int, int]:
    scale = math.sqrt(max_pixels / (size[0] * size[1]))
    bound = max(least / side for least, side in zip(at_least, size, strict=True))
    if at_least != (1, 1) and bound > scale:
        return math.ceil(size[0] * min(1.0, bound)), math.ceil(size[1] * min(1.0, bound))
    scale = min(1.0, scale)
    width, height = (max(1, int(side * scale)) for side in size)
    # A strip a pixel wide keeps that pixel and must be shortened more than the scale says.
    width = min(width, max(1, max_pixels // height))
    return width, min(height, max(1, max_pixels // width))


def looks_whole(ends: bytes, document_id: str) -> bool:
    """Whether a page is a JPEG or PNG with a header and an end. Others and doubtful ones must be decoded to know.

    What is damaged in between stays unseen, and of a JPEG also in decoding: its decoder goes on with grey or shifted
    blocks, and reports nothing to Pillow (12.0).

    Args:
        ends: The first and the last bytes of the file.
        document_id: Named in errors.

    Raises:
        ImageDecodeError: The page has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(ends[:_HEADER_BYTES])) as image:
            _check_size(image, document_id)
            end = _END_BY_FORMAT.get(image.format or "")
    except ImageDecodeError:
        raise
    except Exception:  # the header may be longer than what was read of it: decoding in full decides
        return False
    return end is not None and end in ends[-_TAIL_BYTES:]


class EncodedImages:
    """Length and bytes of each image, sound or clip of a corpus, without copying or decoding.

    Args:
        corpus: A table with a column of encoded files.
        name: The column: ``"image"``, ``"audio"`` or ``"video"``.
        id_class: ``QueryId`` where the ids are those of queries; errors say so.

    Attributes:
        lengths: Bytes of each image, int64, as ``read_identity`` gives them; a different negative number for each image
            that can't be found.
        rows_elsewhere: The rows whose image is not in the table: in a file of its own, in a PDF, or nowhere.
        pdf_rows: Those in a PDF. What is read of these names the content of the file and the page.
    """

    def __init__(self, corpus: Dataset, name: str = "image", *, id_class: type[str] = str) -> None:
        self._id_class = id_class
        stored, order = stored_image_column(corpus, name)
        self._corpus, self._name = corpus, name
        self._bytes = pc.struct_field(stored, "bytes")
        self._paths = pc.struct_field(stored, "path")
        self._order = np.arange(len(corpus)) if order is None else order
        lengths = pc.fill_null(pc.cast(pc.binary_length(self._bytes), pa.int64()), -1).to_numpy()[self._order].copy()
        short = np.flatnonzero((lengths >= 0) & (lengths <= LONGEST_REFERENCE))
        is_pdf = [is_pdf_page(self._bytes[int(self._order[row])].as_buffer()) for row in short]
        self.pdf_rows = short[np.array(is_pdf, dtype=bool)]
        self.rows_elsewhere = np.union1d(np.flatnonzero(lengths < 0), self.pdf_rows)
        size_by_path: dict[str | None, int] = {}
        for row in self.rows_elsewhere:
            path = self.path(int(row))
            if path not in size_by_path:
                size_by_path[path] = _file_size(path)
            if size_by_path[path] < 0 or lengths[row] < 0:
                lengths[row] = size_by_path[path] if size_by_path[path] >= 0 else -1 - int(row)
        for row in self.pdf_rows[lengths[self.pdf_rows] >= 0]:
            lengths[row] = len(name_page(self._bytes[int(self._order[row])].as_buffer()))
        self.lengths = lengths

    def path(self, row: int) -> str | None:
        """The file of an image that is in a file of its own, or in a PDF."""
        stored = int(self._order[row])
        is_elsewhere = not self._bytes[stored].is_valid or is_pdf_page(self._bytes[stored].as_buffer())
        return self._paths[stored].as_py() if is_elsewhere else None

    def encoded(self, row: int) -> dict[str, Any]:
        """The image in this row as ``decode_page`` takes it, a copy."""
        stored = int(self._order[row])
        return {"bytes": self._bytes[stored].as_py(), "path": self._paths[stored].as_py()}

    def read(self, row: int) -> memoryview | bytes:
        """The bytes of the image in this row.

        Raises:
            ImageDecodeError: Its file can't be read; the message names the document.
        """
        content = self._bytes[int(self._order[row])].as_buffer()
        return memoryview(content) if content is not None else self._read_file(row, None)

    def read_identity(self, row: int) -> memoryview | bytes:
        """What tells the image in this row from others: its bytes; of a page of a PDF its file and number, at any size.

        Raises:
            ImageDecodeError: Its file can't be read; the message names the document.
        """
        content = self.read(row)
        return name_page(content) if is_pdf_page(content) else content

    def read_ends(self, row: int) -> bytes:
        """The first and the last bytes of the image in this row, or all where they are few; see ``looks_whole``.

        Raises:
            ImageDecodeError: Its file can't be read; the message names the document.
        """
        content = self._bytes[int(self._order[row])].as_buffer()
        return self._read_file(row, _HEADER_BYTES) if content is None else _ends(memoryview(content))

    def _read_file(self, row: int, at_each_end: int | None) -> bytes:
        path, document_id = self.path(row), self._id_class(self._corpus[row]["document_id"])
        if not path:
            raise missing_content(document_id, self._name)
        require_file(path, document_id, self._name)
        try:
            with Path(path).open("rb") as file:
                if at_each_end is None or self.lengths[row] <= at_each_end + _TAIL_BYTES:
                    return file.read()
                start = file.read(at_each_end)
                file.seek(-_TAIL_BYTES, os.SEEK_END)
                return start + file.read()
        except OSError as error:
            raise decode_error(
                self._name,
                f"The file of {item_of(document_id)} {document_id!r} can't be read: {error}. "
                f"Restore the file, or leave the {item_of(document_id)} out.",
            ) from error


def _file_size(path: str | None) -> int:
    """The bytes of a file; -1 of what is none."""
    try:
        found = Path(path or "").stat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _ends(content: memoryview) -> bytes:
    if len(content) <= _HEADER_BYTES + _TAIL_BYTES:
        return bytes(content)
    return bytes(content[:_HEADER_BYTES]) + bytes(content[-_TAIL_BYTES:])


def check_pages(
    corpus: Dataset, *, show_progress_bar: bool = True, may_lack: bool = False, id_class: type[str] = str
) -> None:
    """Make sure that every page of a corpus can be decoded: JPEG and PNG by header and end, others in full.

    A page of a PDF is loaded, and its file must be the one that the dataset was built from.

    What is damaged in the middle of a JPEG is not found; see ``looks_whole``.

    Args:
        corpus: The documents.
        show_progress_bar: Whether to show a bar.
        may_lack: Whether some documents are something else than a page.
        id_class: As for ``EncodedImages``.

    Raises:
        ImageDecodeError: A page is missing, damaged, or no image; the message names the document.
    """
    images, document_ids = EncodedImages(corpus, id_class=id_class), column(corpus, "document_id")
    pdf_rows = set(images.pdf_rows.tolist())
    for row in tqdm(range(len(corpus)), desc="Checking pages", disable=not show_progress_bar, leave=False):
        document_id = id_class(document_ids[row].as_py())
        if may_lack and images.lengths[row] < 0 and not images.path(row):
            continue
        if row in pdf_rows:
            stored_size(images.encoded(row), document_id)
        elif not looks_whole(images.read_ends(row), document_id):
            decode_page({"bytes": bytes(images.read(row)), "path": None}, document_id)
