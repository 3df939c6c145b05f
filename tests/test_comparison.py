"""Models side by side: numbers of the evaluators, each measured once, failures apart, differences tested."""

import gc
import json
import logging
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from mmtune import (
    Comparison,
    ConfigError,
    DatasetError,
    ImageDecodeError,
    MissingExtraError,
    RetrievalDataset,
    build_evaluator,
    build_late_interaction,
    build_reranker,
    compare_models,
    compare_per_query,
    compose_router,
    evaluate_pipeline,
    load_model,
)
from mmtune.evaluation.significance import correct_for_several
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_siglip, tiny_text_encoder

DIMS, DEPTH = (128, 32), 6


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many documents were encoded by each kind of model, and pairs scored."""
    counts: Counter = Counter()
    for kind, method in ((SentenceTransformer, "encode_document"), (MultiVectorEncoder, "encode_document")):
        _count(monkeypatch, counts, kind, method)
    _count(monkeypatch, counts, CrossEncoder, "predict")
    return counts


def _count(monkeypatch: pytest.MonkeyPatch, counts: Counter, kind: type, method: str) -> None:
    original = getattr(kind, method)

    def counted(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counts[kind.__name__] += len(inputs)
        return original(self, inputs, *args, **kwargs)

    monkeypatch.setattr(kind, method, counted)


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(generated_pages(16, page_size_px=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints: ``clip``, ``siglip``, ``late``, ``reranker``, and ``empty``, which is none."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny_clip(folder / "clip")
    tiny_siglip(folder / "siglip")
    vlm = tiny_llava(folder / "vlm")
    build_late_interaction(vlm).save_pretrained(str(folder / "late"))
    build_reranker(vlm).save_pretrained(str(folder / "reranker"))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, Any]:
    """Three models, a pipeline, and one that fails."""
    names = ("clip", "siglip", "late")
    both = (folder / "clip", folder / "reranker")
    return {**{name: str(folder / name) for name in names}, "both": both, "broken": folder / "empty"}


def compare(models: Any, data: Any, **options: Any) -> Comparison:
    return compare_models(models, data, **{"show_progress_bar": False, "depth": DEPTH, **options})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "new"


@pytest.fixture(scope="module")
def compared(models: dict[str, Any], data: RetrievalDataset, store: Path) -> Comparison:
    return compare(models, data, truncate_dims=DIMS, store=store)


def test_three_models_a_pipeline_and_one_that_fails(compared: Comparison) -> None:
    assert {row.name: row.kind for row in compared.rows} == {
        **{"clip": "retriever", "siglip": "retriever", "late": "late interaction"},
        "both": "pipeline",
    }
    assert list(compared.failures) == ["broken"]
    assert "holds no checkpoint" in compared.failures["broken"]
    assert [row.ndcg for row in compared.rows] == sorted((row.ndcg for row in compared.rows), reverse=True)


def test_a_further_model_encodes_only_itself(compared, models, data, store: Path, encoded: Counter, tmp_path) -> None:
    again = compare(models, data, truncate_dims=DIMS, store=store)
    assert not encoded
    assert again == compared
    further = tiny_clip(tmp_path / "further", seed=1)
    more = compare({**models, "further": further}, data, truncate_dims=DIMS, store=store)
    assert encoded == {"SentenceTransformer": len(data.corpus)}
    assert {row.name for row in more.rows} == {*(row.name for row in compared.rows), "further"}


def test_the_numbers_are_those_of_the_evaluators(compared: Comparison, models, data: RetrievalDataset) -> None:
    rows = {row.name: row for row in compared.rows}
    for name, dims in (("clip", [32]), ("siglip", [32]), ("late", [])):
        model = build_late_interaction(models[name]) if name == "late" else load_model(models[name])
        evaluator = build_evaluator(data, model=model, truncate_dims=dims, show_progress_bar=False)
        metrics = evaluator(model)
        assert rows[name].per_query == evaluator.per_query
        assert rows[name].ndcg == pytest.approx(metrics[evaluator.metric_name(model)])
        assert rows[name].parameters == sum(each.numel() for each in model.parameters())
    report = evaluate_pipeline(*models["both"], data, depths=[DEPTH], show_progress_bar=False)
    assert rows["both"].per_query["vdr-rerank_ndcg@10"] == pytest.approx(report.per_query[f"ndcg@10_after@{DEPTH}"])
    assert rows["both"].ndcg != rows["clip"].ndcg
    assert rows["both"].query_s > rows["clip"].query_s
    assert min(min(row.page_s, row.query_s) for row in compared.rows) > 0


def test_bytes_of_a_document(compared: Comparison, models, data: RetrievalDataset) -> None:
    sizes = {row.name: [(size.dimension, size.bytes_per_document) for size in row.sizes] for row in compared.rows}
    assert sizes["clip"] == [(128, 512), (32, 128)]
    assert sizes["siglip"] == [(64, 256), (32, 128)]
    assert sizes["both"] == [(128, 512)]
    late = MultiVectorEncoder(models["late"], device="cpu")
    pages = list(data.corpus.cast_column("image", Image())["image"])
    vectors = sum(item.numel() for item in late.encode_document([{"image": page} for page in pages]))
    assert sizes["late"] == [(128, pytest.approx(4 * vectors / len(pages)))]


def test_the_table(compared: Comparison) -> None:
    lines = str(compared).splitlines()
    assert lines[0] == f"vdr: 16 queries, {compared.num_documents} documents"
    header, rows = lines[2], lines[4:8]
    assert header.split()[:4] == ["model", "kind", "parameters", "nDCG@10"]
    assert "128d" not in header
    assert "32d" in header
    assert [row.split()[0] for row in rows] == [row.name for row in compared.rows]
    assert "best" in rows[0]
    assert lines[-2:] == ["Not measured:", f"- broken: {compared.failures['broken']}"]


class Planted(SentenceTransformer):
    """Finds document "7" for the query "7", and a wrong one for queries from ``right`` on; "7 b" is another query."""

    def __init__(self, right: int, size: int = 32) -> None:
        super().__init__(modules=[torch.nn.Linear(size, 2)], similarity_fn_name="dot", device="cpu")
        self.right, self.size = right, size
        for weights in self.parameters():
            weights.data.fill_(right)  # what it is known by

    def supports(self, modality: Any) -> bool:
        return True

    def get_embedding_dimension(self) -> int:
        return self.size

    def encode_document(self, inputs: Any, **options: Any) -> torch.Tensor:
        return torch.eye(self.size)[[int(each["text"].split()[0]) for each in inputs]]

    def encode_query(self, inputs: Any, **options: Any) -> torch.Tensor:
        found = self.encode_document(inputs)
        wrong = [at for at, each in enumerate(inputs) if int(each["text"].split()[0]) >= self.right]
        found[wrong] = found[wrong].roll(1, dims=1)
        return found


def numbered(count: int, *suffixes: str) -> RetrievalDataset:
    """Documents "0" to ``count``, and for each a query for each suffix."""
    ids = [str(at) for at in range(count)]
    query_ids = [f"{at}{suffix}" for at in ids for suffix in suffixes or ("",)]
    answers = [each.split()[0] for each in query_ids]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": ids}),
        Dataset.from_dict({"query_id": query_ids, "text": query_ids}),
        Dataset.from_dict({"query_id": query_ids, "document_id": answers, "score": [1] * len(query_ids)}),
    )


def test_differences_to_the_best_are_tested_and_corrected() -> None:
    models = {"weak": Planted(9), "best": Planted(30), "near": Planted(29), "worse": Planted(24)}
    found = compare(models, numbered(30), documents="text")
    assert [row.name for row in found.rows] == ["best", "near", "worse", "weak"]
    best, *others = found.rows
    values = [row.per_query["vdr_dot_ndcg@10"] for row in others]
    single = [compare_per_query(best.per_query["vdr_dot_ndcg@10"], each) for each in values]
    assert [row.against_best.p_value for row in others] == correct_for_several([each.p_value for each in single])
    # of six queries each p is 0.03, and too large for one of three
    assert [each.outcome for each in single] == ["MARGINAL", "REGRESSION", "REGRESSION"]
    assert [row.against_best.outcome for row in others] == ["MARGINAL", "MARGINAL", "REGRESSION"]
    assert best.against_best is None
    assert found.num_clusters == 30


def test_queries_about_one_page_are_one_cluster() -> None:
    found = compare({"a": Planted(6), "b": Planted(0)}, numbered(9, "", " b", " c"), documents="text")
    assert (found.num_queries, found.num_clusters) == (27, 9)
    assert found.rows[1].against_best.num_clusters == 9
    assert found.rows[1].against_best.outcome == "MARGINAL"
    assert "Too few queries to tell models apart: 9 independent groups" in str(found)


def test_models_stand_side_by_side_as_they_are_given(data: RetrievalDataset, folder: Path) -> None:
    router = compose_router(tiny_text_encoder(folder / "text", hidden_size=32), tiny_siglip(folder / "image"))
    given = {"router": router, "built": load_model(folder / "clip"), "loaded": lambda: load_model(folder / "clip")}
    found = {row.name: row for row in compare(given, data, name="own").rows}
    assert found["router"].kind == "Router"
    assert found["built"].per_query == found["loaded"].per_query
    assert list(found["built"].per_query) == ["own_cosine_ndcg@10"]


def test_a_retriever_and_its_pipeline_encode_once(folder: Path, data: RetrievalDataset, encoded: Counter) -> None:
    clip, reranker = str(folder / "clip"), str(folder / "reranker")
    found = compare({"alone": clip, "both": (clip, reranker)}, data)
    assert encoded["SentenceTransformer"] == len(data.corpus)
    assert encoded["CrossEncoder"] == DEPTH * len(data)
    assert len(found.rows) == 2


def test_what_was_loaded_is_let_go_before_the_next(data: RetrievalDataset, folder: Path) -> None:
    loaded: list[weakref.ref] = []

    def load() -> SentenceTransformer:
        assert [each() for each in loaded] == [None] * len(loaded)
        model = load_model(folder / "clip")
        loaded.append(weakref.ref(model))
        return model

    def fail() -> SentenceTransformer:
        model = load()  # held by the frame of the error
        model.right = 0
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    gc.disable()  # nothing is let go by chance
    try:
        found = compare({"a": load, "b": fail, "c": partial(load)}, data)
    finally:
        gc.enable()
    assert [row.name for row in found.rows] == ["a", "c"]
    assert len(loaded) == 3
    assert "Lower batch_size or max_pixels" in found.failures["b"]


def test_failures_have_reasons(data: RetrievalDataset, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class NotFinite(Planted):
        def encode_document(self, inputs: Any, **options: Any) -> torch.Tensor:
            return torch.full((len(inputs), self.size), torch.nan)

        encode_query = encode_document

    given = {
        "clip": folder / "clip",
        "missing": folder / "not there",
        "texts": tiny_text_encoder(folder / "texts"),
        "reranker": folder / "reranker",
        "number": lambda: 5,
        "nan": NotFinite(16),
        "bug": stumble,
        "pair": (folder / "clip", folder / "clip"),
    }
    with caplog.at_level(logging.WARNING):
        found = compare(given, data)
    assert [row.name for row in found.rows] == ["clip"]
    reasons = {
        **{"missing": "does not exist", "texts": "embeds no images"},
        **{"reranker": "is a reranker. It sorts", "number": "no retriever"},
        **{"nan": "not finite", "bug": "IndexError", "pair": "reranker"},
    }
    for name, reason in reasons.items():
        assert reason in found.failures[name]
        assert f"{name} could not be measured" in caplog.text
    assert "Traceback" in caplog.text


def test_where_every_model_fails_there_is_nothing_to_return(data: RetrievalDataset, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"None of the 2 models could be measured:\n- a: .*no checkpoint.*\n- b: "):
        compare({"a": folder / "empty", "b": lambda: 5}, data)


def interrupt() -> SentenceTransformer:
    raise KeyboardInterrupt("now")


def stumble() -> SentenceTransformer:
    raise IndexError("list index out of range")


def test_after_an_interruption_what_was_measured_is_there(data, folder: Path, tmp_path, encoded: Counter) -> None:
    with pytest.raises(KeyboardInterrupt, match="now"):
        compare({"a": folder / "clip", "b": interrupt}, data, store=tmp_path)
    assert encoded.total() == len(data.corpus)
    assert len(compare({"a": folder / "clip"}, data, store=tmp_path).rows) == 1
    assert encoded.total() == len(data.corpus)


def test_a_page_that_nobody_can_read_ends_the_comparison(folder: Path, data: RetrievalDataset) -> None:
    corpus = data.corpus.to_list()
    corpus[3]["image"] = {"bytes": b"no image", "path": None}
    damaged = RetrievalDataset(Dataset.from_list(corpus, features=data.corpus.features), data.queries, data.qrels)
    with pytest.raises(ImageDecodeError, match=corpus[3]["document_id"]):
        compare({"a": folder / "clip", "b": folder / "siglip"}, damaged)


# The store


def one_more_judgement(data: RetrievalDataset) -> RetrievalDataset:
    ids = data.corpus["document_id"][:], data.queries["query_id"][:]
    rows = [*data.qrels.to_list(), {"query_id": ids[1][0], "document_id": ids[0][-1], "score": 2}]
    return RetrievalDataset(data.corpus, data.queries, Dataset.from_list(rows, features=data.qrels.features))


def another_page(data: RetrievalDataset) -> RetrievalDataset:
    other = RetrievalDataset.from_id_rows(generated_pages(16, page_size_px=64, seed=1))
    images = [other.corpus[0]["image"], *data.corpus["image"][1:]]
    rows = [{**row, "image": image} for row, image in zip(data.corpus.to_list(), images, strict=True)]
    return RetrievalDataset(Dataset.from_list(rows, features=data.corpus.features), data.queries, data.qrels)


def with_prompt(folder: Path) -> None:
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "prompts": {"query": "find: ", "document": ""}}))


def with_other_weights(folder: Path) -> None:
    weights = next(folder.rglob("model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)


@pytest.mark.parametrize(
    ("change_data", "change_model", "options"),
    [
        (one_more_judgement, None, {}),
        (another_page, None, {}),
        (None, with_prompt, {}),
        (None, with_other_weights, {}),
        (None, None, {"load_kwargs": {"dtype": "bfloat16"}}),
    ],
)
def test_what_has_changed_is_measured_again(
    change_data: Callable | None,
    change_model: Callable | None,
    options: dict,
    data: RetrievalDataset,
    folder: Path,
    tmp_path: Path,
    encoded: Counter,
) -> None:
    load_model(folder / "clip").save_pretrained(str(tmp_path / "clip"))
    models = {"clip": tmp_path / "clip"}
    compare(models, data, store=tmp_path / "store")
    shutil.copytree(tmp_path / "clip", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("another card")
    compare({"other name": tmp_path / "moved"}, data, store=tmp_path / "store")
    assert encoded.total() == len(data.corpus)
    if change_model:
        change_model(tmp_path / "clip")
    changed = change_data(data) if change_data else data
    compare(models, changed, store=tmp_path / "store", **options)
    assert encoded.total() == len(data.corpus) + len(changed.corpus)


def test_a_model_in_memory_is_known_by_its_weights(data, folder: Path, tmp_path: Path, encoded: Counter) -> None:
    for _ in range(2):
        compare([load_model(folder / "clip")], data, store=tmp_path)
    assert encoded.total() == len(data.corpus)
    model = load_model(folder / "clip")
    next(model.parameters()).data += 1
    compare([model], data, store=tmp_path)
    assert encoded.total() == 2 * len(data.corpus)
    model.similarity_fn_name = "euclidean"
    assert list(compare([model], data, store=tmp_path).rows[0].per_query) == ["vdr_euclidean_ndcg@10"]
    assert encoded.total() == 3 * len(data.corpus)


def test_folders_of_a_checkpoint_may_be_links(data, folder: Path, tmp_path: Path, encoded: Counter) -> None:
    model = load_model(folder / "clip")
    model.append(Normalize())
    model.save_pretrained(str(tmp_path / "clip"))
    part = next(path for path in (tmp_path / "clip").iterdir() if path.is_dir())
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    compare([tmp_path / "clip"], data, store=tmp_path / "store")
    (tmp_path / "elsewhere" / "more.json").write_text("{}")
    compare([tmp_path / "clip"], data, store=tmp_path / "store")
    assert encoded.total() == 2 * len(data.corpus)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '{"format_version": 1}', '{"format_version": 0}'])
def test_a_damaged_file_is_made_again(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"documents": "text", "store": tmp_path / "store"}
    whole = compare([Planted(9)], numbered(12), **options)
    (path,) = (tmp_path / "store").glob("*.json")
    path.write_text(content)
    again = compare([Planted(9)], numbered(12), **options)
    assert "is measured again" in caplog.text
    assert again.rows[0].per_query == whole.rows[0].per_query
    assert json.loads(path.read_text())["dimensions"] == [32]


def test_a_full_disk_loses_no_measurement(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    found = compare([Planted(9)], numbered(12), documents="text", store=tmp_path / "store")
    assert len(found.rows) == 1
    assert "No space left on device" in caplog.text


def test_ids_of_any_kind_come_back_from_the_store(tmp_path: Path) -> None:
    data = numbered(12, "", " 'é\"/\n|$")
    both = [compare([Planted(9)], data, documents="text", store=tmp_path) for _ in range(2)]
    assert both[0] == both[1]
    assert list(both[1].rows[0].per_query["vdr_dot_ndcg@10"]) == data.queries["query_id"][:]


# The plot


def test_the_plot(compared: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for ending in ("png", "svg"):
        compared.plot(tmp_path / "new" / f"models.{ending}")
    drawn = (tmp_path / "new" / "models.svg").read_text()
    assert all(f"<!-- {row.name} -->" in drawn for row in compared.rows)
    assert "<!-- parameters -->" in drawn
    with pytest.raises(ConfigError, match=r"models\.doc'.*ends in one of"):
        compared.plot(tmp_path / "models.doc")
    with pytest.raises(ConfigError, match="can't be written to"):
        compared.plot(tmp_path / "new" / "models.png" / "below.png")
    for wrong in (None, 5, ""):
        with pytest.raises(ConfigError, match="path="):
            compared.plot(wrong)


def test_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = compare({"$x^2": Planted(9), "a_b|<é>": Planted(9)}, numbered(1), documents="text")
    found.plot(tmp_path / "models.svg")
    assert "<!-- $x^2 -->" in (tmp_path / "models.svg").read_text()


def test_a_plot_without_matplotlib(compared: Comparison, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mmtune.report.plots.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs matplotlib.*pip install matplotlib.*\[report\]"):
        compared.plot(tmp_path / "models.png")


# What is given


def test_a_list_is_named_by_what_tells_one_from_another(tmp_path: Path) -> None:
    paths = []
    for run in ("one", "two"):
        paths.append(tmp_path / run / "final")
    given = [*paths, Planted(9), (Planted(3), "x/reranker")]
    found = compare(given, numbered(12), documents="text")
    assert list(found.failures) == ["one/final", "two/final", "Planted + x/reranker"]
    assert [row.name for row in found.rows] == ["Planted"]


MODELS = [Planted(9)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[({"models": each}, "models=.*expected several") for each in (None, 5, "path", MODELS[0], {"a"})],
        *[({"models": each}, "models is empty") for each in ([], {})],
        *[({"models": {name: MODELS[0]}}, "models holds the name") for name in (5, "", " ", "a\nb", None)],
        *[({"models": [each]}, "Expected a model, the path") for each in (5, None, [], b"x", {}, Planted)],
        *[({"models": [each]}, "is a tuple of") for each in ((MODELS[0],), (MODELS[0],) * 3)],
        ({"models": [(MODELS[0], None)]}, "Expected a model, the path"),
        ({"models": MODELS * 2}, "1 names in models stand for several, e.g. 'Planted'"),
        *[({"truncate_dims": each}, "truncate_dims") for each in (8, "8", [0], [2.5], [True], None)],
        *[({"name": each}, "name=") for each in ("", "a/b", 5, None)],
        *[({"depth": each}, "depth=") for each in (0, -1, 2.5, True, None, 101)],
        *[({"batch_size": each}, "batch_size=") for each in (0, "4", None, True)],
        *[({"documents": each}, "documents=") for each in ("page", None, 5, "image")],
        *[({"show_progress_bar": each}, "show_progress_bar=") for each in ("no", 1, None)],
        *[({"store": each}, "store=") for each in (5, "", ["a"])],
        *[({"load_kwargs": each}, "load_kwargs=") for each in (5, "cpu", ["a"], {5: 5})],
        ({"load_kwargs": {"max_pixel": 5}}, "know no argument 'max_pixel'. The nearest is 'max_pixels'"),
        ({"load_kwargs": {"max_pixels": 0}}, "max_pixels"),
        ({"load_kwargs": {"dtype": "float3"}}, "dtype"),
        ({"load_kwargs": {"device": "nowhere"}}, "device='nowhere'"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_runs(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare_models(**{"models": MODELS, "dataset": numbered(4), "documents": "text", **given})


def test_a_store_that_cannot_be_written_to(tmp_path: Path, encoded: Counter) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file' can't be written to"):
        compare(MODELS, numbered(4), documents="text", store=tmp_path / "file")
    assert not encoded


def test_data_that_cannot_be_asked_is_refused(data: RetrievalDataset) -> None:
    nothing = RetrievalDataset(data.corpus, data.queries.select([]), data.qrels.select([]))
    with pytest.raises(DatasetError, match="generate_queries"):
        compare(MODELS, nothing)
    with pytest.raises(DatasetError, match="is no dataset"):
        compare(MODELS, 5)
