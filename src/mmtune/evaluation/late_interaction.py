"""The evaluator for models of late interaction: token embeddings are scored a portion of documents at a time."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator

from mmtune.data.documents import DocumentReader
from mmtune.evaluation.corpus import CorpusEvaluator, Retriever


class LateInteractionEvaluator(CorpusEvaluator, MultiVectorInformationRetrievalEvaluator):
    """The host's ``MultiVectorInformationRetrievalEvaluator`` over documents that are read as they are encoded.

    Besides what ``CorpusEvaluator`` says, the token embeddings of a batch of documents are scored and let go before
    those of the next but one are made: 1,500 pages of 700 tokens would be half a gigabyte. Every query keeps its best
    hits.

    Args:
        reader: Gives the documents by id.
        document_ids: The corpus.
        text_by_query_id: The queries.
        score_by_document_id: For each query id its relevant documents with scores of 1 and above.
        **options: ``name``, ``ndcg_at_k``, ``batch_size`` and ``show_progress_bar``, as for ``CorpusEvaluator``.
    """

    model_class = MultiVectorEncoder

    def __init__(
        self,
        reader: DocumentReader,
        document_ids: Sequence[str],
        text_by_query_id: Mapping[str, str],
        score_by_document_id: Mapping[str, Mapping[str, int]],
        **options: Any,
    ) -> None:
        super().__init__(reader, document_ids, text_by_query_id, score_by_document_id, **options)
        self.corpus_chunk_size = self.batch_size
        self._portions: Generator[list[Any], None, None] | None = None

    def __call__(
        self,
        model: Retriever,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, float]:
        """The metrics of ``model``, with the host's keys, such as ``vdr_maxsim_ndcg@10``.

        Raises:
            ConfigError: The model gives one vector a document.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        encoder = self.checked_model(model)
        self.per_query = {}
        self._portions = self._documents()
        try:
            return super().__call__(encoder, output_path, epoch, steps, *args, **kwargs)
        finally:
            self._portions.close()
            self._portions = None

    def embed_inputs(
        self, model: Any, sentences: Any, encode_fn_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Token embeddings of the queries, or of the next portion of the corpus, which the host asks for in order."""
        if encode_fn_name == "query":
            sentences = self._query_inputs()
        elif self._portions is not None:
            sentences = next(self._portions)
        return super().embed_inputs(model, sentences, encode_fn_name, *args, **kwargs)
