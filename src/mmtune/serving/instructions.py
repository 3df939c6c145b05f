"""What a person needs to start a server on an exported folder, and to ask it: ``serve.json`` and ``README.md``."""

import json
from typing import Any

from sentence_transformers import CrossEncoder, MultiVectorEncoder
from sentence_transformers.base.modules import Normalize

from mmtune.models.kinds import HostModel
from mmtune.serving.requests import EMBEDDINGS, POOLING, RERANK, chat_arguments, embedding_request, speaks_in_messages
from mmtune.serving.templates import TEMPLATE_FILE, default_prompt
from mmtune.serving.vllm import LEAST_VERSION, PROMISES, RERANKER_PROMISES, VERSION, Family

PAGE_URL = "data:image/png;base64,..."


def describe_serving(model: HostModel, family: Family) -> dict[str, Any]:
    """What ``serve.json`` holds.

    Args:
        model: The exported model.
        family: Its family.
    """
    is_reranker, is_late = isinstance(model, CrossEncoder), isinstance(model, MultiVectorEncoder)
    command, overrides = ["vllm", "serve", ".", "--runner", "pooling"], {}
    if is_reranker:
        command += ["--chat-template", TEMPLATE_FILE]
    promises = {"weights are found under their names": family.file, **PROMISES}
    limits = [
        "Ask with the prompts and in the order of parts (text, image) of the training; nothing in a server adds them."
    ]
    if is_reranker:
        promises |= RERANKER_PROMISES
        limits.append(
            "This folder is for servers only: transformers has no class for it, so Sentence Transformers can't load it."
        )
    elif not any(isinstance(module, Normalize) for module in model):
        limits.append("Vectors may come with length 1 although the model's have lengths of their own.")
    if not is_reranker and not speaks_in_messages(model):
        limits.append("Texts that are longer than the model reads must be cut before they are sent.")
    if is_late:
        limits.append("A vector comes for each token; MaxSim is for the client or its database.")
    return {
        "target": "vllm",
        "least_version": LEAST_VERSION,
        "command": command,
        "overrides": overrides,
        "endpoint": RERANK if is_reranker else POOLING if is_late else EMBEDDINGS,
        "chat_template": TEMPLATE_FILE if is_reranker else None,
        "chat_arguments": {} if is_reranker else chat_arguments(model),
        "prompts": dict(model.prompts or {}),
        "default_prompt": default_prompt(model) if isinstance(model, CrossEncoder) else None,
        "truncate_dim": getattr(model, "truncate_dim", None),
        "loads_in_host": not is_reranker,
        "example": _example(model),
        "limits": limits,
        "verified": "Read from the source and compared in plain transformers; not run in a server.",
        "read_from": {what: f"vLLM {VERSION}, {file}" for what, file in promises.items()},
    }


def _example(model: HostModel) -> dict[str, Any]:
    """The body of a request."""
    if isinstance(model, CrossEncoder):
        page = {"content": [{"type": "image_url", "image_url": {"url": PAGE_URL}}]}
        return {"model": ".", "query": "total revenue of 2021", "documents": [page]}
    return embedding_request(model, ".", "query", "total revenue of 2021")


README = """\
# Serving this model with vLLM

vLLM {least_version} or newer, in this folder:

```bash
{command}
```

Not run in a server: the form of this folder was read from the source of vLLM {version} and compared in plain
transformers. `check_serving` of mmtune compares a running server with the model.

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

A page is a part of the content: `{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}}`.

## Prompts

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
        least_version=serving["least_version"],
        version=VERSION,
        command=" ".join(serving["command"]),
        endpoint=serving["endpoint"],
        # no quote ends the shell's or Python's text before its time
        body=json.dumps(serving["example"], indent=2).replace("'", "\\u0027"),
        prompts="\n".join(prompts) or "There are none.",
        limits="\n".join(f"- {limit}" for limit in serving["limits"]),
        sources="\n".join(f"- {what}: {file}" for what, file in serving["read_from"].items()),
    )
