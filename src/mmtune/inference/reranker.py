"""What a reranker scores pairs, the same way wherever they are scored: in evaluation, mining and teaching."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from tqdm.auto import tqdm

from mmtune.arguments import shown
from mmtune.data.documents import as_host_input, require_pairs_of
from mmtune.data.judgements import CandidateList
from mmtune.data.relevance import Direction
from mmtune.errors import ConfigError, DatasetError
from mmtune.inference.encoder import HOW_TO_FIT, DatasetReader, find_unreadable, portions_of, read_ahead
from mmtune.inference.preprocessing import prepare_pages, reading_pages
from mmtune.inference.store import Pair, ScoreStore
from mmtune.models.precision import scoring_in_float32

_PAIRS_A_FILE = 1024


def require_reranker(model: object, name: str = "model", advice: str = "") -> None:
    """Make sure that ``model`` gives one score to a pair.

    Args:
        model: What was given.
        name: Of the argument, for the message.
        advice: What else to do, for the message.

    Raises:
        ConfigError: It is another kind of model, or gives several.
    """
    if not isinstance(model, CrossEncoder):
        path = f"{model!r:.80}" if isinstance(model, (str, os.PathLike)) else "path"
        raise ConfigError(
            f"{name}={shown(model)} is no reranker. Expected a CrossEncoder. Pass build_reranker({path}), where the "
            f"path is that of a language model that reads images, or of a reranker.{advice and ' '}{advice}"
        )
    if model.num_labels != 1:
        raise ConfigError(
            f"The model gives {model.num_labels} scores to a pair, and a reranker gives one. Load it with num_labels=1."
        )


@dataclass(frozen=True)
class PairScorer:
    """A reranker over texts and documents that are read as they are scored.

    Attributes:
        model: A reranker; its prompt for the direction is used, if it has one.
        reader: Gives texts and documents by id.
        batch_size: Pairs a forward pass.
        show_progress_bar: Whether to show a bar over the pairs.
        direction: What asks, and stands first in a pair.
        activation: Turns the output of the model into scores. ``None`` takes it as it is: in float32 a sigmoid is
            exactly 1.0 from a logit of 17 on, and a sure model would tie its best candidates.

    Raises:
        ConfigError: The model is no reranker.
    """

    model: CrossEncoder
    reader: DatasetReader
    batch_size: int
    show_progress_bar: bool
    direction: Direction = "text_to_image"
    activation: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        require_pairs_of(self.reader.kind, self.reader.query_kind, self.reader.kinds)
        require_reranker(self.model, advice="For an embedding model there is build_evaluator(dataset).")

    def score_pairs(
        self, pairs: Sequence[Pair], contents: Sequence[str] | None = None, store: ScoreStore | None = None
    ) -> np.ndarray:
        """The score of each pair, float64; higher is more relevant.

        Pairs are read page after page, so that a page that stands in many is decoded once or twice, and two batches of
        pages are held at most.

        Args:
            pairs: What to score.
            contents: A digest of the text and the document of each: pairs of equal content are scored once. ``None``
                scores each pair.
            store: Where scores are kept as they are made, and looked up before by content; ``None`` keeps none.

        Raises:
            ConfigError: A score is not a finite number; the message names the pair.
            DatasetError: The model can't read a pair; the message names it.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        keys: Sequence[Any] = range(len(pairs)) if contents is None else contents
        score_by_key: dict[Any, float] = {} if store is None else dict(store.score_by_content)
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in score_by_key}
        todo = sorted(missing.items(), key=lambda item: item[1].document_id)
        batches = portions_of(todo, self.batch_size)
        inputs = read_ahead(self._read, batches)
        unwritten: list[tuple[Any, Pair]] = []
        bar = tqdm(total=len(todo), desc="Scoring pairs", disable=not self.show_progress_bar, leave=False)
        with bar, reading_pages(self.model):
            for batch, ready in zip(batches, inputs, strict=True):
                scores = self._predict([pair for _, pair in batch], ready)
                score_by_key.update((key, score) for (key, _), score in zip(batch, scores, strict=True))
                unwritten += batch
                if store is not None and len(unwritten) + self.batch_size > _PAIRS_A_FILE:
                    made = [score_by_key[key] for key, _ in unwritten]
                    store.add([pair for _, pair in unwritten], [key for key, _ in unwritten], made)
                    unwritten = []
                bar.update(len(batch))
        found = [score_by_key[key] for key in keys]
        if store is not None:
            # What is left, and the ids of pairs whose score was known from others of equal content.
            store.add(pairs, keys, found)
        return np.array(found, dtype=np.float64)

    def score_lists(self, lists: Sequence[CandidateList]) -> list[np.ndarray]:
        """What ``score_pairs`` gives to each candidate of each list."""
        asks = [(each.asking_id, candidate) for each in lists for candidate in each.candidate_ids]
        texts_ask = self.direction == "text_to_image"
        scores = self.score_pairs([Pair(*(ids if texts_ask else ids[::-1])) for ids in asks])
        return np.split(scores, np.cumsum([len(each.candidate_ids) for each in lists])[:-1])

    def _read(self, batch: Sequence[tuple[Any, Pair]]) -> list[list[Any]]:
        return prepare_pages(self.model, self.reader.read_pairs([pair for _, pair in batch], self.direction))

    def _predict(self, pairs: Sequence[Pair], inputs: Sequence[Sequence[Any]]) -> list[float]:
        # Models that know no messages take pairs of bare texts only, which the host never takes for paths of images.
        typed = self.model.supports("message")
        given: list[Any] = [[as_host_input(part) if typed else part for part in pair] for pair in inputs]
        options: dict[str, Any] = {
            "prompt_name": self.direction if self.direction in (self.model.prompts or {}) else None,
            "batch_size": self.batch_size,
            "show_progress_bar": False,
            "activation_fn": self.activation or torch.nn.Identity(),
            "convert_to_tensor": True,
        }
        try:
            with scoring_in_float32(self.model):  # in half precision candidates tie
                scores = self.model.predict(given, **options)
        except ValueError as error:
            at, reason = find_unreadable(lambda pair: self.model.predict([pair], **options), given, error)
            raise DatasetError(
                f"The model can't read query {pairs[at].query_id!r} with document {pairs[at].document_id!r}: {reason} "
                f"{HOW_TO_FIT}"
            ) from error
        values = torch.as_tensor(scores).cpu().double().numpy()
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            pair = pairs[int(wrong[0])]
            raise ConfigError(
                f"The model scores query {pair.query_id!r} with document {pair.document_id!r} as {values[wrong[0]]}. "
                'Load it in another precision (dtype="float32"), or look at whether the training diverged.'
            )
        return values.tolist()
