"""Pages on their way into a model: as bytes wherever that is exact, each processed once, large scans decoded small.

An image processor resizes a page, cuts it, and at last turns bytes into floats by a table of 256 values a channel. That
last step is left to the model: what travels from the workers, waits in a batch, and is kept for the next epoch, is an
eighth of the floats for Qwen3-VL and a quarter for CLIP. What the model computes is the same to the bit: a probe on
drawn pages makes sure of it for every encoder, and where it is not so, pages travel as floats.
"""

import copy
import io
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import PIL
import torch
import transformers
import xxhash
from PIL import Image
from sentence_transformers.base.modules import Transformer
from torch import nn
from torch.utils.data import get_worker_info
from transformers import BatchFeature

from mmtune.data.images import DECODING, Enough, enough_for
from mmtune.data.pages import Page
from mmtune.inference.page_store import PageStore
from mmtune.inference.recordings import bare_pairs, decode_ahead, decode_recordings, options_for, reads_recordings
from mmtune.models.adapters import encoders_of
from mmtune.models.pixels import image_processor_of, input_size_of

logger = logging.getLogger(__name__)

Inputs = TypeVar("Inputs")

_PIXELS = "pixel_values"
_AS_BYTES = {"do_rescale": False, "do_normalize": False}
_OPTIONS, _AT_OPTIONS = "processing_kwargs", 3  # an argument of ``Transformer.preprocess``, and its place

# From bytes to floats


@dataclass(frozen=True)
class FloatTable:
    """What an image processor makes of each byte, and how it lays the bytes of a page out.

    Attributes:
        values: float32, shape ``(channels, 256)``.
        repeats: How many times each patch stands in a row of patches, one after the other in time; ``None`` where
            pixels have the shape ``(pages, channels, height, width)``.
    """

    values: torch.Tensor
    repeats: int | None

    def restore(self, pixels: torch.Tensor) -> torch.Tensor:
        """The floats, float32, that the image processor would have given.

        Args:
            pixels: uint8; of shape ``(pages, channels, height, width)``, or ``(patches, channels * pixels)``.
        """
        count = len(self.values)
        channels = pixels if self.repeats is None else pixels.view(len(pixels), count, -1)
        values = self.values.to(pixels.device)
        offsets = torch.arange(count, device=pixels.device, dtype=torch.int32) * 256
        at = channels.int() + offsets.view(1, count, *[1] * (channels.ndim - 2))
        found = values.view(-1).index_select(0, at.view(-1)).view(channels.shape)
        if self.repeats is None:
            return found
        return found[:, :, None].expand(-1, -1, self.repeats, -1).reshape(len(pixels), -1)


class FromBytes:
    """A forward pre-hook of the host's ``Transformer``: floats in place of bytes, in a batch of its own."""

    def __init__(self, table: FloatTable) -> None:
        self.table = table

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with floats; ``None``, which leaves them, where they have no bytes."""
        features, *others = arguments
        pixels = features.get(_PIXELS)
        if pixels is None or pixels.dtype != torch.uint8:
            return None
        return {**features, _PIXELS: self.table.restore(pixels)}, *others


# From pages to bytes


@dataclass
class PageProcessing:
    """How one image processor is called for pages, and what it made of them.

    Attributes:
        processor: The image processor.
        options: What the host calls it with.
        table: From bytes to floats; ``None`` where pages travel as floats.
        store: Where what was made is kept; ``None`` keeps nothing.
        count: How many pages were processed, in this process.
        seconds: What that took, decoding included.
        num_bytes: What was made of them.
    """

    processor: Any
    options: dict[str, Any] = field(default_factory=dict)
    table: FloatTable | None = None
    store: PageStore | None = None
    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0

    @cached_property
    def enough(self) -> Enough:
        """What a page may be scaled down to by the decoder."""
        return enough_for(input_size_of(self.processor, self.options))

    @cached_property
    def reading(self) -> "ReadsPages":
        """A copy of the image processor that takes pages as bytes."""
        found = copy.copy(self.processor)
        found.__class__ = type(type(found).__name__, (ReadsPages, type(found)), {})
        found.processing = self
        return found

    def __getstate__(self) -> dict[str, Any]:
        # the class of ``reading`` is made here, so that another process can't find it by its name
        return {name: value for name, value in vars(self).items() if name != "reading"}

    @cached_property
    def key(self) -> str:
        """A digest of all that decides what is made of a page, but for the page."""
        known = json.loads(self.processor.to_json_string())
        parts = [type(self.processor).__qualname__, known, sorted(self.options.items()), DECODING, self.enough]
        versions = [transformers.__version__, PIL.__version__]
        return xxhash.xxh3_128_hexdigest(repr([*parts, *versions]).encode())

    def prepare(self, page: Page) -> dict[str, np.ndarray]:
        """What the image processor makes of a page, which knows it from then on; safe in several threads.

        Raises:
            ImageDecodeError: The page is no readable image; the message names the document.
        """
        made = page.prepared.get(self.key)
        if made is None:
            name = "" if self.store is None else f"{page.digest()}-{self.key}"
            made = None if self.store is None else self.store.get(name)
            if made is None:
                made = self._process(page)
                if self.store is not None:
                    self.store.put(name, made)
            page.prepared[self.key] = made
        return made

    def join(self, pages: Sequence[Page]) -> BatchFeature:
        """What the image processor gives for all pages, with bytes in place of floats."""
        made = [self.prepare(page) for page in pages]
        return BatchFeature({name: torch.from_numpy(np.concatenate([each[name] for each in made])) for name in made[0]})

    def _process(self, page: Page) -> dict[str, np.ndarray]:
        started = time.perf_counter()
        image = page.decoded(self.enough)
        if not page.has_own_limit and self._counts_other_patches(image.size, page.size):
            image = page.decoded(None)
        made = as_bytes(self.processor, image, self.options)
        self.count += 1
        self.seconds += time.perf_counter() - started
        self.num_bytes += sum(array.nbytes for array in made.values())
        return made

    def _counts_other_patches(self, size: tuple[int, int], full_size: tuple[int, int]) -> bool:
        """Whether rounding the sides of a page that was scaled down would give it another grid."""
        count = getattr(self.processor, "get_number_of_image_patches", None)
        if count is None or size == full_size:
            return False
        return count(*size[::-1], dict(self.options)) != count(*full_size[::-1], dict(self.options))


def as_bytes(processor: Any, image: Image.Image, options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What an image processor gives for one image, its pixels as uint8.

    Raises:
        ValueError: The pixels are not bytes.
    """
    in_time = {"temporal_patch_size": 1} if hasattr(processor, "temporal_patch_size") else {}
    found = processor([image], **{**options, **_AS_BYTES, **in_time})
    made = {name: np.asarray(value) for name, value in found.items()}
    pixels = made[_PIXELS].astype(np.uint8)
    if not np.array_equal(pixels, made[_PIXELS]):
        raise ValueError("the pixels are no bytes before they are rescaled")
    return {**made, _PIXELS: pixels}


class ReadsPages:
    """For a copy of an image processor: it takes pages as bytes, and all else as the processor does."""

    processing: PageProcessing

    def __call__(self, images: Any, **options: Any) -> BatchFeature:
        """What the image processor gives, with bytes in place of floats where all images are pages."""
        pages = _flat(images)
        processing = self.processing
        if processing.table is None or options != processing.options or not all(isinstance(x, Page) for x in pages):
            return processing.processor(images, **options)
        return processing.join(pages)


def _flat(images: Any) -> list[Any]:
    return [part for each in images for part in _flat(each)] if isinstance(images, (list, tuple)) else [images]


class Preprocessing:
    """In place of ``preprocess`` of the host's ``Transformer``: the same, but for pages, which it reads its own way.

    Sounds and clips are decoded here where they are not yet, for this encoder. The image processor is exchanged for as
    long as the host preprocesses a batch, so that none but the model's own is ever saved.

    Attributes:
        encoder: The module.
        processing: How its pages are read; ``None`` where it reads none.
    """

    def __init__(self, encoder: Transformer, processing: PageProcessing | None) -> None:
        self.encoder, self.processing = encoder, processing

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As ``Transformer.preprocess``."""
        if reads_recordings(self.encoder):
            inputs = decode_recordings(self.encoder, args[0] if args else kwargs.pop("inputs"))
            inputs, taken = bare_pairs(inputs)
            args = (inputs, *args[1:])
            if len(args) < _AT_OPTIONS and (options := options_for(self.encoder, inputs, kwargs.get(_OPTIONS), taken)):
                kwargs[_OPTIONS] = options
        if self.processing is None:
            return type(self.encoder).preprocess(self.encoder, *args, **kwargs)
        with _exchanged(self.encoder, self.processing.reading):
            return type(self.encoder).preprocess(self.encoder, *args, **kwargs)


@contextmanager
def _exchanged(encoder: Transformer, reading: Any) -> Iterator[None]:
    is_all = encoder.processor is image_processor_of(encoder)
    holder, name = (encoder, "processor") if is_all else (encoder.processor, "image_processor")
    own = getattr(holder, name)
    setattr(holder, name, reading)
    try:
        yield
    finally:
        setattr(holder, name, own)


# Models


@contextmanager
def reading_pages(model: Any, store: PageStore | None = None) -> Iterator[dict[str, str]]:
    """Let a model take pages as bytes for as long as the block runs; within another such block nothing changes.

    Args:
        model: Any host model; nothing of it is saved with it.
        store: Where what image processors made of pages is kept; ``None`` keeps nothing.

    Yields:
        For each image processor that is newly read by, how its pages travel: as bytes, or as floats.
    """
    with ExitStack() as stack:
        found = {}
        for encoder in encoders_of(model) if isinstance(model, nn.Module) else []:
            if image_processor_of(encoder) is not None and _preprocessing_of(encoder) is None:
                processing = replace(_probed(encoder), store=store, count=0, seconds=0.0, num_bytes=0)
                stack.enter_context(_reading(encoder, processing))
                found[type(processing.processor).__name__] = "floats" if processing.table is None else "bytes"
            elif reads_recordings(encoder) and _preprocessing_of(encoder) is None:
                stack.enter_context(_reading(encoder, None))
        yield found


@contextmanager
def _reading(encoder: Transformer, processing: PageProcessing | None) -> Iterator[None]:
    encoder.preprocess = Preprocessing(encoder, processing)
    hook = (
        None
        if processing is None or processing.table is None
        else encoder.register_forward_pre_hook(FromBytes(processing.table))
    )
    try:
        yield
    finally:
        del encoder.preprocess
        if hook is not None:
            hook.remove()


def prepare_pages(model: Any, inputs: Inputs) -> Inputs:
    """Do the work of a model's image processor on pages ahead of time: in a worker, or in a thread.

    Args:
        model: A model within ``reading_pages``; for another, and where pages travel as floats, they are decoded.
        inputs: What the model will be given: pages, texts, or lists and dictionaries of these.

    Returns:
        ``inputs``, whose pages know what the image processor makes of them, and whose sounds and clips are decoded.

    Raises:
        MediaDecodeError: A page, a sound or a clip can't be decoded; the message names the document.
    """
    if isinstance(model, nn.Module):
        inputs = decode_ahead(model, inputs)
    known = processings_of(model)
    if len(known) > 1:  # a page is of one of several encoders, and only the host knows of which
        return inputs
    prepare: Callable[[Page], object] = known[0].prepare if known else Page.load
    pages = {id(page): page for page in _pages_in(inputs)}.values()
    threads = min(len(pages), count_reading_threads(model))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(prepare, pages), maxlen=0)
    else:
        deque(map(prepare, pages), maxlen=0)
    return inputs


def count_reading_threads(model: Any) -> int:
    """Threads that prepare pages at once, for a model that computes on a GPU: the cores of this process, 8 at most.

    A CPU computes with the cores that they would take, and a worker of the data loader is one of several already.
    """
    if getattr(model, "device", torch.device("cpu")).type == "cpu" or get_worker_info() is not None:
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // local_processes()))


def local_processes() -> int:
    """Processes that work together on this machine, as torchrun tells it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def page_bytes(encoder: Transformer) -> int:
    """The most bytes that a page of an encoder takes in a batch; 0 where it reads none, or nothing limits its size."""
    if image_processor_of(encoder) is None:
        return 0
    processing = _probed(encoder)
    size = input_size_of(processing.processor, processing.options)
    pixels = 0 if size is None else size if isinstance(size, int) else size[0] * size[1]
    in_time = getattr(processing.processor, "temporal_patch_size", 1)
    return 3 * pixels * (1 if processing.table is not None else 4 * in_time)


def processings_of(model: Any) -> list[PageProcessing]:
    """How the image processors of a model read pages, those that give bytes; empty outside of ``reading_pages``."""
    found = [_preprocessing_of(encoder) for encoder in encoders_of(model)] if isinstance(model, nn.Module) else []
    known = [each.processing for each in found if each is not None and each.processing is not None]
    return [processing for processing in known if processing.table is not None]


def _pages_in(inputs: Any) -> Iterator[Page]:
    if isinstance(inputs, Page):
        yield inputs
    elif isinstance(inputs, (list, tuple, dict)):
        for part in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _pages_in(part)


def _preprocessing_of(encoder: Transformer) -> Preprocessing | None:
    found = vars(encoder).get("preprocess")
    return found if isinstance(found, Preprocessing) else None


# The probe

_probes: WeakKeyDictionary[Transformer, tuple[str, PageProcessing]] = WeakKeyDictionary()


def _probed(encoder: Transformer) -> PageProcessing:
    """What the probe of an encoder found, without asking again as long as its image processor is set as it was."""
    settings = f"{image_processor_of(encoder).to_json_string()} {encoder.processing_kwargs} {encoder.modality_config}"
    known = _probes.get(encoder)
    if known is None or known[0] != settings:
        known = _probes[encoder] = settings, probe(encoder)
    return known[1]


def probe(encoder: Transformer) -> PageProcessing:
    """How the pages of an encoder can be read: as bytes where that is shown to be exact, else as floats.

    Drawn pages of several sizes, one of them with all bytes in each channel, are preprocessed both ways. Everything
    must be equal: the restored pixels to the bit, and all else.
    """
    processing = PageProcessing(image_processor_of(encoder))
    try:
        pages = [_drawn_page(size, seed) for seed, size in enumerate(((97, 61), (64, 120), (151, 200)))]
        seen: list[dict[str, Any]] = []
        expected = _recording(encoder, pages, seen)
        processing.options = seen[0]
        table = read_table(processing.processor, processing.options)
        processing.table = table
        found = Preprocessing(encoder, processing)(pages)
        _require_equal(expected, {**found, _PIXELS: table.restore(found[_PIXELS])})
    except Exception as error:  # image processors differ in every way; the way of the host is always right
        processing.table = None
        logger.info(
            "%s gives pages as floats: %s: %s", type(processing.processor).__name__, type(error).__name__, error
        )
    return processing


def _drawn_page(size: tuple[int, int], seed: int) -> Page:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    return Page({"bytes": file.getvalue()}, f"drawn {seed}")


def _recording(encoder: Transformer, pages: Sequence[Page], seen: list[dict[str, Any]]) -> dict[str, Any]:
    """What the host makes of pages; the options that it calls the image processor with go into ``seen``."""
    processor = image_processor_of(encoder)

    def record(_: Any, images: Any, **options: Any) -> Any:
        seen.append(options)
        return processor(images, **options)

    recording = copy.copy(processor)
    recording.__class__ = type(type(processor).__name__, (type(processor),), {"__call__": record})
    with _exchanged(encoder, recording):
        return type(encoder).preprocess(encoder, list(pages))


def read_table(processor: Any, options: Mapping[str, Any]) -> FloatTable:
    """What an image processor makes of each byte of each channel, from an image that has them all.

    Raises:
        ValueError: A byte becomes different floats, or the pixels lie in an unknown order.
    """
    side = int(getattr(processor, "patch_size", None) or 16) * int(getattr(processor, "merge_size", None) or 1)
    side *= -(-16 // side)  # 256 pixels at least
    ramp = np.arange(side * side).reshape(side, side) % 256
    image = Image.fromarray(np.stack([ramp, np.roll(ramp, 85), np.roll(ramp, 170)], axis=-1).astype(np.uint8))
    as_it_is = {**options, "do_resize": False, "do_center_crop": False}
    pixels = as_bytes(processor, image, as_it_is)[_PIXELS]
    floats = np.asarray(processor([image], **as_it_is)[_PIXELS])
    repeats = None
    if pixels.ndim == 2:
        repeats = floats.shape[1] // pixels.shape[1]
        pixels = pixels.reshape(len(pixels), 3, -1)
        floats = floats.reshape(len(floats), 3, repeats, -1)[:, :, 0]
    if pixels.shape[1] != 3 or pixels.shape != floats.shape or floats.dtype != np.float32:
        raise ValueError(f"pixels of shape {pixels.shape} become floats of shape {floats.shape}, {floats.dtype}")
    values = np.full((3, 256), np.nan, dtype=np.float32)
    for channel in range(3):
        values[channel, pixels[:, channel].reshape(-1)] = floats[:, channel].reshape(-1)
    if np.isnan(values).any():
        raise ValueError(f"{np.isnan(values).sum()} bytes did not come through")
    return FloatTable(torch.from_numpy(values), repeats)


def _require_equal(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if set(expected) != set(found):
        raise ValueError(f"{sorted(set(expected) ^ set(found))} are not in both")
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, torch.Tensor) else value == found[name]
        if not same:
            raise ValueError(f"{name!r} differs")
