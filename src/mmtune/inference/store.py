"""What tells one model, document or text from another by content: keys of everything that is cached."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sentence_transformers
import torch
import transformers
import xxhash
from sentence_transformers.base.modules import Module
from transformers import PreTrainedModel

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_NOT_CONTENT = ("_name_or_path", "transformers_version")
_SETTINGS = ("prompts", "default_prompt_name", "truncate_dim", "max_seq_length")


def model_fingerprint(model: torch.nn.Module) -> str:
    """A digest of all that decides what a host model computes, wherever it was loaded from.

    That is weights with their types, modules and their settings (pixel limits among them), configurations, tokenizers
    and image processors, prompts, truncation, and the versions of the host and of transformers.

    Args:
        model: A ``SentenceTransformer``, ``MultiVectorEncoder`` or ``CrossEncoder``.

    Returns:
        32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128()
    for part in _settings(model):
        digest.update(_stable(part).encode())
    for name, values in sorted(model.state_dict().items()):
        if isinstance(values, torch.Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stable(value: Any) -> str:
    """A text of plain values, the same in every process: without addresses and the order of sets and keys."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_stable(key)}: {_stable(part)}' for key, part in value.items()))}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_stable, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_stable, value))}]"
    return _ADDRESS.sub("", repr(value))


def _settings(model: torch.nn.Module) -> Iterator[Any]:
    yield [sentence_transformers.__version__, transformers.__version__]
    yield [type(model).__module__, type(model).__qualname__, repr(model)]
    yield {name: getattr(model, name, None) for name in _SETTINGS}
    for module in model.modules():
        if isinstance(module, Module):
            yield module.get_config_dict()
        if isinstance(module, PreTrainedModel):
            yield {key: value for key, value in module.config.to_dict().items() if key not in _NOT_CONTENT}
        if getattr(module, "processor", None) is not None:
            yield from _processing(module.processor)


def _processing(processor: Any) -> Iterator[Any]:
    if hasattr(processor, "to_json_string"):
        yield {key: part for key, part in json.loads(processor.to_json_string()).items() if key not in _NOT_CONTENT}
    yield getattr(processor, "chat_template", None)
    tokenizer = getattr(processor, "tokenizer", processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield repr(tokenizer)
        return
    # Truncation and padding are set by each call, so they would differ before and after the first.
    yield {key: part for key, part in json.loads(backend.to_str()).items() if key not in ("truncation", "padding")}
    yield [tokenizer.model_max_length, tokenizer.padding_side, getattr(tokenizer, "chat_template", None)]
