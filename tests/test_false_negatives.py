import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer

from mmtune import ConfigError, RetrievalDataset, build_late_interaction, find_false_negatives, load_model
from mmtune.data.findings import Example, Finding
from mmtune.inference.encoder import DatasetReader
from mmtune.inference.reranker import PairScorer
from mmtune.inference.store import Pair
from mmtune.testing import tiny_clip, tiny_llava, tiny_text_encoder

QUIET = {"show_progress_bar": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_model(tiny_clip(tmp_path_factory.mktemp("clip")), device="cpu")


@pytest.fixture(scope="module")
def data(pages) -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(pages)


@pytest.fixture(scope="module")
def texts() -> RetrievalDataset:
    """Texts with graded answers, a query text under two ids, a copy of an answer, and a negative listed twice."""
    words = ["coal and oil", "wind and sun", "staff by year", "sales by region", "wind and sun", "the board"]
    return RetrievalDataset(
        Dataset.from_dict({"document_id": [f"d'{k}/é" for k in range(6)], "text": words}),
        Dataset.from_dict({"query_id": [1, 2, 3], "text": ["energy", "energy", "people"]}),
        Dataset.from_dict(
            {"query_id": [1, 1, 2, 3], "document_id": [f"d'{k}/é" for k in (0, 3, 1, 2)], "score": [2, 1, 1, 1]}
        ),
        Dataset.from_dict(
            {"query_id": [1, 3], "document_ids": [[f"d'{k}/é" for k in (4, 5, 2, 5)], ["d'0/é", "d'5/é"]]}
        ),
    )


def by_loops(data: RetrievalDataset, score) -> dict[tuple[str, str], tuple[float, float]]:
    """Each negative above all answers of its query's text, with both scores."""
    text = dict(zip(data.queries["query_id"][:], data.queries["text"][:], strict=True))
    content = dict(zip(data.corpus["document_id"][:], data.relevance.page.tolist(), strict=True))
    answers: dict[str, set[str]] = {}
    for row in data.qrels.to_list():
        answers.setdefault(text[row["query_id"]], set()).add(row["document_id"])
    found = {}
    for row in data.negatives.to_list():
        own = answers[text[row["query_id"]]]
        best = max(score(row["query_id"], document) for document in own)
        for document in row["document_ids"]:
            if content[document] in {content[each] for each in own}:
                continue
            if score(row["query_id"], document) > best:
                found[row["query_id"], document] = score(row["query_id"], document), best
    return found


def check(data: RetrievalDataset, found: list[Finding], score) -> None:
    expected = by_loops(data, score)
    assert {(each.query_id, each.document_id) for each in found} == set(expected)
    assert len(found) == len(expected) > 0
    for each in found:
        assert (each.score, each.positive_score) == pytest.approx(expected[each.query_id, each.document_id], abs=1e-5)
        assert each.examples == (Example((each.query_id,), (each.document_id, each.positive_id)),)
    above = [each.score - each.positive_score for each in found]
    assert above == sorted(above, reverse=True)


def test_embeddings_find_what_loops_find(data, clip):
    reader = DatasetReader(data.corpus, data.queries, "image")
    queries, documents = data.queries["query_id"][:], data.corpus["document_id"][:]
    scores = clip.similarity(
        clip.encode_query(reader.read("query", queries), convert_to_tensor=True),
        clip.encode_document(reader.read("document", documents), convert_to_tensor=True),
    )
    check(
        data,
        find_false_negatives(data, clip, **QUIET),
        lambda query, document: scores[queries.index(query), documents.index(document)].item(),
    )


def test_equal_texts_copies_and_repeats_are_seen_through(texts, tmp_path):
    model = SentenceTransformer(tiny_text_encoder(tmp_path / "text"), device="cpu")
    text_of = dict(zip(texts.queries["query_id"][:], texts.queries["text"][:], strict=True))
    content_of = dict(zip(texts.corpus["document_id"][:], texts.corpus["text"][:], strict=True))

    def score(query: str, document: str) -> float:
        return model.similarity(model.encode_query(text_of[query]), model.encode_document(content_of[document])).item()

    expected = by_loops(texts, score)
    found = find_false_negatives(texts, model, documents="text", **QUIET)
    assert {(each.query_id, each.document_id) for each in found} == set(expected)
    assert len(found) == len(expected)
    cleaned = texts.without(found)
    assert cleaned.audit().counts["taken_out"] == len(found)
    left = {(row["query_id"], each) for row in cleaned.negatives.to_list() for each in row["document_ids"]}
    assert not left & set(expected)


def test_late_interaction_and_a_folder_that_keeps_embeddings(data, tmp_path):
    model = build_late_interaction(tiny_llava(tmp_path / "llava"), device="cpu")
    some = data.select_queries(6)
    first = find_false_negatives(some, model, cache_folder=tmp_path / "kept", **QUIET)
    files = sorted(path.name for path in (tmp_path / "kept").rglob("*.npz"))
    assert files
    assert find_false_negatives(some, model, cache_folder=tmp_path / "kept", **QUIET) == first
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*.npz")) == files


def test_a_reranker_finds_what_its_pairs_say(data, tmp_path, monkeypatch):
    """Scores are taken from the one pair scorer; here a table stands for the model's forward pass."""
    table = {}
    rng = np.random.default_rng(0)

    def score_pairs(self, pairs, contents=None, store=None):
        assert all(isinstance(pair, Pair) for pair in pairs)
        return np.array([table.setdefault(pair, rng.normal()) for pair in pairs])

    monkeypatch.setattr(PairScorer, "score_pairs", score_pairs)
    model = CrossEncoder.__new__(CrossEncoder)
    torch.nn.Module.__init__(model)
    monkeypatch.setattr(CrossEncoder, "num_labels", 1, raising=False)
    found = find_false_negatives(data, model, **QUIET)
    check(data, found, lambda query, document: table[Pair(query, document)])


def test_without_takes_the_entry_and_nothing_else(data, clip):
    found = find_false_negatives(data, clip, **QUIET)
    cleaned = data.without(found[0])
    before = {row["query_id"]: row["document_ids"] for row in data.negatives.to_list()}
    after = {row["query_id"]: row["document_ids"] for row in cleaned.negatives.to_list()}
    gone = found[0]
    assert after.pop(gone.query_id) == [each for each in before.pop(gone.query_id) if each != gone.document_id]
    assert after == before
    assert len(cleaned.corpus) == len(data.corpus)
    assert cleaned.audit()["taken_out"].examples == (Example((gone.query_id,), (gone.document_id,)),)
    assert find_false_negatives(cleaned, clip, **QUIET) == found[1:]


def test_a_dataset_without_negatives_has_none(data, clip):
    bare = RetrievalDataset(data.corpus, data.queries, data.qrels)
    assert find_false_negatives(bare, clip, **QUIET) == []


def test_a_finding_reads_as_a_sentence(data, clip):
    first = find_false_negatives(data, clip, **QUIET)[0]
    assert str(first).startswith("query '")
    assert f"scores {first.score:.3f}, above " in str(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "my-model"}, r"is no retriever\..*load_model\('my-model'\)"),
        ({"model": None}, "is no retriever"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"show_progress_bar": "no"}, "show_progress_bar='no'"),
        ({"cache_folder": 5}, "cache_folder=5"),
        ({"documents": "text"}, "documents='text' needs a column 'text'"),
        ({"documents": "pages"}, "documents='pages'"),
    ],
)
def test_bad_arguments(data, clip, arguments, message):
    with pytest.raises(ConfigError, match=message):
        find_false_negatives(data, **({"model": clip} | arguments))
