"""A folder that a server reads: adapters merged, weights and sizes under the names that it knows."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder, SentenceTransformer

from mmtune.arguments import require_one_of, require_path
from mmtune.errors import ConfigError
from mmtune.evaluation.pipeline import open_retriever
from mmtune.inference.store import writing_to
from mmtune.models.adapters import has_lora, merged_copy
from mmtune.models.kinds import HostModel, require_model
from mmtune.models.opening import open_checkpoint
from mmtune.models.rerankers import build_reranker, is_reranker
from mmtune.serving.gates import require_adapters
from mmtune.serving.instructions import describe_serving, describe_tei, write_readme
from mmtune.serving.tei import require_text_encoder, rewrite_for_tei
from mmtune.serving.templates import TEMPLATE_FILE, reranker_template
from mmtune.serving.vllm import Family, family_of, score_row

TARGETS = ("vllm", "tei")
LM_HEAD, SCORE = "lm_head.", "score.weight"

HOST_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""What makes a folder one of the host; a reranker's folder is for servers only."""


def export_model(model: HostModel | str | os.PathLike[str], folder: str | Path, *, target: str = "vllm") -> Path:
    """Write a model in the form that a server reads, with what to start and what to ask.

    Beside the weights stand ``serve.json`` (command line, overrides, template, prompts, ``truncate_dim``, least
    version, and the file of the server's source behind each promise) and ``README.md`` with a request in curl and in
    Python. The forms were read from the source and compared in plain transformers; they were not run in a server.

    An embedding model and one of late interaction load in the host from the same folder. A reranker, whatever its head,
    becomes one row that scores, which only servers read. TEI serves text encoders: a model of texts alone, or the query
    encoder of ``distill_query_encoder`` by its route.

    Args:
        model: A trained model, which stays as it is, or its folder. Adapters are merged in a copy on the CPU.
        folder: Where it goes: a new or empty folder.
        target: The server: ``"vllm"``, or ``"tei"`` for text-embeddings-inference.

    Returns:
        The folder.

    Raises:
        ConfigError: No server runs such a model (a Router: export each route), or nobody has read whether one does; its
            adapters change nothing, or lie beside quantised weights; the folder is not empty or can't be written.

    Example:
        >>> export_model(result.model, "to-serve")  # doctest: +SKIP
    """
    require_one_of("target", target, TARGETS)
    require_path("folder", folder)
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(f"folder={str(folder)!r} is not empty. Expected a new or empty folder. Pass another.")
    if isinstance(model, (str, os.PathLike)):
        model = _open(os.fspath(model))
    require_model(model)
    if target == "tei":
        require_text_encoder(model)
    family = family_of(model) if target == "vllm" else None
    if has_lora(model):
        require_adapters(model, "the model that is exported")
        model = cast(HostModel, merged_copy(model))
    with writing_to(path.parent), TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        written = Path(scratch) / "folder"
        model.save_pretrained(str(written), create_model_card=False)
        if family is None:
            text_encoder = cast(SentenceTransformer, model)
            rewrite_for_tei(text_encoder, written)
            serving = describe_tei(text_encoder)
        else:
            _rewrite_for_vllm(model, written, family)
            serving = describe_serving(model, family)
        (written / "serve.json").write_text(json.dumps(serving, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (written / "README.md").write_text(write_readme(serving), "utf-8")
        if path.is_dir():
            path.rmdir()
        written.rename(path)  # whole or not at all
    return path


def _open(name: str) -> HostModel:
    """A model of any kind from its folder, as ``finetune`` leaves it."""
    if is_reranker(open_checkpoint(name)):
        return build_reranker(name, device="cpu")
    return open_retriever(name, "text")


def _rewrite_for_vllm(model: HostModel, folder: Path, family: Family) -> None:
    """Bring a folder of the host into the form that vLLM reads."""
    _edit_json(folder / "processor_config.json", _with_own_pixels(model))
    is_bare = not any(name.startswith(family.prefix) for name in _weight_names(folder))
    if family.prefix and is_bare:
        _rename_weights(folder, lambda name: f"{family.prefix}{name}")
    if isinstance(model, CrossEncoder):
        _make_classifier(model, folder, family)
        return
    truncate_dim = getattr(model, "truncate_dim", None)

    def describe(config: dict[str, Any]) -> None:
        if family.embeds:
            config["architectures"] = [family.embeds]
        if truncate_dim:
            config["is_matryoshka"], config["matryoshka_dimensions"] = True, [truncate_dim]

    _edit_json(folder / "config.json", describe)


def _make_classifier(model: CrossEncoder, folder: Path, family: Family) -> None:
    """Turn the folder of a reranker into one for sequence classification with a single label."""
    row = score_row(model).detach().cpu().contiguous()
    files = sorted(set(_weight_names(folder).values()))
    for name in files:
        kept = {key: tensor for key, tensor in _read_tensors(folder / name).items() if not key.startswith(LM_HEAD)}
        save_file({**kept, **({SCORE: row} if name == files[0] else {})}, folder / name, metadata={"format": "pt"})

    def list_row(content: dict[str, Any]) -> None:
        kept = {key: name for key, name in content["weight_map"].items() if not key.startswith(LM_HEAD)}
        content["weight_map"] = {**kept, SCORE: files[0]}

    _edit_json(folder / "model.safetensors.index.json", list_row)

    def describe(config: dict[str, Any]) -> None:
        config["architectures"], config["num_labels"] = [family.scores], 1
        config["text_config"]["num_labels"] = 1
        activation = type(model.activation_fn)
        config["sentence_transformers"] = {"activation_fn": f"{activation.__module__}.{activation.__qualname__}"}

    _edit_json(folder / "config.json", describe)
    (folder / TEMPLATE_FILE).write_text(reranker_template(model), "utf-8")
    for path in [folder / name for name in HOST_FILES]:
        path.unlink(missing_ok=True)
    for path in filter(Path.is_dir, folder.glob("[0-9]*_*")):
        shutil.rmtree(path)


def _with_own_pixels(model: HostModel) -> Callable[[dict[str, Any]], None]:
    """Servers know nothing of ``processing_kwargs``: what the model sees must stand in the processor's own file."""
    encoder: Any = model[0]
    arguments: Mapping[str, Any] = encoder.processing_kwargs.get("image", {})

    def describe(config: dict[str, Any]) -> None:
        config["image_processor"] = {**config.get("image_processor", {}), **arguments}

    return describe if arguments else lambda _: None


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    if path.is_file():
        content = json.loads(path.read_text("utf-8"))
        edit(content)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _weight_names(folder: Path) -> dict[str, str]:
    """The file of each weight by its name."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), path.name)
    return found


def _rename_weights(folder: Path, rename: Callable[[str], str]) -> None:
    """Give each weight another name, a file at a time."""
    for path in sorted(folder.glob("model*.safetensors")):
        save_file(
            {rename(name): tensor for name, tensor in _read_tensors(path).items()}, path, metadata={"format": "pt"}
        )

    def renamed(content: dict[str, Any]) -> None:
        content["weight_map"] = {rename(name): file for name, file in content["weight_map"].items()}

    _edit_json(folder / "model.safetensors.index.json", renamed)


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118 - no mapping
