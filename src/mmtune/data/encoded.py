"""The encoded bytes of a corpus's images, read where they lie: in Arrow memory or in files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm

from mmtune.data.arrow import column, stored_image_column
from mmtune.data.images import check_page
from mmtune.errors import ImageDecodeError


class EncodedImages:
    """Length and bytes of each image of a corpus, without copying or decoding.

    Args:
        corpus: A table with an ``Image(decode=False)`` column ``image``.

    Attributes:
        lengths: Bytes of each image, int64; a different negative number for each image that can't be found.
    """

    def __init__(self, corpus: Dataset) -> None:
        stored, order = stored_image_column(corpus, "image")
        self._bytes = pc.struct_field(stored, "bytes")
        self._paths = pc.struct_field(stored, "path")
        self._order = np.arange(len(corpus)) if order is None else order
        self.lengths = self._all_lengths()

    def __len__(self) -> int:
        return len(self._order)

    def path(self, row: int) -> str | None:
        """The file of an image that is not in memory."""
        stored = int(self._order[row])
        return None if self._bytes[stored].is_valid else self._paths[stored].as_py()

    def read(self, row: int) -> memoryview | bytes:
        """The bytes of the image in this row.

        Raises:
            OSError: Its file can't be read.
        """
        content = self._bytes[int(self._order[row])].as_buffer()
        if content is not None:
            return memoryview(content)
        return Path(self.path(row) or "").read_bytes()

    def _all_lengths(self) -> np.ndarray:
        lengths = pc.fill_null(pc.cast(pc.binary_length(self._bytes), pa.int64()), -1).to_numpy()[self._order].copy()
        for row in np.flatnonzero(lengths < 0):
            path = Path(self.path(int(row)) or "")
            lengths[row] = path.stat().st_size if path.is_file() else -1 - row
        return lengths


def check_pages(corpus: Dataset, *, show_progress_bar: bool = True) -> None:
    """Make sure that every page of a corpus can be decoded; see ``check_page``.

    Raises:
        ImageDecodeError: A page is missing, damaged, or no image; the message names the document.
    """
    images, document_ids = EncodedImages(corpus), column(corpus, "document_id")
    for row in tqdm(range(len(images)), desc="Checking pages", disable=not show_progress_bar, leave=False):
        document_id = document_ids[row].as_py()
        try:
            content = images.read(row)
        except OSError as error:
            raise ImageDecodeError(
                f"The file of document {document_id!r} can't be read: {error}. "
                "Restore the file, or leave the document out."
            ) from error
        check_page(content, document_id)
