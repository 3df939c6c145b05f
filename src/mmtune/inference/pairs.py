"""The scores that a reranker gives to pairs of a text and a document, decoded while it works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentence_transformers import CrossEncoder
from tqdm.auto import tqdm

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, DocumentReader
from mmtune.data.judgements import CandidateList
from mmtune.data.relevance import Direction
from mmtune.inference.encoder import ENOUGH_PIXELS, portions_of, read_ahead
from mmtune.inference.reranker import pair_scores, require_reranker


@dataclass(frozen=True)
class PairReader:
    """What the host is given for a pair of ids.

    Attributes:
        text_by_query_id: The queries.
        documents: Gives the documents by id.
        direction: Which of the two asks, and stands first in a pair.
    """

    text_by_query_id: Mapping[str, str]
    documents: DocumentReader
    direction: Direction

    @classmethod
    def of(cls, data: RetrievalDataset, documents: DocumentKind, direction: Direction) -> "PairReader":
        """The texts and documents of a dataset.

        Raises:
            ConfigError: The corpus lacks what ``documents`` asks for.
        """
        texts = dict(zip(data.queries["query_id"][:], data.queries["text"][:], strict=True))
        return cls(texts, DocumentReader(data.corpus, documents, enough_pixels=ENOUGH_PIXELS), direction)

    def read(self, pairs: Sequence[tuple[str, str]]) -> list[list[Any]]:
        """``[query, document]``, or ``[document, query]`` where pages ask; each document is decoded once.

        Args:
            pairs: Query ids and document ids.
        """
        texts = [self.text_by_query_id[query_id] for query_id, _ in pairs]
        documents = self.documents.read([document_id for _, document_id in pairs])
        sides = (texts, documents) if self.direction == "text_to_image" else (documents, texts)
        return [list(pair) for pair in zip(*sides, strict=True)]

    def ids(self, lists: Sequence[CandidateList]) -> list[tuple[str, str]]:
        """The query id and document id of each candidate of each list."""
        pairs = [(each.asking_id, candidate) for each in lists for candidate in each.candidate_ids]
        return pairs if self.direction == "text_to_image" else [(query, page) for page, query in pairs]


def score_candidates(
    model: CrossEncoder,
    lists: Sequence[CandidateList],
    reader: PairReader,
    *,
    batch_size: int,
    show_progress_bar: bool,
) -> list[np.ndarray]:
    """What ``model`` scores each candidate of each list, float64; higher is more relevant.

    Pairs are read in portions of ``batch_size``, page after page, so that a page that stands in many lists is decoded
    once or twice, and two portions of pages are held at most.

    Raises:
        ConfigError: The model is no reranker, or gives a score that is not a number.
        ImageDecodeError: A page is no readable image; the message names the document.
    """
    require_reranker(model)
    pairs = reader.ids(lists)
    order = sorted(range(len(pairs)), key=lambda at: pairs[at][1])
    portions = portions_of(order, batch_size)
    scores = np.empty(len(pairs))
    inputs = read_ahead(lambda portion: reader.read([pairs[at] for at in portion]), portions)
    with tqdm(total=len(pairs), desc="Scoring pairs", disable=not show_progress_bar, leave=False) as bar:
        for portion, ready in zip(portions, inputs, strict=True):
            names = [pairs[at] for at in portion]
            scores[portion] = pair_scores(model, ready, names, batch_size=batch_size, direction=reader.direction)
            bar.update(len(portion))
    return np.split(scores, np.cumsum([len(each.candidate_ids) for each in lists])[:-1])
