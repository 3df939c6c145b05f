"""What vLLM reads of a folder, each fact with the file that it was read from.

Beside reading, a folder of each family was run through the model classes, the pooling and the parsing of requests of
vLLM 0.33.0, on a CPU and with the attention of plain torch (``benchmarks/vllm_classes.py``). No server was run.
"""

from dataclasses import dataclass
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from mmtune.arguments import listed
from mmtune.errors import ConfigError
from mmtune.models.kinds import HostModel
from mmtune.models.routes import find_router

VERSION = "0.33.0"
"""The version whose source was read."""

LEAST_VERSION = "0.30.0"
"""The first that reads the class paths of sentence-transformers 6 and their form of pooling; 0.29.0 does not."""

NEEDS = "transformers 5.16.1 to 5.20 and torch 2.14"
"""As the wheel of ``VERSION`` asks."""

MODELS, POOLING = "vllm/model_executor/models", "vllm/entrypoints/pooling"

PROMISES = {
    "the class paths of modules, pooling (cls, last token, mean) and Normalize are read from the files": (
        "vllm/transformers_utils/config.py"
    ),
    "Dense layers come after pooling, before truncation and normalisation": f"{MODELS}/adapters.py",
    "dimensions in a request needs matryoshka_dimensions in config.json": "vllm/pooling_params.py",
    "messages get the chat template, input gets none": f"{POOLING}/embed/protocol.py",
    "texts are cut where the request has truncate_prompt_tokens": f"{POOLING}/base/protocol.py",
}
LATE_PROMISES = {
    "/pooling answers the one task that the server was started for": f"{POOLING}/pooling/serving.py",
}
RERANKER_PROMISES = {
    "an architecture ...ForSequenceClassification is made of the one for generation": f"{MODELS}/registry.py",
    "score.weight is the row that scores": f"{MODELS}/adapters.py",
    "sentence_transformers.activation_fn is what follows": "vllm/model_executor/layers/pooler/activations.py",
    "the template gets the roles query and document, texts as content": f"{POOLING}/scoring/io_processor.py",
    "of a document with both, pages stand before the text": "vllm/renderers/chat_utils/chat_message.py",
}

ORDER = ("Transformer", "Pooling", "Dense", "MultiVectorMask", "Normalize")
"""The modules that vLLM computes, in the only order that it knows."""
POOLED = ("cls", "lasttoken", "mean")
ACTIVATIONS = (nn.Identity, nn.Tanh, nn.Sigmoid, nn.ReLU, nn.SiLU, nn.GELU)


@dataclass(frozen=True)
class Family:
    """What vLLM wants of the checkpoints of one model type.

    Attributes:
        embeds: The architecture of one that embeds; ``""`` is the one that the host saves.
        scores: The architecture of a reranker; ``""`` where vLLM has none whose form was read.
        prefix: What stands before the name of each weight of the bare encoder, as the host saves it.
        file: Where names and weights are mapped.
    """

    embeds: str
    scores: str
    prefix: str
    file: str


FAMILIES = {
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration", "Qwen3VLForSequenceClassification", "model.", f"{MODELS}/qwen3_vl.py"
    ),
    "clip": Family("", "", "", f"{MODELS}/clip.py"),
    "bert": Family("", "", "", f"{MODELS}/bert.py"),
}
"""By ``model_type``. The others are left out because nobody has read how vLLM maps them."""


def family_of(model: HostModel) -> Family:
    """The family of a model that vLLM can serve.

    Raises:
        ConfigError: It can't, or nobody has read whether it can: the message says why and what to do.
    """
    router = find_router(model)
    if router is not None:
        routes = list(router.sub_modules)
        raise ConfigError(
            f"The model is a Router ({listed(routes)}), and no server runs one. Expected one encoder. Export each "
            f"route alone: export_model(extract_route(model, {routes[0]!r}), folder)."
        )
    encoder = model[0]
    if not isinstance(encoder, Transformer):
        raise ConfigError(f"The model begins with a {type(encoder).__name__}. Expected an encoder of transformers.")
    model_type = str(encoder.config.model_type)
    family = FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(
            f"How vLLM reads checkpoints of the type {model_type!r} is not known here; known are "
            f"{listed(list(FAMILIES))}. Serve it from Sentence Transformers, or try its folder in vLLM and look with "
            "check_serving."
        )
    if isinstance(model, CrossEncoder):
        if not family.scores:
            raise ConfigError(
                f"The model is a reranker of the type {model_type!r}, whose form for vLLM is not known here. Expected "
                "one from build_reranker on Qwen3-VL."
            )
        score_row(model)
    else:
        if encoder.transformer_task != "feature-extraction":
            raise ConfigError(
                f"The encoder has the task {encoder.transformer_task!r} and ends in a head of its own. Expected "
                "'feature-extraction', as load_model and build_late_interaction give it."
            )
        require_modules(model, "vLLM", ACTIVATIONS)
    if model_type == "clip" and encoder.config.projection_dim < encoder.config.text_config.hidden_size:
        raise ConfigError(
            f"The embeddings of this CLIP have {encoder.config.projection_dim} numbers and its text encoder has "
            f"{encoder.config.text_config.hidden_size}: vLLM {VERSION} ends at its start where they are fewer "
            f"({family.file}). Serve it from Sentence Transformers."
        )
    if isinstance(model, MultiVectorEncoder):
        _require_plain_mask(model)
    return family


def require_modules(model: HostModel, server: str, activations: tuple[type[nn.Module], ...]) -> None:
    """Make sure that a server computes each module of an embedding model: what it does not know it leaves out.

    Args:
        model: An embedding model.
        server: Its name, for the error.
        activations: What may follow a Dense layer there.

    Raises:
        ConfigError: A module, its order, its pooling or its activation is unknown there.
    """
    names = [type(module).__name__ for module in model]
    places = [ORDER.index(name) if name in ORDER else -1 for name in names]
    if -1 in places or places != sorted(places):
        raise ConfigError(
            f"The model computes {listed(names)}, and {server} knows {listed(list(ORDER))} in this order: what else "
            "there is would be left out without an error. Serve it from Sentence Transformers."
        )
    for module in model:
        if isinstance(module, Pooling) and (module.pooling_mode not in POOLED or not module.include_prompt):
            raise ConfigError(
                f"The model pools by {module.pooling_mode!r}, include_prompt={module.include_prompt}, and {server} "
                f"knows {listed(list(POOLED))} over all tokens. Train with one of these, or serve it from Sentence "
                "Transformers."
            )
        if isinstance(module, Dense) and type(module.activation_function) not in activations:
            known = listed([each.__name__ for each in activations])
            raise ConfigError(
                f"A Dense layer ends in {module.activation_function}, and {server} knows {known}. Train with one of "
                "these, or serve it from Sentence Transformers."
            )


def score_row(model: CrossEncoder) -> nn.Parameter:
    """The one row that scores a pair, shape ``(1, hidden)``: the Dense head's, or that of true minus that of false.

    Raises:
        ConfigError: The head is another one.
    """
    encoder: Any = model[0]
    head: Any = model[-1]
    if isinstance(head, LogitScore) and head.false_token_id is not None:
        rows = encoder.model.get_output_embeddings().weight
        difference = rows[head.true_token_id].float() - rows[head.false_token_id].float()
        return nn.Parameter(difference.detach().unsqueeze(0), requires_grad=False)
    is_row = isinstance(head, Dense) and head.linear.out_features == 1 and head.linear.bias is None
    if is_row and isinstance(head.activation_function, nn.Identity):
        return head.linear.weight
    raise ConfigError(
        f"The head {head} is none that vLLM can score with. Expected one row without bias and activation, or "
        "LogitScore with two tokens, as build_reranker makes them."
    )


def _require_plain_mask(model: MultiVectorEncoder) -> None:
    """VLLM returns a vector for each token, so a mask that leaves tokens out would be lost."""
    masks = [module for module in model if type(module).__name__ == "MultiVectorMask"]
    chosen = {name: getattr(mask, name, None) for mask in masks for name in ("skiplist_words", "keep_only_token_ids")}
    chosen["query_expansion"] = getattr(model[0], "query_expansion", None)
    given = {name: value for name, value in chosen.items() if value}
    if given:
        raise ConfigError(
            f"{', '.join(given)} leaves tokens out or adds some, and vLLM knows nothing of it: it returns a vector for "
            "each token. Train without, or serve from Sentence Transformers."
        )
