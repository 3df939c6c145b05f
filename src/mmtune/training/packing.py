"""Groups of rows that are filled one row at a time, without a conflict.

A row goes into a random group that has room and no conflict. A row that finds none takes the place of one that
conflicts with it, which then looks for another; that is a random walk which never empties a place. Where that does not
fill all groups, they are filled again with more care: next is always the row with the fewest groups left. Groups that
still can't be filled are taken apart to fill the others.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from functools import cached_property

import numpy as np

# What swaps may cost: enough for dense data, and a bound where no swap can help. The unit is a row looked at.
EFFORT_PER_ROW = 100
SWAP_EFFORT = 50
# The share of it for swaps before there is another way to fill groups.
FIRST_EFFORT = 0.2
# Above this share of empty places, swaps lose more time than they fill.
MOST_EMPTY_FOR_SWAPS = 0.2
# Random groups of which a row that is placed with care takes the best: more fill better, but are less random.
CANDIDATES = 8
# One epoch in five keeps a few empty places where rows just suffice; a second attempt would cost as much again.
CAREFUL_ATTEMPTS = 1

_NO_RANKS = np.zeros(0, dtype=np.int64)


class _Holders:
    """Which groups hold a document: one bit for each group, in one mask for each document."""

    def __init__(self) -> None:
        self._mask_by_document: dict[int, int] = {}
        # How often beyond once a group holds a document; rare, so not in the masks.
        self._repeats: Counter[tuple[int, int]] = Counter()

    def masks(self, documents: Iterable[int]) -> list[int]:
        """A mask for each document that any group holds."""
        masks = self._mask_by_document
        return [masks[document] for document in documents if document in masks]

    def held(self, documents: Iterable[int], group: int) -> list[int]:
        """Those of the documents that a group holds."""
        masks = self._mask_by_document
        return [document for document in documents if masks.get(document, 0) >> group & 1]

    def add(self, documents: Iterable[int], group: int) -> None:
        """Note that a row with these documents has entered a group."""
        masks, bit = self._mask_by_document, 1 << group
        for document in documents:
            mask = masks.get(document, 0)
            if mask & bit:
                self._repeats[document, group] += 1
            else:
                masks[document] = mask | bit

    def remove(self, documents: Iterable[int], group: int) -> None:
        """Note that a row with these documents has left a group."""
        for document in documents:
            if self._repeats[document, group]:
                self._repeats[document, group] -= 1
            else:
                self._mask_by_document[document] &= ~(1 << group)


class _Choices:
    """The groups that each row can still choose from; rows are known by their rank in the lists.

    Args:
        documents: The positive and the negatives of each row.
        relevant: What is relevant to its query.
        opening: Whether it comes before all other rows.
        num_groups: Groups to choose from.
    """

    def __init__(
        self, documents: list[list[int]], relevant: list[list[int]], opening: list[bool], num_groups: int
    ) -> None:
        self._documents = documents
        self._relevant = relevant
        self._ranks_by_document = _ranks_by_value(documents)
        self._ranks_by_relevant = _ranks_by_value(relevant)
        self._closed = np.zeros((num_groups, len(documents)), dtype=bool)
        # Open groups times rows, plus the rank: the smallest is next.
        self._urgency = np.arange(len(opening)) + np.where(opening, 0, num_groups * len(opening))

    def take(self) -> int:
        """The row with the fewest open groups, of those not taken yet."""
        rank = int(self._urgency.argmin())
        self._urgency[rank] = np.iinfo(np.int64).max
        return rank

    def settle(self, rank: int, candidates: set[int]) -> int:
        """The group for a row that takes least choice from others: closed already to most of those in conflict."""
        found = [self._ranks_by_relevant.get(document, _NO_RANKS) for document in self._documents[rank]]
        found += [self._ranks_by_document.get(document, _NO_RANKS) for document in self._relevant[rank]]
        ranks = np.concatenate([_NO_RANKS, *found])
        group = max(candidates, key=lambda group: self._closed[group][ranks].sum())
        newly = ranks[~self._closed[group][ranks]]
        self._closed[group][newly] = True
        self._urgency[newly] -= len(self._urgency)
        return group


class Packing:
    """Groups that are being filled with rows.

    Sets of groups are bit masks: of several hundred groups, those without a conflict cost one `or` a document.

    Args:
        documents_by_row: The positive and the negatives of each row that can be placed.
        relevant_by_row: What is relevant to its query.
        num_groups: Groups to fill.
        group_size: Rows that each group takes.
        opening: Rows that keep their place once they have it.
        seed: Decides all choices.
    """

    def __init__(
        self,
        documents_by_row: dict[int, list[int]],
        relevant_by_row: dict[int, list[int]],
        *,
        num_groups: int,
        group_size: int,
        opening: set[int],
        seed: int,
    ) -> None:
        self._documents_by_row = documents_by_row
        self._relevant_by_row = relevant_by_row
        self._opening = opening
        self._num_groups = num_groups
        self._group_size = group_size
        # Single draws from a numpy generator cost twenty times as much.
        self._random = random.Random(seed)
        self._whole_effort = EFFORT_PER_ROW * max(len(documents_by_row), 1000)
        self._start()

    def _start(self) -> None:
        """Empty all groups."""
        self._document_holders = _Holders()
        self._relevant_holders = _Holders()
        self._members: list[list[int]] = [[] for _ in range(self._num_groups)]
        self._room = [self._group_size] * self._num_groups
        self._in_use = self._with_room = self._turn = (1 << self._num_groups) - 1
        self._group_by_row: dict[int, int] = {}
        self._left_group_by_row: dict[int, int] = {}
        self._effort = FIRST_EFFORT * self._whole_effort

    def groups(self) -> list[list[int]]:
        """The groups that are in use, in order."""
        return [members for group, members in enumerate(self._members) if self._in_use >> group & 1]

    def pack(self, pool: list[int], *, with_short: bool) -> list[int]:
        """Fill all groups, or fewer where the rows conflict too much.

        Args:
            pool: Rows in the order in which they are placed.
            with_short: Whether to put the rows that remain into one more group, as far as they go together.

        Returns:
            The rows without a place.
        """
        pool = self._swap_in(self._place_all(pool))
        for _ in range(CAREFUL_ATTEMPTS):
            if self._with_room and self._few_missing():
                self._start()
                pool = self._swap_in(self._place_with_care())
        self._effort = self._whole_effort
        while self._with_room:
            pool = self._swap_in(pool + self._place_all(self._take_apart()))
        pool = self._fill_one_by_one(pool)
        if with_short and pool:
            self._open_group(min(len(pool), self._group_size))
            pool = self._swap_in(self._place_all(pool))
        return pool

    def _fill_one_by_one(self, pool: list[int]) -> list[int]:
        """Fill groups that were given up, easy rows first: few full groups where all together stayed half empty."""
        ease = {row: -rank for rank, row in enumerate(self._documents_by_row)}
        pool.sort(key=lambda row: (row not in self._opening, ease[row]))
        self._effort = self._whole_effort
        while self._in_use.bit_count() < self._num_groups and len(pool) >= self._group_size and not self._with_room:
            self._open_group(self._group_size)
            pool = self._swap_in(self._place_all(pool))
        return pool + self._take_apart() if self._with_room else pool

    def _few_missing(self) -> bool:
        """Whether few enough places are empty for swaps to fill them."""
        groups = _groups_in(self._with_room)
        missing = sum(self._room[group] - len(self._members[group]) for group in groups)
        return missing <= MOST_EMPTY_FOR_SWAPS * self._group_size * self._in_use.bit_count()

    def _open_group(self, room: int) -> None:
        bit = 1 << len(self._members)
        self._members.append([])
        self._room.append(room)
        self._in_use, self._with_room, self._turn = self._in_use | bit, bit, bit

    def _take_apart(self) -> list[int]:
        """Give up the emptiest of the groups with room; returns its rows, those that open the epoch first."""
        group = min(_groups_in(self._with_room), key=lambda group: len(self._members[group]))
        self._in_use &= ~(1 << group)
        self._with_room &= ~(1 << group)
        for row in self._members[group]:
            del self._group_by_row[row]
        return sorted(self._members[group], key=lambda row: row not in self._opening)

    def _place_all(self, pool: list[int]) -> list[int]:
        return [row for row in pool if not (self._with_room and self._place(row))]

    def _place(self, row: int) -> bool:
        """Put a row into a random group that has room and no conflict, if there is one."""
        groups = self._groups_for(row)
        if groups:
            self._enter(row, self._any_group(groups))
        return groups != 0

    def _place_with_care(self) -> list[int]:
        """Place all rows, next the one with the fewest groups left (DSATUR, Brélaz 1979); returns those without."""
        rows = list(self._documents_by_row)
        documents, relevant = list(self._documents_by_row.values()), list(self._relevant_by_row.values())
        choices = _Choices(documents, relevant, [row in self._opening for row in rows], self._num_groups)
        for _ in rows:
            rank = choices.take()
            groups = self._groups_for(rows[rank])
            if groups:
                candidates = {self._any_group(groups) for _ in range(CANDIDATES)}
                self._enter(rows[rank], choices.settle(rank, candidates))
        return [row for row in rows if row not in self._group_by_row]

    def _groups_for(self, row: int) -> int:
        """A mask of the groups to choose from for a row: with room and without a conflict."""
        blocked = 0
        for mask in self._conflict_masks(row):
            blocked |= mask
        free = self._with_room & ~blocked
        # Filled in turns, the groups stay equally full, and the last rows still have all of them to choose from.
        return free & -free if row in self._opening else free & self._turn or free

    def _swap(self, row: int) -> int:
        """Put a row in the place of another one; returns the row without a place, which can be the same."""
        self._effort -= SWAP_EFFORT
        once, twice, often = _count_bits(self._conflict_masks(row))
        allowed = self._in_use & ~(1 << self._left_group_by_row[row] if row in self._left_group_by_row else 0)
        groups = allowed & ~twice or allowed & ~often
        if not groups:
            return row
        group = self._any_group(groups)
        in_the_way = self._in_conflict(row, group) if once >> group & 1 else {self._any_member(group)}
        if len(in_the_way) != 1 or not in_the_way.isdisjoint(self._opening):
            return row
        (other,) = in_the_way
        self._leave(other, group)
        self._enter(row, group)
        return other

    def _swap_in(self, pool: list[int]) -> list[int]:
        """Swap rows until those without a place fit somewhere; returns the rows that still have none."""
        if not self._few_missing():
            return pool
        waiting = deque(pool)
        while waiting and self._with_room and self._effort > 0:
            row = self._swap(waiting.popleft())
            if not self._place(row):
                waiting.append(row)
        return list(waiting)

    def _conflict_masks(self, row: int) -> list[int]:
        """Masks of the groups that hold something this row conflicts with."""
        return self._relevant_holders.masks(self._documents_by_row[row]) + self._document_holders.masks(
            self._relevant_by_row[row]
        )

    def _in_conflict(self, row: int, group: int) -> set[int]:
        """The members of a group that a row conflicts with."""
        rows_by_document, rows_by_relevant = self._rows_by_document, self._rows_by_relevant
        others = [
            rows_by_relevant[document] for document in self._relevant_holders.held(self._documents_by_row[row], group)
        ]
        others += [
            rows_by_document[document] for document in self._document_holders.held(self._relevant_by_row[row], group)
        ]
        self._effort -= sum(map(len, others))
        return {other for rows in others for other in rows if self._group_by_row.get(other) == group}

    @cached_property
    def _rows_by_document(self) -> dict[int, list[int]]:
        return _inverted(self._documents_by_row)

    @cached_property
    def _rows_by_relevant(self) -> dict[int, list[int]]:
        return _inverted(self._relevant_by_row)

    def _enter(self, row: int, group: int) -> None:
        self._document_holders.add(self._documents_by_row[row], group)
        self._relevant_holders.add(self._relevant_by_row[row], group)
        self._members[group].append(row)
        self._group_by_row[row] = group
        self._turn &= ~(1 << group)
        if len(self._members[group]) == self._room[group]:
            self._with_room &= ~(1 << group)
        if not self._turn & self._with_room:
            self._turn = self._with_room

    def _leave(self, row: int, group: int) -> None:
        self._document_holders.remove(self._documents_by_row[row], group)
        self._relevant_holders.remove(self._relevant_by_row[row], group)
        self._members[group].remove(row)
        del self._group_by_row[row]
        self._with_room |= 1 << group
        self._left_group_by_row[row] = group

    def _any_group(self, mask: int) -> int:
        """A random one of the groups in a mask."""
        start = int(self._random.random() * len(self._members))
        behind = mask >> start << start or mask
        return (behind & -behind).bit_length() - 1

    def _any_member(self, group: int) -> int:
        members = self._members[group]
        return members[int(self._random.random() * len(members))]


def _inverted(values_by_row: dict[int, list[int]]) -> dict[int, list[int]]:
    rows_by_value: dict[int, list[int]] = defaultdict(list)
    for row, values in values_by_row.items():
        for value in values:
            rows_by_value[value].append(row)
    return rows_by_value


def _ranks_by_value(lists: list[list[int]]) -> dict[int, np.ndarray]:
    return {value: np.array(ranks) for value, ranks in _inverted(dict(enumerate(lists))).items()}


def _groups_in(mask: int) -> list[int]:
    return [group for group in range(mask.bit_length()) if mask >> group & 1]


def _count_bits(masks: Iterable[int]) -> tuple[int, int, int]:
    """The bits that are set in at least one, two and three of the masks."""
    once = twice = often = 0
    for mask in masks:
        often |= twice & mask
        twice |= once & mask
        once |= mask
    return once, twice, often
