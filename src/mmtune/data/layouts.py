"""A builder per layout: from the rows that users have to the four tables. No builder decodes or copies an image."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Audio, Dataset, DatasetDict, IterableDataset, concatenate_datasets

from mmtune.arguments import listed
from mmtune.data.arrow import (
    ENCODED,
    column,
    id_column,
    is_lists,
    is_text,
    lists,
    lists_of_rows,
    media_columns,
    positions,
    table_dataset,
    with_columns,
    with_encoded_images,
)
from mmtune.data.tables import (
    ASKING,
    BuildNotes,
    Tables,
    advise_on,
    check_tables,
    has_content,
    id_lists,
    is_blank,
    is_number,
    query_parts,
    require_columns,
    require_finite,
    require_unique,
    text_column,
)
from mmtune.errors import ConfigError, DatasetError, MissingDocumentError

# The spellings of BEIR, ViDoRe, JinaVDR and Tevatron.
_DOCUMENT_ID = ("document_id", "corpus-id", "corpus_id", "docid", "_id", "id")
_QUERY_ID = ("query_id", "query-id", "_id", "id")
_QUERY_TEXT = ("query", "query_text", "text")
_SCORE = ("score", "relevance", "label")
_ASKING = {kind: f"query_{kind}" for kind in ASKING}
"""What asks beside a text, in the layouts where a row also has a page or a sound: its column by what it holds."""
_POSITIVES, _NEGATIVES = "positive_document_ids", "negative_document_ids"


def build_from_known_layout(rows: Dataset) -> Tables:
    """The tables of rows in a layout that their columns tell.

    Raises:
        DatasetError: They are no table, or none of a known layout; the message lists what was found and what is known.
    """
    rows = require_table(rows)
    found = set(rows.column_names)
    if media_columns(found) and found & {"query", *_ASKING.values()}:
        return build_from_id_rows(rows) if "id" in found else build_from_columns(rows)
    raise DatasetError(
        f"The columns {rows.column_names} are no layout that is known. Known are: "
        "'id', 'query', 'image' and optionally 'negatives' (from_id_rows); "
        "'query', 'image' and optionally 'negative_0', 'negative_1', ... (from_columns); "
        "'query_image' or 'query_audio' beside 'query' or in its place, where images or sounds ask; "
        "with 'audio' or 'video' in the place of 'image' likewise. "
        "Rename the columns, or call one of these builders with the names of yours, e.g. "
        "RetrievalDataset.from_id_rows(rows, id_column=..., query_column=..., image_column=...)."
    )


def build_from_id_rows(
    rows: Dataset,
    *,
    id_name: str = "id",
    query_name: str = "query",
    image_name: str = "image",
    audio_name: str = "audio",
    video_name: str = "video",
    negatives_name: str | None = "negatives",
    on_missing: str = "error",
    asking: Mapping[str, str | None] = _ASKING,
) -> Tables:
    """One row per page, its negatives as ids of other rows; see ``RetrievalDataset.from_id_rows``."""
    rows, kind_by_asking = _check_rows(rows, (id_name,), query_name, asking)
    given = {"image": image_name, "audio": audio_name, "video": video_name}
    media = {kind: name for kind, name in given.items() if name in rows.column_names}
    missing = [name for kind, name in given.items() if name != kind and kind not in media]
    require_columns(rows, missing or ([] if media else [image_name]), "The table of rows")
    alike = unused_negatives(rows, (id_name, query_name, *media.values(), negatives_name))
    if negatives_name == "negatives" and negatives_name not in rows.column_names and not alike:
        negatives_name = None
    if negatives_name in rows.column_names:
        _warn_of_unused(alike, f"column {negatives_name!r}")
    elif negatives_name is not None:
        own = f"negatives_column={alike[0]!r}, or " if alike else ""
        raise DatasetError(
            f"The table of rows has no column {negatives_name!r} for the negatives; it has {rows.column_names}. "
            f"Pass {own}negatives_column=None where the rows list no negatives."
        )
    ids = id_column(rows, id_name)
    advice = "Each row needs an id of its own: drop the repeated rows, or name another id column."
    require_unique(ids, "id", f" of column {id_name!r}", advice)
    blank = ~_asks(rows, query_name, kind_by_asking)
    asked, query_ids = rows.select(np.flatnonzero(~blank)), ids.filter(~blank)
    negatives, counts = None, {}
    if negatives_name is not None:
        negatives, counts = _resolve_negatives(asked, negatives_name, query_ids, ids, on_missing)

    own = {id_name, query_name, negatives_name, *kind_by_asking}
    others = [name for name in rows.column_names if name not in own]
    pages = rows.select_columns(others)
    for kind, name in media.items():
        pages = with_encoded_images(pages, name, kind)
    # beside images a text is that of a page; beside sounds, clips and several of these it may be a document of its own
    parts = [*media.values(), *(["text"] if [*media] != ["image"] else [])]
    empty = np.flatnonzero(~np.any([has_content(pages, name) for name in parts], axis=0))
    if len(empty):
        nulls = " and ".join(map(repr, media.values()))
        raise DatasetError(
            f"{len(empty)} rows have no {' or '.join(media)}: column {nulls} is null there, e.g. in the row with id "
            f"{ids[int(empty[0])].as_py()!r}. Every row is a document. Leave such rows out with "
            f"rows.filter(lambda row: row[{next(iter(media.values()))!r}] is not None), and their ids with "
            "on_missing='drop'; or make a dataset of those with a text, and join the two by "
            "RetrievalDataset.concatenate."
        )
    return check_tables(
        with_columns(_name_pages(pages, media), {"document_id": ids}),
        _select_asking(asked, query_ids, query_name, kind_by_asking, {id_name, negatives_name, *media.values()}),
        _judge_one_to_one(query_ids),
        negatives,
        notes=BuildNotes(blank_queries=int(blank.sum()), **counts),
    )


def build_from_columns(
    rows: Dataset,
    *,
    query_name: str = "query",
    image_name: str = "image",
    negative_names: Sequence[str] | None = None,
    asking: Mapping[str, str | None] = _ASKING,
    audio_name: str = "audio",
    video_name: str = "video",
) -> Tables:
    """One row per query with the images in it; see ``RetrievalDataset.from_columns``."""
    found = getattr(rows, "column_names", None) or ()
    given = {"image": image_name, "audio": audio_name, "video": video_name}
    kind = next((kind for kind, name in given.items() if name in found), "image")
    image_name = given[kind]
    if isinstance(negative_names, str):
        raise ConfigError(f"negative_columns={negative_names!r} is one name. Pass a list, [{negative_names!r}].")
    if negative_names is not None and not isinstance(negative_names, Sequence):
        raise ConfigError(f"negative_columns={negative_names!r:.80}: expected a list of names of columns.")
    rows, kind_by_asking = _check_rows(rows, (image_name,), query_name, asking)
    is_named = negative_names is not None
    if negative_names is None:
        matches = {name: re.fullmatch(r"negative(?:_(\d+))?", name) for name in rows.column_names}
        number_by_name = {name: int(match.group(1) or -1) for name, match in matches.items() if match}
        negative_names = sorted(number_by_name, key=lambda name: number_by_name[name])
    image_names = [image_name, *negative_names]
    negative_names = image_names[1:]
    require_columns(rows, negative_names, "The table of rows")
    alike = unused_negatives(rows, (query_name, *image_names))
    if is_named and negative_names:
        _warn_of_unused(alike, f"columns {listed(negative_names)}")
    elif alike and not is_named:
        raise DatasetError(
            f"Column {alike[0]!r} looks like hard negatives, and would not be used: rows without ids "
            "(from_columns) take the images in 'negative', 'negative_0', 'negative_1', ...; the table has "
            f"{rows.column_names}. If it holds ids, call from_id_rows(rows, id_column=..., "
            f"negatives_column={alike[0]!r}); if images, from_columns(rows, negative_columns={alike!r}); or rename it, "
            "or remove it."
        )
    for name in image_names:
        rows = with_encoded_images(rows, name, kind)
    # Of row i the page is document i, and negative k of n rows document n * (k + 1) + i; a null is no document.
    has_image = np.stack([has_content(rows, name) for name in image_names], axis=1)
    numbers = np.arange(len(rows))[:, None] + len(rows) * np.arange(len(image_names))
    own = {*negative_names, query_name, image_name, *kind_by_asking}
    others = [name for name in rows.column_names if name not in own]
    pages = []
    for k, name in enumerate(image_names):
        columns = rows.select_columns([name, *(others if k == 0 else ())])
        pages.append(_name_pages(columns.select(np.flatnonzero(has_image[:, k])), {kind: name}))
    document_ids = _as_ids(numbers.T[has_image.T])

    blank = ~_asks(rows, query_name, kind_by_asking)
    is_asking = ~blank & has_image[:, 0]
    query_ids = _as_ids(np.flatnonzero(is_asking))
    negatives = None
    if negative_names:
        is_listed = has_image[is_asking, 1:]
        offsets = np.r_[0, np.cumsum(is_listed.sum(axis=1))]
        items = lists(offsets, _as_ids(numbers[is_asking, 1:][is_listed]))
        negatives = table_dataset({"query_id": query_ids, "document_ids": items})
    return check_tables(
        with_columns(concatenate_datasets(pages), {"document_id": document_ids}),
        _select_asking(rows.select(np.flatnonzero(is_asking)), query_ids, query_name, kind_by_asking, set()),
        _judge_one_to_one(query_ids),
        negatives,
        notes=BuildNotes(
            blank_queries=int(blank.sum()),
            null_documents=int((~has_image[:, 0]).sum()),
            null_negatives=int((~has_image[:, 1:]).sum()),
            queries_without_document=int((~blank & ~has_image[:, 0]).sum()),
            ids_are_row_numbers=True,
        ),
    )


def build_from_beir(corpus: Dataset, queries: Dataset, qrels: Dataset | None) -> Tables:
    """Three tables in any known spelling; see ``RetrievalDataset.from_beir``."""
    corpus, queries = require_table(corpus), require_table(queries)
    corpus = _rename_columns(corpus, {"document_id": _find_column(corpus, _DOCUMENT_ID, "corpus")})
    query_id = _find_column(queries, _QUERY_ID, "table of queries")
    ids = id_column(queries, query_id)
    judged = _read_judgements(queries, ids, qrels)
    negatives = None
    if _NEGATIVES in queries.column_names:
        rows, items = id_lists(queries, _NEGATIVES)
        negatives = table_dataset({"query_id": ids, "document_ids": lists_of_rows(rows, items, len(ids))})

    alike = unused_negatives(queries, (query_id, _POSITIVES, _NEGATIVES, *_QUERY_TEXT))
    if alike and _NEGATIVES not in queries.column_names:
        raise DatasetError(
            f"Column {alike[0]!r} of the table of queries looks like hard negatives, and would not be used. Rename it "
            f"to {_NEGATIVES!r}, with lists of document ids, or remove it."
        )
    _warn_of_unused(alike, f"column {_NEGATIVES!r}")
    lists_of_ids = [name for name in (_POSITIVES, _NEGATIVES) if name in queries.column_names]
    queries = _rename_columns(queries.remove_columns(lists_of_ids), {"query_id": query_id, **_name_parts(queries)})
    for kind in query_parts(queries)[1:]:
        queries = with_encoded_images(queries, kind, kind)
    blank = ~np.any([has_content(queries, name) for name in query_parts(queries)], axis=0)
    is_asked = ~pc.is_in(judged["query_id"], value_set=ids.filter(blank)).to_numpy(zero_copy_only=False)
    is_relevant = pc.greater(judged["score"], 0).to_numpy(zero_copy_only=False)
    return check_tables(
        corpus,
        queries.select(np.flatnonzero(~blank)),
        table_dataset({name: values.filter(is_relevant & is_asked) for name, values in judged.items()}),
        None if negatives is None else negatives.select(np.flatnonzero(~blank)),
        notes=BuildNotes(blank_queries=int(blank.sum()), judged_not_relevant=int((~is_relevant).sum())),
    )


def require_table(rows: object) -> Dataset:
    """``rows`` itself, a single table in memory or on disk.

    Raises:
        DatasetError: It is something else.
    """
    if isinstance(rows, Dataset):
        return rows
    if isinstance(rows, DatasetDict):
        raise DatasetError(
            f"Expected one table, got the splits {list(rows)}. Pick one, e.g. rows[{next(iter(rows))!r}]."
        )
    if isinstance(rows, IterableDataset):
        raise DatasetError("A streamed dataset has no rows to resolve ids against. Load it without streaming=True.")
    raise DatasetError(f"Expected a datasets.Dataset, got {type(rows).__name__}. {advise_on(rows)}")


_LOOKS_LIKE_NEGATIVES = re.compile(
    r"(?:.*[^a-z])?(?:hard)?neg(?:ative)?s?(?:[^a-z0-9]*(?:image|page|document|doc|passage|path|id)s?)*[^a-z0-9]*\d*"
)


def unused_negatives(rows: Dataset, used: Sequence[str | None]) -> list[str]:
    """Columns that nothing reads, and that look like hard negatives by name and by what they hold."""
    schema = rows.data.table.schema
    return [
        name
        for name in rows.column_names
        if name not in used and _LOOKS_LIKE_NEGATIVES.fullmatch(name.lower()) and _holds_items(schema.field(name).type)
    ]


def _holds_items(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold ids, texts or images, rather than counts and flags."""
    return is_text(kind) or is_lists(kind) or pa.types.is_struct(kind) or pa.types.is_binary(kind)


def _warn_of_unused(names: Sequence[str], instead: str) -> None:
    if names:
        warnings.warn(
            f"Columns {listed(names)} look like hard negatives and are not used: the negatives are those of {instead}.",
            stacklevel=5,
        )


def _name_parts(queries: Dataset) -> dict[str, str]:
    """The columns that the queries of a BEIR set ask with, by our names."""
    files = {name: kind for name in _QUERY_TEXT if (kind := _kind_of_files(queries, name))}
    found = {}
    for kind, named in _ASKING.items():
        names = [name for name in (kind, named) if name in queries.column_names]
        names += [name for name, own in files.items() if own == kind]
        asking = (name for name in names if has_content(with_encoded_images(queries, name, kind), name).any())
        found[kind] = next(asking, None)
    found["text"] = next((name for name in _QUERY_TEXT if name in queries.column_names and name not in files), None)
    if not any(found.values()):
        _find_column(queries, _QUERY_TEXT, "table of queries")
    return {part: name for part, name in found.items() if name}


def _kind_of_files(table: Dataset, name: str) -> str | None:
    """What a column holds by its type, of what asks beside a text; ``None`` where there is none, or of something else.

    Encoded bytes are images, and sounds where the column is of ``datasets.Audio`` or has a ``sampling_rate``.
    """
    if name not in table.column_names:
        return None
    kind = table.data.table.schema.field(name).type
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    if isinstance(table.features[name], Audio) or "sampling_rate" in fields:
        return "audio"
    is_image = {"bytes", "path"} <= fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return "image" if is_image else None


def _asks(rows: Dataset, query_name: str, kind_by_asking: Mapping[str, str]) -> np.ndarray:
    """Which rows ask: with a text, or with something else."""
    asks = [has_content(rows, name) for name in kind_by_asking]
    if query_name in rows.column_names and query_name not in kind_by_asking:
        asks.append(~is_blank(text_column(rows, query_name)))
    return np.any([np.zeros(len(rows), dtype=bool), *asks], axis=0)


def _check_rows(
    rows: Dataset, required: Sequence[str], query_name: str, asking: Mapping[str, str | None]
) -> tuple[Dataset, dict[str, str]]:
    """The rows, and the columns that ask beside a text, encoded, by their names with what they hold."""
    rows, named = require_table(rows).with_format(None), dict(asking)
    kind = _kind_of_files(rows, query_name)
    if kind is not None and query_name not in named.values() and named[kind] in (None, _ASKING[kind]):
        named[kind] = query_name
    if not len(rows):
        raise DatasetError(
            f"The table of rows has zero rows (columns: {rows.column_names}). Nothing can be built from it."
        )
    if named["image"] is not None and named["image"] == named["audio"]:
        raise ConfigError(
            f"query_image_column and query_audio_column are both {named['image']!r}. A column holds images or sounds: "
            "leave one of them out."
        )
    is_there = {name: name != _ASKING[kind] or name in rows.column_names for kind, name in named.items() if name}
    kind_by_asking = {name: kind for kind, name in named.items() if name and is_there[name]}
    # a text may be left out where something else asks, but not one whose column is named
    texts = [query_name] if not kind_by_asking or query_name != "query" else []  # which may be images
    require_columns(rows, [*required, *texts, *kind_by_asking], "The table of rows")
    for name, kind in kind_by_asking.items():
        rows = with_encoded_images(rows, name, kind)
    return rows, kind_by_asking


def _resolve_negatives(
    asking: Dataset, name: str, query_ids: pa.Array, ids: pa.Array, on_missing: str
) -> tuple[Dataset, dict[str, Any]]:
    """The table of negatives whose ids some row has, and what was left out, for the notes."""
    rows, items = id_lists(asking, name)
    present = items.is_valid().to_numpy(zero_copy_only=False)
    rows, items = rows[present], items.filter(present)
    known = positions(items, ids) >= 0
    unknown = np.flatnonzero(~known)
    examples = [(query_ids[int(rows[at])].as_py(), items[int(at)].as_py()) for at in unknown[:10]]
    if examples and on_missing == "error":
        shown = ", ".join(f"{negative!r} (query {query!r})" for query, negative in examples[:3])
        raise MissingDocumentError(
            f"{len(unknown)} negatives point to documents that are not in the corpus, e.g. {shown}. Every negative "
            'must be the id of a row. Fix the ids, or pass on_missing="drop".'
        )
    counts = {
        "null_negatives": int((~present).sum()),
        "unknown_negatives": len(unknown),
        "unknown_examples": tuple(examples),
    }
    kept = lists_of_rows(rows[known], items.filter(known), len(query_ids))
    return table_dataset({"query_id": query_ids, "document_ids": kept}), counts


def _select_asking(
    rows: Dataset, ids: pa.Array, query_name: str, kind_by_asking: Mapping[str, str], hidden: set[str | None]
) -> Dataset:
    """The table of queries: id, text, what asks beside it, and the other columns of the rows that hold no files."""
    reserved = {"query_id", "text", *ASKING, query_name, *kind_by_asking, *hidden}
    files = tuple(map(type, ENCODED.values()))
    others = [
        name for name, feature in rows.features.items() if name not in reserved and not isinstance(feature, files)
    ]
    has_text = query_name in rows.column_names and query_name not in kind_by_asking
    new = {"query_id": ids, "text": text_column(rows, query_name) if has_text else pa.nulls(len(rows), pa.string())}
    kept = rows.select_columns([*kind_by_asking, *others])
    renamed = {name: kind for name, kind in kind_by_asking.items() if name != kind}
    kept = kept.rename_columns(renamed) if renamed else kept
    return with_columns(kept, new) if kept.column_names else table_dataset(new)


def _judge_one_to_one(ids: pa.Array) -> Dataset:
    """Each query with the document that has its id."""
    return table_dataset({"query_id": ids, "document_id": ids, "score": pa.array(np.ones(len(ids), dtype=np.int64))})


def _name_pages(pages: Dataset, media: Mapping[str, str]) -> Dataset:
    """Pages with their columns of files as the corpus names them."""
    names = [*media.values()]
    clashing = {"document_id", "image", *media} & (set(pages.column_names) - {*names})
    if clashing:
        raise DatasetError(
            f"The rows have a column {clashing.pop()!r} beside {names[0]!r}, and the corpus has one of its own of "
            "that name. Rename the column, or remove it."
        )
    renamed = {name: kind for kind, name in media.items() if name != kind}
    return pages.rename_columns(renamed) if renamed else pages


def _as_ids(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string())


def _find_column(table: Dataset, spellings: Sequence[str], what: str) -> str:
    """The first of the spellings that the table has."""
    for name in spellings:
        if name in table.column_names:
            return name
    raise DatasetError(
        f"The {what} has none of the columns {listed(spellings)}; it has {table.column_names}. "
        "Rename the column that holds it; the order is from_beir(corpus, queries, qrels)."
    )


def _rename_columns(table: Dataset, old_by_new: Mapping[str, str]) -> Dataset:
    """The table with columns under our names, and without columns that have these names and mean something else."""
    table = table.with_format(None)
    renamed = {old: new for new, old in old_by_new.items() if new != old}
    return table.remove_columns([new for new in renamed.values() if new in table.column_names]).rename_columns(renamed)


def _read_judgements(queries: Dataset, ids: pa.Array, qrels: Dataset | None) -> dict[str, pa.Array]:
    """Query ids, document ids and scores: of the qrels, or 1 each for what the queries list as their positives."""
    if qrels is not None:
        qrels, what = require_table(qrels), "table of relevance judgements (qrels)"
        scores = column(qrels, _find_column(qrels, _SCORE, what))
        if not is_number(scores.type):
            raise DatasetError(f"The scores of the qrels are {scores.type}, expected numbers.")
        require_finite(scores)
        return {
            "query_id": id_column(qrels, _find_column(qrels, _QUERY_ID[:2], what)),
            "document_id": id_column(qrels, _find_column(qrels, _DOCUMENT_ID[:4], what)),
            "score": pc.fill_null(scores, 0),
        }
    if _POSITIVES not in queries.column_names:
        raise DatasetError(
            f"There are no qrels, and the table of queries has no column {_POSITIVES!r}; it has "
            f"{queries.column_names}. Pass the qrels, or queries that list their positives."
        )
    rows, items = id_lists(queries, _POSITIVES)
    return {"query_id": ids.take(rows), "document_id": items, "score": pa.array(np.ones(len(items), dtype=np.int64))}
