"""``report.html``: what a run gained, for whom, and on which pages, in one file that opens without a network."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmtune.arguments import require_flag
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.findings import GOOD_TO_KNOW, PROBLEMS
from mmtune.data.relevance import Direction
from mmtune.errors import MissingExtraError
from mmtune.report.charts import draw_changes, draw_loss, draw_measure, draw_sizes, name_measure
from mmtune.report.gallery import MOST_SHOWN, Gallery, at_full_size, changes_of, choose_changes
from mmtune.report.markdown import BeforeAfter, show, show_p

_PACKAGES = ("jinja2", "matplotlib")
_COSTS = {
    "train_runtime": ("time of the training", "s"),
    "train_samples_per_second": ("training rows a second", ""),
    "train_steps_per_second": ("steps a second", ""),
    "total_flos": ("floating-point operations", ""),
    "train_loss": ("mean loss", ""),
}
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LARGE = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def require_report() -> None:
    """Make sure that a report can be written.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"report.html needs {' and '.join(missing)}, which is not installed. Run: pip install "
            f'{" ".join(missing)} (in a clone of mmtune: pip install ".[report]")'
        )


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    verdict: Mapping[str, Any] | None,
    rows: Sequence[BeforeAfter],
    primary_metric: str | None,
    per_query: pa.Table | None,
    log: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    datasets: Mapping[str, RetrievalDataset],
    documents: DocumentKind = "image",
    direction: Direction = "text_to_image",
    thumbnails: bool = True,
) -> None:
    """Write the report of a run as one HTML file: no script, and nothing is fetched.

    Everything that comes from data is text in it, whatever it looks like.

    Args:
        path: The file; one that is there is replaced when the new one is whole.
        title: Heading.
        verdict: As ``metrics.json`` holds it; ``None`` where there is none. What it lacks is left out.
        rows: Before and after at each size; empty without an evaluation set.
        primary_metric: What chose the checkpoint, e.g. ``"vdr_cosine_ndcg@10"``; ``None`` without an evaluation set.
        per_query: The columns ``metric, query_id, before, after, top_ids_before, top_ids_after``; ``None`` where the
            values of each query are not known. Rows of truncated embeddings and of a guard set are not shown.
        log: ``trainer.state.log_history``.
        settings: By topic; ``audit``, ``cost`` and ``evaluation`` have sections of their own.
        versions: By package.
        datasets: The evaluation sets by name, ``""`` for a single one.
        documents: What a document is made of: pages are shown as small images, texts cut.
        direction: What asks, where the name of a metric does not say it.
        thumbnails: Whether documents are shown. ``False`` leaves their ids alone, for confidential pages: no pixel and
            no text of a document is in the file. Texts of queries stay.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        ConfigError: ``thumbnails`` is neither ``True`` nor ``False``.
    """
    require_flag("thumbnails", thumbnails)
    require_report()
    if per_query is not None and primary_metric:
        per_query = at_full_size(per_query, primary_metric)
    measure = str((verdict or {}).get("measure") or name_measure(primary_metric or ""))
    queries = settings.get("data", {}).get("queries", "text")
    gallery = Gallery(datasets, documents, direction, thumbnails=thumbnails, queries=queries)
    won, lost = ([], []) if per_query is None else map(gallery.show, choose_changes(per_query))
    values = {
        "title": title,
        "measure": measure,
        "word": _judge(verdict, rows),
        "counts": _count(verdict),
        "facts": _list_facts(verdict, measure, settings.get("evaluation", {})),
        "pictures": [
            picture
            for picture in (
                draw_loss(log),
                draw_measure(log, primary_metric, rows, _kept_step(settings)) if primary_metric else None,
            )
            if picture
        ],
        "sizes": _list_sizes(verdict, rows),
        "sizes_picture": draw_sizes(rows, measure),
        "groups": _list_groups(verdict),
        "changes_picture": None if per_query is None else draw_changes(changes_of(per_query), measure),
        "has_queries": per_query is not None,
        "galleries": [
            {"title": "Won most", "kind": "won", "changes": won},
            {"title": "Lost most", "kind": "lost", "changes": lost},
        ],
        "most_shown": MOST_SHOWN,
        "hubs": _list_hubs(settings.get("evaluation", {}).get("hubs", ()), gallery),
        "audit": _list_audit(settings.get("audit", {}), documents),
        "cost": _list_cost(log, settings),
        "settings": {
            topic: {name: _flatten(name, value) for name, value in facts.items()}
            for topic, facts in settings.items()
            if topic not in ("audit", "cost", "evaluation") and facts
        },
        "versions": versions,
        "thumbnails": thumbnails,
    }
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    part.write_text(_fill_in(values), "utf-8")
    part.replace(path)


def _fill_in(values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_clean, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "signed": _signed, "p": _p}
    template = files("mmtune.report").joinpath("report.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(values)


def _judge(verdict: Mapping[str, Any] | None, rows: Sequence[BeforeAfter]) -> dict[str, str]:
    """The banner: its colour, its word, and its sentence."""
    if not verdict:
        sentence = "The values of each query are not known, so that chance can't be told from a difference."
        if not rows:
            sentence = "No evaluation set was given, so nothing is known about the gain."
        return {"kind": "none", "word": "No verdict", "sentence": sentence, "line": ""}
    outcome, line = (str(verdict.get(name) or "") for name in ("outcome", "line"))
    word, _, sentence = str(verdict.get("sentence") or outcome).partition(": ")
    return {"kind": outcome.lower(), "word": word, "sentence": sentence, "line": line}


def _count(verdict: Mapping[str, Any] | None) -> dict[str, int]:
    """Queries that are better, the same, and worse; empty where that is not known."""
    counts: dict[str, Any] = {name: (verdict or {}).get(name) for name in ("wins", "ties", "losses")}
    return counts if all(map(_is_known, counts.values())) else {}


def _list_facts(verdict: Mapping[str, Any] | None, measure: str, evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """The cards below the banner: a name, a value, and a note."""
    if not verdict:
        return []
    facts = [_show_means(verdict, measure)]
    p_value = verdict.get("p_value")
    if p_value is not None:
        note = "of a difference at least as large, if there were none"
        facts.append({"name": "By chance", "value": _p(p_value), "note": note})
    if verdict.get("num_clusters") is not None:
        note = f"of {verdict['num_queries']:,} queries" if verdict.get("num_queries") is not None else ""
        facts.append({"name": "Independent groups", "value": f"{verdict['num_clusters']:,}", "note": note})
    if verdict.get("guard"):
        facts.append(_show_means(verdict["guard"], "On the guard set"))
        facts[-1]["note"] += f"; {_p(verdict['guard'].get('p_value'))}"
    drift = evaluation.get("largest_change_by_batch_size")
    if drift is not None:
        note = "the most that a number of the output moves with the size of the batch"
        facts.append({"name": "Batch size", "value": _number(drift), "note": note})
    return facts


def _show_means(verdict: Mapping[str, Any], name: str) -> dict[str, str]:
    value = f"{_number(verdict.get('before'))}\N{NO-BREAK SPACE}→ {_number(verdict.get('after'))}"
    return {"name": name, "value": value, "note": f"{_signed(verdict.get('delta'))} {_interval(verdict)}".strip()}


def _list_sizes(verdict: Mapping[str, Any] | None, rows: Sequence[BeforeAfter]) -> list[dict[str, Any]]:
    """A row for each size, with interval and p where the verdict has them."""
    tested = dict((verdict or {}).get("by_size") or {})
    found: list[dict[str, Any]] = []
    for row in rows:
        # the first row of a size is that of the primary metric; further sets follow
        own = tested.pop(row.label.rpartition(" ")[2], {})
        known = {"before": row.before, "after": row.after, "delta": row.change}
        found.append({"name": row.label, **known, **_tested(own)})
    return found


def _list_groups(verdict: Mapping[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """The groups of each column."""
    by_group = (verdict or {}).get("by_group") or {}
    return {
        column: [{"name": name, **_tested(each)} for name, each in groups.items()]
        for column, groups in by_group.items()
    }


def _tested(each: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: each[key] for key in ("before", "after", "delta", "p_value", "num_queries") if key in each}
    return {**kept, "interval": _interval(each)}


def _list_hubs(hubs: Sequence[Mapping[str, Any]], gallery: Gallery) -> list[dict[str, Any]]:
    """Pages that stand in far more lists than chance would put them, as they are shown, and in how many."""
    shown = gallery.show_documents([str(each["document_id"]) for each in hubs])
    return [{"document": one, **each} for one, each in zip(shown, hubs, strict=True)]


def _list_audit(counts: Mapping[str, int], documents: DocumentKind) -> list[dict[str, Any]]:
    """What was found in the training data, problems first."""
    found = []
    for name, count in counts.items():
        part, _, key = name.rpartition(": ")
        # what a corpus of texts must have, one of images, sounds or clips may lack
        is_problem = key in PROBLEMS and not (key in GOOD_TO_KNOW and "text" not in documents.split("+"))
        title, meaning = (PROBLEMS if is_problem else GOOD_TO_KNOW).get(key, (key.replace("_", " "), ""))
        found.append({"part": part, "count": count, "title": title, "meaning": meaning, "is_problem": is_problem})
    return sorted(found, key=lambda each: not each["is_problem"])


def _list_cost(log: Sequence[Mapping[str, Any]], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Time, memory and speed, as far as they are known."""
    last: dict[str, Any] = {key: entry[key] for entry in log for key in _COSTS if entry.get(key) is not None}
    cost = {name: _quantity(last[key], unit) for key, (name, unit) in _COSTS.items() if last.get(key)}
    measured = [entry["eval_runtime"] for entry in log if isinstance(entry.get("eval_runtime"), (int, float))]
    if measured:
        cost["time of the measurements"] = f"{_quantity(sum(measured), 's')} for {len(measured)}"
    model, training = settings.get("model", {}), settings.get("training", {})
    if model.get("parameters"):
        cost["parameters"] = f"{model['parameters']:,}"
    if training.get("bytes_of_weights_gradients_optimizer"):
        kept = _quantity(training["bytes_of_weights_gradients_optimizer"], "bytes")
        cost["memory of weights, gradients and optimizer"] = kept
    for name, value in settings.get("cost", {}).items():
        unit = "bytes" if "bytes" in name else "s" if name.endswith(("_s", "seconds")) else ""
        cost[name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")] = _quantity(value, unit)
    return cost


def _quantity(value: Any, unit: str) -> str:
    """A number with its unit, as a person says it."""
    if not isinstance(value, (int, float)):
        return show(value)
    if unit == "bytes":
        name, size = next(((name, size) for name, size in _LARGE.items() if value >= size), ("bytes", 1))
        return f"{value / size:.3g} {name}"
    if unit == "s" and value >= 120:
        minutes = round(value / 60)
        return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
    return f"{value:.4g} {unit}".strip()


def _kept_step(settings: Mapping[str, Mapping[str, Any]]) -> int | None:
    step = settings.get("training", {}).get("best_step")
    return step if isinstance(step, int) and step > 0 else None


def _flatten(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and "seed" not in name else show(value)
    )


def _is_known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> str:
    """A measure as it is shown; what is not known is a dash."""
    if not _is_known(value):
        return "-"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def _signed(value: Any) -> str:
    return f"{value:+.3f}" if _is_known(value) else "-"


def _p(value: Any) -> str:
    return show_p(value) if _is_known(value) else "-"


def _interval(each: Mapping[str, Any]) -> str:
    interval = each.get("interval")
    return (
        f"[{interval[0]:+.3f},\N{NO-BREAK SPACE}{interval[1]:+.3f}]"
        if interval and all(map(_is_known, interval))
        else ""
    )


def _clean(value: Any) -> Any:
    """Without the characters that HTML can't hold, such as NUL or half of a surrogate pair."""
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", value) if type(value) is str else value
