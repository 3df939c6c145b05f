"""The evaluator gives the host's numbers, for less work, and what the host can't give."""

import io
import math

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from mmtune import ConfigError, DatasetError, ImageDecodeError, RetrievalDataset, build_evaluator
from mmtune.data.documents import DocumentReader
from mmtune.evaluation.metrics import ndcg


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
    monkeypatch.setattr(DocumentReader, "read", lambda self, ids: (sizes.append(len(ids)), read(self, ids))[1])
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
        ({"documents": "audio"}, "documents='audio' is unknown"),
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
