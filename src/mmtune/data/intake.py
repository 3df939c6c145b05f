"""What every function takes as a dataset, and what two datasets share."""

import numbers
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset

from mmtune.arguments import require_name, shown
from mmtune.data import layouts
from mmtune.data.arrow import positions
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.identity import match_documents, match_queries, pdf_pages
from mmtune.data.query_kinds import QueryKind
from mmtune.data.tables import advise_on
from mmtune.errors import ConfigError, DatasetError


def relevant_on_both_sides(train: RetrievalDataset, evaluation: RetrievalDataset) -> list[tuple[str, str]]:
    """Documents that are relevant in training and in evaluation, as pairs (training id, evaluation id).

    Two documents are the same when their content is, or when they have the same id; but ids of digits alone, or made up
    from row numbers by a builder, mean nothing in another dataset, and of two pages of PDFs the content alone counts.
    """
    judged = np.unique(train.relevance.judged_document)
    return _name(train, evaluation, _same_documents(train, evaluation, judged))


@dataclass(frozen=True)
class Leaks:
    """What a training set holds of what an evaluation asks for, without being trained on it as relevant.

    Attributes:
        listed_negatives: Answers of the evaluation that training lists as negatives, as pairs (training id,
            evaluation id): it would learn to rank them low.
        fill_candidates: Answers of the evaluation that stand in the training corpus and are neither relevant nor listed
            there, as pairs: short lists of negatives are filled with such at random, and mining finds them.
        query_texts: Queries that are the same on both sides, as pairs (training id, evaluation id).
    """

    listed_negatives: tuple[tuple[str, str], ...] = ()
    fill_candidates: tuple[tuple[str, str], ...] = ()
    query_texts: tuple[tuple[str, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.listed_negatives or self.fill_candidates or self.query_texts)

    def __str__(self) -> str:
        kinds = {
            "answers of the evaluation are listed as training negatives": self.listed_negatives,
            "answers of the evaluation may be drawn as training negatives": self.fill_candidates,
            "queries stand on both sides": self.query_texts,
        }
        found = (f"{len(pairs)} {what}, e.g. {_show(pairs[0])}" for what, pairs in kinds.items() if pairs)
        return "; ".join(found) or "nothing is shared"


def leaks_between(train: RetrievalDataset, evaluation: RetrievalDataset, queries: QueryKind | None = None) -> Leaks:
    """Answers of the evaluation among the training negatives, listed or to be drawn, and queries on both sides.

    ``RetrievalDataset.split`` leaves none. Documents are the same by content or id, as in ``relevant_on_both_sides``,
    and queries where all that they are made of is equal; what is relevant on both sides is that function's to find. Of
    several queries that are the same the first is named.

    Args:
        train: What is trained on.
        evaluation: What is measured on.
        queries: What a query is made of; ``None`` is everything that the queries have.
    """
    everything = np.arange(len(train.corpus))
    same = _same_documents(train, evaluation, everything)
    listed = np.zeros(len(everything), dtype=bool)
    listed[train.relevance.listed_negatives.values] = True
    judged = np.zeros(len(everything), dtype=bool)
    judged[train.relevance.judged_document] = True
    sides = train.relevance, evaluation.relevance
    asked_twice = match_queries(train.queries, evaluation.queries, queries)
    return Leaks(
        tuple(_name(train, evaluation, {pair for pair in same if listed[pair[0]]})),
        tuple(_name(train, evaluation, {pair for pair in same if not listed[pair[0]] and not judged[pair[0]]})),
        tuple((sides[0].query_ids[one].as_py(), sides[1].query_ids[other].as_py()) for one, other in asked_twice),
    )


def _same_documents(
    train: RetrievalDataset, evaluation: RetrievalDataset, of_train: np.ndarray
) -> set[tuple[int, int]]:
    """Pairs of positions: some documents of training, and those relevant in evaluation that are the same."""
    answers = np.unique(evaluation.relevance.judged_document)
    pairs = match_documents(train.corpus, evaluation.corpus, of_train, answers)
    if not (train.notes.ids_are_row_numbers or evaluation.notes.ids_are_row_numbers):
        ids = evaluation.relevance.document_ids.take(answers)
        is_name = pc.invert(pc.match_substring_regex(ids, r"^[0-9]+$")).to_numpy(zero_copy_only=False)
        same_id = positions(ids, train.relevance.document_ids)
        shared = np.isin(same_id, of_train) & is_name
        named = list(zip(same_id[shared].tolist(), answers[shared].tolist(), strict=True))
        # the id of a page of a PDF is the name of its file, which others have too: its content is known
        pages = (pdf_pages(train.corpus), pdf_pages(evaluation.corpus)) if named else ({}, {})
        pairs += [
            (at, row) for at, row in named if at not in pages[0] or row not in pages[1] or pages[0][at] == pages[1][row]
        ]
    return {(int(at), int(row)) for at, row in pairs}


def _name(train: RetrievalDataset, evaluation: RetrievalDataset, pairs: set[tuple[int, int]]) -> list[tuple[str, str]]:
    """The ids of pairs of positions, sorted."""
    ids = train.relevance.document_ids, evaluation.relevance.document_ids
    return sorted((ids[0][at].as_py(), ids[1][row].as_py()) for at, row in pairs)


def _show(pair: tuple[str, str]) -> str:
    one, other = pair
    return repr(one) if one == other else f"{one!r} (there {other!r})"


DatasetLike: TypeAlias = RetrievalDataset | Dataset | str | os.PathLike[str]
"""What every function takes as a dataset: built, rows in a known layout, or what ``RetrievalDataset.load`` takes."""


def as_retrieval_dataset(dataset: DatasetLike, name: str = "dataset") -> RetrievalDataset:
    """``dataset`` itself, or what its layout builds.

    Args:
        dataset: What was given.
        name: Of the argument, for the message.

    Raises:
        DatasetError: The layout is unknown, or the data can't be read.
    """
    if isinstance(dataset, RetrievalDataset):
        return dataset
    if isinstance(dataset, (str, os.PathLike)):
        try:
            return RetrievalDataset.load(dataset)
        except (DatasetError, ConfigError) as error:
            # of several paths in one call, the message tells which
            raise type(error)(f"{name}: {error}") from error
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise DatasetError(
            f"{name}={shown(dataset)} is no dataset. Expected a RetrievalDataset, a datasets.Dataset in a known "
            f"layout, or the path or Hub name of one. {_advise_on(dataset, name)}"
        )
    return RetrievalDataset.from_tables(layouts.build_from_known_layout(dataset))


def _advise_on(value: object, name: str) -> str:
    """How to come to a dataset from a value that is none, as a sentence for a message."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(each, RetrievalDataset) for each in value):
        if isinstance(value, tuple) and len(value) == 2:
            return "split gives two: write train, evaluation = dataset.split(...), and pass one of them."
        return f"Join them: {name}=RetrievalDataset.concatenate([...])."
    if isinstance(value, DatasetDict):
        return f"It has the splits {list(value)}: pick one, e.g. {name}=rows[{next(iter(value), 'train')!r}]."
    if isinstance(value, Mapping) and value:
        return f"Only finetune and the evaluators take several by name: pass one, e.g. that of {next(iter(value))!r}."
    if isinstance(value, numbers.Real):
        return (
            "To hold out a number of queries, split first: train, evaluation = "
            "RetrievalDataset.load('pages.parquet').split(100)."
        )
    if hasattr(value, "encode") or hasattr(value, "predict"):
        return f"It is a model; pass the data as {name}."
    return advise_on(value)


DatasetsLike: TypeAlias = DatasetLike | Mapping[str, DatasetLike]
"""One dataset, or several by name."""

_NAME = re.compile(r"(?!mean$)(?!(.*-)?\d+d$)[^_]+")


def datasets_by_name(given: DatasetsLike) -> dict[str, DatasetLike]:
    """What was given by name; a single dataset has the name ``""``.

    Raises:
        DatasetError: The mapping is empty.
        ConfigError: A name can't be part of a metric key, a file's name and a table (see ``require_name``), holds
            ``_``, or is that of the mean or of a truncation.
    """
    if not isinstance(given, Mapping) or isinstance(given, DatasetDict):
        return {"": given}
    if not given:
        raise DatasetError("The mapping of datasets is empty. Name at least one dataset.")
    for name in given:
        require_name("the name of a dataset", name)
    if not all(_NAME.fullmatch(name) for name in given):
        wrong = next(name for name in given if not _NAME.fullmatch(name))
        other = (
            wrong.replace("_", "-") if _NAME.fullmatch(wrong.replace("_", "-")) else f"set-{wrong}".replace("_", "-")
        )
        raise ConfigError(
            f"The datasets are named {list(given)}. Names become part of metric keys: they are texts without '_', "
            f"other than 'mean' and dimensions such as '64d'. Name it {other!r} in place of {wrong!r}."
        )
    return dict(given)
