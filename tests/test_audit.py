import json
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import pytest
from datasets import Dataset, Image
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtune import RetrievalDataset
from mmtune.data.findings import AuditReport, Example, Finding

LONG_ID = "reports/2021/annual report of the second subsidiary/pages/scan-000000000000000000000000000000017.png"


def page(number: int | None) -> dict | None:
    """Encoded bytes that no test decodes; equal numbers give equal bytes."""
    return None if number is None else {"bytes": b"page %d" % number, "path": None}


def build(content: list, texts: list[str], judged: list[tuple], negatives: list[list[int]] | None) -> RetrievalDataset:
    """Document k is ``d<k>`` with the page ``content[k]``, query k is ``q<k>`` and has the list of negatives k.

    A judgement is (query, document, score).
    """
    corpus = {"document_id": [f"d{k}" for k in range(len(content))], "image": list(map(page, content))}
    qrels = {
        "query_id": [f"q{query}" for query, _, _ in judged],
        "document_id": [f"d{document}" for _, document, _ in judged],
        "score": [score for _, _, score in judged],
    }
    listed = None
    if negatives is not None:
        ids = [[f"d{document}" for document in row] for row in negatives]
        listed = Dataset.from_dict({"query_id": [f"q{k}" for k in range(len(ids))], "document_ids": ids})
    return RetrievalDataset(
        Dataset.from_dict(corpus).cast_column("image", Image()),
        Dataset.from_dict({"query_id": [f"q{k}" for k in range(len(texts))], "text": texts}),
        Dataset.from_dict(qrels),
        listed,
    )


def dataset(
    content=(0, 1, 2, 3),
    texts=("one", "two"),
    judged=((0, 0, 1), (1, 1, 1)),
    negatives=((2, 3), (2, 3)),
) -> RetrievalDataset:
    """Two queries with a page and two negatives each; nothing is wrong with it."""
    lists = None if negatives is None else [list(row) for row in negatives]
    return build(list(content), list(texts), list(judged), lists)


def found(report: AuditReport) -> dict[str, int]:
    return {key: count for key, count in report.counts.items() if count}


def id_rows(**changed) -> Dataset:
    columns = {
        "id": ["a", "b", "c"],
        "query": ["one", "two", "three"],
        "image": [page(k) for k in range(3)],
        "negatives": [["b"], ["c"], ["a"]],
    }
    return Dataset.from_dict(columns | changed).cast_column("image", Image())


# --- each finding, in a dataset in which exactly that is wrong ----------------------------------------------------


def test_nothing_is_found_where_nothing_is_wrong():
    report = dataset().audit()
    assert found(report) == {}
    assert report.problems == ()
    assert report.tables == {"documents": 4, "queries": 2, "judgements": 2, "negatives": 4}
    assert report.negatives_per_query == {2: 2}
    assert str(report).endswith("\n\nNothing was found.")


def test_generated_pages_have_no_problem(pages):
    report = RetrievalDataset.from_id_rows(pages).audit()
    assert report.problems == ()
    assert report["blank_queries"].count == len(pages) - 24
    assert report.negatives_per_query == {4: 24}
    assert "No problem was found." in str(report)


# what is changed in the dataset, all that is found, and the first example of the finding named first
CASES = {
    "relevant by id": (
        {"judged": ((0, 0, 1), (1, 1, 1), (1, 3, 1)), "negatives": ((2,), (2, 3))},
        {"relevant_negatives_by_id": 1},
        Example(("q1",), ("d3",)),
    ),
    "relevant by text": (
        {"texts": ("one", "one"), "judged": ((0, 0, 1), (1, 1, 1)), "negatives": ((2, 3), (2, 3, 0))},
        {"relevant_negatives_by_text": 1, "differing_judgements": 1, "repeated_texts": 1},
        Example(("q1", "q0"), ("d0",)),
    ),
    "relevant by bytes": (
        {"content": (0, 1, 2, 3, 1), "negatives": ((2, 3), (2, 4, 3))},
        {"relevant_negatives_by_bytes": 1, "unjudged_copies": 1, "identical_pages": 1},
        Example(("q1",), ("d4", "d1")),
    ),
    "relevant by text and bytes": (
        {"content": (0, 0, 2, 3), "texts": ("one", "one"), "judged": ((0, 0, 1), (1, 1, 1))}
        | {"negatives": ((2, 3, 1), (2, 3))},
        {"relevant_negatives_by_text": 1, "unjudged_copies": 2, "identical_pages": 1, "repeated_texts": 1},
        Example(("q0", "q1"), ("d1",)),
    ),
    "no negatives": (
        {"negatives": ((), (2, 3))},
        {"queries_without_negatives": 1, "short_negative_lists": 1},
        Example(("q0",)),
    ),
    "a query that the negatives leave out": (
        {"negatives": ((2, 3),)},
        {"queries_without_negatives": 1, "short_negative_lists": 1},
        Example(("q1",)),
    ),
    "short list": (
        {"negatives": ((2, 3), (3,))},
        {"short_negative_lists": 1},
        Example(("q1",)),
    ),
    "repeated by id": ({"negatives": ((2, 3, 2), (2, 3))}, {"repeated_negatives": 1}, Example(("q0",), ("d2",))),
    "repeated by bytes": (
        {"content": (0, 1, 2, 3, 2), "negatives": ((2, 3, 4), (2, 3))},
        {"repeated_negatives": 1, "identical_pages": 1},
        Example(("q0",), ("d4",)),
    ),
    "differing pages": (
        {"texts": ("one", "one")},
        {"differing_judgements": 1, "repeated_texts": 1},
        Example(("q0", "q1")),
    ),
    "differing scores": (
        {"texts": ("one", "one"), "judged": ((0, 0, 1), (1, 0, 2)), "negatives": ((1, 2, 3), (1, 2, 3))},
        {"differing_judgements": 1, "repeated_texts": 1},
        Example(("q0", "q1")),
    ),
    "repeated text": (
        {"texts": ("one", "one"), "judged": ((0, 0, 1), (1, 0, 1)), "negatives": ((1, 2, 3), (1, 2, 3))},
        {"repeated_texts": 1},
        Example(("q0", "q1")),
    ),
    "copies": (
        {"content": (0, 1, 2, 2, 2, 3, 3), "negatives": ((2, 3, 4, 5, 6), (2, 3, 4, 5, 6))},
        {"repeated_negatives": 6, "identical_pages": 3},
        Example(("q0",), ("d3",)),
    ),
    "unjudged copies": (
        {"content": (0, 1, 2, 3, 0, 0), "negatives": ((2, 3), (4, 5))},
        {"unjudged_copies": 2, "identical_pages": 2, "repeated_negatives": 1, "short_negative_lists": 1},
        Example(("q0",), ("d4", "d0")),
    ),
    "pages nobody refers to": ({"negatives": ((3,), (3,))}, {"unreferenced_pages": 1}, Example((), ("d2",))),
    "null images": ({"content": (0, 1, 2, None)}, {"documents_without_image": 1}, Example((), ("d3",))),
}


@pytest.mark.parametrize("case", CASES)
def test_each_finding_is_counted_with_an_example(case):
    changed, expected, example = CASES[case]
    report = dataset(**changed).audit()
    assert found(report) == expected
    assert report[next(iter(expected))].examples[0] == example


def test_copies_show_as_groups():
    report = dataset(content=(0, 1, 2, 2, 2, 3, 3), negatives=((2, 5), (2, 5))).audit()
    assert report["identical_pages"].examples == (Example((), ("d2", "d3", "d4")), Example((), ("d5", "d6")))


def test_a_dataset_without_negatives_lacks_none():
    report = dataset(negatives=None).audit()
    assert found(report) == {"unreferenced_pages": 2}
    assert report.negatives_per_query == {}
    assert "negatives  none" in str(report)


def test_unknown_negatives_that_were_dropped():
    rows = id_rows(negatives=[["b", "x"], ["c", "y"], ["a", "x"]])
    report = RetrievalDataset.from_id_rows(rows, on_missing="drop").audit()
    assert found(report) == {"unknown_negatives": 3}
    assert report["unknown_negatives"].examples == (
        Example(("a",), ("x",)),
        Example(("b",), ("y",)),
        Example(("c",), ("x",)),
    )


def test_null_and_blank_queries_and_null_negatives():
    rows = id_rows(query=["one", None, " "], negatives=[["b", None, "c"], [], None])
    assert found(RetrievalDataset.from_id_rows(rows).audit()) == {"blank_queries": 2, "null_negatives": 1}


def test_rows_without_an_image_and_their_queries():
    rows = Dataset.from_dict({"query": ["one", "two"], "image": [page(0), None], "negative": [page(1), page(2)]})
    counts = found(RetrievalDataset.from_columns(rows).audit())
    assert counts == {"null_documents": 1, "queries_without_document": 1, "unreferenced_pages": 1}


def test_queries_to_which_nothing_is_relevant():
    report = dataset(texts=("one", "two", "three")).audit()
    assert found(report) == {"queries_without_document": 1}


def test_negatives_that_a_split_held_out():
    data = dataset(judged=((0, 0, 1), (1, 1, 1)), negatives=((1, 2, 3), (0, 2, 3)))
    train, evaluation = data.split(1)
    assert found(train.audit()) == {"held_out_negatives": 1}
    assert "held_out_negatives" not in found(evaluation.audit())


def test_judgements_of_zero_are_counted():
    corpus = Dataset.from_dict({"_id": ["a", "b"], "text": ["x", "y"]})
    queries = Dataset.from_dict({"_id": ["q"], "text": ["one"]})
    qrels = Dataset.from_dict({"query-id": ["q", "q"], "corpus-id": ["a", "b"], "score": [1, 0]})
    report = RetrievalDataset.from_beir(corpus, queries, qrels).audit()
    assert found(report) == {"judged_not_relevant": 1, "unreferenced_pages": 1}


def test_files_that_are_missing_or_empty(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "there.png").write_bytes(b"content")
    paths = [str(tmp_path / name) for name in ("there.png", "empty.png", "missing.png")]
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": list("abc"), "image": paths}).cast_column("image", Image(decode=False)),
        Dataset.from_dict({"query_id": ["q"], "text": ["one"]}),
        Dataset.from_dict({"query_id": ["q"] * 3, "document_id": list("abc"), "score": [1] * 3}),
    )
    report = data.audit()
    assert found(report) == {"unreadable_images": 2}
    assert report["unreadable_images"].examples == (Example((), ("b",)), Example((), ("c",)))


def test_texts_are_looked_at_where_there_are_no_images():
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": list("abcd"), "text": ["x", None, " ", "x"]}),
        Dataset.from_dict({"query_id": ["q"], "text": ["one"]}),
        Dataset.from_dict({"query_id": ["q"] * 4, "document_id": list("abcd"), "score": [1] * 4}),
    )
    report = data.audit()
    assert found(report) == {"documents_without_text": 2, "identical_pages": 1}
    assert report["documents_without_text"].examples == (Example((), ("b",)), Example((), ("c",)))
    assert report["documents_without_text"].is_problem


def test_deduplicated_pages_have_no_copies():
    data = dataset(content=(0, 1, 2, 3, 1, 3), negatives=((2, 3), (2, 4, 3)))
    assert {"unjudged_copies", "identical_pages"} <= found(data.audit()).keys()
    assert found(data.deduplicate().audit()) == {"relevant_negatives_by_id": 1}


# --- against plain Python, and against the rows -------------------------------------------------------------------


def brute_force(content, texts, judged, negatives) -> dict[str, int]:
    """The same counts by loops over the input."""
    counts: Counter = Counter()
    relevant = {(query, document) for query, document, _ in judged}
    by_text = {(texts[query], document) for query, document in relevant}
    by_bytes = {(texts[query], content[document]) for query, document in relevant}
    usable = []
    for query, listed in enumerate(negatives or ()):
        seen = []
        for document in listed:
            counts["repeated_negatives"] += content[document] in seen
            seen.append(content[document])
            if (query, document) in relevant:
                counts["relevant_negatives_by_id"] += 1
            elif (texts[query], document) in by_text:
                counts["relevant_negatives_by_text"] += 1
            elif (texts[query], content[document]) in by_bytes:
                counts["relevant_negatives_by_bytes"] += 1
        usable.append(len({number for number in seen if (texts[query], number) not in by_bytes}))
    usual = max(((usable.count(length), length) for length in usable), default=(0, 0))[1]
    counts["queries_without_negatives"] = usable.count(0)
    counts["short_negative_lists"] = sum(length < usual for length in usable)
    counts["repeated_texts"] = sum(count > 1 for count in Counter(texts).values())
    judgements = [
        (texts[query], frozenset((content[document], score) for at, document, score in judged if at == query))
        for query in range(len(texts))
    ]
    counts["differing_judgements"] = sum(count > 1 for count in Counter(text for text, _ in set(judgements)).values())
    counts["identical_pages"] = len(content) - len(set(content))
    counts["unjudged_copies"] = sum(
        (query, document) not in relevant
        and any((query, other) in relevant and content[other] == content[document] for other in range(len(content)))
        for query in range(len(texts))
        for document in range(len(content))
    )
    referred = {document for _, document in relevant} | {document for row in negatives or () for document in row}
    counts["unreferenced_pages"] = len(content) - len(referred)
    return {key: count for key, count in counts.items() if count}


@st.composite
def small_datasets(draw):
    """Parts for ``build``: copies, repeated texts, graded judgements and negatives of every kind among them."""
    content = draw(st.lists(st.integers(0, 4), min_size=3, max_size=8))
    texts = draw(st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=5))
    documents = st.integers(0, len(content) - 1)
    pairs = [
        (query, document)
        for query in range(len(texts))
        for document in draw(st.lists(documents, min_size=1, max_size=3, unique=True))
    ]
    judged = [(query, document, draw(st.integers(1, 2))) for query, document in pairs]
    lists = st.lists(st.lists(documents, max_size=5), min_size=len(texts), max_size=len(texts))
    return content, texts, judged, draw(st.none() | lists)


@given(small_datasets())
@settings(max_examples=200, deadline=None)
def test_the_audit_counts_what_loops_count(parts):
    report = build(*parts).audit()
    assert found(report) == brute_force(*parts)
    for finding in report.findings:
        assert bool(finding.examples) == bool(finding.count)
        assert len(finding.examples) <= 5


@given(small_datasets())
@settings(max_examples=60, deadline=None)
def test_training_rows_refuse_and_fill_what_the_audit_says(parts):
    content, texts, judged, negatives = parts
    # pages that are relevant to nothing, so that every row can be filled
    data = build([*content, 10, 11, 12], texts, judged, negatives or [[] for _ in texts])
    report = data.audit()
    chosen = data.training_rows(3).format["format_kwargs"]["transform"].chosen
    listed = sum(report[f"relevant_negatives_by_{how}"].count for how in ("id", "text", "bytes"))
    assert listed == chosen["refused"]
    filled = sum(max(0, 3 - length) * queries for length, queries in report.negatives_per_query.items())
    assert filled == chosen["filled"]


# --- the report ---------------------------------------------------------------------------------------------------


def messy() -> RetrievalDataset:
    """Several things are wrong at once."""
    return dataset(
        content=(0, 1, 2, 3, 1, None, 7),
        texts=("one", "one", "two"),
        judged=((0, 0, 1), (1, 1, 1), (2, 3, 1)),
        negatives=((1, 2, 2), (1, 4, 2), (3, 0, 2)),
    )


def test_several_findings_at_once():
    assert found(messy().audit()) == {
        "relevant_negatives_by_id": 2,
        "relevant_negatives_by_text": 1,
        "relevant_negatives_by_bytes": 1,
        "differing_judgements": 1,
        "unjudged_copies": 1,
        "documents_without_image": 1,
        "repeated_negatives": 2,
        "identical_pages": 1,
        "repeated_texts": 1,
        "unreferenced_pages": 2,
    }


def test_the_report_is_json_and_comes_back(tmp_path):
    report = messy().audit()
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    report.save(tmp_path / "audit.json")
    saved = json.loads((tmp_path / "audit.json").read_text("utf-8"))
    assert saved == plain
    assert {finding["key"]: finding["count"] for finding in saved["findings"]} == report.counts
    by_key = {finding["key"]: finding for finding in saved["findings"]}
    assert by_key["relevant_negatives_by_text"]["examples"] == [{"query_ids": ["q0", "q1"], "document_ids": ["d1"]}]
    assert saved["negatives_per_query"] == {"1": 2, "2": 1}


def test_findings_are_looked_up_by_key():
    report = messy().audit()
    assert report["identical_pages"].count == report.counts["identical_pages"] == 1
    with pytest.raises(KeyError, match=r"'identical' is no finding\. Known are: relevant_negatives_by_id, "):
        report["identical"]


def test_reports_and_findings_are_frozen():
    report = dataset().audit()
    for value, name in ((report, "findings"), (report.findings[0], "count")):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(value, name, ())


def test_problems_come_first():
    kinds = [finding.is_problem for finding in dataset().audit().findings]
    assert kinds == sorted(kinds, reverse=True)
    lines = str(messy().audit()).splitlines()
    assert lines[6] == "Problems"
    assert lines[7] == "        2  negatives that are relevant to their own query (query 'q1', document 'd1')"
    assert lines[8].strip().startswith("Judgement and list contradict each other.")
    assert "Good to know" in lines
    assert repr(messy().audit()) == str(messy().audit())


def everything_at_once() -> AuditReport:
    """As many findings as there can be in a corpus without texts."""
    report = dataset().audit()
    example = Example((LONG_ID, LONG_ID + "2"), (LONG_ID, LONG_ID + "2"))
    findings = [
        replace(finding, count=0 if finding.key == "documents_without_text" else 123_456_789, examples=(example,) * 5)
        for finding in report.findings
    ]
    sizes = dict.fromkeys(report.tables, 123_456_789)
    return AuditReport(sizes, dict.fromkeys(range(40), 123_456_789), tuple(findings))


def test_the_report_is_one_screen_whatever_is_found():
    lines = str(everything_at_once()).splitlines()
    assert len(lines) <= 42
    assert max(map(len, lines)) <= 120
    uncut = [line for line in lines if line.startswith(" " * 11)]
    assert len(uncut) == 9
    assert not any(line.endswith("...") for line in uncut)


@pytest.mark.parametrize("key", ["title", "meaning"])
def test_what_findings_say_fits_its_line(key):
    for finding in dataset().audit().findings:
        assert len(getattr(finding, key)) <= {"title": 62, "meaning": 108}[key]


def test_ids_of_any_length_and_spelling_stay_on_their_line():
    finding = Finding("key", 1, True, "title", "meaning", (Example(("a\nb",), ("é" * 300,)),))
    lines = str(AuditReport(dataset().audit().tables, {}, (finding,))).splitlines()
    assert lines[-2] == f"        1  title (query 'a\\nb', document '{'é' * 10}...{'é' * 10}')"


def test_few_lengths_are_listed_and_many_summed_up():
    report = dataset(negatives=((2, 3), (3,))).audit()
    assert "negatives  3 listed; usable a query: 1 (1 query), 2 (1 query)" in str(report)
    many = replace(report, negatives_per_query={0: 1, 3: 2, 4: 1, 5: 9, 6: 1, 16: 9})
    assert "usable a query: 0 to 16, most often 16 (9 queries)" in str(many)


def test_nothing_is_decoded(pages, monkeypatch):
    data = RetrievalDataset.from_id_rows(pages)

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened")

    monkeypatch.setattr("PIL.Image.open", refuse)
    assert data.audit().problems == ()
