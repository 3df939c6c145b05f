"""Graded scores are trec_eval's, binary ones the host's, and neither depends on how ids are spelled."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from mmtune import RetrievalDataset, build_evaluator

# trec_eval itself, through its binding: ir_measures would choose another tool for some of the measures
trec_eval = ir_measures.pytrec_eval

Scores = dict[str, dict[str, int]]
Hits = dict[str, dict[str, float]]

NDCG_AT = (1, 3, 10, 100)
RECALL_AT = (1, 3, 5, 10)


def as_dataset(num_documents: int, judgements: Scores) -> RetrievalDataset:
    """Documents "0", "1", ... and the queries that are judged."""
    qrels = [(query, document, score) for query, scores in judgements.items() for document, score in scores.items()]
    query_ids, document_ids, scores = (list(column) for column in zip(*qrels, strict=True))
    return RetrievalDataset(
        Dataset.from_dict(
            {"document_id": [str(i) for i in range(num_documents)], "text": [f"t{i}" for i in range(num_documents)]}
        ),
        Dataset.from_dict({"query_id": list(judgements), "text": list(judgements)}),
        Dataset.from_dict({"query_id": query_ids, "document_id": document_ids, "score": scores}),
    )


def our_scores(num_documents: int, judgements: Scores, hits: Hits) -> tuple[dict[str, float], Hits]:
    """The means, and nDCG of each query by depth, for hits that are given."""
    evaluator = build_evaluator(as_dataset(num_documents, judgements), documents="text", ndcg_at_k=NDCG_AT)
    by_name = {str(document_id): document_id for document_id in evaluator.corpus_ids}
    evaluator.score_functions = {"cosine": None}
    metrics = evaluator.compute_metrics(
        [
            [{"corpus_id": by_name[name], "score": score} for name, score in hits[query_id].items()]
            for query_id in evaluator.queries_ids
        ]
    )
    means = {f"{name.removesuffix('@k')}@{k}": float(value) for name in metrics for k, value in metrics[name].items()}
    return means, {key.rpartition("_")[2]: values for key, values in evaluator.per_query.items()}


def their_scores(judgements: Scores, hits: Hits) -> tuple[dict[str, float], Hits]:
    """The same from trec_eval."""
    qrels = [
        ir_measures.Qrel(query, document, score)
        for query, scores in judgements.items()
        for document, score in scores.items()
    ]
    names = {f"ndcg@{k}": ir_measures.nDCG @ k for k in NDCG_AT}
    names |= {f"recall@{k}": ir_measures.R @ k for k in RECALL_AT}
    names |= {f"precision@{k}": ir_measures.P @ k for k in RECALL_AT}
    names |= {f"accuracy@{k}": ir_measures.Success @ k for k in RECALL_AT}
    names |= {"map@100": ir_measures.AP @ 100}
    measured = trec_eval.calc_aggregate(names.values(), qrels, as_run(hits))
    means = {name: measured[measure] for name, measure in names.items()}
    # trec_eval knows no depth for the reciprocal rank
    means["mrr@10"] = trec_eval.calc_aggregate([ir_measures.RR], qrels, as_run(best_hits(hits, 10)))[ir_measures.RR]
    name_by_measure = {str(measure): name for name, measure in names.items()}
    per_query: Hits = {f"ndcg@{k}": dict.fromkeys(judgements, 0.0) for k in NDCG_AT}
    for metric in trec_eval.iter_calc([ir_measures.nDCG @ k for k in NDCG_AT], qrels, as_run(hits)):
        per_query[name_by_measure[str(metric.measure)]][metric.query_id] = metric.value
    return means, per_query


def as_run(hits: Hits) -> list:
    return [
        ir_measures.ScoredDoc(query, document, score)
        for query, scores in hits.items()
        for document, score in scores.items()
    ]


def best_hits(hits: Hits, k: int) -> Hits:
    return {query: dict(sorted(scores.items(), key=lambda hit: -hit[1])[:k]) for query, scores in hits.items()}


def assert_equal_to_trec_eval(num_documents: int, judgements: Scores, hits: Hits) -> None:
    means, per_query = our_scores(num_documents, judgements, hits)
    their_means, their_per_query = their_scores(judgements, hits)
    for name, value in their_means.items():
        assert means[name] == pytest.approx(value, abs=1e-6), name
    for name, values in their_per_query.items():
        assert per_query[name] == pytest.approx(values, abs=1e-6), name


def random_case(seed: int, *, num_documents: int = 300, num_queries: int = 40) -> tuple[Scores, Hits]:
    """Judgements with grades of 1 to 3, and hits without ties: their scores are places in a random order."""
    rng = np.random.default_rng(seed)
    judgements, hits = {}, {}
    for query in range(num_queries):
        relevant = rng.choice(num_documents, rng.integers(1, 30), replace=False)
        judgements[f"q{query}"] = {str(document): int(rng.integers(1, 4)) for document in relevant}
        # some queries find little, and one of them nothing
        found = rng.permutation(num_documents)[: rng.choice([0, 1, 5, 100, num_documents])]
        hits[f"q{query}"] = {str(document): 1.0 - place / 1024 for place, document in enumerate(found)}
    return judgements, hits


@pytest.mark.parametrize("seed", range(8))
def test_graded_scores_are_those_of_trec_eval(seed: int) -> None:
    judgements, hits = random_case(seed)
    assert_equal_to_trec_eval(300, judgements, hits)


def test_a_query_without_hits_counts_as_zero() -> None:
    judgements = {"q0": {"0": 2, "1": 1}, "q1": {"2": 3}}
    means, _ = our_scores(5, judgements, {"q0": {"0": 0.9, "1": 0.8}, "q1": {}})
    assert means["ndcg@10"] == means["map@100"] == means["recall@10"] == means["mrr@10"] == 0.5
    assert_equal_to_trec_eval(5, judgements, {"q0": {"0": 0.9, "1": 0.8}, "q1": {}})


@st.composite
def cases_of_any_shape(draw: st.DrawFn) -> tuple[int, Scores, Hits]:
    num_documents = draw(st.integers(1, 14))
    documents = st.sampled_from([str(i) for i in range(num_documents)])
    queries = [f"q{i}" for i in range(draw(st.integers(1, 4)))]
    judgements = {query: draw(st.dictionaries(documents, st.integers(1, 3), min_size=1)) for query in queries}
    orders = {query: draw(st.lists(documents, unique=True)) for query in queries}
    hits = {
        query: {document: 1.0 - place / 16 for place, document in enumerate(order)} for query, order in orders.items()
    }
    return num_documents, judgements, hits


@settings(max_examples=40, deadline=None)
@given(cases_of_any_shape())
def test_graded_scores_are_those_of_trec_eval_whatever_the_shape(case: tuple[int, Scores, Hits]) -> None:
    assert_equal_to_trec_eval(*case)


@pytest.fixture(scope="module")
def clip(clip_path: str) -> SentenceTransformer:
    return SentenceTransformer(clip_path, device="cpu")


def with_several_pages_a_query(pages: Dataset, *, prefix: str = "") -> RetrievalDataset:
    """The pages with judgements that are drawn: one to six relevant pages a query."""
    rng = np.random.default_rng(1)
    ids = [prefix + document_id for document_id in pages["id"]]
    asking = [row for row, query in enumerate(pages["query"]) if query is not None]
    relevant = [rng.choice(len(ids), rng.integers(1, 7), replace=False).tolist() for _ in asking]
    return RetrievalDataset(
        pages.select_columns(["image"]).add_column("document_id", ids),
        Dataset.from_dict({"query_id": [ids[row] for row in asking], "text": [pages[row]["query"] for row in asking]}),
        Dataset.from_dict(
            {
                "query_id": [ids[row] for row, pages in zip(asking, relevant, strict=True) for _ in pages],
                "document_id": [ids[page] for pages in relevant for page in pages],
                "score": [1 for pages in relevant for _ in pages],
            }
        ),
    )


def hand_built(
    dataset: RetrievalDataset, pages: Dataset, name: str, truncate_dim: int | None
) -> InformationRetrievalEvaluator:
    relevant: dict[str, set[str]] = {}
    for judgement in dataset.qrels:
        relevant.setdefault(judgement["query_id"], set()).add(judgement["document_id"])
    return InformationRetrievalEvaluator(
        queries=dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True)),
        corpus=dict(zip(dataset.corpus["document_id"], pages["image"], strict=True)),
        relevant_docs=relevant,
        batch_size=16,
        name=name,
        truncate_dim=truncate_dim,
    )


@pytest.mark.parametrize("dim", [None, 64, 16])
def test_binary_scores_of_several_pages_a_query_are_the_hosts(
    pages: Dataset, clip: SentenceTransformer, dim: int | None
) -> None:
    dataset = with_several_pages_a_query(pages)
    assert len(dataset.qrels) > 2 * len(dataset)
    ours = build_evaluator(dataset, truncate_dims=[64, 16], show_progress_bar=False)(clip)
    theirs = hand_built(dataset, pages, "vdr" if dim is None else f"vdr-{dim}d", dim)(clip)
    assert len(theirs) > 10
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-9), key


def test_other_ids_give_the_same_scores(pages: Dataset, clip: SentenceTransformer) -> None:
    """Each page stands twice in the corpus, so that every page is tied with another."""

    def scores(prefix: str) -> dict[str, float]:
        once = with_several_pages_a_query(pages, prefix=prefix)
        copies = once.corpus.remove_columns("document_id").add_column(
            "document_id", [f"{prefix}{i}" for i in range(len(pages))]
        )
        dataset = RetrievalDataset(concatenate_datasets([once.corpus, copies]), once.queries, once.qrels)
        return build_evaluator(dataset, truncate_dims=[16], show_progress_bar=False)(clip)

    assert scores("") == scores("zz") == scores("0")
