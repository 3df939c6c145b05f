"""How much of a sound or a clip an encoder reads: what its checkpoint says, and what it was loaded with.

Limits that were asked for stand in the config of the encoder, under ``media_limits``, which the host saves and nobody
else reads: they hold wherever mmtune reads the file. What the plain host can keep is in its ``processing_kwargs``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sentence_transformers.base.modules import Transformer
from transformers import ASTFeatureExtractor, FeatureExtractionMixin

from mmtune.arguments import MediaLimits
from mmtune.models.adapters import encoders_of
from mmtune.models.kinds import HostModel, SameModel
from mmtune.models.pixels import image_processor_of, input_size_of

_LIMITS = "media_limits"
_AST_HOP_S, _AST_WINDOW_S = 0.010, 0.025


def media_limits_of(encoder: Transformer, kind: str) -> MediaLimits:
    """What an encoder reads of ``"audio"`` or ``"video"``, by itself and by the limits that it was loaded with."""
    asked = MediaLimits(**(getattr(encoder.config, _LIMITS, None) or {}))
    if kind == "video":
        # a frame is as large as an image may be, where that is a number of pixels
        size = input_size_of(image_processor_of(encoder), encoder.processing_kwargs.get("image", {}))
        max_pixels = size if isinstance(size, int) else None
        return asked.within(MediaLimits(max_pixels=max_pixels, num_frames=_num_frames(encoder, asked.max_frames)))
    extractor = _feature_extractor(encoder)
    window_s = _window_s(extractor, encoder.processing_kwargs.get("audio", {}))
    return asked.within(MediaLimits(window_s, sampling_rate=getattr(extractor, "sampling_rate", None)))


def apply_media_limits(model: SameModel, limits: MediaLimits) -> SameModel:
    """Make every encoder of sounds and clips keep limits, and repair what the host would load differently.

    Args:
        model: Any host model; encoders of texts and images stay as they are.
        limits: The limits; where none is given, only encoders of texts and sounds change.

    Returns:
        The same model, changed in place.
    """
    for encoder in encoders_of(model):
        if not {"audio", "video"} & {*encoder.modalities}:
            continue
        if limits.given():
            saved = {**(getattr(encoder.config, _LIMITS, None) or {}), **limits.given()}
            setattr(encoder.config, _LIMITS, saved)
        if {"audio", "text"} <= {*encoder.modalities}:
            _keep_length(encoder)
    return model


def read_all_frames(model: HostModel) -> None:
    """Keep the plain host, too, from choosing among the frames that it is given (Qwen-VL: two a second, unless told).

    It is saved with the model.
    """
    for encoder in encoders_of(model):
        if "video" in encoder.modalities:
            own = encoder.processing_kwargs.get("video", {})
            encoder.processing_kwargs = {**encoder.processing_kwargs, "video": {**frame_options(encoder), **own}}


def frame_options(encoder: Transformer) -> dict[str, Any]:
    """What the video processor of an encoder is called with, where its frames are chosen already."""
    processor = getattr(encoder.processor, "video_processor", encoder.processor)
    options: dict[str, Any] = {"do_sample_frames": False}
    if hasattr(processor, "cap_pixels_per_frame"):  # its default is about to change (transformers 5.23)
        options["cap_pixels_per_frame"] = bool(processor.cap_pixels_per_frame)
    return options


def sample_sound(limits: MediaLimits) -> dict[str, Any]:
    """A short tone at the rate that an encoder reads."""
    rate = limits.sampling_rate or 16_000
    time = np.arange(int(rate * min(0.5, limits.max_seconds or 0.5))) / rate
    return {"array": np.sin(2 * np.pi * 440 * time).astype(np.float32), "sampling_rate": rate}


def sample_clip(limits: MediaLimits) -> dict[str, Any]:
    """A few small grey frames, as many as an encoder reads."""
    count = limits.num_frames or 4
    metadata = {"fps": 2.0, "total_num_frames": count, "frames_indices": list(range(count)), "duration": count / 2}
    return {"array": np.full((count, 64, 64, 3), 128, dtype=np.uint8), "video_metadata": metadata}


def _feature_extractor(encoder: Transformer) -> Any:
    processor = encoder.processor
    return processor if isinstance(processor, FeatureExtractionMixin) else getattr(processor, "feature_extractor", None)


def _num_frames(encoder: Transformer, max_frames: int | None) -> int | None:
    """How many frames an encoder of clips takes, of each clip as many; a language model takes any number."""
    if "video" not in encoder.modalities or "message" in encoder.modalities:
        return None
    fixed, most = (getattr(encoder.config, name, None) for name in ("num_frames", "frames_per_clip"))
    # V-JEPA 2 was trained with that many, and reads fewer as well; VideoMAE has a position for each
    return fixed or (min(most, max_frames or most) if most else None)


def _window_s(extractor: Any, options: Mapping[str, Any]) -> float | None:
    """The seconds that a feature extractor keeps of a sound: what is longer it cuts, some at random."""
    if isinstance(extractor, ASTFeatureExtractor):
        return (extractor.max_length - 1) * _AST_HOP_S + _AST_WINDOW_S
    samples = options.get("max_length") or getattr(extractor, "nb_max_samples", None)
    if samples is None and hasattr(extractor, "chunk_length"):
        samples = extractor.n_samples
    return None if samples is None else samples / extractor.sampling_rate


def _keep_length(encoder: Transformer) -> None:
    """Say how long the sounds of an encoder are that reads texts, too, such as CLAP or Qwen2-Audio.

    The tokenizer remembers the length at which it cut texts, and is saved with it; loaded again, the host cuts sounds
    at as many samples (sentence-transformers 6.2), and CLAP at random.
    """
    own = encoder.processing_kwargs.get("audio", {})
    extractor: Any = _feature_extractor(encoder)
    seconds = media_limits_of(encoder, "audio").max_seconds or getattr(extractor, "max_length_s", None)
    # the window of a Whisper is filled up, whatever is read of a sound
    samples = getattr(extractor, "n_samples", None) or (seconds and round(seconds * extractor.sampling_rate))
    if samples:
        encoder.processing_kwargs = {**encoder.processing_kwargs, "audio": {**own, "max_length": samples}}
