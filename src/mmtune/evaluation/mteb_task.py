"""A dataset as a task of mteb, so that what runs there runs on private pages, too."""

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmtune.arguments import require_name, require_one_of
from mmtune.data.documents import DocumentKind, check_texts, document_columns
from mmtune.data.identity import document_digests, text_digest
from mmtune.data.images import decode_page
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.errors import ConfigError, MissingExtraError
from mmtune.models.checkpoints import first_line, how_to_install

if TYPE_CHECKING:
    from mteb.abstasks.retrieval import AbsTaskRetrieval

_CATEGORY: dict[DocumentKind, str] = {"image": "t2i", "text": "t2t", "text+image": "t2it"}
_SPLIT = "test"
_LANGUAGE = re.compile(r"[a-z]{3}-[A-Z][a-z]{3}")


def as_mteb_task(
    dataset: DatasetLike,
    *,
    name: str,
    documents: DocumentKind = "image",
    languages: Sequence[str] = ("eng-Latn",),
) -> "AbsTaskRetrieval":
    """A retrieval task for ``mteb.evaluate``, over documents that are decoded as they are encoded.

    Its ``ndcg_at_10`` is that of ``build_evaluator``, rounded by mteb to five digits, where no two documents have the
    same score: mteb ranks such ties by their ids. Queries are read as texts. Judgements stay graded, and byte-identical
    pages are one document. mteb takes a ``SentenceTransformer`` of your own for one that reads texts alone; the page on
    comparing models shows how to say otherwise.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes.
        name: Of the task, in mteb's results and its cache.
        documents: What a document is made of: ``"image"``, ``"text"`` or ``"text+image"``. mteb strips texts, and with
            ``"text+image"`` it writes every page decoded into the cache of ``datasets``.
        languages: Of the queries, as mteb names them: ISO 639-3 and the script.

    Returns:
        An ``AbsTaskRetrieval``. Its revision is a digest of the content, so that mteb's cache knows changed data.

    Raises:
        ConfigError: The corpus lacks what ``documents`` asks for, it is something else, or a name or language can't be.
        DatasetError: The data can't be read, its layout is unknown, or it has no queries, or one without a text.
        ImageDecodeError: The file of a page can't be read.
        MissingExtraError: mteb is not installed.

    Example:
        >>> from mmtune import as_mteb_task
        >>> from mmtune.testing import generated_pages
        >>> task = as_mteb_task(generated_pages(8), name="reports")  # doctest: +SKIP
        >>> mteb.evaluate(model, task, cache=None)  # doctest: +SKIP
    """
    require_name("name", name)
    _check_languages(languages)
    try:
        retrieval = importlib.import_module("mteb.abstasks.retrieval")
        metadata = importlib.import_module("mteb.abstasks.task_metadata")
    except ImportError as error:
        raise MissingExtraError(
            f"as_mteb_task needs mteb, which can't be imported: {first_line(error)} {how_to_install('mteb')}"
        ) from error
    require_one_of("documents", documents, tuple(_CATEGORY))
    data = as_retrieval_dataset(dataset)
    data.relevance_of(data.relevance.documents, "text").require_queries()
    check_texts(data.corpus, documents)
    if data.relevance_of(documents).num_copies:
        data = data.deduplicate(documents=documents)
    corpus = data.corpus.select_columns(["document_id", *document_columns(data.corpus, documents)])
    corpus = corpus.rename_column("document_id", "id")
    if "image" in corpus.column_names:
        corpus = corpus.with_transform(decode_batch)
    queries = data.queries.select_columns(["query_id", "text"]).rename_column("query_id", "id")
    judged = [data.qrels[column][:] for column in ("query_id", "document_id", "score")]
    digests = document_digests(data.corpus, documents, range(len(data.corpus)))

    class DatasetTask(retrieval.AbsTaskRetrieval):  # type: ignore[name-defined] - mteb is imported when it is asked for
        def load_data(self, *args: Any, **kwargs: Any) -> None:
            relevant: dict[str, dict[str, int]] = {}
            for query_id, document_id, score in zip(*judged, strict=True):
                relevant.setdefault(query_id, {})[document_id] = score
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {_SPLIT: split}}
            self.data_loaded = True

    DatasetTask.metadata = metadata.TaskMetadata(
        name=name,
        description=f"{len(queries)} queries over {len(corpus)} documents.",
        dataset={"path": name, "revision": text_digest(repr([digests, queries[:], judged]))},
        type="Retrieval",
        category=_CATEGORY[documents],
        modalities=["text"] if documents == "text" else ["text", "image"],
        eval_splits=[_SPLIT],
        eval_langs=list(languages),
        main_score="ndcg_at_10",
    )
    return DatasetTask()


def _check_languages(languages: object) -> None:
    is_list = isinstance(languages, Sequence) and not isinstance(languages, str) and len(languages) > 0
    if not is_list or not all(isinstance(each, str) and _LANGUAGE.fullmatch(each) for each in languages):  # type: ignore[union-attr]
        raise ConfigError(
            f"languages={languages!r:.80}: expected codes of ISO 639-3 with a script, in a list. Pass e.g. "
            "languages=['eng-Latn', 'fra-Latn']."
        )


def decode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows with the pixels of their pages in the place of what was encoded."""
    if "image" not in batch:
        return batch
    ids = batch.get("id") or [""] * len(batch["image"])
    pages = [decode_page(encoded, document_id) for encoded, document_id in zip(batch["image"], ids, strict=True)]
    return {**batch, "image": pages}
