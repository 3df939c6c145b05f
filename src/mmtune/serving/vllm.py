"""What vLLM reads of a folder, each fact with the file that it was read from; nothing here was run in a server."""

from dataclasses import dataclass
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from torch import nn

from mmtune.arguments import listed
from mmtune.errors import ConfigError
from mmtune.models.kinds import HostModel
from mmtune.models.routes import find_router

VERSION = "0.33.0"
"""The version whose source was read."""

LEAST_VERSION = "0.30.0"
"""The first that reads the class paths of sentence-transformers 6 and their compact form of pooling."""

MODELS = "vllm/model_executor/models"

PROMISES = {
    "modules, pooling and normalisation are read from the files": "vllm/transformers_utils/config.py",
    "dimensions in a request needs matryoshka_dimensions in config.json": "vllm/config/model.py",
    "messages get the chat template, input gets none": "vllm/entrypoints/pooling/embed/protocol.py",
}
RERANKER_PROMISES = {
    "score.weight is the row that scores, sentence_transformers.activation_fn what follows": f"{MODELS}/adapters.py",
    "the template gets the roles query and document, texts as content": "vllm/entrypoints/pooling/scoring/utils.py",
}


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
    elif encoder.transformer_task != "feature-extraction":
        raise ConfigError(
            f"The encoder has the task {encoder.transformer_task!r} and ends in a head of its own. Expected "
            "'feature-extraction', as load_model and build_late_interaction give it."
        )
    if isinstance(model, MultiVectorEncoder):
        _require_plain_mask(model)
    return family


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
