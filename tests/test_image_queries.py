"""Queries that are images, alone or beside a text: read, compared, kept, measured and trained as documents are."""

import io
import logging
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from sentence_transformers import (
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from comparing import assert_same_weights, weights, without_weights
from mmtune import (
    ConfigError,
    ConflictFreeBatchSampler,
    DatasetError,
    ImageDecodeError,
    RetrievalDataset,
    build_evaluator,
    build_late_interaction,
    build_reranker,
    build_reranking_evaluator,
    compose_router,
    evaluate_pipeline,
    find_false_negatives,
    finetune,
    finetune_reranker,
    load_model,
    mine_hard_negatives,
)
from mmtune.data.intake import leaks_between
from mmtune.data.rows import view_of
from mmtune.models.routes import freeze_unreached
from mmtune.testing import generated_pages, tiny_clip

QUIET = {"show_progress_bar": False}
SHORT = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "disable_tqdm": True,
    "report_to": "none",
}


def png(red: int, green: int = 0, side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (red, green, 0)).save(buffer, "png")
    return buffer.getvalue()


def asking(
    texts: list[str | None],
    images: list[bytes | None] | None,
    answers: list[tuple[str, str]] | None = None,
    num_documents: int = 6,
    negatives: dict[str, list[str]] | None = None,
    ids: list[str] | None = None,
) -> RetrievalDataset:
    """Queries q0, q1, ... over red pages d0, d1, ..., of which the one with its number answers each."""
    ids = ids or [f"q{at}" for at in range(len(texts))]
    answers = answers or [(query_id, f"d{at}") for at, query_id in enumerate(ids)]
    queries = {"query_id": ids, "text": texts} | ({} if images is None else {"image": images})
    qrels = {
        "query_id": [query for query, _ in answers],
        "document_id": [document for _, document in answers],
        "score": [1] * len(answers),
    }
    listed = negatives and {"query_id": list(negatives), "document_ids": list(negatives.values())}
    return RetrievalDataset(
        Dataset.from_dict(
            {
                "document_id": [f"d{at}" for at in range(num_documents)],
                "image": [png(at) for at in range(num_documents)],
            }
        ),
        Dataset.from_dict(queries),
        Dataset.from_dict(qrels),
        Dataset.from_dict(listed) if listed else None,
    )


def crop_of(content: bytes) -> bytes:
    image = Image.open(io.BytesIO(content))
    buffer = io.BytesIO()
    image.crop((0, 0, int(image.width * 0.7), int(image.height * 0.7))).save(buffer, "png")
    return buffer.getvalue()


def cropped(num_queries: int, seed: int = 0) -> Dataset:
    """Pages, each with a part of it to ask with where it has a query."""
    rows = generated_pages(num_queries, seed=seed).cast_column("image", ImageFeature(decode=False))
    crops = [crop_of(page["bytes"]) if text else None for page, text in zip(rows["image"], rows["query"], strict=True)]
    return rows.add_column("query_image", crops)


@pytest.fixture(scope="module")
def crops() -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(cropped(12))


@pytest.fixture(scope="module")
def clip(clip_path: str) -> SentenceTransformer:
    return load_model(clip_path, device="cpu")


# which queries are the same


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_blank_text_beside_an_image_is_no_shared_text_and_a_photo_under_two_ids_is_one_query(blank):
    data = asking([blank, blank, blank], [png(50), png(51), png(50)])
    for kind in ("image", None):
        numbers = data.relevance_of("image", kind).text.tolist()
        assert numbers == [0, 1, 0]
    # what is relevant to the same photo under another id is no negative
    rows = data.training_rows(0, queries="image").with_format(None)
    assert rows["relevance_group"][:] == [0, 1, 0]
    places, ids = view_of(data.training_rows(0, queries="image")).relevant_to(np.array([0, 1]))
    assert dict(zip(ids.to_pylist(), places.tolist(), strict=True)) == {"d0": 0, "d2": 0, "d1": 1}


def test_what_queries_selects_decides_which_are_the_same():
    texts, images = ["of 2023", "of 2023", "of 2024", "of 2024"], [png(1), png(2), png(1), png(1)]
    data = asking(texts, images)
    same = {kind: data.relevance_of("image", kind).text.tolist() for kind in ("text", "image", "text+image", None)}
    assert same == {"text": [0, 0, 1, 1], "image": [0, 1, 0, 0], "text+image": [0, 1, 2, 2], None: [0, 1, 2, 2]}


def test_batches_keep_apart_what_one_photo_is_relevant_to_and_nothing_else():
    photos = [png(100 + at // 2) for at in range(12)]
    data = asking([None] * 12, photos, num_documents=12)
    rows = data.training_rows(0, queries="image")
    sampler = ConflictFreeBatchSampler(rows, batch_size=6, drop_last=False)
    batches = [[rows.with_format(None)[row]["query_id"] for row in batch] for batch in sampler]
    assert [len(batch) for batch in batches] == [6, 6]  # a shared blank text would give batches of one
    photo = {f"q{at}": at // 2 for at in range(12)}
    assert all(len({photo[query_id] for query_id in batch}) == 6 for batch in batches)
    by_text = asking(["the same"] * 12, photos, num_documents=12).training_rows(0)
    assert {len(batch) for batch in ConflictFreeBatchSampler(by_text, batch_size=6, drop_last=False)} == {1}


def test_filling_and_mining_pass_over_what_answers_the_same_photo(clip):
    photos = [png(100), png(100), png(101)]
    data = asking([None] * 3, photos, num_documents=4, negatives={"q0": ["d1", "d2"], "q1": [], "q2": []})
    rows = data.training_rows(2, queries="image")
    for row in rows.with_format(None):
        assert not {"d0", "d1"} & set(row["negative_document_ids"]) or row["query_id"] == "q2"
    assert view_of(rows).chosen["refused"] == 1  # d1, the answer of the same photo under another id
    mined = mine_hard_negatives(data, clip, queries="image", num_negatives=2, relative_margin=None, **QUIET)
    listed = dict(zip(mined.negatives["query_id"], mined.negatives["document_ids"], strict=True))
    assert listed["q0"] == listed["q1"]
    assert set(listed["q0"]) == {"d2", "d3"}
    assert "d2" not in listed["q2"]


def test_one_page_under_two_forms_of_storage_is_one_query(tmp_path):
    path = tmp_path / "photo with ünïcode 'quotes'.png"
    path.write_bytes(png(7))
    images = [{"bytes": png(7), "path": None}, {"bytes": None, "path": str(path)}, {"bytes": png(8), "path": None}]
    queries = Dataset.from_dict({"query_id": [1, 2, 3], "image": images}).cast_column("image", ImageFeature())
    base = asking(["a", "b", "c"], None)
    qrels = Dataset.from_dict({"query_id": [1, 2, 3], "document_id": ["d0", "d1", "d2"], "score": [1, 2, 3]})
    data = RetrievalDataset(base.corpus, queries.shuffle(seed=1), qrels)
    numbers = dict(zip(data.queries["query_id"], data.relevance_of("image", "image").text.tolist(), strict=True))
    assert numbers["1"] == numbers["2"] != numbers["3"]
    assert data.queries["text"][:] == [None] * 3


def test_a_split_keeps_one_photo_on_one_side_and_leaks_are_found_by_bytes():
    photos = [png(100 + at // 2) for at in range(12)]
    data = asking([None] * 12, photos, num_documents=12)
    train, evaluation = data.split(4)
    assert len(evaluation) == 4
    assert leaks_between(train, evaluation).query_texts == ()
    sides = [{image["bytes"] for image in side.queries["image"]} for side in (train, evaluation)]
    assert not sides[0] & sides[1]
    one, other = asking([None, None], [png(1), png(2)]), asking(["x", None], [png(3), png(2)], ids=["a", "b"])
    assert leaks_between(one, other).query_texts == (("q1", "b"),)
    assert leaks_between(one, other, "text").query_texts == ()
    leaked = one.audit(against=other, **QUIET)["leaked_queries"]
    assert [example.query_ids for example in leaked.examples] == [("q1", "b")]


def test_texts_of_a_frame_are_found_among_others():
    one = RetrievalDataset.from_id_rows(generated_pages(6, page_size_px=64))
    of_frame = one.queries.cast_column("text", Value("large_string"))
    other = RetrievalDataset(one.corpus, of_frame, one.qrels)
    assert len(leaks_between(one, other).query_texts) == len(leaks_between(other, one).query_texts) == 6
    assert one.audit(against=other, **QUIET)["leaked_queries"].count == 6


def test_a_split_ties_what_it_is_told_to():
    data = asking(["the same"] * 6, [png(at) for at in range(6)])
    assert [len(side) for side in data.split(2)] == [4, 2]
    with pytest.raises(DatasetError, match="the text 'the same'"):
        data.split(2, queries="text")


# in and out


def test_rows_of_each_layout_bring_images_that_ask(crops):
    rows = cropped(12)
    by_id = {row["id"]: row["query_image"] for row in rows}
    ids = crops.queries["query_id"][:]
    assert len(crops) == 12
    for query in crops.queries:
        assert query["image"]["bytes"] == by_id[query["query_id"]]
        assert query["text"]
    alone = RetrievalDataset.from_id_rows(rows.remove_columns("query").shuffle(seed=3))
    assert sorted(alone.queries["query_id"]) == sorted(crops.queries["query_id"])
    assert {row["query_id"]: row["image"]["bytes"] for row in alone.queries} == {
        row["query_id"]: row["image"]["bytes"] for row in crops.queries
    }
    renamed = rows.rename_column("query_image", "photo")
    named = RetrievalDataset.from_id_rows(renamed, query_image_column="photo")
    assert named.queries["image"][:] == crops.queries["image"][:]
    assert "image" not in RetrievalDataset.from_id_rows(rows, query_image_column=None).queries.column_names
    by_type = RetrievalDataset.from_id_rows(rows.remove_columns("query").rename_column("query_image", "query"))
    assert sorted(image["bytes"] for image in by_type.queries["image"]) == sorted(by_id[each] for each in ids)
    columns = rows.filter(lambda row: row["query"] is not None).select_columns(["query", "query_image", "image"])
    flat = RetrievalDataset.from_columns(columns)
    assert [image["bytes"] for image in flat.queries["image"]] == columns["query_image"][:]
    assert "query_image" not in flat.corpus.column_names


def test_a_beir_set_brings_them_under_either_name():
    data = asking(["a", None], [png(1), png(2)])
    for name in ("image", "query_image"):
        queries = data.queries if name == "image" else data.queries.rename_column("image", name)
        built = RetrievalDataset.from_beir(data.corpus, queries, data.qrels)
        assert built.queries["image"][:] == data.queries["image"][:]
        assert built.queries["text"][:] == ["a", None]
        alone = RetrievalDataset.from_beir(data.corpus, queries.remove_columns("text"), data.qrels)
        assert alone.queries["text"][:] == [None, None]
    typed = data.queries.remove_columns("text").rename_column("image", "query")
    assert RetrievalDataset.from_beir(data.corpus, typed, data.qrels).queries["image"][:] == data.queries["image"][:]
    lacking = RetrievalDataset.from_beir(
        data.corpus,
        Dataset.from_dict({"query_id": ["q0", "q1"], "text": [None, " "], "image": [png(1), None]}),
        data.qrels,
    )
    assert (lacking.queries["query_id"][:], lacking.notes.blank_queries) == (["q0"], 1)


@pytest.mark.parametrize("layout", ["save", "beir", "tevatron", "id_rows", "columns"])
def test_written_and_read_again_they_are_the_same(layout, crops, tmp_path):
    folder = tmp_path / layout
    data = RetrievalDataset.from_tables(crops.tables)
    if layout == "save":
        data.save(folder)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what "columns" has no place for
            data.export(folder, layout, show_progress_bar=False)
    loaded = RetrievalDataset.load(folder)
    want = sorted((row["text"], row["image"]["bytes"]) for row in data.queries)
    assert sorted((row["text"], row["image"]["bytes"]) for row in loaded.queries) == want
    assert "| queries | 12 (text and image) |" in (folder / "README.md").read_text()
    answers = dict(zip(loaded.qrels["query_id"], loaded.qrels["document_id"], strict=True))
    pages = {row["document_id"]: row["image"]["bytes"] for row in loaded.corpus}
    expected = dict(zip(data.qrels["query_id"], data.qrels["document_id"], strict=True))
    original = {row["document_id"]: row["image"]["bytes"] for row in data.corpus}
    by_photo = {row["image"]["bytes"]: original[expected[row["query_id"]]] for row in data.queries}
    for row in loaded.queries:
        assert pages[answers[row["query_id"]]] == by_photo[row["image"]["bytes"]]


def test_a_saved_set_with_texts_and_photos_in_files_is_whole_and_joins_others(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(9))
    data = asking(["a", None, None], [None, str(path).encode() and png(1), png(2)])
    queries = Dataset.from_dict({"query_id": ["q0", "q1"], "image": [str(path), None], "text": [None, "b"]})
    outside = RetrievalDataset(data.corpus, queries, data.qrels.filter(lambda row: row["query_id"] != "q2"))
    outside.save(tmp_path / "saved")
    path.unlink()
    loaded = RetrievalDataset.load(tmp_path / "saved")
    assert loaded.queries["image"][0]["bytes"] == png(9)
    both = RetrievalDataset.concatenate([data, loaded, asking(["only text"], None)])
    assert len(both) == 6
    assert both.relevance.text.tolist() == [0, 1, 2, 3, 4, 5]
    assert "queries    6 (text+image)" in repr(both)
    with pytest.raises(DatasetError, match=r"files of 1 pages are missing, e\.g\. .*photo\.png' of query 'q0'"):
        outside.save(tmp_path / "again")


def test_a_table_from_elsewhere_may_not_ask_with_any_file_of_this_machine(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    folder = tmp_path / "table"
    folder.mkdir()
    rows = {"id": ["a", "b"], "query_image": [str(secret), None], "image": [png(2), png(3)]}
    Dataset.from_dict(rows).to_parquet(folder / "rows.parquet")
    with pytest.raises(DatasetError, match=r"secret\.png' of query 'a'"):
        RetrievalDataset.load(folder / "rows.parquet")
    assert len(RetrievalDataset.load(folder / "rows.parquet", allow_outside=True)) == 1


def test_selections_keep_the_photo_of_each_query(crops):
    ids = crops.queries["query_id"][:]
    chosen = crops.select_queries([ids[7], ids[2]])
    want = {row["query_id"]: row["image"]["bytes"] for row in crops.queries}
    assert {row["query_id"]: row["image"]["bytes"] for row in chosen.queries} == {
        each: want[each] for each in (ids[2], ids[7])
    }
    rows = crops.training_rows(1, queries="image").shuffle(seed=5).select([4, 1])
    for row, query_id in zip(rows, rows.with_format(None)["query_id"], strict=True):
        assert np.array_equal(np.asarray(row["query"]), np.asarray(Image.open(io.BytesIO(want[query_id]))))


# reading them


def test_rows_hold_what_queries_says():
    data = asking(["photo.png", "https://example.com/a.png"], [png(1), png(2)])
    (text, _), (image, _), (both, _) = (
        data.training_rows(0, queries=kind)[:]["query"] for kind in ("text", "image", "text+image")
    )
    assert text == "photo.png"
    assert image.getpixel((0, 0)) == (1, 0, 0)
    assert both["text"] == "photo.png"
    assert both["image"].getpixel((0, 0)) == (1, 0, 0)
    for direction, side in (("text_to_image", "query"), ("image_to_text", "document")):
        pairs = data.labeled_pairs(1, queries="image", direction=direction)
        assert pairs[0][side].getpixel((0, 0)) == (1, 0, 0)
        lists = data.labeled_lists(1, queries="text+image", direction=direction)
        value = lists[0]["query"] if side == "query" else lists[0]["documents"][0]
        assert value["text"] == "photo.png"


@pytest.mark.parametrize("where", ["middle", "null", "file"])
def test_an_image_that_cannot_be_read_is_named_with_its_query(where, tmp_path, clip, clip_path):
    broken = {"middle": b"no image", "null": None, "file": None}[where]
    data = asking(["a", "b", "c"], [png(1), broken, png(2)])
    if where == "file":
        images = [{"bytes": None, "path": str(tmp_path / "gone.png")}] * 3
        queries = Dataset.from_dict({"query_id": ["q0", "q1", "q2"], "text": ["a"] * 3, "image": images})
        data = RetrievalDataset(data.corpus, queries.cast_column("image", ImageFeature()), data.qrels)
    if where == "null":
        message = r"1 queries lack what queries='image' reads, e\.g\. 'q1' has no image.*or pass queries='text'"
        for call in (data.training_rows, data.labeled_pairs, data.labeled_lists):
            with pytest.raises(DatasetError, match=message):
                call(0, queries="image")
        for build in (build_evaluator, build_reranking_evaluator):
            with pytest.raises(DatasetError, match=message):
                build(data, queries="image")
        with pytest.raises(DatasetError, match=message):
            mine_hard_negatives(data, clip, queries="image", **QUIET)
        with pytest.raises(DatasetError, match=message):
            finetune(clip, data, queries="image", output_dir=tmp_path / "run")
        with pytest.raises(DatasetError, match=message):
            find_false_negatives(data, clip, queries="image", **QUIET)
        found = data.audit(queries="image", num_examples=None)["incomplete_queries"]
        assert [example.query_ids for example in found.examples] == [("q1",)]
        assert data.without(found).queries["query_id"][:] == ["q0", "q2"]
        assert "incomplete_queries" not in data.audit().counts
        return
    named = r"uery 'q[01]'.*leave the query out"
    with pytest.raises(ImageDecodeError, match=named):
        data.check_pages(show_progress_bar=False)
    with pytest.raises(ImageDecodeError, match=named):
        data.training_rows(0, queries="image")[:]
    with pytest.raises(ImageDecodeError, match=named):
        build_evaluator(data, queries="image", **QUIET)(clip)
    with pytest.raises(ImageDecodeError, match=named):
        finetune(without_weights(clip_path, tmp_path / "clip"), data, queries="image", output_dir=tmp_path / "run")
    assert data.training_rows(0)[:]["query"] == data.queries["text"][:]  # texts ask all the same


@pytest.mark.parametrize("value", ["audio", "video", "photo", "image+text", "", None, 3, ["image"], True])
def test_a_kind_that_is_none_is_an_error_that_says_so(value, clip, tmp_path):
    data = asking(["a", "b", "c"], [png(1), png(2), png(3)])
    calls = [
        lambda: data.training_rows(0, queries=value),
        lambda: data.labeled_pairs(0, queries=value),
        lambda: build_evaluator(data, queries=value),
        lambda: build_reranking_evaluator(data, queries=value, num_candidates=2),
        lambda: mine_hard_negatives(data, clip, queries=value, **QUIET),
        lambda: find_false_negatives(data, clip, queries=value, **QUIET),
        lambda: finetune(clip, data, queries=value, output_dir=tmp_path / "run"),
    ]
    if value is not None:
        calls += [lambda: data.audit(queries=value), lambda: data.split(1, queries=value)]
    for call in calls:
        with pytest.raises(ConfigError, match="queries="):
            call()


def test_a_table_without_the_column_or_without_anything_to_ask_with_is_refused():
    plain = asking(["a", "b"], None)
    with pytest.raises(
        ConfigError, match=r"queries='image' needs a column 'image' in the table of queries.*queries='text'"
    ):
        plain.training_rows(0, queries="image")
    with pytest.raises(DatasetError, match=r"Query 'q1' has no text \(null or blank\) and no image"):
        asking(["a", ""], [png(1), None])
    with pytest.raises(DatasetError, match=r"Query 'q1' has no text \(null or blank\)\. "):
        asking(["a", None], None)
    with pytest.raises(DatasetError, match="Column 'image' holds int64, which can't be images"):
        asking(["a", "b"], [1, 2])
    with pytest.raises(DatasetError, match=r"has no column 'photo'"):
        RetrievalDataset.from_id_rows(cropped(4), query_image_column="photo")
    with pytest.raises(DatasetError, match=r"has no column 'qury'"):
        RetrievalDataset.from_id_rows(cropped(4), query_column="qury")


def test_photos_alone_where_texts_are_read_are_named_and_nothing_is_left_out():
    data = asking([None, "b"], [png(1), png(2)])
    with pytest.raises(DatasetError, match=r"1 queries lack what queries='text' reads, e\.g\. 'q0' has no text"):
        data.training_rows(0)
    with pytest.raises(DatasetError, match=r"'q0' has no text"):
        build_evaluator(data)
    assert data.audit(content=True, **QUIET).counts["short_queries"] == 1  # "b"; what has no text is not short


# at work


@pytest.mark.parametrize("kind", ["clip", "vlm", "late", "router"])
def test_an_evaluator_gives_what_the_host_gives(kind, crops, request, tmp_path):
    data = crops.select_queries(8)
    if kind == "clip":
        model = request.getfixturevalue("clip")
    elif kind == "router":
        paths = (request.getfixturevalue(f"{name}_path") for name in ("text_encoder", "siglip"))
        model = compose_router(*paths, device="cpu")
    else:
        path = request.getfixturevalue("qwen3_vl_path")
        model = (build_late_interaction if kind == "late" else load_model)(path, device="cpu")
    asked = "text+image" if kind in ("vlm", "late") else "image"
    evaluator = build_evaluator(data, model=model, queries=asked, **QUIET)
    found = evaluator(model)
    queries = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in data.queries]
    if asked == "text+image":
        queries = [{"text": text, "image": image} for text, image in zip(data.queries["text"], queries, strict=True)]
    pages = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in data.corpus]
    answers = dict(zip(data.qrels["query_id"], data.qrels["document_id"], strict=True))
    if isinstance(model, MultiVectorEncoder):
        scores = model.similarity(model.encode_query(queries, batch_size=1), model.encode_document(pages, batch_size=1))
        at = [data.corpus["document_id"][:].index(answers[each]) for each in data.queries["query_id"]]
        ranks = (scores > scores[range(len(at)), at].unsqueeze(1) + 1e-6).sum(1).tolist()
        ndcg = float(np.mean([1 / np.log2(rank + 2) if rank < 10 else 0 for rank in ranks]))
        key = "vdr_maxsim_ndcg@10"
    else:
        host = InformationRetrievalEvaluator(
            dict(zip(data.queries["query_id"][:], queries, strict=True)),
            dict(zip(data.corpus["document_id"][:], pages, strict=True)),
            {query_id: {document_id} for query_id, document_id in answers.items()},
            ndcg_at_k=[10],
            show_progress_bar=False,
            name="vdr",
        )
        key = "vdr_cosine_ndcg@10"
        ndcg = host(model)[key]
    assert found[key] == pytest.approx(ndcg, abs=1e-6)
    assert set(evaluator.per_query[key]) == set(data.queries["query_id"])


def test_an_evaluator_gives_the_same_when_the_data_were_saved_and_the_model_too(crops, clip, tmp_path):
    crops.save(tmp_path / "data")
    clip.save_pretrained(str(tmp_path / "model"))
    loaded = RetrievalDataset.load(tmp_path / "data")
    before = build_evaluator(crops, queries="image", **QUIET)(clip)
    assert build_evaluator(loaded, queries="image", **QUIET)(load_model(tmp_path / "model", device="cpu")) == before
    assert before != build_evaluator(crops, **QUIET)(clip)


def test_mining_caches_by_the_photo_and_not_by_the_text(crops, clip, tmp_path):
    options = {"num_negatives": 2, "relative_margin": None, "cache_folder": tmp_path, **QUIET}
    by_kind = {kind: mine_hard_negatives(crops, clip, queries=kind, **options) for kind in ("text", "image", "text")}
    again = mine_hard_negatives(crops, clip, queries="image", num_negatives=2, relative_margin=None, **QUIET)
    assert by_kind["image"].negatives["document_ids"][:] == again.negatives["document_ids"][:]
    assert by_kind["text"].negatives["document_ids"][:] != again.negatives["document_ids"][:]


def test_rerankers_take_them_in_both_directions(crops, qwen3_vl_path, tmp_path):
    data = crops.select_queries(6)
    model = build_reranker(qwen3_vl_path, device="cpu")
    for direction in ("text_to_image", "image_to_text"):
        evaluator = build_reranking_evaluator(data, queries="image", direction=direction, num_candidates=3, **QUIET)
        evaluator(model)
        first = evaluator.lists[0]
        photos = {row["query_id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in data.queries}
        pages = {row["document_id"]: Image.open(io.BytesIO(row["image"]["bytes"])) for row in data.corpus}
        sides = (photos, pages) if direction == "text_to_image" else (pages, photos)
        pairs = [[sides[0][first.asking_id], sides[1][each]] for each in first.candidate_ids]
        scores = model.predict(pairs, prompt_name=direction, show_progress_bar=False)
        best = [first.candidate_ids[at] for at in np.argsort(-scores, kind="stable")]
        assert evaluator.top_ids[first.asking_id] == best
    report = evaluate_pipeline(
        load_model(qwen3_vl_path, device="cpu"), model, data, queries="image", depths=[3], **QUIET
    )
    assert report.num_queries == 6
    result = finetune_reranker(
        model, data, output_dir=tmp_path / "run", queries="text+image", num_negatives=1, **SHORT | {"max_steps": 1}
    )
    assert result.settings["data"]["queries"] == "text+image"


def test_a_run_trains_on_photos_and_says_what_has_no_effect(crops, tmp_path, clip_path, caplog):
    train, evaluation = crops.split(4)
    model = load_model(clip_path, device="cpu", prompts={"query": "Find the page: "})
    with caplog.at_level(logging.WARNING, logger="mmtune"):
        result = finetune(model, train, evaluation, queries="image", output_dir=tmp_path / "run", **SHORT)
    assert [record.message for record in caplog.records if "prompt for queries has no effect" in record.message]
    assert result.settings["training"]["query_prompt_has_no_effect"] is True
    assert result.settings["data"]["queries"] == "image"
    rows = train.training_rows(1, queries="image")
    with pytest.raises(ConfigError, match="queries='text', and the rows were made with queries='image'"):
        finetune(model, rows, output_dir=tmp_path / "rows", **SHORT)
    plan = finetune(model, rows, evaluation, queries="image", output_dir=tmp_path / "plan", dry_run=True, **SHORT)
    assert plan.steps == 2


def test_what_no_image_reaches_is_frozen_and_what_a_text_reaches_is_not(clip_path):
    learns = {}
    for kind in ("text", "image"):
        model = load_model(clip_path, device="cpu")
        freeze_unreached(model, "image", kind)
        learns[kind] = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("text_model" in name for name in learns["text"])
    assert learns["image"] == {name for name in learns["text"] if "text" not in name}


def test_weights_equal_those_of_a_plain_host_script_on_decoded_images(crops, clip_path, tmp_path):
    def args(folder: str) -> SentenceTransformerTrainingArguments:
        return SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=1e-3,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The batch sampler is")
        ours = finetune(
            clip_path, crops, args=args("ours"), queries="image", loss=MultipleNegativesRankingLoss, num_negatives=1
        )
    model = SentenceTransformer(clip_path, device="cpu")
    rows = crops.training_rows(1, queries="image")
    decoded = Dataset.from_list(list(rows), features=Features(dict.fromkeys(rows[0], ImageFeature())))
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=args("theirs"), train_dataset=decoded, loss=loss).train()
    assert_same_weights(weights(ours.model), weights(model))


@pytest.mark.parametrize("kind", ["router by task", "router by modality", "late", "workers"])
def test_each_kind_of_model_trains_on_what_it_takes(kind, crops, tmp_path, request):
    asked, options = "image", {}
    if kind.startswith("router"):
        paths = (request.getfixturevalue(f"{name}_path") for name in ("text_encoder", "siglip"))
        model = compose_router(*paths, device="cpu", route_by=kind.rpartition(" ")[2])
    elif kind == "late":
        model, asked = build_late_interaction(request.getfixturevalue("qwen3_vl_path"), device="cpu"), "text+image"
    else:
        model, options = request.getfixturevalue("clip_path"), {"dataloader_num_workers": 1}
    train, evaluation = crops.split(4)
    result = finetune(model, train, evaluation, queries=asked, output_dir=tmp_path / "run", **SHORT, **options)
    assert build_evaluator(evaluation, model=result.model, queries=asked, **QUIET)(result.model)[
        result.primary_metric
    ] == pytest.approx(result.after[result.primary_metric], abs=1e-6)


def test_a_photo_that_asks_on_both_sides_is_said(clip, tmp_path):
    train = asking(["a", "b", "c", "d"], [png(at) for at in (90, 91, 92, 93)])
    evaluation = asking(["a", "x"], [png(200), png(93)], [("e0", "d4"), ("e1", "d5")], ids=["e0", "e1"])
    with pytest.warns(UserWarning, match=r"1 queries stand on both sides, e\.g\. 'q3' \(there 'e1'\)"):
        finetune(clip, train, evaluation, queries="image", output_dir=tmp_path / "run", **SHORT)


@pytest.mark.parametrize("kind", ["router", "clip", "text"])
def test_what_a_model_cannot_take_is_refused_by_name(kind, crops, tmp_path, request, monkeypatch):
    if kind == "router":
        paths = (request.getfixturevalue(f"{name}_path") for name in ("text_encoder", "siglip"))
        model = compose_router(*paths, device="cpu")
        with pytest.raises(ConfigError, match=r"can't embed queries='text\+image'"):
            finetune(model, crops, queries="text+image", output_dir=tmp_path / "run", **SHORT)
    elif kind == "clip":
        path = without_weights(request.getfixturevalue("clip_path"), tmp_path / "clip")
        with pytest.raises(ConfigError, match=r"can't embed text\+image .*in an input of its own"):
            finetune(path, crops, queries="text+image", output_dir=tmp_path / "run", **SHORT)
    else:
        model = SentenceTransformer(request.getfixturevalue("text_encoder_path"), device="cpu")
        with pytest.raises(ConfigError, match=r"can't embed documents='image'"):
            build_evaluator(crops, queries="image", **QUIET)(model)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crop_finds_its_page(tmp_path, capsys):
    data = RetrievalDataset.from_id_rows(cropped(400).remove_columns("query"))
    train, evaluation = data.split(60)
    started = time.process_time()
    result = finetune(
        tiny_clip(tmp_path / "clip"),
        train,
        evaluation,
        queries="image",
        output_dir=tmp_path / "run",
        num_negatives=0,
        num_train_epochs=40,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        **{name: value for name, value in SHORT.items() if name not in ("max_steps", "per_device_train_batch_size")},
    )
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    with capsys.disabled():
        seconds = time.process_time() - started
        sys.stdout.write(f"\na crop finds its page: ndcg@10 {before:.4f} -> {after:.4f}, {seconds:.0f} s of CPU time\n")
    assert before <= 0.3
    assert after >= 0.8
    saved = SentenceTransformer(str(Path(result.output_dir) / "final"), device="cpu")
    assert build_evaluator(evaluation, queries="image", **QUIET)(saved)[result.primary_metric] == pytest.approx(after)
