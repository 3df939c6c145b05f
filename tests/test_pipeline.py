"""The pipeline's numbers are those of its parts, from one encoding and one scoring."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData

from mmtune import ConfigError, RetrievalDataset, build_evaluator
from mmtune.evaluation.pipeline import PipelineReport, evaluate_pipeline
from mmtune.evaluation.reranking import build_reranking_evaluator

DEPTHS = (2, 5, 12)


class StubReranker(CrossEncoder):
    """A reranker that scores pages by a number of its own for each text, and counts the pairs."""

    num_labels = 1
    prompts: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, *, constant: bool = False) -> None:
        torch.nn.Module.__init__(self)
        self.model_card_data = CrossEncoderModelCardData()
        self.constant = constant
        self.num_pairs = 0

    def supports(self, modality) -> bool:
        return True

    def predict(self, inputs, **kwargs) -> np.ndarray:
        self.num_pairs += len(inputs)
        return np.array([0.0 if self.constant else score(query["text"], page) for query, page in inputs])


def score(text: str, page) -> float:
    pixels = np.asarray(page, dtype=np.int64).sum()
    return float((pixels * (1 + sum(map(ord, text)))) % 99_991)


@pytest.fixture(scope="module")
def clip(clip_path: str) -> SentenceTransformer:
    return SentenceTransformer(clip_path, device="cpu")


@pytest.fixture(scope="module")
def data(pages: Dataset) -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(pages)


@pytest.fixture(scope="module")
def report(clip: SentenceTransformer, data: RetrievalDataset) -> PipelineReport:
    return evaluate_pipeline(clip, StubReranker(), data, depths=DEPTHS, show_progress_bar=False)


def first_stage(clip: SentenceTransformer, data: RetrievalDataset) -> dict[str, list[str]]:
    """For each query the ids of all pages, best first."""
    scores = clip.similarity(*build_evaluator(data, show_progress_bar=False).encode(clip)).numpy()
    document_ids = data.corpus["document_id"][:]
    rankings = [[document_ids[at] for at in np.argsort(-row)] for row in scores]
    return dict(zip(data.queries["query_id"][:], rankings, strict=True))


def test_the_first_stage_is_the_evaluator_s(report: PipelineReport, clip, data) -> None:
    evaluator = build_evaluator(data, show_progress_bar=False)
    metrics = evaluator(clip)
    assert report.ndcg_before == pytest.approx(metrics["vdr_cosine_ndcg@10"], abs=1e-12)
    assert report.per_query["ndcg@10_before"] == pytest.approx(evaluator.per_query["vdr_cosine_ndcg@10"])
    assert report.rows[1].recall == pytest.approx(metrics["vdr_cosine_recall@5"])
    assert (report.num_queries, report.num_documents) == (len(data), len(data.corpus))


def test_recall_and_lost_queries(report: PipelineReport, clip, data) -> None:
    rankings = first_stage(clip, data)
    for row in report.rows:
        lost = [query_id for query_id, ranking in rankings.items() if query_id not in ranking[: row.depth]]
        assert list(row.lost_query_ids) == lost
        assert row.recall == pytest.approx(1 - len(lost) / len(data))
    assert [row.recall for row in report.rows] == sorted(row.recall for row in report.rows)
    assert 0 < len(report.rows[0].lost_query_ids) < len(data)


def test_reranked_documents_stand_above_the_rest_of_the_first_stage(report: PipelineReport, clip, data) -> None:
    rankings = first_stage(clip, data)
    evaluator = build_reranking_evaluator(data, num_candidates=len(data.corpus), show_progress_bar=False)
    texts, read = evaluator._reader.text_by_query_id, evaluator._reader.documents.read
    for depth in DEPTHS:
        for query_id, ranking in rankings.items():
            scores = {page: score(texts[query_id], image) for page, image in zip(ranking, read(ranking), strict=True)}
            order = [*sorted(ranking[:depth], key=scores.get, reverse=True), *ranking[depth:]]
            rank = order.index(query_id) + 1
            expected = 1 / np.log2(rank + 1) if rank <= 10 else 0.0
            assert report.per_query[f"ndcg@10_after@{depth}"][query_id] == pytest.approx(expected)


def test_reranking_everything_is_the_reranking_evaluator_s(clip, data) -> None:
    whole = len(data.corpus)
    report = evaluate_pipeline(clip, StubReranker(), data, depths=[whole], show_progress_bar=False)
    evaluator = build_reranking_evaluator(data, num_candidates=whole, show_progress_bar=False)
    assert report.rows[0].ndcg == pytest.approx(evaluator(StubReranker())["vdr-rerank_ndcg@10"])
    assert report.per_query[f"ndcg@10_after@{whole}"] == pytest.approx(evaluator.per_query["vdr-rerank_ndcg@10"])
    assert report.rows[0].recall == 1.0


def test_every_pair_of_the_deepest_list_is_scored_once(clip, data) -> None:
    stub = StubReranker()
    evaluate_pipeline(clip, stub, data, depths=DEPTHS, show_progress_bar=False)
    assert stub.num_pairs == max(DEPTHS) * len(data)


def test_a_reranker_that_cannot_tell_shuffles_what_it_is_given(clip, data) -> None:
    report = evaluate_pipeline(clip, StubReranker(constant=True), data, depths=[5], show_progress_bar=False)
    chance = np.mean(1 / np.log2(np.arange(2, 7)))
    below = {query_id for query_id in report.per_query["recall@5"] if query_id in report.rows[0].lost_query_ids}
    for query_id, value in report.per_query["ndcg@10_after@5"].items():
        before = report.per_query["ndcg@10_before"][query_id]
        assert value == pytest.approx(before if query_id in below else chance)


def test_copies_of_a_page_are_one_document(clip, pages: Dataset, report: PipelineReport) -> None:
    copies = pages.map(lambda row: {"id": f"copy-{row['id']}", "query": None, "negatives": []}, features=pages.features)
    doubled = concatenate_datasets([copies, pages])
    again = evaluate_pipeline(clip, StubReranker(), doubled, depths=DEPTHS, show_progress_bar=False)
    assert again.metrics == pytest.approx(report.metrics)
    assert again.num_documents == report.num_documents


@pytest.fixture(scope="module")
def late(text_encoder_path: str) -> MultiVectorEncoder:
    torch.manual_seed(0)
    return MultiVectorEncoder(text_encoder_path, device="cpu")


@pytest.fixture(scope="module")
def sentences() -> RetrievalDataset:
    """Documents of words, and for each a query of some of them."""
    words = ["revenue", "staff", "energy", "water", "region", "quarter", "growth", "loss", "export", "paper"]
    texts = [" ".join(np.random.default_rng(at).choice(words, 3 + at % 4, replace=False)) for at in range(15)]
    ids = [str(at) for at in range(15)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": texts}),
        Dataset.from_dict({"query_id": ids, "text": [f"{at} {text[:12]}" for at, text in enumerate(texts)]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * 15}),
    )


def test_late_interaction_as_first_stage(late: MultiVectorEncoder, sentences: RetrievalDataset) -> None:
    options = {"documents": "text", "show_progress_bar": False}
    report = evaluate_pipeline(late, StubReranker(constant=True), sentences, depths=[3], **options)
    ours = report.per_query["recall@3"]
    queries = late.encode_query([{"text": text} for text in sentences.queries["text"][:]])
    documents = late.encode_document([{"text": text} for text in sentences.corpus["text"][:]])
    best = late.similarity(queries, documents).topk(3).indices.tolist()
    assert ours == {str(at): float(at in found) for at, found in enumerate(best)}
    backwards = build_reranking_evaluator(
        sentences, direction="image_to_text", retriever=late, always_rerank_positives=False, num_candidates=3, **options
    )
    best = late.similarity(queries, documents).T.topk(3).indices.tolist()
    assert [list(map(int, each.candidate_ids)) for each in backwards.lists] == best


def test_the_table_and_the_files(report: PipelineReport, tmp_path) -> None:
    lines = str(report).splitlines()
    assert lines[0] == f"24 queries, {report.num_documents} documents; the first `depth` are reranked"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0][:5] == ["depth", "recall", "lost queries", "nDCG@10 before", "after"]
    assert [row[0] for row in cells[2:]] == ["2", "5", "12"]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    report.save(tmp_path / "new" / "folder")
    report.save(tmp_path / "new" / "folder")
    saved = json.loads((tmp_path / "new" / "folder" / "pipeline.json").read_text())
    assert saved["metrics"] == report.metrics
    assert saved["per_query"] == report.per_query
    assert saved["rows"][0]["lost_query_ids"] == list(report.rows[0].lost_query_ids)
    markdown = (tmp_path / "new" / "folder" / "pipeline.md").read_text()
    assert str(report) in markdown
    assert f"`{report.rows[0].lost_query_ids[0]}`" in markdown


def test_times_are_measured(report: PipelineReport) -> None:
    times = report.times
    assert min(times.corpus_encoding_s, times.query_encoding_s, times.search_s, times.pair_scoring_s) > 0
    assert [row.reranking_s for row in report.rows] == [depth * times.pair_scoring_s for depth in DEPTHS]


def test_numbers_of_numpy_are_numbers(clip, data) -> None:
    report = evaluate_pipeline(
        clip, StubReranker(), data, depths=np.array([2]), ndcg_at_k=np.int64(5), show_progress_bar=False
    )
    assert (report.depths, report.ndcg_at_k) == ((2,), 5)
    json.dumps(report.metrics)
    evaluator = build_reranking_evaluator(data, num_candidates=np.int64(4), at_k=np.int64(3), show_progress_bar=False)
    assert evaluator.primary_metric == "vdr-rerank_ndcg@3"


def test_depths_that_nobody_chose_fit_the_corpus(clip, data, pages: Dataset) -> None:
    chosen = evaluate_pipeline(clip, StubReranker(), data, show_progress_bar=False)
    assert chosen.depths == (5, 10, 20)
    few = RetrievalDataset.from_id_rows(pages.select(range(3)), negatives_column=None)
    assert evaluate_pipeline(clip, StubReranker(), few, show_progress_bar=False).depths == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [5, 1000]}, r"depths holds 1000, and the corpus has \d+ different documents"),
        ({"depths": []}, "depths is empty"),
        ({"depths": [0]}, "depths holds 0"),
        ({"ndcg_at_k": 0}, "ndcg_at_k=0: expected a whole number"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"documents": "text"}, "needs a column 'text'"),
    ],
)
def test_wrong_arguments_are_refused_before_encoding(clip, data, monkeypatch, options: dict, message: str) -> None:
    monkeypatch.setattr(clip, "preprocess", None)
    with pytest.raises(ConfigError, match=message):
        evaluate_pipeline(clip, StubReranker(), data, show_progress_bar=False, **options)


def test_models_of_the_wrong_kind(clip, data) -> None:
    with pytest.raises(
        ConfigError,
        match=r"retriever=StubReranker\(\) is no retriever.*evaluate_pipeline\(retriever, reranker, dataset\)",
    ):
        evaluate_pipeline(StubReranker(), StubReranker(), data)
    with pytest.raises(
        ConfigError,
        match=r"reranker=a SentenceTransformer is no reranker.*evaluate_pipeline\(retriever, reranker, dataset\)",
    ):
        evaluate_pipeline(clip, clip, data)


def test_models_are_taken_as_checkpoints(
    sentences: RetrievalDataset, late: MultiVectorEncoder, text_encoder_path: str, tmp_path
) -> None:
    options = {"documents": "text", "depths": [3], "show_progress_bar": False}
    torch.manual_seed(0)
    reranker, single = CrossEncoder(text_encoder_path, num_labels=1), SentenceTransformer(text_encoder_path)
    sentences.save(tmp_path / "data")
    for name, model in (("reranker", reranker), ("late", late), ("single", single)):
        model.save(str(tmp_path / name))
    for name, model in (("late", late), ("single", single)):
        built = evaluate_pipeline(model, reranker, sentences, **options)
        named = evaluate_pipeline(tmp_path / name, str(tmp_path / "reranker"), tmp_path / "data", **options)
        for key, values in built.per_query.items():
            assert named.per_query[key] == pytest.approx(values, abs=1e-6)


def test_a_checkpoint_is_loaded_after_everything_else_was_checked(clip, data) -> None:
    with pytest.raises(ConfigError, match="depths holds 1000"):
        evaluate_pipeline("no/such/model", StubReranker(), data, depths=[1000])
    with pytest.raises(ConfigError, match="is no reranker"):
        evaluate_pipeline("no/such/model", clip, data)
