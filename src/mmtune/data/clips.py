"""Clips: from encoded bytes to frames, of which those are decoded that are read."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from mmtune.arguments import ALL_OF_IT, MediaLimits
from mmtune.data.media import Look, Recording, load_decoder
from mmtune.errors import MediaDecodeError

MAX_FRAMES = 768
"""Frames that are read of a clip where nobody says; as many as Qwen3-VL reads at most."""

_WORTH_SEEKING_S = 5.0
_LOOK = MediaLimits(max_frames=16, max_pixels=512 * 512)
_HARDLY = 24  # of 255, at the pixel that differs most: more than what codecs leave where nothing moves
_MOST_LOST = 0.05  # of what a header promises: many are a frame or two too long


class Clip(Recording):
    """A clip that is decoded when its frames are asked for: whatever FFmpeg reads, by PyAV."""

    kind = "video"

    def decode(self, limits: MediaLimits = ALL_OF_IT) -> dict[str, Any]:
        """``{"array", "video_metadata"}``: uint8 of shape ``(frames, height, width, 3)``, and when each was taken.

        Frames are chosen evenly, by their time; only those are turned into pixels. The last one stands in for one or
        two that a header promises beyond it.

        Raises:
            MediaDecodeError: It is no clip, has no frames, or is damaged, or cut off.
            MissingExtraError: PyAV is not installed.
        """
        return self._decode(self.limits.within(limits), choose_frames)

    def _decode(self, bounds: MediaLimits, choose: Callable[[int, float, MediaLimits], list[int]]) -> dict[str, Any]:
        with self.opened() as source, load_decoder("av", "Clips", "video").open(source) as container:
            stream = self._stream(container)
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            seconds = self._seconds_of(container, stream)
            total = stream.frames or max(1, round(seconds * rate))
            chosen = choose(total, rate, bounds)
            frames, end_s = _read_frames(container, stream, chosen, rate, bounds.max_pixels)
            if not frames:
                raise self.error("has no frames that can be decoded")
            there = max(1, round(end_s * rate))
            if len(frames) < len(chosen) and total - there > max(1, _MOST_LOST * total):
                is_promised = stream.duration is not None or len(container.streams) == 1
                if is_promised and seconds - end_s > max(1 / rate, _MOST_LOST * seconds):
                    raise self.error(
                        f"is cut off: its header promises {total} frames in {seconds:.1f} s, and there is none at "
                        f"{chosen[len(frames)] / rate:.1f} s"
                    )
                # the length was that of another stream, or of what was there before the clip was trimmed
                total, chosen = there, choose(there, rate, bounds)
                container.seek(0)
                frames, _ = _read_frames(container, stream, chosen, rate, bounds.max_pixels)
        frames += [frames[-1]] * (len(chosen) - len(frames))
        metadata = {
            "fps": rate,
            "total_num_frames": total,
            "frames_indices": chosen,
            "duration": total / rate,
        }
        return {"array": np.stack(frames), "video_metadata": metadata}

    def is_cut(self, limits: MediaLimits) -> bool:
        """Whether some of its frames are left out."""
        try:
            with self.opened() as source, load_decoder("av", "Clips", "video").open(source) as container:
                stream = self._stream(container)
                rate = float(stream.average_rate or stream.guessed_rate or 24)
                total = stream.frames or round(self._seconds_of(container, stream) * rate)
        except MediaDecodeError:
            return False
        return len(set(choose_frames(total, rate, self.limits.within(limits)))) < total

    def look(self) -> Look:
        """A digest of 16 frames, made small, with the number of all, and whether these 16 hardly differ."""
        found = self.decode(_LOOK)
        frames = found["array"].astype(np.int16)
        digest = xxhash.xxh3_128(f"{found['video_metadata']['total_num_frames']} {frames.shape}".encode())
        digest.update(found["array"])
        return Look(digest.hexdigest(), bool(np.abs(frames - frames[0]).max() <= _HARDLY))

    def check(self) -> None:
        """Make sure that its first frame can be decoded, and its last: the end is what a broken download lacks."""
        self._decode(self.limits, lambda total, *_: [0, total - 1])

    def _stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise self.error("has no frames: the file holds no stream of video")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # processes read several clips at once
        return stream

    @staticmethod
    def _seconds_of(container: Any, stream: Any) -> float:
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1_000_000


def choose_frames(total: int, rate: float, limits: MediaLimits) -> list[int]:
    """Which frames of a clip are read, ascending, two at least: the first of each of as many equal parts.

    Args:
        total: Frames that there are.
        rate: Frames a second.
        limits: How many are read.

    Example:
        >>> choose_frames(8, 4.0, MediaLimits(fps=2)), choose_frames(3, 4.0, MediaLimits(num_frames=4))
        ([0, 2, 4, 6], [0, 1, 2, 2])
    """
    read = total if limits.max_seconds is None else min(total, max(1, round(limits.max_seconds * rate)))
    if limits.num_frames is not None:
        count = limits.num_frames
        if read < count:
            return [min(at, read - 1) for at in range(count)]
    else:
        by_rate = read if limits.fps is None else math.ceil(read * min(1.0, limits.fps / rate))
        count = max(2, min(by_rate, limits.max_frames or MAX_FRAMES))
    return [at * read // count for at in range(count)]


def _read_frames(
    container: Any, stream: Any, chosen: list[int], rate: float, max_pixels: int | None
) -> tuple[list[np.ndarray], float]:
    """The chosen frames, each as often as it is chosen, and the second at which the last one that was seen ends."""
    start = float((stream.start_time or 0) * stream.time_base)
    found: list[np.ndarray] = []
    frames, last_s, end_s = container.decode(stream), 0.0, 0.0
    while (at := len(found)) < len(chosen):
        wanted_s = chosen[at] / rate
        if wanted_s - last_s > _WORTH_SEEKING_S:
            container.seek(int((wanted_s + start) / stream.time_base), stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            last_s = wanted_s if frame.time is None else frame.time - start
            end_s = last_s + (float(frame.duration * frame.time_base) if frame.duration else 1 / rate)
            if last_s >= wanted_s - 0.5 / rate:
                break
        else:
            break
        pixels = _to_rgb(frame, max_pixels)
        found += [pixels] * sum(each / rate - 0.5 / rate <= last_s for each in chosen[at:])
    return found, end_s


def _to_rgb(frame: Any, max_pixels: int | None) -> np.ndarray:
    width, height = frame.width, frame.height
    if max_pixels is not None and width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    return frame.to_ndarray(format="rgb24", width=width, height=height)
