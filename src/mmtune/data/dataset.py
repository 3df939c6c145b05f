"""``RetrievalDataset``: a corpus, queries, judgements and hard negatives, with images encoded until they are used."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from datasets import Dataset

from mmtune.arguments import (
    MIXED,
    MODALITIES,
    MediaLimits,
    QueryId,
    is_whole,
    require_flag,
    require_one_of,
    require_seed,
    require_whole,
)
from mmtune.data import files, layouts
from mmtune.data.arrow import as_texts, table_dataset
from mmtune.data.audit import AuditReport, examine
from mmtune.data.card import make_card
from mmtune.data.combining import concatenate_tables, merge_copies, undo_label_changes
from mmtune.data.content import look_into
from mmtune.data.documents import DocumentKind, check_recordings, document_columns, recordings_of
from mmtune.data.export import ExportLayout, Split, export_dataset
from mmtune.data.findings import Finding
from mmtune.data.hub import push_dataset
from mmtune.data.identity import usual_kind
from mmtune.data.images import InputSize, check_pages, require_input_size
from mmtune.data.judgements import Judgements
from mmtune.data.label_changes import label_changes
from mmtune.data.negatives import OnShort
from mmtune.data.pdf_corpus import build_from_pdfs
from mmtune.data.query_kinds import QueryKind, as_documents, query_columns
from mmtune.data.relevance import DirectionName, Relevance
from mmtune.data.removal import take_out
from mmtune.data.rows import labeled_lists, labeled_pairs, training_rows
from mmtune.data.splitting import split_tables
from mmtune.data.tables import BuildNotes, Tables, check_tables, has_content, query_parts
from mmtune.errors import ConfigError, DatasetError


class RetrievalDataset:
    """A corpus of pages, queries about them, judgements of relevance, and hard negatives.

    =============  ====================================================================================
    table          columns
    =============  ====================================================================================
    ``corpus``     ``document_id``; ``image``, ``audio``, ``video`` (encoded) and/or ``text``; others
    ``queries``    ``query_id``; ``text``, ``image``, ``audio`` (encoded), as they ask; others
    ``qrels``      ``query_id``, ``document_id``, ``score`` (an integer of 1 and above)
    ``negatives``  ``query_id``, ``document_ids`` (best first); ``None`` where there are none
    =============  ====================================================================================

    Every query has at least one relevant document; queries without are left out and counted. There may be no query at
    all: pages to be encoded, or asked about with ``generate_queries``. Ids are strings. Images stay bytes or paths, and
    no method copies them.

    A query may ask with an image or a sound, alone or beside its text, which may then be blank. It is read as a text
    wherever ``queries=`` does not say otherwise.

    Args:
        corpus: The documents.
        queries: The queries.
        qrels: The judgements; graded where scores differ.
        negatives: For each query the documents that look relevant and are not.

    Raises:
        DatasetError: A column is missing or of the wrong type, an id stands twice, a query has nothing to ask
            with, or none of the queries has a relevant document.
        MissingDocumentError: A judgement or a negative refers to an id that is not there.

    Example:
        >>> from datasets import Dataset
        >>> from mmtune import RetrievalDataset
        >>> RetrievalDataset(
        ...     corpus=Dataset.from_dict({"document_id": ["a", "b"], "text": ["Sales by region", "Staff by year"]}),
        ...     queries=Dataset.from_dict({"query_id": ["q"], "text": ["How many work here?"]}),
        ...     qrels=Dataset.from_dict({"query_id": ["q"], "document_id": ["b"], "score": [1]}),
        ... )
        RetrievalDataset
          corpus     2 documents (text)
          queries    1
          qrels      1 judgements, 1.0 a query
          negatives  none
    """

    def __init__(self, corpus: Dataset, queries: Dataset, qrels: Dataset, negatives: Dataset | None = None) -> None:
        self.tables = check_tables(corpus, queries, qrels, negatives)

    @classmethod
    def from_tables(cls, tables: Tables) -> "RetrievalDataset":
        """A dataset of tables that are checked already, with what their builder noted.

        :meta private:
        """
        dataset = cls.__new__(cls)
        dataset.tables = tables
        return dataset

    @classmethod
    def from_id_rows(
        cls,
        rows: Dataset,
        *,
        id_column: str = "id",
        query_column: str = "query",
        image_column: str = "image",
        negatives_column: str | None = "negatives",
        on_missing: str = "error",
        query_image_column: str | None = "query_image",
        audio_column: str = "audio",
        video_column: str = "video",
        query_audio_column: str | None = "query_audio",
    ) -> "RetrievalDataset":
        """A dataset from one row per page whose negatives are ids of other rows.

        This is the layout of ``llamaindex/vdr-multilingual-train``:

        ====  =======================  =========  ==============
        id    query                    image      negatives
        ====  =======================  =========  ==============
        "p1"  "How many work here?"    <page 1>   ["p3", "p2"]
        "p2"  "Where was it sold?"     <page 2>   ["p3"]
        "p3"  None                     <page 3>   None
        ====  =======================  =========  ==============

        A row whose query is null or blank, and that has no image to ask with, is a document only. Ids are resolved
        against all rows, wherever they stand. Sounds and clips stand in columns of their own, beside the images or in
        their place; a document has one at least, or a ``text`` where there are several such columns.

        Args:
            rows: The table; its order does not matter.
            id_column: Unique ids, strings or integers.
            query_column: Texts, or images or sounds that ask; ``query_id`` is the row's id.
            image_column: Images, encoded or as paths.
            negatives_column: Lists of ids, best first; a row's own id among them is not used, and audited. ``None``
                where the rows list no negatives; that is also what the default means for rows without such a column,
                unless another one looks like it.
            on_missing: ``"error"``, or ``"drop"`` to leave out negative ids that no row has, and count them.
            query_image_column: Images that ask, beside a text or without one; they become the column ``image`` of the
                queries, and ``queries="image"`` reads them. ``None`` leaves such a column out; so does the default
                for rows without one. Where there is one, there may be no ``query_column``.
            audio_column: Sounds, encoded or as paths, where there are any.
            video_column: Clips likewise.
            query_audio_column: Sounds that ask, as ``query_image_column``: the column ``audio`` of the queries.

        Raises:
            DatasetError: A column is missing or of the wrong type, an id stands twice, a row has no image, or there are
                no rows.
            MissingDocumentError: A negative is the id of no row, and ``on_missing="error"``.
        """
        require_one_of("on_missing", on_missing, ("error", "drop"))
        return cls.from_tables(
            layouts.build_from_id_rows(
                rows,
                id_name=id_column,
                query_name=query_column,
                image_name=image_column,
                audio_name=audio_column,
                video_name=video_column,
                negatives_name=negatives_column,
                on_missing=on_missing,
                asking={"image": query_image_column, "audio": query_audio_column},
            )
        )

    @classmethod
    def from_columns(
        cls,
        rows: Dataset,
        *,
        query_column: str = "query",
        image_column: str = "image",
        negative_columns: Sequence[str] | None = None,
        query_image_column: str | None = "query_image",
        audio_column: str = "audio",
        video_column: str = "video",
        query_audio_column: str | None = "query_audio",
    ) -> "RetrievalDataset":
        """A dataset from one row per query with the images in it.

        This is the layout of ``tomaarsen/llamaindex-vdr-en-train-preprocessed``. With n rows, the query of row i is
        ``str(i)``, its page is document ``str(i)``, and its k-th negative, from 0, is document
        ``str(n * (k + 1) + i)``.
        A null negative is no document. Pages repeat as images in this layout: byte-identical ones count as one page
        wherever relevance matters.

        Args:
            rows: The table.
            query_column: Texts. A row whose query is null or blank, and that has no image to ask with, gives documents
                only.
            image_column: The page that answers the query.
            negative_columns: Columns of images, best first. ``None`` takes every column named ``negative`` or
                ``negative_<k>``, by number; other columns that look like negatives are an error then, and a warning
                where columns were named.
            query_image_column: As for ``from_id_rows``.
            audio_column: Sounds, where there are no images; the negatives are sounds then.
            video_column: Clips, where there are neither.
            query_audio_column: As for ``from_id_rows``.

        Raises:
            DatasetError: A column is missing or of the wrong type, looks like negatives and would not be used, or no
                row has both a query and an image.
            ConfigError: ``negative_columns`` is one name rather than a list of names.
        """
        return cls.from_tables(
            layouts.build_from_columns(
                rows,
                query_name=query_column,
                image_name=image_column,
                negative_names=negative_columns,
                asking={"image": query_image_column, "audio": query_audio_column},
                audio_name=audio_column,
                video_name=video_column,
            )
        )

    @classmethod
    def from_beir(cls, corpus: Dataset, queries: Dataset, qrels: Dataset | None) -> "RetrievalDataset":
        """A dataset from three tables, as in ViDoRe v1, v2 and v3, JinaVDR and Tevatron corpora.

        Known spellings, the first that is there wins:

        ========  =====================================================================================
        table     columns
        ========  =====================================================================================
        corpus    ``document_id``, ``corpus-id``, ``corpus_id``, ``docid``, ``_id`` or ``id``; ``image``
        queries   ``query_id``, ``query-id``, ``_id`` or ``id``; ``query``, ``query_text`` or ``text``;
                  ``image``, ``query_image``, ``audio`` or ``query_audio``, alone or beside the text
        qrels     the ids as above; ``score``, ``relevance`` or ``label``, integers or floats
        ========  =====================================================================================

        Ids may be integers. Judgements of 0 or less are not relevant. Where the queries list
        ``negative_document_ids``, as Tevatron's do, those are the negatives.

        Args:
            corpus: The documents.
            queries: The queries; those with nothing to ask with are left out and counted.
            qrels: The judgements. ``None`` takes ``positive_document_ids`` of the queries.

        Raises:
            DatasetError: A table lacks a column or holds the wrong type, or no query has a relevant document.
            MissingDocumentError: A judgement or a negative refers to an id that is not there.
        """
        return cls.from_tables(layouts.build_from_beir(corpus, queries, qrels))

    @classmethod
    def from_pdfs(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        queries: Any = None,
        *,
        max_pixels: int = 1_500_000,
        store: str | os.PathLike[str] | None = None,
        passwords: str | Mapping[str, str] | None = None,
        on_bad_file: str = "report",
    ) -> "RetrievalDataset":
        """A dataset of the pages of PDFs, which are rendered when they are read, and queries about them.

        ================  ==============  ============  ===============  ===========
        document_id       image           text          source           page_number
        ================  ==============  ============  ===============  ===========
        "report.pdf#1"    <page 1>        "Sales ..."   "report.pdf"     1
        "report.pdf#2"    <page 2>        None          "report.pdf"     2
        ================  ==============  ============  ===============  ===========

        ``text`` is the text layer, ``None`` where a page has none, as a scan. Documents are made of images all the
        same, unless ``documents="text"`` says otherwise. A page is rendered at the size that a model reads it at, with
        the values of its forms. One file under two names holds the same pages. A file that has changed since is
        noticed when one of its pages is read: an ``ImageDecodeError`` says to build the dataset again.

        Queries name pages by file and number, from 1:

        ======================  ============  ===========  =====  ========
        text                    source        page_number  score  query_id
        ======================  ============  ===========  =====  ========
        "How many work here?"   "report.pdf"  2            2      "staff"
        "How many work here?"   "old.pdf"     7            1      "staff"
        ======================  ============  ===========  =====  ========

        ``score`` (else 1) and ``query_id`` may be left out: rows of one text are one query then. Further columns are
        kept, of the first row of each query. Sources are names or paths, with as many folders as tell them apart.

        Args:
            paths: Files, folders (all PDFs below them, also through links), or globs such as ``"reports/**/*.pdf"``.
            queries: A CSV or JSONL file in UTF-8, a ``datasets.Dataset``, a frame of pandas or polars, or a list of
                dictionaries. ``None`` reads the ``queries.csv`` or ``queries.jsonl`` of each folder among ``paths``,
                if there is one. Without queries the dataset has pages alone, for ``generate_queries``.
            max_pixels: Upper bound of width times height of a page. Nothing is rendered at more than 300 dpi.
            store: A folder where each page is kept as a PNG file, rendered once, by the content of its file: for scans,
                which take longer to render than to read. Several processes may share it, and one that was killed is
                gone on with. ``None`` renders pages whenever they are read.
            passwords: Of encrypted files: one for all, or by name or path of the file. In memory they stay with the
                pages; ``save`` writes pages as images, and no password.
            on_bad_file: ``"report"`` leaves out files and pages that can't be read, with a warning at the end that
                names them; ``audit()`` counts them. ``"error"`` raises then.

        Raises:
            DatasetError: A path does not exist, there is no PDF, none can be read, ``on_bad_file="error"`` and one
                can't be, the table of queries can't be read or lacks a column, or pages can't be written to ``store``.
            MissingDocumentError: A query names a file or a page that is not there.
            ConfigError: An argument is of the wrong type.
            MissingExtraError: pypdfium2 is not installed.
        """
        return cls.from_tables(
            build_from_pdfs(
                paths, queries, max_pixels=max_pixels, store=store, passwords=passwords, on_bad_file=on_bad_file
            )
        )

    @classmethod
    def concatenate(
        cls, datasets: Sequence["RetrievalDataset"] | Mapping[str, "RetrievalDataset"]
    ) -> "RetrievalDataset":
        """Several datasets as one. Ids that stand in more than one are prefixed, and names of files in ``source``.

        Use this, not ``datasets.concatenate_datasets`` on training rows, which loses the view of the rows without a
        word.

        Args:
            datasets: The parts. The prefix of an id is the part's name in a mapping, its number in a sequence:
                ``"1/page-7"``.

        Raises:
            DatasetError: There are no parts, one is no ``RetrievalDataset``, or columns of one name have different
                types.
            ConfigError: ``datasets`` is neither a sequence nor a mapping, or a name can't be part of an id.
        """
        if isinstance(datasets, (str, bytes)) or not isinstance(datasets, (Sequence, Mapping)):
            raise ConfigError(f"datasets={datasets!r:.80}: expected a list of datasets, or a mapping of names to them.")
        parts = datasets if isinstance(datasets, Mapping) else dict(enumerate(datasets))
        for name, part in parts.items():
            as_texts("name", [str(name)])
            if not isinstance(part, cls):
                raise DatasetError(
                    f"Part {name!r} is a {type(part).__name__}, expected a RetrievalDataset. Build one, e.g. with "
                    "from_id_rows or load."
                )
        return cls.from_tables(concatenate_tables({str(name): part.tables for name, part in parts.items()}))

    @classmethod
    def load(
        cls,
        name_or_path: str | os.PathLike[str],
        config: str | None = None,
        *,
        split: str | None = None,
        revision: str | None = None,
        allow_outside: bool = False,
    ) -> "RetrievalDataset":
        """A dataset from a folder, a file or the Hub; the layout is recognised by its columns.

        Args:
            name_or_path: A folder written by ``save``, a parquet file or folder, a PDF or a folder of PDFs as
                ``from_pdfs`` reads it, or the name of a Hub dataset. A folder or a Hub dataset with ``corpus``,
                ``queries`` and ``qrels`` is read as ``from_beir`` reads these.
            config: The configuration of a Hub dataset, e.g. ``"en"``.
            split: The split; needed where there are several. In a folder of three tables, files named ``train``,
                ``dev``, ``validation`` or ``test`` are splits, e.g. ``qrels/test.parquet``; a table without any is
                shared by all.
            revision: The commit or tag of a Hub dataset, to pin what is read.
            allow_outside: Whether the paths of images may lead out of the folder of the table. A table from somebody
                else could name any file of this machine, so that is an error otherwise.

        Raises:
            DatasetError: There is nothing, it can't be read, it has several splits, its columns are no known layout, it
                holds PDFs and tables alike, or images lie outside its folder.
            ConfigError: An argument is of the wrong type.
        """
        for name, value in {"config": config, "split": split, "revision": revision}.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name}={value!r:.80}: expected a text, or None.")
        tables = files.load_tables(name_or_path, config, split=split, revision=revision, allow_outside=allow_outside)
        return cls.from_tables(tables)

    @property
    def corpus(self) -> Dataset:
        """The documents: ``document_id``, ``image`` and the like (encoded) and/or ``text``, and what else there was."""
        return self.tables.corpus

    @property
    def queries(self) -> Dataset:
        """The queries: ``query_id``, ``text``, ``image`` and ``audio`` where these ask, and what else the rows held."""
        return self.tables.queries

    @property
    def qrels(self) -> Dataset:
        """The judgements: ``query_id``, ``document_id``, ``score``."""
        return self.tables.qrels

    @property
    def negatives(self) -> Dataset | None:
        """The hard negatives: ``query_id``, ``document_ids``; ``None`` where there are none."""
        return self.tables.negatives

    @property
    def notes(self) -> BuildNotes:
        """What the builder met and left out."""
        return self.tables.notes

    @cached_property
    def relevance(self) -> Relevance:
        """The judgements by position, with equal queries and byte-identical pages as one; computed once.

        Where the corpus has no images, documents with equal texts are one. Queries are the same where everything that
        they have is.
        """
        return Relevance(self.tables)

    @cached_property
    def _relevance_by_kind(self) -> dict[tuple[DocumentKind, QueryKind | None], Relevance]:
        return {(self.relevance.documents, None): self.relevance}

    def relevance_of(self, documents: DocumentKind, queries: QueryKind | None = None) -> Relevance:
        """The judgements by position, for documents and queries made of this; computed once for each.

        With ``"text"``, two texts of one page image are two documents; with ``"text+image"``, documents are the same
        where both parts are. So it is with queries.

        Args:
            documents: ``"image"``, ``"text"``, ``"text+image"``, ``"audio"``, ``"mixed"`` and the like.
            queries: Likewise; ``None`` is everything that the queries have.

        Raises:
            ConfigError: ``documents`` or ``queries`` is unknown, or the corpus or the queries lack a column of it.
        """
        document_columns(self.corpus, documents)
        if queries is not None:
            query_columns(self.queries, queries)
        kind = documents, queries
        if kind not in self._relevance_by_kind:
            self._relevance_by_kind[kind] = Relevance(self.tables, documents, queries)
        return self._relevance_by_kind[kind]

    def training_rows(
        self,
        num_negatives: int = 1,
        *,
        max_pixels: int | None = None,
        input_size: InputSize | None = None,
        documents: DocumentKind = "image",
        on_short: OnShort = "random",
        seed: int = 42,
        queries: QueryKind = "text",
        max_seconds: float | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        sampling_rate: int | None = None,
    ) -> Dataset:
        """Rows for the host's trainers, one per query and relevant document, decoded when they are read.

        =======  =========  ============  ===  ================
        query    image      negative_0    ...  negative_{n-1}
        =======  =========  ============  ===  ================
        str      an image   an image           an image
        =======  =========  ============  ===  ================

        Under ``rows.with_format(None)`` the same rows hold ids: ``query_id``, ``document_id``,
        ``negative_document_ids``, and a number, ``relevance_group``, that rows of one query text share; the view of
        the rows knows what is relevant to each group. ``shuffle``, ``select``, ``filter`` and ``train_test_split`` keep
        both. With ``documents="text"`` the columns keep their names and hold texts; with ``queries="image"`` the column
        ``query`` holds images, and dictionaries of both with ``"text+image"``.

        Args:
            num_negatives: Negatives a row. A dataset without negatives gives rows without, and a warning where more
                than one was asked for; ``mine_hard_negatives`` finds some.
            max_pixels: Upper bound of width times height of a page. A larger one is scaled down here, and again by the
                model's processor, which costs detail; ``None`` leaves that to the processor alone. A JPEG of 32
                megapixels and more is decoded at half its size all the same.
            input_size: What the model reads a page at: ``(width, height)``, or a largest number of pixels for a model
                that keeps the shape of a page. A JPEG is then decoded at a fraction of its size that leaves 2.5 times
                the sides, or 1.5 times the area, and ``max_pixels`` leaves no side shorter. ``finetune`` knows this of
                its model; it is for the host's trainers.
            documents: What a document is made of: ``"image"``, ``"text"``, ``"audio"``, ``"video"``, several of them
                joined as in ``"text+image"``, or ``"mixed"``, where each is what it has; it decides which documents
                are the same, too.
            on_short: What to do with a query that has too few negatives: ``"random"`` fills with documents that are not
                relevant to it, ``"drop"`` leaves its rows out, ``"error"`` raises.
            seed: Of the filling.
            queries: What a query is made of: ``"text"``, ``"image"``, ``"text+image"``, ``"audio"`` or
                ``"text+audio"``; it decides which queries are the same, too.
            max_seconds: How much is read of a sound or a clip, from its beginning; ``None`` is all of it.
            fps: Frames a second of a clip, at most; ``None`` keeps those that there are.
            max_frames: Frames of a clip, at most, evenly spread; ``None`` is 768.
            sampling_rate: Samples a second of all sounds; ``None`` keeps that of each. The host takes one rate a batch:
                ``finetune`` knows that of its model; this is for the host's trainers.

        Raises:
            ConfigError: An argument has a value it can't have.
            DatasetError: A query has too few negatives and ``on_short="error"``, the corpus can't fill a row, or a
                query lacks what ``queries`` says.

        Warns:
            UserWarning: ``max_pixels`` is given, and what that costs.
        """
        require_one_of("on_short", on_short, get_args(OnShort))
        num_negatives = require_whole("num_negatives", num_negatives, at_least=0)
        limits = MediaLimits(max_seconds, fps, max_frames, sampling_rate=sampling_rate)
        if max_pixels is not None:
            max_pixels = require_whole("max_pixels", max_pixels)
        if max_pixels is not None and documents != "video":
            warnings.warn(
                f"max_pixels={max_pixels} scales pages down before the model's processor does so again: for a CLIP of "
                "128 pixels, scanned receipts of 128 * 128 pixels kept a cosine of 0.12 to the whole ones at worst. "
                "Leave it out, pass input_size, which uses the decoder's own reduction, or max_pixels to load_model.",
                stacklevel=2,
            )
        if input_size is not None:
            input_size = require_input_size(input_size)
        seed = require_seed("seed", seed)
        query_columns(self.queries, queries)
        relevance = self.relevance_of(documents, queries)
        if num_negatives > 1 and self.negatives is None:
            warnings.warn(
                f"num_negatives={num_negatives} is not used: the dataset lists no negatives, so that rows have none. "
                "Find some with mine_hard_negatives(), or leave num_negatives out.",
                stacklevel=2,
            )
        wanted = num_negatives if self.negatives is not None else 0
        judgements = Judgements.of(relevance, "text_to_image")
        sizes = {"max_pixels": max_pixels, "input_size": input_size, "limits": limits}
        return training_rows(judgements, wanted, documents, seed, on_short=on_short, **sizes)

    def labeled_pairs(
        self,
        num_negatives: int = 4,
        *,
        direction: DirectionName = "text_to_image",
        documents: DocumentKind = "image",
        seed: int = 42,
        queries: QueryKind = "text",
    ) -> Dataset:
        """Rows for rerankers: ``query, document, label``, each relevant pair with its negatives after it.

        Under ``rows.with_format(None)`` the same rows hold ``query_id, document_id, label``. Lists that are too short
        are filled at random, never with what is relevant.

        Args:
            num_negatives: Pairs of label 0 to each pair of label 1.
            direction: ``"text_to_image"`` asks with a query for documents, whatever both are made of.
                ``"image_to_text"`` asks with a document for queries: its negatives are first those that list it as a
                negative. What they are made of may stand in their place, as in ``"video_to_text"``.
            documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
            seed: Of the filling.
            queries: What a query is made of, likewise.

        Raises:
            ConfigError: An argument has a value it can't have.
            DatasetError: There are too few documents, or queries, to fill a row, or a query lacks what ``queries``
                says.
        """
        num_negatives = require_whole("num_negatives", num_negatives, at_least=0)
        seed = require_seed("seed", seed)
        query_columns(self.queries, queries)
        relevance = self.relevance_of(documents, queries)
        judgements = Judgements.of(relevance, direction, each_copy=True).with_near_misses()
        return labeled_pairs(judgements, num_negatives, documents, seed)

    def labeled_lists(
        self,
        num_negatives: int = 4,
        *,
        direction: DirectionName = "text_to_image",
        documents: DocumentKind = "image",
        seed: int = 42,
        queries: QueryKind = "text",
    ) -> Dataset:
        """Rows for listwise losses: ``query, documents, labels``, one row per query (per page, for texts).

        A list holds everything that was judged relevant, with its score as label, then the negatives with 0. Under
        ``rows.with_format(None)`` the same rows hold the lists ``query_ids``, ``document_ids`` and ``labels``.

        Args:
            num_negatives: Negatives in a list.
            direction: As in ``labeled_pairs``.
            documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
            seed: Of the filling.
            queries: What a query is made of, likewise.

        Raises:
            ConfigError: An argument has a value it can't have.
            DatasetError: There are too few documents, or queries, to fill a list, or a query lacks what ``queries``
                says.
        """
        num_negatives = require_whole("num_negatives", num_negatives, at_least=0)
        seed = require_seed("seed", seed)
        query_columns(self.queries, queries)
        relevance = self.relevance_of(documents, queries)
        judgements = Judgements.of(relevance, direction, each_copy=True).with_near_misses()
        return labeled_lists(judgements, num_negatives, documents, seed)

    def audit(
        self,
        *,
        content: bool = False,
        against: Any = None,
        num_examples: int | None = 5,
        num_workers: int | None = None,
        show_progress_bar: bool = True,
        queries: QueryKind | None = None,
    ) -> AuditReport:
        """What is odd about the data: counts and examples of everything that can hurt training or scores.

        Args:
            content: Whether to decode every page, for near-copies, look-alikes, blank and damaged pages, and to read
                the texts, for queries that are short or copied from their page; with sizes and lengths. Of a page a
                thumbnail and a hash are kept, whatever their number. Minutes for 10,000 pages, where the tables alone
                take a second. Sounds are decoded from end to end, and of clips 16 frames: for silence, for frames that
                hardly differ, and for the same samples or frames in another file.
            against: Another dataset, such as the one to evaluate on, as a ``RetrievalDataset``, rows in a known layout,
                or what ``load`` takes. Documents here that answer a query there are found by their bytes and, with
                ``content=True``, as near-copies, and queries by their words.
            num_examples: Examples a finding at most; ``None`` lists all. Of what ``content`` and ``against`` find all
                are listed.
            num_workers: Threads that decode and compare pages; ``None`` is one for each core.
            show_progress_bar: Whether to show bars over the pages.
            queries: What a query is to be made of: those that lack a part are counted then, and queries are the same
                where all of it is. ``None`` compares everything that they have.

        Raises:
            ConfigError: An argument has a value it can't have.
            DatasetError: ``against`` can't be used as a dataset.
        """
        require_flag("content", content)
        require_flag("show_progress_bar", show_progress_bar)
        if num_examples is not None:
            num_examples = require_whole("num_examples", num_examples, at_least=0, or_else="None")
        if num_workers is not None:
            num_workers = require_whole("num_workers", num_workers, or_else="None")
        other = None
        if against is not None:
            from mmtune.data.intake import as_retrieval_dataset  # it stands on this module

            other = as_retrieval_dataset(against).relevance
        relevance = self.relevance if queries is None else self.relevance_of(self.relevance.documents, queries)
        if not content and other is None:
            return examine(relevance, num_examples=num_examples)
        found = look_into(
            relevance, other, content=content, num_workers=num_workers, show_progress_bar=show_progress_bar
        )
        return examine(relevance, num_examples=num_examples, content=found)

    def without(self, findings: Finding | Iterable[Finding]) -> "RetrievalDataset":
        """The dataset without what findings name; nothing else is touched. Its audit lists what went.

        ======================================================  ====================================================
        finding                                                 what goes
        ======================================================  ====================================================
        ``near_copies``                                         all documents of a group but the first, which takes
                                                                over their judgements and places among negatives
        ``blank_pages``, ``damaged_pages``, ``leaked_*`` ...    the documents, with judgements and places in lists
        ``short_queries``, ``copied_queries``,                  the queries
        ``leaked_queries``, ``incomplete_queries``
        ``find_false_negatives``, ``relevant_negatives_*``      the documents from these queries' lists
        ======================================================  ====================================================

        A query to which nothing is relevant any more goes too, and is counted. ``look_alikes`` are for a person to
        judge and are refused.

        Args:
            findings: A finding of ``audit``, or several: ``report["blank_pages"]``, what ``find_false_negatives``
                gives, or a finding with some of its examples, ``finding.only(finding.examples[:3])``.

        Raises:
            ConfigError: They are no findings, of a kind that is not taken out, or do not list all that they count.
            DatasetError: A finding is of another dataset, near-copies hold several texts a page, or no query is left.
        """
        return self.from_tables(take_out(self.relevance, findings))

    def select_queries(self, n_or_ids: int | Sequence[str]) -> "RetrievalDataset":
        """The dataset with some of its queries, in its order; the corpus stays.

        Args:
            n_or_ids: The first n queries, or the ids of those to keep.

        Raises:
            DatasetError: An id is of no query.
            ConfigError: ``n_or_ids`` is neither a list of ids nor a number of 1 or more, or the list is empty.
        """
        if is_whole(n_or_ids) or isinstance(n_or_ids, bool):
            self.relevance.require_queries()
            rows = np.arange(min(require_whole("n_or_ids", n_or_ids), len(self)))
        elif isinstance(n_or_ids, (str, bytes)) or not isinstance(n_or_ids, Iterable):
            raise ConfigError(
                f"n_or_ids={n_or_ids!r:.80}: expected a number of queries, or a list of their ids. Pass e.g. "
                f"{self.relevance.query_ids[:1].to_pylist()}."
            )
        else:
            rows = self.relevance.find_queries(n_or_ids)
        return self.from_tables(self.relevance.subset(rows, np.arange(len(self.corpus))))

    def deduplicate(self, *, documents: DocumentKind | None = None) -> "RetrievalDataset":
        """The dataset with one document for each page: the first of its byte-identical copies.

        Judgements and negatives follow. Of several scores for one page, the highest is kept.

        Args:
            documents: What a document is made of, and so which are the same: ``"text"`` keeps all texts of one page
                image, ``"text+image"`` asks for both parts to be equal. ``None`` is ``"image"`` where the corpus has
                images, so ``"audio"`` and ``"video"``; ``"mixed"`` where it has several of these, else ``"text"``.

        Raises:
            ConfigError: ``documents`` is unknown, or the corpus lacks a column of it.
        """
        relevance = self.relevance if documents is None else self.relevance_of(documents)
        return self.from_tables(merge_copies(relevance, relevance.page))

    def check_pages(self, *, documents: DocumentKind | None = None, show_progress_bar: bool = True) -> None:
        """Make sure that every page, and all that asks, can be decoded: images from their header and their end.

        Of sounds the first second is decoded, and of clips the first frame and the last.

        What is damaged in the middle of a JPEG is not found, neither here nor when it is read: its decoder goes on
        with grey or shifted blocks and reports nothing.

        Args:
            documents: What is looked at: with ``"mixed"`` what each document has. ``None`` is the image, sound or clip
                of every document where the corpus has one such column, and ``"mixed"`` where it has several.
            show_progress_bar: Whether to show bars.

        Raises:
            ConfigError: ``documents`` is unknown, or the corpus lacks a column of it.
            MediaDecodeError: A document is missing, damaged, or of another kind; the message names it, or the query. Of
                a page it is an ``ImageDecodeError``.
            MissingExtraError: A package that decodes sounds or clips is not installed.
        """
        kind = usual_kind(self.corpus) if documents is None else documents
        if "image" in document_columns(self.corpus, kind):
            check_pages(self.corpus, show_progress_bar=show_progress_bar, may_lack=kind == MIXED)
        check_recordings(recordings_of(self.corpus, kind), show_progress_bar=show_progress_bar)
        self.check_queries(show_progress_bar=show_progress_bar)

    def check_queries(self, *, show_progress_bar: bool = True) -> None:
        """Make sure that every image and every sound that asks can be decoded, as ``check_pages`` does for documents.

        Raises:
            MediaDecodeError: One is missing, damaged, or of another kind; the message names the query.
            MissingExtraError: A package that decodes sounds is not installed.
        """
        asking = as_documents(self.queries)
        if "image" in asking.column_names:
            pages = asking.select(np.flatnonzero(has_content(asking, "image")))
            check_pages(pages, show_progress_bar=show_progress_bar, id_class=QueryId)
        check_recordings(recordings_of(asking, MIXED, id_class=QueryId), show_progress_bar=show_progress_bar)

    def split(
        self,
        eval_queries: int,
        *,
        test_queries: int | None = None,
        seed: int = 42,
        group_column: str | None = None,
        stratify_column: str | None = None,
        together: Sequence[Sequence[str]] = (),
        queries: QueryKind | None = None,
        documents: DocumentKind | None = None,
    ) -> tuple["RetrievalDataset", ...]:
        """Two datasets ``(train, evaluation)`` such that no document relevant on one side is relevant on the other.

        Queries that share a relevant page, or that are the same, stay on one side. The evaluation corpus holds the
        relevant documents and the negatives of its queries. The training corpus holds everything but the documents
        that are relevant in evaluation: they are no training negatives either, and ``notes`` counts those taken out.
        Pages of files, as of PDFs, are split by file.

        Args:
            eval_queries: Queries for evaluation, at most; as many as the sharing of pages allows.
            test_queries: Queries for a third dataset, at most: ``(train, evaluation, test)``.
            seed: Of the draw.
            group_column: A column of the corpus, such as the PDF that a page is from: no group has relevant pages on
                both sides. ``None`` is ``"source"`` where the corpus has the columns ``source`` and ``page_number``,
                as ``from_pdfs`` makes them; otherwise, and with ``"document_id"``, the split is by page.
            stratify_column: A column of the queries, such as their language: each value has the same share of both
                sides, as nearly as what stays together allows.
            together: Lists of ids of documents that stay on one side, such as near-copies; also as negatives.
            queries: What a query is made of, which decides which are the same: pass what will be trained with. ``None``
                is everything that the queries have.
            documents: What a document is made of, likewise; ``None`` as in ``deduplicate``. Equal passages of a corpus
                that also has sounds are one with ``"mixed"``.

        Raises:
            DatasetError: The pages that queries share allow no split, there are no queries, a column is missing, or an
                id is of no document.
            ConfigError: ``eval_queries`` or ``test_queries`` is no positive whole number, ``seed`` none from 0 to
                2**32 - 1, or ``together`` holds no lists.

        Warns:
            UserWarning: Fewer queries are left to train on than to evaluate.
        """
        relevance = self.relevance_of(self.relevance.documents if documents is None else documents, queries)
        relevance.require_queries()
        for name, value in {"eval_queries": eval_queries, "test_queries": test_queries}.items():
            if isinstance(value, float) and 0 < value < 1:
                raise ConfigError(
                    f"{name}={value!r}: expected a number of queries, and no share of them. Of these "
                    f"{len(self)} that share is {name}={max(1, round(value * len(self)))}."
                )
        sizes = [require_whole("eval_queries", eval_queries)]
        if test_queries is not None:
            sizes.append(require_whole("test_queries", test_queries))
        sides = split_tables(
            relevance,
            sizes,
            seed=require_seed("seed", seed),
            group_column=group_column,
            stratify_column=stratify_column,
            together=together,
        )
        return tuple(map(self.from_tables, sides))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the dataset to a new folder, which ``load`` reads, on this machine or another.

        Images are stored as they are encoded. Pages of PDFs are stored as PNG, rendered at their ``max_pixels``: the
        folder needs neither the PDFs nor their passwords. Where the PDFs stay in place, ``from_pdfs`` is quicker and
        takes no space.

        A card, ``README.md``, says what it holds.

        Raises:
            DatasetError: The folder is not empty or can't be written to, or the file of a page is missing.
            ImageDecodeError: The PDF of a page has changed since the dataset was built.
            ConfigError: ``folder`` is no path.
        """
        files.save_tables(self.tables, folder, make_card(self.relevance, None, (), "all", name=str(folder)))

    def export(
        self,
        folder: str | os.PathLike[str],
        layout: ExportLayout = "beir",
        *,
        split: Split = "train",
        overwrite: bool = False,
        show_progress_bar: bool = True,
    ) -> Path:
        """Write the dataset to a folder of parquet files that other programs read, and ``load`` reads back.

        ===============  =============================================================================
        ``layout``       what is written
        ===============  =============================================================================
        ``"beir"``       ``corpus``, ``queries`` and ``qrels`` as in ViDoRe; all but ``label_changes``
        ``"id_rows"``    one row per page, ``id, query, image, negatives``
        ``"columns"``    one row per query and relevant page, ``query, image, negative_0, ...``
        ``"tevatron"``   ``corpus`` and ``queries`` with lists of ids, as in Tevatron
        ===============  =============================================================================

        Images are written as they are encoded, a few at a time. A card, ``README.md``, lets ``datasets.load_dataset``
        read the folder too. The folder gets its name when it is whole: what a killed process leaves beside it begins
        with a dot and ends in ``.partial``.

        Args:
            folder: A new or empty folder.
            layout: The layout.
            split: The split that the files are named after; ViDoRe and MTEB read ``"test"``.
            overwrite: Whether an export that the folder holds may be replaced; nothing else is deleted.
            show_progress_bar: Whether to show bars.

        Returns:
            The folder, as an absolute path.

        Raises:
            DatasetError: The folder holds something or can't be written to, the file of a page is missing, or the
                layout has no place for something that can't be left out, such as several relevant pages of a query in
                ``"id_rows"``.
            ConfigError: An argument has a value it can't have.

        Warns:
            UserWarning: What is left out, counted: scores, and in ``"columns"`` ids and pages that no row has.
        """
        return export_dataset(
            self.relevance, folder, layout, split=split, overwrite=overwrite, show_progress_bar=show_progress_bar
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: ExportLayout | None = None,
        split: Split = "train",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        show_progress_bar: bool = True,
    ) -> str:
        """Write the dataset to a repository of the Hub in one commit, with a card; ``load(repo_id)`` reads it back.

        What the repository holds under other splits stays, and so does what people wrote in its card. The card gives
        no licence: that is for who shares the pages.

        Args:
            repo_id: ``"user/name"``; it is made where it is not there.
            layout: As for ``export``. ``None`` is ``"id_rows"`` where nothing is lost by it, else ``"beir"``.
            split: The split to write, in the place of an older one of that name.
            private: Whether a new repository is private; ``None`` is the setting of the account.
            token: Of the Hub; ``None`` is the one that ``hf auth login`` stored.
            revision: A branch other than ``main``, which has to exist.
            show_progress_bar: Whether to show bars.

        Returns:
            The address of the repository.

        Raises:
            DatasetError: It could not be pushed, holds another layout, or see ``export``.
            ConfigError: An argument has a value it can't have.
        """
        return push_dataset(
            self.relevance,
            repo_id,
            layout=layout,
            split=split,
            private=private,
            token=token,
            revision=revision,
            show_progress_bar=show_progress_bar,
        )

    @property
    def label_changes(self) -> Dataset:
        """The negatives that ``judge_negatives`` took for something else, a row each.

        ===========  ==============  ====================================  ====================  =======
        query_id     document_id     label                                 rank                  score
        ===========  ==============  ====================================  ====================  =======
        ``"q1"``     ``"p7"``        ``"relevant"``, then it stands in     its place in the      that of
                                     the qrels, or ``"unknown"``, then     list that it was      the
                                     nothing uses it                       taken from, from 0    judge
        ===========  ==============  ====================================  ====================  =======
        """
        changes = label_changes(self.negatives)
        return table_dataset({name: changes[name].combine_chunks() for name in changes.column_names})

    def undo_label_changes(self) -> "RetrievalDataset":
        """The dataset with all ``label_changes`` put back: as negatives, in their places, and out of the qrels."""
        return self.from_tables(undo_label_changes(self.tables))

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        kinds = "+".join(name for name in MODALITIES if name in self.corpus.column_names)
        parts = [name for name in query_parts(self.queries) if has_content(self.queries, name).any()]
        asking = f" ({'+'.join(parts)})" if parts not in ([], ["text"]) else ""
        negatives = "none"
        if self.negatives is not None and len(self):
            lengths = self.relevance.listed_negatives.lengths
            negatives = f"{lengths.min()} to {lengths.max()} a query, {lengths.mean():.1f} on average"
        lines = [
            "RetrievalDataset",
            f"  corpus     {len(self.corpus):,} documents ({kinds})",
            f"  queries    {len(self):,}{asking}",
            f"  qrels      {len(self.qrels):,} judgements, {len(self.qrels) / max(1, len(self)):.1f} a query",
            f"  negatives  {negatives}",
        ]
        return "\n".join(lines)
