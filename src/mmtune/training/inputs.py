"""The data of a run: one set or several by name, built and checked before weights load."""

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, are_progress_bars_disabled

from mmtune.arguments import MIXED
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, check_texts, kinds_of_documents
from mmtune.data.intake import (
    DatasetsLike,
    as_retrieval_dataset,
    datasets_by_name,
    leaks_between,
    relevant_on_both_sides,
)
from mmtune.data.query_kinds import QueryKind
from mmtune.data.relevance import DirectionName, resolve_direction
from mmtune.data.rows import ID_COLUMNS, AskingPages, ListView, PairView, TrainingView, view_of
from mmtune.errors import ConfigError, DatasetError
from mmtune.training.batches import require_view

DEFAULT_NEGATIVES = 1

Form = Literal["pairs", "lists", "columns"]
"""The rows that a loss reads: pairs with a label, lists with labels, or a column for each document."""


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
    def for_host(self) -> Dataset | DatasetDict:
        """What the host's trainer takes as ``train_dataset``."""
        # With prompts and several sets the host changes the transform of the very objects that it is given.
        rows = {name: part.rows.with_transform(part.view.lazily()) for name, part in self.by_name.items()}
        return rows[""] if list(rows) == [""] else DatasetDict(rows)


def training_sets(
    given: DatasetsLike,
    *,
    num_negatives: int,
    documents: DocumentKind,
    seed: int,
    queries: QueryKind = "text",
    apart: Collection[str] = (),
) -> TrainingSets:
    """The training data with its rows; rows of ``training_rows`` stay as they are given.

    Args:
        given: One dataset, or several by name.
        num_negatives: Negatives a row.
        documents: What a document is made of.
        seed: Of filling up negatives.
        queries: What a query is made of.
        apart: The parts that all mixed documents of a batch have, or none: their rows become a set for each case.
    """
    by_name = {}
    for name, part in datasets_by_name(given).items():
        if isinstance(part, Dataset) and set(ID_COLUMNS) <= set(part.column_names):
            by_name[name] = _trace_rows(part, documents, queries, num_negatives)
        else:
            data = as_retrieval_dataset(part, _argument("train_dataset", name))
            _check_number(num_negatives, data, name)
            data = _require_parts(data, documents, queries)
            rows = data.training_rows(num_negatives, documents=documents, seed=seed, queries=queries)
            by_name[name] = TrainingSet(data, rows)
    if apart and documents == MIXED:
        by_name = {
            "-".join(filter(None, (name, kind))): of_kind
            for name, part in by_name.items()
            for kind, of_kind in _split_by_kind(part, apart).items()
        }
    return TrainingSets(by_name)


def _split_by_kind(part: TrainingSet, apart: Collection[str]) -> dict[str, TrainingSet]:
    """A set for each sequence of kinds in the columns of the rows, such as ``"image-text"`` with one negative.

    What has none of the parts that count is of the kind ``"other"``.
    """
    corpus = part.data.corpus
    kinds = ["+".join(name for name in kind.split("+") if name in apart) for kind in kinds_of_documents(corpus, MIXED)]
    kind_by_id = dict(zip(corpus["document_id"][:], (kind or "other" for kind in kinds), strict=True))
    ids, rows_by_kinds = part.rows.with_format(None), {}
    for row, (own, negatives) in enumerate(zip(ids["document_id"][:], ids["negative_document_ids"][:], strict=True)):
        rows_by_kinds.setdefault("-".join(kind_by_id[each] for each in (own, *negatives)), []).append(row)
    least = 1 if part.view.num_negatives else 2
    alone = sum(len(rows) for rows in rows_by_kinds.values() if len(rows) < least)
    if alone:
        warnings.warn(
            f"{alone} rows are left out: no other row has documents of the same kinds, and a batch needs two "
            "where there are no negatives.",
            stacklevel=5,
        )
    kept = {kinds: rows for kinds, rows in rows_by_kinds.items() if len(rows) >= least}
    return {kinds: TrainingSet(part.data, part.rows.select(rows)) for kinds, rows in kept.items()}


def reranking_sets(
    given: DatasetsLike,
    directions: Sequence[DirectionName],
    *,
    form: Form,
    num_negatives: int,
    documents: DocumentKind,
    seed: int,
    queries: QueryKind = "text",
) -> TrainingSets:
    """The training data of a reranker: a set for each dataset and direction."""
    options: dict[str, Any] = {"documents": documents, "seed": seed, "queries": queries}
    by_name = {}
    for name, part in datasets_by_name(given).items():
        data = as_retrieval_dataset(part, _argument("train_dataset", name))
        _check_number(num_negatives, data, name)
        data = _require_parts(data, documents, queries)
        for direction in directions:
            if form == "pairs":
                rows = data.labeled_pairs(num_negatives, direction=direction, **options)
            elif form == "lists":
                rows = data.labeled_lists(num_negatives, direction=direction, **options)
            elif resolve_direction(direction, queries, documents) == "text_to_image":
                rows = data.training_rows(num_negatives, **options)
            else:
                # Batches keep relevant pages from the texts of other rows, and know nothing of further texts in a row.
                rows = data.training_rows(0, **options)
                rows = rows.with_transform(AskingPages(view_of(rows)))
            own_name = "-".join(filter(None, (name, direction if len(directions) > 1 else "")))
            by_name[own_name] = TrainingSet(data, rows)
    return TrainingSets(by_name, form)


def _check_number(num_negatives: int, data: RetrievalDataset, name: str) -> None:
    """Make sure that there are as many documents or queries to be negatives, before lists of them are laid out."""
    most = max(len(data.corpus) - 1, len(data) - 1, 1)
    if num_negatives > most:
        of_set = f" {name!r}" if name else ""
        raise ConfigError(
            f"num_negatives={num_negatives}, and the training data{of_set} have {len(data.corpus)} documents for "
            f"{len(data)} queries: {most} at most. Pass 1 to {min(4, most)}, as the recipe does."
        )


def evaluation_sets(
    given: DatasetsLike | None, documents: DocumentKind, queries: QueryKind = "text", argument: str = "eval_dataset"
) -> dict[str, RetrievalDataset]:
    """The evaluation data by name; empty for ``None``, and a single set has the name ``""``."""
    parts = {} if given is None else datasets_by_name(given)
    built = {name: as_retrieval_dataset(part, _argument(argument, name)) for name, part in parts.items()}
    return {name: _require_parts(data, documents, queries) for name, data in built.items()}


def _argument(argument: str, name: str) -> str:
    """What a set was passed as, for a message."""
    return f"{argument}[{name!r}]" if name else argument


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
                examples += ", ..." if len(shared) > 5 else ""
                raise DatasetError(
                    f"{len(shared)} documents are relevant in training and in evaluation: {examples}. Scores on pages "
                    "that were trained on say nothing about new ones. Make both sides from one RetrievalDataset (of "
                    "rows: RetrievalDataset.from_id_rows(rows)), e.g. train, evaluation = "
                    f"dataset.split({max(1, len(part.data) // 5)}), or pass allow_overlap=True."
                )


def warn_of_leaks(train: TrainingSets, evaluation: Mapping[str, RetrievalDataset]) -> None:
    """Warn where training has seen a part of the evaluation, other than by documents that are relevant in both.

    Warns:
        UserWarning: Answers of the evaluation are among the training negatives, or a query text stands on both sides.
    """
    for part in train.by_name.values():
        for measured in evaluation.values():
            leaks = leaks_between(part.data, measured, part.view.queries)
            if not part.view.chosen["filled"]:  # nothing was drawn, so what could have been does no harm
                leaks = replace(leaks, fill_candidates=())
            if leaks:
                warnings.warn(
                    f"Training has seen a part of the evaluation: {leaks}. It pushes the right answers away, or makes "
                    "the scores say little about new queries. Make both sides with RetrievalDataset.split.",
                    stacklevel=4,
                )


def _trace_rows(rows: Dataset, documents: DocumentKind, queries: QueryKind, num_negatives: int) -> TrainingSet:
    """Rows of ``training_rows``, with the queries they refer to."""
    require_view(rows)
    if not len(rows):
        raise DatasetError("The training rows are empty: what was selected or filtered left none. Pass at least one.")
    view = view_of(rows)
    for name, asked, made in (("documents", documents, view.documents), ("queries", queries, view.queries)):
        if asked != made:
            raise ConfigError(f"{name}={asked!r}, and the rows were made with {name}={made!r}. Make them agree.")
    if view.num_negatives != num_negatives != DEFAULT_NEGATIVES:
        warnings.warn(
            f"num_negatives={num_negatives} is not used: the rows were made with {view.num_negatives}.", stacklevel=6
        )
    data = RetrievalDataset.from_tables(view.tables)
    kept = data.relevance.find_queries(rows.with_format(None)["query_id"][:])
    data = RetrievalDataset.from_tables(data.relevance.subset(kept, np.arange(len(data.corpus))))
    return TrainingSet(_require_parts(data, documents, queries), rows)


def _require_parts(data: RetrievalDataset, documents: DocumentKind, queries: QueryKind) -> RetrievalDataset:
    data.relevance_of(documents, queries).require_queries()
    check_texts(data.corpus, documents)
    return data


def check_pages(
    train: TrainingSets,
    measured: Iterable[RetrievalDataset],
    documents: DocumentKind,
    queries: QueryKind = "text",
) -> None:
    """Make sure that all that will be read can be, looking at each dataset once.

    Raises:
        MediaDecodeError: A file is missing, damaged, or of another kind; the message names the document or the query.
    """
    read = {id(data): data for data in (*(part.data for part in train.by_name.values()), *measured)}
    for data in read.values():
        shown = not are_progress_bars_disabled()
        if documents != "text":
            data.check_pages(documents=documents, show_progress_bar=shown)
        elif queries != "text":  # which ``check_pages`` looks at as well
            data.check_queries(show_progress_bar=shown)
