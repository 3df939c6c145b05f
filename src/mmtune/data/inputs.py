"""What every function takes as a dataset, and what two datasets share."""

import os
from typing import TypeAlias

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset

from mmtune.data.arrow import positions
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.identity import same_documents
from mmtune.errors import DatasetError


def relevant_on_both_sides(train: RetrievalDataset, evaluation: RetrievalDataset) -> list[tuple[str, str]]:
    """Documents that are relevant in training and in evaluation, as pairs (training id, evaluation id).

    Two documents are the same when their content is, or when they have the same id, unless a builder made up the ids
    of a side from row numbers.
    """
    left, right = (np.unique(side.relevance.judged_document) for side in (train, evaluation))
    pairs = same_documents(train.corpus, evaluation.corpus, left, right)
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
    return RetrievalDataset._from_known_layout(dataset)
