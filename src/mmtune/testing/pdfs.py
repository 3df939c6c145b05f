"""Generated PDFs, written byte by byte: text, tables, plots, landscape and rotated pages, forms, and scans."""

import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import product
from pathlib import Path
from random import Random

from PIL import Image

from mmtune.testing import words
from mmtune.testing.drawing import draw_page

_COLOURS = ("0.11 0.31 0.54", "0 0.44 0.42", "0.48 0.24 0.62", "0.61 0.24 0.06", "0.18 0.42 0.18", "0.55 0.11 0.23")
_KINDS = ("portrait", "landscape", "rotated", "form", "scan")
_PAGES_A_FILE = 4
_SCAN_SIZE_PX = 512


@dataclass(frozen=True)
class PdfPageContent:
    """What one page of a PDF shows.

    Attributes:
        operators: The content stream, e.g. ``b"0 0 100 50 re f"``; the font ``/F`` is Helvetica.
        size: Width and height in points.
        rotation: In degrees, clockwise: 0, 90, 180 or 270.
        fields: The values of text fields by name, laid out below each other at the lower end.
    """

    operators: bytes = b""
    size: tuple[int, int] = (612, 792)
    rotation: int = 0
    fields: Mapping[str, str] = field(default_factory=dict)


def generated_pdfs(folder: str | Path, *, seed: int = 0) -> str:
    """Write reports as PDFs, with a table of queries about their pages, and return the folder.

    There are ten reports of four pages each: two each in portrait, in landscape, rotated, with values in forms, and
    scanned, in two folders that share names of files. Every page is about one topic of one company in one year; all
    but the last of each file have a query in ``queries.csv``, with the columns ``text``, ``source`` and
    ``page_number``. Reading them needs pypdfium2, writing does not.

    Args:
        folder: Where the files go; made if it does not exist. Files of the same names are replaced.
        seed: Seed of everything written. The same seed gives the same bytes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     sorted(path.name for path in Path(generated_pdfs(folder)).iterdir())
        ['2023', '2024', 'queries.csv']
    """
    random, root = Random(f"pdfs {seed}"), Path(folder)
    rows = []
    companies = random.sample(words.COMPANIES, len(_KINDS))
    for year, (company, kind) in product(words.YEARS[-2:], zip(companies, _KINDS, strict=True)):
        source = f"{year}/{company}.pdf"
        (root / year).mkdir(parents=True, exist_ok=True)
        topics = random.sample(words.TOPICS, _PAGES_A_FILE)
        if kind == "scan":
            write_scans(root / source, [draw_page(company, topic, year, "", random, _SCAN_SIZE_PX) for topic in topics])
        else:
            colour = random.choice(_COLOURS)
            write_pdf(root / source, [_lay_out(company, topic, year, kind, colour, random) for topic in topics])
        for page_number, topic in enumerate(topics[:-1], start=1):
            template = random.choice(words.QUERY_TEMPLATES)
            rows.append((template.format(company=company, topic=topic.lower(), period=year), source, page_number))
    with (root / "queries.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "source", "page_number"), *rows])
    return str(root)


def write_pdf(path: str | Path, pages: Sequence[PdfPageContent]) -> None:
    """Write a PDF of these pages."""
    # 1 is the catalog, 2 the list of pages, 3 the font; then for each page itself, its content and its fields.
    objects: dict[int, bytes] = {3: b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"}
    kids, all_fields = [], []
    for page in pages:
        number = max(objects) + 1
        kids.append(number)
        own_fields = range(number + 2, number + 2 + len(page.fields))
        width, height = page.size
        objects[number] = (
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {width} {height}] /Rotate {page.rotation} "
            f"/Resources << /Font << /F 3 0 R >> >> /Contents {number + 1} 0 R /Annots [{_references(own_fields)}] >>"
        ).encode()
        objects[number + 1] = b"<< /Length %d >>\nstream\n%b\nendstream" % (len(page.operators), page.operators)
        for line, (at, (name, value)) in enumerate(zip(own_fields, page.fields.items(), strict=True)):
            bottom = 40 + 40 * line
            objects[at] = (
                f"<< /Type /Annot /Subtype /Widget /FT /Tx /T ({name} {number}) /V ({value}) /F 4 /P {number} 0 R "
                f"/Rect [60 {bottom} {width - 60} {bottom + 30}] /DA (/F 22 Tf 0 g) >>"
            ).encode()
        all_fields += own_fields
    form = f"/AcroForm << /Fields [{_references(all_fields)}] /DR << /Font << /F 3 0 R >> >> /NeedAppearances true >>"
    objects[1] = f"<< /Type /Catalog /Pages 2 0 R {form if all_fields else ''} >>".encode()
    objects[2] = f"<< /Type /Pages /Count {len(kids)} /Kids [{_references(kids)}] >>".encode()
    Path(path).write_bytes(_join_objects(objects))


def write_scans(path: str | Path, images: Sequence[bytes]) -> None:
    """Write a PDF whose pages are images, without a text layer."""
    first, *others = (Image.open(BytesIO(image)) for image in images)
    begun = time.gmtime(0)
    first.save(path, "PDF", save_all=True, append_images=others, creationDate=begun, modDate=begun)


def show_text(x: float, y: float, size: float, text: str) -> bytes:
    """The operators that write one line in Helvetica, from its left end on the base line."""
    escaped = text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
    return f"BT /F {size} Tf {x} {y} Td ({escaped}) Tj ET\n".encode("latin-1", "replace")


def _lay_out(company: str, topic: str, year: str, kind: str, colour: str, random: Random) -> PdfPageContent:
    """A page with a header, a title, a sentence, a table and a plot."""
    width, height = (792, 612) if kind == "landscape" else (612, 792)
    figures = [random.randint(12, 99) for _ in words.QUARTERS]
    sentence = random.choice(words.BODY_TEMPLATES).format(
        company=company, topic=topic, period=year, verb=random.choice(words.VERBS), percent=random.randint(2, 60)
    )
    parts = [
        # lies on its side, and the rotation of the page sets it upright
        f"0 1 -1 0 {height} 0 cm\n".encode() if kind == "rotated" else b"",
        f"{colour} rg 0 {height - 110} {width} 110 re f 1 g\n".encode(),
        show_text(30, height - 85, 80, company),
        b"0.12 g\n",
        show_text(30, height - 200, 80, topic),
        show_text(width - 210, height - 280, 84, year),
        show_text(30, height - 310, 20, sentence),
        show_text(30, height - 335, 20, random.choice(words.BODY_ENDINGS)),
    ]
    bottom = height - 540
    if kind != "form":
        parts += [
            *(
                show_text(30, height - 380 - 32 * k, 22, f"{quarter}   {figure} {words.UNIT_BY_TOPIC[topic]}")
                for k, (quarter, figure) in enumerate(zip(words.QUARTERS, figures, strict=True))
            ),
            f"0.6 G 30 {height - 352} 210 1 re S {colour} rg\n".encode(),
            *(f"{300 + 70 * k} {bottom} 45 {1.6 * figure} re f\n".encode() for k, figure in enumerate(figures)),
        ]
    fields = {quarter: f"{quarter} {figure}" for quarter, figure in zip(words.QUARTERS, figures, strict=True)}
    return PdfPageContent(
        b"".join(parts),
        size=(height, width) if kind == "rotated" else (width, height),
        rotation=90 if kind == "rotated" else 0,
        fields=fields if kind == "form" else {},
    )


def _references(numbers: Sequence[int]) -> str:
    return " ".join(f"{number} 0 R" for number in numbers)


def _join_objects(objects: Mapping[int, bytes]) -> bytes:
    """A file of these objects, with the table of where each begins."""
    file, offsets = bytearray(b"%PDF-1.7\n"), []
    for number in sorted(objects):
        offsets.append(len(file))
        file += b"%d 0 obj\n%b\nendobj\n" % (number, objects[number])
    start = len(file)
    file += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    file += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    file += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(file)
