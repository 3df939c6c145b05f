"""Rerankers are measured on candidates that are right, with ties averaged, and as the host measures where it can."""

import csv
import itertools
import math
from collections.abc import Callable
from zlib import crc32

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
from sentence_transformers.cross_encoder.modules import LogitScore

from mmtune import ConfigError, DatasetError, ImageDecodeError, RetrievalDataset, build_evaluator
from mmtune.data.documents import DocumentReader
from mmtune.data.query_kinds import QueryReader
from mmtune.evaluation.metrics import average_precision, expected_gains, ndcg, reciprocal_rank
from mmtune.evaluation.reranking import build_reranking_evaluator
from mmtune.testing import generated_pages

CHANCE = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / 10


class StubReranker(CrossEncoder):
    """A reranker that scores pairs as it is told, and remembers what it was given."""

    def __init__(self, score: Callable[[object, object], float], *, prompts: dict[str, str] | None = None) -> None:
        torch.nn.Module.__init__(self)
        self.score = score
        self.prompts = prompts or {}
        self.model_card_data = CrossEncoderModelCardData()
        self.pairs: list[list] = []
        self.prompt_names: list[str | None] = []
        self.messages = True

    num_labels = 1

    def supports(self, modality) -> bool:
        return self.messages

    def predict(self, inputs, *, prompt_name=None, activation_fn=None, **kwargs) -> np.ndarray:
        self.pairs += inputs
        self.prompt_names.append(prompt_name)
        scores = torch.tensor([self.score(*map(bare, pair)) for pair in inputs])
        return activation_fn(scores).numpy()


def bare(part: object) -> object:
    return part["text"] if isinstance(part, dict) else part


def texts_dataset(judgements: dict[str, dict[str, int]], num_documents: int, **tables: Dataset) -> RetrievalDataset:
    """Documents "d0", "d1", ... whose text is their id, and queries whose text is their id."""
    qrels = [(query, document, score) for query, scores in judgements.items() for document, score in scores.items()]
    query_ids, document_ids, scores = (list(column) for column in zip(*qrels, strict=True))
    ids = [f"d{at}" for at in range(num_documents)]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": ids}),
        Dataset.from_dict({"query_id": list(judgements), "text": list(judgements)}),
        Dataset.from_dict({"query_id": query_ids, "document_id": document_ids, "score": scores}),
        **tables,
    )


def build(data, **options):
    return build_reranking_evaluator(data, documents="text", show_progress_bar=False, **options)


def by_hash(query: object, document: object) -> float:
    """A different number for each pair, above and below zero."""
    return crc32(f"{query}|{document}".encode()) / 2**31 - 1


def judged(seed: int = 0, *, grades: int = 1) -> dict[str, dict[str, int]]:
    rng = np.random.default_rng(seed)
    return {
        f"q{at}": {
            f"d{document}": int(rng.integers(1, grades + 1))
            for document in rng.choice(40, rng.integers(1, 5), replace=False)
        }
        for at in range(12)
    }


# ties


def over_all_orders(scores: list[int], gains: list[int], measure: Callable[[list[int]], float]) -> float:
    """The mean of a measure over all orders of what is tied, by trying each."""
    blocks = [[gain for score, gain in zip(scores, gains, strict=True) if score == at] for at in sorted(set(scores))]
    orders = itertools.product(*(itertools.permutations(block) for block in reversed(blocks)))
    return float(np.mean([measure(list(itertools.chain(*order))) for order in orders]))


@st.composite
def tied_lists(draw) -> tuple[list[int], list[int], int]:
    size = draw(st.integers(1, 7))
    scores = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    gains = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size).filter(any))
    return scores, gains, draw(st.integers(1, 8))


@given(case=tied_lists())
@settings(max_examples=60, deadline=None)
def test_ties_are_averaged_as_trying_every_order_does(case) -> None:
    scores, gains, k = case
    as_array, relevant = np.array(scores, dtype=float), np.array(gains) > 0

    def rank_of_first(order: list[int]) -> float:
        rank = next(at for at, gain in enumerate(order, 1) if gain)
        return 1 / rank if rank <= k else 0.0

    def precision(order: list[int]) -> float:
        hits = [rank for rank, gain in enumerate(order, 1) if gain]
        return sum(found / rank for found, rank in enumerate(hits, 1)) / (len(hits) + 1)

    expected = over_all_orders(scores, gains, lambda order: ndcg(order, [*gains, 2], k))
    assert ndcg(expected_gains(as_array, np.array(gains)).tolist(), [*gains, 2], k) == pytest.approx(expected)
    expected = over_all_orders(scores, gains, rank_of_first)
    assert reciprocal_rank(as_array, relevant, k) == pytest.approx(expected)
    # one more is relevant that is not among the candidates
    expected = over_all_orders(scores, gains, precision)
    assert average_precision(as_array, relevant, int(relevant.sum()) + 1) == pytest.approx(expected)


def test_large_ties_are_exact() -> None:
    relevant = np.arange(5000) < 2500
    assert reciprocal_rank(np.zeros(5000), relevant, 5000) == pytest.approx(math.log(2), abs=1e-3)
    assert average_precision(np.zeros(5000), relevant, 2500) == pytest.approx(0.5, abs=1e-2)
    assert reciprocal_rank(np.zeros(3), np.zeros(3, dtype=bool), 10) == 0.0


def test_a_model_that_cannot_tell_gets_chance() -> None:
    evaluator = build(texts_dataset({f"q{at}": {f"d{at}": 1} for at in range(12)}, 12))
    metrics = evaluator(StubReranker(lambda query, document: 0.5))
    assert metrics["vdr-rerank_ndcg@10"] == pytest.approx(CHANCE)
    assert pytest.approx(0.454, abs=1e-3) == CHANCE
    harmonic = sum(1 / rank for rank in range(1, 11)) / 10
    assert metrics["vdr-rerank_mrr@10"] == pytest.approx(harmonic)
    assert metrics["vdr-rerank_map"] == pytest.approx(harmonic)


def test_a_sure_model_is_not_tied_by_its_sigmoid() -> None:
    evaluator = build(texts_dataset({"q0": {"d0": 1}}, 10))
    metrics = evaluator(StubReranker(lambda query, document: 30.0 if document == "d0" else 20.0))
    assert metrics["vdr-rerank_ndcg@10"] == 1.0


# parity


def test_equals_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    judgements = judged()
    evaluator = build(texts_dataset(judgements, 40), num_candidates=12)
    samples = [
        {
            "query": each.asking_id,
            "positive": list(judgements[each.asking_id]),
            "negative": [document for document in each.candidate_ids if document not in judgements[each.asking_id]],
        }
        for each in evaluator.lists
    ]
    stub = StubReranker(by_hash)
    ours = evaluator(stub)
    monkeypatch.setattr(StubReranker, "predict", lambda self, pairs, **_: np.array([by_hash(*pair) for pair in pairs]))
    theirs = CrossEncoderRerankingEvaluator(samples, name="vdr-rerank", write_csv=False)(stub)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


def test_equals_the_host_on_a_real_model(qwen3_vl_path: str) -> None:
    transformer = Transformer(
        qwen3_vl_path,
        transformer_task="any-to-any",
        processing_kwargs={"chat_template": {"add_generation_prompt": True}},
    )
    model = CrossEncoder(modules=[transformer, LogitScore(true_token_id=5, false_token_id=6)], device="cpu")
    data = RetrievalDataset.from_id_rows(generated_pages(4))
    evaluator = build_reranking_evaluator(data, num_candidates=4, batch_size=4, show_progress_bar=False)
    ids = data.corpus["document_id"][:]
    pages = dict(zip(ids, DocumentReader(data.corpus).read(ids), strict=True))
    texts = dict(zip(data.queries["query_id"][:], data.queries["text"][:], strict=True))
    samples = [
        {
            "query": texts[each.asking_id],
            "positive": [pages[each.candidate_ids[0]]],
            "negative": [pages[document] for document in each.candidate_ids[1:]],
        }
        for each in evaluator.lists
    ]
    theirs = CrossEncoderRerankingEvaluator(samples, name="vdr-rerank", batch_size=4, write_csv=False)(model)
    assert evaluator(model) == pytest.approx(theirs, abs=1e-9)
    backwards = build_reranking_evaluator(data, direction="image_to_text", num_candidates=4, show_progress_bar=False)
    assert 0 < backwards(model)["vdr-rerank_ndcg@10"] <= 1


def test_graded_judgements_give_graded_ndcg() -> None:
    evaluator = build(texts_dataset({"q0": {"d0": 3, "d1": 1}}, 12))
    metrics = evaluator(StubReranker(lambda query, document: {"d1": 2.0, "d0": 1.0}.get(document, 0.0)))
    assert metrics["vdr-rerank_ndcg@10"] == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert metrics["vdr-rerank_map"] == metrics["vdr-rerank_mrr@10"] == 1.0


# candidates


def test_listed_negatives_come_first_and_random_ones_fill() -> None:
    listed = Dataset.from_dict({"query_id": ["q0"], "document_ids": [["d5", "d0", "d6"]]})
    data = texts_dataset({"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 1}}, 20, negatives=listed)
    first, second = build(data).lists
    assert first.candidate_ids[:3] == ("d0", "d5", "d6")
    assert (len(set(first.candidate_ids)), len(set(second.candidate_ids))) == (10, 11)
    assert (first.gains, second.gains) == ((1, *[0] * 9), (1, 1, *[0] * 9))
    assert build(data).lists == build(data).lists
    assert build(data, seed=1).lists != build(data).lists


@pytest.mark.parametrize("retrieved", [False, True])
def test_many_relevant_documents_lengthen_one_list_and_leave_chance_where_it_is(
    retrieved: bool, text_encoder_path: str
) -> None:
    """As in ViDoRe, where one query has more than a hundred: its list is neither all right, nor that of every query."""
    four = {f"d{at}": 1 for at in range(200, 204)}
    judgements = {"many": {f"d{at}": 1 + at % 2 for at in range(113)}, "one": {"d150": 1}, "four": four}
    data = texts_dataset(judgements, 400)
    retriever = SentenceTransformer(text_encoder_path, device="cpu") if retrieved else None
    evaluator = build(data, retriever=retriever)
    many = evaluator.lists[0]
    assert [sum(gain == 0 for gain in each.gains) for each in evaluator.lists] == [9, 9, 9]
    assert [len(set(each.candidate_ids)) for each in evaluator.lists] == [19, 10, 13]
    # The best of what is relevant, so that an oracle reaches 1.0 at the depth of the metric.
    assert sorted(many.gains)[9:] == [2] * 10
    assert [len(each.all_gains) for each in evaluator.lists] == [113, 1, 4]
    evaluator(StubReranker(lambda query, document: 0.0))
    chance = evaluator.per_query["vdr-rerank_ndcg@10"]
    assert all(0.45 < chance[query] < 0.56 for query in judgements), chance
    grades = {(query, document): grade for query, own in judgements.items() for document, grade in own.items()}
    assert evaluator(StubReranker(lambda *pair: grades.get(pair, 0)))["vdr-rerank_ndcg@10"] == 1.0


def test_which_of_equally_relevant_documents_are_ranked_is_drawn() -> None:
    data = texts_dataset({"q": {f"d{at}": 1 for at in range(60)}}, 100)
    lists = [build(data, seed=seed).lists[0] for seed in (0, 0, 1)]
    chosen = [{name for name, gain in zip(each.candidate_ids, each.gains, strict=True) if gain} for each in lists]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != {f"d{at}" for at in range(10)}


def test_nothing_is_ranked_where_nothing_can_be_wrong() -> None:
    data = texts_dataset({"q": {f"d{at}": 1 for at in range(12)}, "other": {"d0": 1}}, 12)
    with pytest.raises(ConfigError, match="All 12 different documents are relevant to query 'q'"):
        build(data)


def test_what_answers_the_same_text_is_not_wrong() -> None:
    """Under another query id, and as a copy of the page."""
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": list("abcdef"), "text": ["x", "y", "x", "z", "v", "w"]}),
        Dataset.from_dict({"query_id": ["q0", "q1"], "text": ["same", "same"]}),
        Dataset.from_dict({"query_id": ["q0", "q1"], "document_id": ["a", "b"], "score": [1, 2]}),
        Dataset.from_dict({"query_id": ["q0"], "document_ids": [["c", "b", "f"]]}),
    )
    for each in build(data, num_candidates=4).lists:
        assert dict(zip(each.candidate_ids, each.gains, strict=True)).items() >= {("a", 1), ("b", 2)}
        assert "c" not in each.candidate_ids
        assert sum(gain == 0 for gain in each.gains) == 3
        assert each.all_gains == (1, 2)
    with pytest.raises(ConfigError, match="num_candidates=6 is more than the 5 different documents"):
        build(data, num_candidates=6)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_pages_ask_for_texts_and_their_own_are_right(data) -> None:
    count = data.draw(st.integers(4, 9))
    texts = data.draw(st.lists(st.sampled_from("abcdef"), min_size=count, max_size=count))
    contents = data.draw(st.lists(st.sampled_from("uvwxyz"), min_size=count, max_size=count))
    ids = [str(at) for at in range(count)]
    relevant = data.draw(st.lists(st.sampled_from(ids), min_size=count, max_size=count))
    direction = data.draw(st.sampled_from(["text_to_image", "image_to_text"]))
    dataset = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": contents}),
        Dataset.from_dict({"query_id": ids, "text": texts}),
        Dataset.from_dict({"query_id": ids, "document_id": relevant, "score": [1] * count}),
    )
    truth = {(texts[at], contents[int(relevant[at])]) for at in range(count)}
    asking, asked = (texts, contents) if direction == "text_to_image" else (contents, texts)
    pairs = truth if direction == "text_to_image" else {pair[::-1] for pair in truth}
    num_candidates = len(set(asked))
    if num_candidates < 2:
        return
    if any(len({wanted for asks, wanted in pairs if asks == each}) == num_candidates for each in set(asking)):
        with pytest.raises(ConfigError, match="every order of them is right"):
            build(dataset, direction=direction, num_candidates=num_candidates)
        return
    lists = build(dataset, direction=direction, num_candidates=num_candidates).lists
    assert len(lists) == (count if direction == "text_to_image" else len({page for _, page in truth}))
    for each in lists:
        query = asking[int(each.asking_id)]
        assert len({asked[int(item)] for item in each.candidate_ids}) == num_candidates
        for item, gain in zip(each.candidate_ids, each.gains, strict=True):
            assert ((query, asked[int(item)]) in pairs) == (gain == 1)


@pytest.fixture(scope="module")
def clip(clip_path: str) -> SentenceTransformer:
    return SentenceTransformer(clip_path, device="cpu")


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_candidates_of_a_retriever(pages: Dataset, clip: SentenceTransformer, direction: str) -> None:
    data = RetrievalDataset.from_id_rows(pages)
    embeddings = build_evaluator(data, show_progress_bar=False).encode(clip)
    document_ids, query_ids = data.corpus["document_id"][:], data.queries["query_id"][:]
    scores = clip.similarity(*embeddings).numpy()
    options = {"direction": direction, "retriever": clip, "num_candidates": 6, "show_progress_bar": False}
    added = build_reranking_evaluator(data, **options).lists
    as_found = build_reranking_evaluator(data, always_rerank_positives=False, **options).lists
    if direction == "image_to_text":
        scores, document_ids, query_ids = scores.T, query_ids, document_ids
    for with_relevant, without in zip(added, as_found, strict=True):
        row = scores[query_ids.index(with_relevant.asking_id)]
        ranking = [document_ids[at] for at in np.argsort(-row)]
        assert list(without.candidate_ids) == ranking[:6]
        own = with_relevant.asking_id
        assert list(with_relevant.candidate_ids) == [own, *[other for other in ranking if other != own][:5]]
        assert without.gains == tuple(int(candidate == own) for candidate in ranking[:6])
        assert without.all_gains == (1,)


def test_what_the_retriever_lost_counts_as_not_found(pages: Dataset, clip: SentenceTransformer) -> None:
    evaluator = build_reranking_evaluator(
        pages, retriever=clip, always_rerank_positives=False, num_candidates=3, show_progress_bar=False
    )
    metrics = evaluator(StubReranker(lambda query, document: 0.0))
    found = np.mean([any(each.gains) for each in evaluator.lists])
    assert 0 < found < 1
    assert metrics["vdr-rerank_map"] == pytest.approx(found * (1 + 1 / 2 + 1 / 3) / 3)


# the call


def test_pages_are_read_in_portions_and_once_in_each(pages: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    original = DocumentReader.read

    def spy(self, document_ids):
        if not isinstance(self, QueryReader):
            read.append(list(document_ids))
        return original(self, document_ids)

    monkeypatch.setattr(DocumentReader, "read", spy)
    evaluator = build_reranking_evaluator(pages, num_candidates=8, batch_size=6, show_progress_bar=False)
    assert not read
    evaluator(StubReranker(lambda query, page: 0.0))
    assert max(map(len, read)) == 6
    assert sum(map(len, read)) == 8 * len(evaluator.lists)
    # a page that stands in many lists is decoded where two portions meet, too, and no more
    decoded = sum(len(set(portion)) for portion in read)
    assert decoded <= len({page for portion in read for page in portion}) + len(read)


def test_scores_go_to_their_pairs_whatever_the_order(pages: Dataset) -> None:
    def sees_itself(query: str, page: Image.Image) -> float:
        return sum(map(ord, query)) % 7 + float(np.asarray(page, dtype=np.float64).mean())

    wide, narrow = (
        build_reranking_evaluator(pages, num_candidates=6, batch_size=size, show_progress_bar=False)
        for size in (1000, 1)
    )
    wide(StubReranker(sees_itself))
    narrow(StubReranker(sees_itself))
    assert wide.per_query == narrow.per_query


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_what_the_model_is_given(pages: Dataset, direction: str) -> None:
    evaluator = build_reranking_evaluator(pages, direction=direction, num_candidates=3, show_progress_bar=False)
    with_prompts = StubReranker(by_hash, prompts={direction: "Judge.", "other": "No."})
    evaluator(with_prompts)
    assert set(with_prompts.prompt_names) == {direction}
    text, page = with_prompts.pairs[0] if direction == "text_to_image" else with_prompts.pairs[0][::-1]
    assert list(text) == ["text"]
    assert page.mode == "RGB"
    without = StubReranker(by_hash)
    evaluator(without)
    assert set(without.prompt_names) == {None}


def test_models_of_bare_texts_get_bare_texts(text_encoder_path: str) -> None:
    model = CrossEncoder(text_encoder_path, num_labels=1, device="cpu")
    metrics = build(texts_dataset(judged(), 40))(model)
    assert 0 < metrics["vdr-rerank_ndcg@10"] < 1


def test_per_query_values_and_the_files_of_the_host(tmp_path) -> None:
    evaluator = build(texts_dataset(judged(grades=3), 40), at_k=5, name="mine")
    stub = StubReranker(by_hash)
    metrics = evaluator(stub, str(tmp_path), epoch=1, steps=20)
    assert list(metrics) == ["mine_ndcg@5", "mine_mrr@5", "mine_map"]
    assert evaluator.primary_metric == evaluator.metric_name(stub) == "mine_ndcg@5"
    for key, values in evaluator.per_query.items():
        assert set(values) == {f"q{at}" for at in range(12)}
        assert metrics[key] == pytest.approx(np.mean(list(values.values())))
    rows = list(csv.reader((tmp_path / "RerankingEvaluator_mine_results.csv").read_text().splitlines()))
    assert rows[0] == ["epoch", "steps", *metrics]
    assert rows[1][:2] == ["1", "20"]
    assert stub.model_card_data.eval_results_dict[evaluator] == metrics


def test_several_sets_and_their_mean() -> None:
    sets = {"one": texts_dataset(judged(1), 40), "two": texts_dataset(judged(2), 40)}
    evaluator = build(sets)
    metrics = evaluator(StubReranker(by_hash))
    assert evaluator.primary_metric == "vdr-rerank-mean_ndcg@10"
    for measure in ("ndcg@10", "mrr@10", "map"):
        parts = [metrics[f"vdr-rerank-{name}_{measure}"] for name in sets]
        assert metrics[f"vdr-rerank-mean_{measure}"] == pytest.approx(np.mean(parts))
    assert set(evaluator.per_query) == {key for key in metrics if "mean" not in key}


def test_the_host_s_trainer_keeps_the_best_by_it(text_encoder_path: str, tmp_path) -> None:
    model = CrossEncoder(text_encoder_path, num_labels=1, device="cpu")
    evaluator = build({"one": texts_dataset(judged(1), 40), "two": texts_dataset(judged(2), 40)})
    args = CrossEncoderTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{evaluator.primary_metric}",
        report_to="none",
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_dict({"query": ["a", "b"] * 8, "document": ["c", "d"] * 8, "label": [1.0, 0.0] * 8})
    trainer = CrossEncoderTrainer(
        model, args, rows, loss=BinaryCrossEntropyLoss(model), evaluator=evaluator, callbacks=[]
    )
    trainer.train()
    assert trainer.state.best_metric is not None
    model.save(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert "vdr-rerank-one" in card
    assert '"direction": "text_to_image"' in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, "direction='sideways' is unknown"),
        ({"num_candidates": 1}, "num_candidates=1: expected a whole number of 2 or more"),
        ({"num_candidates": 41}, "num_candidates=41 is more than the 40 different documents"),
        ({"num_candidates": 13, "direction": "image_to_text"}, "more than the 12 different query texts"),
        ({"seed": -1}, "seed=-1: expected a whole number of 0 or more"),
        ({"at_k": 0}, "at_k=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"documents": "image"}, "needs a column 'image'"),
        ({"retriever": "clip"}, r"retriever='clip' is no retriever.*load_model\('clip'\)"),
        ({"always_rerank_positives": False}, "always_rerank_positives=False without a retriever"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_reranking_evaluator(texts_dataset(judged(), 40), **{"documents": "text", **options})


def test_no_sets_at_all() -> None:
    with pytest.raises(DatasetError, match="The mapping of datasets is empty"):
        build({})


def test_models_that_are_no_rerankers(clip: SentenceTransformer) -> None:
    evaluator = build(texts_dataset(judged(), 40))
    with pytest.raises(ConfigError, match=r"model=a SentenceTransformer is no reranker.*build_evaluator"):
        evaluator(clip)
    stub = StubReranker(by_hash)
    stub.num_labels = 3
    with pytest.raises(ConfigError, match="gives 3 scores to a pair"):
        evaluator(stub)
    with pytest.raises(ConfigError, match=r"scores query 'q\d+' with document 'd3' as nan"):
        evaluator(StubReranker(lambda query, document: math.nan if document == "d3" else 0.0))


def test_a_damaged_page_is_named() -> None:
    page = {"bytes": b"no image", "path": None}
    rows = Dataset.from_dict({"id": ["good", "bad"], "query": ["one", "two"], "image": [page, page | {"bytes": b"x"}]})
    evaluator = build_reranking_evaluator(rows, num_candidates=2, show_progress_bar=False)
    with pytest.raises(ImageDecodeError, match="'bad'"):
        evaluator(StubReranker(by_hash))


def test_the_order_of_each_list_is_told_and_no_file_is_written_unasked(tmp_path) -> None:
    evaluator = build(texts_dataset(judged(), 40), num_candidates=6)
    evaluator.write_csv = False
    evaluator(StubReranker(by_hash), str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    for each in evaluator.lists:
        scores = {name: by_hash(each.asking_id, name) for name in each.candidate_ids}
        assert evaluator.top_ids[each.asking_id] == sorted(scores, key=scores.__getitem__, reverse=True)
