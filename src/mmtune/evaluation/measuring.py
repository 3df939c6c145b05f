"""What is measured of a model on a dataset, once: kept by the content of both, so that it is never measured again."""

import dataclasses
import gc
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.util import get_device_name

from mmtune.arguments import require_path, shown
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.identity import document_digests, text_digest
from mmtune.data.judgements import CandidateList
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.pipeline import measure_queries, open_retriever
from mmtune.evaluation.retrieval import build_evaluator
from mmtune.inference.encoder import DatasetReader, Retriever, require_retriever
from mmtune.inference.reranker import PairScorer, require_reranker
from mmtune.inference.shards import find_stored
from mmtune.inference.store import model_fingerprint, write_whole, writing_to
from mmtune.models.fingerprints import fingerprint_checkpoint
from mmtune.models.kinds import HostModel
from mmtune.models.loading import check_documents
from mmtune.models.opening import OWN_ARGUMENTS, LoadOptions, open_checkpoint
from mmtune.models.rerankers import build_reranker, is_reranker
from mmtune.models.routes import find_router

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["retriever", "late interaction", "Router", "pipeline"]
"""What finds the documents: one vector each, a vector a token, two encoders, or a retriever with a reranker."""

ModelSource: TypeAlias = HostModel | str | os.PathLike[str] | Callable[[], HostModel]
"""A model that is built, a checkpoint, or a function that loads one when its turn comes."""

AT_K = 10
MOST_RERANKED = 100
"""What an evaluator keeps of a ranking."""

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes:
        kind: What finds the documents.
        similarity: How it compares, e.g. ``"cosine"``; ``"rerank"`` for a pipeline.
        parameters: How many weights it has.
        page_s: Seconds to read and encode a document; NaN where it was encoded before.
        query_s: Seconds to encode a query, and to rerank what was found for it.
        dimensions: Sizes of a vector, the full one first.
        vectors_per_document: 1, or the mean number of token vectors.
        values: nDCG@10 of each query by its id, for each of ``dimensions``.
        top_ids: The best documents of each query at full size, best first; empty for a pipeline.
    """

    kind: Kind
    similarity: str
    parameters: int
    page_s: float
    query_s: float
    dimensions: tuple[int, ...]
    vectors_per_document: float
    values: tuple[Mapping[str, float], ...]
    top_ids: Mapping[str, list[str]]

    @classmethod
    def from_json(cls, content: str) -> "Measurement":
        """What ``to_json`` wrote.

        Raises:
            ValueError, KeyError, TypeError: It is something else.
        """
        found = json.loads(content)
        if found.pop("format_version") != _FORMAT_VERSION or found["kind"] not in get_args(Kind):
            raise ValueError("it is of another version")
        found |= {name: tuple(found[name]) for name in ("dimensions", "values")}
        return cls(**found)

    def to_json(self) -> str:
        """It as a text."""
        return json.dumps({"format_version": _FORMAT_VERSION, **dataclasses.asdict(self)})


class MeasurementStore:
    """Measurements by key, in memory and, where there is a folder, in files that are written whole.

    Args:
        folder: A folder that several processes and datasets may share; ``None`` keeps nothing beyond this object.

    Raises:
        ConfigError: It is no path, or can't be written to.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None
        self._known: dict[str, Measurement] = {}
        if folder is not None:
            require_path("store", folder)
            self.folder = Path(folder)
            with writing_to(self.folder):
                write_whole(self.folder / "mmtune_measurements", Path.touch)

    def load(self, key: str) -> Measurement | None:
        """The measurement under a key; ``None`` where there is none."""
        if key in self._known or self.folder is None:
            return self._known.get(key)
        path = self.folder / f"{key}.json"
        try:
            self._known[key] = Measurement.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("The measurement in %s can't be read (%s): the model is measured again.", path, error)
        return self._known.get(key)

    def save(self, key: str, measurement: Measurement) -> None:
        """Keep a measurement. Where its file can't be written a warning says so, and the work is not lost for this."""
        self._known[key] = measurement
        if self.folder is None:
            return
        try:
            with writing_to(self.folder):
                content = measurement.to_json()
                write_whole(self.folder / f"{key}.json", lambda path: path.write_text(content, encoding="utf-8"))
        except ConfigError as error:
            logger.warning("A measurement is not stored: %s", error)


@dataclass(frozen=True)
class Bench:
    """A dataset on which models are measured alike.

    Attributes:
        data: One document for each content; what can be checked without a model has been.
        documents: What a document is made of.
        queries: What a query is made of.
        truncate_dims: Sizes to measure besides the full one, where a model has as many.
        depth: How many documents a reranker gets for a query, 100 at most.
        batch_size: Texts, documents or pairs a forward pass.
        show_progress_bar: Whether to show bars.
        load_kwargs: How checkpoints are loaded, as ``load_model`` takes it.
        store: Where measurements are kept.
        embeddings: Folders of ``encode_corpus``; a model whose documents are in one encodes none.
    """

    data: RetrievalDataset
    documents: DocumentKind
    queries: QueryKind
    truncate_dims: tuple[int, ...]
    depth: int
    batch_size: int
    show_progress_bar: bool
    load_kwargs: Mapping[str, Any]
    store: MeasurementStore
    embeddings: tuple[str | os.PathLike[str], ...] = ()
    options: LoadOptions = field(init=False)

    def __post_init__(self) -> None:
        own = {name: value for name, value in self.load_kwargs.items() if name in OWN_ARGUMENTS}
        rest = {name: value for name, value in self.load_kwargs.items() if name not in OWN_ARGUMENTS}
        object.__setattr__(self, "options", LoadOptions(**own, host_kwargs=rest))

    def measure(self, retriever: ModelSource, reranker: ModelSource | None = None) -> Measurement:
        """What a retriever finds, or a retriever and a reranker together; what is stored is not measured again.

        The retriever is let go before the reranker is loaded.
        """
        # without its time to encode a document, what is measured on stored ones is kept apart
        settings: tuple[object, ...] = ("retriever", self.truncate_dims, *("stored",) * bool(self.embeddings))
        key, found = self._measure(retriever, self._open_retriever, self._evaluate, settings)
        if reranker is None:
            return found
        how = ("reranker", key, self.depth)
        return self._measure(reranker, self._open_reranker, lambda model: self._rerank(found, model), how)[1]

    def _measure(
        self,
        source: ModelSource,
        open_model: Callable[[ModelSource], Any],
        measure: Callable[[Any], Measurement],
        settings: tuple[object, ...],
    ) -> tuple[str, Measurement]:
        """The measurement of one model with its key, from the store if it is there."""
        key = self._key_before_loading(source, settings)
        found = self.store.load(key) if key else None
        if key is None or found is None:
            model = open_model(source)
            # what compares them is no part of what embeddings are known by, and decides what is found
            compared = getattr(model, "similarity_fn_name", None)
            key = key or self._key(f"{model_fingerprint(model)} {compared}", model.device, settings)
            found = self.store.load(key) or measure(model)
            self.store.save(key, found)
            if not isinstance(source, torch.nn.Module):
                del model
                free_memory()
        return key, found

    def _key_before_loading(self, source: ModelSource, settings: tuple[object, ...]) -> str | None:
        """The key of a model by what it is known by already; ``None`` for what must be loaded first."""
        is_path = isinstance(source, (str, os.PathLike))
        if self.store.folder is None:  # nothing outlives the call
            return repr((os.fspath(source) if is_path else id(source), settings))
        found = fingerprint_checkpoint(open_checkpoint(os.fspath(source), self.options)) if is_path else None
        how = sorted((name, repr(value)) for name, value in self.load_kwargs.items())
        return None if found is None else self._key(found, self.options.device or get_device_name(), (*settings, how))

    def _key(self, fingerprint: str, device: torch.device | str, settings: tuple[object, ...]) -> str:
        device = torch.device(device)
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return text_digest(
            repr([fingerprint, machine, self.documents, self.queries, self.batch_size, self._content, settings])
        )

    @cached_property
    def _content(self) -> str:
        """A digest of the documents, queries and judgements."""
        parts: list[Any] = document_digests(self.data.corpus, self.documents, range(len(self.data.corpus)))
        parts += self._reader.digests("query", self.data.queries["query_id"][:])
        tables = (self.data.corpus, ("document_id",)), (self.data.queries, ("query_id",))
        for table, names in (*tables, (self.data.qrels, ("query_id", "document_id", "score"))):
            parts += [table[name][:] for name in names]
        return text_digest(repr(parts))

    @cached_property
    def _reader(self) -> DatasetReader:
        return DatasetReader(self.data.corpus, self.data.queries, self.documents, self.queries)

    def _open_retriever(self, source: ModelSource) -> Retriever:
        if isinstance(source, (str, os.PathLike)):
            if is_reranker(open_checkpoint(os.fspath(source), self.options)):
                raise ConfigError(f"{os.fspath(source)!r} is a reranker. {_PAIR_IT}")
            return open_retriever(source, self.documents, self.options)
        model: Any = source if isinstance(source, torch.nn.Module) else source()  # type: ignore[operator] - checked
        if isinstance(model, CrossEncoder):
            raise ConfigError(f"It is a reranker, a {type(model).__name__}. {_PAIR_IT}")
        require_retriever(model, "model", "compare_models({name: model}, dataset)")
        return model

    def _evaluate(self, model: Retriever) -> Measurement:
        check_documents(model, self.documents, self.queries)
        is_late = isinstance(model, MultiVectorEncoder)
        full = model.get_embedding_dimension()
        dims = () if is_late else [dim for dim in self.truncate_dims if full is None or dim < full]
        evaluator: Any = build_evaluator(  # of one dataset
            self.data,
            model=model,
            truncate_dims=dims,
            documents=self.documents,
            queries=self.queries,
            ndcg_at_k=(AT_K,),
            batch_size=self.batch_size,
            show_progress_bar=self.show_progress_bar,
        )
        evaluator.stored = find_stored(self.embeddings, model, self.documents)
        evaluator(model)
        parts = [evaluator, *(() if is_late else evaluator.truncations)]
        cost = evaluator.cost
        return Measurement(
            kind="late interaction" if is_late else "Router" if find_router(model) is not None else "retriever",
            similarity=str(model.similarity_fn_name),
            parameters=_count_parameters(model),
            page_s=math.nan if evaluator.stored else cost.documents_s / len(self.data.corpus),
            query_s=cost.queries_s / len(self.data),
            dimensions=(cost.dimension, *(part.truncate_dim for part in parts[1:])),
            vectors_per_document=cost.num_numbers / cost.dimension / len(self.data.corpus),
            values=tuple(evaluator.per_query[part.metric_name(model)] for part in parts),
            top_ids={query_id: ids[:MOST_RERANKED] for query_id, ids in evaluator.top_ids.items()},
        )

    def _open_reranker(self, source: ModelSource) -> CrossEncoder:
        if isinstance(source, (str, os.PathLike)):
            return build_reranker(os.fspath(source), **self.load_kwargs)
        model: Any = source if isinstance(source, torch.nn.Module) else source()  # type: ignore[operator] - checked
        require_reranker(model, "reranker", "A pair is (retriever, reranker).")
        return model

    def _rerank(self, first: Measurement, model: CrossEncoder) -> Measurement:
        ranked = self._ranked_lists(first.top_ids)
        shallow = [
            dataclasses.replace(each, candidate_ids=each.candidate_ids[: self.depth], gains=each.gains[: self.depth])
            for each in ranked
        ]
        started = time.perf_counter()
        scores = PairScorer(model, self._reader, self.batch_size, self.show_progress_bar).score_lists(shallow)
        seconds = time.perf_counter() - started
        values = measure_queries(ranked, scores, [self.depth], AT_K)[f"ndcg@{AT_K}_after@{self.depth}"]
        return dataclasses.replace(
            first,
            kind="pipeline",
            similarity="rerank",
            parameters=first.parameters + _count_parameters(model),
            query_s=first.query_s + seconds / len(ranked),
            dimensions=first.dimensions[:1],
            values=(values,),
            top_ids={},
        )

    def _ranked_lists(self, top_ids: Mapping[str, list[str]]) -> list[CandidateList]:
        """What a retriever found, with what each is worth."""
        judged: dict[str, dict[str, int]] = {}
        columns = (self.data.qrels[name][:] for name in ("query_id", "document_id", "score"))
        for query_id, document_id, score in zip(*columns, strict=True):
            judged.setdefault(query_id, {})[document_id] = score
        return [
            CandidateList(
                query_id,
                tuple(ids),
                tuple(judged[query_id].get(document_id, 0) for document_id in ids),
                tuple(judged[query_id].values()),
            )
            for query_id, ids in top_ids.items()
        ]


_PAIR_IT = "It sorts what a retriever finds: give the pair, as in {'both': (retriever, reranker)}."


def check_source(name: str, source: object) -> None:
    """Make sure that something is a model, a checkpoint's name, or a function that loads one.

    Raises:
        ConfigError: It is something else.
    """
    is_path = isinstance(source, (str, os.PathLike)) and bool(os.fspath(source))
    if not is_path and (not callable(source) or isinstance(source, type)):
        raise ConfigError(
            f"The model {name!r} is {shown(source)}. Expected a model, the path or Hub name of a checkpoint, a "
            "function that loads one, or a pair (retriever, reranker) of these. Pass one."
        )


def free_memory() -> None:
    """Give back what models took that nobody holds any more: they refer to themselves in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
