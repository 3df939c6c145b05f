"""What must hold of a folder that a run leaves behind: it computes what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import CrossEncoder
from torch import nn

from mmtune.data.documents import as_host_input
from mmtune.errors import ConfigError
from mmtune.host import adapter_layers, let_read_typed_texts
from mmtune.inference.preprocessing import reading_pages
from mmtune.inference.recordings import decode_ahead
from mmtune.models.adapters import ADAPTER_FILE, encoders_of, has_adapters, has_lora, is_quantized
from mmtune.models.checkpoints import first_line
from mmtune.models.fresh import seeded
from mmtune.models.kinds import HostModel
from mmtune.models.memory import free_bytes
from mmtune.models.precision import HALF_TYPES, score_in_float32
from mmtune.serving.plain import PlainEncoder
from mmtune.serving.requests import prompt_of
from mmtune.serving.vllm import FAMILIES

NUM_ROWS = 16
NUM_PLAIN = 8
"""Rows that plain transformers encodes, one item at a time: what it would get wrong, it gets wrong in each."""

ROOM = 1.5
"""Memory for loading once more and encoding, in sizes of the weights."""

LARGEST_GAP, LARGEST_GAP_IN_HALF = 1e-3, 3e-2
"""Of cosine, or of a score in standard deviations: rounding and padding stay below, a lost file does not."""


def check_saved(
    model: HostModel, folder: Path, rows: Dataset | Mapping[str, Dataset], *, may_be_base: bool
) -> dict[str, Any]:
    """Make sure that a saved model computes what the one in memory does, and say what was looked at.

    Args:
        model: The trained model.
        folder: What was saved of it.
        rows: What it was trained on; the first ones are encoded.
        may_be_base: Whether adapters may have learned nothing, as where the start was kept.

    Returns:
        What passed and what was skipped, with the reason, by gate.

    Raises:
        ConfigError: A gate failed; the message names the file.
    """
    found = {"adapters": "none"}
    if has_lora(model):
        product = describe_adapters(model)
        if "zero" in product and not may_be_base:
            require_adapters(model, str(folder / ADAPTER_FILE))
        found["adapters"] = product
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    free = free_bytes(model.device) if model.device.type == "cuda" else psutil.virtual_memory().available
    if free < ROOM * size:
        reason = f"skipped: loading once more takes {ROOM * size / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
        return {**found, "host": reason, "transformers": reason}
    if any(map(is_quantized, encoders_of(model))):
        reason = "skipped: the weights are quantised, and the folder is loaded beside the full ones"
        return {**found, "host": reason, "transformers": reason}
    samples = Samples.of(model, rows)
    with seeded(0):  # the caller's random state is left as it was
        expected = samples.compute(model)
        loaded = _load(model, folder)
        gap = largest_gap(samples.compute(loaded), expected)
    types = {weight.dtype for each in (model, loaded) for weight in each.parameters()}
    limit = LARGEST_GAP_IN_HALF if types & set(HALF_TYPES) else LARGEST_GAP
    if not gap <= limit:
        raise ConfigError(
            f"{_name_file(model, loaded, folder)}: the model that Sentence Transformers loads from this folder "
            f"computes something else than the trained one, {gap:.2g} apart in cosine on {samples}. Expected "
            f"{limit:g} at most. The trained weights are in the last checkpoint-*; save them anew, and report this."
        )
    found["host"] = f"passed: {gap:.1e} apart on {samples}"
    return {**found, "transformers": _check_plain(loaded, folder, samples, expected, limit)}


def _load(model: HostModel, folder: Path) -> HostModel:
    """What the host loads from a folder, on the device of the model."""
    try:
        loaded = type(model)(str(folder), device=str(model.device), trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers and the host refuse in every way
        raise ConfigError(
            f"{folder}: Sentence Transformers can't load what was saved there: {type(error).__name__}: "
            f"{first_line(error)} Expected a model as it was trained. The trained weights are in the last "
            "checkpoint-*; report this."
        ) from error
    let_read_typed_texts(loaded)
    if isinstance(loaded, CrossEncoder):
        score_in_float32(loaded)  # as the one in memory; the plain host rounds scores to the type of the weights
    return loaded


def _check_plain(
    loaded: HostModel, folder: Path, samples: "Samples", expected: list[torch.Tensor], limit: float
) -> str:
    """What came of running the folder without the host, on the ``AutoModel`` that the host has loaded from it."""
    reason = PlainEncoder.refuse(folder)
    if reason is not None:
        return f"skipped: {reason}"
    few = Samples(samples.queries[:NUM_PLAIN], samples.documents[:NUM_PLAIN])
    try:
        encoder = PlainEncoder(folder, loaded[0].model)
        own = [
            encoder.encode(few.queries, prompt_of(loaded, "query")),
            encoder.encode(few.documents, prompt_of(loaded, "document")),
        ]
    except Exception as error:  # a family whose processor is called otherwise is no fault of the files
        return f"skipped: plain transformers can't run it: {type(error).__name__}: {first_line(error)}"
    own = [vectors[:, : getattr(loaded, "truncate_dim", None)] for vectors in own]
    gap = largest_gap(own, [vectors[: len(found)] for found, vectors in zip(own, expected, strict=True)])
    encoder_of_folder: Any = loaded[0]
    family = encoder_of_folder.model.config.model_type
    if not gap <= limit and family not in FAMILIES:
        return f"not passed: {gap:.1e} apart on {few}; how servers read {family!r} is not known, so it is no error"
    if not gap <= limit:
        files = ", ".join(name for name, _ in encoder.modules)
        raise ConfigError(
            f"{folder / 'modules.json'} and the files that it names ({files}) state another computation than the "
            f"trained one: by AutoModel alone the embeddings are {gap:.2g} apart in cosine on {few}. Expected "
            f"{limit:g} at most, since servers compute from these files. Serve it from Sentence Transformers, and "
            "report this."
        )
    return f"passed: {gap:.1e} apart on {few}"


@dataclass(frozen=True)
class Samples:
    """Queries and documents, or pairs of them, as the host's encoders take them."""

    queries: list[Any]
    documents: list[Any]

    @classmethod
    def of(cls, model: HostModel, rows: Dataset | Mapping[str, Dataset]) -> "Samples":
        """The first rows that a model was trained on; of several sets, the first. There may be queries alone."""
        first = next(iter(rows.values())) if isinstance(rows, Mapping) else rows
        read = [[*first[row].values(), None][:2] for row in range(min(NUM_ROWS, len(first)))]
        pairs = [(query, document[0] if isinstance(document, list) else document) for query, document in read]
        # models that know no messages take pairs of bare texts only
        typed = not isinstance(model, CrossEncoder) or model.supports("message")
        read_as = as_host_input if typed else lambda item: item
        sides = ([read_as(_decoded(each)) for each in side if each is not None] for side in zip(*pairs, strict=True))
        return cls(*(decode_ahead(model, side) for side in sides))

    def compute(self, model: HostModel) -> list[torch.Tensor]:
        """Embeddings of queries and documents, or the score of each pair, float32 on the CPU."""
        options: dict[str, Any] = {"batch_size": NUM_ROWS, "show_progress_bar": False}
        if isinstance(model, CrossEncoder):
            pairs: list[Any] = [list(pair) for pair in zip(self.queries, self.documents, strict=True)]
            with reading_pages(model):  # in pairs the host takes no clips as they are decoded
                scores = model.predict(pairs, activation_fn=nn.Identity(), convert_to_tensor=True, **options)
            return [torch.as_tensor(scores).float().cpu()]
        found = [_flat(model.encode_query(self.queries, **options))]
        if self.documents:  # of a mixed corpus those of a kind together: encoders and routes take one at a time
            alike = [list(each) for _, each in groupby(self.documents, key=_name_kind)]
            found.append(torch.cat([_flat(model.encode_document(each, **options)) for each in alike]))
        return found

    def __str__(self) -> str:
        return f"{len(self.queries)} queries and {len(self.documents)} documents"


def _name_kind(item: Any) -> str:
    return "+".join(item) if isinstance(item, Mapping) else type(item).__name__


def _decoded(item: Any) -> Any:
    """An item with its pages as images: two models may each decode a page at the size that it reads."""
    if isinstance(item, Mapping):
        return {kind: _decoded(value) for kind, value in item.items()}
    return item.copy() if isinstance(item, Image.Image) else item


def _flat(vectors: Any) -> torch.Tensor:
    """Vectors a row; the token vectors of late interaction one below the other."""
    if isinstance(vectors, (list, tuple)):
        return torch.cat([torch.as_tensor(each).float().cpu() for each in vectors])
    return torch.as_tensor(vectors).float().cpu()


def largest_gap(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """How far vectors are apart, as one minus their cosine or by length; scores, in their standard deviation."""
    gaps = [0.0]
    for own, wanted in zip(found, expected, strict=True):
        if own.shape != wanted.shape:
            return float("inf")
        if own.ndim == 1:
            spread = wanted.std().item() if len(wanted) > 1 else 0.0
            gaps.append(((own - wanted).abs().max() / max(spread, 1e-2 * wanted.abs().max().item(), 1e-6)).item())
        else:
            lengths = own.norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-12)
            gaps += [(1 - nn.functional.cosine_similarity(own, wanted)).max().item(), (lengths - 1).abs().max().item()]
    return float(np.max(gaps))  # what is no number is a gap, too


def describe_adapters(model: HostModel) -> str:
    """Whether the adapters add something to the weights beside them, from their product alone."""
    added = [_adds(layer) for module in encoders_of(model) if has_adapters(module) for layer in _layers(module)]
    known = [each for each in added if each is not None]
    if not known:
        return "skipped: this kind of adapter does not tell what it adds"
    count = sum(known)
    return f"passed: {count} of {len(known)} add something" if count else f"the product of all {len(known)} is zero"


def require_adapters(model: HostModel, where: str) -> None:
    """Make sure that adapters change something.

    Raises:
        ConfigError: Their product is zero, so the model is its base.
    """
    product = describe_adapters(model)
    if "zero" in product:
        raise ConfigError(
            f"{where}: {product}, so the model computes what its base does, untrained. Expected adapters that have "
            "learned. Look at the learning rate and at what was frozen, or export the base itself."
        )


def _layers(module: Any) -> list[Any]:
    return [layer for _, layer in adapter_layers(module.model)]


def _adds(layer: Any) -> bool | None:
    """Whether an adapted layer differs from its base; ``None`` where it does not tell."""
    try:
        return any(bool(layer.get_delta_weight(name).any()) for name in layer.active_adapters)
    except (AttributeError, NotImplementedError, KeyError, TypeError):
        return None


def _name_file(model: HostModel, loaded: HostModel, folder: Path) -> Path:
    """The file of a saved model that is likeliest wrong, by what was read from it."""
    merged = has_lora(model) != has_lora(loaded)
    for position, (own, other) in enumerate(zip(model.children(), loaded.children(), strict=False)):
        path = next(iter(folder.glob(f"{position}_*")), folder) if position else folder
        if not _same_weights(own, other) and not (merged and position == 0):
            return path / (ADAPTER_FILE if has_lora(model) and position == 0 else "model.safetensors")
        if repr(own) != repr(other):
            return path / ("config.json" if position else "sentence_bert_config.json")
    if (model.prompts or {}) != (loaded.prompts or {}):
        return folder / "config_sentence_transformers.json"
    return folder / ("model.safetensors" if merged else "processor_config.json")


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and torch.equal(first[name], second[name].to(first[name]))
        for name in first
    )
