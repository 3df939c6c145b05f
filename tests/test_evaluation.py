"""The evaluator gives the host's numbers, for less work, and what the host can't give."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from PIL import Image
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from mmtune import ConfigError, DatasetError, ImageDecodeError, RetrievalDataset, build_evaluator, compose_router
from mmtune.data.documents import DocumentReader
from mmtune.data.query_kinds import QueryReader
from mmtune.evaluation import build_reranking_evaluator
from mmtune.evaluation.metrics import ndcg
from mmtune.inference.encoder import count_cut_texts
from mmtune.inference.mining import mine_hard_negatives


@pytest.fixture(scope="module")
def clip(clip_path: str) -> SentenceTransformer:
    return SentenceTransformer(clip_path, device="cpu")


def hand_built(rows: Dataset, name: str = "vdr", truncate_dim: int | None = None) -> InformationRetrievalEvaluator:
    """The evaluator of the guide, as its script builds it."""
    asking = rows.filter(lambda row: row["query"] is not None)
    return InformationRetrievalEvaluator(
        queries=dict(zip(asking["id"], asking["query"], strict=True)),
        corpus=dict(zip(rows["id"], rows["image"], strict=True)),
        relevant_docs={query_id: {query_id} for query_id in asking["id"]},
        truncate_dim=truncate_dim,
        batch_size=16,
        name=name,
    )


def graded(num_documents: int, judgements: dict[str, dict[str, int]]) -> RetrievalDataset:
    qrels = [(query, document, score) for query, scores in judgements.items() for document, score in scores.items()]
    query_ids, document_ids, scores = (list(column) for column in zip(*qrels, strict=True))
    return RetrievalDataset(
        Dataset.from_dict(
            {"document_id": [str(i) for i in range(num_documents)], "text": [f"t{i}" for i in range(num_documents)]}
        ),
        Dataset.from_dict({"query_id": list(judgements), "text": list(judgements)}),
        Dataset.from_dict({"query_id": query_ids, "document_id": document_ids, "score": scores}),
    )


def score_hits(evaluator: InformationRetrievalEvaluator, hits: dict[str, dict[str, float]]) -> dict:
    """The metrics for hits that are given, without a model."""
    id_by_name = {str(document_id): document_id for document_id in evaluator.corpus_ids}
    evaluator.score_functions = {"cosine": None}
    return evaluator.compute_metrics(
        [
            [{"corpus_id": id_by_name[name], "score": score} for name, score in hits[query_id].items()]
            for query_id in evaluator.queries_ids
        ]
    )


@pytest.mark.parametrize("dim", [None, 64, 16])
def test_equals_the_hand_built_evaluator(pages: Dataset, clip: SentenceTransformer, dim: int | None) -> None:
    ours = build_evaluator(pages, truncate_dims=[64, 16], show_progress_bar=False)(clip)
    theirs = hand_built(pages, "vdr" if dim is None else f"vdr-{dim}d", dim)(clip)
    assert len(theirs) > 10
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


def test_each_document_and_query_is_preprocessed_once_whatever_the_dimensions(
    pages: Dataset, clip: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    preprocess = clip.preprocess
    monkeypatch.setattr(
        clip, "preprocess", lambda inputs, *a, **k: (seen.extend(inputs), preprocess(inputs, *a, **k))[1]
    )
    build_evaluator(pages, truncate_dims=[64, 32, 16], show_progress_bar=False)(clip)
    num_queries = sum(query is not None for query in pages["query"])
    assert sum(isinstance(item, Image.Image) for item in seen) == len(pages)
    assert len(seen) == len(pages) + num_queries


def test_pages_are_decoded_in_small_portions(
    pages: Dataset, clip: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = DocumentReader.read

    def spy(self: DocumentReader, ids: list[str]) -> list[object]:
        if not isinstance(self, QueryReader):
            sizes.append(len(ids))
        return read(self, ids)

    monkeypatch.setattr(DocumentReader, "read", spy)
    build_evaluator(pages, batch_size=2, show_progress_bar=False)(clip)
    assert sum(sizes) == len(pages)
    assert max(sizes) == 2


def test_per_query_values_average_to_the_metrics(pages: Dataset, clip: SentenceTransformer) -> None:
    evaluator = build_evaluator(pages, truncate_dims=[16], ndcg_at_k=(3, 10), show_progress_bar=False)
    metrics = evaluator(clip)
    keys = {f"vdr{size}_cosine_ndcg@{k}" for size in ("", "-16d") for k in (3, 10)}
    assert set(evaluator.per_query) == keys
    for key in keys:
        assert set(evaluator.per_query[key]) == set(evaluator.queries_ids)
        assert metrics[key] == pytest.approx(np.mean(list(evaluator.per_query[key].values())), abs=1e-12)


def test_graded_ndcg_has_the_linear_gains_of_trec_eval() -> None:
    evaluator = build_evaluator(graded(4, {"q": {"0": 3, "1": 1}}), documents="text", ndcg_at_k=(2,))
    metrics = score_hits(evaluator, {"q": {"1": 0.9, "2": 0.8, "0": 0.7}})
    ideal = 3 + 1 / math.log2(3)
    assert metrics["ndcg@k"][2] == pytest.approx(1 / ideal)
    assert metrics["recall@k"][3] == pytest.approx(1.0)


def test_ndcg_of_a_known_ranking() -> None:
    # by hand: (2 + 0 + 1 / 2) / (2 + 1 / log2(3))
    assert ndcg([2, 0, 1], [1, 2], k=10) == pytest.approx(2.5 / (2 + 1 / math.log2(3)))
    assert ndcg([0, 0], [1], k=10) == 0.0


def test_ties_do_not_depend_on_how_ids_are_spelled() -> None:
    def tied(names: list[str]) -> float:
        data = RetrievalDataset(
            Dataset.from_dict({"document_id": names, "text": [f"t{k}" for k in range(len(names))]}),
            Dataset.from_dict({"query_id": ["q"], "text": ["q"]}),
            Dataset.from_dict({"query_id": ["q"], "document_id": [names[3]], "score": [1]}),
        )
        evaluator = build_evaluator(data, documents="text")
        return score_hits(evaluator, {"q": dict.fromkeys(names, 0.5)})["ndcg@k"][10]

    assert tied([str(i) for i in range(8)]) == tied([f"page-{9 - i}" for i in range(8)])


def test_a_copy_of_the_relevant_page_costs_nothing(pages: Dataset, clip: SentenceTransformer) -> None:
    """Whatever its id and wherever it stands, and each content is encoded once."""
    before = build_evaluator(pages, show_progress_bar=False)(clip)
    for name, position in (("a-copy", 0), ("zz-copy", len(pages))):
        copies = pages.remove_columns("id").add_column("id", [f"{name}-{row_id}" for row_id in pages["id"]])
        copies = copies.remove_columns(["query", "negatives"])
        copies = copies.add_column("query", [None] * len(pages)).add_column("negatives", [[]] * len(pages))
        parts = [pages, copies.select_columns(pages.column_names).cast(pages.features)]
        doubled = concatenate_datasets(parts if position else parts[::-1])
        evaluator = build_evaluator(doubled, show_progress_bar=False)
        assert len(evaluator.corpus_ids) == len(pages)
        assert evaluator(clip) == pytest.approx(before, abs=1e-9)


def test_a_query_that_looks_like_an_image_is_a_text(pages: Dataset, clip: SentenceTransformer, tmp_path) -> None:
    path = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(path)
    page = {"bytes": _png(), "path": None}
    for query in (str(path), "https://example.org/page.png", "data:image/png;base64,AAAA"):
        rows = Dataset.from_dict({"id": ["a", "b"], "query": [query, "other"], "image": [page, page]})
        evaluator = build_evaluator(rows, show_progress_bar=False)
        text_embedding = clip.encode_query([{"text": query}], convert_to_tensor=True)
        assert evaluator.encode(clip).queries[0].tolist() == pytest.approx(text_embedding[0].tolist(), abs=1e-6)


def test_a_damaged_page_is_named(clip: SentenceTransformer) -> None:
    rows = Dataset.from_dict(
        {
            "id": ["good", "bad"],
            "query": ["one", "two"],
            "image": [{"bytes": _png(), "path": None}, {"bytes": b"no image", "path": None}],
        }
    )
    with pytest.raises(ImageDecodeError, match="'bad'"):
        build_evaluator(rows, show_progress_bar=False)(clip)


def test_a_model_of_numbers_that_are_none_gets_no_score(pages: Dataset, clip_path: str) -> None:
    model = SentenceTransformer(clip_path, device="cpu")
    encode = model.encode_document
    few, broken = pages.select(range(6)).remove_columns("negatives"), pages["id"][5]
    model.encode_document = lambda inputs, **options: encode(inputs, **options) * (math.nan if len(inputs) == 1 else 1)
    evaluator = build_evaluator(few, batch_size=5, show_progress_bar=False)
    with pytest.raises(DatasetError, match=f"not finite for the document '{broken}'"):
        evaluator(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"truncate_dims": [4096]}, "4096 is larger than the 128 dimensions"),
        ({"truncate_dims": [0]}, "truncate_dims holds 0"),
        ({"truncate_dims": [True]}, "truncate_dims holds True"),
        ({"truncate_dims": 64}, "truncate_dims=64: expected whole numbers"),
        ({"ndcg_at_k": ()}, "ndcg_at_k is empty"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number"),
        ({"documents": "sound"}, "documents='sound' is unknown"),
        ({"documents": "text"}, "needs a column 'text'"),
    ],
)
def test_wrong_arguments(pages: Dataset, clip: SentenceTransformer, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_evaluator(pages, model=clip, **arguments)


def test_numbers_of_numpy_are_numbers(pages: Dataset, clip: SentenceTransformer) -> None:
    evaluator = build_evaluator(pages, model=clip, truncate_dims=np.array([64, 16]), ndcg_at_k=[np.int64(5)])
    assert [part.name for part in evaluator.truncations] == ["vdr-64d", "vdr-16d"]
    assert evaluator.metric_name(clip) == "vdr_cosine_ndcg@5"


def test_a_dimension_beyond_the_model_is_refused_before_encoding(pages: Dataset, clip: SentenceTransformer) -> None:
    evaluator = build_evaluator(pages, truncate_dims=[4096], show_progress_bar=False)
    with pytest.raises(ConfigError, match="4096"):
        evaluator(clip)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def late(text_encoder_path: str) -> MultiVectorEncoder:
    return MultiVectorEncoder(text_encoder_path, device="cpu")


def sentences(count: int = 30) -> RetrievalDataset:
    words = ["revenue", "staff", "energy", "water", "region", "quarter", "growth", "loss", "export", "paper"]
    texts = [f"{words[at % 10]} {words[at // 10]} {words[at * 7 % 10]} {at}" for at in range(count)]
    ids = [f"s{at}" for at in range(count)]
    asked = ids[:6]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": texts}),
        Dataset.from_dict({"query_id": asked, "text": [text[:14] for text in texts[:6]]}),
        Dataset.from_dict({"query_id": asked, "document_id": asked, "score": [1] * 6}),
    )


def test_the_best_documents_of_each_query_are_told(text_encoder_path: str, late: MultiVectorEncoder) -> None:
    data = sentences()
    single = SentenceTransformer(text_encoder_path, device="cpu")
    for model in (single, late):
        evaluator = build_evaluator(data, model=model, documents="text", show_progress_bar=False)
        assert evaluator.top_ids == {}
        metrics = evaluator(model)
        scores = model.similarity(
            model.encode_query([{"text": text} for text in data.queries["text"][:]]),
            model.encode_document([{"text": text} for text in data.corpus["text"][:]]),
        )
        ids = data.corpus["document_id"][:]
        best = {
            query: [ids[at] for at in row.argsort(descending=True)] for query, row in zip(ids, scores, strict=False)
        }
        assert {query: found[:10] for query, found in evaluator.top_ids.items()} == {
            query: found[:10] for query, found in best.items()
        }
        assert {type(name) for found in evaluator.top_ids.values() for name in found} == {str}
        hits = np.mean([found[0] == query for query, found in evaluator.top_ids.items()])
        assert metrics[evaluator.primary_metric.replace("ndcg@10", "accuracy@1")] == pytest.approx(hits)
        last = evaluator.top_ids
        evaluator(model)
        assert evaluator.top_ids == last


def test_the_parts_of_a_mean_tell_theirs_and_share_a_batch_size(clip: SentenceTransformer, pages: Dataset) -> None:
    few = pages.remove_columns("negatives")
    evaluator = build_evaluator({"a": few.select(range(8)), "b": few}, batch_size=5, show_progress_bar=False)
    assert evaluator.batch_size == 5
    evaluator.batch_size = 3
    assert [part.batch_size for part in evaluator.parts] == [3, 3]
    evaluator(clip)
    assert [len(part.top_ids) for part in evaluator.parts] == [len(part.queries) for part in evaluator.parts]


@pytest.mark.parametrize("size", [2, 7])
def test_a_batch_size_set_later_is_used(
    pages: Dataset, clip: SentenceTransformer, late: MultiVectorEncoder, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for model, data, kind in ((clip, pages, "image"), (late, sentences(), "text")):
        seen: list[int] = []
        encode = model.encode_document

        def watched(inputs, encode=encode, seen=seen, **options):
            seen.append(options["batch_size"])
            assert len(inputs) <= options["batch_size"]
            return encode(inputs, **options)

        monkeypatch.setattr(model, "encode_document", watched)
        evaluator = build_evaluator(data, model=model, documents=kind, batch_size=16, show_progress_bar=False)
        evaluator.batch_size = size
        evaluator(model)
        assert set(seen) == {size}


def test_truncations_share_what_they_evaluate(pages: Dataset, clip: SentenceTransformer) -> None:
    """Two hundred thousand documents and six sizes were a gigabyte of the same dictionaries."""
    evaluator = build_evaluator(pages, truncate_dims=[64, 16], show_progress_bar=False)
    for part in evaluator.truncations:
        for name in ("corpus", "corpus_ids", "queries", "relevant_docs", "score_by_document_id", "_reader"):
            assert getattr(part, name) is getattr(evaluator, name)
    evaluator(clip)
    assert [part.primary_metric for part in evaluator.truncations] == [
        "vdr-64d_cosine_ndcg@10",
        "vdr-16d_cosine_ndcg@10",
    ]
    tops = [part.top_ids for part in (evaluator, *evaluator.truncations)]
    assert tops[0] != tops[1] != tops[2]
    assert all(found.keys() == tops[0].keys() for found in tops)


def test_predictions_and_csv_files_of_the_host(pages: Dataset, clip: SentenceTransformer, tmp_path) -> None:
    evaluator = build_evaluator(pages, truncate_dims=[16], show_progress_bar=False)
    evaluator.write_csv, evaluator.write_predictions = False, True
    evaluator(clip, str(tmp_path))
    names = [f"Information-Retrieval_evaluation_vdr{size}_predictions_cosine.jsonl" for size in ("", "-16d")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for name, part in zip(names, (evaluator, *evaluator.truncations), strict=True):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        found = {line["query_id"]: [hit["corpus_id"] for hit in line["results"]] for line in lines}
        assert found == part.top_ids


def test_a_model_of_dot_products_is_measured_and_searched_with_them(text_encoder_path: str) -> None:
    """Lengths decide then: evaluator, candidates, mining and pipeline agree, and the keys say so."""
    model = SentenceTransformer(text_encoder_path, device="cpu", similarity_fn_name="dot")
    data = sentences()
    encode = model.encode_document
    lengths = {text: 1 + at % 5 for at, text in enumerate(data.corpus["text"][:])}

    def longer(inputs, **options):
        return encode(inputs, **options) * torch.tensor([[lengths[item["text"]]] for item in inputs])

    model.encode_document = longer
    options = {"documents": "text", "show_progress_bar": False}
    evaluator = build_evaluator(data, truncate_dims=[16], **options)
    metrics = evaluator(model)
    assert {key.split("_")[1] for key in metrics} == {"dot"}
    assert evaluator.primary_metric == evaluator.metric_name(model) == "vdr_dot_ndcg@10"
    lists = build_reranking_evaluator(
        data, retriever=model, always_rerank_positives=False, num_candidates=8, **options
    ).lists
    assert {each.asking_id: list(each.candidate_ids) for each in lists} == {
        query: found[:8] for query, found in evaluator.top_ids.items()
    }
    mined = mine_hard_negatives(data, model, num_negatives=3, relative_margin=None, **options)
    for row in mined.negatives:
        wrong = [name for name in evaluator.top_ids[row["query_id"]] if name != row["query_id"]]
        assert row["document_ids"] == wrong[:3]
    cosine = SentenceTransformer(text_encoder_path, device="cpu", similarity_fn_name="cosine")
    other = build_evaluator(data, **options)
    other(cosine)
    assert other.top_ids != evaluator.top_ids


def test_a_page_that_its_text_pushes_out_is_named(qwen3_vl_path: str, pages: Dataset) -> None:
    """The host says "Mismatch in `image` token count" of a whole batch."""
    model = SentenceTransformer(qwen3_vl_path, device="cpu")
    model.max_seq_length = 200
    few = pages.select(range(6)).remove_columns(
        ["negatives", "text"] if "text" in pages.column_names else ["negatives"]
    )
    data = RetrievalDataset.from_id_rows(few.add_column("negatives", [[]] * 6))
    texts = ["long " * 200 if at == 4 else "short" for at in range(6)]
    corpus = data.corpus.add_column("text", texts)
    data = RetrievalDataset(corpus, data.queries, data.qrels)
    options = {"documents": "text+image", "show_progress_bar": False}
    name = re.escape(corpus["document_id"][4])
    message = f"can't read the document '{name}': Mismatch in `image` token count.* raise the model's max_seq_length"
    with pytest.raises(DatasetError, match=message):
        build_evaluator(data, **options)(model)
    with pytest.raises(DatasetError, match=message):
        mine_hard_negatives(data, model, num_negatives=1, **options)


def test_texts_that_are_cut_off_are_counted_once(
    text_encoder_path: str, late: MultiVectorEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    single, data = SentenceTransformer(text_encoder_path, device="cpu"), sentences()
    single.max_seq_length = late.max_seq_length = 6
    options = {"documents": "text", "show_progress_bar": False}
    for model in (single, late):
        tokens = [len(model.tokenizer(text)["input_ids"]) for text in data.corpus["text"][:]]
        expected = sum(length > 6 for length in tokens)
        assert expected == count_cut_texts(model, "document", data.corpus["text"][:]) > 0
        evaluator = build_evaluator(data, model=model, **options)
        caplog.clear()
        evaluator(model)
        evaluator(model)
        said = [record.getMessage() for record in caplog.records if "more tokens" in record.getMessage()]
        assert [line for line in said if "documents" in line] == [
            f"{expected} of 30 documents have more tokens than the 6 that the model reads, and are cut off there. "
            "Raise model.max_seq_length where the model allows it, or split the texts."
        ]
    late.max_seq_length = 128


def test_texts_are_counted_by_the_route_that_reads_them(clip_path: str, text_encoder_path: str) -> None:
    model = compose_router(text_encoder_path, clip_path, device="cpu")
    assert count_cut_texts(model, "query", ["short", "word " * 500]) == 1
    clip = SentenceTransformer(clip_path, device="cpu")
    assert count_cut_texts(clip, "query", ["short", "word " * 500]) == 1
    clip.prompts["query"] = "word " * 70
    assert count_cut_texts(clip, "query", ["short"]) == 1
