"""Pages of the size and weight of scanned receipts: real ones where there are some, drawn ones otherwise."""

import io
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from PIL import ImageDraw, ImageFont

# Real scans of receipts are around 750 x 1660 px and 370 kB.
SIZES_PX = ((620, 1300), (744, 1660), (936, 2000))
NUM_DRAWN = 24
NUM_READ = 60
FEATURES = Features(
    {"id": Value("string"), "query": Value("string"), "image": Image(), "negatives": List(Value("string"))}
)


def scanned_pages(num_pages: int, data: Path | None = None) -> list[bytes]:
    """Encoded pages, no two with the same bytes.

    Args:
        num_pages: Number of pages.
        data: A parquet file with a column ``image``, or a folder of them, of which 60 pages are taken. ``None`` draws
            24 pages. In both cases they are repeated with another comment in the file, so that more pages are no
            larger pages.
    """
    scans = _draw_scans() if data is None else _read_scans(data)
    return [_with_comment(scans[page % len(scans)], f"page {page}") for page in range(num_pages)]


def id_rows(pages: list[bytes], num_negatives: int = 1) -> Dataset:
    """One row per page, each with a query of its own and the next pages as negatives; the layout by ids."""
    size = len(pages)
    return Dataset.from_dict(
        {
            "id": [f"p{row}" for row in range(size)],
            "query": [f"Which receipt has the number {row}?" for row in range(size)],
            "image": [{"bytes": page, "path": None} for page in pages],
            "negatives": [[f"p{(row + 1 + k) % size}" for k in range(num_negatives)] for row in range(size)],
        },
        features=FEATURES,
    )


def _read_scans(data: Path) -> list[bytes]:
    files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    scans: list[bytes] = []
    for file in files:
        scans += [scan["bytes"] for scan in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    return [_as_jpeg(scan) for scan in scans[:: max(1, len(scans) // NUM_READ)][:NUM_READ]]


def _as_jpeg(scan: bytes) -> bytes:
    return scan if scan.startswith(b"\xff\xd8") else _jpeg(Pictures.open(io.BytesIO(scan)).convert("RGB"))


def _draw_scans() -> list[bytes]:
    rng, words = np.random.default_rng(0), random.Random(0)
    return [_draw_scan(SIZES_PX[scan % len(SIZES_PX)], rng, words) for scan in range(NUM_DRAWN)]


def _draw_scan(size_px: tuple[int, int], rng: np.random.Generator, words: random.Random) -> bytes:
    paper = Pictures.new("L", size_px, 232)
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(22)
    for top in range(60, size_px[1] - 60, 34):
        text = f"{words.choice(('Coffee', 'Bread', 'Total', 'Tax', 'Milk'))} {words.randint(0, 99999) / 100:.2f}"
        draw.text((words.randint(30, 80), top), text, fill=70, font=font)
    noisy = np.asarray(paper, dtype=np.float32)[..., None] + rng.normal(0, 7, (size_px[1], size_px[0], 3))
    return _jpeg(Pictures.fromarray(noisy.clip(0, 255).astype(np.uint8)))


def _jpeg(picture: Pictures.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _with_comment(jpeg: bytes, comment: str) -> bytes:
    """The same picture with a comment segment behind the start marker."""
    content = comment.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]
