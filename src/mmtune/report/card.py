"""The host's model card, made to fit pages: what the finetuning gained, how to use the model, tags."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mmtune.report.markdown import BeforeAfter, markdown_table, show, show_gain

_QUESTION = "What was the revenue in 2024?"
_DOCUMENTS = {
    "image": ['Image.open("page-1.png")', 'Image.open("page-2.png")'],
    "text": ['"Revenue rose to 12 million in 2024."', '"The plant opened in 1998."'],
    "text+image": [
        '{"text": "Annual report", "image": Image.open("page-1.png")}',
        '{"text": "Price list", "image": Image.open("page-2.png")}',
    ],
    "audio": ['{"audio": {"array": samples, "sampling_rate": 16_000}}'],
    "video": ['{"video": {"array": frames, "video_metadata": metadata}}'],
}
_SAMPLES = {
    "audio": ["import numpy as np", "", "samples = np.zeros(16_000, dtype=np.float32)  # in one channel"],
    "video": [
        "import numpy as np",
        "",
        "frames = np.zeros((8, 64, 64, 3), dtype=np.uint8)",
        'metadata = {"fps": 8.0, "total_num_frames": 8, "frames_indices": list(range(8)), "duration": 1.0}',
    ],
}
_UNKNOWN_BASE = re.compile(r"<!-- - \*\*Base model:\*\* \[Unknown\]\(https://huggingface\.co/unknown\) -->")
_USAGE = re.compile(r"(## Usage\n.*?)```python\n.*?```", re.DOTALL)
_TAGS = ("mmtune", "visual-document-retrieval")


def add_to_card(
    card: str,
    rows: list[BeforeAfter],
    measure: str,
    settings: Mapping[str, Mapping[str, Any]],
    *,
    name: str,
) -> str:
    """The host's model card with a section on this finetuning first, and code that goes with the documents.

    Args:
        card: As the host wrote it.
        rows: Before and after; empty without an evaluation set.
        measure: What the rows show, e.g. ``"ndcg@10"``.
        settings: By topic, with ``model``, ``data`` and ``training``.
        name: What a user loads the model by: its folder, or its id on the Hub.
    """
    kinds = [value for key, value in settings["data"].items() if key.endswith("documents") and isinstance(value, str)]
    documents = kinds[0] if kinds else "image"
    base = settings["model"].get("base_model")
    text = _USAGE.sub(lambda found: f"{found[1]}```python\n{_usage(card, documents, name)}\n```", card, count=1)
    if base:
        text = text.replace(" model trained. It ", f" model finetuned from `{_short(base)}`. It ", 1)
        text = _UNKNOWN_BASE.sub(lambda _: f"- **Base model:** `{_short(base)}`", text, count=1)
    head, details, tail = text.partition("\n## Model Details")
    text = f"{head.rstrip()}\n\n{_section(rows, measure, settings)}\n{details}{tail}"
    return _add_metadata(text, documents, base)


def _section(rows: list[BeforeAfter], measure: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The gain, then everything that was chosen, folded away."""
    facts = {**settings["model"], **settings["data"], **settings["training"]}
    cells = [[key.replace("_", " "), show(value)] for key, value in facts.items()]
    folded = [
        "<details><summary>Everything that was chosen</summary>",
        markdown_table(("setting", "value"), cells),
        "</details>",
    ]
    return "\n\n".join(["## Finetuning", show_gain(rows, measure), *folded])


def _usage(card: str, documents: str, name: str) -> str:
    """Code that loads the model and compares a question with documents of this kind."""
    examples = ", ".join(_DOCUMENTS.get(documents, _DOCUMENTS["image"]))
    found = re.search(r"from sentence_transformers import (\w+)", card)
    model_class = found[1] if found else "SentenceTransformer"
    lines = [f"from sentence_transformers import {model_class}", "", f"model = {model_class}({name!r})"]
    if documents in _SAMPLES:
        lines = [*_SAMPLES[documents], *lines]
    elif "image" in documents or documents not in _DOCUMENTS:
        lines.insert(0, "from PIL import Image")
    lines += [f'query = "{_QUESTION}"', f"documents = [{examples}]"]
    if model_class == "CrossEncoder":
        lines += ["scores = model.predict([(query, document) for document in documents])", "print(scores)"]
    else:
        lines.append("scores = model.similarity(model.encode_query([query]), model.encode_document(documents))")
        lines.append("print(scores)")
    return "\n".join(lines)


def _add_metadata(card: str, documents: str, base: str | None) -> str:
    parsed = ModelCard(card, ignore_metadata_errors=True)
    data: Any = parsed.data
    tags = list(data.tags or [])
    wanted = _TAGS if "image" in documents else _TAGS[:1]
    data.tags = [*tags, *(tag for tag in wanted if tag not in tags)]
    is_on_hub = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    if is_on_hub and not data.base_model:
        data.base_model = base
    return str(parsed)


def _short(base: str) -> str:
    """The name of a checkpoint; of one on this machine the last part of its path only."""
    return Path(base).name if Path(base).is_absolute() or Path(base).exists() else base
