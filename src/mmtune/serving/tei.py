"""What text-embeddings-inference (TEI) reads of a folder, each fact with its file in the source; none was run."""

import json
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from mmtune.arguments import listed
from mmtune.errors import ConfigError
from mmtune.models.kinds import HostModel
from mmtune.models.routes import find_router
from mmtune.serving.vllm import require_modules

VERSION = "1.9.3"
"""The version whose source was read."""

LEAST_VERSION = "1.8.3"
"""The first that was seen to read Dense layers of a local folder; 1.8.0 does not."""

FAMILIES = ("bert", "camembert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
"""Text encoders whose weights it finds under the names that the host saves, by ``model_type``."""

OLD_PATH = "sentence_transformers.models"
ACTIVATIONS = (nn.Identity, nn.Tanh)
OLD_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}

PROMISES = {
    "weights are found under their names": "backends/candle/src/models",
    f"Dense layers are found by the class path {OLD_PATH}.Dense alone": "backends/src/lib.rs",
    "a Dense layer ends in the identity or a tanh": "backends/candle/src/models/dense.rs",
    "pooling is read from 1_Pooling/config.json, in its old form": "router/src/lib.rs",
    "max_seq_length must stand in sentence_bert_config.json": "router/src/lib.rs",
    "prompt_name, normalize (on where it is left out) and dimensions in a request": "router/src/http/types.rs",
}


def require_text_encoder(model: HostModel) -> None:
    """Make sure that TEI can serve a model.

    Raises:
        ConfigError: It can't: the message says why and what to do.
    """
    router = find_router(model)
    if router is not None:
        routes: dict[str, Any] = dict(router.sub_modules.items())
        name = next((name for name, route in routes.items() if _is_text_encoder(route[0])), "text")
        raise ConfigError(
            f"The model is a Router ({listed(list(routes))}), and no server runs one. Expected one text "
            f"encoder. Export its route alone: export_model(extract_route(model, {name!r}), folder, target='tei')."
        )
    if not isinstance(model, SentenceTransformer) or not _is_text_encoder(model[0]):
        kind = getattr(getattr(model[0], "config", None), "model_type", type(model[0]).__name__)
        raise ConfigError(
            f"The model is a {type(model).__name__} of the type {kind!r}, and TEI {VERSION} embeds texts, by "
            f"{listed(list(FAMILIES))}. Export it for vLLM (target='vllm'), or serve it from Sentence Transformers."
        )
    require_modules(model, "TEI", ACTIVATIONS)


def _is_text_encoder(module: nn.Module) -> bool:
    return (
        isinstance(module, Transformer) and module.config.model_type in FAMILIES and set(module.modalities) == {"text"}
    )


def rewrite_for_tei(model: SentenceTransformer, folder: Path) -> None:
    """Bring a folder of the host into the form that TEI reads; the host reads this form, too."""
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    for entry in modules:
        name = entry["type"].rpartition(".")[2]
        entry["type"] = f"{OLD_PATH}.{name}"
        if name == "Pooling":
            _rewrite(folder / entry["path"] / "config.json", _old_pooling)
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", "utf-8")
    _rewrite(folder / "sentence_bert_config.json", lambda config: {**config, "max_seq_length": model.max_seq_length})


def _old_pooling(config: dict[str, Any]) -> dict[str, Any]:
    flags = {f"pooling_mode_{name}": mode == config["pooling_mode"] for mode, name in OLD_POOLING.items()}
    return {"word_embedding_dimension": config["embedding_dimension"], **flags}


def _rewrite(path: Path, change: Any) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8"))), indent=2) + "\n", "utf-8")
