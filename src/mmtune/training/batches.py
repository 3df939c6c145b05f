"""Batches in which no document is relevant to the query of another row.

In-batch negatives punish every document of the batch that is not the row's own. Here the rows are put into batches by
their ids alone, so no page is ever decoded for it, and the ids know what pixels do not: everything else that is
relevant to the same query.

Losses that look at each row by itself need no such care: `ShuffledBatchSampler` is for them.

This module is what the host calls, and what reads ids from Arrow. `planning` makes the batches from integers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler

from mmtune.data.rows import ID_COLUMNS, view_of
from mmtune.errors import DatasetError
from mmtune.training.planning import BatchShape, BusiestDocument, EpochPlan, IntLists, RowDocuments, plan_epoch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class ConflictFreeBatchSampler(DefaultBatchSampler):
    """Batches of `RetrievalDataset.training_rows()` without a relevant document among the negatives.

    No document of a row (the positive and the listed negatives) is relevant to the query of another row of the batch.
    So no query text stands twice in a batch either. Every batch is full; only the last may be short, and it is no
    single row where rows have no negatives: nothing could be learned from it, so it opens the next epoch. The order
    depends on `seed` and the epoch alone, so a resumed run sees the same batches. To resume at epoch e, the e before it
    are planned again, because the rows that one epoch leaves over open the next.

    With several processes, the number of batches is a multiple of them, all batches are full, and the batches that the
    processes take in one step are free of conflicts together, as losses that gather across devices need it.

    Rows are left over when a document is relevant to more rows than there are batches, and, with several processes or
    `drop_last`, when the rows do not divide by the batches. In the extreme, all rows share one page: then the epoch is
    a single short batch of one row. More than 1% of left-over rows is a warning that names the reason.

    Pass the class to the host: `SentenceTransformerTrainingArguments(batch_sampler=ConflictFreeBatchSampler)`.

    Args:
        dataset: Rows of `RetrievalDataset.training_rows()`, possibly shuffled, selected or filtered since. Only their
            id columns are read.
        batch_size: Rows per batch and process.
        drop_last: Whether to leave out the short batch.
        valid_label_columns: Not used; the host passes it to every sampler.
        generator: Not used, for its state is not restored when a run resumes; the host passes it to every sampler.
        seed: Seed of the order, together with the epoch.
        num_processes: Processes that share the batches. `None` is the size of the running distributed job, 1 without.

    Raises:
        DatasetError: There are no rows, the id columns are missing, the rows have lost their view (ids would be
            trained on as text), or no batch can be filled.
        ConfigError: `num_processes` is below 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        num_processes: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        require_view(dataset)
        processes = _world_size() if num_processes is None else num_processes
        # a row without negatives has nothing to be told from where it is alone: its loss is zero
        smallest = 1 if getattr(view_of(dataset), "num_negatives", 1) else 2
        self._shape = BatchShape(batch_size, processes, drop_last, smallest)
        self._rows = read_row_documents(dataset)
        self._require_rows(len(self._rows))
        self._left_over_by_epoch: list[np.ndarray] = []
        self._first: EpochPlan | None = None
        self._planned: tuple[int, EpochPlan] | None = None

    @property
    def num_processes(self) -> int:
        """Processes that share the batches."""
        return self._shape.num_processes

    @property
    def left_over(self) -> int:
        """Rows that are in no batch of the current epoch; they open the next one."""
        return len(self._plan().left_over)

    def __len__(self) -> int:
        return len(self._plan().batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._plan().batches:
            yield batch.tolist()

    def _plan(self) -> EpochPlan:
        if self._planned is None or self._planned[0] != self.epoch:
            for epoch in range(min(len(self._left_over_by_epoch), self.epoch), self.epoch):
                self._plan_epoch(epoch)
            self._planned = (self.epoch, self._plan_epoch(self.epoch))
            self._report(self._planned[1])
        return self._planned[1]

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        opening = self._left_over_by_epoch[epoch - 1] if epoch else np.zeros(0, dtype=np.int64)
        # The host counts its steps from the first epoch, so all have the same number of batches.
        first = self._first if epoch else None
        plan = plan_epoch(self._rows, self._shape, opening, seed=(self.seed, epoch), first=first)
        self._first = first or plan
        if not plan.batches and not self.drop_last:
            raise DatasetError(f"Not one batch of {self._describe_batch()} is without a conflict: {self._why(plan)}.")
        if epoch == len(self._left_over_by_epoch):
            self._left_over_by_epoch.append(plan.left_over)
        return plan

    def _require_rows(self, num_rows: int) -> None:
        needed = 1 if self._shape.num_processes == 1 or self.drop_last else self._shape.group_size
        if num_rows < needed:
            raise DatasetError(
                f"{num_rows} rows do not fill one batch of {self._describe_batch()}. Pass more rows, a smaller batch "
                "size or fewer processes."
            )

    def _describe_batch(self) -> str:
        return f"{self.batch_size} rows for each of {self._shape.num_processes} process(es)"

    def _report(self, plan: EpochPlan) -> None:
        num_left_over, num_rows = len(plan.left_over), len(self._rows)
        if not num_left_over:
            return
        level = logging.WARNING if num_left_over > 0.01 * num_rows else logging.INFO
        logger.log(
            level,
            "%d of %d rows (%.1f%%) are in no batch of epoch %d and open the next one: %s.",
            num_left_over,
            num_rows,
            100 * num_left_over / num_rows,
            self.epoch,
            self._why(plan),
        )

    def _why(self, plan: EpochPlan) -> str:
        shape, busiest = self._shape, self._rows.busiest
        if len(plan.left_over) < shape.group_size and not shape.keeps_short:
            return f"a step takes {shape.num_processes} full batches of {shape.batch_size} rows"
        shared = f"document {busiest.document_id!r} is the positive of {busiest.num_rows} rows"
        if busiest.num_rows > plan.num_groups:
            return f"{shared}, which exclude each other, in {plan.num_groups} steps. Pass a smaller batch size"
        return f"they conflict with too many rows, e.g. {shared}. Pass a smaller batch size or fewer negatives"


class ShuffledBatchSampler(DefaultBatchSampler):
    """Batches of any rows, in an order that depends on `seed` and the epoch alone: a resumed run sees the same ones.

    The host's default draws from a generator that starts anew where a run resumes, so that a later epoch has the order
    of the first (sentence-transformers 6.2). With several processes all batches are full and their number is a multiple
    of the processes, for the host shares them out one by one; what is left over differs from epoch to epoch.

    Args:
        dataset: The rows; only their number counts.
        batch_size: Rows per batch and process.
        drop_last: Whether to leave out a last, short batch.
        valid_label_columns: Not used; the host passes it to every sampler.
        generator: Not used, for its state is not restored when a run resumes; the host passes it to every sampler.
        seed: Seed of the order, together with the epoch.
        num_processes: Processes that share the batches. `None` is the size of the running distributed job, 1 without.

    Raises:
        DatasetError: There are too few rows for one batch for each process.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        num_processes: int | None = None,
    ) -> None:
        super().__init__(dataset, batch_size, drop_last, valid_label_columns, generator, seed)
        self.num_processes = _world_size() if num_processes is None else num_processes
        self._num_rows = len(dataset)
        if self.num_processes > 1 and not len(self):
            raise DatasetError(
                f"{self._num_rows} rows do not fill one batch of {batch_size} rows for each of {self.num_processes} "
                "processes. Pass more rows, a smaller batch size or fewer processes."
            )

    def __len__(self) -> int:
        if self.num_processes > 1:
            return self._num_rows // (self.batch_size * self.num_processes) * self.num_processes
        return super().__len__()

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self._num_rows).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size]


class StepwiseProportionalBatchSampler(MultiDatasetDefaultBatchSampler):
    """Batches of several datasets, each batch from one, in proportion to their sizes.

    As the host's sampler of that name, except that the processes take the batches of one step from one dataset: the
    host mixes single batches, and batches of two datasets were not planned together.

    Args:
        dataset: The datasets, concatenated.
        batch_samplers: A sampler for each; those of this module know how many processes there are.
        generator: Not used; the host passes it to every sampler.
        seed: Seed of the order, together with the epoch.
    """

    def __iter__(self) -> Iterator[list[int]]:
        offsets = [0, *self.dataset.cumulative_sizes]
        steps = [len(sampler) // self._batches_a_step for sampler in self.batch_samplers]
        turns = np.repeat(np.arange(len(steps)), steps)
        np.random.default_rng([self.seed, self.epoch]).shuffle(turns)
        batches = [iter(sampler) for sampler in self.batch_samplers]
        for turn in turns:
            for batch in islice(batches[turn], self._batches_a_step):
                yield [offsets[turn] + row for row in batch]

    def __len__(self) -> int:
        return sum(len(sampler) // self._batches_a_step for sampler in self.batch_samplers) * self._batches_a_step

    @property
    def _batches_a_step(self) -> int:
        return max(getattr(sampler, "num_processes", 1) for sampler in self.batch_samplers)


class StepwiseRoundRobinBatchSampler(StepwiseProportionalBatchSampler):
    """A step of each dataset in turn, until the first has no more.

    As the host's sampler of that name, except that the processes take the batches of one step from one dataset.

    Args:
        dataset: The datasets, concatenated.
        batch_samplers: A sampler for each; those of this module know how many processes there are.
        generator: Not used; the host passes it to every sampler.
        seed: Not used: the turns are always the same.
    """

    def __iter__(self) -> Iterator[list[int]]:
        offsets = [0, *self.dataset.cumulative_sizes]
        batches = [iter(sampler) for sampler in self.batch_samplers]
        for _ in range(self._rounds):
            for offset, own in zip(offsets, batches, strict=False):
                for batch in islice(own, self._batches_a_step):
                    yield [offset + row for row in batch]

    def __len__(self) -> int:
        return self._rounds * len(self.batch_samplers) * self._batches_a_step

    @property
    def _rounds(self) -> int:
        return min(len(sampler) // self._batches_a_step for sampler in self.batch_samplers)


def require_view(dataset: Dataset) -> None:
    """Refuse what are no rows of `RetrievalDataset.training_rows()`, or no longer.

    Args:
        dataset: The rows that are to be trained on.

    Raises:
        DatasetError: The id columns are missing, or the view that turns ids into queries and pages is lost, as after
            `datasets.concatenate_datasets` and `datasets.interleave_datasets`.
    """
    columns = list(getattr(dataset, "column_names", None) or [])
    if not isinstance(dataset, Dataset) or not set(ID_COLUMNS) <= set(columns):
        raise DatasetError(
            f"Found a {type(dataset).__name__} with columns {columns}, expected the rows of "
            f"RetrievalDataset.training_rows(), with columns {list(ID_COLUMNS)}. Pass those rows, or use another "
            "batch sampler."
        )
    if view_of(dataset) is None:
        raise DatasetError(
            f"These rows have lost their view: they read as the ids in {columns}, and the ids would be trained on as "
            "text. datasets.concatenate_datasets and interleave_datasets do that. Join datasets with "
            "RetrievalDataset.concatenate before training_rows(), or pass a mapping of names to datasets."
        )


def _world_size() -> int:
    """Processes of the running distributed job; asks without starting one."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def read_row_documents(dataset: Dataset) -> RowDocuments:
    """The ids of training rows as integers, read without decoding a page.

    Args:
        dataset: Rows with the columns of `ID_COLUMNS`, in the order of the dataset's indices.

    Returns:
        One entry a row, in the same order.
    """
    if not len(dataset):
        return RowDocuments(IntLists.from_pairs(_NONE, _NONE, 0), IntLists.from_pairs(_NONE, _NONE, 0), _NONE)
    # A shuffled dataset is read as one chunk a row, which makes everything after it slow.
    table = dataset.with_format("arrow").select_columns(list(ID_COLUMNS[1:]))[:].combine_chunks()
    relevant = table["relevant_document_ids"]
    vocabulary = pc.unique(pc.list_flatten(relevant)).drop_null()
    positives = _codes(table["document_id"], vocabulary)
    own = np.arange(len(positives))
    negatives = table["negative_document_ids"]
    documents = _int_lists(
        np.concatenate([own, _parents(negatives)]),
        np.concatenate([positives, _codes(pc.list_flatten(negatives), vocabulary)]),
        len(positives),
    )
    relevant_lists = _int_lists(_parents(relevant), _codes(pc.list_flatten(relevant), vocabulary), len(positives))
    return RowDocuments(documents, relevant_lists, positives, _busiest(positives, vocabulary))


_NONE = np.zeros(0, dtype=np.int64)


def _codes(ids: pa.ChunkedArray, vocabulary: pa.Array) -> np.ndarray:
    """The place of each id in the vocabulary, -1 for those that are not in it."""
    codes = pc.index_in(ids.cast(vocabulary.type), value_set=vocabulary)
    return pc.fill_null(codes, -1).to_numpy()


def _parents(lists: pa.ChunkedArray) -> np.ndarray:
    """The row of each element of a column of lists; a null list has no elements."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return np.repeat(np.arange(len(lengths)), lengths)


def _int_lists(rows: np.ndarray, codes: np.ndarray, num_rows: int) -> IntLists:
    known = codes >= 0
    return IntLists.from_pairs(rows[known], codes[known], num_rows)


def _busiest(positives: np.ndarray, vocabulary: pa.Array) -> BusiestDocument:
    known = positives[positives >= 0]
    if not known.size:
        return BusiestDocument()
    counts = np.bincount(known)
    return BusiestDocument(str(vocabulary[int(counts.argmax())].as_py()), int(counts.max()))
