"""Clips: from encoded bytes to frames, of which those are decoded that are read."""

import math
from typing import Any

import numpy as np

from mmtune.arguments import ALL_OF_IT, MediaLimits
from mmtune.data.media import Recording, load_decoder
from mmtune.errors import MediaDecodeError

MAX_FRAMES = 768
"""Frames that are read of a clip where nobody says; as many as Qwen3-VL reads at most."""

_WORTH_SEEKING_S = 5.0


class Clip(Recording):
    """A clip that is decoded when its frames are asked for: whatever FFmpeg reads, by PyAV."""

    kind = "video"

    def decode(self, limits: MediaLimits = ALL_OF_IT) -> dict[str, Any]:
        """``{"array", "video_metadata"}``: uint8 of shape ``(frames, height, width, 3)``, and when each was taken.

        Frames are chosen evenly, by their time; only those are turned into pixels.

        Raises:
            MediaDecodeError: It is no clip, has no frames, or is damaged.
            MissingExtraError: PyAV is not installed.
        """
        bounds = self.limits.within(limits)
        with self.opened() as source, load_decoder("av", "Clips", "video").open(source) as container:
            stream = self._stream(container)
            rate = float(stream.average_rate or stream.guessed_rate or 24)
            total = max(1, round(self._seconds_of(container, stream) * rate)) if not stream.frames else stream.frames
            chosen = choose_frames(total, rate, bounds)
            frames = list(_read_frames(container, stream, chosen, rate, bounds.max_pixels))
        if not frames:
            raise self.error("has no frames that can be decoded")
        # the header may promise more frames than there are: the last one stands in for these
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

    def check(self) -> None:
        """Make sure that its first frame can be decoded."""
        self.decode(MediaLimits(max_frames=2))

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


def _read_frames(container: Any, stream: Any, chosen: list[int], rate: float, max_pixels: int | None) -> Any:
    """The chosen frames, each as often as it is chosen."""
    start = float((stream.start_time or 0) * stream.time_base)
    at = 0  # the next that is wanted
    frames, last_s = container.decode(stream), 0.0
    while at < len(chosen):
        wanted_s = chosen[at] / rate
        if wanted_s - last_s > _WORTH_SEEKING_S:
            container.seek(int((wanted_s + start) / stream.time_base), stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            last_s = wanted_s if frame.time is None else frame.time - start
            if last_s >= wanted_s - 0.5 / rate:
                break
        else:
            return
        pixels = _to_rgb(frame, max_pixels)
        while at < len(chosen) and chosen[at] / rate - 0.5 / rate <= last_s:
            yield pixels
            at += 1


def _to_rgb(frame: Any, max_pixels: int | None) -> np.ndarray:
    width, height = frame.width, frame.height
    if max_pixels is not None and width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    return frame.to_ndarray(format="rgb24", width=width, height=height)
