"""How many copies of a page the audit finds, what it takes for copies that are none, and the memory of 10,000 pages.

    python benchmarks/near_copies.py [--data FOLDER] [--pdfs FOLDER] [--pictures FOLDER] [--pages 10000]

FOLDER of --data holds parquet files with a column image of forms, such as scanned receipts; that of --pdfs PDFs of
text, none of whose pages stands twice. Texts, reports and receipts are drawn besides. --pictures writes what was
taken for copies, or for alike, among distinct pages side by side, to look at. The results go into RESULTS.md.
"""

import argparse
import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Image
from measure import in_fresh_process, peak_mb, report, write_section
from PIL import Image as Pictures
from PIL import ImageDraw, ImageFilter, ImageFont

from mmtune import AuditReport, RetrievalDataset
from mmtune.report.markdown import markdown_table
from mmtune.testing import generated_pages

SIZE_PX = 850, 1100
SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ren",
    "tas",
    "vor",
    "ple",
    "sti",
    "nau",
    "bor",
    "che",
    "din",
    "fel",
    "gra",
    "hul",
    "jun",
)
ITEMS = ("Coffee", "Bread", "Milk", "Total", "Tax", "Cash", "Change")


def draw_text_page(rng: random.Random) -> Pictures.Image:
    """A page of words in one or two columns, with a head, paragraphs and a table now and then."""
    page = Pictures.new("L", SIZE_PX, 255)
    draw = ImageDraw.Draw(page)
    height = rng.choice((13, 14, 16, 18))
    font, leading, margin = (
        ImageFont.load_default(height),
        int(height * rng.choice((1.25, 1.4, 1.6))),
        rng.choice((70, 90)),
    )

    def word() -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4)))

    top = margin
    if rng.random() < 0.5:
        draw.text((margin, top), " ".join(word() for _ in range(3)), 0, ImageFont.load_default(rng.choice((24, 30))))
        top += 60
    columns = rng.choice((1, 1, 2))
    width = (SIZE_PX[0] - 2 * margin - 30 * (columns - 1)) // columns
    bottom = rng.choice((SIZE_PX[1] - margin, rng.randint(500, SIZE_PX[1] - margin)))
    for column in range(columns):
        left, y = margin + column * (width + 30), float(top)
        while y < bottom:
            line = word()
            while font.getlength(f"{line} wwww") < width and rng.random() > 0.01:
                line += f" {word()}" if rng.random() < 0.95 else f" {rng.randint(0, 9999)}"
            draw.text((left, y), line, 0, font)
            y += leading * (1.6 if rng.random() < 0.1 else 1)
    draw.text((SIZE_PX[0] / 2, SIZE_PX[1] - 40), str(rng.randint(1, 400)), 0, ImageFont.load_default(13))
    return page.convert("RGB")


def draw_receipt(rng: random.Random) -> Pictures.Image:
    """A receipt of one shop: the same items, other amounts."""
    page = Pictures.new("L", (420, 760), 236)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(22)
    for at, line in enumerate(("CORNER SHOP SDN BHD", "12 Harbour Road", "TAX INVOICE", "Cashier 03", "-" * 32)):
        draw.text((50, 50 + 36 * at), line, 60, font)
    for at, item in enumerate(ITEMS):
        draw.text((50, 260 + 50 * at), item, 60, font)
        draw.text((290, 260 + 50 * at), f"{rng.randint(100, 9999) / 100:.2f}", 60, font)
    draw.text((50, 660), "Thank you, please come again", 60, font)
    return page.convert("RGB")


def recompress(page: Pictures.Image, rng: random.Random) -> Pictures.Image:
    """As a JPEG of low quality."""
    return as_jpeg(page, rng.choice((20, 30, 40)))


def rescale(page: Pictures.Image, rng: random.Random) -> Pictures.Image:
    """At 0.45 to 0.85 of the size."""
    scale = rng.uniform(0.45, 0.85)
    return page.resize((round(page.width * scale), round(page.height * scale)), Pictures.Resampling.BICUBIC)


def crop(page: Pictures.Image, rng: random.Random) -> Pictures.Image:
    """By 3% on each side, or by up to 3%."""
    left, top, right, bottom = (0.03,) * 4 if rng.random() < 0.5 else (rng.uniform(0, 0.03) for _ in range(4))
    width, height = page.size
    return page.crop(
        (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
    )


def rescan(page: Pictures.Image, rng: random.Random) -> Pictures.Image:
    """Turned by up to 1.5 degrees, moved, at another size, blurred, shaded, with noise, as JPEG."""
    moved = (rng.randint(-15, 15), rng.randint(-15, 15))
    turned = page.rotate(rng.uniform(-1.5, 1.5), Pictures.Resampling.BICUBIC, fillcolor=(255,) * 3, translate=moved)
    scale = rng.uniform(0.7, 1.2)
    scaled = turned.resize((round(page.width * scale), round(page.height * scale)), Pictures.Resampling.BICUBIC)
    greys = np.asarray(scaled.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.2))), dtype=np.float32)
    shade = np.linspace(rng.uniform(0.85, 1), rng.uniform(0.85, 1), greys.shape[1])[None, :, None]
    noise = np.random.default_rng(rng.randrange(2**31)).normal(0, rng.uniform(5, 14), (*greys.shape[:2], 1))
    return as_jpeg(
        Pictures.fromarray((30 + rng.uniform(0.75, 0.85) * greys * shade + noise).clip(0, 255).astype(np.uint8)), 60
    )


COPIES: dict[str, Callable[[Pictures.Image, random.Random], Pictures.Image]] = {
    "rescaled": rescale,
    "recompressed": recompress,
    "cropped by 3%": crop,
    "scanned again": rescan,
}


def as_jpeg(page: Pictures.Image, quality: int) -> Pictures.Image:
    """The page as it is after it was stored as a JPEG."""
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=quality)
    return Pictures.open(buffer).convert("RGB")


def encode(page: Pictures.Image) -> bytes:
    """The page as PNG, hardly compressed."""
    buffer = io.BytesIO()
    page.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def audit(images: list[bytes] | list[str]) -> AuditReport:
    """The audit of pages by number, with their content."""
    ids = [str(number) for number in range(len(images))]
    corpus = Dataset.from_dict({"document_id": ids, "image": images}).cast_column("image", Image(decode=False))
    queries = Dataset.from_dict({"query_id": ["q"], "text": ["which page is the first"]})
    qrels = Dataset.from_dict({"query_id": ["q"], "document_id": ["0"], "score": [1]})
    return RetrievalDataset(corpus, queries, qrels).audit(content=True, show_progress_bar=False)


def count_found(pages: list[Pictures.Image], change: Callable, rng: random.Random) -> float:
    """The share of pages whose copy is found as theirs, among them all and all of their copies."""
    report = audit([encode(page) for page in pages] + [encode(change(page, rng)) for page in pages])
    groups = [set(map(int, example.document_ids)) for example in report["near_copies"].examples]
    return sum(any({at, at + len(pages)} <= group for group in groups) for at in range(len(pages))) / len(pages)


def show_pairs(pages: list[Pictures.Image], report: AuditReport, key: str, folder: Path | None, name: str) -> None:
    """Write the first two of each group side by side."""
    for at, example in enumerate(report[key].examples if folder else ()):
        both = [pages[int(each)].resize((600, 800)) for each in example.document_ids[:2]]
        sheet = Pictures.new("RGB", (1200, 800))
        for place, page in enumerate(both):
            sheet.paste(page, (600 * place, 0))
        sheet.save(folder / f"{name}-{key}-{at}.png")


def read_forms(data: Path) -> list[Pictures.Image]:
    """The pages of a parquet file, or of a folder of them."""
    files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    scans = [scan for file in files for scan in pq.read_table(file, columns=["image"])["image"].to_pylist()]
    return [Pictures.open(io.BytesIO(scan["bytes"])).convert("RGB") for scan in scans]


def read_pdfs(folder: Path) -> list[Pictures.Image]:
    """The pages of all PDFs of a folder, at 100 dpi."""
    import pypdfium2

    pages = []
    for file in sorted(folder.rglob("*.pdf")):
        pdf = pypdfium2.PdfDocument(file)
        pages += [pdf[at].render(scale=100 / 72).to_pil().convert("RGB") for at in range(len(pdf))]
        pdf.close()
    return pages


def measure_memory(count: int) -> None:
    """Audit ``count`` pages in files; they are strips of drawn pages in another order, so no two are the same."""
    rng, shuffle = random.Random(0), np.random.default_rng(0)
    drawn = [np.asarray(draw_text_page(rng).convert("L").resize((425, 550))) for _ in range(60)]
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number in range(count):
            strips = np.concatenate(
                [
                    np.split(drawn[at], 10)[k]
                    for at, k in zip(shuffle.integers(60, size=10), shuffle.permutation(10), strict=True)
                ]
            )
            paths.append(f"{folder}/{number}.png")
            Pictures.fromarray(strips).save(paths[-1], compress_level=1)
        before, started = peak_mb(), time.perf_counter()
        found = audit(paths)
        seconds = time.perf_counter() - started
        report(
            before_mb=before,
            peak_mb=peak_mb(),
            seconds=seconds,
            copies=found.counts["near_copies"],
            alike=found.counts["look_alikes"],
        )


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image: forms")
    parser.add_argument("--pdfs", type=Path, help="folder of PDFs of text")
    parser.add_argument("--pictures", type=Path, help="where alarms are written side by side")
    parser.add_argument("--pages", type=int, default=10_000, help="for the memory")
    parser.add_argument("--copies", type=int, default=40, help="pages of each set that are copied")
    parser.add_argument("--held-out", type=int, default=200, help="drawn pages of text, no two the same")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        measure_memory(options.memory_of)
        return
    rng = random.Random(0)
    texts = [draw_text_page(rng) for _ in range(options.held_out)]
    sets = {"text, drawn": texts}
    if options.pdfs:
        sets["text, PDFs"] = read_pdfs(options.pdfs)
    reports = [row["image"].convert("RGB") for row in generated_pages(24, page_size_px=600)]
    sets |= {
        "reports of one layout, drawn": reports,
        "receipts of one shop, other amounts, drawn": [draw_receipt(rng) for _ in range(24)],
    }
    if options.data:
        sets["forms, scanned"] = read_forms(options.data)
    found, alarms = [], []
    for name, pages in sets.items():
        some = pages[:: max(1, len(pages) // options.copies)][: options.copies]
        found.append([name, str(len(some)), *(f"{count_found(some, change, rng):.2f}" for change in COPIES.values())])
        report = audit([encode(page) for page in pages])
        for key in ("near_copies", "look_alikes"):
            show_pairs(pages, report, key, options.pictures, name.replace(" ", "-"))
        num_pairs = len(pages) * (len(pages) - 1) // 2
        alarms.append(
            [
                name,
                str(len(pages)),
                f"{num_pairs:,}",
                str(report["near_copies"].count),
                str(report["look_alikes"].count),
            ]
        )
        print(found[-1], alarms[-1], flush=True)
    sizes = sorted({max(1, options.pages // 10), options.pages})
    memory = []
    for size in sizes:
        each = in_fresh_process(__file__, "--memory-of", size)
        memory.append(
            [
                f"{size:,}",
                f"{each['before_mb']:.0f}",
                f"{each['peak_mb']:.0f}",
                f"{each['seconds']:.0f}",
                f"{each['copies']:.0f}",
            ]
        )
    text = (
        "`python benchmarks/near_copies.py`, with `--data` for the forms and `--pdfs` for PDFs. Share of pages whose "
        "copy the audit finds as theirs, in one corpus of all pages and all of their copies:\n\n"
        + markdown_table(("set", "pages", *COPIES), found)
        + "\n\nPages of which none is a copy made here, and what the audit takes them for:\n\n"
        + markdown_table(("set", "pages", "pairs", "near-copies", "look-alikes"), alarms)
        + "\n\nPages in files, none a copy, audited with their content; memory of the process in MB, and seconds:\n\n"
        + markdown_table(("pages", "MB before", "MB at most", "seconds", "near-copies"), memory)
    )
    print(text)
    write_section("Near-copies", text)


if __name__ == "__main__":
    main()
