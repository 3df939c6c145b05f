"""Pages that are decoded when their pixels are asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image

from mmtune.arguments import item_of
from mmtune.data.images import DECODING, Enough, decode_page, require_file, stored_size
from mmtune.errors import ImageDecodeError


class Page(Image.Image):
    """An upright RGB image that is decoded at the first look at its pixels; a ``PIL.Image.Image`` wherever one goes.

    So a page whose pixels are known already, as what an image processor made of them, is not decoded at all.

    Args:
        encoded: A row of an ``Image(decode=False)`` column: ``{"bytes": bytes | None, "path": str | None}``.
        document_id: Named in errors.
        max_pixels: As for ``decode_page``.
        at_least: As for ``decode_page``.
        enough: As for ``decode_page``; for those who know no better what is enough.

    Attributes:
        document_id: As given.
        prepared: What image processors made of it, by a key of processor and settings: arrays by name.
    """

    def __init__(
        self,
        encoded: Mapping[str, Any] | None,
        document_id: str,
        *,
        max_pixels: int | None = None,
        at_least: tuple[int, int] = (1, 1),
        enough: Enough | None = None,
    ) -> None:
        super().__init__()
        self._mode = "RGB"
        self._encoded, self._enough = encoded, enough
        self._bounds: dict[str, Any] = {"max_pixels": max_pixels, "at_least": at_least}
        self._is_decoded = False
        self.document_id = document_id
        self.prepared: dict[str, dict[str, np.ndarray]] = {}

    @property
    def has_own_limit(self) -> bool:
        """Whether it is scaled to a ``max_pixels`` of its own, whoever reads it."""
        return self._bounds["max_pixels"] is not None

    def decoded(self, enough: Enough | None) -> Image.Image:
        """The page as an image of its own.

        Args:
            enough: As for ``decode_page``; without effect where the page has a ``max_pixels``.

        Raises:
            ImageDecodeError: It is no readable image.
        """
        return decode_page(self._encoded, self.document_id, enough=enough, **self._bounds)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; as they are stored until the page is decoded."""
        if not self._is_decoded and self._size == (0, 0):
            self._size = stored_size(self._encoded, self.document_id)
        return self._size

    def digest(self) -> str:
        """A digest of the encoded bytes and of how they are decoded, 32 hexadecimal digits.

        Raises:
            ImageDecodeError: The file can't be read.
        """
        digest = xxhash.xxh3_128(f"{DECODING} {self._bounds}".encode())
        content, path = ((self._encoded or {}).get(name) for name in ("bytes", "path"))
        if content is None and path:
            require_file(path, self.document_id)
            try:
                content = Path(path).read_bytes()
            except OSError as error:
                raise ImageDecodeError(
                    f"The file of {item_of(self.document_id)} {self.document_id!r} can't be read: {error}. Restore the "
                    f"file, or leave the {item_of(self.document_id)} out."
                ) from error
        digest.update(content or b"")
        return digest.hexdigest()

    def load(self) -> Any:
        """Decodes the page, as Pillow asks for it before each look at the pixels."""
        if not self._is_decoded:
            self._take(self.decoded(self._enough))
        return super().load()

    def _take(self, image: Image.Image) -> None:
        image.load()
        self.im, self._size, self.info = image.im, image.size, image.info
        self._is_decoded = True

    def __reduce__(self) -> tuple[Any, ...]:
        # decoding again would cost more than to send the pixels, which nobody needs where the page is prepared
        pixels = self.tobytes() if self._is_decoded and not self.prepared else None
        options = {**self._bounds, "enough": self._enough}
        return _page, (self._encoded, self.document_id, options, self.prepared, pixels, self._size)

    def __repr__(self) -> str:
        return f"<Page {self.document_id!r}>"


def _page(
    encoded: Mapping[str, Any] | None,
    document_id: str,
    options: dict[str, Any],
    prepared: dict[str, dict[str, np.ndarray]],
    pixels: bytes | None,
    size: tuple[int, int],
) -> Page:
    page = Page(encoded, document_id, **options)
    page.prepared = prepared
    if pixels is not None:
        page._take(Image.frombytes("RGB", size, pixels))
    return page
