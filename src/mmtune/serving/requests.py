"""Asking a server for embeddings and scores, in the words of vLLM and of text-embeddings-inference (TEI)."""

import base64
import io
import json
import math
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from sentence_transformers import CrossEncoder, MultiVectorEncoder

from mmtune.arguments import shown
from mmtune.errors import ConfigError, MmtuneError
from mmtune.inference.encoder import Task, portions_of
from mmtune.models.kinds import HostModel

Api: TypeAlias = Literal["openai", "pooling", "rerank", "tei"]

EMBEDDINGS, POOLING, RERANK, TEI_EMBED, TEI_RERANK = "/v1/embeddings", "/pooling", "/v1/rerank", "/embed", "/rerank"
TIMEOUT_S = 120.0
TEXTS_A_REQUEST = 32
"""The largest batch of TEI by default."""


@dataclass(frozen=True)
class Endpoint:
    """A running server.

    Attributes:
        url: Where it is, with or without ``/v1``.

    Raises:
        ConfigError: This is no URL.
    """

    url: str

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not re.match(r"https?://[^/\s]+", self.url):
            raise ConfigError(f"url={shown(self.url)}: expected that of a server, such as 'http://localhost:8000'.")
        bare = re.sub(rf"({EMBEDDINGS}|{POOLING}|{RERANK}|{TEI_EMBED}|{TEI_RERANK}|/v1)?/*$", "", self.url.strip())
        object.__setattr__(self, "url", bare)

    @cached_property
    def model_name(self) -> str:
        """What the server calls its model; ``"model"`` where it does not tell."""
        try:
            return str(self._ask("/v1/models", None)["data"][0]["id"])
        except (MmtuneError, LookupError, TypeError):
            return "model"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers.

        Raises:
            MmtuneError: It can't be reached, refuses, or answers something else.
        """
        return self._ask(path, body)

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        where = f"{self.url}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(where, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise MmtuneError(
                f"{where} answered {error.code}: {said!r}. Check the URL, and that the server was started for this "
                "kind of model (vllm serve --runner pooling), or pass another api."
            ) from error
        except (OSError, ValueError) as error:
            raise MmtuneError(
                f"{where} gave no answer in JSON: {type(error).__name__}: {error}. Start the server, and check the URL."
            ) from error


def speaks_in_messages(model: HostModel) -> bool:
    """Whether the host puts everything into a chat template."""
    return "message" in getattr(model[0], "modality_config", {})


def chat_arguments(model: HostModel) -> dict[str, Any]:
    """What a request must say about the chat template, as the model was trained with it."""
    if not speaks_in_messages(model):
        return {}
    encoder: Any = model[0]
    given = dict(encoder.processing_kwargs.get("chat_template", {}))
    own = {"add_generation_prompt": bool(given.pop("add_generation_prompt", False))}
    given.pop("restore_suffix", None)  # of the host's own
    return {**own, **({"chat_template_kwargs": given} if given else {})}


def prompt_of(model: HostModel, task: Task) -> str:
    """What the host puts before an item of this kind."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    prompts = model.prompts or {}
    name = next((name for name in names if name in prompts), model.default_prompt_name)
    return prompts.get(name or "", "") or ""


def embedding_request(model: HostModel, name: str, task: Task, item: Any) -> dict[str, Any]:
    """The body of a request for the embedding of one item: a text, an image, or a dictionary of both."""
    prompt, parts = prompt_of(model, task), _parts(item)
    body: dict[str, Any] = {"model": name, "encoding_format": "float"}
    if isinstance(model, MultiVectorEncoder):
        body = {"model": name, "task": "token_embed"}
    if dim := getattr(model, "truncate_dim", None):
        body["dimensions"] = dim
    if speaks_in_messages(model):
        system = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        return {**body, "messages": [*system, {"role": "user", "content": parts}], **chat_arguments(model)}
    if is_text(item):
        return {**body, "input": f"{prompt}{parts[0]['text']}"}
    return {**body, "messages": [{"role": "user", "content": parts}]}


def tei_request(model: HostModel, items: Sequence[Any]) -> dict[str, Any]:
    """The body of a request to ``/embed`` of TEI for the embeddings of texts, as queries."""
    return {"inputs": list(items), **({"dimensions": dim} if (dim := getattr(model, "truncate_dim", None)) else {})}


def is_text(item: Any) -> bool:
    """Whether an item is a text and nothing else, as the host takes it."""
    return isinstance(item, str) or (isinstance(item, dict) and item.keys() == {"text"})


def ask_embeddings(
    endpoint: Endpoint, api: Api, model: HostModel, task: Task, items: Sequence[Any]
) -> list[torch.Tensor]:
    """What a server gives for each item, float32: shape ``(dim,)``, or ``(tokens, dim)`` for late interaction.

    Texts without a chat template go together, anything else one by one. Vectors are taken in the order in which they
    come, as most clients do.

    Raises:
        MmtuneError: The server gives no answer, too few vectors, or something else.
    """
    given: list[Any] = []
    together = not speaks_in_messages(model) and all(map(is_text, items))
    path = {"openai": EMBEDDINGS, "pooling": POOLING, "tei": TEI_EMBED}[api]
    for portion in portions_of(items, TEXTS_A_REQUEST if together else 1):
        bodies = [embedding_request(model, endpoint.model_name, task, item) for item in portion]
        body = {**bodies[0], "input": [each["input"] for each in bodies]} if together else bodies[0]
        answer = endpoint.post(path, tei_request(model, body["input"]) if api == "tei" else body)
        given += _vectors(answer, len(portion), f"{endpoint.url}{path}")
    return given


def ask_scores(endpoint: Endpoint, api: Api, query: Any, documents: Sequence[Any]) -> torch.Tensor:
    """What a server scores each document with for a query, float32, in the order of the documents.

    Raises:
        MmtuneError: The server gives no answer, or not a score for each.
    """
    answer: Any
    if api == "tei":
        texts = [_parts(each)[0]["text"] for each in documents]
        body: dict[str, Any] = {"query": _parts(query)[0]["text"], "texts": texts, "raw_scores": True}
        answer, path, key = endpoint.post(TEI_RERANK, body), TEI_RERANK, "score"
    else:
        body = {"model": endpoint.model_name, "query": _content(query), "documents": [_content(d) for d in documents]}
        path, key = RERANK, "relevance_score"
        answer = endpoint.post(path, body)
        answer = answer.get("results") if isinstance(answer, dict) else None
    try:
        score_by_row = {int(each["index"]): float(each[key]) for each in answer}
        scores = torch.tensor([score_by_row[row] for row in range(len(documents))])
    except (LookupError, TypeError, ValueError) as error:
        raise MmtuneError(
            f"{endpoint.url}{path} answered {str(answer)[:80]!r}. Expected an index and a {key} for each of "
            f"{len(documents)} documents. Pass another api, or start the server for a reranker."
        ) from error
    _require_finite([scores], f"{endpoint.url}{path}")
    return scores


def _vectors(answer: Any, count: int, where: str) -> list[torch.Tensor]:
    """The vectors of an answer of any of the servers."""
    rows: Any = answer.get("data") if isinstance(answer, dict) else answer
    try:
        rows = [row.get("embedding", row.get("data")) if isinstance(row, dict) else row for row in rows]
        vectors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    except (TypeError, ValueError, AttributeError):
        vectors = []
    if len(vectors) != count or not all(vector.ndim in (1, 2) and vector.numel() for vector in vectors):
        raise MmtuneError(
            f"{where} answered {str(answer)[:80]!r} with {len(vectors)} vectors. Expected {count}. Pass another api, "
            "or start the server for embeddings."
        )
    _require_finite(vectors, where)
    return vectors


def _require_finite(answers: Sequence[torch.Tensor], where: str) -> None:
    if not all(math.isfinite(float(answer.sum())) for answer in answers):
        raise MmtuneError(f"{where} answered with numbers that are not finite. Start the server with another --dtype.")


def _content(item: Any) -> Any:
    return _parts(item)[0]["text"] if is_text(item) else {"content": _parts(item)}


def _parts(item: Any) -> list[dict[str, Any]]:
    """An item as parts of a message, in the order of its keys, which decides what the model sees."""
    named = item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item}
    return [_part(kind, value) for kind, value in named.items()]


def _part(kind: str, value: Any) -> dict[str, Any]:
    if kind == "text":
        return {"type": "text", "text": value}
    file = io.BytesIO()
    image: Image.Image = value
    image.convert("RGB").save(file, "PNG")  # without loss, so that the server sees what the model sees
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def kind_of_api(model: HostModel) -> Api:
    """The API that fits a kind of model."""
    if isinstance(model, CrossEncoder):
        return "rerank"
    return "pooling" if isinstance(model, MultiVectorEncoder) else "openai"
