"""What a document is made of decides which documents are the same."""

import io

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sentence_transformers import SentenceTransformer

from mmtune import ConfigError, DatasetError, RetrievalDataset, build_evaluator, mine_hard_negatives
from mmtune.data.judgements import Judgements
from mmtune.data.rows import view_of


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def chunks(num_pages: int = 4, num_chunks: int = 3) -> RetrievalDataset:
    """Pages cut into chunks of text that share the image of their page; the last chunk answers, the others do not."""
    pairs = [(page, chunk) for page in range(num_pages) for chunk in range(num_chunks)]
    ids = [f"p{page}c{chunk}" for page, chunk in pairs]
    others = [[f"p{page}c{chunk}" for chunk in range(num_chunks - 1)] for page in range(num_pages)]
    queries = [f"q{page}" for page in range(num_pages)]
    return RetrievalDataset(
        Dataset.from_dict(
            {
                "document_id": ids,
                "image": [png(page) for page, _ in pairs],
                "text": [f"chunk {chunk} of page {page}" for page, chunk in pairs],
            }
        ),
        Dataset.from_dict({"query_id": queries, "text": [f"what of page {page}" for page in range(num_pages)]}),
        Dataset.from_dict(
            {
                "query_id": queries,
                "document_id": [f"p{page}c{num_chunks - 1}" for page in range(num_pages)],
                "score": [1] * num_pages,
            }
        ),
        Dataset.from_dict({"query_id": queries, "document_ids": others}),
    )


@pytest.mark.parametrize("documents", ["text", "text+image"])
def test_chunks_of_one_page_image_are_negatives_of_each_other(documents):
    rows = chunks().training_rows(2, documents=documents)
    view = view_of(rows)
    assert (view.chosen["listed"], view.chosen["refused"], view.chosen["filled"]) == (8, 0, 0)
    ids = rows.with_format(None)[:]
    assert ids["negative_document_ids"] == [[f"p{page}c0", f"p{page}c1"] for page in range(4)]
    assert view.relevant_to(np.array(ids["relevance_group"]))[1].to_pylist() == ids["document_id"]


@pytest.mark.parametrize("documents", ["text", "text+image"])
def test_pages_without_a_text_are_named_before_models_run_and_can_be_taken_out(documents, clip_path, monkeypatch):
    data = chunks()
    texts = [None if at in (1, 4) else text for at, text in enumerate(data.corpus["text"][:])]
    corpus = data.corpus.remove_columns("text").add_column("text", texts)
    data = RetrievalDataset(corpus, data.queries, data.qrels, data.negatives)
    model = SentenceTransformer(str(clip_path), device="cpu")
    message = r"2 documents have no text, e\.g\. 'p0c1'.*audit\(num_examples=None\)\['documents_without_text'\]"
    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", None)
        with pytest.raises(DatasetError, match=message):
            mine_hard_negatives(data, model, documents=documents, show_progress_bar=False)
    with pytest.raises(DatasetError, match=message):
        build_evaluator(data, documents=documents)
    found = data.audit(num_examples=None)["documents_without_text"]
    assert (found.count, found.is_problem) == (2, False)
    whole = data.without(found)
    assert set(data.corpus["document_id"]) - set(whole.corpus["document_id"]) == {"p0c1", "p1c1"}
    build_evaluator(whole, documents=documents)
    mine_hard_negatives(whole, model, documents="text", show_progress_bar=False)


def test_as_images_they_are_one_page():
    rows = chunks().training_rows(2)
    assert (view_of(rows).chosen["listed"], view_of(rows).chosen["refused"]) == (0, 8)


@pytest.mark.parametrize("documents", ["text", "text+image"])
def test_pairs_and_lists_take_chunks_of_the_same_page_as_negatives(documents):
    pairs = chunks().labeled_pairs(2, documents=documents).with_format(None)[:]
    assert pairs["document_id"][:3] == ["p0c2", "p0c0", "p0c1"]
    lists = chunks().labeled_lists(2, documents=documents).with_format(None)[:]
    assert lists["document_ids"][0] == ["p0c2", "p0c0", "p0c1"]


def test_candidates_are_the_chunks_that_were_judged():
    judgements = Judgements.of(chunks().relevance_of("text"), "text_to_image")
    assert len(judgements.distinct_items) == 12
    for page, candidates in enumerate(judgements.lists(3, seed=0)):
        assert candidates.candidate_ids == (f"p{page}c2", f"p{page}c0", f"p{page}c1")
        assert candidates.gains == (1, 0, 0)


def test_deduplicating_follows_what_a_document_is_made_of():
    data = chunks()
    assert [len(data.deduplicate(documents=kind).corpus) for kind in ("image", "text", "text+image")] == [4, 12, 12]
    assert len(data.deduplicate().corpus) == 4


def test_both_parts_must_be_equal():
    tables = chunks(2, 2)
    texts = ["same", "same", "same", "other"]
    data = RetrievalDataset(
        tables.corpus.remove_columns("text").add_column("text", texts), tables.queries, tables.qrels, tables.negatives
    )
    assert data.relevance_of("image").page.tolist() == [0, 0, 2, 2]
    assert data.relevance_of("text").page.tolist() == [0, 0, 0, 3]
    assert data.relevance_of("text+image").page.tolist() == [0, 0, 2, 3]


def test_evaluators_and_mining_see_every_chunk(clip_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(clip_path)
    data = chunks()
    evaluator = build_evaluator(data, documents="text", show_progress_bar=False)
    evaluator(model)
    assert len(evaluator.corpus_ids) == 12
    mined = mine_hard_negatives(
        data, model, documents="text", num_negatives=11, relative_margin=None, show_progress_bar=False
    )
    assert [len(ids) for ids in mined.negatives["document_ids"]] == [11] * 4


def test_the_corpus_must_have_what_identity_is_asked_of():
    data = chunks()
    images = RetrievalDataset(data.corpus.remove_columns("text"), data.queries, data.qrels)
    with pytest.raises(ConfigError, match=r"documents='text' needs a column 'text'"):
        images.relevance_of("text")
    with pytest.raises(ConfigError, match=r"documents='pages' is unknown"):
        images.deduplicate(documents="pages")
