"""Sounds: from encoded bytes to samples, in one channel, at the rate that a model takes."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from mmtune.arguments import ALL_OF_IT, MediaLimits, is_whole
from mmtune.data.media import Look, Recording, load_decoder
from mmtune.errors import DatasetError, MediaDecodeError

SHORTEST_S = 0.025
"""In seconds: a window of the spectrum of speech. Feature extractors crash on less (transformers 5.23)."""

_SILENT = 1e-4  # of full scale; two steps of 16 bits, as dither has, are 6e-5
_SAMPLES_AT_ONCE = 1 << 20
_HIGHEST_RATE = 1_000_000
_LOUDEST = 8.0  # mixing and filters go beyond 1
_SUBTYPES = {"float": "FLOAT", "double": "FLOAT", "halffloat": "FLOAT", "int16": "PCM_16", "int32": "PCM_32"}


class Sound(Recording):
    """A sound that is decoded when its samples are asked for: WAV, FLAC, Ogg Vorbis and MP3, by soundfile."""

    kind = "audio"

    def decode(self, limits: MediaLimits = ALL_OF_IT) -> dict[str, Any]:
        """``{"array", "sampling_rate"}``: float32 samples of the mean of all channels.

        It is cut before it is decoded, so that of an hour only what is read takes time.

        Raises:
            MediaDecodeError: It is no sound, has no samples or too few, or holds numbers that are not finite.
            MissingExtraError: soundfile or soxr is not installed.
        """
        bounds = self.limits.within(limits)
        with self.opened() as source, load_decoder("soundfile", "Sounds", "audio").SoundFile(source) as file:
            rate = file.samplerate
            wanted = -1 if bounds.max_seconds is None else max(1, round(bounds.max_seconds * rate))
            channels = file.read(wanted, dtype="float32", always_2d=True)
        self._require_enough(len(channels), rate)
        samples = channels.mean(axis=1) if channels.shape[1] > 1 else channels[:, 0]
        self._require_finite(samples)
        if bounds.sampling_rate not in (None, rate):
            samples = load_decoder("soxr", "Sounds of another rate", "audio").resample(
                samples, rate, bounds.sampling_rate
            )
        rate = bounds.sampling_rate or rate
        if bounds.max_seconds is not None:  # resampling rounds up
            samples = samples[: round(bounds.max_seconds * rate)]
        return {"array": np.ascontiguousarray(samples), "sampling_rate": rate}

    def _require_enough(self, count: int, rate: int) -> None:
        if count < SHORTEST_S * rate:
            raise self.error(
                f"has {count} samples at {rate} Hz, and models read {SHORTEST_S} seconds or more, which are "
                f"{round(SHORTEST_S * rate)}"
            )

    def _require_finite(self, samples: np.ndarray) -> None:
        if not np.isfinite(samples).all():
            raise self.error("holds samples that are not finite")

    def look(self) -> Look:
        """A digest of all samples of all channels, and whether none is louder than -80 dB; a portion at a time."""
        count, peak = 0, 0.0
        with self.opened() as source, load_decoder("soundfile", "Sounds", "audio").SoundFile(source) as file:
            rate, digest = file.samplerate, xxhash.xxh3_128(f"{file.samplerate} {file.channels}".encode())
            for block in file.blocks(_SAMPLES_AT_ONCE, dtype="float32", always_2d=True):
                self._require_finite(block)
                digest.update(np.ascontiguousarray(block).data)
                count, peak = count + len(block), max(peak, float(np.abs(block).max(initial=0)))
        self._require_enough(count, rate)
        return Look(digest.hexdigest(), peak < _SILENT)

    def is_cut(self, limits: MediaLimits) -> bool:
        """Whether it is longer than what is read of it."""
        longest = self.limits.within(limits).max_seconds
        return longest is not None and self.seconds() > longest

    def seconds(self) -> float:
        """Its length, from its header; 0 where that can't be read.

        Raises:
            MissingExtraError: soundfile is not installed.
        """
        try:
            with self.opened() as source, load_decoder("soundfile", "Sounds", "audio").SoundFile(source) as file:
                return file.frames / file.samplerate
        except MediaDecodeError:
            return 0.0

    def check(self) -> None:
        """Make sure that its beginning can be decoded."""
        self.decode(MediaLimits(max_seconds=1))


def write_samples(column: pa.StructArray, name: str) -> pa.Array:
    """Encoded sounds, as binary, of a column of samples with their rates, as the host takes them; null for a null.

    They hold the numbers that were given, in single precision at most, and the same samples become the same bytes:
    hence AU, as a WAV of floats would say when it was written.

    Args:
        column: Structs of ``array`` and ``sampling_rate``.
        name: Of the column, for messages.

    Raises:
        DatasetError: Samples are of several channels, of no type that sounds have, or far beyond 1, or a rate can't be.
        MissingExtraError: soundfile is not installed.
    """
    arrays, rates = pc.struct_field(column, "array"), pc.struct_field(column, "sampling_rate").to_pylist()
    of_samples = getattr(arrays.type, "value_type", arrays.type)
    subtype = _SUBTYPES.get(str(of_samples))
    if subtype is None:
        raise DatasetError(
            f"Column {name!r} holds arrays of {of_samples}, expected samples in one channel: floats from -1 to 1, or "
            "int16 or int32. Take the mean of the channels, or cast them."
        )
    content: list[bytes | None] = []
    for samples, rate in zip(arrays, rates, strict=True):
        if not samples.is_valid:
            content.append(None)
            continue
        # a frame with gaps has floats
        whole = int(rate) if isinstance(rate, float) and rate.is_integer() else rate
        if not is_whole(whole) or not 1 <= whole <= _HIGHEST_RATE:
            raise DatasetError(
                f"Column {name!r} has samples with sampling_rate={rate!r}, expected samples a second, such as 16000."
            )
        values, file = samples.values.to_numpy(zero_copy_only=False), io.BytesIO()
        values = values.astype(np.float32) if subtype == "FLOAT" else values
        if subtype == "FLOAT" and len(values) and (loudest := float(np.abs(values).max())) > _LOUDEST:
            raise DatasetError(
                f"Column {name!r} has samples of up to {loudest:g}, expected floats from -1 to 1. Divide whole numbers "
                "that were made floats by 32,768."
            )
        load_decoder("soundfile", "Sounds", "audio").write(file, values, whole, format="AU", subtype=subtype)
        content.append(file.getvalue())
    return pa.array(content, pa.large_binary())
