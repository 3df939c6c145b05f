"""A small encoder for the queries of a model: a route of its own, beside documents that go the way they went."""

from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Normalize

from mmtune.errors import ConfigError
from mmtune.models.adapters import has_lora
from mmtune.models.loading import full_dimension
from mmtune.models.routers import Side, fit_text_encoder, take_with_text
from mmtune.models.routes import find_router, model_of, require_reloadable

QUERY_ROUTE = "small_query"


@dataclass(frozen=True)
class QueryRouted:
    """A model with a query encoder of its own.

    Attributes:
        model: Queries go to the small encoder, all else goes the way it went.
        student: The small encoder alone, which shares its weights with ``model``.
        notes: What was put together.
    """

    model: SentenceTransformer
    student: SentenceTransformer
    notes: tuple[str, ...]


def route_queries(teacher: SentenceTransformer, text_encoder: Side) -> QueryRouted:
    """Give the queries of a model an encoder of their own.

    The modules of the teacher become the route of documents as they are, and nothing is added after them: documents
    get the embeddings that they had, to the bit. The small encoder gets pooling where it has none, a projection where
    its size differs, and a normalisation if the teacher ends in one. Of a teacher that has a Router all routes stay.

    Args:
        teacher: The model whose documents stay; it is not changed, and its modules become part of the new model.
        text_encoder: A checkpoint's name or folder, or a list of host modules.

    Raises:
        ConfigError: The encoder can't embed texts, or the teacher can't be a route.
    """
    if has_lora(teacher):
        raise ConfigError(
            "The model has adapters, which Sentence Transformers can't save inside a Router. Call merge_lora(model)."
        )
    size = full_dimension(teacher)
    if size is None:
        raise ConfigError("The model does not say how large its embeddings are. Expected a model that embeds pages.")
    modules, router = list(teacher), find_router(teacher)
    rest = modules[1:] if router is not None else []
    if router is None:
        take_with_text(modules[0], ("image", "video"))
    if router is not None and not (modules[0] is router and all(isinstance(part, Normalize) for part in rest)):
        raise ConfigError(
            "The model has a Router with other layers around it, which would change the small encoder's embeddings "
            "too. Expected a Router that comes first, with a normalisation behind it at most."
        )
    encoder, notes = fit_text_encoder(text_encoder, size, str(teacher.device))
    own: list[Any] = list(encoder)
    if router is None and isinstance(modules[-1], Normalize):
        own.append(Normalize())
    mappings: dict[Any, str] = {("query", None): "document"} if router is None else dict(router.route_mappings)
    routes: dict[str, list[Any]] = {"document": modules}
    if router is not None:
        routes = {name: list(own_modules.children()) for name, own_modules in router.sub_modules.items()}
    routed = Router(
        {**routes, QUERY_ROUTE: own},
        default_route="document" if router is None else router.default_route,
        route_mappings={**mappings, ("query", "text"): QUERY_ROUTE},
        allow_empty_key=False,
    )
    kept: dict[str, Any] = {"truncate_dim": teacher.truncate_dim, "similarity_fn_name": teacher.similarity_fn_name}
    model = model_of([routed, *rest], teacher, **kept)
    require_reloadable(model)
    prompts = {name: text for name, text in model.prompts.items() if name != "query"}
    # an empty prompt keeps the default one of the teacher from the queries
    model.prompts = {**prompts, "query": encoder.prompts.get("query") or ""}
    student = model_of([*own, *rest], encoder)
    return QueryRouted(model, student, notes)
