"""A server of models, in this process: a folder read as vLLM 0.33.0 reads it, answering the bodies of its requests.

Written afresh after what these files say, not run in a server (benchmarks/vllm_classes.py runs vLLM's own classes):

    vllm/transformers_utils/config.py              modules, pooling; normalised where there is none
    vllm/model_executor/models/qwen3_vl.py         which names of weights find a place
    vllm/model_executor/models/registry.py         which architectures there are
    vllm/model_executor/models/clip.py             CLIP's names are those of transformers
    vllm/model_executor/models/bert.py             BERT's, too
    vllm/model_executor/models/adapters.py         score.weight, one row, in float32; Dense after pooling
    vllm/model_executor/layers/pooler/activations.py   the activation from config.json
    vllm/entrypoints/pooling/embed/protocol.py     messages get the chat template, input gets none
    vllm/entrypoints/pooling/pooling/serving.py    one task a server, that of --pooler-config.task; no dimensions
    vllm/entrypoints/pooling/scoring/io_processor.py   the roles query and document, texts as content
    vllm/renderers/chat_utils/chat_message.py      pages before the texts of a document, texts joined by line breaks

and one of texts, after text-embeddings-inference 1.9.3:

    router/src/lib.rs                              1_Pooling in its old form, max_seq_length
    backends/src/lib.rs                            Dense layers by their old class path; others are left out
    backends/candle/src/models/dense.rs            the identity or a tanh
    core/src/infer.rs                              cut to dimensions, then normalised
"""

import base64
import io
import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BertModel, CLIPModel, Qwen3VLModel

QWEN = ("Qwen3VLForConditionalGeneration", "Qwen3VLForSequenceClassification")
PLACES = {"model.language_model.": "language_model.", "model.visual.": "visual.", "visual.": "visual."}
"""The beginnings of names, and where they go. The server's own modules are language_model.model and visual."""
PAGE = "<|vision_start|><|image_pad|><|vision_end|>"
BARE = "{%- for m in messages -%}{%- for p in m.content -%}{%- if p.type == 'image' -%}" + PAGE
BARE += "{%- else -%}{{ p.text }}{%- endif -%}{%- endfor -%}{%- endfor -%}"


class NotServedError(Exception):
    """The server does not start."""


class Served:
    """A model as a server holds it. The attributes can be set, to plant a fault."""

    def __init__(self, folder: str | Path, *, chat_template: str | None = None, task: str | None = None) -> None:
        self.task = task or "embed"  # --pooler-config.task
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text("utf-8"))
        self.architecture = self.config["architectures"][0]
        self.processor: Any = AutoProcessor.from_pretrained(self.folder)
        if chat_template is not None:
            self.processor.chat_template = (self.folder / chat_template).read_text("utf-8")
        self.model, rest = self._load()
        self.score = rest.pop("score.weight", None)
        if rest:
            raise NotServedError(f"{len(rest)} weights find no place: {sorted(rest)[:2]}")
        modules = self._json("modules.json") or []
        names = [entry["type"].rpartition(".")[2] for entry in modules]
        folders = {name: entry["path"] for name, entry in zip(names, modules, strict=True)}
        pooling = self._json("config.json", folders.get("Pooling", "-"))
        self.pooling = (pooling or {}).get("pooling_mode", "lasttoken")
        self.normalizes = "Normalize" in names or "Pooling" not in names
        self.projector = load_file(self.folder / folders["Dense"] / "model.safetensors") if "Dense" in folders else None
        self.dims: int | None = None
        self.renormalizes = True
        self.drops_prompt = False
        self.shuffles = False
        self.use_activation = (self.config.get("sentence_transformers") or {}).get("activation_fn") is None
        self.num_requests = 0

    def _json(self, name: str, path: str = "") -> Any:
        file = self.folder / path / name
        return json.loads(file.read_text("utf-8")) if file.is_file() else None

    def _load(self) -> tuple[Any, dict[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        for file in self.folder.glob("model*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        classes = {"CLIPModel": CLIPModel, "BertModel": BertModel, **dict.fromkeys(QWEN, Qwen3VLModel)}
        if self.architecture == "Qwen3VLForSequenceClassification" and self.config.get("num_labels") != 1:
            raise NotServedError("a classifier of another number of labels")
        config = AutoConfig.from_pretrained(self.folder)
        # an architecture that is not in the registry is loaded by a fallback with the same mapping of names
        model = classes.get(self.architecture, Qwen3VLModel)(config).eval()
        placed = {name: name for name in tensors}
        if isinstance(model, Qwen3VLModel):
            pairs = [(name, old, new) for old, new in PLACES.items() for name in tensors if name.startswith(old)]
            placed = {name.replace(old, new, 1): name for name, old, new in pairs}
        missing = model.state_dict().keys() - placed.keys()
        model.load_state_dict({new: tensors[old] for new, old in placed.items()}, strict=False)
        rest = {name: value for name, value in tensors.items() if name not in placed.values()}
        if missing and not rest:
            raise NotServedError(f"{len(missing)} weights are missing")
        return model, rest

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers to a POST."""
        self.num_requests += 1
        if path == "/v1/rerank" and self.score is not None:
            return {"results": self._rerank(body)}
        if path == "/rerank" and self.score is not None:
            return [{"index": at, "score": 0.5} for at in range(len(body["texts"]))]
        if path == "/embed":
            return [self._pool(self._texts([text])).tolist() for text in body["inputs"]]
        if path == "/v1/embeddings" and self.score is None:
            vectors = [self._pool(states) for states in self._states(body)]
            if self.shuffles:
                random.Random(0).shuffle(vectors)
            return {"data": [{"index": at, "embedding": vector.tolist()} for at, vector in enumerate(vectors)]}
        if path == "/pooling" and body.get("task") == self.task == "token_embed" and "dimensions" not in body:
            return {"data": [{"index": 0, "data": self._project(states).tolist()} for states in self._states(body)]}
        return None

    def _rerank(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        found = []
        for at, document in enumerate(body["documents"]):
            pair, images = [], []
            for role, item in (("query", body["query"]), ("document", document)):
                parts = [{"type": "text", "text": item}] if isinstance(item, str) else item["content"]
                images += [_image(part) for part in parts if part["type"] == "image_url"]
                # a score template gets texts, in which pages stand as the tokens of the model, in front
                texts = "\n".join(part["text"] for part in parts if part["type"] == "text")
                pages = PAGE * sum(part["type"] == "image_url" for part in parts)
                pair.append({"role": role, "content": pages + texts})
            options = body.get("chat_template_kwargs", {})
            text = self.processor.apply_chat_template(pair, tokenize=False, **options)
            states = self._run(self.processor(text=[text], images=images or None, return_tensors="pt"))
            score = (states[-1].float() @ self.score.float().T)[0]
            found.append({"index": at, "relevance_score": float(score.sigmoid() if self.use_activation else score)})
        return sorted(found, key=lambda each: -each["relevance_score"])

    def _states(self, body: dict[str, Any]) -> list[torch.Tensor]:
        if "input" in body:
            given = body["input"] if isinstance(body["input"], list) else [body["input"]]
            return [self._texts([text]) for text in given]
        messages = [
            {"role": message["role"], "content": [_part(part) for part in message["content"]]}
            for message in body["messages"]
            if not (self.drops_prompt and message["role"] == "system")
        ]
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        if self.architecture == "CLIPModel":
            if images:
                output = self.model.get_image_features(**self.processor(images=images, return_tensors="pt"))
                return [output.pooler_output]
            return [self._texts([part["text"] for message in messages for part in message["content"]])]
        options = {name: body[name] for name in ("add_generation_prompt",) if name in body}
        options |= body.get("chat_template_kwargs", {})
        text = self.processor.apply_chat_template(messages, tokenize=False, **options)
        return [self._run(self.processor(text=[text], images=images or None, return_tensors="pt"))]

    @torch.inference_mode()
    def _texts(self, texts: list[str]) -> torch.Tensor:
        inputs = dict(getattr(self.processor, "tokenizer", self.processor)(texts, return_tensors="pt"))
        if self.architecture == "CLIPModel":
            return self.model.get_text_features(**inputs).pooler_output
        return self._run(inputs)

    @torch.inference_mode()
    def _run(self, inputs: Any) -> torch.Tensor:
        cast = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        return self.model(**cast).last_hidden_state[0]

    def _project(self, states: torch.Tensor) -> torch.Tensor:
        states = states.float()
        if self.projector is not None:
            states = nn.functional.linear(
                states, self.projector["linear.weight"].float(), self.projector.get("linear.bias")
            )
        return nn.functional.normalize(states, dim=-1) if self.normalizes else states

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        pools = {"lasttoken": lambda s: s[-1], "mean": lambda s: s.float().mean(0), "cls": lambda s: s[0]}
        vector = states[0] if self.architecture == "CLIPModel" else pools[self.pooling](states)
        vector = self._project(vector).detach()
        if self.dims:
            vector = vector[: self.dims]
            vector = nn.functional.normalize(vector, dim=-1) if self.renormalizes and self.normalizes else vector
        return vector


class ServedTexts:
    """A text encoder as TEI holds it."""

    def __init__(self, folder: str | Path) -> None:
        read = lambda name: json.loads((Path(folder) / name).read_text("utf-8"))  # noqa: E731
        self.longest = read("sentence_bert_config.json")["max_seq_length"]
        pooling = read("1_Pooling/config.json")
        flags = [name for name in ("cls_token", "mean_tokens", "lasttoken") if pooling[f"pooling_mode_{name}"]]
        self.pool = {"cls_token": lambda s: s[0], "mean_tokens": lambda s: s.mean(0), "lasttoken": lambda s: s[-1]}[
            flags[0]
        ]
        types = [entry["type"].removeprefix("sentence_transformers.models.") for entry in read("modules.json")]
        is_old = set(types) <= {"Transformer", "Pooling", "Dense", "Normalize"}
        names = [entry["path"] for entry in read("modules.json") if is_old and entry["type"].endswith(".Dense")]
        self.dense = [
            (read(f"{name}/config.json"), load_file(Path(folder) / name / "model.safetensors")) for name in names
        ]
        self.prompts = read("config_sentence_transformers.json")["prompts"]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        self.model = BertModel(config, add_pooling_layer=False).eval()
        self.model.load_state_dict({name: each for name, each in weights.items() if not name.startswith("pooler.")})

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers to a POST."""
        return [self._embed(text, body).tolist() for text in body["inputs"]] if path == "/embed" else None

    @torch.inference_mode()
    def _embed(self, text: str, body: dict[str, Any]) -> torch.Tensor:
        text = self.prompts[body["prompt_name"]] + text if "prompt_name" in body else text
        inputs = self.tokenizer([text], truncation=True, max_length=self.longest, return_tensors="pt")
        vector = self.pool(self.model(**inputs).last_hidden_state[0])
        for config, weights in self.dense:
            vector = nn.functional.linear(vector, weights["linear.weight"], weights.get("linear.bias"))
            vector = vector.tanh() if config["activation_function"].endswith("Tanh") else vector
        vector = vector[: body.get("dimensions")]
        return nn.functional.normalize(vector, dim=-1) if body.get("normalize", True) else vector


def _image(part: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).convert("RGB")


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": _image(part)} if part["type"] == "image_url" else part


@contextmanager
def serving(served: Any) -> Iterator[str]:
    """The URL of a server for the time of a block; ``served`` has the method ``answer(path, body)``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.inference_mode():
                answer = served.answer(self.path, body)
            content = json.dumps({"error": "not here"} if answer is None else answer).encode()
            self.send_response(404 if answer is None else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
