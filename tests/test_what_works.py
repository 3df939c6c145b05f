"""What works with what: every kind of model on every kind of document, in every call that takes both.

``TAKES``, ``EXPORT`` and ``CALLS`` are the tables of ``docs/beyond_pages.md``: a test fails where the page says
otherwise, and prints what it should say. What they leave out must be refused by name.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from sentence_transformers.sentence_transformer.losses import MarginMSELoss

from mmtune import (
    ConfigError,
    MmtuneError,
    RetrievalDataset,
    build_evaluator,
    build_late_interaction,
    build_reranker,
    build_reranking_evaluator,
    compare_models,
    compose_router,
    distill_query_encoder,
    encode_corpus,
    evaluate_pipeline,
    export_model,
    find_false_negatives,
    finetune,
    finetune_reranker,
    judge_negatives,
    load_model,
    mine_hard_negatives,
    read_shards,
    score_rows,
    size_frontier,
)
from mmtune.data.arrow import with_encoded_images
from mmtune.testing import generated_audio, generated_clips, generated_pages, tiny_ast, tiny_clap, tiny_videomae

pytest.importorskip("soundfile")
pytest.importorskip("av")
pytestmark = pytest.mark.filterwarnings("ignore:Training has seen a part of the evaluation:UserWarning")

KINDS = ("text", "image", "audio", "video", "text+image", "text+audio", "text+video")
TAKES = {
    "CLIP": ("text", "image"),
    "CLAP": ("text", "audio"),
    "Router of text and image": ("text", "image"),
    "Router with AST and VideoMAE": ("text", "image", "audio", "video"),
    "Qwen3-VL": ("text", "image", "video", "text+image", "text+video"),
    "late interaction on it": ("text", "image", "video", "text+image", "text+video"),
    "reranker on it": ("text", "image", "video", "text+image"),
}
"""What a document may be made of, by the kind of model. ``"mixed"`` is any of these in one corpus."""

EXPORT = ("CLIP", "Qwen3-VL", "late interaction on it", "reranker on it")
"""What a server runs, alone."""

EMBEDDING, LATE, RERANKERS = tuple(TAKES)[:-2], tuple(TAKES)[-2:-1], tuple(TAKES)[-1:]
RETRIEVERS = EMBEDDING + LATE
NUM = 4
QUIET = {"show_progress_bar": False}
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 4, "num_negatives": 1, "allow_overlap": True}
BOTH = ("text_to_image", "image_to_text")


class Bench:
    """Models, each loaded once, and a folder."""

    def __init__(self, folder: Path, paths: dict[str, str]) -> None:
        self.folder, self.paths = folder, paths
        self._models: dict[str, Any] = {}
        self._count = 0

    def model(self, name: str) -> Any:
        if name not in self._models:
            self._models[name] = self.build(name)
        return self._models[name]

    def build(self, name: str) -> Any:
        paths = self.paths
        return {
            "CLIP": lambda: load_model(paths["clip"], device="cpu"),
            "CLAP": lambda: load_model(paths["clap"], device="cpu"),
            "Router of text and image": lambda: compose_router(paths["text"], paths["siglip"], device="cpu"),
            "Router with AST and VideoMAE": lambda: compose_router(
                paths["text"], paths["siglip"], audio=paths["ast"], video=paths["videomae"], device="cpu"
            ),
            "Qwen3-VL": lambda: load_model(paths["qwen"], device="cpu"),
            "late interaction on it": lambda: build_late_interaction(paths["qwen"], device="cpu"),
            "reranker on it": lambda: build_reranker(paths["qwen"], device="cpu"),
            "reranker, dense": lambda: build_reranker(paths["qwen"], head="dense", device="cpu"),
        }[name]()

    def new_folder(self) -> Path:
        self._count += 1
        return self.folder / str(self._count)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, clip_path, siglip_path, text_encoder_path, qwen3_vl_path) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    paths = {"clip": clip_path, "siglip": siglip_path, "text": text_encoder_path, "qwen": qwen3_vl_path}
    paths |= {maker.__name__[5:]: maker(folder / maker.__name__) for maker in (tiny_clap, tiny_ast, tiny_videomae)}
    return Bench(folder, paths)


@pytest.fixture(scope="module")
def data() -> dict[str, RetrievalDataset]:
    """A dataset for each kind of document; the ids are what a document is made of, and a number."""
    pages = with_encoded_images(generated_pages(NUM).select(range(NUM)), "image")
    files = {"image": pages["image"], "audio": generated_audio(NUM)["audio"], "video": generated_clips(NUM)["video"]}
    columns = {name: [each["bytes"] for each in column] for name, column in files.items()}
    columns["text"] = [f"{at} is a number" for at in range(NUM)]
    return {kind: _of_kind(kind, {name: columns[name] for name in kind.split("+")}) for kind in KINDS}


def _of_kind(kind: str, parts: dict[str, list]) -> RetrievalDataset:
    ids = [f"{kind} {at}" for at in range(NUM)]
    negatives = [[ids[(at + step) % NUM] for step in (1, 2)] for at in range(NUM)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, **parts}),
        Dataset.from_dict({"query_id": ids, "text": [f"what is {each}" for each in ids]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * NUM}),
        Dataset.from_dict({"query_id": ids, "document_ids": negatives}),
    )


# The calls. Each gives what it made; ``None`` where it asserts by itself.


def _evaluates(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    metrics = build_evaluator(data, model=bench.model(name), documents=kind, **QUIET)(bench.model(name))
    assert all(math.isfinite(value) for value in metrics.values())
    if kind == "mixed":
        of_kinds = {key.rsplit("_", 1)[1] for key in metrics if key.rsplit("_", 1)[0].endswith("ndcg@10")}
        assert of_kinds == {each.rsplit(" ", 1)[0] for each in data.corpus["document_id"][:]}


def _mines(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    _check_mined(mine_hard_negatives(data, bench.model(name), documents=kind, **MINING), data)


def _mines_with_a_reranker(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    retriever, reranker = bench.model("Qwen3-VL"), bench.model(name)
    _check_mined(mine_hard_negatives(data, retriever, reranker=reranker, documents=kind, **MINING), data)


MINING = {"num_negatives": 3, "relative_margin": None, "batch_size": 4, **QUIET}


def _check_mined(mined: RetrievalDataset, data: RetrievalDataset) -> None:
    ids = {*data.corpus["document_id"][:]}
    for row in mined.negatives:
        assert len({*row["document_ids"]} & ids - {row["query_id"]}) == 3


def _finds_false_negatives(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    found = find_false_negatives(data, bench.model(name), documents=kind, **QUIET)
    assert all(each.document_id != each.query_id for each in found)


def _encodes_a_corpus(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    folder = encode_corpus(data, bench.model(name), bench.new_folder(), documents=kind, **QUIET)
    ids = [each for shard in read_shards(folder) for each in shard["document_id"].to_pylist()]
    assert ids == data.corpus["document_id"][:]


def _compares(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    entry = (bench.model("Qwen3-VL"), bench.model(name)) if name in RERANKERS else bench.model(name)
    compared = compare_models({"one": entry, "other": entry}, data, documents=kind, **QUIET)
    assert [row.name for row in compared.rows] == ["one", "other"]


def _finds_sizes(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    assert size_frontier(bench.model(name), data, dims=(16,), documents=kind, **QUIET).rows


def _distills(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    out = {"output_dir": bench.new_folder(), "max_steps": 1, "disable_tqdm": True}
    texts = [f"which number is {at}" for at in range(8)]
    result = distill_query_encoder(bench.build(name), bench.paths["text"], texts, data, documents=kind, **out)
    assert result.after.keys() == result.before.keys() != set()


def _finetunes(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    out = {"output_dir": bench.new_folder(), **ONE_STEP}
    assert finetune(bench.build(name), data, data, documents=kind, **out).trainer.state.global_step == 1


def _learns_from_a_teacher(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    """A retriever of its own learns the scores of the reranker; of clips, which stands for all kinds."""
    rows = data.training_rows(2, documents=kind)
    labelled = score_rows(rows, bench.model(name), **QUIET).label_rows(rows)
    assert all(len(set(labels)) == 3 for labels in labelled[:]["label"])
    if kind == "video":
        out = {"output_dir": bench.new_folder(), **ONE_STEP, "num_negatives": 2}
        result = finetune(bench.build("Qwen3-VL"), labelled, documents=kind, loss=MarginMSELoss, **out)
        assert result.trainer.state.global_step == 1


def _ranks(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    for model in (bench.model(name), bench.model("reranker, dense")):
        for direction in BOTH:
            choice = {"direction": direction, "documents": kind, "num_candidates": 3, **QUIET}
            assert 0 < build_reranking_evaluator(data, **choice)(model)["vdr-rerank_ndcg@10"] <= 1


def _finetunes_a_reranker(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    for model in (bench.build(name), bench.build("reranker, dense")):
        out = {"output_dir": bench.new_folder(), "directions": BOTH, "num_candidates": 3, **ONE_STEP}
        assert finetune_reranker(model, data, data, documents=kind, **out).trainer.state.global_step == 1


def _judges(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    try:
        judged = judge_negatives(data, bench.model(name), documents=kind, **QUIET)
    except ConfigError as error:
        if "does not tell them apart" not in str(error):  # scores of random weights
            raise
    else:
        assert judged.corpus["document_id"][:] == data.corpus["document_id"][:]


def _retrieves_and_reranks(bench: Bench, name: str, data: RetrievalDataset, kind: str) -> None:
    report = evaluate_pipeline(bench.model("Qwen3-VL"), bench.model(name), data, depths=[3], documents=kind, **QUIET)
    assert report.num_documents == len(data.corpus)


Call = Callable[[Bench, str, RetrievalDataset, str], None]
CALLS: dict[str, dict[tuple[str, ...], Call]] = {
    "build_evaluator": {RETRIEVERS: _evaluates},
    "build_reranking_evaluator": {RERANKERS: _ranks},
    "mine_hard_negatives": {RETRIEVERS: _mines, RERANKERS: _mines_with_a_reranker},
    "find_false_negatives": {(*RETRIEVERS, *RERANKERS): _finds_false_negatives},
    "judge_negatives": {RERANKERS: _judges},
    "encode_corpus": {RETRIEVERS: _encodes_a_corpus},
    "size_frontier": {RETRIEVERS: _finds_sizes},
    "finetune": {RETRIEVERS: _finetunes},
    "score_rows": {RERANKERS: _learns_from_a_teacher},
    "finetune_reranker": {RERANKERS: _finetunes_a_reranker},
    "distill_query_encoder": {EMBEDDING: _distills},
    "evaluate_pipeline": {RERANKERS: _retrieves_and_reranks},
    "compare_models": {(*RETRIEVERS, *RERANKERS): _compares},
}
"""What is called for which models. All documents that a model takes, it takes in all of these."""

SLOW = {
    "find_false_negatives",
    "encode_corpus",
    "size_frontier",
    "finetune",
    "finetune_reranker",
    "distill_query_encoder",
    "compare_models",
}


def cells() -> Iterator[Any]:
    for call, by_model in CALLS.items():
        for models, run in by_model.items():
            for name in models:
                yield pytest.param(run, name, id=f"{call}-{name}", marks=[pytest.mark.slow] * (call in SLOW))


@pytest.mark.parametrize(("run", "name"), [*cells()])
def test_what_a_model_takes_works_and_all_else_is_refused_by_name(run: Call, name: str, bench: Bench, data) -> None:
    for kind in KINDS:
        if kind in TAKES[name]:
            run(bench, name, data[kind], kind)
            continue
        with pytest.raises(MmtuneError, match=rf"documents='{kind}'".replace("+", r"\+")):
            run(bench, name, data[kind], kind)
    taken = {kind: data[kind] for kind in TAKES[name]}
    run(bench, name, RetrievalDataset.concatenate(taken), "mixed")
    other = next(kind for kind in KINDS if kind not in TAKES[name])
    with pytest.raises(MmtuneError, match=rf"made of '{other}'".replace("+", r"\+")):
        run(bench, name, RetrievalDataset.concatenate({**taken, other: data[other]}), "mixed")


@pytest.mark.parametrize("call", CALLS)
def test_models_of_another_kind_are_refused_by_name(call: str, bench: Bench, data) -> None:
    runs = CALLS[call].values()
    known = {name for models in CALLS[call] for name in models}
    for models in (EMBEDDING, LATE, RERANKERS):
        if known.isdisjoint(models):
            for run in runs:
                with pytest.raises(
                    ConfigError, match=r"is no re|expected a|writes no|late-inter|trains what|scores pairs"
                ):
                    run(bench, models[0], data["text"], "text")


@pytest.mark.parametrize("name", TAKES)
def test_what_a_server_runs_is_exported_and_all_else_is_refused_by_name(name: str, bench: Bench) -> None:
    if name in EXPORT:
        assert (export_model(bench.model(name), bench.new_folder()) / "config.json").exists()
    else:
        with pytest.raises(ConfigError, match=r"checkpoints of the type 'clap' is not known|is a Router"):
            export_model(bench.model(name), bench.new_folder())


def tables() -> str:
    """What ``docs/beyond_pages.md`` says under "What works with what"."""
    lines = [["`documents=`", *(f"`{kind}`" for kind in KINDS), "`export_model`"]]
    for name, kinds in TAKES.items():
        lines.append([name, *(_yes(kind in kinds) for kind in KINDS), _yes(name in EXPORT)])
    groups = {"embedding models": EMBEDDING, "late interaction": LATE, "rerankers": RERANKERS}
    calls = [["", *groups]]
    for call, by_models in CALLS.items():
        called = {name for models in by_models for name in models}
        calls.append([f"`{call}`", *(_yes(called >= {*names}) for names in groups.values())])
    return "\n\n".join(map(_as_markdown, (lines, calls)))


def _yes(works: bool) -> str:
    return "yes" if works else "no"


def _as_markdown(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def test_the_page_says_what_works() -> None:
    page = Path(__file__).parent.parent.joinpath("docs", "beyond_pages.md").read_text(encoding="utf-8")
    for table in tables().split("\n\n"):
        assert table in page, f"docs/beyond_pages.md should say\n\n{table}"
