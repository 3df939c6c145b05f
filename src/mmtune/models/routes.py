"""The routes of a Router: whether they agree, which column takes which, and one of them as a model of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.util import batch_to_device
from torch import nn

from mmtune.arguments import MIXED, MODALITIES, MediaLimits, require_type
from mmtune.errors import ConfigError
from mmtune.models.adapters import encoders_of, is_quantized
from mmtune.models.checkpoints import SAMPLES, first_line
from mmtune.models.fresh import TOKENS
from mmtune.models.kinds import HostModel, require_model
from mmtune.models.recordings import media_limits_of, sample_clip, sample_sound
from mmtune.models.towers import freeze_unused


def router_mapping(columns: Sequence[str]) -> dict[str, str]:
    """The task of each column, as the host's training arguments take it for a model with a Router.

    Args:
        columns: The columns of the training rows, the query first.

    Returns:
        ``"query"`` for the first column, ``"document"`` for the others. It fits every Router that tells queries from
        documents, or texts from images; ``check_routes`` finds out about others.

    Example:
        >>> router_mapping(["query", "image", "negative_0"])
        {'query': 'query', 'image': 'document', 'negative_0': 'document'}
    """
    return {name: "document" if position else "query" for position, name in enumerate(columns)}


def find_router(model: HostModel) -> Router | None:
    """The Router among a model's modules, or ``None``."""
    return next((module for module in model.children() if isinstance(module, Router)), None)


def check_routes(model: HostModel, documents: str = "image", queries: str = "text") -> None:
    """Prove by a forward pass that queries and documents go through a Router and end in the same dimension.

    ``model.supports`` can't tell: it also says yes to inputs that no single route takes (sentence-transformers 6.2).
    A model without a Router passes. Nothing is changed, and no random number drawn.

    Args:
        model: Any host model.
        documents: ``"image"``, ``"text"``, ``"text+image"``, ``"audio"`` ...; of ``"mixed"`` all that the model takes.
        queries: Likewise.

    Raises:
        ConfigError: One of them has no route, or its route can't take it, or the dimensions differ; the message says
            which routes there are and what each takes.
    """
    require_model(model)
    require_type("documents", documents, str, expected="a kind of document, such as 'image'")
    router = find_router(model)
    if router is None:
        return
    require_reloadable(model)
    sizes = {}
    for task, kind in _ways(model, documents, queries):
        what = f"{kind} queries" if task == "query" else f"{kind} documents"
        try:
            sizes[what] = output_of(model, sample_of(kind, model, task), task=task)["sentence_embedding"].shape[-1]
        except Exception as error:  # processors and encoders refuse in every way
            raise ConfigError(
                f"The Router can't embed {what}: {type(error).__name__}: {first_line(error)} {describe_routes(router)} "
                f"Expected a route for task {task!r} that takes {kind.replace('+', ' with ')}. Add one, or train on "
                f"documents and queries that a route takes."
            ) from error
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{what} in {size}" for what, size in sizes.items())
        raise ConfigError(
            f"The routes end in different dimensions: {found}. {describe_routes(router)} Expected one dimension. End "
            f"the routes in Dense layers onto the same size, as compose_router does."
        )


def require_reloadable(model: HostModel) -> None:
    """Make sure that the host can load a Router again: it leaves all but the encoders in float32.

    Raises:
        ConfigError: The Router is in half precision, and a route has weights after its encoder.
    """
    half_types = (torch.float16, torch.bfloat16)
    router = find_router(model)
    for name, modules in router.sub_modules.items() if router is not None else ():
        weights = [weight for module in list(modules.children())[1:] for weight in module.parameters()]
        half = [weight.dtype for weight in modules.parameters() if weight.dtype in half_types]
        if weights and half:
            raise ConfigError(
                f"The route {name!r} has layers after its encoder and is in {str(half[0]).removeprefix('torch.')}: "
                "Sentence Transformers loads such a Router with layers in float32, which then fails (6.2). Load or "
                'compose it with dtype="float32"; training computes in bfloat16 on a GPU all the same.'
            )


def unify_dtypes(model: HostModel) -> None:
    """Bring the layers of each route of a Router to the dtype of its encoder, as the host does outside of Routers."""
    router = find_router(model)
    for modules in router.sub_modules.values() if router is not None else ():
        encoder, *layers = modules.children()
        first = next(encoder.parameters(), None)
        if first is not None and first.is_floating_point():
            for layer in layers:
                layer.to(first.dtype)


def freeze_unreached(model: HostModel, documents: str = "image", queries: str = "text") -> None:
    """Freeze what no query and no document reaches: it could not learn, and torchrun would wait for it.

    Such are CLIP's ``logit_scale``, the bias of SigLIP, the layers of LLaVA's image encoder behind the one that is
    read, and the towers of a Router that no route uses. A forward pass with gradients tells, of a query and of a
    document, or of a pair for a reranker; only what it ends in is taken for trained on, so a loss that reads a
    parameter of the model besides must unfreeze it.

    Args:
        model: Any host model that ``check_routes`` has passed. One with quantised weights, which learn nothing, stays
            as it is.
        documents: As in ``check_routes``; for rerankers of sounds and clips nothing is known to be out of reach.
        queries: Likewise.
    """
    if any(map(is_quantized, encoders_of(model))):
        return
    if isinstance(model, CrossEncoder):
        if not {*documents.split("+"), *queries.split("+")} <= SAMPLES.keys():
            return
        pair = (sample_of(queries), sample_of(documents))
        reached = [output_of(model, pair, gradients=True)["scores"]]
    else:
        output = TOKENS if isinstance(model, MultiVectorEncoder) else "sentence_embedding"
        ways = _ways(model, documents, queries)
        reached = [
            output_of(model, sample_of(kind, model, task), gradients=True, task=task)[output] for task, kind in ways
        ]
    # an expert that these samples are not sent to may get others
    experts = [weight for name, weight in model.named_parameters() if ".experts." in name and weight.requires_grad]
    freeze_unused(model, reached)
    for weight in experts:
        weight.requires_grad_(True)


def ignores_prompt(model: HostModel, kind: str) -> bool:
    """Whether the prompt of queries of a kind changes nothing of what a model is given.

    The host leaves it out without a word where an input is no text and goes through no chat template
    (sentence-transformers 6.2), as in CLIP and in the image route of most Routers.

    Args:
        model: Any host model.
        kind: What a query is made of.
    """
    prompt = model.prompts.get("query") or model.prompts.get(model.default_prompt_name or "")
    if not prompt:
        return False
    sample = sample_of(kind, model, "query")
    plain, prompted = (dict(model.preprocess([sample], prompt=each, task="query")) for each in (None, prompt))
    return plain.keys() == prompted.keys() and all(
        torch.equal(value, prompted[name]) for name, value in plain.items() if isinstance(value, torch.Tensor)
    )


def extract_route(model: SentenceTransformer, route: str = "text") -> SentenceTransformer:
    """One route of a Router as a model of its own, for example for a server that only embeds queries.

    Args:
        model: A model with a Router, trained or not.
        route: The name of the route.

    Returns:
        A model of the route's modules and those around the Router, with the prompts, in evaluation mode. It shares its
        weights with ``model`` until it is saved.

    Raises:
        ConfigError: The model is no ``SentenceTransformer``, has no Router, or its Router no such route.

    Example:
        >>> queries = extract_route(model, "text")  # doctest: +SKIP
        >>> queries.save_pretrained("query-server")  # doctest: +SKIP
    """
    require_model(model, SentenceTransformer)
    router = find_router(model)
    if router is None:
        names = ", ".join(type(module).__name__ for module in model.children())
        raise ConfigError(f"The model has no Router, only {names}. Expected one, as compose_router makes it.")
    if route not in list(router.sub_modules):
        raise ConfigError(f"The Router has no route {route!r}. {describe_routes(router)} Name one of these.")
    modules: list[Any] = []
    for module in model.children():
        modules += router.sub_modules[route].children() if module is router else [module]
    kept = {"similarity_fn_name": model.similarity_fn_name, "truncate_dim": model.truncate_dim}
    return model_of(modules, model, **kept)


def model_of(modules: Sequence[nn.Module], like: SentenceTransformer, **kwargs: Any) -> SentenceTransformer:
    """A model of these modules with the prompts of another, on its device, in evaluation mode."""
    model = SentenceTransformer(
        modules=list(modules),
        device=str(like.device),
        prompts={name: prompt for name, prompt in like.prompts.items() if prompt},
        default_prompt_name=like.default_prompt_name,
        **kwargs,
    )
    # the host looks on the Hub for a model that is called like a folder
    model.model_card_data.local_files_only = like.model_card_data.local_files_only
    return model.eval()


def describe_routes(router: Router) -> str:
    """What a Router's routes take and the size that each ends in, as one sentence."""
    routes = []
    for route, modules in router.sub_modules.items():
        layers: list[Any] = list(modules.children())
        modalities = getattr(layers[0], "modalities", ["text"])
        names = [name if isinstance(name, str) else "+".join(sorted(name, reverse=True)) for name in modalities]
        sizes = [layer.get_embedding_dimension() for layer in layers if hasattr(layer, "get_embedding_dimension")]
        size = f"{sizes[-1]} dimensions" if sizes and sizes[-1] else "dimension unknown"
        routes.append(f"{route!r} (takes {', '.join(name for name in names if name != 'message')}; {size})")
    return f"The routes are {', '.join(routes)}."


def output_of(model: HostModel, sample: Any, *, gradients: bool = False, **kwargs: Any) -> dict[str, Any]:
    """The features that a model gives for one input, in evaluation mode; the mode is restored.

    ``kwargs`` are for ``model.preprocess``, such as ``task``; ``gradients`` keeps the graph of gradients.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            return model(batch_to_device(dict(model.preprocess([sample], **kwargs)), model.device))
    finally:
        for module in in_training:
            module.training = True


def encoder_for(model: HostModel, part: str, kind: str, task: str) -> Transformer | None:
    """The encoder that reads a part of inputs, in the order in which the host's Router looks for a route.

    Args:
        model: Any host model.
        part: Such as ``"audio"``.
        kind: What an input is made of, such as ``"text+audio"``.
        task: ``"query"`` or ``"document"``.
    """
    router, readers = find_router(model), encoders_of(model)
    if router is not None:
        parts = tuple(sorted(kind.split("+")))
        modality = parts if len(parts) > 1 else kind
        keys = ((task, modality), (task, None), (None, modality), (None, None))
        routes = {name: name for name in router.sub_modules} | dict(router.route_mappings)
        name = next((routes[key] for key in (*keys, task, modality) if key in routes), router.default_route)
        readers = encoders_of(router.sub_modules[name]) if name else []
    return next((encoder for encoder in readers if part in encoder.modalities), None)


def sample_of(kind: str, model: HostModel | None = None, task: str = "document") -> Any:
    """A short text for ``"text"``, a small blank page for ``"image"``, a dictionary of both for ``"text+image"``.

    A sound and a clip are such as the encoder of ``model`` reads that takes them, as ``task`` says.
    """
    chosen: dict[str, Any] = {}
    for part in kind.split("+"):
        reader = None if model is None else encoder_for(model, part, kind, task)
        limits = media_limits_of(reader, part) if reader is not None else MediaLimits()
        makers = {"audio": sample_sound, "video": sample_clip}
        chosen[part] = makers[part](limits) if part in makers else SAMPLES[part]
    return chosen if len(chosen) > 1 or kind not in SAMPLES else chosen[kind]


def _ways(model: HostModel, documents: str, queries: str) -> list[tuple[str, str]]:
    """What a model will be given, as task and kind."""
    return [("query", queries), *(("document", kind) for kind in kinds_of(model, documents))]


def kinds_of(model: HostModel, documents: str) -> list[str]:
    """The kinds of documents that a model will be given: one, or of mixed ones all that it takes alone."""
    return [name for name in MODALITIES if model.supports(name)] if documents == MIXED else [documents]
