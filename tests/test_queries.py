"""`generate_queries`: what is asked, what is kept and dropped, and that nothing answered is asked again."""

import base64
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoTokenizer

from chat_server import asked, completion, failure, html, serving, slow
from mmtune import (
    ConfigError,
    DatasetError,
    MissingExtraError,
    MmtuneError,
    OpenAICompatible,
    RetrievalDataset,
    finetune_reranker,
)
from mmtune import generate_queries as generate_with_bars
from mmtune.data.identity import text_digest
from mmtune.inference.generators import read_queries, read_verdict
from mmtune.inference.wording import points_at_its_page
from mmtune.testing import generated_pages


def generate_queries(*args, **options):
    return generate_with_bars(*args, **{"show_progress_bar": False, **options})


def text_pages(count=4, texts=None):
    """Pages of text, without a query."""
    texts = [f"page {k}" for k in range(count)] if texts is None else texts
    corpus = Dataset.from_dict({"document_id": [f"d{k}" for k in range(len(texts))], "text": texts})
    return without_queries(corpus)


def without_queries(corpus):
    empty = {"query_id": ["q"], "text": ["x"]}, {"query_id": ["q"], "document_id": ["d"], "score": [1]}
    return RetrievalDataset(corpus, *(Dataset.from_dict(part).select([]) for part in empty))


def write(image, text, instruction):
    """A query of its own for each page and instruction."""
    own = text_digest(f"{image and image.tobytes()} {text} {instruction}")[:12]
    if '"queries"' in instruction:
        return json.dumps({"queries": [f"Nearly {own} {k}?" for k in range(4)]})
    return json.dumps({"query": f"What is {own}?", "answer": f"{own[:3]}"})


def say_yes(image, text, instruction):
    return "yes"


def judge_near(image, text, instruction):
    return '{"answers": "no"}' if "Nearly" in instruction else '{"answers": "yes"}'


def reasons(dataset):
    return [(each.document_id, each.text, each.reason) for each in dataset.notes.dropped_queries]


# What is written


def test_pages_without_queries_get_some_with_where_they_come_from():
    dataset = generate_queries(text_pages(3), write, queries_per_page=2, kinds=["fact", "open"], languages=["French"])
    assert dataset.queries["query_id"][:] == ["d0-q1", "d0-q2", "d1-q1", "d1-q2", "d2-q1", "d2-q2"]
    assert dataset.qrels["document_id"][:] == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert dataset.qrels["query_id"][:] == dataset.queries["query_id"][:]
    for start in (0, 2, 4):
        assert sorted(dataset.queries["kind"][start : start + 2]) == ["fact", "open"]
    assert set(dataset.queries["language"][:]) == {"French"}
    assert dataset.queries["generator"][:] == [f"{__name__}.write"] * 6
    assert all(text == f"What is {text[8:20]}?" for text in dataset.queries["text"][:])
    assert dataset.queries["answer"][:] == [text[8:11] for text in dataset.queries["text"][:]]
    assert all(len(prompt) == 32 for prompt in dataset.queries["prompt"][:])
    assert dataset.notes.dropped_queries == ()


def test_the_generator_sees_the_page_as_far_as_there_is_one(pages):
    seen = []

    def look(image, text, instruction):
        seen.append((image and image.size, text))
        return write(image, text, instruction)

    images = RetrievalDataset.from_id_rows(pages.select(range(3)), negatives_column=None).corpus
    generate_queries(without_queries(images), look, queries_per_page=1, max_workers=1)
    assert seen == [((128, 128), None)] * 3
    seen.clear()
    both = Dataset.from_list([{**row, "text": text} for row, text in zip(images, ["one", " ", None], strict=True)])
    generate_queries(without_queries(both.cast_column("image", images.features["image"])), look, queries_per_page=1)
    assert sorted(seen, key=str) == sorted([((128, 128), "one"), ((128, 128), None), ((128, 128), None)], key=str)


def test_equal_pages_are_asked_about_once_and_chunks_of_a_page_each():
    dataset = generate_queries(text_pages(texts=["same", "other", "same"]), write, queries_per_page=1)
    assert dataset.qrels["document_id"][:] == ["d0", "d1"]
    rows = RetrievalDataset.from_id_rows(generated_pages(1), negatives_column=None).corpus
    page = rows[0]["image"]
    chunks = Dataset.from_dict({"document_id": ["a", "b", "c"], "image": [page] * 3, "text": ["one", "two", "one"]})
    asked_about = generate_queries(without_queries(chunks.cast_column("image", rows.features["image"])), write)
    assert sorted(set(asked_about.qrels["document_id"][:])) == ["a", "b"]


def test_order_and_ids_do_not_depend_on_workers():
    def late(image, text, instruction):
        threading.Event().wait(0.02 * (int(text.split()[1]) % 3 == 0))
        return write(image, text, instruction)

    one, many = (generate_queries(text_pages(9), late, max_workers=workers) for workers in (1, 8))
    assert one.queries.remove_columns("generator").to_dict() == many.queries.remove_columns("generator").to_dict()
    shuffled = text_pages(9)
    shuffled = without_queries(shuffled.corpus.shuffle(seed=1))
    again = generate_queries(shuffled, late)
    assert sorted(zip(again.queries["query_id"][:], again.queries["text"][:], strict=True)) == sorted(
        zip(one.queries["query_id"][:], one.queries["text"][:], strict=True)
    )


def test_kinds_and_languages_take_turns():
    dataset = generate_queries(text_pages(10), write, queries_per_page=4, kinds=["fact", "table"], languages=["A", "B"])
    pairs = list(zip(dataset.queries["kind"][:], dataset.queries["language"][:], strict=True))
    for start in range(0, 40, 4):
        assert len(set(pairs[start : start + 4])) == 4
    single = generate_queries(text_pages(10), write, queries_per_page=1, kinds=["fact", "table"])
    assert set(single.queries["kind"][:]) == {"fact", "table"}
    more = generate_queries(text_pages(1), write, queries_per_page=3, kinds={"mine": "Ask for the colour."})
    assert more.queries["kind"][:] == ["mine"] * 3
    assert len(set(more.queries["prompt"][:])) == 3


def test_prompts_can_be_replaced():
    seen = []

    def look(image, text, instruction):
        seen.append(instruction)
        return write(image, text, instruction)

    generate_queries(text_pages(1), look, queries_per_page=1, kinds={"colour": "Ask for {the} colour."})
    assert seen[0].startswith("Ask for {the} colour.\n")
    assert "language of the page" in seen[0]


def test_existing_queries_are_kept_unless_replaced(pages):
    given = RetrievalDataset.from_id_rows(pages)
    kept = generate_queries(given, write, queries_per_page=1)
    assert kept.queries["text"][: len(given)] == given.queries["text"][:]
    assert kept.qrels.select(range(len(given.qrels))).to_dict() == given.qrels.to_dict()
    assert kept.negatives.to_dict() == given.negatives.to_dict()
    assert len(kept) == len(given) + len(given.corpus)
    assert kept.queries["generator"][0] is None
    replaced = generate_queries(given, write, queries_per_page=1, existing="replace")
    assert len(replaced) == len(given.corpus)
    assert replaced.negatives is None
    twice = generate_queries(kept, write, queries_per_page=1)
    assert len(twice) == len(kept)  # all repeat what was written before
    assert len(kept.training_rows(0)) == len(kept)


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('{"query": "What is it?", "answer": "a cat"}', ("What is it?", "a cat")),
        ('Here it is:\n```json\n{"query": "What is it?", "answer": 5}\n```', ("What is it?", "5")),
        ('<think>It says {"query": "no"}.</think>{"query": " What? "}', ("What?", None)),
        ('[{"query": "What?", "answer": null}]', ("What?", None)),
        ("  What is it?\n", ("What is it?", None)),
        ('{"question": "What is it?"}', ('{"question": "What is it?"}', None)),
        ('{"query": 5}', ('{"query": 5}', None)),
        ('"What is it?"', ('"What is it?"', None)),
        ("What is [1] of {2}?", ("What is [1] of {2}?", None)),
        ("true north is where?", ("true north is where?", None)),
        ("[[[[[", ("[[[[[", None)),
    ],
)
def test_a_reply_that_is_not_the_json_asked_for_is_the_query(reply, found):
    assert read_queries(reply)[0] == found


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"answers": "yes"}', 1),
        ('{"reason": "It says so.", "answers": "no"}', 0),
        ('{"answers": "partly"}', 0.5),
        ('{"answerable": true}', 1),
        ('{"score": 0.25}', 0.25),
        ("Yes, it does.", 1),
        ("No.", 0),
        ("**Partly**", 0.5),
        ("not at all", 0),
        ("1", 1),
        ("0", 0),
        ("17", None),
        ('{"confidence": 0.95, "verdict": "no"}', 0),
        ('{"page": 1, "verdict": "no"}', 0),
        ('{"reason": "No problems found, the table has it", "answer": "yes"}', 1),
        ('{"answer": "No smoking area", "is_answerable": true}', 1),
        ('{"Score": 0.9, "Relevant": "no"}', 0),
        ('{"answers": "no", "relevant": true}', 0),
        ('{"answers": "hm"}', None),
        ('{"page": 1, "confidence": 0.95}', 0.5),
        ('{"reason": "No problems found"}', 0.5),
        ("{}", None),
        ("Not sure, the page may well answer it.", 0.5),
        ("I'm not certain.", 0.5),
        ("Unsure", 0.5),
        ("Maybe.", 0.5),
        ("I cannot tell from this page.", 0.5),
        ("No doubt it does: yes", 0.5),
        ("Yes and no", 0.5),
        ("Not answered.", 0),
        ("The page shows a cat.", None),
        ("Nobody knows", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_json_and_words(reply, score):
    assert read_verdict(reply) == score


# What is left out


@pytest.mark.parametrize(
    "query",
    [
        "What does this figure show?",
        "How many people are in the table?",
        "According to the document, who is the chair?",
        "What does the chart show about sales?",
        "What is given in Table 3?",
        "Was zeigt diese Abbildung?",
        "Wie hoch ist der Umsatz laut der Tabelle?",
        "Que montre ce graphique ?",
        "Quel est le total dans le tableau ?",
        "¿Qué muestra esta tabla?",
        "Cosa mostra questa figura?",
        "O que mostra este gráfico?",
        "Wat staat er op deze pagina?",
        "这张图显示了什么",
        "この表の合計は",
    ],
)
def test_what_points_at_its_page_is_seen(query):
    assert points_at_its_page(query)


@pytest.mark.parametrize(
    "query",
    [
        "What was the revenue of Fjordland in 2021?",
        "Which laws that document retention must follow changed in 2020?",
        "Who plays the figure of Hamlet in the 1996 film?",
        "How is the document retention policy of Cobalt enforced?",
        "Who sat at the table of King Arthur?",
        "Wie viele Tabellenplätze verlor der Verein 2019?",
        "Combien de pages compte le rapport annuel 2022 de Cobalt ?",
        "Which page size does the HP 4000 print?",
    ],
)
def test_other_queries_do_not_point(query):
    assert not points_at_its_page(query)


def test_each_filter_drops_its_own_and_says_why():
    replies = {
        "page 0": '{"query": "What does this figure show?"}',
        "page 1": '{"query": "How many  work in Rome"}',
        "page 2": '{"query": "how many work in Rome?"}',
        "page 3": '{"query": "  "}',
        "page 4": '{"query": "half \\ud800 a pair"}',
        "page 5": '{"query": "Who is not there?"}',
        "page 6": '{"query": "What confuses judges?"}',
    }

    def judge(image, text, instruction):
        verdicts = {"not there": "no", "confuses": "well..."}
        return next((said for part, said in verdicts.items() if part in instruction), "yes")

    dataset = generate_queries(
        text_pages(7), lambda image, text, instruction: replies[text], judge=judge, queries_per_page=1
    )
    assert dataset.queries["text"][:] == ["How many  work in Rome"]
    assert dataset.qrels["document_id"][:] == ["d1", "d2"]
    assert sorted(reasons(dataset)) == [
        ("d0", "What does this figure show?", "it points at its page"),
        ("d3", "", "it is blank, or no text"),
        ("d4", "half \ud800 a pair", "it is blank, or no text"),
        ("d5", "Who is not there?", "its page does not answer it"),
        ("d6", "What confuses judges?", "the judge said neither: 'well...'"),
    ]
    assert dataset.audit()["dropped_queries"].count == 5


def test_what_was_dropped_outlives_the_disk_and_other_steps(tmp_path):
    dataset = generate_queries(text_pages(3), lambda *page: page[1], queries_per_page=2)
    assert [text for _, text, _ in reasons(dataset)] == ["page 0", "page 1", "page 2"]
    dataset.save(tmp_path / "saved")
    assert RetrievalDataset.load(tmp_path / "saved").notes == dataset.notes
    both = RetrievalDataset.concatenate([dataset, dataset])
    assert len(both.notes.dropped_queries) == 6


def drawn_as_negatives(dataset, query_id):
    rows = [dataset.training_rows(5, documents="text", seed=seed).with_format(None) for seed in range(8)]
    return {
        each for part in rows for row in part if row["query_id"] == query_id for each in row["negative_document_ids"]
    }


def listing(pages, text="what is the TOTAL revenue"):
    """One query, relevant to the last page, with a list of negatives."""
    queries = Dataset.from_dict({"query_id": ["q"], "text": [text]})
    qrels = Dataset.from_dict({"query_id": ["q"], "document_id": [pages.corpus[-1]["document_id"]], "score": [1]})
    lists = Dataset.from_dict({"query_id": ["q"], "document_ids": [["d2"]]})
    return RetrievalDataset(pages.corpus, queries, qrels, lists)


def ask_the_same(image, text, instruction):
    """The same query for pages 0 and 1, in other letters."""
    shared = {"page 0": "What is the total revenue?", "page 1": "What is the  Total revenue"}
    return shared.get(text, f"What of {text}?")


@pytest.mark.parametrize("text", ["Something else", "what is the TOTAL revenue"])
def test_no_page_is_a_negative_of_what_was_written_for_it(text):
    dataset = generate_queries(listing(text_pages(8), text), ask_the_same, queries_per_page=1)
    assert reasons(dataset) == []
    shared = [row["query_id"] for row in dataset.qrels if row["document_id"] in ("d0", "d1")]
    assert shared == ["d0-q1", "d0-q1"]  # one query, relevant to both
    asked = dict(zip(dataset.queries["query_id"][:], dataset.queries["text"][:], strict=True))
    is_there = text != "Something else"
    assert asked["d0-q1"] == (text if is_there else "What is the total revenue?")
    assert drawn_as_negatives(dataset, "d0-q1") == {f"d{k}" for k in range(2, 7 if is_there else 8)}
    if is_there:
        assert not drawn_as_negatives(dataset, "q") & {"d0", "d1"}
    # what was there stays, and a second run about the same pages adds nothing
    assert dataset.qrels[0] == {"query_id": "q", "document_id": "d7", "score": 1}
    again = generate_queries(dataset, ask_the_same, queries_per_page=1)
    assert again.qrels.to_dict() == dataset.qrels.to_dict()


@pytest.mark.parametrize(
    ("said", "kept", "why"),
    [
        (("no", "yes"), ["d1"], ["its page does not answer it"]),
        (("yes", "yes"), ["d0", "d1"], []),
        (("yes", "no"), ["d0"], ["its page does not answer it"]),
        (("yes", "partly"), [], ["it is in doubt", "its page does not answer it"]),
        (("hm", "yes"), [], ["the judge said neither", "it is in doubt"]),
        (("yes", None), [], ["it is in doubt", "a call failed"]),
    ],
)
def test_the_judge_decides_for_each_page_of_a_query(said, kept, why):
    def judge(image, text, instruction):
        verdict = said[int(text[-1])]
        if verdict is None:
            raise TimeoutError("slow")
        return verdict

    options = {"judge": judge, "queries_per_page": 1}
    dataset = generate_queries(text_pages(2), ask_the_same, **options)
    assert dataset.qrels["document_id"][:] == kept
    assert dataset.queries["query_id"][:] == [f"{each}-q1" for each in kept[:1]]
    found = sorted((document_id, reason) for document_id, _, reason in reasons(dataset))
    assert all(reason.startswith(start) for (_, reason), start in zip(found, why, strict=True))


def test_a_retriever_keeps_a_query_for_all_of_its_pages_or_for_none(text_encoder_path):
    model = retriever_of_words(text_encoder_path, ["amberly", "exports", "cobalt", "traffic"])
    texts = ["of amberly exports", "of amberly amberly cobalt", "of amberly traffic", "of cobalt", "of traffic"]
    shared = "Where is amberly exports?"
    replies = {texts[0]: [shared, shared], texts[1]: ["Why amberly cobalt?", shared]}

    def reply(image, text, instruction):
        return replies.get(text, [f"What {text}?"] * 2)["second" in instruction]

    options = {"kinds": {"a": "the first", "b": "the second"}, "retriever": model, "max_rank": 1}
    dataset = generate_queries(text_pages(texts=texts), reply, **options)
    pages = {row["document_id"] for row in dataset.qrels if row["query_id"] == "d0-q1"}
    assert pages == {"d0", "d1"}  # it finds the first of them alone


def retriever_of_words(text_encoder_path, words):
    """A model that sees these words and no others."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder_path)
    weights = np.zeros((len(tokenizer), len(words)), dtype=np.float32)
    for at, word in enumerate(words):
        [token] = tokenizer.encode(f" {word}", add_special_tokens=False)
        weights[token, at] = 1
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def test_a_retriever_finds_repeated_and_general_queries(text_encoder_path):
    words = ["amberly", "exports", "cobalt", "traffic", "fjordland", "revenue"]
    model = retriever_of_words(text_encoder_path, words)
    texts = ["of amberly exports", "of cobalt traffic", "of fjordland revenue"]
    replies = {
        texts[0]: ("Where is amberly exports?", "So where, then, is amberly exports?"),
        texts[1]: ("Who saw cobalt traffic?", "Who saw cobalt?"),
        texts[2]: ("What of amberly exports?", "What of fjordland?"),
    }

    def reply(image, text, instruction):
        return replies[text]["second" in instruction]

    data, options = text_pages(texts=texts), {"kinds": {"a": "the first", "b": "the second"}, "retriever": model}
    dataset = generate_queries(data, reply, max_rank=2, **options)
    first, second = (dataset.queries["text"][:] + [text for _, text, _ in reasons(dataset)]).count, reasons(dataset)
    assert all(first(text) == 1 for pair in replies.values() for text in pair)
    assert [(document_id, reason) for document_id, _, reason in second] == [
        ("d0", "it asks for what another asks for"),
        ("d2", "it is too general to find its page"),
    ]
    assert second[1][1] == "What of amberly exports?"
    assert len(generate_queries(data, reply, max_rank=3, **options)) == 5


# Near misses


def test_near_misses_are_negatives_of_their_page_and_of_nothing_else(pages):
    given = RetrievalDataset.from_id_rows(pages.select(range(8)), on_missing="drop")
    options = {"queries_per_page": 1, "near_misses": 2, "judge": judge_near}
    dataset = generate_queries(given, write, **options)
    assert all(len(texts) == 2 for texts in dataset.queries["near_misses"][:])
    assert len(dataset.queries) == len(dataset.qrels)  # no near miss is a query
    near_by_page = {}
    text_by_id = dict(zip(dataset.queries["query_id"][:], dataset.queries["near_misses"][:], strict=True))
    for query_id, document_id in zip(dataset.qrels["query_id"][:], dataset.qrels["document_id"][:], strict=True):
        near_by_page.setdefault(document_id, set()).update(text_by_id[query_id])

    rows = dataset.labeled_pairs(4, direction="image_to_text")
    for read, ids in zip(rows, rows.with_format(None), strict=True):
        if read["document"].startswith("Nearly"):
            assert read["document"] in near_by_page[ids["document_id"]]
            assert read["label"] == 0
    taken = {(ids["document_id"], read["document"]) for read, ids in zip(rows, rows.with_format(None), strict=True)}
    assert {(page, text) for page, texts in near_by_page.items() for text in texts} <= taken

    rows = dataset.labeled_pairs(2)
    found = [
        (ids["document_id"], read["query"], read["label"])
        for read, ids in zip(rows, rows.with_format(None), strict=True)
        if read["query"].startswith("Nearly")
    ]
    assert sorted(found) == sorted((page, text, 0) for page, texts in near_by_page.items() for text in texts)
    lists = dataset.labeled_lists(4, direction="image_to_text")
    assert all(sum(text.startswith("Nearly") for text in row["documents"]) >= 2 for row in lists)
    assert "Nearly" not in str(dataset.training_rows(1)[:]["query"])


def test_a_reranker_is_trained_on_near_misses_in_both_directions(text_reranker_path, tmp_path, monkeypatch):
    data = generate_queries(text_pages(6), write, queries_per_page=1, near_misses=2, judge=judge_near)
    seen = []
    forward = CrossEncoder.preprocess

    def look(self, pairs, *args, **options):
        seen.extend(map(str, pairs))
        return forward(self, pairs, *args, **options)

    monkeypatch.setattr(CrossEncoder, "preprocess", look)
    model = CrossEncoder(text_reranker_path, device="cpu")
    options = {"documents": "text", "directions": ("text_to_image", "image_to_text"), "num_negatives": 2}
    result = finetune_reranker(
        model, data, output_dir=tmp_path, max_steps=12, use_cpu=True, disable_tqdm=True, **options
    )
    assert result.trainer.state.global_step == 12
    near = [pair for pair in seen if "Nearly" in pair]
    assert any(pair.index("Nearly") < pair.index("page ") for pair in near)
    assert any(pair.index("Nearly") > pair.index("page ") for pair in near)


def test_near_misses_follow_their_query(tmp_path, pages):
    given = RetrievalDataset.from_id_rows(pages, on_missing="drop")
    dataset = generate_queries(given, write, queries_per_page=0, near_misses=1, judge=judge_near)
    assert len(dataset) == len(given)
    near = dict(zip(dataset.queries["text"][:], dataset.queries["near_misses"][:], strict=True))
    train, evaluation = dataset.split(6)
    dataset.save(tmp_path / "saved")
    joined = RetrievalDataset.concatenate({"a": train, "b": given})
    for each in (train, evaluation, joined, RetrievalDataset.load(tmp_path / "saved"), dataset.deduplicate()):
        for text, texts in zip(each.queries["text"][:], each.queries["near_misses"][:], strict=True):
            assert texts in (near[text], None)
        rows = each.labeled_pairs(2, direction="image_to_text")
        assert any(text.startswith("Nearly") for text in rows[:]["document"])


def test_near_misses_that_may_be_answered_are_dropped():
    def judge(image, text, instruction):
        if "Nearly" not in instruction:
            return "yes"
        return {"0": "no", "1": "partly", "2": "yes", "3": "hm"}[re.search(r"Nearly \w+ (\d)", instruction)[1]]

    dataset = generate_queries(text_pages(2), write, queries_per_page=1, near_misses=4, judge=judge)
    assert [[text[-2] for text in texts] for texts in dataset.queries["near_misses"][:]] == [["0"], ["0"]]
    assert {reason for _, _, reason in reasons(dataset)} == {"a near miss may be answered by its page"}
    assert len(reasons(dataset)) == 6


def test_near_misses_are_judged_against_every_page_of_their_query():
    corpus = text_pages(2).corpus
    queries = Dataset.from_dict({"query_id": ["q"], "text": ["Which pages are there?"]})
    qrels = Dataset.from_dict({"query_id": ["q", "q"], "document_id": ["d0", "d1"], "score": [1, 2]})
    asked_of = []

    def write_about(image, text, instruction):
        asked_of.append(text)
        return '{"queries": ["Nearly a?", "Nearly b?"]}'

    def judge(image, text, instruction):
        return "yes" if text == "page 0" and "Nearly a" in instruction else "no"

    data = RetrievalDataset(corpus, queries, qrels)
    dataset = generate_queries(data, write_about, queries_per_page=0, near_misses=2, judge=judge)
    assert asked_of == ["page 1"]  # the most relevant
    assert dataset.queries["near_misses"][:] == [["Nearly b?"]]


def test_a_column_of_another_kind_is_named():
    data = generate_queries(text_pages(2), write, queries_per_page=1)
    own = RetrievalDataset(data.corpus, data.queries.add_column("near_misses", [1, 2]), data.qrels)
    with pytest.raises(DatasetError, match=r"'near_misses' of the queries holds int64, expected lists of texts"):
        own.labeled_pairs(1, direction="image_to_text", documents="text")
    other = RetrievalDataset(data.corpus, data.queries.select_columns(["query_id", "text"]), data.qrels)
    other = RetrievalDataset(other.corpus, other.queries.add_column("kind", [[1], [2]]), other.qrels)
    with pytest.raises(DatasetError, match=r"queries have columns of one name and different types"):
        generate_queries(other, write, kinds={"other": "Ask."})


def test_a_last_step_that_fails_costs_no_query():
    def write_one(image, text, instruction):
        return "Nearly this?" if "other question" in instruction and text == "page 0" else write(image, " ", text)

    def judge(image, text, instruction):
        if "Nearly" in instruction:
            raise TimeoutError("slow")
        return "yes"

    data = text_pages(3)
    dataset = generate_queries(data, write_one, judge=judge, near_misses=1, queries_per_page=1)
    assert len(dataset) == 3
    assert ("d0", "Nearly this?", "a call failed: TimeoutError: slow") in reasons(dataset)

    def write_once(image, text, instruction):
        if "other question" in instruction:
            raise TimeoutError("slow")
        return write(image, text, instruction)

    assert len(generate_queries(data, write_once, judge=say_yes, near_misses=1, queries_per_page=1)) == 3

    def never(image, text, instruction):
        raise TimeoutError("slow")

    with pytest.raises(ConfigError, match="none of 3 calls"):
        generate_queries(data, write, judge=never, queries_per_page=1)


# The server


def test_a_server_is_sent_the_page_and_the_instruction(pages):
    rows = RetrievalDataset.from_id_rows(pages.select(range(2)), negatives_column=None)
    with serving(lambda body, times: completion('{"query": "What?", "answer": "that"}')) as server:
        model = OpenAICompatible(server.url, "qwen", max_pixels=5_000)
        dataset = generate_queries(without_queries(rows.corpus), model, queries_per_page=1, kinds=["fact"])
    assert dataset.queries["generator"][:] == ["qwen"]
    assert model.tokens_spent == 200
    body = server.bodies[0]
    assert body["model"] == "qwen"
    image, instruction = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert "one fact" in instruction["text"]
    assert server.headers[0]["authorization"] == "Bearer none"


def test_images_are_sent_within_the_limit_of_pixels():
    with serving(lambda body, times: completion("What?")) as server:
        assert OpenAICompatible(server.url, "m", max_pixels=5_000)(Image.new("L", (200, 100)), None, "Ask.") == "What?"
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (100, 50)


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("MY_KEY", "sk-mine")
    with serving(lambda body, times: completion("What?")) as server:
        OpenAICompatible(server.url, "m")(None, "text", "Ask.")
        model = OpenAICompatible(server.url, "m", api_key_env="MY_KEY")
        model(None, "text", "Ask.")
    assert [each["authorization"] for each in server.headers] == ["Bearer none", "Bearer sk-mine"]
    assert "sk-mine" not in repr(model)


def test_a_key_that_is_not_set_is_an_error_before_any_call(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"api_key_env='MY_KEY': that environment variable is not set"):
        OpenAICompatible("http://localhost:1/v1", "m", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match=r"api_key_env='...'") as caught:
        OpenAICompatible("http://localhost:1/v1", "m", api_key_env="sk-1234-secret")
    assert "secret" not in str(caught.value)


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"pip install openai \(in a clone of mmtune: pip install \"\.\[generate"
    ):
        OpenAICompatible("http://localhost:1/v1", "m")


def test_a_server_that_recovers_costs_nothing():
    def answer(body, times):
        page = asked(body)[0]
        if times == 1 and page.endswith("0"):
            return failure(429, **{"Retry-After": "0.05"})
        if times == 1 and page.endswith("1"):
            return failure(500, **{"Retry-After": "0.05"})
        if times == 1 and page.endswith("2"):
            return slow(0.6, completion("too late"))
        return completion(f"What is {page[-6:]}?")

    with serving(answer) as server:
        model = OpenAICompatible(server.url, "m", timeout_s=0.4, max_retries=2)
        dataset = generate_queries(text_pages(4), model, queries_per_page=1)
    assert len(dataset) == 4
    assert dataset.notes.dropped_queries == ()
    assert sorted(server.counts.values()) == [1, 2, 2, 2]


def test_pages_that_fail_are_reported_and_do_not_stop_the_others(tmp_path, caplog):
    broken = {
        "page 0": failure(500),
        "page 1": html(),
        "page 2": completion("x", choices=[]),
        "page 3": completion(None),
        "page 4": completion('{"query": "cut', choices=[cut_off()]),
        "page 5": (200, {"Content-Type": "application/json"}, b'{"id": "1", "choi'),
        "page 6": (200, {"Content-Type": "application/json"}, b"[1]"),
        "page 7": failure(400),
    }
    healthy = False

    def answer(body, times):
        page = asked(body)[0].rpartition("\n")[2]
        return broken[page] if page in broken and not healthy else completion(f"What is {page}?")

    with serving(answer) as server, caplog.at_level(logging.WARNING):
        model = OpenAICompatible(server.url, "m", max_retries=0)
        options = {"queries_per_page": 1, "store": tmp_path / "replies"}
        dataset = generate_queries(text_pages(12), model, **options)
        assert dataset.qrels["document_id"][:] == ["d8", "d9", "d10", "d11"]
        assert sorted(document_id for document_id, _, _ in reasons(dataset)) == [f"d{k}" for k in range(8)]
        assert all(reason.startswith("a call failed: MmtuneError: 'm' at http") for _, _, reason in reasons(dataset))
        assert "8 calls failed, about 8 pages, e.g. 'd0'" in caplog.text
        healthy = True
        whole = generate_queries(text_pages(12), model, **options)
        assert len(whole) == 12
        assert sorted(server.counts.values()) == [1] * 4 + [2] * 8


def cut_off():
    return {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": '{"query": "cut'}}


@pytest.mark.parametrize(("status", "message"), [(401, "401"), (403, "403"), (404, "/v1 at its end")])
def test_a_server_that_refuses_everything_is_asked_little(status, message):
    with serving(lambda body, times: failure(status)) as server:
        model = OpenAICompatible(server.url, "m")
        with pytest.raises(ConfigError, match=message):
            generate_queries(text_pages(100), model, max_workers=2)
    assert sum(server.counts.values()) < 10


def test_a_server_that_is_not_there_is_a_named_error():
    with serving(lambda body, times: html()) as server:
        url = server.url
    model = OpenAICompatible(url, "m", max_retries=0)
    with pytest.raises(ConfigError, match=r"none of 20 calls to 'm' was answered. Document 'd\d+': .*127.0.0.1"):
        generate_queries(text_pages(100), model, max_workers=2)
    with pytest.raises(MmtuneError, match="Connection refused"):
        model(None, "text", "Ask.")


# What is kept


def test_nothing_that_was_answered_is_asked_again(tmp_path):
    def answer(body, times):
        page, instruction = asked(body)
        return completion(
            judge_near(None, page, instruction) if "Question:" in instruction else write(None, page, instruction)
        )

    with serving(answer) as server:
        options = {"near_misses": 1, "store": tmp_path}
        first, second = (OpenAICompatible(server.url, "m") for _ in range(2))
        one = generate_queries(text_pages(4), first, judge=first, **options)
        before = dict(server.counts)
        two = generate_queries(text_pages(5), second, judge=second, **options)
        assert {call: server.counts[call] for call in before} == before
        assert two.queries.select(range(len(one))).to_dict() == one.queries.to_dict()
        assert set(server.counts.values()) == {1}
        other = OpenAICompatible(server.url, "another")
        generate_queries(text_pages(1), other, store=tmp_path)
        assert max(server.counts.values()) == 2  # another model is asked for itself
    assert json.loads(next(tmp_path.glob("*/*.json")).read_text()).keys() == {
        "reply",
        "document_id",
        "name",
        "instruction",
    }


def test_damaged_replies_are_asked_for_again(tmp_path, caplog):
    generate_queries(text_pages(2), write, queries_per_page=1, store=tmp_path)
    damaged, other = sorted(tmp_path.glob("*/*.json"))
    damaged.write_text('{"reply": ')
    other.write_text('["no reply"]')
    assert len(generate_queries(text_pages(2), write, queries_per_page=1, store=tmp_path)) == 2
    assert "can't be read" in caplog.text
    assert json.loads(damaged.read_text())["reply"]


def test_who_has_no_name_has_no_store(tmp_path):
    with pytest.raises(ConfigError, match=r"has none. Give it an attribute `name`"):
        generate_queries(text_pages(1), lambda *page: "What?", store=tmp_path / "new")
    assert not (tmp_path / "new").exists()

    class Writer:
        name = "mine"

        def __call__(self, image, text, instruction):
            return f"What is {text}?"

    assert generate_queries(text_pages(1), Writer(), store=tmp_path).queries["generator"][0] == "mine"


def test_what_a_function_makes_has_no_store_without_a_name(tmp_path):
    def make(word):
        def inner(image, text, instruction):
            return f"What {word} is {text}?"

        return inner

    with pytest.raises(ConfigError, match=r"has none. Give it an attribute `name`, or pass a function that is def"):
        generate_queries(text_pages(1), make("one"), store=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert len(generate_queries(text_pages(1), make("one"))) == 1
    for word in ("one", "two"):
        writer = make(word)
        writer.name = word
        dataset = generate_queries(text_pages(1), writer, store=tmp_path)
        assert dataset.queries["text"][:] == [f"What {word} is page 0?"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_a_named_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="can't be written to"):
        generate_queries(text_pages(1), write, store=tmp_path / "new")


def test_a_file_in_place_of_the_folder_is_a_named_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"store='.*file' can't be written to"):
        generate_queries(text_pages(1), write, store=tmp_path / "file")


def killed_runs(store, moments):
    def answer(body, times):
        page, instruction = asked(body)
        threading.Event().wait(0.004)
        return completion(
            judge_near(None, page, instruction) if "Question:" in instruction else write(None, page, instruction)
        )

    with serving(answer) as server:
        script = Path(__file__).with_name("killed_generation.py")
        command = [sys.executable, str(script), server.url, str(store), json.dumps(moments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])


def check_killed_runs(found, moments):
    assert found["killed"] == [True] * len(moments)
    assert all(count >= moment for count, moment in zip(found["stored"], moments, strict=True))
    assert found["repeated"] == [0] * len(moments)
    # in flight at a kill: one call a worker
    assert found["requests"] <= found["calls"] + 4 * len(moments)
    texts = found["queries"]["text"]
    assert len(texts) == 49
    assert [len(near) for near in found["queries"]["near_misses"]] == [1] * 49


def test_killed_twice_and_started_again_asks_nothing_twice(tmp_path):
    moments = [20, 70]
    check_killed_runs(killed_runs(tmp_path, moments), moments)


@pytest.mark.slow
def test_killed_at_ten_moments_and_started_again_asks_nothing_twice(tmp_path):
    moments = [1, 10, 30, 47, 50, 80, 97, 110, 150, 190]
    check_killed_runs(killed_runs(tmp_path, moments), moments)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"queries_per_page": value}, "queries_per_page=") for value in (-1, 1.5, "2", True, None)),
        *(({"near_misses": value}, "near_misses=") for value in (-1, 0.5, "1", True, None)),
        *(({"max_workers": value}, "max_workers=") for value in (0, 2.0, "8", None)),
        *(({"max_rank": value}, "max_rank=") for value in (0, "1")),
        *(({"batch_size": value}, "batch_size=") for value in (0, "1")),
        *(
            ({"kinds": value}, "kinds")
            for value in ("fact", [], {}, ["facts"], [5], 5, {"a": 5}, {"a": " "}, {"": "b"})
        ),
        *(({"languages": value}, "languages=") for value in ("French", [], [5], 5, [" "], [None])),
        *(({"existing": value}, "existing=") for value in ("drop", None, True)),
        *(({"judge": value}, "judge=") for value in (5, "gpt", OpenAICompatible)),
        *(({"retriever": value}, "retriever=") for value in (5, "my-model", write)),
        *(({"store": value}, "store=") for value in (5, "", b"x", ["x"])),
        *(({"show_progress_bar": value}, "show_progress_bar=") for value in ("no", 1)),
        ({"near_misses": 1}, "near_misses=1 without a judge"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        generate_queries(text_pages(1), write, **options)


@pytest.mark.parametrize("generator", [None, "http://localhost:8000/v1", 5, OpenAICompatible])
def test_what_writes_no_text_is_refused(generator):
    with pytest.raises(ConfigError, match=r"generator=.* writes no text"):
        generate_queries(text_pages(1), generator)


def test_a_model_is_no_generator(text_reranker_path):
    with pytest.raises(ConfigError, match=r"judge=.* writes no text"):
        generate_queries(text_pages(1), write, judge=CrossEncoder(text_reranker_path, device="cpu"))


@pytest.mark.parametrize("dataset", [None, 5, [], "/nowhere/at.parquet"])
def test_what_is_no_dataset_is_refused(dataset):
    with pytest.raises(DatasetError, match=r"no dataset|does not exist"):
        generate_queries(dataset, write)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, "m"), "base_url="),
        (("localhost:8000", "m"), "base_url='localhost:8000'"),
        (("http://", "m"), "base_url="),
        (("http://localhost:8000/v1", ""), "model=''"),
        (("http://localhost:8000/v1", None), "model=None"),
        *((("http://a/v1", "m", {"timeout_s": value}), "timeout_s") for value in (0, -1, "60", None, float("nan"))),
        *((("http://a/v1", "m", {"max_retries": value}), "max_retries") for value in (-1, 1.5, "4", True)),
        *((("http://a/v1", "m", {"max_pixels": value}), "max_pixels") for value in (0, 1.5, None)),
        *((("http://a/v1", "m", {"api_key_env": value}), "api_key_env") for value in (5, "", b"x")),
    ],
)
def test_arguments_of_a_server_are_checked(arguments, message):
    *positional, last = arguments
    options = last if isinstance(last, dict) and len(positional) == 2 else {}
    with pytest.raises(ConfigError, match=message):
        OpenAICompatible(*(positional if options else arguments), **options)


def test_a_generator_that_raises_or_replies_no_text_fails_for_its_page():
    def write_badly(image, text, instruction):
        if text == "page 0":
            raise RuntimeError("out of memory")
        return {"query": "What?"} if text == "page 1" else "What is it?"

    dataset = generate_queries(text_pages(3), write_badly, queries_per_page=1)
    assert dataset.qrels["document_id"][:] == ["d2"]
    assert reasons(dataset) == [
        ("d0", "", "a call failed: RuntimeError: out of memory"),
        ("d1", "", "a call failed: TypeError: the reply is a dict, expected a text"),
    ]
    with pytest.raises(ConfigError, match=r"none of 2 calls to .*write_badly .*was answered. Document 'd\d': "):
        generate_queries(text_pages(2), write_badly, queries_per_page=1)


def test_pages_that_cannot_be_read_are_reported_too(pages, tmp_path):
    corpus = RetrievalDataset.from_id_rows(pages.select(range(3)), negatives_column=None).corpus
    images = [corpus[0]["image"], {"bytes": b"no image", "path": None}, {"bytes": None, "path": str(tmp_path / "gone")}]
    table = Dataset.from_dict({"document_id": ["a", "b", "c"], "image": images})
    dataset = generate_queries(
        without_queries(table.cast_column("image", corpus.features["image"])), write, store=tmp_path
    )
    assert set(dataset.qrels["document_id"][:]) == {"a"}
    assert {document_id for document_id, _, _ in reasons(dataset)} == {"b", "c"}
    assert all("ImageDecodeError" in reason for _, _, reason in reasons(dataset))


def test_odd_ids_are_kept_as_they_are():
    ids = ["a/b", "ü'\"", "d-q1", "d", "7"]
    corpus = Dataset.from_dict({"document_id": ids, "text": [f"page {k}" for k in range(5)]})
    dataset = generate_queries(without_queries(corpus), write, queries_per_page=1)
    assert dataset.qrels["document_id"][:] == ids
    assert dataset.queries["query_id"][:] == [f"{each}-q1" for each in ids]
    numbered = Dataset.from_dict({"document_id": [7, 8], "text": ["x", "y"]})
    assert generate_queries(without_queries(numbered), write, queries_per_page=1).qrels["document_id"][:] == ["7", "8"]


def test_nothing_left_is_a_dataset_without_queries():
    dataset = generate_queries(text_pages(2), lambda *page: "What is in this figure?")
    assert len(dataset) == 0
    assert len(reasons(dataset)) == 4
    assert dataset.audit()["dropped_queries"].count == 4
