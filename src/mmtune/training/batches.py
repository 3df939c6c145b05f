"""Batches in which no document is relevant to the query of another row.

In-batch negatives punish every document of the batch that is not the row's own. Here the rows are put into batches by
their ids alone, so no page is ever decoded for it, and the ids know what pixels do not: everything else that is
relevant to the same query.

Losses that look at each row by itself need no such care: `ShuffledBatchSampler` is for them.

This module is what the host calls, and what reads ids from Arrow. `packing` makes the batches from integers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch.distributed
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler, MultiDatasetDefaultBatchSampler

from mmtune.arguments import require_whole
from mmtune.data.arrow import IntLists, column, flat_lists, positions
from mmtune.data.rows import ID_COLUMNS, view_of
from mmtune.errors import DatasetError
from mmtune.training.packing import BatchShape, EpochPlan, RowDocuments, plan_epoch

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class ConflictFreeBatchSampler(DefaultBatchSampler):
    """Batches of `RetrievalDataset.training_rows()` without a relevant document among the negatives.

    No document of a row (the positive and the listed negatives) is relevant to the query of another row of the batch.
    So no query text stands twice in a batch either. Batches are full, or shorter where rows conflict too much; the last
    may be short in any case, but is no single row where rows have no negatives: nothing could be learned from it. The
    order depends on `seed` and the epoch alone, so a resumed run sees the same batches. To resume at epoch e, the e
    epochs before it are planned again, because the rows that one epoch leaves over open the next.

    With several processes, the number of batches is a multiple of them, all batches of the run have the same size, and
    the batches that the processes take in one step are free of conflicts together, as losses that gather across devices
    need it. Where rows conflict too much for full batches, `batch_size` says what the size came to.

    Rows are left over when they conflict with too many others, as where a document is relevant to more rows than there
    are batches, and, with several processes or `drop_last`, when the rows do not divide by the batches. Where all
    batches would be less than a quarter full, there are fewer of them. In the extreme, all rows share one page: then
    the epoch is a single short batch of one row. More than 1% of left-over rows is a warning that names the reason.

    Pass the class to the host: `SentenceTransformerTrainingArguments(batch_sampler=ConflictFreeBatchSampler)`.

    Args:
        dataset: Rows of `RetrievalDataset.training_rows()`, possibly shuffled, selected or filtered since. Only their
            id columns are read.
        batch_size: Rows per batch and process.
        drop_last: Whether to leave out the rows that do not fill a last batch.
        valid_label_columns: Not used; the host passes it to every sampler.
        generator: Not used, for its state is not restored when a run resumes; the host passes it to every sampler.
        seed: Seed of the order, together with the epoch.
        num_processes: Processes that share the batches. `None` is the size of the running distributed job, 1 without.

    Raises:
        DatasetError: There are no rows, the id columns are missing, the rows have lost their view (ids would be
            trained on as text), or no batch can be filled.
        ConfigError: `num_processes` is no whole number of 1 or more.
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
        # A row without negatives has nothing to be told from where it is alone: its loss is zero.
        smallest = 1 if getattr(view_of(dataset), "num_negatives", 1) else 2
        self._shape = BatchShape(batch_size, _processes(num_processes), drop_last, smallest)
        self.num_processes = self._shape.num_processes
        _require_rows(len(dataset), self._shape)
        self._dataset = dataset
        self._rows = read_row_documents(dataset)
        self._left_over_by_epoch: list[np.ndarray] = []
        self._planned_epoch = 0
        # The host counts its steps from the first epoch, so all have the same number of batches.
        self._first: EpochPlan | None = None
        self._first = self._planned = self._plan_epoch(0)
        # accelerate (1.15) compares batches with the size that it finds here, and loses others on several processes.
        self.batch_size = self._first.batch_size
        if not self._first.batches and not drop_last:
            raise DatasetError(f"Not one batch of {_describe(self._shape)} is without a conflict: {self._why()}.")
        self._report()

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
        if self._planned_epoch != self.epoch:
            for epoch in range(min(len(self._left_over_by_epoch), self.epoch), self.epoch + 1):
                self._planned = self._plan_epoch(epoch)
            self._planned_epoch = self.epoch
            self._report()
        return self._planned

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        opening = self._left_over_by_epoch[epoch - 1] if epoch else np.zeros(0, dtype=np.int64)
        first = self._first if epoch else None
        plan = plan_epoch(self._rows, self._shape, opening, seed=(self.seed, epoch), first=first)
        if epoch == len(self._left_over_by_epoch):
            self._left_over_by_epoch.append(plan.left_over)
        return plan

    def _report(self) -> None:
        num_left_over, num_rows = len(self._planned.left_over), len(self._rows)
        if num_left_over:
            logger.log(
                logging.WARNING if num_left_over > 0.01 * num_rows else logging.INFO,
                "%d of %d rows (%.1f%%) are in no batch of epoch %d and open the next one: %s.",
                num_left_over,
                num_rows,
                100 * num_left_over / num_rows,
                self._planned_epoch,
                self._why(),
            )

    def _why(self) -> str:
        """Why rows are left over, and what to do."""
        shape, plan = self._shape, self._planned
        if len(plan.left_over) < shape.group_size and not shape.keeps_short:
            return f"a step takes {shape.num_processes} full batches of {shape.batch_size} rows, and these fill none"
        _, rows, counts = np.unique(self._rows.positives, return_index=True, return_counts=True)
        busiest = column(self._dataset, "document_id")[int(rows[counts.argmax()])].as_py()
        shared = f"document {busiest!r} is the positive of {counts.max()} rows"
        smaller = max(1, min(shape.batch_size // 2, len(self._rows) // 3))
        remedy = f"Pass a smaller batch size, e.g. per_device_train_batch_size={smaller}"
        num_steps = len(plan.batches) // shape.num_processes
        if counts.max() > num_steps:
            return f"{shared}, which exclude each other, in {num_steps} steps. {remedy}"
        size = f", so that batches take {plan.batch_size} rows" if plan.batch_size < shape.batch_size else ""
        example = f", e.g. {shared}" if counts.max() > 1 else ""
        return (
            "two rows share no batch where a page of one, a negative too, answers the query of the other, and so many "
            f"do{example}{size}. {remedy}, or fewer negatives"
        )


class ShuffledBatchSampler(DefaultBatchSampler):
    """Batches of any rows, in an order that depends on `seed` and the epoch alone: a resumed run sees the same ones.

    The host's default draws from a generator that starts anew where a run resumes, so that a later epoch has the order
    of the first (sentence-transformers 6.2). With several processes all batches are full and their number is a multiple
    of the processes, for the host shares them out one by one; what is left over differs from epoch to epoch.

    Args: as those of `ConflictFreeBatchSampler`, but of the rows only their number counts.

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
        self._shape = BatchShape(batch_size, _processes(num_processes), drop_last)
        self.num_processes = self._shape.num_processes
        self._num_rows = len(dataset)
        _require_rows(self._num_rows, self._shape)

    def __len__(self) -> int:
        if self.num_processes > 1:
            return self._num_rows // self._shape.group_size * self.num_processes
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._batches_a_step > 1:
            # Otherwise accelerate (1.15) loses the steps of datasets whose batches have another size than the first's.
            self.batch_size = None  # type: ignore[assignment] - accelerate takes it for any size

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


def _processes(given: int | None) -> int:
    """Processes that share the batches: those given, else of the running job; asks without starting one."""
    if given is not None:
        return require_whole("num_processes", given)
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1


def _require_rows(num_rows: int, shape: BatchShape) -> None:
    if num_rows < (shape.group_size if shape.num_processes > 1 else 1):
        raise DatasetError(
            f"{num_rows} rows do not fill one batch of {_describe(shape)}. Pass more rows, a smaller batch size or "
            "fewer processes."
        )


def _describe(shape: BatchShape) -> str:
    shared = f" for each of {shape.num_processes} processes" if shape.num_processes > 1 else ""
    return f"{shape.batch_size} rows{shared}"


def read_row_documents(dataset: Dataset) -> RowDocuments:
    """The ids of training rows as integers, read without decoding a page.

    Args:
        dataset: Rows with the columns of `ID_COLUMNS`, in the order of the dataset's indices.

    Returns:
        One entry a row, in the same order.
    """
    group_of_row = column(dataset, "relevance_group")
    groups = pc.unique(group_of_row)
    relevant_groups, relevant_ids = view_of(dataset).relevant_to(groups.to_numpy(zero_copy_only=False))
    vocabulary = pc.unique(relevant_ids).drop_null()
    relevant = positions(relevant_ids, vocabulary)
    alike = _find_alike(relevant_groups, relevant, len(vocabulary))
    positives = positions(column(dataset, "document_id").cast(vocabulary.type), vocabulary)
    negative_rows, negative_ids = flat_lists(column(dataset, "negative_document_ids"))
    brought = np.r_[positives, positions(negative_ids.cast(vocabulary.type), vocabulary)]
    rows, known = np.r_[np.arange(len(dataset)), negative_rows], brought >= 0
    documents = IntLists.grouped(rows[known], alike[brought[known]], len(dataset))
    each_once = alike[relevant] == relevant
    relevant_to_group = IntLists.grouped(relevant_groups[each_once], relevant[each_once], len(groups))
    return RowDocuments(documents, relevant_to_group.take(positions(group_of_row, groups)), positives)


def _find_alike(groups: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """For each document the first that is relevant to the same groups of rows: to batches they are the same.

    Where many rows share a text, one number stands for everything that is relevant to it.
    """
    groups_of_document = IntLists.grouped(documents, groups, count)
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(groups_of_document[row].tobytes(), row) for row in range(count)], dtype=np.int64)
