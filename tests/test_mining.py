"""Mined negatives: never relevant, the host's margins, each page encoded once, and a cache that is never stale."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import mine_hard_negatives as host_mine_hard_negatives

from mmtune import ConfigError, DatasetError, ImageDecodeError, RetrievalDataset
from mmtune.data.arrow import IntLists
from mmtune.data.documents import DocumentReader
from mmtune.data.query_kinds import QueryReader
from mmtune.inference import mining
from mmtune.inference.encoder import read_ahead
from mmtune.inference.mining import mine_hard_negatives
from mmtune.inference.search import find_nearest, merge_nearest, top_columns
from mmtune.inference.store import model_fingerprint

WORDS = (
    "sales",
    "staff",
    "profit",
    "energy",
    "north",
    "south",
    "spring",
    "autumn",
    "report",
    "chart",
    "total",
    "share",
)


class VectorsInTexts(SentenceTransformer):
    """Embeds the text "1 -2" as the vector (1, -2), compares by dot product, and counts what it is given."""

    def __init__(self):
        super().__init__(modules=[torch.nn.Identity()], similarity_fn_name="dot", device="cpu")
        self.encoded = []

    def encode_query(self, inputs, **options):
        self.encoded += [item["text"] for item in inputs]
        return torch.tensor([[float(part) for part in item["text"].split()] for item in inputs])

    encode_document = encode_query


class ChosenScores(CrossEncoder):
    """Scores a pair by a function of its two texts; everything else is that of a real reranker."""

    def __init__(self, path, score):
        torch.manual_seed(0)
        super().__init__(path, num_labels=1, device="cpu")
        self.score = score
        self.scored = []

    def predict(self, inputs, **options):
        self.options = options
        self.scored += inputs
        return torch.tensor([float(self.score(*pair)) for pair in inputs])


def text_dataset(documents, queries, qrels, negatives=None):
    """Documents ``d<k>`` and queries ``q<k>`` from texts; judgements from two numbers each."""
    return RetrievalDataset(
        corpus=Dataset.from_dict({"document_id": [f"d{k}" for k in range(len(documents))], "text": documents}),
        queries=Dataset.from_dict({"query_id": [f"q{k}" for k in range(len(queries))], "text": queries}),
        qrels=Dataset.from_dict(
            {
                "query_id": [f"q{query}" for query, _ in qrels],
                "document_id": [f"d{document}" for _, document in qrels],
                "score": [1] * len(qrels),
            }
        ),
        negatives=negatives,
    )


def vectors(*numbers):
    return [str(number) for number in numbers]


def mined_ids(dataset):
    return dict(zip(dataset.negatives["query_id"], dataset.negatives["document_ids"], strict=True))


def mine(dataset, model, **options):
    return mined_ids(mine_hard_negatives(dataset, model, **{"show_progress_bar": False, **options}))


def mine_texts(dataset, model, **options):
    return mine(dataset, model, documents="text", **options)


# ---- what may be a negative


def texts_beside(dataset, relevant, neighbors):
    """The texts of the documents near a relevant one in its file, that are not relevant themselves."""
    rows = [row for row in dataset.corpus if row.get("source") is not None and row["page_number"] is not None]
    return {
        row["text"]
        for row in rows
        for other in rows
        if neighbors
        and other["text"] in relevant
        and other["source"] == row["source"]
        and abs(other["page_number"] - row["page_number"]) <= neighbors
    } - relevant


def brute_force(dataset, num_negatives, relative, absolute, range_min, range_max, max_score, neighbors=1):
    """The rule in plain Python, for texts that are vectors."""
    texts, document_ids = dataset.corpus["text"][:], dataset.corpus["document_id"][:]
    text_by_query = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    text_by_document = dict(zip(document_ids, texts, strict=True))
    judged = [(text_by_query[row["query_id"]], text_by_document[row["document_id"]]) for row in dataset.qrels]
    first_by_text = {text: document_ids[texts.index(text)] for text in texts}

    def score(query, document):
        return sum(float(a) * float(b) for a, b in zip(query.split(), document.split(), strict=True))

    most_relevant = max(len({page for other, page in judged if other == text}) for text, _ in judged)
    beside = {
        text: texts_beside(dataset, {page for other, page in judged if other == text}, neighbors) for text, _ in judged
    }
    most_beside = max(map(len, beside.values()))
    result = {}
    for query_id, text in text_by_query.items():
        relevant = {page for other, page in judged if other == text}
        lowest = min(score(text, page) for page in relevant)
        ranking = sorted(first_by_text, key=lambda page: (-score(text, page), texts.index(page)))
        left = [
            page
            for page in ranking[: range_max + most_relevant + most_beside]
            if page not in relevant | beside[text]
            and (relative is None or score(text, page) <= lowest - abs(lowest) * relative)
            and (absolute is None or score(text, page) <= lowest - absolute)
            and (max_score is None or score(text, page) <= max_score)
        ]
        result[query_id] = [first_by_text[page] for page in left[:range_max][range_min:][:num_negatives]]
    return result


vector = st.tuples(st.integers(-3, 3), st.integers(-3, 3)).map(lambda pair: f"{pair[0]} {pair[1]}")


@st.composite
def datasets_of_vectors(draw):
    documents = draw(st.lists(vector, min_size=1, max_size=12))
    queries = draw(st.lists(vector, min_size=1, max_size=6))
    pairs = st.tuples(st.integers(0, len(queries) - 1), st.integers(0, len(documents) - 1))
    dataset = text_dataset(documents, queries, draw(st.lists(pairs, min_size=1, max_size=10)))
    if not draw(st.booleans()):
        return dataset
    count = {"min_size": len(documents), "max_size": len(documents)}
    files = draw(st.lists(st.sampled_from(["a.pdf", "b.pdf", None]), **count))
    return of_files(dataset, files, draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, None]), **count)))


def of_files(dataset, files, page_numbers):
    """The dataset with the file and the page that each document is from."""
    columns = {**dataset.corpus.to_dict(), "source": files, "page_number": page_numbers}
    return RetrievalDataset(Dataset.from_dict(columns), dataset.queries, dataset.qrels, dataset.negatives)


@settings(max_examples=60, deadline=None)
@given(
    dataset=datasets_of_vectors(),
    num_negatives=st.integers(1, 4),
    relative=st.sampled_from([None, 0.0, 0.25, 0.5]),
    absolute=st.sampled_from([None, 0, 2]),
    range_min=st.integers(0, 3),
    more=st.integers(0, 8),
    max_score=st.sampled_from([None, -1, 3]),
    neighbors=st.integers(0, 2),
)
def test_the_rule_is_that_of_brute_force(
    dataset, num_negatives, relative, absolute, range_min, more, max_score, neighbors
):
    range_max = range_min + num_negatives + more
    found = mine_texts(
        dataset,
        VectorsInTexts(),
        num_negatives=num_negatives,
        relative_margin=relative,
        absolute_margin=absolute,
        range_min=range_min,
        range_max=range_max,
        max_score=max_score,
        neighbors=neighbors,
        batch_size=2,
    )
    limits = num_negatives, relative, absolute, range_min, range_max, max_score, neighbors
    assert found == brute_force(dataset, *limits)


@pytest.fixture(scope="module")
def many_documents():
    """Different documents of three shards, many of them tied, and queries with relevant ones in several shards."""
    rng = np.random.default_rng(0)
    documents = [f"{at % 37 - 18} {at // 37 - 15}" for at in rng.permutation(1100).tolist()]
    queries = [f"{first} {second}" for first, second in rng.integers(-3, 4, (7, 2))]
    return text_dataset(documents, queries, [(at, 300 * at % 1100) for at in range(7)] + [(0, 1000), (3, 1)])


def test_the_rule_is_that_of_brute_force_over_many_shards(many_documents):
    limits = {"num_negatives": 9, "range_max": 900, "max_score": 9}
    found = mine_texts(many_documents, VectorsInTexts(), relative_margin=None, **limits)
    assert found == brute_force(many_documents, 9, None, None, 0, 900, 9)
    assert len([ids for ids in found.values() if ids]) > 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_nearest_are_the_same_however_the_corpus_is_cut(data):
    """Into shards of any size, with any number of those that ask compared at once; ties by position."""
    asking, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 15))
    numbers = st.lists(st.integers(-2, 2), min_size=2, max_size=2)
    queries, items = (
        torch.tensor(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.float32)
        for size in (asking, count)
    )
    relevant = [sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=4))) for _ in range(asking)]
    places = np.array([item for items_of_one in relevant for item in items_of_one], dtype=np.int64)
    wanted = IntLists(np.r_[0, np.cumsum(list(map(len, relevant)))], places)
    depth, at_once = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([1, 2, 100]))
    shards = items.split(data.draw(st.sampled_from([1, 3, 100])))
    ids = [f"q{at}" for at in range(asking)], [f"d{at}" for at in range(count)]
    options = {"depth": depth, "ids": ids, "relevant": wanted, "at_once": at_once}
    found = find_nearest(lambda a, b: a @ b.T, queries, shards, **options)
    scores = (queries @ items.T).double().numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    assert found.items.tolist() == order.tolist()
    assert found.scores.tolist() == np.take_along_axis(scores, order, axis=1).tolist()
    assert found.relevant_scores.tolist() == scores[wanted.rows, wanted.values].tolist()

    # In two parts, as two processes find them.
    place = data.draw(st.integers(0, len(shards)))
    halves = [
        find_nearest(lambda a, b: a @ b.T, queries, part, first=sum(map(len, before)), **options)
        for part, before in ((shards[:place], ()), (shards[place:], shards[:place]))
    ]
    merged = merge_nearest(halves, depth)
    for one, other in zip(vars(merged).values(), vars(found).values(), strict=True):
        assert one.tolist() == other.tolist()


def test_what_is_relevant_to_the_same_text_under_another_id_is_no_negative():
    dataset = text_dataset(vectors(9, 8, 1, 0), vectors(1, 1, 2), [(0, 0), (1, 1), (2, 2)])
    found = mine_texts(dataset, VectorsInTexts(), relative_margin=None)
    assert found == {"q0": ["d2", "d3"], "q1": ["d2", "d3"], "q2": ["d0", "d1", "d3"]}


def test_byte_identical_pages_are_no_negatives_and_count_once(clip_path, pages):
    twice = Dataset.from_dict(
        {
            "id": [f"{name}{row['id']}" for name in ("a", "b") for row in pages],
            "query": [row["query"] if name == "a" else None for name in ("a", "b") for row in pages],
            "image": [row["image"] for _ in range(2) for row in pages],
        },
        features=pages.select_columns(["id", "query", "image"]).features,
    )
    dataset = RetrievalDataset.from_id_rows(twice)
    found = mine(dataset, SentenceTransformer(clip_path), num_negatives=len(twice), relative_margin=None)
    for query_id, document_ids in found.items():
        numbers = [document_id[1:] for document_id in document_ids]
        assert query_id[1:] not in numbers
        assert len(set(numbers)) == len(numbers) == len(pages) - 1


def test_the_lowest_of_several_relevant_documents_sets_the_bound():
    dataset = text_dataset(vectors(10, 4, 9, 5, 3, 1), ["1"], [(0, 0), (0, 1)])
    assert mine_texts(dataset, VectorsInTexts()) == {"q0": ["d4", "d5"]}


def test_a_relevant_document_below_zero_bounds_from_below():
    # 5% less than -10 is -10.5; -10 * 0.95 would let -9.8 in.
    dataset = text_dataset(vectors(-10, -9.8, -10.2, -10.6), ["1"], [(0, 0)])
    assert mine_texts(dataset, VectorsInTexts()) == {"q0": ["d3"]}


def test_negatives_of_the_dataset_are_replaced_and_its_tables_stay():
    old = Dataset.from_dict({"query_id": ["q0"], "document_ids": [["d1"]]})
    dataset = text_dataset(vectors(9, 8, 1), ["1"], [(0, 0)], old)
    mined = mine_hard_negatives(dataset, VectorsInTexts(), documents="text", show_progress_bar=False, max_score=2)
    assert mined_ids(mined) == {"q0": ["d2"]}
    assert mined_ids(dataset) == {"q0": ["d1"]}
    for name in ("corpus", "queries", "qrels"):
        assert getattr(mined, name)[:] == getattr(dataset, name)[:]


def test_mined_pages_train(clip_path, pages):
    mined = mine_hard_negatives(pages, SentenceTransformer(clip_path), relative_margin=None, show_progress_bar=False)
    row = mined.training_rows(2)[0]
    assert list(row) == ["query", "image", "negative_0", "negative_1"]
    assert not any(finding.count for finding in mined.audit().findings if finding.key.startswith("relevant_negatives"))


# ---- short lists


def test_short_lists_are_kept_and_reported(caplog):
    dataset = text_dataset(vectors(9, 8, 8.9, 8.8), ["1", "2"], [(0, 0), (1, 1)])
    with caplog.at_level(logging.WARNING, logger=mining.__name__):
        mined = mine_hard_negatives(dataset, VectorsInTexts(), num_negatives=2, documents="text")
    assert mined_ids(mined) == {"q0": ["d1"], "q1": []}
    assert "2 of 2 queries have fewer than 2 mined negatives, e.g. 'q0' (1), 'q1' (0)" in caplog.text
    assert {finding.key: finding.count for finding in mined.audit().findings}["queries_without_negatives"] == 1


def test_full_lists_are_not_reported(caplog):
    dataset = text_dataset(vectors(9, 1, 2), ["1"], [(0, 0)])
    with caplog.at_level(logging.WARNING, logger=mining.__name__):
        mine_texts(dataset, VectorsInTexts(), num_negatives=2)
    assert not caplog.text


# ---- parity with the host


@pytest.fixture(scope="module")
def sentences():
    """Eighty documents, and twenty queries with one or two relevant ones each, which repeat the words of the query."""
    rng = np.random.default_rng(0)
    queries = list(dict.fromkeys(" ".join(rng.choice(WORDS, size=3)) for _ in range(20)))
    answers = [f"{query} {word}" for query in queries for word in rng.choice(WORDS, size=2, replace=False)]
    others = [" ".join(rng.choice(WORDS, size=4)) for _ in range(40)]
    documents = list(dict.fromkeys([*answers, *others]))
    qrels = {(at // 2, documents.index(answer)) for at, answer in enumerate(answers) if at % 4 < 3}
    return text_dataset(documents, queries, sorted(qrels))


def host_mined(dataset, model, **options):
    """The host's triplets as lists of ids."""
    id_by_text = dict(zip(dataset.corpus["text"], dataset.corpus["document_id"], strict=True))
    text_by_document_id = {document_id: text for text, document_id in id_by_text.items()}
    text_by_query_id = dict(zip(dataset.queries["query_id"], dataset.queries["text"], strict=True))
    pairs = {
        "query": [text_by_query_id[query_id] for query_id in dataset.qrels["query_id"]],
        "positive": [text_by_document_id[document_id] for document_id in dataset.qrels["document_id"]],
    }
    triplets = host_mine_hard_negatives(
        Dataset.from_dict(pairs), model, corpus=dataset.corpus["text"][:], verbose=False, **options
    )
    found = {query_id: {} for query_id in text_by_query_id}
    id_by_query = {text: query_id for query_id, text in text_by_query_id.items()}
    for row in triplets:
        found[id_by_query[row["query"]]][id_by_text[row["negative"]]] = True
    return {query_id: list(ids) for query_id, ids in found.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"relative_margin": 0.01},
        {"relative_margin": 0.02, "num_negatives": 2},
        {"relative_margin": 0.0, "range_min": 2},
        {"relative_margin": None},
        {"relative_margin": None, "range_min": 3, "num_negatives": 6},
        {"relative_margin": None, "absolute_margin": 0.01, "range_max": 20},
        {"relative_margin": 0.01, "absolute_margin": 0.02, "max_score": 0.95, "range_min": 1, "range_max": 30},
    ],
    ids=str,
)
def test_equal_to_the_host_on_texts(sentences, text_encoder_path, options):
    model = SentenceTransformer(text_encoder_path, device="cpu")
    options = {"num_negatives": 4, **options}
    found = mine_texts(sentences, model, **options)
    assert found == host_mined(sentences, model, **options)
    assert len([ids for ids in found.values() if ids]) > 5


@pytest.mark.parametrize(
    "options",
    [{"relative_margin": 0.05}, {"relative_margin": None, "max_score": 0.4, "range_max": 9}, {"absolute_margin": 0.3}],
    ids=str,
)
def test_equal_to_the_host_with_a_reranker(sentences, text_encoder_path, options):
    def shared_words(query, document):
        same_for_equal_pairs = np.random.default_rng(list(f"{query}, {document}".encode())).random()
        return (len(set(query.split()) & set(document.split())) + same_for_equal_pairs) / 4

    model = SentenceTransformer(text_encoder_path, device="cpu")
    reranker = ChosenScores(text_encoder_path, shared_words)
    options = {"num_negatives": 4, "relative_margin": None, **options}
    found = mine_texts(sentences, model, reranker=reranker, **options)
    assert found == host_mined(sentences, model, cross_encoder=reranker, **options)
    assert len([ids for ids in found.values() if ids]) > 5


# ---- the reranker


def test_a_reranker_decides_margins_and_order(text_encoder_path):
    dataset = text_dataset(vectors(9, 8, 7, 6, 5), ["1"], [(0, 0)])
    scores = {"9": 0.8, "8": 0.79, "7": 0.1, "6": 0.5, "5": 0.3}
    reranker = ChosenScores(text_encoder_path, lambda query, document: scores[document])
    assert mine_texts(dataset, VectorsInTexts(), reranker=reranker, batch_size=2) == {"q0": ["d3", "d4", "d2"]}
    assert sorted(document for _, document in reranker.scored) == ["5", "6", "7", "8", "9"]
    # Logits of 20 and 30 are both 1 in single precision.
    probabilities = reranker.options["activation_fn"](torch.tensor([20.0, 30.0]))
    assert probabilities[0] < probabilities[1] < 1


def test_a_reranker_sees_only_what_the_retriever_ranks_high(text_encoder_path):
    dataset = text_dataset(vectors(*range(20)), ["1"], [(0, 19)])
    reranker = ChosenScores(text_encoder_path, lambda query, document: float(document))
    mine_texts(dataset, VectorsInTexts(), reranker=reranker, num_negatives=2, range_max=3)
    assert sorted(document for _, document in reranker.scored) == ["16", "17", "18", "19"]


def test_the_prompt_for_pages_is_used_where_the_reranker_has_it(text_encoder_path):
    dataset = text_dataset(vectors(9, 1), ["1"], [(0, 0)])
    reranker = ChosenScores(text_encoder_path, lambda query, document: float(document))
    mine_texts(dataset, VectorsInTexts(), reranker=reranker, num_negatives=1)
    assert reranker.options["prompt_name"] is None
    reranker.prompts = {"text_to_image": "Does the page answer?"}
    mine_texts(dataset, VectorsInTexts(), reranker=reranker, num_negatives=1)
    assert reranker.options["prompt_name"] == "text_to_image"


# ---- encoding once, in portions


def test_each_page_is_read_once_and_few_at_a_time(clip_path, pages, monkeypatch):
    portions = []
    read = DocumentReader.read

    def spy(self, ids):
        if not isinstance(self, QueryReader):
            portions.append(list(ids))
        return read(self, ids)

    monkeypatch.setattr(DocumentReader, "read", spy)
    mine(pages, SentenceTransformer(clip_path), batch_size=5)
    assert sorted(page for portion in portions for page in portion) == sorted(pages["id"])
    assert max(map(len, portions)) == 5


def test_reading_ahead_holds_two_portions_at_most():
    reads = []
    for at, result in enumerate(read_ahead(lambda number: reads.append(number) or number, range(20))):
        assert result == at
        assert max(reads) <= at + 1


def test_equal_texts_are_encoded_once():
    model = VectorsInTexts()
    mine_texts(text_dataset(vectors(3, 3, 1), ["2", "2"], [(0, 0), (1, 2)]), model)
    assert sorted(model.encoded) == ["1", "2", "3"]


def test_a_query_that_looks_like_an_image_is_a_text(clip_path, pages, tmp_path):
    pages[0]["image"].save(tmp_path / "page.png")
    queries = [str(tmp_path / "page.png") if row["query"] else None for row in pages]
    found = mine(pages.remove_columns("query").add_column("query", queries), SentenceTransformer(clip_path))
    assert len(found) == sum(query is not None for query in queries)


def test_ties_go_by_place_whatever_the_ids():
    dataset = text_dataset(["2 0", "1 0", "1 1", "1 2", "1 3"], ["1 0"], [(0, 0)])
    renamed = RetrievalDataset(
        dataset.corpus.remove_columns("document_id").add_column("document_id", list("edcba")),
        dataset.queries,
        Dataset.from_dict({"query_id": ["q0"], "document_id": ["e"], "score": [1]}),
    )
    assert mine_texts(dataset, VectorsInTexts(), num_negatives=2) == {"q0": ["d1", "d2"]}
    assert mine_texts(renamed, VectorsInTexts(), num_negatives=2) == {"q0": ["d", "c"]}


def test_top_columns_break_ties_by_column():
    scores = torch.tensor([[1.0, 2, 2, 0, 2], [5, 5, 5, 5, 5], [0, 1, 2, 3, 4]])
    assert top_columns(scores, 2).tolist() == [[1, 2], [0, 1], [4, 3]]
    assert top_columns(scores, 5).tolist() == [[1, 2, 4, 0, 3], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]


def test_late_interaction_ranks_by_its_own_similarity(text_encoder_path):
    model = MultiVectorEncoder(text_encoder_path, device="cpu")
    rng = np.random.default_rng(0)
    # More than one shard of documents.
    documents = list(dict.fromkeys(" ".join(rng.choice(WORDS, size=4)) for _ in range(600)))
    assert len(documents) > 550
    sentences = text_dataset(documents, documents[::60], [(at, 60 * at) for at in range(len(documents[::60]))])
    found = mine_texts(sentences, model, relative_margin=None, num_negatives=3)
    scores = model.similarity(
        model.encode_query(sentences.queries["text"][:]), model.encode_document(sentences.corpus["text"][:])
    )
    relevant = set(zip(sentences.qrels["query_id"], sentences.qrels["document_id"], strict=True))
    for row, (query_id, document_ids) in enumerate(found.items()):
        ranking = [f"d{place}" for place in scores[row].argsort(descending=True).tolist()]
        expected = [document_id for document_id in ranking if (query_id, document_id) not in relevant]
        assert document_ids == expected[:3]


# ---- the cache


class Counted(SentenceTransformer):
    """Counts the documents and queries that it encodes."""

    count = 0

    def encode(self, inputs, *args, **options):
        self.count += len(inputs)
        return super().encode(inputs, *args, **options)


@pytest.fixture
def few_pages(pages):
    return RetrievalDataset.from_id_rows(pages)


def encoded_by(model, dataset, folder, **options):
    """How many texts and pages a call encodes."""
    before = model.count
    mine(dataset, model, cache_folder=folder, **options)
    return model.count - before


def test_a_second_call_encodes_nothing(clip_path, few_pages, tmp_path, monkeypatch):
    model = Counted(clip_path)
    without = mine(few_pages, model, relative_margin=0.2)
    assert encoded_by(model, few_pages, tmp_path) == len(few_pages) + len(few_pages.corpus)
    monkeypatch.setattr(DocumentReader, "read", None)
    assert encoded_by(model, few_pages, tmp_path, relative_margin=0.2, batch_size=3) == 0
    assert encoded_by(Counted(clip_path), few_pages, tmp_path) == 0
    assert mine(few_pages, model, cache_folder=tmp_path, relative_margin=0.2) == without


def change_weights(model):
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1


def change_prompt(model):
    model.prompts["document"] = "A page: "


def change_truncation(model):
    model.truncate_dim = 8


def change_pixels(model):
    model[0].processor.image_processor.size = {"height": 32, "width": 32}


def change_processing(model):
    model[0].processing_kwargs = {"image": {"do_rescale": False}}


def change_pooling(model):
    model.append(Pooling(64))


@pytest.mark.parametrize(
    "change", [change_weights, change_prompt, change_truncation, change_pixels, change_processing, change_pooling]
)
def test_a_changed_model_has_another_fingerprint(clip_path, change):
    model, other = SentenceTransformer(clip_path), SentenceTransformer(clip_path)
    assert model_fingerprint(model) == model_fingerprint(other)
    model.encode(["a text"])
    assert model_fingerprint(model) == model_fingerprint(other)
    change(other)
    assert model_fingerprint(model) != model_fingerprint(other)


@pytest.mark.parametrize("change", ["enable", "scale"])
def test_adapters_that_are_set_otherwise_make_another_model(text_encoder_path, change):
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(text_encoder_path)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    before, embedding = model_fingerprint(model), model.encode(["a text"])
    if change == "enable":
        model.disable_adapters()
    else:
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 3.0)
    assert not np.allclose(model.encode(["a text"]), embedding)
    assert model_fingerprint(model) != before


def test_a_saved_model_has_the_same_fingerprint(clip_path, text_encoder_path, tmp_path):
    for kind, path in ((SentenceTransformer, clip_path), (MultiVectorEncoder, text_encoder_path)):
        model = kind(path)
        model.save_pretrained(str(tmp_path / kind.__name__))
        assert model_fingerprint(kind(str(tmp_path / kind.__name__))) == model_fingerprint(model)


def test_a_changed_model_does_not_use_the_cache(clip_path, few_pages, tmp_path):
    model = Counted(clip_path)
    everything = encoded_by(model, few_pages, tmp_path)
    change_weights(model)
    assert encoded_by(model, few_pages, tmp_path) == everything
    assert encoded_by(model, few_pages, tmp_path) == 0


def test_a_changed_page_under_the_same_id_is_encoded_anew(clip_path, pages, few_pages, tmp_path):
    model = Counted(clip_path)
    encoded_by(model, few_pages, tmp_path)
    rows = pages.cast_column("image", Image(decode=False)).to_list()
    rows[0]["image"] = {"bytes": rows[1]["image"]["bytes"] + b"!", "path": None}
    changed = Dataset.from_list(rows, features=pages.features)
    assert encoded_by(model, RetrievalDataset.from_id_rows(changed), tmp_path) == len(few_pages.corpus)


def test_only_the_shard_of_a_changed_document_is_encoded_anew(many_documents, tmp_path):
    options = {"relative_margin": None, "cache_folder": tmp_path}
    mine_texts(many_documents, VectorsInTexts(), **options)
    texts = [*many_documents.corpus["text"][:700], "5.5 5", *many_documents.corpus["text"][701:]]
    corpus = Dataset.from_dict({"document_id": many_documents.corpus["document_id"][:], "text": texts})
    changed, model = RetrievalDataset(corpus, many_documents.queries, many_documents.qrels), VectorsInTexts()
    found = mine_texts(changed, model, **options)
    assert model.encoded == texts[512:1024]
    assert found == mine_texts(changed, VectorsInTexts(), relative_margin=None)


def test_another_kind_of_documents_does_not_use_the_cache(clip_path, few_pages, tmp_path):
    corpus = few_pages.corpus.add_column("text", [f"page {row}" for row in range(len(few_pages.corpus))])
    dataset = RetrievalDataset(corpus, few_pages.queries, few_pages.qrels)
    model = Counted(clip_path)
    encoded_by(model, dataset, tmp_path)
    assert encoded_by(model, dataset, tmp_path, documents="text") == len(corpus)


def test_an_interrupted_encoding_goes_on(many_documents, tmp_path, monkeypatch):
    broken, read = "d1025", DocumentReader.read

    def read_until_broken(self, ids):
        if broken in ids:
            raise ImageDecodeError("the power went out")
        return read(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(DocumentReader, "read", read_until_broken)
        with pytest.raises(ImageDecodeError, match="the power went out"):
            mine_texts(many_documents, VectorsInTexts(), cache_folder=tmp_path, batch_size=10)
    model = VectorsInTexts()
    mine_texts(many_documents, model, cache_folder=tmp_path)
    assert model.encoded == many_documents.corpus["text"][1024:]


def test_a_damaged_file_of_the_cache_is_made_again(clip_path, few_pages, tmp_path, caplog):
    model = Counted(clip_path)
    encoded_by(model, few_pages, tmp_path)
    (damaged,) = tmp_path.rglob("document-*.npz")
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert encoded_by(model, few_pages, tmp_path) == len(few_pages.corpus)
    assert "can't be read" in caplog.text


def test_token_embeddings_are_cached(sentences, text_encoder_path, tmp_path, monkeypatch):
    model = MultiVectorEncoder(text_encoder_path, device="cpu")
    first = mine_texts(sentences, model, cache_folder=tmp_path)
    monkeypatch.setattr(MultiVectorEncoder, "encode", None)
    assert mine_texts(sentences, model, cache_folder=tmp_path) == first


def test_scores_of_the_reranker_are_cached(text_encoder_path, tmp_path):
    dataset = text_dataset(vectors(9, 8, 7), ["1"], [(0, 0)])
    reranker = ChosenScores(text_encoder_path, lambda query, document: float(document) / 10)
    options = {"reranker": reranker, "cache_folder": tmp_path, "num_negatives": 1}
    first = mine_texts(dataset, VectorsInTexts(), **options)
    assert len(reranker.scored) == 3
    assert mine_texts(dataset, VectorsInTexts(), **options, max_score=0.75) == {"q0": ["d2"]} != first
    assert len(reranker.scored) == 3
    change_weights(reranker)
    mine_texts(dataset, VectorsInTexts(), **options)
    assert len(reranker.scored) == 6


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_negatives": 0}, "num_negatives=0: expected a whole number of 1 or more"),
        ({"num_negatives": True}, "num_negatives=True"),
        ({"range_min": -1}, "range_min=-1: expected a whole number of 0 or more"),
        ({"range_max": 3}, "leave room for 3 documents, and num_negatives=4"),
        ({"range_min": 9, "range_max": 5}, "leave room for 0 documents"),
        ({"relative_margin": 5}, "relative_margin=5 is no share of a score"),
        ({"relative_margin": -0.1}, "relative_margin=-0.1 is no share"),
        ({"absolute_margin": "0.1"}, "absolute_margin='0.1': expected a finite number"),
        ({"max_score": float("nan")}, "max_score=nan: expected a finite number"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number of 1 or more"),
        ({"documents": "image"}, "needs a column 'image'"),
        ({"reranker": "my-reranker"}, r"reranker='my-reranker' is no reranker.*build_reranker\('my-reranker'\)"),
    ],
    ids=str,
)
def test_wrong_arguments(options, message):
    dataset = text_dataset(vectors(9, 1), ["1"], [(0, 0)])
    model = VectorsInTexts()
    with pytest.raises(ConfigError, match=message):
        mine_hard_negatives(dataset, model, **{"documents": "text", **options})
    assert not model.encoded


def test_a_model_of_another_kind_is_refused(text_encoder_path):
    dataset = text_dataset(vectors(9, 1), ["1"], [(0, 0)])
    for model in ("my-model", SparseEncoder(modules=[torch.nn.Identity()])):
        with pytest.raises(
            ConfigError, match=r"is no retriever. Expected a SentenceTransformer or a MultiVectorEncoder"
        ):
            mine_hard_negatives(dataset, model, documents="text")


def test_embeddings_that_are_no_numbers_are_refused():
    dataset = text_dataset(vectors(9, "nan"), ["1"], [(0, 0)])
    with pytest.raises(DatasetError, match="not finite for the document 'd1'"):
        mine_texts(dataset, VectorsInTexts())


def test_several_scores_a_pair_are_refused(text_encoder_path):
    dataset = text_dataset(vectors(9, 1), ["1"], [(0, 0)])
    with pytest.raises(ConfigError, match="gives 3 scores to a pair"):
        mine_texts(dataset, VectorsInTexts(), reranker=CrossEncoder(text_encoder_path, num_labels=3))
