"""Sounds and clips on their way into a model: decoded for the encoder that reads them, at its rate and length."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from datasets import Dataset
from sentence_transformers.base.modules import Transformer

from mmtune.arguments import ALL_OF_IT, MIXED, MediaLimits
from mmtune.data.documents import recordings_of
from mmtune.data.media import Recording
from mmtune.models.adapters import encoders_of
from mmtune.models.kinds import HostModel
from mmtune.models.recordings import frame_options, media_limits_of
from mmtune.models.routes import encoder_for

Inputs = TypeVar("Inputs")


def reads_recordings(encoder: Transformer) -> bool:
    """Whether an encoder takes sounds or clips."""
    return not {"audio", "video"}.isdisjoint(encoder.modalities)


def decode_recordings(encoder: Transformer, inputs: Inputs) -> Inputs:
    """``inputs`` with what the host takes in place of sounds and clips, each of them decoded once.

    Raises:
        MediaDecodeError: One can't be decoded; the message names the document.
        MissingExtraError: A package that decodes it is not installed.
    """
    return _replace(inputs, encoder, {}) if _holds_recordings(inputs) else inputs


def decode_ahead(model: Any, inputs: Inputs) -> Inputs:
    """As ``decode_recordings`` for a model, where one of its encoders alone reads each kind; else ``inputs``."""
    readers = [encoder for encoder in encoders_of(model) if reads_recordings(encoder)]
    for kind in ("audio", "video"):
        of_kind = [encoder for encoder in readers if kind in encoder.modalities]
        if len(of_kind) == 1 and _holds_recordings(inputs, kind):
            inputs = _replace(inputs, of_kind[0], {}, kind)
    return inputs


def count_cut(
    model: Any, corpus: Dataset, documents: str, limits: MediaLimits = ALL_OF_IT, task: str = "document"
) -> dict[str, int]:
    """How many sounds and clips of a corpus a model reads a part of, by their kind; from their headers alone.

    Args:
        model: A host model.
        corpus: The documents, or the queries as these.
        documents: What each is made of.
        limits: How much is read of each, whoever reads it.
        task: What they are to the model, ``"document"`` or ``"query"``.
    """
    if not isinstance(model, HostModel):  # an evaluator also takes what only has the methods of a model
        return {}
    alone = documents == MIXED
    readers = {name: encoder_for(model, name, name if alone else documents, task) for name in ("audio", "video")}
    read = {name: media_limits_of(reader, name) for name, reader in readers.items() if reader is not None}
    cut = [each.kind for each in recordings_of(corpus, documents, limits) if each.is_cut(read.get(each.kind, limits))]
    return {kind: cut.count(kind) for kind in sorted({*cut})}


def options_for(encoder: Transformer, inputs: Any, given: Any, taken: Sequence[Any] = ()) -> dict[str, Any] | None:
    """The ``processing_kwargs`` of one call: frames are chosen already, and the host chooses none of them again.

    Args:
        encoder: What reads the inputs.
        inputs: As the host takes them.
        given: The ``processing_kwargs`` of the caller.
        taken: When the frames of pairs were taken, as ``bare_pairs`` gives it.
    """
    has_clips = taken or any(isinstance(each, dict) and "video" in each for each in inputs)
    if "video" not in encoder.modalities or not has_clips:
        return given
    options = given or {}
    chosen = {**frame_options(encoder), **encoder.processing_kwargs.get("video", {}), **options.get("video", {})}
    return {**options, "video": chosen | ({"video_metadata": list(taken)} if taken else {})}


def bare_pairs(inputs: Any) -> tuple[Any, list[Any]]:
    """Pairs with bare frames in place of clips, and when these were taken, in their order; all else as it is.

    The host takes no dictionaries in pairs, and of bare frames it does not know the time (sentence-transformers 6.2).
    """
    taken: list[Any] = []

    def bare(part: Any) -> Any:
        if not (isinstance(part, dict) and part.keys() == {"video"}):
            return part
        taken.append(part["video"]["video_metadata"])
        return part["video"]["array"]

    found = [[*map(bare, each)] if isinstance(each, (list, tuple)) else each for each in inputs]
    return (found, taken) if taken else (inputs, [])


def _holds_recordings(inputs: Any, kind: str | None = None) -> bool:
    return any(kind in (None, each.kind) for each in _recordings_in(inputs))


def _recordings_in(inputs: Any) -> Iterator[Recording]:
    if isinstance(inputs, Recording):
        yield inputs
    elif isinstance(inputs, (list, tuple, dict)):
        for part in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from _recordings_in(part)


def _replace(inputs: Any, encoder: Transformer, known: dict[int, Any], kind: str | None = None) -> Any:
    if isinstance(inputs, Recording):
        if kind not in (None, inputs.kind):
            return inputs
        if id(inputs) not in known:
            known[id(inputs)] = inputs.decode(media_limits_of(encoder, inputs.kind))
        return known[id(inputs)]
    if isinstance(inputs, dict):
        return {name: _replace(part, encoder, known, kind) for name, part in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_replace(part, encoder, known, kind) for part in inputs)
    return inputs
