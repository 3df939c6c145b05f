"""What the host would make of a fresh checkpoint, from its small files alone."""

from collections.abc import Mapping

import torch
from PIL import Image
from sentence_transformers.base.modules import Transformer

from mmtune.host import WithoutWeights

SAMPLES = {"text": "total revenue", "image": Image.new("RGB", (64, 64), "white")}


class Blueprint(WithoutWeights, Transformer):
    """The host's encoder without weights: its processor, and the modalities that the host finds in it."""


def refusals(encoder: Transformer) -> Mapping[str, str]:
    """Why an encoder does not embed a text alone, or an image alone; empty where it does both.

    Args:
        encoder: Any of the host's, also one without weights.

    Returns:
        Reasons as the end of a sentence, by ``"text"`` and ``"image"``; only of those that its processor knows.

    Raises:
        ImportError: A package that its processor needs is not installed.
    """
    together = {part: key for key in encoder.modalities if isinstance(key, tuple) for part in key}
    reasons = {
        modality: f"it takes {' and '.join(sorted(key))} only together"
        for modality, key in together.items()
        if modality in SAMPLES and modality not in encoder.modalities
    }
    for modality in SAMPLES:
        reason = _processing_refusal(encoder, modality) if modality in encoder.modalities else None
        reasons |= {modality: reason} if reason else {}
    return reasons


def _processing_refusal(encoder: Transformer, modality: str) -> str | None:
    try:
        features = encoder.preprocess([SAMPLES[modality]])
    except ImportError:
        raise
    except Exception as error:  # processors refuse in every way
        return f"its processor does not take one by itself ({type(error).__name__}: {error})"
    if modality == "image" and "input_ids" not in features and _reads_tokens(encoder):
        return "it has no chat template that gives an image its place in a text"
    return None


def _reads_tokens(encoder: Transformer) -> bool:
    """Whether images go the way of the tokens, into a language model, and not through a tower of their own."""
    methods = {str(modality): params["method"] for modality, params in encoder.modality_config.items()}
    by_forward = all(methods.get(modality) == "forward" for modality in SAMPLES)
    return by_forward and isinstance(encoder.model.get_input_embeddings(), torch.nn.Embedding)
