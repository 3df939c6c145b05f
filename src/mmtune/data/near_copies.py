"""Pages that show the same and have other bytes: rescaled, compressed again, cropped, scanned a second time.

Every page is looked at once and kept as a sketch of 1 kB. Sketches propose pairs: of the pages whose thumbnails
correlate most, those whose perceptual hashes are close. Each pair is then verified on its pixels, in two steps:

1.  The two are aligned. A start over scales, angles and shifts by Fourier transforms, then Gauss-Newton steps over
    the affine maps to the highest correlation (Evangelidis and Psarakis, 2008). Unrelated pages of text reach
    0.5, copies 0.8 and more, and two receipts of one shop as much as copies.
2.  Aligned pages are compared spot by spot. A copy agrees everywhere, as well as its scan allows. A form with other
    entries, or a page with another figure, agrees but for the spots that hold them.

So pages that agree everywhere are copies, and pages that agree on the whole are look-alikes, for a person to judge.
The thresholds were measured on pages of text, of forms and of scanned receipts (benchmarks/near_copies.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import fft, ndimage

RASTER_PX = 384
"""Sides of the square of greys that a page is compared by; its own aspect is undone by the alignment."""

_ALIGN_PX, _HASHED_PX, _THUMBNAIL_PX, _HASH_SIDE = 128, 64, 16, 16
_INK_CONTRAST = 16  # of 256 greys, to what is around
_SCALES = (0.94, 0.97, 1.0, 1.03, 1.065)  # a crop of 3% on each side is a scale of 0.94
_ANGLES = np.deg2rad((-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0))
_MAX_SHIFT_PX = 12  # of 128
_STARTS, _STEPS = 4, 12
_GOOD = 0.8  # no other start is tried

MAX_HASH_DISTANCE = 76
"""Of 256 bits. Copies differ in 72 and less, 19 of 20 pages of text of one layout in more."""
MIN_START = 0.2
"""The correlation at the best start: below it nothing is aligned. Copies begin at 0.3."""
MIN_CORRELATION = 0.65
"""Of aligned pages that look alike: copies reach 0.8, the closest unrelated pages of text 0.5."""
MIN_AGREEMENT = 0.7
"""Of the spot of two aligned pages that agrees least. Copies are above; with other amounts it is mostly below 0."""

_BLOCKS = 12  # a side
_BLOCK_SHIFT_PX = 3  # paper is not flat
_SPOT_PX = 3.0  # the radius of a digit on a page of A4
_STRONG_INK = 1.5  # of the mean energy of a page: fainter spots drown in the noise of a scan
_MIN_INKED = 0.004  # of the page
_MARGIN_PX = 20  # of 384, where crops and the edges of scanned paper differ


@dataclass(frozen=True)
class Sketch:
    """What is kept of a page.

    Attributes:
        thumbnail: Grey values less their mean, of length 1; float32, shape ``(256,)``.
        bits: Which of its lowest frequencies are strong; uint8, shape ``(32,)``.
        ink: The share of pixels that stand out from what is around them; 0 for an empty page.
    """

    thumbnail: np.ndarray
    bits: np.ndarray
    ink: float


class Match(NamedTuple):
    """How alike two pages are.

    Attributes:
        correlation: Of the aligned pages, without what varies slowly; -1 to 1.
        agreement: The same of the spot that agrees least; -1 where they can't be aligned, or have too little ink.
        usual_agreement: What 99 of 100 spots reach: low where one page is a poor scan.
    """

    correlation: float
    agreement: float = -1.0
    usual_agreement: float = -1.0

    @property
    def is_alike(self) -> bool:
        """Whether one page can be laid on the other."""
        return self.correlation >= MIN_CORRELATION

    @property
    def is_copy(self) -> bool:
        """Whether they agree everywhere, as well as they do elsewhere: a digit stands out on a clean page."""
        outlying = 0.06 + 4 * (1 - self.usual_agreement)
        return self.agreement >= max(MIN_AGREEMENT, 1 - outlying)


def make_raster(page: Image.Image) -> np.ndarray:
    """The greys of a page in a square; uint8, shape ``(384, 384)``."""
    return np.asarray(page.convert("L").resize((RASTER_PX, RASTER_PX), Image.Resampling.BILINEAR))


def sketch_page(raster: np.ndarray) -> Sketch:
    """What is kept of a page to find its copies.

    Args:
        raster: As ``make_raster`` gives it.
    """
    thumbnail = _normalise(_shrink(raster, _THUMBNAIL_PX)).ravel()
    waves = fft.dctn(_shrink(raster, _HASHED_PX), norm="ortho")[:_HASH_SIDE, :_HASH_SIDE].ravel()
    waves[0] = 0.0  # the mean grey says nothing
    greys = _shrink(raster, _ALIGN_PX)
    contrast = np.abs(greys - ndimage.gaussian_filter(greys, _ALIGN_PX / 12))
    return Sketch(thumbnail, np.packbits(waves > np.median(waves)), float((contrast > _INK_CONTRAST).mean()))


def find_candidates(
    sketches: list[Sketch], others: list[Sketch] | None = None, *, depth: int = 10, at_once: int = 1024
) -> list[tuple[int, int]]:
    """Pairs of pages that may be copies, by position: near by thumbnail and by hash.

    Args:
        sketches: Of the pages.
        others: Of the pages to compare them with. ``None`` compares them with each other, each pair once.
        depth: How many of the nearest thumbnails are looked at for each page.
        at_once: Pages compared at a time, which bounds the memory.

    Returns:
        The pairs in rising order; in one collection the earlier page stands first.
    """
    if not sketches or (others is not None and not others):
        return []
    columns = sketches if others is None else others
    thumbnails = np.stack([sketch.thumbnail for sketch in columns])
    bits = np.stack([sketch.bits for sketch in columns])
    pairs: set[tuple[int, int]] = set()
    for start in range(0, len(sketches), at_once):
        part = sketches[start : start + at_once]
        cosines = np.stack([sketch.thumbnail for sketch in part]) @ thumbnails.T
        rows = np.arange(len(part))[:, None]
        if others is None:
            cosines[rows[:, 0], start + rows[:, 0]] = -np.inf
        count = min(depth, cosines.shape[1])
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        own = np.stack([sketch.bits for sketch in part])
        differing = np.bitwise_xor(own[:, None], bits[nearest]).astype(np.uint8)
        distance = np.unpackbits(differing, axis=2).sum(axis=2)
        is_near = (distance <= MAX_HASH_DISTANCE) & np.isfinite(cosines[rows, nearest])
        found = zip((start + np.nonzero(is_near)[0]).tolist(), nearest[is_near].tolist(), strict=True)
        pairs.update((min(pair), max(pair)) if others is None else pair for pair in found)
    return sorted(pairs)


class AlignedPage:
    """A page that others are aligned with; what all of its comparisons need is made once.

    Args:
        raster: As ``make_raster`` gives it.
        size: The width and height of the page in pixels. A turned page is sheared in the square of its raster, and
            of two pages the coarser one says how fine they are compared.
    """

    def __init__(self, raster: np.ndarray, size: tuple[int, int]) -> None:
        self._raster = raster.astype(np.float32)
        aspect = size[0] / size[1]
        self._grain_px = max(1.0, 0.6 * RASTER_PX / max(size))
        self._turns = [
            scale * np.array([[np.cos(angle), -np.sin(angle) * aspect], [np.sin(angle) / aspect, np.cos(angle)]])
            for scale in _SCALES
            for angle in _ANGLES
        ]

    @cached_property
    def _edges(self) -> np.ndarray:
        """The page without what varies slowly, and without lines of a pixel, which fit one off; ``(128, 128)``."""
        return _high_pass(ndimage.gaussian_filter(_shrink(self._raster, _ALIGN_PX), 0.7), 4.0)

    @cached_property
    def _slopes(self) -> list[np.ndarray]:
        """The slopes of ``_edges``, down and to the right."""
        return np.gradient(self._edges)

    @cached_property
    def _waves(self) -> np.ndarray:
        """The Fourier transforms of the page at all scales and angles; complex64, shape ``(35, 128, 65)``."""
        turned = [_normalise(_warp(self._edges, turn, np.zeros(2)) * _WINDOW) for turn in self._turns]
        return fft.rfft2(np.array(turned, dtype=np.float32))

    def _band(self, grain_px: float) -> np.ndarray:
        """The page without shading, and without the grain in which two scans differ; float32, of the raster."""
        return _high_pass(ndimage.gaussian_filter(self._raster, grain_px), 6.0)

    def compare(self, other: "AlignedPage") -> Match:
        """How alike the two are."""
        best = _Aligned(-1.0, np.eye(2), np.zeros(2))
        for start in self._find_starts(other):
            best = max(best, self._climb(other, start), key=lambda aligned: aligned.correlation)
            if best.correlation >= _GOOD:
                break
        if best.correlation < MIN_START:
            return Match(best.correlation)
        spots = self._compare_spots(other, best)
        if len(spots) < _MIN_INKED * RASTER_PX**2:
            return Match(best.correlation)
        return Match(best.correlation, float(spots.min()), float(np.percentile(spots, 1)))

    def _find_starts(self, other: "AlignedPage") -> list["_Aligned"]:
        """The scales, angles and shifts at which the two correlate most, best first."""
        target = fft.rfft2(_normalise(other._edges * _WINDOW).astype(np.float32))
        products = fft.irfft2(np.conj(self._waves) * target, s=(_ALIGN_PX, _ALIGN_PX))
        width = 2 * _MAX_SHIFT_PX + 1
        near = np.roll(products, (_MAX_SHIFT_PX, _MAX_SHIFT_PX), (1, 2))[:, :width, :width].reshape(
            len(self._turns), -1
        )
        shifts = np.stack(np.divmod(near.argmax(axis=1), width), axis=1) - _MAX_SHIFT_PX
        heights = near.max(axis=1)
        # What lies at z in the other lies at turn (z - shift) here; lengths are in halves of a side.
        return [
            _Aligned(float(heights[at]), self._turns[at], -self._turns[at] @ shifts[at] / (_ALIGN_PX / 2))
            for at in np.argsort(-heights)[:_STARTS]
            if heights[at] >= MIN_START
        ]

    def _climb(self, other: "AlignedPage", start: "_Aligned") -> "_Aligned":
        """Gauss-Newton steps over affine maps to the highest correlation near a start."""
        _, turn, shift = start
        target = other._edges[::2, ::2].ravel()  # every fourth pixel says enough
        best, worse = _Aligned(-1.0, turn, shift), 0
        for _ in range(_STEPS):
            at = (turn @ _PLACES + shift[:, None] + 1) * _ALIGN_PX / 2 - 0.5
            inside = _IS_INNER & (at >= 1).all(axis=0) & (at <= _ALIGN_PX - 2).all(axis=0)
            if inside.sum() < _ALIGN_PX:
                break
            at, places = at[:, inside], _PLACES[:, inside]
            here, there = ndimage.map_coordinates(self._edges, at, order=1), target[inside]
            here, there = here - here.mean(), there - there.mean()
            lengths = max(float(np.linalg.norm(here)), 1e-6), max(float(np.linalg.norm(there)), 1e-6)
            correlation = float(here @ there) / (lengths[0] * lengths[1])
            worse = 0 if correlation > best.correlation + 1e-4 else worse + 1
            if correlation > best.correlation:
                best = _Aligned(correlation, turn, shift)
            if worse == 3:
                break
            slopes = [ndimage.map_coordinates(part, at, order=1) for part in self._slopes]
            slope = np.stack([part for each in slopes for part in (each * places[0], each * places[1], each)], axis=1)
            curvature = slope.T @ slope
            curvature[np.diag_indices(6)] += 1e-3 * np.trace(curvature) / 6 + 1e-6
            step = np.linalg.solve(curvature, slope.T @ (there * lengths[0] / lengths[1] - here)) * 2 / _ALIGN_PX
            turn, shift = turn + step.reshape(2, 3)[:, :2], shift + step.reshape(2, 3)[:, 2]
        return best

    def _compare_spots(self, other: "AlignedPage", aligned: "_Aligned") -> np.ndarray:
        """The correlation of each spot with ink, float32, shape ``(spots,)``; each block at its own shift."""
        grain_px = max(self._grain_px, other._grain_px)
        one = _warp(self._band(grain_px), aligned.turn, aligned.shift, outside=0.0)
        is_inner = _IS_PAGE & (_warp(_IS_PAGE.astype(np.float32), aligned.turn, aligned.shift, outside=0.0) > 0.99)
        two = _move_blocks(one, np.pad(other._band(grain_px), _BLOCK_SHIFT_PX))
        spot_px = max(_SPOT_PX, 2 * grain_px)
        own, others, common = (ndimage.gaussian_filter(part, spot_px) for part in (one**2, two**2, one * two))
        ink = np.maximum(own / max(1e-6, own[is_inner].mean()), others / max(1e-6, others[is_inner].mean()))
        return (common / np.sqrt(own * others + 1e-6))[(ink > _STRONG_INK) & is_inner]


class _Aligned(NamedTuple):
    """What lies at z in the other page lies at ``turn @ z + shift`` here, from the middle, in halves of a side."""

    correlation: float
    turn: np.ndarray
    shift: np.ndarray


def _shrink(raster: np.ndarray, sides_px: int) -> np.ndarray:
    """Means over squares; float32, shape ``(sides_px, sides_px)``."""
    each = RASTER_PX // sides_px
    return raster.reshape(sides_px, each, sides_px, each).mean(axis=(1, 3), dtype=np.float32)


def _high_pass(greys: np.ndarray, sigma_px: float) -> np.ndarray:
    return greys - ndimage.gaussian_filter(greys, sigma_px)


def _normalise(values: np.ndarray) -> np.ndarray:
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-6)


def _warp(greys: np.ndarray, turn: np.ndarray, shift: np.ndarray, outside: float | None = None) -> np.ndarray:
    """The page as it lies on the other; ``outside`` stands where it has nothing, ``None`` repeats its edge."""
    middle = (len(greys) - 1) / 2
    offset = middle + shift * len(greys) / 2 - turn @ np.full(2, middle)
    how: dict[str, Any] = {"mode": "nearest"} if outside is None else {"mode": "constant", "cval": outside}
    return ndimage.affine_transform(greys, turn, offset, order=1, **how)


def _move_blocks(one: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """The second page with each block moved by the few pixels at which it agrees best with the first.

    Args:
        one: The first page, shape ``(384, 384)``.
        padded: The second, with 3 px of nothing around.
    """
    squared, shifts = padded**2, range(2 * _BLOCK_SHIFT_PX + 1)
    windows = [(slice(down, down + RASTER_PX), slice(right, right + RASTER_PX)) for down in shifts for right in shifts]
    agreement = [_sum_blocks(one * padded[window]) / np.sqrt(_sum_blocks(squared[window]) + 1e-6) for window in windows]
    best, each, two = np.argmax(agreement, axis=0), RASTER_PX // _BLOCKS, np.empty_like(one)
    for row in range(_BLOCKS):
        for at in range(_BLOCKS):
            block = slice(row * each, (row + 1) * each), slice(at * each, (at + 1) * each)
            two[block] = padded[windows[best[row, at]]][block]
    return two


def _sum_blocks(values: np.ndarray) -> np.ndarray:
    return _BLOCK_ROWS @ values @ _BLOCK_ROWS.T


_BLOCK_ROWS = np.kron(np.eye(_BLOCKS), np.ones(RASTER_PX // _BLOCKS)).astype(np.float32)
_WINDOW = (np.outer(np.hanning(_ALIGN_PX), np.hanning(_ALIGN_PX)) ** 0.25).astype(np.float32)
_PLACES = (np.mgrid[:_ALIGN_PX:2, :_ALIGN_PX:2].reshape(2, -1) + 0.5) * 2 / _ALIGN_PX - 1
_IS_PAGE = np.pad(np.ones((RASTER_PX - 2 * _MARGIN_PX,) * 2, dtype=bool), _MARGIN_PX)
_IS_INNER = (np.abs(_PLACES) < 0.95).all(axis=0)
