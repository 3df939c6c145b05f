"""What the audit finds in pages and texts, in comparison with another dataset, and what is taken out."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as Pictures
from PIL import ImageDraw, ImageFilter, ImageFont

from mmtune import ConfigError, DatasetError, RetrievalDataset
from mmtune.data.content import split_words
from mmtune.data.findings import Example, Finding
from mmtune.data.near_copies import AlignedPage, find_candidates, make_raster, sketch_page
from mmtune.testing.pdfs import PdfPageContent, show_text, write_pdf

SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ren",
    "tas",
    "vor",
    "ple",
    "sti",
    "nau",
    "bor",
    "che",
    "din",
    "fel",
    "gra",
    "hul",
    "jun",
    "kes",
)
SIZE_PX = 425, 550


def words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) for _ in range(count)]


def text_page(seed: int) -> Pictures.Image:
    """A page of lines of words, as no other seed gives it."""
    rng = random.Random(seed)
    page = Pictures.new("L", SIZE_PX, 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for top in range(40, 510, 16):
        if rng.random() < 0.9:
            draw.text((40, top), " ".join(words(rng, rng.randint(5, 9)))[:58], 0, font)
    return page.convert("RGB")


def receipt(*amounts: str) -> Pictures.Image:
    """The receipt of one shop; all that differs are the amounts."""
    page = Pictures.new("L", (300, 520), 240)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for at, line in enumerate(("CORNER SHOP SDN BHD", "12 HARBOUR ROAD", "TAX INVOICE", "CASHIER 03", "-" * 34)):
        draw.text((40, 30 + 30 * at), line, 40, font)
    for at, (what, amount) in enumerate(
        zip(("COFFEE", "BREAD", "MILK", "TOTAL", "CASH", "CHANGE"), amounts, strict=True)
    ):
        draw.text((40, 190 + 40 * at), what, 40, font)
        draw.text((210, 190 + 40 * at), amount, 40, font)
    draw.text((40, 450), "THANK YOU  PLEASE COME AGAIN", 40, font)
    return page.convert("RGB")


def encoded(page: Pictures.Image, quality: int | None = None) -> dict:
    buffer = io.BytesIO()
    page.save(buffer, "PNG") if quality is None else page.save(buffer, "JPEG", quality=quality)
    return {"bytes": buffer.getvalue(), "path": None}


def rescan(page: Pictures.Image, seed: int) -> Pictures.Image:
    """Turned by a degree, moved, blurred, greyer, with noise."""
    turned = page.rotate(0.8, Pictures.Resampling.BICUBIC, fillcolor=(255, 255, 255), translate=(4, -3))
    greys = np.asarray(turned.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)
    noise = np.random.default_rng(seed).normal(0, 8, (*greys.shape[:2], 1))
    return Pictures.fromarray((30 + 0.8 * greys + noise).clip(0, 255).astype(np.uint8))


COPIES = {
    "rescaled": lambda page: encoded(page.resize((300, 388), Pictures.Resampling.BICUBIC)),
    "recompressed": lambda page: encoded(page, quality=30),
    "cropped": lambda page: encoded(page.crop((12, 16, 413, 534))),
    "rescanned": lambda page: encoded(rescan(page, 1), quality=60),
}


def build(pages: dict[str, dict | None], texts: dict[str, str] | None = None, **tables) -> RetrievalDataset:
    """Documents by id; one query about the first, that lists the others as negatives, unless others are given."""
    corpus = {"document_id": list(pages), "image": list(pages.values())}
    if texts is not None:
        corpus["text"] = [texts.get(each) for each in pages]
    first, *others = pages
    given = {
        "queries": {"q0": "what is told on the first page"},
        "qrels": [("q0", first, 1)],
        "negatives": {"q0": others},
    }
    given |= tables
    query_ids, document_ids, scores = zip(*given["qrels"], strict=True)
    return RetrievalDataset(
        Dataset.from_dict(corpus).cast_column("image", Image(decode=False)),
        Dataset.from_dict({"query_id": list(given["queries"]), "text": list(given["queries"].values())}),
        Dataset.from_dict({"query_id": query_ids, "document_id": document_ids, "score": scores}),
        Dataset.from_dict({"query_id": list(given["negatives"]), "document_ids": list(given["negatives"].values())})
        if given["negatives"]
        else None,
    )


def look(data: RetrievalDataset, **arguments):
    return data.audit(content=True, show_progress_bar=False, **arguments)


def ids(finding: Finding) -> list[tuple[str, ...]]:
    return [example.document_ids or example.query_ids for example in finding.examples]


@pytest.fixture(scope="module")
def distinct() -> dict[str, dict | None]:
    return {f"page {seed}": encoded(text_page(seed)) for seed in range(6)}


@pytest.fixture(scope="module")
def planted(distinct) -> RetrievalDataset:
    """A copy of each kind, a blank page, a page number alone, a broken one, and a byte-identical one."""
    blank = Pictures.new("RGB", SIZE_PX, "white")
    numbered = blank.copy()
    ImageDraw.Draw(numbered).text((210, 520), "12", "black", ImageFont.load_default(8))
    added = {name: change(text_page(at)) for at, (name, change) in enumerate(COPIES.items())}
    added |= {"blank": encoded(blank), "numbered": encoded(numbered), "same": distinct["page 5"]}
    return build(distinct | added | {"broken": {"bytes": b"\x89PNG\r\n broken", "path": None}})


@pytest.fixture(scope="module")
def report(planted):
    return look(planted)


# --- pages --------------------------------------------------------------------------------------------------------


def test_a_clean_set_is_found_clean(distinct):
    found = look(build(distinct))
    assert {key: count for key, count in found.counts.items() if count} == {}
    assert found.measures["page_width_px"] == (425, 425, 425)
    assert found.measures["query_words"] == (7, 7, 7)


def test_each_planted_page_is_found_by_id(report):
    expected = [(f"page {at}", name) for at, name in enumerate(COPIES)]
    assert ids(report["near_copies"]) == expected
    assert report["near_copies"].count == 4
    assert ids(report["blank_pages"]) == [("blank",), ("numbered",)]
    assert ids(report["damaged_pages"]) == [("broken",)]
    assert ids(report["identical_pages"]) == [("page 5", "same")]
    assert report["look_alikes"].count == 0


def test_receipts_with_other_amounts_are_look_alikes():
    one = receipt("4.20", "2.50", "3.10", "9.80", "10.00", "0.20")
    other = receipt("4.20", "7.50", "3.10", "14.80", "20.00", "5.20")
    pages = {"a": encoded(one), "b": encoded(other), "c": encoded(other, quality=80), "t": encoded(text_page(1))}
    found = look(build(pages))
    assert ids(found["near_copies"]) == [("b", "c")]
    assert ids(found["look_alikes"]) == [("a", "b", "c")]


@pytest.mark.parametrize(("at", "digit"), [(3, "9.30"), (5, "0.70")])
def test_one_digit_makes_another_receipt(at, digit):
    amounts = ["4.20", "2.50", "3.10", "9.80", "10.00", "0.20"]
    other = [*amounts[:at], digit, *amounts[at + 1 :]]
    found = look(build({"a": encoded(receipt(*amounts)), "b": encoded(receipt(*other))}))
    assert ids(found["near_copies"]) == []
    assert ids(found["look_alikes"]) == [("a", "b")]


def test_text_decides_before_pixels(distinct):
    """Equal pictures with other numbers in their text layers are no copies; with equal texts they are."""
    text = " ".join(words(random.Random(3), 30))
    pages = {"a": encoded(text_page(7)), "b": encoded(text_page(7), quality=50), "t": encoded(text_page(8))}
    same = {"a": f"{text} 12", "b": f"{text.upper()}, 12!", "t": None}
    assert ids(look(build(pages, same))["near_copies"]) == [("a", "b")]
    assert ids(look(build(pages, same | {"b": f"{text} 13"}))["look_alikes"]) == [("a", "b")]
    unlike = " ".join(words(random.Random(4), 30))
    found = look(build(pages, same | {"b": unlike}))
    assert found["near_copies"].count == found["look_alikes"].count == 0


def invoice(amount: int) -> PdfPageContent:
    lines = ("Invoice of Smith Ltd", f"Total due: {amount} EUR", "Thank you")
    return PdfPageContent(b"".join(show_text(60, 700 - 40 * at, 20, line) for at, line in enumerate(lines)))


def test_pages_of_few_words_with_other_numbers_are_look_alikes(tmp_path):
    write_pdf(tmp_path / "bills.pdf", [invoice(amount) for amount in (1250, 1350, 8250, 1200)])
    found = look(RetrievalDataset.from_pdfs(tmp_path))
    assert ids(found["near_copies"]) == []
    assert ids(found["look_alikes"]) == [tuple(f"bills.pdf#{k}" for k in range(1, 5))]


def test_few_words_tell_pages_apart_that_look_alike(distinct):
    pages = {"a": encoded(text_page(7)), "b": encoded(text_page(7), quality=50), "t": encoded(text_page(8))}
    for text, is_copy in {"Total 12": True, "": True, None: True, "Total 13": False, "Sum 12": False}.items():
        found = look(build(pages, {"a": "Total 12", "b": text}))
        assert ids(found["near_copies" if is_copy else "look_alikes"]) == [("a", "b")]


def test_a_scan_without_words_joins_no_pages_that_their_words_tell_apart():
    pages = {each: encoded(text_page(7), quality=quality) for each, quality in {"a": 90, "b": 50, "scan": 70}.items()}
    found = look(build(pages, {"a": "Total 12", "b": "Total 13", "scan": None}))
    assert ids(found["near_copies"]) == []
    assert ids(found["look_alikes"]) == [("a", "b", "scan")]


def test_texts_alone_are_compared_by_their_words():
    text = " ".join(words(random.Random(3), 30))
    data = RetrievalDataset(
        Dataset.from_dict({"document_id": ["a", "b", "c"], "text": [text, text.title(), "short"]}),
        Dataset.from_dict({"query_id": ["q"], "text": ["one two three"]}),
        Dataset.from_dict({"query_id": ["q"], "document_id": ["a"], "score": [1]}),
    )
    found = look(data)
    assert ids(found["near_copies"]) == [("a", "b")]
    assert found["blank_pages"].count == 0
    assert data.without(found["near_copies"]).corpus["document_id"][:] == ["a", "c"]


def test_order_and_shuffling_change_nothing(planted, report):
    order = np.random.default_rng(0).permutation(len(planted.corpus))
    shuffled = RetrievalDataset(planted.corpus.select(order), planted.queries, planted.qrels)
    groups = {frozenset(group) for group in ids(look(shuffled, num_workers=1)["near_copies"])}
    assert groups == {frozenset(group) for group in ids(report["near_copies"])}


def test_the_candidates_are_those_of_a_loop():
    rasters = [make_raster(text_page(seed)) for seed in range(9)]
    rasters += [make_raster(text_page(2).resize((300, 400)))]
    sketches = [sketch_page(raster) for raster in rasters]
    everything = find_candidates(sketches, depth=9)
    assert find_candidates(sketches, depth=9, at_once=4) == everything
    assert (2, 9) in everything
    assert find_candidates(sketches[9:], sketches[:9], depth=3) == [(0, 2)]
    assert find_candidates([]) == find_candidates(sketches, []) == []


def test_a_match_is_the_same_from_either_side():
    one, other = text_page(2), rescan(text_page(2), 5)
    pages = [AlignedPage(make_raster(page), page.size) for page in (one, other)]
    there, back = pages[0].compare(pages[1]), pages[1].compare(pages[0])
    assert there.is_copy
    assert back.is_copy
    assert there.correlation == pytest.approx(back.correlation, abs=0.1)


# --- queries, and another dataset ---------------------------------------------------------------------------------


def test_queries_that_are_short_or_copied(distinct):
    texts = {"page 0": "In 2021 the Harbour sold 4,000 boats; nobody knows why."}
    queries = {
        "short": "boats sold",
        "copied": "the harbour sold 4.000 boats",
        "fair": "how many boats went in 2021",
        "cjk": "港湾年度报告",
    }
    qrels = [(query_id, "page 0", 1) for query_id in queries]
    found = look(build(distinct, texts, queries=queries, qrels=qrels, negatives=None))
    assert ids(found["short_queries"]) == [("short",)]
    assert found["copied_queries"].examples == (Example(("copied",), ("page 0",)),)


def test_words_are_split_in_every_script():
    assert split_words("Élan, No.7?") == ["élan", "no", "7"]
    assert split_words("年度 report") == ["年", "度", "report"]
    assert split_words(None) == []


def test_leaks_by_bytes_by_near_copy_and_by_words(distinct):
    train = build(
        distinct,
        queries={"t1": "What is told here?", "t2": "something else again"},
        qrels=[("t1", "page 0", 1), ("t2", "page 1", 1)],
        negatives=None,
    )
    pages = {"e0": distinct["page 2"], "e1": COPIES["rescanned"](text_page(3)), "e2": distinct["page 4"]}
    qrels = [("q", "e0", 1), ("q", "e1", 1)]
    other = build(pages, queries={"q": "what is told HERE"}, qrels=qrels, negatives=None)
    found = look(train, against=other)
    assert ids(found["leaked_documents"]) == [("page 2", "e0")]  # e2 answers nothing there
    assert ids(found["leaked_near_copies"]) == [("page 3", "e1")]
    assert ids(found["leaked_queries"]) == [("t1", "q")]
    cheap = train.audit(against=other)
    assert cheap.counts["leaked_documents"] == 1
    with pytest.raises(KeyError, match=r"audit\(content=True, against=other\) does"):
        cheap["leaked_near_copies"]
    cleaned = train.without([found[key] for key in ("leaked_documents", "leaked_near_copies", "leaked_queries")])
    after = look(cleaned, against=other)
    assert [after[key].count for key in ("leaked_documents", "leaked_near_copies", "leaked_queries")] == [0, 0, 0]


def test_a_split_leaks_nothing(pages):
    train, evaluation = RetrievalDataset.from_id_rows(pages).split(6)
    found = train.audit(against=evaluation)
    assert {key: found.counts[key] for key in ("leaked_documents", "leaked_queries")} == {
        "leaked_documents": 0,
        "leaked_queries": 0,
    }


def test_answers_of_another_dataset_that_cannot_be_read_are_listed(distinct, tmp_path):
    for at in range(4):
        (tmp_path / f"{at}.png").write_bytes(distinct[f"page {at}"]["bytes"])
    pages = {f"e{at}": {"bytes": None, "path": str(tmp_path / f"{at}.png")} for at in range(4)}
    other = build(pages, qrels=[("q0", each, 1) for each in ("e0", "e1", "e2")], negatives=None)
    train = build(distinct)
    assert ids(train.audit(against=other)["leaked_documents"]) == [(f"page {at}", f"e{at}") for at in range(3)]
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"cut")
    (tmp_path / "3.png").unlink()  # no answer
    found = train.audit(against=other)
    assert ids(found["leaked_documents"]) == [("page 2", "e2")]
    assert ids(found["unread_answers"]) == [("e0",)]
    assert found["unread_answers"] in found.problems
    assert ids(look(train, against=other)["unread_answers"]) == [("e0",), ("e1",)]


def test_pages_of_pdfs_are_found_in_another_dataset_without_their_file(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        write_pdf(folder / "bills.pdf", [invoice(amount) for amount in (1250, 8250)])
    train, other = map(RetrievalDataset.from_pdfs, folders)
    (folders[1] / "bills.pdf").unlink()
    for found in (train.audit(against=other), look(train, against=other)):
        assert ids(found["leaked_documents"]) == [(f"bills.pdf#{k}",) * 2 for k in (1, 2)]
        assert found["unread_answers"].count == 2
    write_pdf(folders[1] / "bills.pdf", [invoice(7), invoice(8)])
    assert look(train, against=other)["unread_answers"].count == 2
    assert ids(other.audit(against=train)["leaked_documents"]) == [(f"bills.pdf#{k}",) * 2 for k in (1, 2)]


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_cheap_audit_looks_at_no_page(planted):
    found = planted.audit()
    assert "near_copies" not in found.counts
    assert found.measures == {}
    with pytest.raises(KeyError, match=r"'near_copies' was not looked for: audit\(content=True\) does"):
        found["near_copies"]


def test_the_report_is_json(report):
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert plain["measures"]["page_width_px"] == [300, 425, 425]
    assert "sizes      page width px 300 to 425, median 425" in str(report)


def test_the_report_stays_one_screen_with_everything_in_it(report, planted):
    everything = planted.audit(against=planted, content=True, show_progress_bar=False)
    example = Example(("q" * 90, "q" * 90), ("d" * 90, "d" * 90))
    findings = [replace(finding, count=123_456_789, examples=(example,)) for finding in everything.findings]
    lines = str(replace(everything, findings=tuple(findings))).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"content": "yes"}, "content='yes'"),
        ({"content": 1}, "content=1"),
        ({"num_examples": -1}, "num_examples=-1"),
        ({"num_examples": True}, "num_examples=True"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": "2"}, "num_workers='2'"),
        ({"show_progress_bar": None}, "show_progress_bar=None"),
    ],
)
def test_arguments_of_the_wrong_kind(distinct, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(distinct).audit(**arguments)


def test_all_examples_are_listed_on_request():
    pages = {f"d{k}": encoded(Pictures.new("RGB", (8, 8), (k, 0, 0))) for k in range(10)}
    data = build(pages, negatives={"q0": []})
    assert len(data.audit()["unreferenced_pages"].examples) == 5
    everything = data.audit(num_examples=None)["unreferenced_pages"]
    assert len(everything.examples) == 9
    assert data.without(everything).corpus["document_id"][:] == ["d0"]
    with pytest.raises(ConfigError, match=r"lists 5 of its 9\. Pass one of audit\(num_examples=None\)"):
        data.without(data.audit()["unreferenced_pages"])


# --- without ------------------------------------------------------------------------------------------------------


def test_near_copies_become_one_document(distinct):
    pages = {"a": distinct["page 0"], "b": COPIES["recompressed"](text_page(0)), "c": distinct["page 1"]}
    queries = {"q0": "what is told on page one", "q1": "what is told on page two"}
    qrels = [("q0", "a", 1), ("q1", "b", 2), ("q1", "c", 1)]
    data = build(pages, queries=queries, qrels=qrels, negatives={"q0": ["b", "c"], "q1": []})
    cleaned = data.without(look(data)["near_copies"])
    assert cleaned.corpus["document_id"][:] == ["a", "c"]
    rows = cleaned.qrels.to_list()
    assert {(row["query_id"], row["document_id"], row["score"]) for row in rows} == {
        ("q0", "a", 1),
        ("q1", "a", 2),
        ("q1", "c", 1),
    }
    # "b" was a negative of q0 and is its answer now
    assert cleaned.negatives.to_list()[0] == {"query_id": "q0", "document_ids": ["c"]}
    assert cleaned.audit(num_examples=None)["taken_out"].examples == (Example((), ("b",)), Example(("q0",), ("b",)))
    assert look(cleaned)["near_copies"].count == 0
    assert data.corpus["document_id"][:] == ["a", "b", "c"]


def test_pages_go_with_their_judgements_and_places(planted, report):
    cleaned = planted.without([report["blank_pages"], report["damaged_pages"]])
    gone = {"blank", "numbered", "broken"}
    assert not gone & set(cleaned.corpus["document_id"][:])
    assert not gone & set(cleaned.negatives["document_ids"][0])
    assert len(cleaned.corpus) == len(planted.corpus) - 3
    assert cleaned.audit().counts["taken_out"] == 3


def test_a_query_left_without_answer_goes_and_is_counted(distinct):
    pages = {"blank": encoded(Pictures.new("RGB", (60, 80), "white")), **distinct}
    queries = {"q0": "who wrote the blank page", "q1": "who wrote the first page"}
    data = build(pages, queries=queries, qrels=[("q0", "blank", 1), ("q1", "page 0", 1)], negatives=None)
    cleaned = data.without(look(data)["blank_pages"])
    assert cleaned.queries["query_id"][:] == ["q1"]
    assert cleaned.audit().counts["queries_without_document"] == 1


def test_a_part_of_a_finding(report, planted):
    some = report["near_copies"].only(report["near_copies"].examples[1:2])
    assert some.count == 1
    left = set(planted.corpus["document_id"][:]) - set(planted.without(some).corpus["document_id"][:])
    assert left == {"recompressed"}


def test_what_went_is_saved(planted, report, tmp_path):
    planted.without(report["blank_pages"]).save(tmp_path / "saved")
    loaded = RetrievalDataset.load(tmp_path / "saved")
    assert loaded.audit()["taken_out"].examples == (Example((), ("blank",)), Example((), ("numbered",)))
    both = RetrievalDataset.concatenate([loaded, loaded])
    assert both.audit().counts["taken_out"] == 4


def test_look_alikes_are_refused_and_can_be_judged():
    amounts = ["4.20", "2.50", "3.10", "9.80", "10.00", "0.20"]
    data = build({"a": encoded(receipt(*amounts)), "b": encoded(receipt(*amounts[:-1], "7.70"))})
    found = look(data)
    with pytest.raises(ConfigError, match=r"takes out no 'look_alikes'.*a person has to judge"):
        data.without(found["look_alikes"])
    judged = found["near_copies"].only(found["look_alikes"].examples)
    assert data.without(judged).corpus["document_id"][:] == ["a"]


@pytest.mark.parametrize("findings", ["blank_pages", None, 5, [1], {"near_copies": 1}, [None]])
def test_what_is_no_finding_is_refused(distinct, findings):
    with pytest.raises(ConfigError, match="expected a finding of an audit"):
        build(distinct).without(findings)


def test_findings_of_another_dataset_are_refused(report, distinct):
    with pytest.raises(DatasetError, match="names the document 'blank', which is not in this dataset"):
        build(distinct).without(report["blank_pages"])


def test_nothing_is_taken_out_for_nothing(planted):
    assert planted.without([]).corpus["document_id"][:] == planted.corpus["document_id"][:]


def test_texts_of_several_chunks_a_page_are_not_lost(distinct):
    copy = COPIES["recompressed"](text_page(0))
    pages = {"a1": distinct["page 0"], "a2": distinct["page 0"], "b1": copy, "b2": copy}
    data = build(pages, {"a1": "one", "a2": "two", "b1": "one", "b2": "two"})
    found = look(data)
    assert ids(found["near_copies"]) == [("a1", "a2", "b1", "b2")]
    with pytest.raises(DatasetError, match="would lose texts"):
        data.without(found["near_copies"])
