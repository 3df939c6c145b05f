"""The size frontier: against brute force, one encoding, what is recommended, the picture, bad input."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from mmtune import ConfigError, DatasetError, MissingExtraError, RetrievalDataset, build_evaluator, finetune
from mmtune.evaluation.frontier import FrontierRow, loss_p_values, recommend, size_frontier
from mmtune.testing import generated_pages, tiny_clip

DIMS = [64, 24, 9]
WORDS = (
    "revenue",
    "cost",
    "profit",
    "asia",
    "europe",
    "cobalt",
    "nickel",
    "quarter",
    "year",
    "growth",
    "loss",
    "water",
)

QUERIES = Features({"query_id": Value("string"), "text": Value("string")})
QRELS = Features({"query_id": Value("string"), "document_id": Value("string"), "score": Value("int64")})


def texts_about(count: int, *, seed: int, num_queries: int = 0) -> RetrievalDataset:
    """Documents of ten words; a query has three of its document's words, and another document is somewhat relevant."""
    random = Random(seed)
    texts = [" ".join(random.choices(WORDS, k=10)) for _ in range(count)]
    ids = [f"{number}: 'Zürich'/\"é\"" for number in range(count)]
    judged = [(f"q {at}", ids[at], 2) for at in range(num_queries)]
    judged += [(f"q {at}", ids[-1 - at], 1) for at in range(num_queries)]
    names = ("query_id", "document_id", "score")
    return RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": texts}),
        Dataset.from_dict(
            {
                "query_id": [f"q {at}" for at in range(num_queries)],
                "text": [" ".join(random.sample(texts[at].split(), 3)) for at in range(num_queries)],
            },
            QUERIES,
        ),
        Dataset.from_dict({name: [each[at] for each in judged] for at, name in enumerate(names)}, QRELS),
    )


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    return texts_about(70, seed=0, num_queries=30)


@pytest.fixture(scope="module")
def calibration() -> RetrievalDataset:
    return texts_about(20, seed=1)


@pytest.fixture(scope="module")
def dense(text_encoder_path: str) -> SentenceTransformer:
    return SentenceTransformer(text_encoder_path, device="cpu")


@pytest.fixture(scope="module")
def late(text_encoder_path: str) -> MultiVectorEncoder:
    return MultiVectorEncoder(text_encoder_path, device="cpu")


def quantized(vectors: np.ndarray, dtype: str, ranges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What is left of vectors, written out by the definition."""
    if dtype == "float32":
        return vectors
    if dtype == "binary":
        return np.where(vectors > 0, 1.0, -1.0)
    low, high = ranges
    step = (high - low) / np.float32(255)
    return np.clip(np.floor((vectors - low) / step), 0, 255) * step + low


def mean_over_orders(scores: Sequence[float], gains: Sequence[int]) -> float:
    """nDCG@10 where each group of equal scores is in any order: each member has the group's mean discount."""
    discount = [1 / math.log2(rank + 2) if rank < 10 else 0.0 for rank in range(len(scores))]
    found = 0.0
    for score in set(scores):
        before, members = sum(each > score for each in scores), [at for at, each in enumerate(scores) if each == score]
        share = sum(discount[before : before + len(members)]) / len(members)
        found += share * sum(gains[at] for at in members)
    return found / sum(gain * weight for gain, weight in zip(sorted(gains, reverse=True), discount, strict=True))


def ndcg_of_each(data: RetrievalDataset, queries: list[np.ndarray], documents: list[np.ndarray]) -> dict[str, float]:
    """Of items that each are a table of vectors: the sum over a query's of the best product with a document's."""
    score = {(row["query_id"], row["document_id"]): row["score"] for row in data.qrels}
    found = {}
    for query_id, query in zip(data.queries["query_id"], queries, strict=True):
        scores = [float((query @ document.T).max(axis=1).sum()) for document in documents]
        gains = [score.get((query_id, document_id), 0) for document_id in data.corpus["document_id"]]
        found[query_id] = mean_over_orders(scores, gains)
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def as_inputs(texts: Any) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def by_hand(model: SentenceTransformer, data: RetrievalDataset, pages: Any, seen: Any, dim: int, dtype: str) -> Any:
    """One combination alone, encoded by the plain host at that size."""
    options: dict[str, Any] = {"truncate_dim": dim, "normalize_embeddings": True, "batch_size": 7}
    queries = model.encode_query(as_inputs(data.queries["text"]), **options)
    documents, others = (model.encode_document(each, **options) for each in (pages, seen))
    kept = quantized(documents, dtype, (others.min(axis=0), others.max(axis=0)))
    wide = np.float64
    return ndcg_of_each(data, list(queries.astype(wide)[:, None]), list(kept.astype(wide)[:, None]))


@pytest.mark.parametrize("with_calibration", [True, False])
def test_it_equals_every_combination_encoded_and_searched_by_itself(
    dense: SentenceTransformer, data: RetrievalDataset, calibration: RetrievalDataset, with_calibration: bool
) -> None:
    other = calibration if with_calibration else None
    found = size_frontier(dense, data, dims=DIMS, calibration=other, documents="text", show_progress_bar=False)
    assert [(row.dim, row.dtype) for row in found.rows] == [
        (dim, dtype) for dim in DIMS for dtype in ("float32", "int8", "binary")
    ]
    values = [row.ndcg for row in found.rows]
    assert 0.05 < min(values) < max(values) < 0.95, "a set that saturates would show nothing"
    assert len({round(value, 4) for value in values}) >= 7
    texts = as_inputs(data.corpus["text"])
    signs = dense.encode_document(texts)[:, : DIMS[-1]] > 0
    assert len(np.unique(signs, axis=0)) < len(texts) / 2, "no ties would show nothing either"
    seen = as_inputs(calibration.corpus["text"]) if with_calibration else texts
    for row in found.rows:
        expected = by_hand(dense, data, texts, seen, row.dim, row.dtype)
        assert found.per_query[row.name] == pytest.approx(expected, abs=1e-9), row.name
        assert row.ndcg == pytest.approx(np.mean(list(expected.values())))
        assert (
            row.bytes_per_document == {"float32": 4 * row.dim, "int8": row.dim, "binary": -(-row.dim // 8)}[row.dtype]
        )
        assert row.interval is not None
        assert row.interval[0] < row.ndcg < row.interval[1]


def test_late_interaction_equals_every_combination_encoded_and_searched_by_itself(
    late: MultiVectorEncoder, data: RetrievalDataset, calibration: RetrievalDataset
) -> None:
    full = late.get_embedding_dimension() or 0
    options: dict[str, Any] = {"documents": "text", "calibration": calibration, "show_progress_bar": False}
    found = size_frontier(late, data, dims=[full, 16], pool_factors=[1, 3], **options)
    assert len(found.rows) == 12
    assert len({round(row.ndcg, 4) for row in found.rows}) >= 8
    for row in found.rows:
        pooling = None if row.pooling == 1 else HierarchicalTokenPooling(row.pooling)
        queries = late.encode_query(as_inputs(data.queries["text"]), batch_size=7)
        kept, seen = (
            [
                np.asarray(each)[:, : row.dim]
                for each in late.encode_document(as_inputs(part.corpus["text"]), token_pooling=pooling, batch_size=7)
            ]
            for part in (data, calibration)
        )
        asking = [np.asarray(each)[:, : row.dim] for each in queries]
        if row.dim < full:
            asking, kept, seen = ([unit(each) for each in part] for part in (asking, kept, seen))
        ranges = np.concatenate(seen).min(axis=0), np.concatenate(seen).max(axis=0)
        read = [quantized(each, row.dtype, ranges).astype(np.float64) for each in kept]
        expected = ndcg_of_each(data, [each.astype(np.float64) for each in asking], read)
        assert found.per_query[row.name] == pytest.approx(expected, abs=1e-9), row.name
        size = {"float32": 4 * row.dim, "int8": row.dim, "binary": -(-row.dim // 8)}[row.dtype]
        assert row.bytes_per_document == pytest.approx(size * np.mean([len(each) for each in kept]))


@pytest.mark.slow
def test_a_trained_model_on_pages_equals_brute_force(tmp_path: Path) -> None:
    train, held_out = RetrievalDataset.from_id_rows(generated_pages(260, seed=0)).split(60, seed=0)
    recipe: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-3, "num_negatives": 0, "disable_tqdm": True}
    model = finetune(tiny_clip(tmp_path / "clip"), train, output_dir=tmp_path / "run", **recipe).model
    found = size_frontier(model, held_out, dims=DIMS, calibration=train, show_progress_bar=False)
    values = [row.ndcg for row in found.rows]
    assert 0.1 < max(values) < 0.99
    assert max(values) - min(values) > 0.05
    pages, seen = images_of(held_out), images_of(train)
    for row in found.rows:
        expected = by_hand(model, held_out, pages, seen, row.dim, row.dtype)
        assert found.per_query[row.name] == pytest.approx(expected, abs=1e-6), row.name


def images_of(data: RetrievalDataset) -> list[Any]:
    return list(data.corpus.cast_column("image", Image())["image"])


def test_queries_and_documents_are_encoded_once(
    dense: SentenceTransformer, data: RetrievalDataset, calibration: RetrievalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: dict[str, int] = {}

    def count(name: str, method: Any, inputs: Any, **options: Any) -> Any:
        encoded[name] = encoded.get(name, 0) + len(inputs)
        return method(inputs, **options)

    for name in ("encode_query", "encode_document"):
        monkeypatch.setattr(dense, name, partial(count, name, getattr(dense, name)))
    size_frontier(dense, data, dims=DIMS, calibration=calibration, documents="text", show_progress_bar=False)
    assert encoded == {"encode_query": len(data), "encode_document": len(data.corpus) + len(calibration.corpus)}


def test_the_full_size_is_what_the_evaluator_measures(dense: SentenceTransformer, data: RetrievalDataset) -> None:
    # a copy under another id is the same document, for both
    copied = RetrievalDataset(
        Dataset.from_dict(
            {
                "document_id": [*data.corpus["document_id"], "a copy"],
                "text": [*data.corpus["text"], data.corpus["text"][3]],
            }
        ),
        data.queries.shuffle(seed=1),
        data.qrels.shuffle(seed=2),
    )
    evaluator: Any = build_evaluator(copied, model=dense, truncate_dims=[32], documents="text", show_progress_bar=False)
    evaluator(dense)
    found = size_frontier(dense, copied, dims=[64, 32], dtypes=["float32"], documents="text", show_progress_bar=False)
    assert found.num_documents == len(data.corpus)
    assert found.per_query["64d float32"] == pytest.approx(evaluator.per_query["vdr_cosine_ndcg@10"])
    assert found.per_query["32d float32"] == pytest.approx(evaluator.per_query["vdr-32d_cosine_ndcg@10"])


def test_what_the_table_says(dense: SentenceTransformer, data: RetrievalDataset, calibration: RetrievalDataset) -> None:
    quiet: dict[str, Any] = {"documents": "text", "show_progress_bar": False}
    found = size_frontier(dense, data, **quiet)
    assert [row.dim for row in found.rows] == [64] * 3 + [32] * 3
    text = str(found)
    assert text.startswith(f"nDCG@10 of 30 queries in {found.num_clusters} independent groups, 70 documents")
    assert len(text.splitlines()) == 2 + 2 + 6 + 2
    assert "ranges of the evaluated documents" in text
    assert sum(line.startswith("|   *") for line in text.splitlines()) == 1
    assert "ranges of 20 other documents, which are few" in str(
        size_frontier(dense, data, calibration=calibration, **quiet)
    )
    assert "ranges" not in str(size_frontier(dense, data, dtypes=["binary"], **quiet))


def test_a_calibration_that_knows_what_is_evaluated_says_so(
    dense: SentenceTransformer, data: RetrievalDataset, calibration: RetrievalDataset, caplog: Any
) -> None:
    quiet: dict[str, Any] = {"documents": "text", "dims": [32], "show_progress_bar": False}
    renamed = [{"document_id": f"copy {at}", "text": text} for at, text in enumerate(data.corpus["text"][:5])]
    both = RetrievalDataset.concatenate(
        [calibration, RetrievalDataset(Dataset.from_list(renamed), calibration.queries, calibration.qrels)]
    )
    found = size_frontier(dense, data, dtypes=["int8"], calibration=both, **quiet)
    assert found.calibration.startswith("25 documents, which are few; 5 of them are evaluated, too")
    assert not caplog.records
    size_frontier(dense, data, dtypes=["binary"], calibration=both, **quiet)
    assert "calibration is not used" in caplog.text


def test_a_size_beyond_a_model_that_does_not_know_its_own_is_refused(
    dense: SentenceTransformer, data: RetrievalDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "get_embedding_dimension", lambda: None)
    quiet: dict[str, Any] = {"documents": "text", "show_progress_bar": False}
    assert size_frontier(dense, data, dims=[64, 8], dtypes=["float32"], **quiet).rows[0].bytes_per_document == 256
    with pytest.raises(ConfigError, match="512 is larger than the 64"):
        size_frontier(dense, data, dims=[512, 8], **quiet)
    with pytest.raises(ConfigError, match="512 is larger than the 64"):
        build_evaluator(data, model=dense, truncate_dims=[512], **quiet)(dense)


def rows_of(*values: np.ndarray) -> list[FrontierRow]:
    """Rows that halve in size."""
    return [
        FrontierRow(2 ** (9 - at), "float32", None, float(each.mean()), None, 2.0 ** (11 - at))
        for at, each in enumerate(values)
    ]


def choose(values: list[np.ndarray], clusters: np.ndarray, tolerance: float = 0.02) -> tuple[FrontierRow, str]:
    rows = rows_of(*values)
    tested = loss_p_values(rows, np.stack(values), clusters, tolerance)
    rows = [
        FrontierRow(row.dim, row.dtype, None, row.ndcg, None, row.bytes_per_document, p_value)
        for row, p_value in zip(rows, tested, strict=True)
    ]
    return recommend(rows, tolerance, int(clusters.max()) + 1)


def test_the_smallest_that_is_shown_to_lose_little_is_recommended() -> None:
    rng = np.random.default_rng(0)
    full, clusters = rng.uniform(0.3, 0.9, 100), np.arange(100)
    half, quarter = full - 0.002 + rng.normal(0, 0.02, 100), full - 0.05 + rng.normal(0, 0.02, 100)
    chosen, reason = choose([full, half, quarter], clusters)
    assert chosen.dim == 256
    assert "50.0% of 512d float32" in reason
    # the same means of two queries that differ wildly show nothing
    noisy = full - 0.002 + rng.permutation(np.repeat([0.4, -0.4], 50))
    chosen, reason = choose([full, noisy, quarter], clusters)
    assert chosen.dim == 512
    assert "More queries" in reason


def test_a_size_that_is_best_by_itself_is_recommended_over_a_larger_one() -> None:
    full = np.linspace(0.2, 0.8, 40)
    chosen, _ = choose([full, full + 0.1], np.arange(40))
    assert chosen.dim == 256


def test_a_choice_among_many_rows_is_corrected_for() -> None:
    rng = np.random.default_rng(1)
    full = rng.uniform(0.3, 0.9, 60)
    small = full - 0.01 + rng.normal(0, 0.03, 60)
    assert choose([full, small], np.arange(60))[0].dim == 256
    assert choose([full, small, *[full - 0.3] * 8], np.arange(60))[0].dim == 512


def test_queries_that_hang_together_count_once() -> None:
    rng = np.random.default_rng(4)
    of_page = rng.normal(0, 0.06, 14)
    of_page -= of_page.mean() + 0.002
    full, clusters = rng.uniform(0.3, 0.9, 14 * 12), np.repeat(np.arange(14), 12)
    small = full + np.repeat(of_page, 12)
    assert choose([full, small], np.arange(14 * 12))[0].dim == 256
    assert choose([full, small], clusters)[0].dim == 512


def test_with_few_clusters_the_largest_is_kept() -> None:
    full = np.full(9, 0.5)
    chosen, reason = choose([full, full + 0.1], np.arange(9))
    assert chosen.dim == 512
    assert reason.startswith("Too few queries to recommend a smaller size: 9 independent groups")
    assert choose([np.full(10, 0.5)] * 3, np.arange(10))[0].dim == 128, "of equal rows the smallest"


def test_a_loss_of_the_tolerance_is_rarely_let_pass() -> None:
    rng, passed, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        cluster = np.repeat(np.arange(30), rng.integers(1, 4, 30))
        full = np.zeros(len(cluster))
        small = full - 0.02 + rng.normal(0, 0.05, 30)[cluster] + rng.normal(0, 0.03, len(cluster))
        if small.mean() < 0:  # else it is the best itself
            passed += choose([full, small], cluster)[0].dim == 256
    assert passed / runs <= 0.065


def test_the_picture(dense: SentenceTransformer, data: RetrievalDataset, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("matplotlib")
    found = size_frontier(dense, data, dims=DIMS, documents="text", show_progress_bar=False)
    assert found.plot(tmp_path / "new" / "sizes.png").read_bytes()[:4] == b"\x89PNG"
    svg = found.plot(str(tmp_path / "sizes.svg")).read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("float32", "int8", "binary", "recommended"))
    with pytest.raises(ConfigError, match="expected a name that ends in one of"):
        found.plot(tmp_path / "sizes.doc")
    with pytest.raises(ConfigError, match="path=5"):
        found.plot(5)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be written to"):
        found.plot(tmp_path / "file" / "sizes.png")
    monkeypatch.setattr("mmtune.report.plots.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*\[report\]"):
        found.plot(tmp_path / "sizes.png")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "my-model"}, ConfigError, "no retriever"),
        ({"dataset": 5}, DatasetError, "dataset=5 is no dataset"),
        ({"dims": 64}, ConfigError, "dims=64: expected None or whole numbers"),
        ({"dims": []}, ConfigError, "dims is empty"),
        ({"dims": [0]}, ConfigError, "dims holds 0"),
        ({"dims": [True]}, ConfigError, "dims holds True"),
        ({"dims": [65]}, ConfigError, "65 is larger than the 64"),
        ({"dtypes": "int8"}, ConfigError, "dtypes='int8': expected a list"),
        ({"dtypes": 8}, ConfigError, "dtypes=8: expected a list"),
        ({"dtypes": []}, ConfigError, "dtypes is empty"),
        ({"dtypes": ["int4"]}, ConfigError, "'int4' is unknown"),
        ({"dtypes": [None]}, ConfigError, "None is unknown"),
        ({"tolerance": -0.1}, ConfigError, "tolerance=-0.1: expected a number from 0 to below 1"),
        ({"tolerance": 1}, ConfigError, "tolerance=1: expected"),
        ({"show_progress_bar": "no"}, ConfigError, "show_progress_bar='no': expected True or False"),
        ({"tolerance": "small"}, ConfigError, "tolerance='small'"),
        ({"tolerance": float("nan")}, ConfigError, "tolerance=nan"),
        ({"pool_factors": [2]}, ConfigError, "nothing to pool"),
        ({"calibration": 5}, DatasetError, "calibration=5 is no dataset"),
        ({"calibration": generated_pages(2)}, ConfigError, "text"),
        ({"calibration": texts_about(1, seed=0)}, DatasetError, "calibration has 1 documents"),
        ({"documents": "words"}, ConfigError, "documents='words'"),
        ({"batch_size": 0}, ConfigError, "batch_size=0"),
    ],
)
def test_bad_input(
    dense: SentenceTransformer, data: RetrievalDataset, arguments: dict[str, Any], error: Any, message: str
) -> None:
    given: dict[str, Any] = {"model": dense, "dataset": data, "documents": "text", "show_progress_bar": False}
    with pytest.raises(error, match=message):
        size_frontier(**(given | arguments))


@pytest.mark.parametrize(
    ("factors", "message"), [(2, "pool_factors=2"), ([], "is empty"), ([0.5], "holds 0.5"), ("12", "pool_factors='12'")]
)
def test_bad_pooling(late: MultiVectorEncoder, data: RetrievalDataset, factors: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        size_frontier(late, data, pool_factors=factors, documents="text", show_progress_bar=False)


def test_scores_that_are_no_numbers_are_named(
    data: RetrievalDataset, dense: SentenceTransformer, monkeypatch: Any
) -> None:
    monkeypatch.setattr(dense, "similarity_fn_name", "dot")
    monkeypatch.setattr(dense, "similarity", lambda queries, pages: torch.full((len(queries), len(pages)), math.inf))
    with pytest.raises(DatasetError, match="'q 0'"):
        size_frontier(dense, data, dims=[16], documents="text", show_progress_bar=False)
