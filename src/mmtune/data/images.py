"""The one place where encoded images become pixels."""

import io
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmtune.errors import ImageDecodeError

MAX_DECODED_PIXELS = 2 * 89_478_485
"""Pages above this are refused as decompression bombs; the same bound at which Pillow raises."""

_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
_HEADER_BYTES = 1 << 16
_TAIL_BYTES = 64
_END_BY_FORMAT = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}


def decode_page(
    encoded: Mapping[str, Any] | None,
    document_id: str,
    *,
    max_pixels: int | None = None,
    enough_pixels: int | None = None,
) -> Image.Image:
    """The page as an upright RGB image.

    EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8 bits, and of several
    frames the first is taken, with a warning.

    Args:
        encoded: A row of an ``Image(decode=False)`` column: ``{"bytes": bytes | None, "path": str | None}``.
        document_id: Named in errors.
        max_pixels: Upper bound of width times height. A larger page is scaled down with its aspect ratio; a JPEG is
            then decoded at a fraction of its size, which is faster. ``None`` keeps every pixel.
        enough_pixels: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least this many pixels;
            nothing else is scaled. ``None`` decodes it whole.

    Raises:
        ImageDecodeError: There is nothing to read, it is no image, it is damaged, or it has more than
            ``MAX_DECODED_PIXELS`` pixels.
    """
    source = _source(encoded, document_id)
    try:
        with Image.open(source) as image:
            _check_size(image, document_id)
            _warn_of_frames(image, document_id)
            # Of the file's own size: a draft rounds, and rounding twice would change the aspect of small pages.
            size = _size_within(image.size, max_pixels) if max_pixels is not None else image.size
            size = size[::-1] if image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE else size
            wanted = max_pixels or enough_pixels
            if wanted is not None:
                image.draft(image.mode, _size_within(image.size, wanted))
            ImageOps.exif_transpose(image, in_place=True)
            page = _to_rgb(image)
    except ImageDecodeError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything from inside a codec
        raise ImageDecodeError(_message(encoded, document_id, error)) from error
    if max_pixels is None or page.width * page.height <= max_pixels:
        return page
    return page.resize(size, Image.Resampling.BICUBIC)


def _source(encoded: Mapping[str, Any] | None, document_id: str) -> io.BytesIO | str:
    if encoded is not None and encoded.get("bytes") is not None:
        return io.BytesIO(encoded["bytes"])
    if encoded is not None and encoded.get("path"):
        return str(encoded["path"])
    raise ImageDecodeError(
        f"Document {document_id!r} has no image: neither bytes nor a path. Give it one, or leave the document out."
    )


def _check_size(image: Image.Image, document_id: str) -> None:
    if image.width * image.height <= MAX_DECODED_PIXELS:
        return
    raise ImageDecodeError(
        f"Document {document_id!r} is {image.width} x {image.height} pixels, more than the {MAX_DECODED_PIXELS:,} "
        "that are decoded. Scale the file down before, e.g. to 2,000 pixels on the long side."
    )


def _warn_of_frames(image: Image.Image, document_id: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        warnings.warn(
            f"Document {document_id!r} holds {frames} frames; only the first is used. "
            "Give each page a row of its own to use all of them.",
            stacklevel=2,
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image, dtype=np.int64), bits=16 if "16" in image.mode else None)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the file to 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    # convert() would copy the pixels of an image that is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_integers(values: np.ndarray, bits: int | None) -> Image.Image:
    """Grey values of 8 or 16 bits as RGB; Pillow would clip them at 255 instead of scaling them.

    Args:
        values: Grey values, shape ``(height, width)``.
        bits: How many they have; ``None`` takes 8 where all values fit, else 16.
    """
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no defined range; convert the file to 8 or 16 bits")
    is_short = bits == 16 or values.max() > 255
    return Image.fromarray((values // 257 if is_short else values).astype(np.uint8)).convert("RGB")


def _size_within(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    scale = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    width, height = (max(1, int(side * scale)) for side in size)
    # A strip a pixel wide keeps that pixel and must be shortened more than the scale says.
    width = min(width, max(1, max_pixels // height))
    return width, min(height, max(1, max_pixels // width))


def _message(encoded: Mapping[str, Any] | None, document_id: str, error: Exception) -> str:
    encoded = encoded or {}
    content = encoded.get("bytes")
    what = f"{len(content)} bytes, starting {content[:8]!r}" if content is not None else f"file {encoded.get('path')!r}"
    return (
        f"Document {document_id!r} can't be decoded as an image ({what}): {error}. "
        "Replace the file, or leave the document out."
    )


def check_page(content: memoryview | bytes, document_id: str) -> None:
    """Find out whether a page can be decoded: JPEG and PNG by header and end, others and doubtful ones in full.

    Raises:
        ImageDecodeError: The page is no readable image.
    """
    header = bytes(content[:_HEADER_BYTES])
    try:
        with Image.open(io.BytesIO(header)) as image:
            _check_size(image, document_id)
            end = _END_BY_FORMAT.get(image.format or "")
        looks_whole = end is not None and end in bytes(content[-_TAIL_BYTES:])
    except ImageDecodeError:
        raise
    except Exception:  # the header may be longer than what was read of it: decoding in full decides
        looks_whole = False
    if not looks_whole:
        decode_page({"bytes": bytes(content), "path": None}, document_id)
