"""Queries where there are none: written by a generator, sifted, and with where they came from."""

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa

from mmtune.arguments import require_flag, require_mapping, require_one_of, require_whole
from mmtune.data.arrow import column, table_dataset, with_columns
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.identity import text_digest
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.data.near_misses import NEAR_MISSES, near_misses_of
from mmtune.data.query_kinds import check_queries
from mmtune.data.tables import DroppedQuery, Tables
from mmtune.errors import ConfigError
from mmtune.inference.asking import Asker, Call, Failure, Pages, everything_of
from mmtune.inference.drafts import (
    Draft,
    Sieve,
    is_text,
    keep_answered,
    keep_findable,
    share_words,
    with_drafts,
)
from mmtune.inference.encoder import Retriever, require_retriever
from mmtune.inference.generators import Generator, read_queries, read_verdict, require_generator
from mmtune.inference.prompts import KINDS, ask_for_near_misses, ask_for_query, ask_whether_answered
from mmtune.inference.wording import normalized, points_at_its_page


def generate_queries(
    dataset: DatasetLike,
    generator: Generator,
    *,
    queries_per_page: int = 2,
    kinds: Sequence[str] | Mapping[str, str] | None = None,
    languages: Sequence[str] | None = None,
    judge: Generator | None = None,
    retriever: Retriever | None = None,
    near_misses: int = 0,
    existing: Literal["keep", "replace"] = "keep",
    store: str | os.PathLike[str] | None = None,
    max_workers: int = 8,
    show_progress_bar: bool = True,
    max_rank: int = 10,
    batch_size: int = 16,
) -> RetrievalDataset:
    """The dataset with queries about its pages, written by a generator.

    Every different page is asked about; of byte-identical ones the first. Left out is a query that points at its page
    ("this figure"), has the words of another of its page, and, where it can be told, asks for what another query of its
    page asks for, finds too many other pages before its own, or is not answered by its page. ``notes.dropped_queries``
    of the result lists what was left out with the reason, failed calls among it, and ``audit()`` counts it.

    A query that is written in the same words for several pages is one query, and all of them are relevant to it. One
    with the words of a query that was there has that query's text and an id of its own: equal texts share judgements.

    A reply is JSON with ``query`` and ``answer``; a reply that is no such JSON is a query itself. Order and ids do not
    depend on ``max_workers``.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes; it may be
            without queries. A page is shown as its image and its text, as far as the corpus has them.
        generator: ``OpenAICompatible``, or a function of a page's image, its text and an instruction that returns a
            text. It is called from several threads.
        queries_per_page: Queries to ask for about each page; 0 asks for near misses alone.
        kinds: Kinds of questions by name, of ``"fact"``, ``"table"``, ``"chart"``, ``"comparison"`` and ``"open"``, or
            a mapping of your own names to instructions. ``None`` takes all five. The pages take turns.
        languages: Names of the languages to ask in, in turns. ``None`` asks in the language of the page.
        judge: As ``generator``; keeps the queries that it says their page answers.
        retriever: An embedding model that finds queries of a page that repeat each other, and queries that are too
            general.
        near_misses: For each query and its page, so many questions that the page seems to answer, and does not, says
            the judge (Wasserman et al., 2025). They are negatives for rerankers; see ``labeled_pairs``.
        existing: ``"keep"``, or ``"replace"`` to leave out the queries that there are, with judgements and negatives.
        store: A folder for the replies, by page content, instruction and name of the generator: a second call asks
            nothing that was answered, also after a kill. A generator's name is its attribute ``name`` or ``model``,
            else the qualified name of the function or class; a lambda, and what is defined inside a function, has none.
        max_workers: Calls at a time.
        show_progress_bar: Whether to show bars, with the tokens spent.
        max_rank: With a retriever, a query's own page is among so many first.
        batch_size: Queries or pages a forward pass of the retriever.

    Returns:
        A new dataset. The queries have the columns ``kind``, ``language``, ``answer``, ``generator`` and ``prompt`` (a
        digest of the instruction) besides, and ``near_misses`` where these were asked for.

    Raises:
        ConfigError: An argument has a value it can't have, near misses are asked for without a judge, or the generator
            or the judge answered no call.
        DatasetError: The data can't be used, or its queries have a column of one of these names and another type.
    """
    num_queries = require_whole("queries_per_page", queries_per_page, at_least=0)
    num_near_misses = require_whole("near_misses", near_misses, at_least=0)
    depth, size = require_whole("max_rank", max_rank), require_whole("batch_size", batch_size)
    require_one_of("existing", existing, ("keep", "replace"))
    require_flag("show_progress_bar", show_progress_bar)
    prompt_by_kind, asked_languages = _require_kinds(kinds), _require_languages(languages)
    require_generator("generator", generator)
    if judge is not None:
        require_generator("judge", judge)
    elif num_near_misses:
        raise ConfigError(
            f"near_misses={num_near_misses} without a judge: nobody would make sure that their page does not answer "
            "them. Pass judge=, e.g. the generator itself."
        )
    if retriever is not None:
        require_retriever(retriever, "retriever", "generate_queries(dataset, generator, retriever=model)")
    data = as_retrieval_dataset(dataset)
    tables = data.tables if existing == "keep" else _without_queries(data.tables)
    if retriever is not None or num_near_misses:
        check_queries(tables.queries, "text")  # these compare, and are asked about, texts

    pages = Pages(data.corpus)
    workers = require_whole("max_workers", max_workers)
    asking = {"store": store, "max_workers": workers, "show_progress_bar": show_progress_bar}
    writer = Asker(generator, pages, **asking)
    checker = None if judge is None else Asker(judge, pages, **asking)

    first = data.relevance_of(everything_of(data.corpus)).page
    rows = np.flatnonzero(first == np.arange(len(first))).tolist()
    sieve = Sieve()
    drafts = _write(writer, pages, rows, num_queries, prompt_by_kind, asked_languages, sieve)
    drafts = sieve.keep(drafts, [is_text(each.text) for each in drafts], "it is blank, or no text")
    drafts = sieve.keep(drafts, [not points_at_its_page(each.text) for each in drafts], "it points at its page")
    drafts = share_words(drafts, tables, first, sieve)
    if retriever is not None and drafts:
        bars = {"batch_size": size, "show_progress_bar": show_progress_bar}
        drafts = keep_findable(drafts, tables, retriever, depth, sieve, **bars)
    if checker is not None:
        drafts = keep_answered(drafts, tables, checker, sieve)
    num_before = len(tables.queries)
    tables = with_drafts(tables, drafts, writer.name)
    if num_near_misses and checker is not None and len(tables.queries):
        tables = _with_near_misses(tables, num_near_misses, writer, checker, sieve)
    sieve.report(len(tables.queries) - num_before, len(rows))
    notes = replace(tables.notes, dropped_queries=(*tables.notes.dropped_queries, *sieve.dropped))
    return RetrievalDataset.from_tables(replace(tables, notes=notes))


def _require_kinds(kinds: object) -> dict[str, str]:
    """The instruction of each kind that is asked for."""
    if kinds is None:
        return dict(KINDS)
    if isinstance(kinds, Mapping):
        require_mapping("kinds", kinds, of=str, expected="instructions by the name of their kind")
        blank = [name for name, prompt in kinds.items() if not (is_text(name) and is_text(prompt))]
        if not kinds or blank:
            raise ConfigError(f"kinds={kinds!r:.80}: expected a name and an instruction for each kind, at least one.")
        return dict(kinds)
    names = _require_names("kinds", kinds, "['fact', 'table'], or a mapping of names to instructions")
    for name in names:
        require_one_of("kinds", name, KINDS)
    return {name: KINDS[name] for name in names}


def _require_languages(languages: object) -> list[str | None]:
    return [None] if languages is None else [*_require_names("languages", languages, "['English', 'German']")]


def _require_names(name: str, values: object, example: str) -> list[str]:
    """Texts in a list, each once."""
    given = [] if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) else list(values)
    if not given or not all(isinstance(each, str) and is_text(each) for each in given):
        raise ConfigError(f"{name}={values!r:.80}: expected a list of texts, none of them blank. Pass e.g. {example}.")
    return list(dict.fromkeys(given))


def _without_queries(tables: Tables) -> Tables:
    texts, scores = pa.array([], type=pa.string()), pa.array([], type=pa.int64())
    return replace(
        tables,
        queries=table_dataset({"query_id": texts, "text": texts}),
        qrels=table_dataset({"query_id": texts, "document_id": texts, "score": scores}),
        negatives=None,
        notes=replace(tables.notes, queries_without_document=0),
    )


def _write(
    writer: Asker,
    pages: Pages,
    rows: Sequence[int],
    count: int,
    prompt_by_kind: Mapping[str, str],
    languages: Sequence[str | None],
    sieve: Sieve,
) -> list[Draft]:
    """What the generator writes about each page: ``count`` calls, in turns of kind and language."""
    kinds = list(prompt_by_kind)
    turns = math.lcm(len(kinds), len(languages))
    calls: list[Call] = []
    plan: list[tuple[str, str | None, int]] = []
    for row in rows if count else ():
        start = pages.turn(row)
        for number in range(count):
            at = start + number
            # All kinds in all languages, one after the other, before any comes again.
            kind, language = kinds[at % len(kinds)], languages[(at + at // turns) % len(languages)]
            again = number // (len(kinds) * len(languages))
            calls.append(Call(row, ask_for_query(prompt_by_kind[kind], language, again)))
            plan.append((kind, language, number + 1))
    drafts = []
    for call, (kind, language, number), reply in zip(calls, plan, writer.ask(calls, "Writing queries"), strict=True):
        if isinstance(reply, Failure):
            sieve.fail(reply)
            continue
        text, answer = read_queries(reply)[0]
        prompt = text_digest(call.instruction)
        drafts.append(Draft(call.row, pages.document_id(call.row), text, answer, kind, language, prompt, number))
    return drafts


def _with_near_misses(tables: Tables, count: int, writer: Asker, checker: Asker, sieve: Sieve) -> Tables:
    """The tables with near misses of every query, judged against all of its pages."""
    relevance = RetrievalDataset.from_tables(tables).relevance
    best_first = np.lexsort((-relevance.judged_score, relevance.judged_query))
    pages_of_query: defaultdict[int, list[int]] = defaultdict(list)
    for query, document in zip(relevance.judged_query[best_first], relevance.judged_document[best_first], strict=True):
        pages_of_query[int(query)].append(int(document))
    queries: dict[str, Sequence] = {name: column(tables.queries, name).to_pylist() for name in ("query_id", "text")}
    calls = [
        Call(pages_of_query[query][0], ask_for_near_misses(text, count)) for query, text in enumerate(queries["text"])
    ]
    found = near_misses_of(tables.queries)
    tried: list[tuple[int, str]] = []
    for query, reply in enumerate(writer.ask(calls, "Writing near misses")):
        document_id = relevance.document_ids[calls[query].row].as_py()
        if isinstance(reply, Failure):
            sieve.fail(reply)
            continue
        seen = {normalized(text) for text in (queries["text"][query], *found[query])}
        for text, _ in read_queries(reply)[:count]:
            reasons = {
                "a near miss is blank, or no text": not is_text(text),
                "a near miss points at its page": points_at_its_page(text),
                "a near miss repeats the words of another": normalized(text) in seen,
            }
            reason = next((reason for reason, holds in reasons.items() if holds), None)
            seen.add(normalized(text))
            if reason is None:
                tried.append((query, text))
            else:
                sieve.dropped.append(DroppedQuery(document_id, text, reason))
    judged = [Call(row, ask_whether_answered(text)) for query, text in tried for row in pages_of_query[query]]
    replies = iter(checker.ask(judged, "Judging near misses"))
    for query, text in tried:
        said = [next(replies) for _ in pages_of_query[query]]
        failed = next((reply for reply in said if isinstance(reply, Failure)), None)
        if failed is not None:
            sieve.fail(failed, text)
        elif all(not isinstance(reply, Failure) and read_verdict(reply) == 0 for reply in said):
            found[query].append(text)
        else:
            document_id = relevance.document_ids[pages_of_query[query][0]].as_py()
            sieve.dropped.append(DroppedQuery(document_id, text, "a near miss may be answered by its page"))
    others = [name for name in tables.queries.column_names if name != NEAR_MISSES]
    lists = {NEAR_MISSES: pa.array(found, type=pa.list_(pa.string()))}
    return replace(tables, queries=with_columns(tables.queries.select_columns(others), lists))
