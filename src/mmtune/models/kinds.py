"""The kinds of models that the host has for retrieval."""

from typing import TypeAlias, TypeVar

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer

HostModel: TypeAlias = SentenceTransformer | MultiVectorEncoder | CrossEncoder
"""An embedding model, one of late interaction, or a reranker."""

SameModel = TypeVar("SameModel", bound=HostModel)
"""The kind that was given, where a function returns the same."""
