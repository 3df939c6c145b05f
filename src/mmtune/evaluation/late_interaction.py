"""The evaluator for models of late interaction: token embeddings are scored a portion of documents at a time."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder.evaluation import MultiVectorInformationRetrievalEvaluator
from torch.nn.utils.rnn import pad_sequence

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.evaluation.base import CorpusEvaluator
from mmtune.inference.encoder import Retriever

_PORTION_BYTES = 64 * 2**20


class LateInteractionEvaluator(CorpusEvaluator, MultiVectorInformationRetrievalEvaluator):
    """The host's ``MultiVectorInformationRetrievalEvaluator`` over documents that are read as they are encoded.

    Besides what ``CorpusEvaluator`` says, token embeddings are scored and let go in portions of 64 MB, or of one batch
    where that is more: 1,500 pages of 700 tokens would be half a gigabyte. Every query keeps its best hits. The
    arguments are those of ``CorpusEvaluator``.
    """

    model_class = MultiVectorEncoder

    def __init__(self, data: RetrievalDataset, documents: DocumentKind, **options: Any) -> None:
        super().__init__(data, documents, **options)
        self._embeddings: Iterator[torch.Tensor] | None = None

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
        self.per_query, self.top_ids = {}, {}
        portions = self.encode_documents(encoder)
        first = next(portions)
        # The host scores a chunk at a time; many small ones take far longer.
        document_bytes = sum(item.nbytes for item in first) / len(first)
        self.corpus_chunk_size = max(self.batch_size, int(_PORTION_BYTES / max(document_bytes, 1)))
        self._embeddings = chain(iter(first), chain.from_iterable(portions))
        del first
        try:
            metrics = super().__call__(encoder, output_path, epoch, steps, *args, **kwargs)
            return metrics | self.measure_kinds(encoder)
        finally:
            self._embeddings = None
            portions.close()

    def embed_inputs(
        self, model: Any, sentences: Any, encode_fn_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Token embeddings of the queries, or of the next portion of the corpus, which the host asks for in order."""
        if encode_fn_name == "query":
            # Padded once, as the host does it: the queries are compared with every portion.
            return pad_sequence(list(self.encode_queries(model)), batch_first=True)
        if self._embeddings is not None:
            return list(islice(self._embeddings, len(sentences)))
        return super().embed_inputs(model, sentences, encode_fn_name, *args, **kwargs)
