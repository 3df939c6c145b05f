"""The kinds of models that the host has for retrieval."""

from typing import TypeAlias, TypeVar

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.model import BaseModel

from mmtune.errors import ConfigError

HostModel: TypeAlias = SentenceTransformer | MultiVectorEncoder | CrossEncoder
"""An embedding model, one of late interaction, or a reranker."""

SameModel = TypeVar("SameModel", bound=HostModel)
"""The kind that was given, where a function returns the same."""


def require_model(model: object, kind: type[BaseModel] = BaseModel) -> None:
    """Make sure that ``model`` is a model of the host, of this kind.

    Raises:
        ConfigError: It is something else, such as a checkpoint's name, or of another kind.
    """
    if not isinstance(model, kind):
        expected = "a model of sentence-transformers" if kind is BaseModel else f"a {kind.__name__}"
        raise ConfigError(
            f"Expected {expected}, got {model!r:.80}, a {type(model).__name__}. Load one with load_model."
        )
