"""Draws one report page: a header, a title, a text, a table and a chart, as PNG bytes."""

from functools import lru_cache
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw, ImageFont

from mmtune.testing import words

INK = "#1f2430"
GREY = "#8a909c"
RULE = "#d5d9e0"
TINT = "#eef1f5"
PAPER = "#ffffff"
ACCENTS = ("#1d4e89", "#00706b", "#7a3e9d", "#9c3d10", "#2f6b2f", "#8c1c3a", "#4a5568", "#0b6fa4")
GRID = 128
"""A page is laid out on a grid of 128 by 128 units, whatever its size in pixels."""


class _Canvas:
    """Draws in grid units on a square image; holds the image that is being drawn on."""

    def __init__(self, size_px: int) -> None:
        self.scale = size_px / GRID
        self.image = Image.new("RGB", (size_px, size_px), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        """Fill the area between two corners."""
        x0, y0, x1, y1 = (round(value * self.scale) for value in (left, top, right, bottom))
        # Pillow includes the last row and column
        self.draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=fill)

    def line(self, points: list[tuple[float, float]], fill: str) -> None:
        """Draw a line through points."""
        self.draw.line([(x * self.scale, y * self.scale) for x, y in points], fill, max(1, round(self.scale * 1.5)))

    def text(
        self, x: float, y: float, text: str, height: float, fill: str, *, width: float | None = None, anchor: str = "ls"
    ) -> None:
        """Write one line with its base line at ``y``, smaller where it would be wider than ``width``."""
        font = _font(round(height * self.scale))
        longest = font.getlength(text) / self.scale if width else 0
        if width and longest > width:
            font = _font(int(height * self.scale * width / longest))
        self.draw.text((round(x * self.scale), round(y * self.scale)), text, fill, font, anchor)

    def png(self) -> bytes:
        """Return the image, compressed without loss."""
        buffer = BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


def draw_page(company: str, topic: str, year: str, detail: str, random: Random, size_px: int) -> bytes:
    """Return a page about one topic of one company in one year as PNG.

    Args:
        company: Written in the coloured header.
        topic: Written as the title.
        year: Written large beside the title.
        detail: What narrows the year down, such as ``Asia Q3``, written under the title; may be empty.
        random: Gives the colour, the text and the figures.
        size_px: Height and width of the page in pixels.
    """
    canvas = _Canvas(size_px)
    accent = random.choice(ACCENTS)
    figures = [random.randint(12, 99) for _ in words.QUARTERS]
    _draw_titles(canvas, company, topic, year, detail, accent)
    _draw_body(canvas, company, topic, f"{detail} {year}".strip(), random)
    _draw_table(canvas, figures, words.UNIT_BY_TOPIC[topic], accent)
    _draw_chart(canvas, figures, accent, as_line=random.random() < 0.5)
    canvas.text(GRID / 2, 126, f"{company}  |  page {random.randint(2, 180)}", 4.5, GREY, anchor="ms")
    return canvas.png()


def _draw_titles(canvas: _Canvas, company: str, topic: str, year: str, detail: str, accent: str) -> None:
    canvas.box(0, 0, GRID, 18, accent)
    canvas.text(5, 14, company, 16, PAPER, width=118)
    canvas.text(5, 34, topic, 15, INK, width=58)
    canvas.text(5, 45, detail or "Annual report", 8, INK if detail else GREY, width=58)
    canvas.text(125, 43, year, 26, INK, anchor="rs")
    canvas.box(5, 50, 123, 50.8, RULE)


def _draw_body(canvas: _Canvas, company: str, topic: str, period: str, random: Random) -> None:
    filled = random.choice(words.BODY_TEMPLATES).format(
        company=company,
        topic=topic,
        period=period,
        verb=random.choice(words.VERBS),
        percent=random.randint(2, 60),
    )
    canvas.text(5, 59, filled, 5.5, INK, width=118)
    canvas.text(5, 66, random.choice(words.BODY_ENDINGS), 5.5, INK, width=118)


def _draw_table(canvas: _Canvas, figures: list[int], unit: str, accent: str) -> None:
    top, row_height = 71, 9.5
    canvas.box(5, top, 55, top + row_height, accent)
    rows = [
        ("Quarter", unit),
        *((quarter, str(figure)) for quarter, figure in zip(words.QUARTERS, figures, strict=True)),
    ]
    for number, (name, value) in enumerate(rows):
        y = top + number * row_height
        if number and number % 2 == 0:
            canvas.box(5, y, 55, y + row_height, TINT)
        colour = INK if number else PAPER
        canvas.text(8, y + 7, name, 6, colour)
        canvas.text(52, y + 7, value, 6, colour, anchor="rs")


def _draw_chart(canvas: _Canvas, figures: list[int], accent: str, *, as_line: bool) -> None:
    left, top, bottom, step = 64, 71, 112, 15
    for level in range(4):
        y = bottom - level * (bottom - top) / 3
        canvas.box(left, y, 123, y + 0.8, RULE if level else GREY)
    heights = [bottom - figure / 100 * (bottom - top) for figure in figures]
    middles = [left + step * (number + 0.5) for number in range(len(figures))]
    if as_line:
        canvas.line(list(zip(middles, heights, strict=True)), accent)
    for x, y, quarter in zip(middles, heights, words.QUARTERS, strict=True):
        half = 1.5 if as_line else 4.5
        canvas.box(x - half, y - (half if as_line else 0), x + half, y + half if as_line else bottom, accent)
        canvas.text(x, bottom + 6, quarter, 5.5, GREY, anchor="ms")


@lru_cache(maxsize=64)
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    # Pillow's own Aileron; the basic layout, as the other one depends on a library of the platform
    font = ImageFont.load_default(max(4, size_px))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)
