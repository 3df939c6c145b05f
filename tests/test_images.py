import io
import os
import struct
import tracemalloc
import warnings
import zlib
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmtune.data.arrow import with_encoded_images
from mmtune.data.images import check_pages, decode_page
from mmtune.errors import ImageDecodeError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def check_page(content, document_id):
    """Check the one page of a corpus, in memory and in a file."""
    corpus = Dataset.from_dict({"document_id": [document_id], "image": [bytes(content)]})
    check_pages(with_encoded_images(corpus, "image"), show_progress_bar=False)
    with NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        corpus = Dataset.from_dict({"document_id": [document_id], "image": [file.name]})
        check_pages(with_encoded_images(corpus, "image"), show_progress_bar=False)


def encoded(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decoded(content: bytes, document_id: str = "page-7", **options) -> Image.Image:
    return decode_page({"bytes": content, "path": None}, document_id, **options)


def photo(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """An image without repetition, so that it neither compresses to nothing nor looks alike upside down."""
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def corners(width: int, height: int) -> Image.Image:
    """A smooth picture whose four quarters differ: red, green / blue, white."""
    image = Image.new("RGB", (width, height))
    colours = ("red", "lime", "blue", "white")
    for k, colour in enumerate(colours):
        left, top = (k % 2) * (width // 2), (k // 2) * (height // 2)
        image.paste(colour, (left, top, width if k % 2 else width // 2, height if k // 2 else height // 2))
    return image


def quarters(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters, rounded to black or full."""
    middles = [
        (x, y) for y in (image.height // 4, 3 * image.height // 4) for x in (image.width // 4, 3 * image.width // 4)
    ]
    return [tuple(255 * (value > 127) for value in image.getpixel(middle)) for middle in middles]


def half_transparent(mode: str) -> Image.Image:
    """The left half opaque red (or black), the right half fully transparent."""
    image = Image.new("RGBA", (4, 2), (*RED, 255))
    image.paste((0, 0, 0, 0), (2, 0, 4, 2))
    return image.convert(mode)


def palette_image(*, transparency: int | bytes | None = None) -> tuple[Image.Image, dict]:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *BLUE])
    image.paste(1, (2, 0, 4, 2))
    return image, {} if transparency is None else {"transparency": transparency}


# --- modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("L", 100, (100, 100, 100)),
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("LA", (0, 0), (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I;16", 0, (0, 0, 0)),
    ],
)
def test_a_png_of_each_mode_gives_its_colour(mode, value, expected):
    page = decoded(encoded(Image.new(mode, (3, 2), value)))
    assert page.mode == "RGB"
    assert page.size == (3, 2)
    assert page.getpixel((2, 1)) == expected


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), RED),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("I", 65535, (255, 255, 255)),
        ("I", 128 * 257, (128, 128, 128)),
        ("I;16", 200 * 257, (200, 200, 200)),
        ("LA", (50, 255), (50, 50, 50)),
        ("RGBA", (*RED, 0), (255, 255, 255)),
    ],
)
def test_a_tiff_of_each_mode_gives_its_colour(mode, value, expected):
    page = decoded(encoded(Image.new(mode, (3, 2), value), "TIFF"))
    assert (page.mode, page.getpixel((1, 1))) == ("RGB", expected)


def test_a_cmyk_jpeg_keeps_its_colours():
    page = decoded(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert page.mode == "RGB"
    assert np.abs(np.array(page.getpixel((8, 8))) - np.array(RED)).max() < 12


def test_a_grey_jpeg_becomes_rgb_also_when_it_is_scaled():
    content = encoded(Image.new("L", (256, 256), 77), "JPEG")
    for options in ({}, {"max_pixels": 1000}):
        page = decoded(content, **options)
        assert (page.mode, page.getpixel((5, 5))) == ("RGB", (77, 77, 77))


def test_a_palette_without_transparency_gives_its_colours():
    image, options = palette_image()
    page = decoded(encoded(image, **options))
    assert [page.getpixel((x, 0)) for x in (0, 3)] == [RED, BLUE]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_transparent_palette_colours_are_white(transparency, image_format):
    if image_format == "GIF":
        transparency = 1  # a GIF has one transparent colour at most
    image, options = palette_image(transparency=transparency)
    page = decoded(encoded(image, image_format, **options))
    assert [page.getpixel((x, 0)) for x in (0, 3)] == [RED, (255, 255, 255)]


def test_half_transparent_pixels_are_mixed_with_white():
    page = decoded(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 51))))
    assert page.getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize(("mode", "transparent"), [("L", 9), ("RGB", (9, 9, 9))])
def test_the_transparent_colour_of_a_png_is_white(mode, transparent):
    image = Image.new(mode, (2, 1), transparent)
    image.putpixel((1, 0), 80 if mode == "L" else (80, 80, 80))
    page = decoded(encoded(image, transparency=transparent))
    assert [page.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (80, 80, 80)]


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_survives_no_format(mode):
    page = decoded(encoded(half_transparent(mode)))
    assert page.getpixel((3, 1)) == (255, 255, 255)
    assert page.getpixel((0, 0)) != (255, 255, 255)


def test_a_palette_with_an_alpha_channel_is_laid_on_white():
    page = decoded(encoded(half_transparent("RGBA").convert("PA"), "TIFF"))
    assert (page.mode, page.getpixel((3, 1))) == ("RGB", (255, 255, 255))


def test_floating_point_pixels_are_a_named_error():
    content = encoded(Image.new("F", (3, 2), 0.5), "TIFF")
    with pytest.raises(ImageDecodeError, match=r"'page-7'.*floating-point"):
        decoded(content)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_common_formats_decode_to_rgb_of_their_size(image_format):
    page = decoded(encoded(Image.new("RGB", (30, 20), (200, 30, 60)), image_format))
    assert (page.mode, page.size) == ("RGB", (30, 20))
    assert np.abs(np.array(page.getpixel((15, 10))) - (200, 30, 60)).max() < 10


def test_a_page_is_detached_from_its_file(tmp_path):
    path = tmp_path / "page.png"
    photo().save(path)
    page = decode_page({"bytes": None, "path": str(path)}, "a")
    path.unlink()
    assert np.array_equal(np.asarray(page), np.asarray(photo()))


# --- orientation and frames --------------------------------------------------------------------------------------

EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored turned to the left, to be turned to the right
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(orientation: int, image_format: str, width: int = 64, height: int = 32) -> bytes:
    """The upright picture, stored as a camera in this orientation stores it."""
    upright = corners(width, height)
    stored = upright.transpose(EXIF_TURNS[orientation]) if orientation in EXIF_TURNS else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, image_format, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pages_are_upright_in_every_orientation(orientation, image_format):
    page = decoded(turned(orientation, image_format))
    assert page.size == (64, 32)
    assert quarters(page) == quarters(corners(64, 32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_pages_are_upright_with_their_aspect(orientation):
    page = decoded(turned(orientation, "JPEG", 640, 320), max_pixels=80 * 40)
    assert page.size == (80, 40)
    assert quarters(page) == quarters(corners(80, 40))


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_out_of_range_is_ignored(orientation):
    assert decoded(turned(orientation, "JPEG")).size == (64, 32)


def test_of_an_animation_the_first_frame_is_taken_with_a_warning():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"'page-7' holds 2 frames; only the first"):
        page = decoded(content)
    assert page.getpixel((1, 1)) == RED


@pytest.mark.parametrize("image_format", ["TIFF", "WEBP"])
def test_of_several_pages_the_first_is_taken_with_a_warning(image_format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, (0, 255, 0))]
    options = {"lossless": True} if image_format == "WEBP" else {}
    content = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    with pytest.warns(UserWarning, match=r"'page-7' holds 3 frames; only the first"):
        page = decoded(content)
    assert page.getpixel((1, 1)) == RED


def test_one_frame_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image_format in ("GIF", "TIFF", "WEBP", "PNG", "JPEG"):
            decoded(encoded(photo(), image_format))


# --- what is no page ---------------------------------------------------------------------------------------------


def png_header_of(width: int, height: int) -> bytes:
    """A PNG that says it is this large, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("check", ["decode", "check"])
def test_a_decompression_bomb_is_a_named_error(check):
    content = png_header_of(50_000, 50_000)
    with pytest.raises(ImageDecodeError, match=r"'bomb'.*(50000 x 50000|2500000000)"):
        decoded(content, "bomb") if check == "decode" else check_page(content, "bomb")


def test_a_decompression_bomb_is_refused_also_where_pillows_own_limit_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for options in ({}, {"max_pixels": 1000}):
        with pytest.raises(ImageDecodeError, match=r"'bomb' is 50000 x 50000 pixels, more than the 178,956,970"):
            decoded(png_header_of(50_000, 50_000), "bomb", **options)


def damaged() -> dict[str, bytes]:
    jpeg, png = encoded(photo(256, 256), "JPEG"), encoded(photo(256, 256))
    tiff, gif = encoded(photo(256, 256), "TIFF"), encoded(photo(256, 256), "GIF")
    return {
        "empty": b"",
        "text": b"this is a text file named page.png\n" * 20,
        "zeros": bytes(4096),
        "jpeg cut in half": jpeg[: len(jpeg) // 2],
        "jpeg without its last bytes": jpeg[:-300],
        "jpeg header": jpeg[:200],
        "png cut in half": png[: len(png) // 2],
        "png without its end": png[:-12],
        "png without its last rows": png[:-2000],
        "png header": png[:40],
        "tiff cut in half": tiff[: len(tiff) // 2],
        "gif cut in half": gif[: len(gif) // 2],
        "webp cut in half": encoded(photo(256, 256), "WEBP")[:3000],
        "bmp cut in half": encoded(photo(256, 256), "BMP")[:90_000],
        "floating point": encoded(Image.new("F", (3, 2), 0.5), "TIFF"),
    }


NOT_FOUND_BY_DECODING = {"png without its end"}  # every pixel is there


@pytest.mark.parametrize("name", sorted(set(damaged()) - NOT_FOUND_BY_DECODING))
def test_damaged_pages_are_named(name):
    with pytest.raises(ImageDecodeError, match=r"'page-7'"):
        decoded(damaged()[name])


@pytest.mark.parametrize("name", sorted(set(damaged()) - NOT_FOUND_BY_DECODING))
def test_the_check_finds_what_decoding_would(name):
    with pytest.raises(ImageDecodeError, match=r"'page-7'"):
        check_page(damaged()[name], "page-7")


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("size", [(16, 16), (400, 400)])
def test_the_check_accepts_good_pages(image_format, size):
    content = encoded(photo(*size), image_format)
    check_page(content, "good")
    check_page(memoryview(content), "good")


def test_the_check_accepts_pages_with_bytes_after_their_end_and_long_headers():
    check_page(encoded(photo(), "JPEG") + bytes(500), "good")
    check_page(encoded(photo()) + b"trailing" * 50, "good")
    check_page(encoded(photo(), "JPEG", comment=b"c" * 60_000, icc_profile=bytes(200_000)), "good")


def test_the_error_says_what_the_bytes_look_like_and_what_to_do():
    with pytest.raises(ImageDecodeError, match=r"'doc-1'.*19 bytes, starting b'<html>.*Replace the file"):
        decoded(b"<html>Not Found\n</>", "doc-1")


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, {"bytes": None, "path": ""}])
def test_no_image_is_a_named_error(nothing):
    with pytest.raises(ImageDecodeError, match=r"Document 'doc-1' has no image"):
        decode_page(nothing, "doc-1")


def test_files_that_are_missing_or_no_image_are_named(tmp_path):
    text = tmp_path / "page.png"
    text.write_text("not a picture")
    for path in (text, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageDecodeError, match=rf"'doc-1'.*{path.name}"):
            decode_page({"bytes": None, "path": str(path)}, "doc-1")


# --- size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
@given(width=st.integers(1, 300), height=st.integers(1, 300), max_pixels=st.integers(1, 40_000))
@settings(max_examples=40, deadline=None)
def test_max_pixels_bounds_every_page_and_keeps_its_aspect(image_format, width, height, max_pixels):
    page = decoded(encoded(Image.new("RGB", (width, height), RED), image_format), max_pixels=max_pixels)
    assert page.width * page.height <= max_pixels
    if width * height <= max_pixels:
        assert page.size == (width, height)
    else:
        scale = (max_pixels / (width * height)) ** 0.5
        assert page.width <= max(1, width * scale) + 1
        assert page.height <= max(1, height * scale) + 1
        if min(width, height) * scale >= 1:
            assert page.width > width * scale - 2
            assert page.height > height * scale - 2


def test_pages_within_the_bound_keep_every_pixel():
    image = photo(100, 60)
    assert np.array_equal(np.asarray(decoded(encoded(image), max_pixels=6000)), np.asarray(image))


def test_scaled_jpegs_look_like_the_page():
    image = corners(800, 600).resize((800, 600), Image.Resampling.BILINEAR)
    content = encoded(image, "JPEG", quality=95)
    fast, exact = decoded(content, max_pixels=80 * 60), image.resize((80, 60), Image.Resampling.BICUBIC)
    assert fast.size == (80, 60)
    assert np.abs(np.asarray(fast).astype(int) - np.asarray(exact)).mean() < 6


def test_scaled_jpegs_of_odd_sizes_are_not_scaled_up():
    content = encoded(photo(801, 603), "JPEG")
    for max_pixels in (5_000, 30_000, 120_000, 400_000):
        page = decoded(content, max_pixels=max_pixels)
        assert max_pixels * 0.95 < page.width * page.height <= max_pixels
        assert page.width / page.height == pytest.approx(801 / 603, rel=0.03)


def test_a_huge_jpeg_is_halved_where_that_is_enough():
    """Other formats and smaller scans keep every pixel."""
    for format_name, size, expected in (
        ("JPEG", (640, 480), (320, 240)),
        ("JPEG", (300, 200), (300, 200)),
        ("PNG", (640, 480), (640, 480)),
    ):
        buffer = io.BytesIO()
        Image.new("RGB", size, "red").save(buffer, format_name)
        page = decode_page({"bytes": buffer.getvalue(), "path": None}, "p", enough=320 * 240)
        assert page.size == expected


@pytest.mark.parametrize(("values", "expected"), [([0, 200], [0, 200]), ([0, 65535], [0, 255]), ([0, 25700], [0, 100])])
def test_grey_values_of_32_bit_files_keep_their_brightness(values, expected):
    buffer = io.BytesIO()
    Image.fromarray(np.array([values], dtype=np.int32)).save(buffer, "TIFF")
    page = decode_page({"bytes": buffer.getvalue(), "path": None}, "p")
    assert [page.getpixel((at, 0))[0] for at in (0, 1)] == expected


def one_page(path) -> Dataset:
    corpus = Dataset.from_dict({"document_id": ["page-7"], "image": [str(path)]})
    return with_encoded_images(corpus, "image")


def check(corpus):
    check_pages(corpus, show_progress_bar=False)


def decode(corpus):
    decode_page(corpus[0]["image"], "page-7")


@pytest.mark.parametrize("read", [check, decode])
def test_pipes_devices_and_folders_are_no_pages(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(ImageDecodeError, match=r"'page-7'.*it is no file, but a folder, a pipe or a device"):
            read(one_page(path))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ImageDecodeError, match=r"'page-7'.*2,147,483,648 bytes are more than"):
        read(one_page(tmp_path / "huge.png"))


def test_the_check_of_a_large_file_reads_its_ends_alone(tmp_path, monkeypatch):
    content = encoded(photo(), "JPEG")
    (tmp_path / "page.jpg").write_bytes(content[:-2] + bytes(50_000_000) + content[-2:])
    tracemalloc.start()
    check_pages(one_page(tmp_path / "page.jpg"), show_progress_bar=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_a_page_without_an_image_is_named_by_the_check():
    corpus = Dataset.from_dict({"document_id": ["a", "page-7"], "image": [encoded(photo()), None]})
    with pytest.raises(ImageDecodeError, match=r"'page-7' has no image: neither bytes nor a path"):
        check_pages(with_encoded_images(corpus, "image"), show_progress_bar=False)
