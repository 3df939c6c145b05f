"""The dataset card: a README with what a dataset holds, which the Hub and the host's readers understand."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from huggingface_hub import DatasetCard, DatasetCardData

from mmtune.data.arrow import ENCODED, column, is_text
from mmtune.data.neighbors import FILE_COLUMN
from mmtune.data.relevance import Relevance
from mmtune.data.tables import has_content, query_parts

_TAGS = ("mmtune", "visual-document-retrieval")
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_SIZES = (("n<1K", 1e3), ("1K<n<10K", 1e4), ("10K<n<100K", 1e5), ("100K<n<1M", 1e6), ("1M<n<10M", 1e7))
_LAYOUTS = {
    "beir": "Tables `corpus`, `queries` and `qrels` as in BEIR; hard negatives are ids in `negative_document_ids`.",
    "tevatron": "Tables `corpus` and `queries` as in Tevatron, with lists of positive and negative ids.",
    "id_rows": "A row for each page; `negatives` are ids of other rows.",
    "columns": "A row for each query and relevant page, with the images of its hard negatives; there are no ids.",
}


def make_card(
    relevance: Relevance,
    layout: str | None,
    folders: Sequence[str],
    split: str,
    *,
    name: str = "this-folder",
    existing: str = "",
    stamp: str = "",
) -> str:
    """The text of a card: metadata, what the dataset holds, and how it is read.

    Args:
        relevance: The dataset.
        layout: The layout of its files; ``None`` is what ``save`` writes.
        folders: The folders of its tables, which become configurations; ``data`` is the default one.
        split: The split that its files are.
        name: What ``load`` takes for it.
        existing: The card that stands there: its metadata, its other splits and what a person wrote are kept.
        stamp: What tells this export from others, for each configuration: ``load_dataset`` (datasets 5.2) takes two
            folders of one name with equal metadata for the same, and gives what it has of the first.
    """
    card = DatasetCard(existing or f"---\n{{}}\n---\n\n# {name.rpartition('/')[2]}\n", ignore_metadata_errors=True)
    known = card.data.to_dict()
    configs = {config["config_name"]: config for config in known.get("configs", [])}
    for folder in folders:
        config_name = "default" if folder == "data" else folder
        others = [each for each in _data_files(configs.get(config_name)) if each["split"] != split]
        data_files = [*others, {"split": split, "path": f"{folder}/{split}-*"}]
        configs[config_name] = {"config_name": config_name, "data_files": data_files}
        if stamp:
            configs[config_name]["description"] = stamp
    found: dict[str, Any] = {"language": _languages(relevance), "size_categories": [_size(relevance)]}
    found |= {"task_categories": ["visual-document-retrieval"], "tags": list(_TAGS)}
    found |= {key: value for key, value in known.items() if value}
    metadata: dict[str, Any] = {**found, "configs": list(configs.values()) or None}
    data = DatasetCardData(**metadata)
    section = _describe(relevance, layout, split, name)
    marker = re.compile(rf"<!-- mmtune: {split} -->.*?<!-- end of {split} -->", re.DOTALL)
    text = card.text.strip()
    text = marker.sub(lambda _: section, text) if marker.search(text) else f"{text}\n\n{section}"
    text = _LICENSE_NOTE.sub("", text).strip() + ("" if "license" in found else _NOTE)
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


_NOTE = (
    "\n\n<!-- No licence is given: whoever shares this data has to choose one that its pages allow, and name it as "
    "`license:` above. -->"
)
_LICENSE_NOTE = re.compile(r"\s*<!-- No licence is given.*?-->", re.DOTALL)


def _data_files(config: Mapping[str, Any] | None) -> list[dict[str, str]]:
    files = (config or {}).get("data_files", [])
    return [each for each in files if isinstance(each, dict) and "split" in each] if isinstance(files, list) else []


def _describe(relevance: Relevance, layout: str | None, split: str, name: str) -> str:
    tables = relevance.tables
    modalities = [kind for kind in (*ENCODED, "text") if kind in tables.corpus.column_names]
    asking = [name for name in query_parts(tables.queries) if has_content(tables.queries, name).any()]
    made_of = f" ({' and '.join(asking)})" if asking not in ([], ["text"]) else ""
    rows = [
        ("documents", f"{len(tables.corpus):,} ({' and '.join(modalities)})"),
        ("queries", f"{len(tables.queries):,}{made_of}"),
        ("judgements", f"{len(tables.qrels):,}, scores {', '.join(map(str, np.unique(relevance.judged_score)))}"),
        ("hard negatives", "none" if tables.negatives is None else f"{len(relevance.listed_negatives.values):,}"),
        (
            "languages",
            ", ".join(f"{language} ({count:,})" for language, count in _counts(relevance).items()) or "not said",
        ),
        ("pages come from", _origin(relevance)),
    ]
    lines = [
        f"<!-- mmtune: {split} -->",
        f"## {split}" if layout else "## Contents",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows),
        "",
        _LAYOUTS.get(
            layout or "", "Tables `corpus`, `queries`, `qrels` and `negatives`, as `RetrievalDataset.save` writes."
        ),
        "",
        "```python",
        "from mmtune import RetrievalDataset",
        "",
        f"dataset = RetrievalDataset.load({name!r}{f', split={split!r}' if layout else ''})",
        "```",
        f"<!-- end of {split} -->",
    ]
    return "\n".join(lines)


def _origin(relevance: Relevance) -> str:
    if FILE_COLUMN not in relevance.tables.corpus.column_names:
        return "not said"
    return (
        f"{pc.count_distinct(column(relevance.tables.corpus, FILE_COLUMN)).as_py():,} sources (column `{FILE_COLUMN}`)"
    )


def _counts(relevance: Relevance) -> dict[str, int]:
    """The queries in each language, or the documents where only these say it; the most frequent first."""
    for table in (relevance.tables.queries, relevance.tables.corpus):
        if "language" in table.column_names and is_text(column(table, "language").type):
            counted = pc.value_counts(column(table, "language").drop_null()).to_pylist()
            return {each["values"]: each["counts"] for each in sorted(counted, key=lambda each: -each["counts"])}
    return {}


def _languages(relevance: Relevance) -> list[str] | None:
    return [language for language in _counts(relevance) if _LANGUAGE.fullmatch(language)] or None


def _size(relevance: Relevance) -> str:
    count = len(relevance.document_ids)
    return next((name for name, most in _SIZES if count < most), "n>10M")
