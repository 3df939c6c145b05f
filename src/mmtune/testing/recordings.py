"""Generated sounds and clips, in the layout of ``generated_pages`` with another column in the place of its images."""

import io
import wave
from collections.abc import Sequence
from itertools import product
from random import Random

import numpy as np
from datasets import Dataset

from mmtune.arguments import require_seed, require_whole
from mmtune.data.arrow import with_encoded_images
from mmtune.data.media import load_decoder

SAMPLING_RATE = 16_000
_CONTOURS = ("rising", "falling", "steady", "arching", "dipping")
_PITCHES = {"low": 200.0, "middle": 400.0, "high": 800.0, "shrill": 1600.0}
_TIMBRES = ("flute", "reed", "organ", "bell")
_BEATS = {"one": 1, "two": 2, "four": 4, "eight": 8}

_COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
    "cyan": (40, 200, 210),
    "white": (240, 240, 240),
}
_STEPS = {"creeps left": -1, "creeps right": 1, "leaps left": -3, "leaps right": 3}
"""In steps of 8 pixels: in a ring of eight places each of these comes to every place once."""
_SIDE_PX, _SQUARE_PX, _STEP_PX, _NUM_FRAMES, _FPS = 64, 16, 8, 8, 8


def generated_audio(n: int, *, seed: int = 0) -> Dataset:
    """Return sounds of one second at 16 kHz, each with a query that says its contour, pitch, timbre and beats.

    There are 320 combinations, in an order of the seed; from the 321st row on they come again in that order, each as
    another sound: a little higher or lower, louder or softer, and noisier.

    Args:
        n: Number of sounds, at least 1.
        seed: Seed of everything drawn. The same seed gives the same bytes.

    Returns:
        A table in memory with the columns ``id``, ``query``, ``audio`` (WAV) and ``negatives``: four sounds at most
        that differ in one of these.

    Raises:
        ConfigError: An argument is out of range.

    Example:
        >>> sounds = generated_audio(2)
        >>> sounds.column_names, len(sounds[0]["audio"]["bytes"])
        (['id', 'query', 'audio', 'negatives'], 32044)
    """
    n, random = require_whole("n", n), Random(f"audio {require_seed('seed', seed)}")
    kinds = list(product(_CONTOURS, _PITCHES, _TIMBRES, _BEATS))
    random.shuffle(kinds)
    chosen = [kinds[at % len(kinds)] for at in range(n)]
    noise = np.random.default_rng(random.getrandbits(32))
    sounds = [_to_wav(_play(*kind, random, noise)) for kind in chosen]
    queries = [f"{beats} beats of a {pitch} {timbre}, {contour}" for contour, pitch, timbre, beats in chosen]
    return _in_rows("audio", chosen, queries, sounds, random)


def generated_clips(n: int, *, seed: int = 0) -> Dataset:
    """Return clips of a coloured square that creeps or leaps to the left or the right, each with a query that says so.

    A clip has 8 frames of 64 by 64 pixels in a second. The square starts anywhere and comes back on the other side. It
    comes to the same eight places whatever its motion, so that neither a single frame nor all of them in another order
    tell how it moves. There are 32 combinations, in an order of the seed, which come again and
    again with other starts; all clips of one combination have one query text.

    Args:
        n: Number of clips, at least 1.
        seed: Seed of everything drawn. The same seed gives the same frames.

    Returns:
        A table in memory with the columns ``id``, ``query``, ``video`` (H.264 without loss, in MP4) and ``negatives``:
        four clips at most that differ in colour or direction.

    Raises:
        ConfigError: An argument is out of range.
        MissingExtraError: PyAV, which encodes them, is not installed.

    Example:
        >>> clips = generated_clips(2)
        >>> clips.column_names, clips[0]["query"].split()[2:4]
        (['id', 'query', 'video', 'negatives'], ['square', 'leaps'])
    """
    n, random = require_whole("n", n), Random(f"clips {require_seed('seed', seed)}")
    kinds = list(product(_COLOURS, _STEPS))
    random.shuffle(kinds)
    chosen = [kinds[at % len(kinds)] for at in range(n)]
    clips = [_to_mp4(_draw(*kind, random)) for kind in chosen]
    return _in_rows("video", chosen, [f"a {colour} square {step}" for colour, step in chosen], clips, random)


def _in_rows(
    name: str, kinds: Sequence[tuple[str, ...]], queries: Sequence[str], files: Sequence[bytes], random: Random
) -> Dataset:
    ids = [f"{'-'.join(kind)}-{at}".replace(" ", "-") for at, kind in enumerate(kinds)]
    rows_by_kind: dict[tuple[str, ...], list[int]] = {}
    for at, kind in enumerate(kinds):
        rows_by_kind.setdefault(kind, []).append(at)
    negatives = []
    for kind in kinds:
        near = [other for other in rows_by_kind if sum(a != b for a, b in zip(kind, other, strict=True)) == 1]
        picked = random.sample(near, min(4, len(near)))
        negatives.append([ids[random.choice(rows_by_kind[other])] for other in picked])
    rows = Dataset.from_dict({"id": ids, "query": [*queries], name: [*files], "negatives": negatives})
    return with_encoded_images(rows, name, name).select_columns(["id", "query", name, "negatives"])


def _play(contour: str, pitch: str, timbre: str, beats: str, random: Random, noise: np.random.Generator) -> np.ndarray:
    """Samples from -1 to 1, float, of one second."""
    time = np.arange(SAMPLING_RATE) / SAMPLING_RATE
    bend = {
        "rising": time,
        "falling": 1 - time,
        "steady": np.full_like(time, 0.5),
        "arching": np.sin(np.pi * time),
        "dipping": 1 - np.sin(np.pi * time),
    }[contour]
    hertz = _PITCHES[pitch] * random.uniform(0.97, 1.03) * 2 ** (0.8 * (bend - 0.5))
    phase = 2 * np.pi * np.cumsum(hertz) / SAMPLING_RATE + random.uniform(0, 2 * np.pi)
    overtones = {"flute": {1: 1.0}, "reed": {1: 1.0, 3: 0.6, 5: 0.4}, "organ": {1: 1.0, 2: 0.8, 4: 0.6}}
    heights = overtones.get(timbre, {1: 0.6, 2.76: 0.6, 4.1: 0.5})  # those of a bell lie between the others
    tone = sum(height * np.sin(number * phase) for number, height in heights.items()) / sum(heights.values())
    within = (time * _BEATS[beats]) % 1.0
    envelope = np.minimum(1.0, 20 * within) * np.exp(-3 * within)
    hiss = 0.01 * noise.standard_normal(SAMPLING_RATE)
    return np.clip(random.uniform(0.6, 0.9) * tone * envelope + hiss, -1, 1)


def _to_wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLING_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _draw(colour: str, step: str, random: Random) -> np.ndarray:
    """Frames, uint8 of shape ``(frames, height, width, 3)``."""
    left, top = (8 + 16 * random.randrange(4) + random.randint(-2, 2) for _ in range(2))
    frames = np.full((_NUM_FRAMES, _SIDE_PX, _SIDE_PX, 3), 24, dtype=np.uint8)
    for at, frame in enumerate(frames):
        x = np.arange(_SQUARE_PX) + left + at * _STEP_PX * _STEPS[step]
        frame[np.ix_((np.arange(_SQUARE_PX) + top) % _SIDE_PX, x % _SIDE_PX)] = _COLOURS[colour]
    return frames


def _to_mp4(frames: np.ndarray) -> bytes:
    av, buffer = load_decoder("av", "Clips", "video"), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # in colours as they are, and of no loss
        options = {"qp": "0", "threads": "1"}
        stream = container.add_stream("libx264rgb", rate=_FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
