"""The data of a run: one set or several by name, built and checked before weights load."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, check_texts, document_columns
from mmtune.data.relevance import Direction
from mmtune.data.rows import ID_COLUMNS, AskingPages, ListView, PairView, TrainingView, view_of
from mmtune.data.sources import (
    DatasetLike,
    DatasetsLike,
    as_retrieval_dataset,
    datasets_by_name,
    relevant_on_both_sides,
)
from mmtune.errors import ConfigError, DatasetError
from mmtune.training.batches import require_view

DEFAULT_NEGATIVES = 1

Form = Literal["pairs", "lists", "columns"]
"""The rows that a loss of rerankers reads."""


@dataclass(frozen=True)
class TrainingSet:
    """What one dataset gives to training.

    Attributes:
        data: The dataset; where rows were given, what they refer to.
        rows: The rows that the host trains on.
    """

    data: RetrievalDataset
    rows: Dataset

    @property
    def view(self) -> TrainingView | PairView | ListView:
        """What turns ids into texts and pages when a row is read."""
        return view_of(self.rows)


@dataclass(frozen=True)
class TrainingSets:
    """One set, or several by name.

    Attributes:
        by_name: The sets; a single one has the name ``""``.
        form: The rows that they hold.
    """

    by_name: Mapping[str, TrainingSet]
    form: Form = "columns"

    @property
    def num_rows(self) -> int:
        """Rows of all sets together."""
        return sum(len(part.rows) for part in self.by_name.values())

    @property
    def columns(self) -> list[str]:
        """The columns as the host reads them, of all sets."""
        return list(dict.fromkeys(name for part in self.by_name.values() for name in part.view.columns))

    @property
    def direction_by_name(self) -> dict[str, Direction]:
        """What asks in each set."""
        return {name: part.view.direction for name, part in self.by_name.items()}

    @property
    def num_negatives(self) -> int:
        """Negatives a row of the set that has most."""
        return max(part.view.num_negatives for part in self.by_name.values())

    @property
    def fewest_negatives(self) -> int:
        """Negatives a row of the set that has fewest."""
        return min(part.view.num_negatives for part in self.by_name.values())

    @property
    def for_host(self) -> Dataset | DatasetDict:
        """What the host's trainer takes as ``train_dataset``."""
        # With prompts and several sets the host changes the transform of the very objects that it is given.
        rows = {name: part.rows.with_transform(part.view) for name, part in self.by_name.items()}
        return rows[""] if list(rows) == [""] else DatasetDict(rows)


def training_sets(given: DatasetsLike, *, num_negatives: int, documents: DocumentKind, seed: int) -> TrainingSets:
    """The training data with its rows, every page readable.

    Args:
        given: A dataset, rows of ``training_rows``, or several of these by name.
        num_negatives: Hard negatives a row; rows that are given have theirs already.
        documents: What a document is made of.
        seed: Of filling up negatives.
    """
    return TrainingSets(
        {name: _training_set(part, num_negatives, documents, seed) for name, part in datasets_by_name(given).items()}
    )


def reranking_sets(
    given: DatasetsLike,
    directions: Sequence[Direction],
    *,
    form: Form,
    num_negatives: int,
    documents: DocumentKind,
    seed: int,
) -> TrainingSets:
    """The training data of a reranker, every page readable: a set for each dataset and direction.

    Args:
        given: A dataset, or several by name.
        directions: What asks.
        form: What the loss reads: pairs with a label, lists with labels, or a column for each document.
        num_negatives: Negatives to each relevant pair, or in each list.
        documents: What a document is made of.
        seed: Of filling up negatives.
    """
    data = {name: _readable(as_retrieval_dataset(part), documents) for name, part in datasets_by_name(given).items()}
    options = {"documents": documents, "seed": seed}
    return TrainingSets(
        {
            _joined_name(name, direction if len(directions) > 1 else ""): TrainingSet(
                part, _reranking_rows(part, direction, form, num_negatives, options)
            )
            for name, part in data.items()
            for direction in directions
        },
        form,
    )


def evaluation_sets(given: DatasetsLike | None, documents: DocumentKind) -> dict[str, RetrievalDataset]:
    """The evaluation data by name, every page readable; empty for ``None``, and a single set has the name ``""``."""
    if given is None:
        return {}
    return {name: _readable(as_retrieval_dataset(part), documents) for name, part in datasets_by_name(given).items()}


def refuse_overlap(train: TrainingSets, evaluation: Mapping[str, RetrievalDataset]) -> None:
    """Make sure that no document is relevant in training and in evaluation.

    Raises:
        DatasetError: Some are; the message lists them.
    """
    for part in train.by_name.values():
        for measured in evaluation.values():
            shared = relevant_on_both_sides(part.data, measured)
            if shared:
                examples = ", ".join(one if one == other else f"{one} (there {other})" for one, other in shared[:5])
                raise DatasetError(
                    f"{len(shared)} documents are relevant in training and in evaluation: {examples}. Scores on pages "
                    "that were trained on say nothing about new ones. Make both sides with RetrievalDataset.split, or "
                    "pass allow_overlap=True."
                )


def paths_of(*given: object) -> list[Path]:
    """The files and folders among models and datasets that were given by path."""
    parts = (part for each in given for part in (each.values() if isinstance(each, Mapping) else [each]))
    return [Path(part) for part in parts if isinstance(part, (str, os.PathLike)) and Path(part).exists()]


def _training_set(given: DatasetLike, num_negatives: int, documents: DocumentKind, seed: int) -> TrainingSet:
    if isinstance(given, Dataset) and set(ID_COLUMNS) <= set(given.column_names):
        return _given_rows(given, documents, num_negatives)
    data = _readable(as_retrieval_dataset(given), documents)
    return TrainingSet(data, data.training_rows(num_negatives, documents=documents, seed=seed))


def _reranking_rows(
    data: RetrievalDataset, direction: Direction, form: Form, num_negatives: int, options: dict[str, Any]
) -> Dataset:
    if form == "pairs":
        return data.labeled_pairs(num_negatives, direction=direction, **options)
    if form == "lists":
        return data.labeled_lists(num_negatives, direction=direction, **options)
    if direction == "text_to_image":
        return data.training_rows(num_negatives, **options)
    # Batches keep relevant pages from the texts of other rows, and know nothing of further texts in a row.
    rows = data.training_rows(0, **options)
    return rows.with_transform(AskingPages(view_of(rows)))


def _joined_name(*parts: str) -> str:
    return "-".join(filter(None, parts))


def _given_rows(rows: Dataset, documents: DocumentKind, num_negatives: int) -> TrainingSet:
    """Rows of ``training_rows``, with the queries they refer to."""
    require_view(rows)
    view = view_of(rows)
    if view.documents != documents:
        raise ConfigError(
            f"documents={documents!r}, and the rows were made with documents={view.documents!r}. Make them agree."
        )
    data = RetrievalDataset.from_tables(view.tables)
    queries = data.relevance.find_queries(rows.with_format(None)["query_id"][:])
    data = RetrievalDataset.from_tables(data.relevance.subset(queries, np.arange(len(data.corpus))))
    if view.num_negatives != num_negatives != DEFAULT_NEGATIVES:
        warnings.warn(
            f"num_negatives={num_negatives} is not used: the rows were made with {view.num_negatives}.", stacklevel=2
        )
    return TrainingSet(_readable(data, documents), rows)


def _readable(data: RetrievalDataset, documents: DocumentKind) -> RetrievalDataset:
    columns = document_columns(data.corpus, documents)
    if "text" in columns:
        check_texts(data.corpus)
    if "image" in columns:
        data.check_pages()
    return data
