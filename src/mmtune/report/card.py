"""The host's model card, made to fit pages: what the finetuning gained, how to use the model, tags."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from mmtune.report.markdown import VERDICT_HEADER, BeforeAfter, markdown_table, show, show_gain

_QUESTION = "What was the revenue in 2024?"
_DOCUMENTS = {
    "image": ['Image.open("page-1.png")', 'Image.open("page-2.png")'],
    "text": ['"Revenue rose to 12 million in 2024."', '"The plant opened in 1998."'],
    "text+image": [
        '{"text": "Annual report", "image": Image.open("page-1.png")}',
        '{"text": "Price list", "image": Image.open("page-2.png")}',
    ],
    "audio": ['{"audio": {"array": samples, "sampling_rate": 16_000}}'],
    "text+audio": ['{"text": "faster", "audio": {"array": samples, "sampling_rate": 16_000}}'],
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
    verdict: str = "",
    verdicts: Sequence[Sequence[str]] = (),
) -> str:
    """The host's model card with a section on this finetuning first, and code that goes with the documents.

    Args:
        card: As the host wrote it.
        rows: Before and after; empty without an evaluation set.
        measure: What the rows show, e.g. ``"ndcg@10"``.
        settings: By topic, with ``model``, ``data`` and ``training``.
        name: What a user loads the model by: its folder, or its id on the Hub.
        verdict: The verdict on it, a sentence.
        verdicts: The verdict by size, a row each, with cells for ``VERDICT_HEADER``.
    """
    kinds = [value for key, value in settings["data"].items() if key.endswith("documents") and isinstance(value, str)]
    documents = kinds[0] if kinds else "image"
    base = settings["model"].get("base_model")
    text = _USAGE.sub(
        lambda found: f"{found[1]}```python\n{_usage(card, documents, name, settings)}\n```", card, count=1
    )
    if base:
        text = text.replace(" model trained. It ", f" model finetuned from `{_short(base)}`. It ", 1)
        text = _UNKNOWN_BASE.sub(lambda _: f"- **Base model:** `{_short(base)}`", text, count=1)
    head, details, tail = text.partition("\n## Model Details")
    section = _section(rows, measure, settings, verdict, verdicts)
    text = f"{head.rstrip()}\n\n{section}\n{details}{tail}"
    return _add_metadata(text, documents, base)


def _section(
    rows: list[BeforeAfter],
    measure: str,
    settings: Mapping[str, Mapping[str, Any]],
    verdict: str,
    verdicts: Sequence[Sequence[str]],
) -> str:
    """The verdict, the gain, the data, what is not known, then everything that was chosen, folded away."""
    facts = {**settings["model"], **settings["data"], **settings["training"]}
    facts["base_model"] = _short(str(facts.get("base_model")))
    facts.pop("page_store", None)  # a folder of this machine
    cells = [[key.replace("_", " "), show(value)] for key, value in facts.items()]
    parts = ["## Finetuning", *([f"**{verdict}**"] if verdict else []), show_gain(rows, measure)]
    if len(verdicts) > 1:
        parts += [markdown_table(VERDICT_HEADER, verdicts)]
    parts += ["### Data", _list_data(settings["data"]), "### Limits", _list_limits(settings)]
    return "\n\n".join(
        [
            *parts,
            "<details><summary>Everything that was chosen</summary>",
            markdown_table(("setting", "value"), cells),
            "</details>",
        ]
    )


def _list_data(data: Mapping[str, Any]) -> str:
    """The size of each set with its fingerprint, by which it is told from others, and its license if it is known."""
    lines = [f"- {name}: {what}" for name, what in data.get("fingerprints", {}).items() if what != "none"]
    lines += [f"- {name.replace('_', ' ')}: {value}" for name, value in data.items() if name.endswith("license")]
    return "\n".join(lines or ["- not recorded"]) + "\n\nNo page and no query of these data is in this repository."


def _list_limits(settings: Mapping[str, Mapping[str, Any]]) -> str:
    data, model = settings["data"], settings["model"]
    lines = []
    for name, queries in data.items():
        if name.endswith("evaluation_queries"):
            prefix = name.removesuffix("evaluation_queries")
            documents = data.get(f"{prefix}evaluation_documents")
            lines.append(
                f"- Measured on {prefix}{queries} queries over {documents} documents; other queries, languages "
                "and kinds of documents, and larger collections, give other scores."
            )
    if not lines:
        lines.append("- Not measured: how good it is, is not known.")
    if model.get("max_pixels"):
        lines.append(f"- Pages are read at up to {model['max_pixels']} pixels; smaller print is lost.")
    for hub in settings.get("evaluation", {}).get("hubs", ()):
        lines.append(f"- One document came up wrongly for {hub['wrongly_in']} of {hub['queries']} queries.")
    return "\n".join(lines)


def _usage(card: str, documents: str, name: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Code that loads the model and compares a question with documents of this kind."""
    examples = ", ".join(_DOCUMENTS.get(documents, _DOCUMENTS["image"]))
    found = re.search(r"from sentence_transformers import (\w+)", card)
    model_class = found[1] if found else "SentenceTransformer"
    training = settings["training"]
    lines = [f"from sentence_transformers import {model_class}", "", f"model = {model_class}({name!r})"]
    queries = settings["data"].get("queries", "text")
    asked = f'"{_QUESTION}"' if queries == "text" else _DOCUMENTS[queries][0]
    for kind in dict.fromkeys((documents, queries)):
        lines = [*_SAMPLES.get(kind.removeprefix("text+"), ()), *lines]
    if "Image.open" in f"{asked}{examples}":
        lines.insert(0, "from PIL import Image")
    smaller = [dim for dim in training.get("evaluated_dims", ()) if dim != settings["model"].get("full_dimension")]
    if smaller:
        lines.append(
            f"# smaller embeddings: {model_class}({name!r}, truncate_dim={smaller[0]}), of {smaller} as measured"
        )
    lines += [f"query = {asked}", f"documents = [{examples}]"]
    if model_class == "CrossEncoder":
        lines += ["scores = model.predict([(query, document) for document in documents])", "print(scores)"]
        return "\n".join(lines)
    if any(training.get("prompts_of_model", {}).values()):
        lines.append("# encode_query and encode_document put the prompts in front that the model was trained with")
    lines.append("scores = model.similarity(model.encode_query([query]), model.encode_document(documents))")
    return "\n".join([*lines, "print(scores)"])


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
