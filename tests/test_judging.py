"""`judge_negatives`: false negatives found by any judge, what becomes of them, and how it is taken back."""

import json
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer

from chat_server import asked, completion, failure, serving
from mmtune import (
    ConfigError,
    ConflictFreeBatchSampler,
    DatasetError,
    MissingDocumentError,
    OpenAICompatible,
    RetrievalDataset,
    TeacherScores,
    mine_hard_negatives,
    score_rows,
)
from mmtune import judge_negatives as judge_with_bars
from mmtune.data.arrow import table_dataset
from mmtune.data.findings import Example, FalseNegative
from mmtune.inference.encoder import DatasetReader
from mmtune.inference.judging import Thresholds
from mmtune.inference.store import Pair


def judge_negatives(*args, **options):
    return judge_with_bars(*args, **{"show_progress_bar": False, **options})


def planted(num_queries=60, num_negatives=5, share=0.1, seed=0):
    """Pages of text, and negatives of which a share are answers that nobody judged; with those, as pairs of ids."""
    rng = np.random.default_rng(seed)
    documents = [f"d{k}" for k in range(num_queries * 4)]
    pages = Dataset.from_dict({"document_id": documents, "text": [f"page {each}" for each in documents]})
    queries = [f"q{k}" for k in range(num_queries)]
    lists, false = [], set()
    for k, query_id in enumerate(queries):
        others = rng.choice(np.arange(num_queries, len(documents)), num_negatives, replace=False)
        lists.append([documents[each] for each in others])
        false |= {(query_id, each) for each in lists[k] if rng.random() < share}
    data = RetrievalDataset(
        pages,
        Dataset.from_dict({"query_id": queries, "text": [f"question {each}" for each in queries]}),
        Dataset.from_dict({"query_id": queries, "document_id": documents[:num_queries], "score": [1] * num_queries}),
        Dataset.from_dict({"query_id": queries, "document_ids": lists}),
    )
    return data, false


def scores_of(data, score, documents="text"):
    """What a teacher gives each judged and each listed pair."""
    listed = zip(data.negatives["query_id"][:], data.negatives["document_ids"][:], strict=True)
    pairs = [Pair(*each) for each in zip(data.qrels["query_id"][:], data.qrels["document_id"][:], strict=True)]
    pairs += [Pair(query_id, each) for query_id, ids in listed for each in ids]
    contents = DatasetReader(data.corpus, data.queries, documents).pair_digests(pairs)
    columns = [[pair.query_id for pair in pairs], [pair.document_id for pair in pairs], contents]
    values = [float(score(pair)) for pair in pairs]
    names = ("query_id", "document_id", "content", "score")
    return TeacherScores(table_dataset({key: pa.array(v) for key, v in zip(names, [*columns, values], strict=True)}))


def noisy_oracle(data, false, noise, seed=1):
    rng = np.random.default_rng(seed)
    truth = set(zip(data.qrels["query_id"][:], data.qrels["document_id"][:], strict=True)) | false
    return scores_of(data, lambda pair: 4.0 * ((tuple(pair) in truth) + rng.normal(0, noise)))


def changed(data):
    changes = data.label_changes
    return {
        label: {
            (query_id, document_id)
            for query_id, document_id, own in zip(
                changes["query_id"][:], changes["document_id"][:], changes["label"][:], strict=True
            )
            if own == label
        }
        for label in ("relevant", "unknown")
    }


@pytest.mark.parametrize("noise", [0.05, 0.15, 0.2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_false_negatives_are_found_and_true_ones_left_alone(noise, seed):
    data, false = planted(400, seed=seed)
    repaired = judge_negatives(data, noisy_oracle(data, false, noise, seed))
    found = changed(repaired)
    true = 400 * 5 - len(false)
    assert len(found["relevant"] & false) >= 0.9 * len(false)
    assert len((found["relevant"] | found["unknown"]) - false) <= 0.02 * true


def test_a_judge_that_errs_now_and_then_repairs_as_well():
    data, false = planted(400)
    rng = np.random.default_rng(3)
    wrong = {}

    def judge(image, text, instruction):
        query_id, document_id = instruction.split()[2], text.split()[1]
        is_true = (query_id, document_id) in false or query_id[1:] == document_id[1:]
        wrong.setdefault((query_id, document_id), rng.random() < 0.01)
        return json.dumps({"answers": "yes" if is_true != wrong[query_id, document_id] else "no"})

    found = changed(judge_negatives(data, judge, max_workers=1))
    assert len(found["relevant"] & false) >= 0.9 * len(false)
    assert len((found["relevant"] | found["unknown"]) - false) <= 0.02 * 2000


def three_labels():
    """A relevant, an unknown and a true negative of `q0`, in this order behind another true one."""
    data, _ = planted(8, share=0)
    lists = [["d20", "d21", "d22", "d23"], *data.negatives["document_ids"][1:]]
    ids = {"query_id": data.queries["query_id"][:], "document_ids": lists}
    data = RetrievalDataset(data.corpus, data.queries, data.qrels, Dataset.from_dict(ids))
    verdicts = {"d21": "yes", "d22": "partly"}

    def judge(image, text, instruction):
        query_id, document_id = instruction.split()[2], text.split()[1]
        said = verdicts.get(document_id, "no") if query_id == "q0" else "no"
        return "yes" if query_id[1:] == document_id[1:] else said

    return data, judge_negatives(data, judge)


def test_a_negative_becomes_relevant_unknown_or_stays():
    data, repaired = three_labels()
    assert repaired.negatives["document_ids"][0] == ["d20", "d23"]
    assert repaired.negatives["document_ids"][1:] == data.negatives["document_ids"][1:]
    assert repaired.qrels.to_dict() == {
        "query_id": [*data.qrels["query_id"], "q0"],
        "document_id": [*data.qrels["document_id"], "d21"],
        "score": [*data.qrels["score"], 1],
    }
    assert repaired.label_changes.to_list() == [
        {"query_id": "q0", "document_id": "d21", "label": "relevant", "rank": 1, "score": 1.0},
        {"query_id": "q0", "document_id": "d22", "label": "unknown", "rank": 2, "score": 0.5},
    ]
    assert data.negatives["document_ids"][0] == ["d20", "d21", "d22", "d23"]
    assert len(data.label_changes) == 0


def test_what_is_unknown_is_used_by_nothing():
    _, repaired = three_labels()
    few = repaired.corpus.select([*range(8), 20, 21, 22, 23])
    lists = [[each for each in ids if each in few["document_id"][:]] for ids in repaired.negatives["document_ids"][:]]
    negatives = repaired.negatives.remove_columns("document_ids").add_column("document_ids", lists)
    small = RetrievalDataset(few, repaired.queries, repaired.qrels, negatives)
    assert len(small.label_changes) == 2
    rows = small.training_rows(9, documents="text").with_format(None)
    used = {each for row in rows if row["query_id"] == "q0" for each in row["negative_document_ids"]}
    assert used == {f"d{k}" for k in range(1, 8)} | {"d20", "d23"}  # filled with all there is but these two
    pairs = small.labeled_pairs(9, documents="text").with_format(None)
    assert "d22" not in {row["document_id"] for row in pairs if row["query_id"] == "q0"}
    asking = small.relevance_of("text")
    texts = [asking.text[0]]
    assert {f"d{k}" for k in (0, 21, 22)} == set(
        asking.document_ids.take(pa.array(asking.documents_apart_from_text.take(np.array(texts)).values)).to_pylist()
    )
    with pytest.raises(DatasetError, match="can't get 10 negatives"):
        small.training_rows(10, documents="text")


def test_what_is_unknown_is_in_no_batch_with_its_query():
    _, repaired = three_labels()
    # a row of another query whose page is the unknown one
    qrels = Dataset.from_dict(
        {
            key: [*repaired.qrels[key][:], value]
            for key, value in (("query_id", "q5"), ("document_id", "d22"), ("score", 1))
        }
    )
    data = RetrievalDataset(repaired.corpus, repaired.queries, qrels, repaired.negatives)
    rows = data.training_rows(0, documents="text")
    ids = rows.with_format(None)
    for epoch in range(5):
        sampler = ConflictFreeBatchSampler(rows, batch_size=9, drop_last=False, seed=epoch)
        sampler.set_epoch(epoch)
        for batch in sampler:
            pages = {ids[at]["document_id"] for at in batch}
            assert not ("q0" in {ids[at]["query_id"] for at in batch} and "d22" in pages)


def test_mining_finds_nothing_that_is_unknown(text_encoder_path):
    _, repaired = three_labels()
    model = SentenceTransformer(text_encoder_path, device="cpu")
    options = {"relative_margin": None, "num_negatives": 31, "documents": "text", "show_progress_bar": False}
    mined = mine_hard_negatives(repaired, model, **options)
    assert set(repaired.corpus["document_id"]) - set(mined.negatives["document_ids"][0]) == {"d0", "d21", "d22"}
    assert len(mined.label_changes) == 2


def test_changes_are_taken_back():
    data, false = planted()
    repaired = judge_negatives(data, noisy_oracle(data, false, 0.2))
    assert len(repaired.label_changes) > 20
    undone = repaired.undo_label_changes()
    assert undone.negatives.to_dict() == data.negatives.to_dict()
    assert undone.qrels.to_dict() == data.qrels.to_dict()
    assert len(undone.label_changes) == 0
    assert data.undo_label_changes().qrels.to_dict() == data.qrels.to_dict()
    # judged twice, the second time by somebody stricter
    again = judge_negatives(repaired, noisy_oracle(repaired, set(), 0.35, seed=5))
    assert len(again.label_changes) > len(repaired.label_changes)
    assert again.undo_label_changes().negatives.to_dict() == data.negatives.to_dict()
    assert again.undo_label_changes().qrels.to_dict() == data.qrels.to_dict()


def test_changes_survive_other_steps(tmp_path):
    data, repaired = three_labels()
    repaired.save(tmp_path / "saved")
    loaded = RetrievalDataset.load(tmp_path / "saved")
    assert loaded.label_changes.to_list() == repaired.label_changes.to_list()
    joined = RetrievalDataset.concatenate({"a": repaired, "b": data})
    assert [each["document_id"] for each in joined.label_changes] == ["a/d21", "a/d22"]
    assert [each["query_id"] for each in joined.label_changes] == ["a/q0"] * 2
    assert joined.undo_label_changes().negatives["document_ids"][0] == ["a/d20", "a/d21", "a/d22", "a/d23"]
    assert len(repaired.select_queries(["q1", "q2"]).label_changes) == 0
    assert len(repaired.select_queries(["q0"]).label_changes) == 2
    parts = [part for seed in range(4) for part in repaired.split(3, seed=seed)]
    assert any(0 < len(part.label_changes) < 2 for part in parts)  # what is relevant elsewhere is not in the corpus
    for part in parts:
        assert {each["query_id"] for each in part.label_changes} <= set(part.queries["query_id"])
        assert {each["document_id"] for each in part.label_changes} <= set(part.corpus["document_id"])
        part.training_rows(2, documents="text")
    shuffled = RetrievalDataset(
        repaired.corpus.shuffle(seed=1),
        repaired.queries.shuffle(seed=2),
        repaired.qrels,
        repaired.negatives.shuffle(seed=3),
    )
    assert shuffled.label_changes.to_list() == repaired.label_changes.to_list()
    copies = [*repaired.corpus["text"][:-1], "page d22"]
    table = Dataset.from_dict({"document_id": repaired.corpus["document_id"][:], "text": copies})
    merged = RetrievalDataset(table, repaired.queries, repaired.qrels, repaired.negatives).deduplicate()
    assert [each["document_id"] for each in merged.label_changes] == ["d21", "d22"]


def judged_copies(listed, relevant=(), unknown=()):
    """What a judge makes of the list of `q0`, which x#1 answers; `q1` has many true negatives."""
    ids = [f"{letter}#{k}" for letter in "xyz" for k in (1, 2, 3)] + [f"n{k}" for k in range(20)]
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"page {each}" for each in ids]}),
        Dataset.from_dict({"query_id": ["q0", "q1"], "text": ["one", "two"]}),
        Dataset.from_dict({"query_id": ["q0", "q1"], "document_id": ["x#1", "z#1"], "score": [2, 1]}),
        Dataset.from_dict({"query_id": ["q0", "q1"], "document_ids": [listed, ids[9:]]}),
    )
    answers = {("q0", each) for each in ("x#1", *relevant)} | {("q1", "z#1")}
    maybe = {("q0", each) for each in unknown}
    scores = scores_of(data, lambda pair: 1.0 if pair in answers else 0.5 if pair in maybe else 0.0)
    repaired = judge_negatives(data, scores)
    assert changed(repaired)["relevant"] == {("q0", each) for each in relevant}
    assert changed(repaired)["unknown"] == maybe
    return repaired


def join(data, *groups, also=()):
    found = data.audit(content=True, show_progress_bar=False)["near_copies"]
    return data.without([found.only([Example((), group) for group in groups]), *also])


def of_q0(data):
    judged = [row for row in data.qrels.to_list() if row["query_id"] == "q0"]
    return {row["document_id"]: row["score"] for row in judged}, data.negatives["document_ids"][0]


@pytest.mark.parametrize("label", ["relevant", "unknown"])
@pytest.mark.parametrize("how", ["without", "deduplicate"])
def test_a_change_of_a_copy_of_an_answer_is_none_any_more(how, label):
    repaired = judged_copies(["z#3", "y#1", "x#2"], **{label: ["y#1"]})
    if how == "without":
        merged = join(repaired, ("x#1", "y#1"))
    else:
        same = repaired.corpus.map(lambda row: {"text": row["text"].replace("y#1", "x#1")})
        merged = RetrievalDataset(same, repaired.queries, repaired.qrels, repaired.negatives).deduplicate()
    assert len(merged.label_changes) == 0
    assert of_q0(merged) == of_q0(merged.undo_label_changes()) == ({"x#1": 2}, ["z#3", "x#2"])


@pytest.mark.parametrize("also", ["relevant", "unknown"])
def test_changed_copies_are_one_change(also):
    found = {"relevant": {"relevant": ["x#2", "y#2"]}, "unknown": {"unknown": ["x#2"], "relevant": ["y#2"]}}
    repaired = judged_copies(["z#3", "x#2", "y#2", "x#3"], **found[also])
    merged = join(repaired, ("x#2", "y#2"))
    assert of_q0(merged) == ({"x#1": 2, "x#2": 1}, ["z#3", "x#3"])
    assert [(each["document_id"], each["label"], each["rank"]) for each in merged.label_changes] == [
        ("x#2", "relevant", 1)
    ]
    assert of_q0(merged.undo_label_changes()) == ({"x#1": 2}, ["z#3", "x#2", "x#3"])


@pytest.mark.parametrize("label", ["relevant", "unknown"])
def test_a_listed_copy_follows_what_was_changed(label):
    repaired = judged_copies(["y#2", "z#3", "x#2", "y#3", "x#3"], **{label: ["x#2", "x#3"]})
    merged = join(repaired, ("x#2", "y#2"))
    assert merged.negatives["document_ids"][0] == ["z#3", "y#3"]
    undone = merged.undo_label_changes()
    assert of_q0(undone) == ({"x#1": 2}, ["x#2", "z#3", "y#3", "x#3"])
    assert undone.audit().problems == ()


def test_false_negatives_and_copies_taken_out_at_once_come_back_once():
    data = judged_copies(["y#2", "x#2", "z#3"])
    false = FalseNegative(
        "false_negatives", 1, True, "", "", (Example(("q0",), ("y#2", "x#1")),), "q0", "y#2", "x#1", 0.9, 0.5
    )
    merged = join(data, ("x#2", "y#2"), also=[false])
    assert of_q0(merged)[1] == ["z#3"]
    assert of_q0(merged.undo_label_changes()) == ({"x#1": 2}, ["x#2", "z#3"])


def test_changes_keep_their_place_when_others_leave_the_list():
    repaired = judged_copies(["z#3", "x#2", "y#2", "x#3"], relevant=["y#2"])
    gone = replace(repaired.audit()["unreferenced_pages"], count=1, examples=(Example((), ("z#3",)),))
    merged = repaired.without(gone)
    assert [each["rank"] for each in merged.label_changes] == [1]
    assert of_q0(merged.undo_label_changes()) == ({"x#1": 2}, ["x#2", "y#2", "x#3"])


def test_graded_judgements_and_integer_ids_are_kept():
    pages = Dataset.from_dict({"document_id": list(range(8)), "text": [f"page {k}" for k in range(8)]})
    data = RetrievalDataset(
        pages,
        Dataset.from_dict({"query_id": [1, 2], "text": ["one", "two"]}),
        Dataset.from_dict({"query_id": [1, 1, 2], "document_id": [0, 1, 2], "score": [3, 2, 1]}),
        Dataset.from_dict({"query_id": [1, 2], "document_ids": [[4, 5, 0], [6, 4]]}),
    )
    repaired = judge_negatives(data, lambda image, text, instruction: "yes" if text[-1] in "0125" else "no")
    assert repaired.qrels["score"][:] == [3, 2, 1, 1]
    assert repaired.qrels["document_id"][:] == ["0", "1", "2", "5"]
    # a negative that was judged relevant all along is not the judge's to change
    assert repaired.negatives["document_ids"][:] == [["4", "0"], ["6", "4"]]


# Judges


def test_a_reranker_judges_and_is_not_asked_twice(text_reranker_path, tmp_path, monkeypatch):
    model = CrossEncoder(text_reranker_path, device="cpu")
    data, _ = planted(6, share=0)
    calls = []
    predict = CrossEncoder.predict

    def score(self, pairs, **options):
        calls.extend(pairs)
        # raised where query and page belong together, since a random model tells nothing apart
        own = [len(set(re.findall(r"[qd](\d+)", str(pair)))) == 1 for pair in pairs]
        return predict(self, pairs, **options) + 5 * torch.tensor(own)

    monkeypatch.setattr(CrossEncoder, "predict", score)
    one = judge_negatives(data, model, store=tmp_path)
    assert len(calls) == 6 + 30
    two = judge_negatives(data, model, store=tmp_path)
    assert len(calls) == 36
    assert one.label_changes.to_list() == two.label_changes.to_list() == []


def test_scores_of_a_teacher_are_looked_up(text_reranker_path):
    data, _ = planted(6)
    model = CrossEncoder(text_reranker_path, device="cpu")
    scores = score_rows(data.training_rows(2, documents="text"), model, show_progress_bar=False)
    with pytest.raises(MissingDocumentError, match=r"teacher has not scored 18 of 36 pairs, e\.g\. query 'q0'"):
        judge_negatives(data, scores)


def test_a_server_judges_once_and_failed_pairs_keep_their_label(tmp_path, caplog):
    data, false = planted(12, share=0.3)
    healthy = False

    def answer(body, times):
        page, instruction = asked(body)
        query_id, document_id = instruction.split()[2], page.split()[-1]
        if not healthy and document_id.endswith("7"):
            return failure(500)
        is_true = (query_id, document_id) in false or query_id[1:] == document_id[1:]
        return completion("yes" if is_true else "no")

    with serving(answer) as server:
        model = OpenAICompatible(server.url, "m", max_retries=0)
        repaired = judge_negatives(data, model, store=tmp_path)
        assert changed(repaired)["relevant"] == {pair for pair in false if not pair[1].endswith("7")}
        assert "were not judged and keep their label, e.g. document 'd" in caplog.text
        before = dict(server.counts)
        healthy = True
        whole = judge_negatives(data, model, store=tmp_path)
        assert changed(whole)["relevant"] == false
        repeated = {call for call, count in server.counts.items() if count > before.get(call, 0)}
        assert all(page.endswith("7") for page, _ in repeated)


def test_a_judge_that_tells_nothing_apart_changes_nothing():
    data, _ = planted()
    with pytest.raises(ConfigError, match="does not tell them apart, and nothing was changed"):
        judge_negatives(data, lambda *page: "yes")
    with pytest.raises(ConfigError, match="said nothing of use"):
        judge_negatives(data, lambda *page: "hm")
    with pytest.raises(ConfigError, match="none of 20 calls"):
        judge_negatives(data, lambda *page: 5, max_workers=1)


def test_many_changes_warn(caplog):
    data, false = planted(share=0.45)
    judge_negatives(data, noisy_oracle(data, false, 0.1))
    assert "changed their label. Either the lists are poor" in caplog.text


def test_thresholds_come_from_the_known_relevant():
    known = np.arange(1000) / 10  # 0 to 99.9
    bounds = Thresholds.of(known, np.full(50, -200.0))
    assert (bounds.relevant, bounds.unknown) == (pytest.approx(5, abs=0.1), pytest.approx(2.5, abs=0.1))
    labels = bounds.labels(np.array([-150.0, 0.0, 3.0, 6.0, np.nan]))
    assert labels.tolist() == ["negative", "negative", "unknown", "relevant", "negative"]
    # in words: "partly" is unknown, whatever share of the known is missed
    for missed in (0, 1, 10):
        words = Thresholds.of(np.r_[np.zeros(missed), np.ones(100 - missed)], np.zeros(50))
        assert words.labels(np.array([0.0, 0.5, 1.0])).tolist() == ["negative", "unknown", "relevant"]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"judge": value}, "judge=") for value in (None, "gpt", 5, OpenAICompatible)),
        *(({"store": value}, "store=") for value in (5, "", ["x"])),
        *(({"show_progress_bar": value}, "show_progress_bar=") for value in ("no", None)),
        *(({"batch_size": value}, "batch_size=") for value in (0, 1.5, True)),
        *(({"max_workers": value}, "max_workers=") for value in (0, "8")),
        *(({"documents": value}, "documents=") for value in ("image", "page", 5)),
    ],
)
def test_arguments_are_checked(options, message):
    data, _ = planted(4)
    with pytest.raises(ConfigError, match=message):
        judge_negatives(data, **{"judge": lambda *page: "yes", **options})


def test_a_dataset_without_negatives_is_refused():
    data, _ = planted(4)
    bare = RetrievalDataset(data.corpus, data.queries, data.qrels)
    with pytest.raises(DatasetError, match=r"lists no negatives that could be judged. Find some with mine_hard_neg"):
        judge_negatives(bare, lambda *page: "yes")
    with pytest.raises(DatasetError, match=r"no dataset"):
        judge_negatives(None, lambda *page: "yes")


def test_a_column_of_another_kind_is_named():
    data, _ = planted(2)
    own = data.negatives.add_column("label_changes", [["a"], ["b"]])
    with pytest.raises(DatasetError, match=r"'label_changes' of the negatives holds string, expected what judge_neg"):
        RetrievalDataset(data.corpus, data.queries, data.qrels, own)
