"""What a person needs to start a server on an exported folder, and to ask it: ``serve.json`` and ``README.md``."""

import json
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.modules import Pooling

from mmtune.models.kinds import HostModel
from mmtune.serving import tei, vllm
from mmtune.serving.requests import (
    EMBEDDINGS,
    POOLING,
    RERANK,
    TEI_EMBED,
    chat_arguments,
    embedding_request,
    speaks_in_messages,
    tei_request,
)
from mmtune.serving.templates import TEMPLATE_FILE, default_prompt
from mmtune.serving.vllm import Family

PAGE_URL = "data:image/png;base64,..."

RAN = "Read from the source, and run through its model classes, pooling and parsing of requests on a CPU"


def describe_serving(model: HostModel, family: Family) -> dict[str, Any]:
    """What ``serve.json`` holds for vLLM.

    Args:
        model: The exported model.
        family: Its family.
    """
    is_reranker, is_late = isinstance(model, CrossEncoder), isinstance(model, MultiVectorEncoder)
    command = ["vllm", "serve", ".", "--runner", "pooling"]
    promises = {"weights are found under their names": family.file, **vllm.PROMISES}
    limits = [
        f"vLLM {vllm.VERSION} runs beside {vllm.NEEDS}: give it an environment of its own.",
        "Ask with the prompts and in the order of parts (text, image) of the training; nothing in a server adds them.",
    ]
    if model.supports("image"):
        promises |= {"pixel limits are read from processor_config.json": family.file}
    if is_reranker:
        command += ["--chat-template", TEMPLATE_FILE]
        promises |= vllm.RERANKER_PROMISES
        limits += [
            "This folder is for servers only: transformers has no class for it, nor has Sentence Transformers.",
            "Of a document with a page and a text, the server puts the page first, whatever the order in the request.",
        ]
    elif not any(isinstance(module, (Normalize, Pooling)) for module in model):
        limits.append("Vectors come with length 1 although the model's have lengths of their own.")
    if not is_reranker and not speaks_in_messages(model):
        limits.append(
            "A text that is longer than the model reads is refused; truncate_prompt_tokens: -1 in a request cuts it."
        )
    if is_late:
        command += ["--pooler-config.task", "token_embed"]
        promises |= vllm.LATE_PROMISES
        limits.append("A vector comes for each token; MaxSim is for the client or its database.")
    return {
        "target": "vllm",
        "server": "vLLM",
        "version": vllm.VERSION,
        "least_version": vllm.LEAST_VERSION,
        "command": command,
        "overrides": {},
        "endpoint": RERANK if is_reranker else POOLING if is_late else EMBEDDINGS,
        "chat_template": TEMPLATE_FILE if is_reranker else None,
        "chat_arguments": {} if is_reranker else chat_arguments(model),
        "prompts": dict(model.prompts or {}),
        "default_prompt": default_prompt(model) if isinstance(model, CrossEncoder) else None,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "reads_pages": model.supports("image"),
        "loads_in_host": not is_reranker,
        "example": _example(model),
        "limits": limits,
        "verified": f"{RAN}, in version {vllm.VERSION}; not run in a server.",
        "read_from": {what: f"vLLM {vllm.VERSION}, {file}" for what, file in promises.items()},
    }


def describe_tei(model: SentenceTransformer) -> dict[str, Any]:
    """What ``serve.json`` holds for text-embeddings-inference.

    Args:
        model: The exported model.
    """
    prompts = dict(model.prompts or {})
    example = tei_request(model, ["total revenue of 2021"]) | ({"prompt_name": "query"} if prompts.get("query") else {})
    limits = ["Ask with the prompt of the training, by its prompt_name: nothing in the server adds one."]
    if not any(isinstance(module, Normalize) for module in model):
        limits.append(
            "Vectors come with length 1, unless normalize: false is in the request; the model's are not normalised."
        )
    return {
        "target": "tei",
        "server": "text-embeddings-inference",
        "version": tei.VERSION,
        "least_version": tei.LEAST_VERSION,
        "command": ["text-embeddings-router", "--model-id", ".", "--port", "8000"],
        "endpoint": TEI_EMBED,
        "prompts": prompts,
        "truncate_dim": model.truncate_dim,
        "reads_pages": False,
        "loads_in_host": True,
        "example": example,
        "limits": limits,
        "verified": f"Read from the source, in version {tei.VERSION}; not run in a server.",
        "read_from": {what: f"TEI {tei.VERSION}, {file}" for what, file in tei.PROMISES.items()},
    }


def _example(model: HostModel) -> dict[str, Any]:
    """The body of a request."""
    if isinstance(model, CrossEncoder):
        page = {"content": [{"type": "image_url", "image_url": {"url": PAGE_URL}}]}
        return {"model": ".", "query": "total revenue of 2021", "documents": [page]}
    return embedding_request(model, ".", "query", "total revenue of 2021")


PAGE = (
    'A page is a part of the content: `{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}`.\n\n'
)

README = """\
# Serving this model with {server}

{server} {least_version} or newer, in this folder:

```bash
{command}
```

{verified} `check_serving` of mmtune compares a running server with the model.

## A request

```bash
curl -s http://localhost:8000{endpoint} -H 'Content-Type: application/json' -d @- <<'JSON'
{body}
JSON
```

```python
import json
import urllib.request

body = json.loads(r'''{body}''')
request = urllib.request.Request(
    "http://localhost:8000{endpoint}", json.dumps(body).encode(), {{"Content-Type": "application/json"}}
)
print(json.load(urllib.request.urlopen(request)))
```

{page}## Prompts

{prompts}

## What to know

{limits}

Read from:

{sources}
"""


def write_readme(serving: dict[str, Any]) -> str:
    """The text of ``README.md``.

    Args:
        serving: What ``describe_serving`` gave.
    """
    prompts = [
        f"- `{name}`: {json.dumps(text, ensure_ascii=False)}" for name, text in serving["prompts"].items() if text
    ]
    return README.format(
        server=serving["server"],
        least_version=serving["least_version"],
        verified=serving["verified"],
        page=PAGE if serving["reads_pages"] else "",
        command=" ".join(serving["command"]),
        endpoint=serving["endpoint"],
        # no quote ends the shell's or Python's text before its time
        body=json.dumps(serving["example"], indent=2).replace("'", "\\u0027"),
        prompts="\n".join(prompts) or "There are none.",
        limits="\n".join(f"- {limit}" for limit in serving["limits"]),
        sources="\n".join(f"- {what}: {file}" for what, file in serving["read_from"].items()),
    )
