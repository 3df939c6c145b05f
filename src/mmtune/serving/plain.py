"""An embedding as its files state it, by transformers alone: what a server computes from the same folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoProcessor

POOLED = {"lasttoken", "cls", "mean", "max"}
KNOWN = {"Transformer", "Pooling", "Dense", "MultiVectorMask", "Normalize"}
KINDS = ("SentenceTransformer", "MultiVectorEncoder")


class PlainEncoder:
    """A saved embedding model, without the host.

    Args:
        folder: What ``save_pretrained`` of the host wrote.
        model: What ``AutoModel`` loads from there, where it is loaded already; ``None`` loads it.
    """

    def __init__(self, folder: Path, model: Any = None) -> None:
        self.folder = folder
        self.modules: list[tuple[str, str]] = [
            (entry["type"].rpartition(".")[2], entry["path"]) for entry in self._read("modules.json")
        ]
        self.settings = self._read("sentence_bert_config.json")
        self.prompts: dict[str, str] = self._read("config_sentence_transformers.json").get("prompts", {})
        self.model = AutoModel.from_pretrained(folder) if model is None else model
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.layers = [self._build(name, path) for name, path in self.modules[1:]]

    @classmethod
    def refuse(cls, folder: Path) -> str | None:
        """Why plain transformers can't run what lies in a folder, or ``None`` where it can."""
        path = folder / "modules.json"
        if not path.is_file():
            return "there is no modules.json"
        names = [entry["type"].rpartition(".")[2] for entry in json.loads(path.read_text("utf-8"))]
        other = [name for name in names if name not in KNOWN]
        if names[:1] != ["Transformer"] or other:
            return f"it has {' and '.join(other or names[:1])}, which only Sentence Transformers computes"
        read: Any = json.loads((folder / "config_sentence_transformers.json").read_text("utf-8"))
        if read.get("model_type", KINDS[0]) not in KINDS:
            return f"it is a {read['model_type']}"
        settings = json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))
        if settings.get("transformer_task") != "feature-extraction" or "modality_config" not in settings:
            return "its files do not say how texts and pages are read"
        masks = [json.loads(path.read_text("utf-8")) for path in folder.glob("*_MultiVectorMask/config.json")]
        chosen = [each.get(name) for each in masks for name in ("skiplist_words", "keep_only_token_ids")]
        if any([*chosen, *map(settings.get, ("query_expansion", "query_length", "document_length"))]):
            return "it leaves tokens out or adds some, which only Sentence Transformers does"
        for pooling in folder.glob("*_Pooling/config.json"):
            found = json.loads(pooling.read_text("utf-8"))
            if found.get("pooling_mode") not in POOLED or not found.get("include_prompt", True):
                return f"{pooling.parent.name} pools in a way of Sentence Transformers' own"
        return None

    def encode(self, items: Sequence[Any], prompt: str) -> torch.Tensor:
        """The vector of each item, or of each of its tokens, float32 on the CPU; one item a forward pass."""
        with torch.inference_mode():
            return torch.cat([torch.atleast_2d(self._embed(item, prompt).float().cpu()) for item in items])

    def _embed(self, item: Any, prompt: str) -> torch.Tensor:
        named = item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item}
        modalities: dict[str, Any] = self.settings["modality_config"]
        kind = "message" if "message" in modalities else "+".join(named)
        inputs = self._chat(named, prompt) if kind == "message" else self._process(named, prompt)
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        dtype = self.model.dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        output = getattr(self.model, modalities[kind]["method"])(**inputs)
        vectors = output[modalities[kind]["method_output_name"]][0]
        for layer in self.layers:
            vectors = layer(vectors)
        return vectors

    def _chat(self, named: dict[str, Any], prompt: str) -> dict[str, Any]:
        arguments = dict(self.settings.get("processing_kwargs", {}))
        messages = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        messages += [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in named.items()]}]
        options = {
            name: value for name, value in arguments.get("chat_template", {}).items() if name != "restore_suffix"
        }
        text = self.processor.apply_chat_template(messages, tokenize=False, **options)
        images = [value for kind, value in named.items() if kind == "image"]
        given = {"images": images, **arguments.get("image", {})} if images else {}
        if not images:
            given = {"truncation": True}
        text_options = {**arguments.get("text", {})}
        return dict(self.processor(text=[text], return_tensors="pt", **given, **text_options))

    def _process(self, named: dict[str, Any], prompt: str) -> dict[str, Any]:
        (kind, value), arguments = next(iter(named.items())), self.settings.get("processing_kwargs", {})
        if kind == "text":
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            text_options = {"truncation": True, **arguments.get("text", {})}
            return dict(tokenizer([f"{prompt}{value}"], return_tensors="pt", **text_options))
        image_processor = getattr(self.processor, "image_processor", self.processor)
        return dict(image_processor(images=[value], return_tensors="pt", **arguments.get("image", {})))

    def _build(self, name: str, path: str) -> Any:
        if name == "Normalize":
            return lambda vector: nn.functional.normalize(vector, dim=-1)
        if name == "MultiVectorMask":
            return lambda vectors: vectors
        config = self._read("config.json", path)
        if name == "Pooling":
            mode = config["pooling_mode"]
            pools = {"lasttoken": lambda v: v[-1], "cls": lambda v: v[0], "max": lambda v: v.max(dim=0).values}
            return pools.get(mode, lambda tokens: tokens.mean(dim=0))
        weights = load_file(self.folder / path / "model.safetensors", device=str(self.model.device))
        activation = getattr(nn, config["activation_function"].rpartition(".")[2])()
        weight, bias = weights["linear.weight"], weights.get("linear.bias")
        return lambda vector: activation(nn.functional.linear(vector.to(weight.dtype), weight, bias))

    def _read(self, name: str, path: str = "") -> Any:
        return json.loads((self.folder / path / name).read_text("utf-8"))
