"""What a reranker scores pairs, the same way wherever they are scored: in evaluation, mining and teaching."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from mmtune.data.documents import DocumentReader, as_host_input
from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError
from mmtune.inference.encoder import portions_of, read_ahead


def require_reranker(model: object) -> None:
    """Make sure that ``model`` gives one score to a pair.

    Raises:
        ConfigError: It is another kind of model, or gives several.
    """
    if not isinstance(model, CrossEncoder):
        raise ConfigError(
            f"Expected a reranker, a sentence_transformers.CrossEncoder, got {type(model).__name__}. An embedding "
            "model is no reranker; build_reranker makes one."
        )
    if model.num_labels != 1:
        raise ConfigError(
            f"The model gives {model.num_labels} scores to a pair, and a reranker gives one. Load it with num_labels=1."
        )


def pair_scores(
    model: CrossEncoder,
    pairs: Sequence[Sequence[Any]],
    names: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    direction: Direction = "text_to_image",
    activation: torch.nn.Module | None = None,
) -> np.ndarray:
    """What ``model`` scores each pair, float64 of their number; with its prompt for the direction, if it has one.

    Args:
        model: A reranker.
        pairs: What asks, and what is asked for: texts, images, or both in a dictionary.
        names: What errors call each pair.
        batch_size: Pairs a forward pass.
        direction: What asks.
        activation: Turns the output of the model into scores. ``None`` takes it as it is: in float32 a sigmoid is
            exactly 1.0 from a logit of 17 on, and a sure model would tie its best candidates.

    Raises:
        ConfigError: A score is not a finite number; the message names the pair.
    """
    # Models that know no messages take pairs of bare texts only, which the host never takes for paths of images.
    typed = model.supports("message")
    inputs: list[Any] = [[as_host_input(part) if typed else part for part in pair] for pair in pairs]
    scores = model.predict(
        inputs,
        prompt_name=direction if direction in (model.prompts or {}) else None,
        batch_size=batch_size,
        show_progress_bar=False,
        activation_fn=activation or torch.nn.Identity(),
        convert_to_tensor=True,
    )
    values = torch.as_tensor(scores).cpu().double().numpy()
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        query, document = names[int(wrong[0])]
        raise ConfigError(
            f"The model scores query {query!r} with document {document!r} as {values[wrong[0]]}. Load it in another "
            'precision (dtype="float32"), or look at whether its training diverged.'
        )
    return values


@dataclass(frozen=True)
class PairScorer:
    """A reranker over documents that are read as they are scored.

    Attributes:
        reranker: A host ``CrossEncoder`` with one score a pair.
        reader: Gives the documents by id.
        batch_size: Pairs a forward pass.
        activation: As in ``pair_scores``.
    """

    reranker: CrossEncoder
    reader: DocumentReader
    batch_size: int
    activation: torch.nn.Module | None = None

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Iterator[np.ndarray]:
        """The scores of (query text, document id) pairs, float64, ``batch_size`` at a time and in order.

        Raises:
            ConfigError: A score is not a finite number.
        """
        portions = portions_of(pairs, self.batch_size)
        for portion, inputs in zip(portions, read_ahead(self._read, portions), strict=True):
            yield pair_scores(self.reranker, inputs, portion, batch_size=self.batch_size, activation=self.activation)

    def _read(self, pairs: Sequence[tuple[str, str]]) -> list[list[Any]]:
        documents = self.reader.read([document_id for _, document_id in pairs])
        return [[text, document] for (text, _), document in zip(pairs, documents, strict=True)]
