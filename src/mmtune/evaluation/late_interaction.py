"""The evaluator for models of late interaction: token embeddings are scored a portion of documents at a time."""

from collections.abc import Generator
from typing import Any

from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from torch.nn.utils.rnn import pad_sequence

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.evaluation.corpus import CorpusEvaluator
from mmtune.inference.encoder import Retriever
from mmtune.inference.store import Embeddings


class LateInteractionEvaluator(CorpusEvaluator, MultiVectorInformationRetrievalEvaluator):
    """The host's ``MultiVectorInformationRetrievalEvaluator`` over documents that are read as they are encoded.

    Besides what ``CorpusEvaluator`` says, the token embeddings of a batch of documents are scored and let go before
    those of the next but one are made: 1,500 pages of 700 tokens would be half a gigabyte. Every query keeps its best
    hits. The arguments are those of ``CorpusEvaluator``.
    """

    model_class = MultiVectorEncoder

    def __init__(self, data: RetrievalDataset, documents: DocumentKind, **options: Any) -> None:
        super().__init__(data, documents, **options)
        self.corpus_chunk_size = self.batch_size
        self._portions: Generator[Embeddings, None, None] | None = None

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
            DatasetError: The model gives no finite numbers for an item; the message names it.
            ImageDecodeError: A page is no readable image; the message names the document.
        """
        encoder = self.require_kind(model)
        self.per_query = {}
        self._portions = self.encode_documents(model)
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
            # Padded once, as the host does it: the queries are compared with every portion.
            return pad_sequence(list(self.encode_queries(model)), batch_first=True)
        if self._portions is not None:
            return next(self._portions)
        return super().embed_inputs(model, sentences, encode_fn_name, *args, **kwargs)
