"""What an audit reports: the kinds of findings, what each means, and how they are shown."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_LINE_WIDTH = 120
_ID_WIDTH = 24
_MOST_LINES = 32
"""Of findings; with more of them the meanings are left out, so that a report stays one screen."""

PROBLEMS = {
    "relevant_negatives_by_id": (
        "negatives that are relevant to their own query",
        "Judgement and list contradict each other. They are not used as negatives; others take their place.",
    ),
    "relevant_negatives_by_text": (
        "negatives relevant to the same text under another query id",
        "The page answers the same words elsewhere. They are not used as negatives; others take their place.",
    ),
    "relevant_negatives_by_bytes": (
        "negatives that are a byte-identical copy of a relevant page",
        "The same page under another id. They are not used as negatives; others take their place.",
    ),
    "unknown_negatives": (
        "negative ids that no document has",
        'Dropped, as on_missing="drop" says. Often rows were filtered out before the dataset was built.',
    ),
    "queries_without_negatives": (
        "queries without a usable negative",
        "Their rows get random pages, are left out or raise an error, as on_short says.",
    ),
    "differing_judgements": (
        "query texts with different judgements under different ids",
        "Training takes the pages of all ids as relevant; evaluation counts those of the other ids as wrong.",
    ),
    "documents_without_image": (
        "documents without image, sound or clip, where others have one",
        'Reading one as such raises an error that names it. Leave them out, or read documents="text" or "mixed".',
    ),
    "unreadable_images": (
        "images, sounds, clips that are empty, or whose file is missing",
        "Reading one raises an error that names it. Restore the files, or leave the documents out.",
    ),
    "unreadable_sources": (
        "files or pages of PDFs that can't be read",
        "They are not in the corpus. Repair them or pass their passwords=, or leave them out.",
    ),
    "documents_without_text": (
        "documents with a null or blank text, and no image",
        "There is nothing to embed, and reading a null raises an error. Take them out with without().",
    ),
    "damaged_pages": (
        "pages that can't be decoded",
        "Reading one raises an error that names it. Replace the files, or take them out with without().",
    ),
    "blank_pages": (
        "pages without ink, or with hardly any",
        "They answer nothing. without() takes them out.",
    ),
    "near_copies": (
        "documents that show the same as an earlier one, with other bytes",
        "Nothing counts them as one page: a copy of an answer may be its negative. without() makes them one.",
    ),
    "damaged_recordings": (
        "sounds and clips that can't be decoded, or are too short",
        "Reading one raises an error that names it. Replace the files, or take them out with without().",
    ),
    "silent_sounds": (
        "sounds that are silent from end to end",
        "They answer nothing. without() takes them out.",
    ),
    "same_recordings": (
        "documents with the samples or frames of an earlier one, in another file",
        "Nothing counts them as one: a copy of an answer may be its negative. without() makes them one.",
    ),
    "copied_queries": (
        "queries that stand word for word on their page",
        "They teach to look for strings, not for meaning. without() takes them out.",
    ),
    "incomplete_queries": (
        "queries without a part of what they are to be made of",
        "Reading them raises an error. Give them one, or take them out with without().",
    ),
    "leaked_documents": (
        "documents with the bytes of an answer in the other dataset",
        "Training on them is training on what is tested. without() takes them out.",
    ),
    "leaked_near_copies": (
        "documents that show the same as an answer in the other dataset",
        "Training on them is training on what is tested. without() takes them out.",
    ),
    "unread_answers": (
        "answers in the other dataset whose file can't be read",
        "Leaks of them may go unseen. Restore their files and audit again.",
    ),
    "leaked_queries": (
        "queries whose words are those of a query in the other dataset",
        "Training on them is training on what is tested. without() takes them out.",
    ),
}
"""What can hurt training or scores: key, what is counted, and what it means; in the order of the report."""

GOOD_TO_KNOW = {
    "short_negative_lists": (
        "queries with fewer usable negatives than most have",
        "Filled with random pages, left out or refused when rows are made, as on_short says.",
    ),
    "repeated_negatives": (
        "negatives listed again for a query, by id or by bytes",
        "A page is used once a row, so that the list is shorter than it looks.",
    ),
    "null_negatives": (
        "null negatives",
        "Left out of the lists.",
    ),
    "held_out_negatives": (
        "negatives taken out because they answer in evaluation",
        "split() keeps them off the training side, also as negatives.",
    ),
    "blank_queries": (
        "rows with a null or blank query",
        "They are documents only, or left out.",
    ),
    "null_documents": (
        "rows with a null image",
        "They are no documents, and their queries are left out.",
    ),
    "queries_without_document": (
        "queries to which nothing is relevant",
        "Left out of training and of evaluation.",
    ),
    "judged_not_relevant": (
        "judgements with a score of 0 or less",
        "They are no judgements here: what is not listed is not relevant.",
    ),
    "dropped_queries": (
        "written queries that were left out, failed calls among them",
        "notes.dropped_queries lists them with the page and the reason.",
    ),
    "identical_pages": (
        "documents that are a byte-identical copy of another one",
        "They count as one page in batches and negatives. deduplicate() makes them one document.",
    ),
    "unjudged_copies": (
        "copies of a relevant page that are not judged themselves",
        "Training and build_evaluator count copies as one page; InformationRetrievalEvaluator counts these as wrong.",
    ),
    "repeated_texts": (
        "query texts that stand under several query ids",
        "Two of them never share a batch, and what is relevant to one is no negative of the other.",
    ),
    "unreferenced_pages": (
        "pages that are neither relevant to a query nor a negative",
        "Random negatives are drawn from them too, and evaluation ranks them with the others.",
    ),
    "documents_without_text": (
        "documents without text that have an image, sound or clip",
        "Reading a null as a text raises an error. without() takes them out.",
    ),
    "look_alikes": (
        "documents that look like others but for some spots, as filled-in forms do",
        "For a person to judge: keep them on one side of a split. They are never merged or taken out.",
    ),
    "still_clips": (
        "clips of which 16 frames hardly differ, black ones among them",
        "Motion can't answer there, and a page may say as much. without() takes them out.",
    ),
    "short_queries": (
        "queries of one or two words",
        "They seldom tell one page from the others. without() takes them out.",
    ),
    "taken_out": (
        "documents, queries and negatives that without() took out",
        "As the findings said that it was given.",
    ),
}
"""What is good to know, in the same form. A key of both is a problem only where the corpus has no images."""

COPIES = ("near_copies", "same_recordings")
"""The kinds whose examples are groups of documents that show the same."""

LOOKED_FOR = {
    "content=True": (
        *("damaged_pages", "blank_pages", "near_copies", "copied_queries", "look_alikes", "short_queries"),
        *("damaged_recordings", "silent_sounds", "still_clips", "same_recordings"),
    ),
    "against=other": ("leaked_documents", "unread_answers", "leaked_queries"),
    "content=True, against=other": ("leaked_near_copies",),
}
"""The kinds that an audit only looks for when it is asked to, by its arguments."""


@dataclass(frozen=True)
class Example:
    """Where a finding shows.

    Attributes:
        query_ids: The query it is about first; further ids have the same text.
        document_ids: The document it is about first; further ids have the same bytes.
    """

    query_ids: tuple[str, ...] = ()
    document_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = 1 if self.query_ids and self.document_ids else 2
        parts = [("query", self.query_ids), ("document", self.document_ids)]
        return ", ".join(f"{what} {', '.join(map(_shorten_id, ids[:shown]))}" for what, ids in parts if ids)


@dataclass(frozen=True)
class Finding:
    """One kind of thing that an audit looks for.

    Attributes:
        key: Its name, which stays the same between versions.
        count: How often it was found; what is counted, ``title`` says.
        is_problem: Whether it can hurt training or scores, rather than being good to know.
        title: What is counted, in a few words.
        meaning: What it means, and what is done about it.
        examples: The first ones in the order of the tables; all of those that take decoding, or another dataset, to
            find; none where only a count was kept.
    """

    key: str
    count: int
    is_problem: bool
    title: str
    meaning: str
    examples: tuple[Example, ...] = ()

    def only(self, examples: Iterable[Example]) -> "Finding":
        """The finding with some of its examples, e.g. for ``without``.

        Args:
            examples: Those to keep; groups may have lost ids.
        """
        chosen = tuple(examples)
        return replace(self, examples=chosen, count=count_entries(self.key, chosen))


@dataclass(frozen=True)
class FalseNegative(Finding):
    """A negative that a model scores above every relevant document of its query; see ``find_false_negatives``.

    Attributes:
        query_id: The query that lists it.
        document_id: The negative.
        positive_id: The relevant document that the model scores highest.
        score: Of the negative.
        positive_score: Of that relevant document.
    """

    query_id: str = ""
    document_id: str = ""
    positive_id: str = ""
    score: float = 0.0
    positive_score: float = 0.0

    def __str__(self) -> str:
        return (
            f"query {_shorten_id(self.query_id)}: negative {_shorten_id(self.document_id)} scores {self.score:.3f}, "
            f"above {_shorten_id(self.positive_id)} with {self.positive_score:.3f}"
        )


def count_entries(key: str, examples: Iterable[Example]) -> int:
    """What the examples of a finding count for: of a group of copies all but the one that stays."""
    if key in COPIES:
        return sum(len(example.document_ids) - 1 for example in examples)
    if key == "look_alikes":
        return sum(len(example.document_ids) for example in examples)
    return len(tuple(examples))


@dataclass(frozen=True, repr=False)
class AuditReport:
    """What an audit found. ``print(report)`` shows it on one screen.

    Attributes:
        tables: The number of ``documents``, ``queries``, ``judgements``, and listed ``negatives``.
        negatives_per_query: How many queries have how many usable negatives, by rising number: those that are not
            relevant, each page once. Empty for a dataset without a table of negatives.
        findings: Every kind of finding that was looked for, also those with a count of 0; problems first.
        measures: With ``content=True`` the smallest, the median and the largest ``page_width_px``, ``page_height_px``,
            ``query_words`` and ``document_words``.

    Example:
        >>> from mmtune import RetrievalDataset
        >>> from mmtune.testing import generated_pages
        >>> report = RetrievalDataset.from_id_rows(generated_pages(20)).audit()
        >>> report.problems, report["blank_queries"].count, report.negatives_per_query
        ((), 4, {4: 20})
    """

    tables: Mapping[str, int]
    negatives_per_query: Mapping[int, int]
    findings: tuple[Finding, ...]
    measures: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that can hurt training or scores, and were found."""
        return tuple(finding for finding in self.findings if finding.is_problem and finding.count)

    @property
    def counts(self) -> dict[str, int]:
        """The count of every finding by its key, zeros included."""
        return {finding.key: finding.count for finding in self.findings}

    def __getitem__(self, key: str) -> Finding:
        for finding in self.findings:
            if finding.key == key:
                return finding
        for arguments, keys in LOOKED_FOR.items():
            if key in keys:
                raise KeyError(f"{key!r} was not looked for: audit({arguments}) does.")
        raise KeyError(f"{key!r} is no finding. Known are: {', '.join(self.counts)}")

    def to_dict(self) -> dict[str, Any]:
        """The report in values that JSON has; the numbers in ``negatives_per_query`` become strings."""
        return {
            "tables": dict(self.tables),
            "negatives_per_query": {str(length): queries for length, queries in self.negatives_per_query.items()},
            "measures": {name: list(values) for name, values in self.measures.items()},
            "findings": [
                {**asdict(finding), "examples": [_list_ids(example) for example in finding.examples]}
                for finding in self.findings
            ],
        }

    def to_json(self) -> str:
        """``to_dict()`` as a text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` as JSON to a file, replacing what is there."""
        Path(path).write_text(self.to_json() + "\n", "utf-8")

    def __str__(self) -> str:
        sizes = self.tables
        known = [finding for finding in self.findings if finding.count and not finding.is_problem]
        each = 2 if 2 * len(self.problems) + len(known) <= _MOST_LINES else 1
        lines = [
            "Audit",
            f"  corpus     {sizes['documents']:,} documents",
            f"  queries    {sizes['queries']:,}",
            f"  qrels      {sizes['judgements']:,} judgements",
            f"  negatives  {self._describe_negatives()}",
            *(f"  {line}" for line in self._describe_measures()),
            "",
            "Problems" if self.problems else "No problem was found." if known else "Nothing was found.",
            *(line for finding in self.problems for line in (_describe(finding), f"{'':11}{finding.meaning}")[:each]),
        ]
        if known:
            lines += ["", "Good to know", *map(_describe, known)]
        return "\n".join(line if len(line) <= _LINE_WIDTH else f"{line[: _LINE_WIDTH - 3]}..." for line in lines)

    __repr__ = __str__

    def _describe_measures(self) -> list[str]:
        kinds = {"sizes": ("page_width_px", "page_height_px"), "lengths": ("query_words", "document_words")}
        lines = []
        for what, names in kinds.items():
            parts = [
                f"{name.replace('_', ' ')} {low:,.0f} to {high:,.0f}, median {middle:,.0f}"
                for name in names
                for low, middle, high in [self.measures.get(name, (0, 0, 0))]
                if high
            ]
            lines += [f"{what:<11}{'; '.join(parts)}"] if parts else []
        return lines

    def _describe_negatives(self) -> str:
        lengths = self.negatives_per_query
        if not lengths:
            return "none"
        listed = f"{self.tables['negatives']:,} listed"
        if len(lengths) <= 3:
            each = ", ".join(f"{length} ({_count_queries(queries)})" for length, queries in lengths.items())
            return f"{listed}; usable a query: {each}"
        usual = most_common(lengths)
        spread = f"{min(lengths)} to {max(lengths)}, most often {usual} ({_count_queries(lengths[usual])})"
        return f"{listed}; usable a query: {spread}"


def _count_queries(count: int) -> str:
    return f"{count:,} {'query' if count == 1 else 'queries'}"


def most_common(queries_by_length: Mapping[int, int]) -> int:
    """The length that most queries have; of equally common ones the larger."""
    return max(queries_by_length, key=lambda length: (queries_by_length[length], length))


def _list_ids(example: Example) -> dict[str, list[str]]:
    return {name: list(ids) for name, ids in asdict(example).items()}


def _describe(finding: Finding) -> str:
    example = f" ({finding.examples[0]})" if finding.examples else ""
    return f"{finding.count:>9,}  {finding.title}{example}"


def _shorten_id(value: str) -> str:
    """An id in quotes; of a long one the two ends, where ids differ."""
    half = (_ID_WIDTH - 3) // 2
    return repr(value if len(value) <= _ID_WIDTH else f"{value[:half]}...{value[-half:]}")
