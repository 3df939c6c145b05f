"""What every function takes as a dataset, and what two datasets share."""

import os
import re
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset

from mmtune.arguments import require_name
from mmtune.data import layouts
from mmtune.data.arrow import positions
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.identity import match_documents
from mmtune.errors import ConfigError, DatasetError


def relevant_on_both_sides(train: RetrievalDataset, evaluation: RetrievalDataset) -> list[tuple[str, str]]:
    """Documents that are relevant in training and in evaluation, as pairs (training id, evaluation id).

    Two documents are the same when their content is, or when they have the same id, unless a builder made up the ids
    of a side from row numbers.
    """
    left, right = (np.unique(side.relevance.judged_document) for side in (train, evaluation))
    pairs = match_documents(train.corpus, evaluation.corpus, left, right)
    if not (train.notes.ids_are_row_numbers or evaluation.notes.ids_are_row_numbers):
        same_id = positions(evaluation.relevance.document_ids.take(right), train.relevance.document_ids)
        shared = np.isin(same_id, left)
        pairs += zip(same_id[shared].tolist(), right[shared].tolist(), strict=True)
    found = {(int(at), int(row)) for at, row in pairs}
    ids = train.relevance.document_ids, evaluation.relevance.document_ids
    return sorted((ids[0][at].as_py(), ids[1][row].as_py()) for at, row in found)


DatasetLike: TypeAlias = RetrievalDataset | Dataset | str | os.PathLike[str]
"""What every function takes as a dataset: built, rows in a known layout, or what ``RetrievalDataset.load`` takes."""


def as_retrieval_dataset(dataset: DatasetLike) -> RetrievalDataset:
    """``dataset`` itself, or what its layout builds.

    Raises:
        DatasetError: The layout is unknown, or the data can't be read.
    """
    if isinstance(dataset, RetrievalDataset):
        return dataset
    if isinstance(dataset, (str, os.PathLike)):
        return RetrievalDataset.load(dataset)
    if not isinstance(dataset, (Dataset, DatasetDict, IterableDataset)):
        raise DatasetError(
            f"{dataset!r:.80} is no dataset. Expected a RetrievalDataset, a datasets.Dataset in a known layout, the "
            "path or Hub name of one, or a mapping of names to these."
        )
    return RetrievalDataset.from_tables(layouts.build_from_known_layout(dataset))


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
        raise ConfigError(
            f"The datasets are named {list(given)}. Names become part of metric "
            "keys: they are texts without '_', other than 'mean' and dimensions such as '64d'."
        )
    return dict(given)
