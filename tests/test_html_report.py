"""``report.html``: one file, whatever stands in the data; looked at by a browser where there is one."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from mmtune import ConfigError, RetrievalDataset
from mmtune.errors import MissingExtraError
from mmtune.report import html as report_html
from mmtune.report.gallery import MOST_SHOWN, Gallery, at_full_size, choose_changes
from mmtune.report.html import write_page
from mmtune.report.markdown import BeforeAfter

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

METRIC = "vdr_cosine_ndcg@10"
ATTACK = "<script>console.error('run');document.title='run'</script><img src=x onerror=alert(1)>"
QUOTES = """rep"ort's <b>&amp; {{ 7 * 7 }}.pdf#1"""
BIDI = "\u202egnp.exe\x00\ud800"


def draw_page(color: str, size: tuple[int, int] = (90, 120)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


PAGES = {
    QUOTES: draw_page("red"),
    "p1": draw_page("green"),
    "p2": draw_page("blue", (4, 900)),
    "a/very/long/" + "path-" * 40: draw_page("yellow"),
    "naïve ページ": draw_page("white"),
    "broken": b"no image",
}
IDS = list(PAGES)
QUERIES = {"q1": ATTACK, "q2": "Wie hoch war der Umsatz? 売上高は? \u200fكم", "q3": "$a$ and $b_", "q4": "what " * 300}
RELEVANT = {"q1": QUOTES, "q2": "p1", "q3": "p2", "q4": "broken"}


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    features = Features({"document_id": Value("string"), "image": ImageFeature(decode=False), "text": Value("string")})
    corpus = {
        "document_id": IDS,
        "image": [{"bytes": content, "path": None} for content in PAGES.values()],
        "text": [f"Secret words of {number}. {ATTACK}" for number in range(len(IDS))],
    }
    qrels = {"query_id": list(RELEVANT), "document_id": list(RELEVANT.values()), "score": [1] * 4}
    return RetrievalDataset.from_beir(
        Dataset.from_dict(corpus, features=features),
        Dataset.from_dict({"query_id": list(QUERIES), "text": list(QUERIES.values())}),
        Dataset.from_dict(qrels),
    )


def per_query(metric: str = METRIC, **columns: Any) -> pa.Table:
    table = {
        "metric": [metric] * 4,
        "query_id": list(QUERIES),
        "before": [0.0, 1.0, 0.5, 0.5],
        "after": [1.0, 0.0, 0.5, 0.75],
        "top_ids_before": [IDS[1:], ["p1", "p2"], IDS, IDS[:5]],
        "top_ids_after": [IDS, ["p2", *IDS[2:]], IDS, ["gone", *IDS[:3]]],
    }
    return pa.table({**table, **columns})


VERDICT = {
    "outcome": "REGRESSION",
    "sentence": "Better here, worse on the guard set: nDCG@10 0.50 to 0.56, +0.06 [-0.10, +0.22], 2 queries better",
    "line": "VERDICT: REGRESSION | score=0.5600 | delta=+0.0600",
    "measure": "nDCG@10",
    **{"before": 0.5, "after": 0.56, "delta": 0.06, "interval": [-0.1, 0.22], "p_value": 0.04},
    **{"wins": 2, "ties": 1, "losses": 1, "num_queries": 4, "num_clusters": 4},
    "guard": {"outcome": "REGRESSION", "before": 0.6, "after": 0.4, "delta": -0.2, "interval": None, "p_value": 0.0004},
    "by_size": {"full": {"before": 0.5, "after": 0.56, "delta": 0.06, "interval": [0.01, 0.1], "p_value": 0.2}},
    "by_group": {
        "language": {
            ATTACK: {"before": 0.1, "after": 0.2, "delta": 0.1, "interval": None},
            "日本語": {"before": 0.3, "after": 0.2, "delta": -0.1, "p_value": 0.5},
        }
    },
}
LOG = [
    {"loss": 2.5, "step": 5},
    {"eval_vdr_cosine_ndcg@10": 0.52, "eval_vdr-64d_cosine_ndcg@10": 0.4, "eval_runtime": 2.0, "step": 5},
    {"loss": float("nan"), "step": 12},
    {"loss": 1.25, "step": 10},
    {"eval_vdr_cosine_ndcg@10": 0.56, "eval_vdr-64d_cosine_ndcg@10": 0.45, "eval_runtime": 2.0, "step": 10},
    {"train_runtime": 7300.0, "train_samples_per_second": 12.5, "step": 10},
]
HUB = {"wrongly_in": 3, "queries": 4, "by_chance": 0.5}
SETTINGS = {
    "evaluation": {
        "hubs": [{"document_id": name, **HUB} for name in ("p1", QUOTES, "no such")],
        "largest_change_by_batch_size": 1.3e-7,
    },
    "model": {"base_model": f"/models/{QUOTES}", "parameters": 238_785, "dtype": "float32"},
    "training": {"best_step": 10, "prompts": {"query": ATTACK}, "bytes_of_weights_gradients_optimizer": 3_820_548},
    "audit": {"relevant_negatives_by_id": 3, "en: short_negative_lists": 2, "a_new_kind": 1},
    "cost": {"peak_memory_bytes": 5_200_000_000, "whole_call_s": 80.0},
}


def write(path: Path, data: RetrievalDataset | None, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "title": f"Report of {QUOTES}",
        "verdict": VERDICT,
        "rows": [BeforeAfter("full", 0.5, 0.56), BeforeAfter("64", 0.41, 0.45)],
        "primary_metric": METRIC,
        "per_query": per_query(),
        "log": LOG,
        "settings": SETTINGS,
        "versions": {"mmtune": "0.1.0"},
        "datasets": {"": data} if data else {},
    }
    write_page(path, **{**arguments, **changes})
    return path.read_text("utf-8")


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, content: str) -> None:
        self.text += content if self._inside != "style" else ""

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for each, attributes in self.found if each == tag]


@pytest.fixture(scope="module")
def page(data: RetrievalDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / f'{ATTACK.replace("/", "")} it\'s "quoted".html'
    write(path, data)
    return path


def test_what_stands_in_the_data_is_shown_and_not_run(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    assert not elements.of("script")
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    for text in (ATTACK, QUOTES, QUERIES["q2"], "日本語", "naïve ページ"):
        assert text in elements.text
    assert "{{ 7 * 7 }}" in elements.text


def test_nothing_leads_out_of_the_file(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    links = [attributes.get(key) for _, attributes in elements.found for key in ("src", "href", "srcset", "action")]
    assert {str(link).split(":")[0].split(";")[0][:1] for link in links if link} == {"d", "#"}
    assert all(str(link).startswith(("data:image/webp", "data:image/svg+xml", "#")) for link in links if link)
    assert "@import" not in page.read_text("utf-8")
    anchors = {attributes["id"] for _, attributes in elements.found if "id" in attributes}
    assert {str(link)[1:] for link in links if link and link.startswith("#")} <= anchors
    policy = next(each for each in elements.of("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])


def test_all_images_have_words_and_headings_their_order(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    images = elements.of("img")
    assert len(images) > 12
    assert all(image.get("alt") for image in images)
    alts = " ".join(str(image["alt"]) for image in images)
    assert "2.5 at step 5, 1.25 at step 10" in alts  # a step without a number is no point
    assert "full: 0.500 at the start, 0.560 at step 10" in alts
    assert "4 queries: 2 better, 1 the same, 1 worse" in alts
    assert f"Page {QUOTES}, number 1 after, relevant" in alts
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_verdict_stands_first_in_words(page: Path) -> None:
    text = Elements(page.read_text("utf-8")).text
    assert text.index("Better here, worse on the guard set") < text.index("VERDICT: REGRESSION") < text.index("0.560")
    for expected in (
        "0.600\xa0→ 0.400",
        "p < 0.001",
        "1.3e-07",
        "3 negatives that are relevant",
        "2 h 2 min",
        "5.2 GB",
    ):
        assert expected in text


def changes_of(data: RetrievalDataset, table: pa.Table, **arguments: Any) -> dict[str, Any]:
    options = {"documents": "image", "direction": "text_to_image", "thumbnails": True, **arguments}
    gallery = Gallery({"": data}, options["documents"], options["direction"], thumbnails=options["thumbnails"])
    return {each.asking.id: each for rows in choose_changes(table) for each in gallery.show(rows)}


def test_relevant_pages_and_ranks(data: RetrievalDataset) -> None:
    changes = changes_of(data, per_query())
    assert list(changes) == ["q1", "q4", "q2"]  # won by how much, then lost; a tie is neither
    assert changes["q1"].ranks == (None, 1)
    assert [each.is_relevant for each in changes["q1"].found[1]] == [True, False, False, False, False]
    assert [each.rank for each in changes["q1"].found[1]] == [1, 2, 3, 4, 5]
    assert changes["q2"].ranks == (1, None)
    missed = changes["q4"]
    assert [each.id for each in missed.answers] == ["broken"]
    assert "can't be decoded" in missed.answers[0].text
    assert "'gone' is not among" in missed.found[1][0].text


def test_a_thumbnail_is_of_its_own_page(data: RetrievalDataset) -> None:
    shown = changes_of(data, per_query())["q1"].found[1]
    for each, color in zip(shown[:3], ((254, 0, 0), (0, 128, 0), (0, 0, 254)), strict=True):
        content = base64.b64decode(each.picture.uri.partition(",")[2])
        image = Image.open(io.BytesIO(content))
        assert image.width <= 160
        assert image.height <= 240
        assert np.abs(np.asarray(image.convert("RGB"), int)[-1, -1] - color).max() < 12


def test_pages_may_ask_for_texts(data: RetrievalDataset) -> None:
    table = pa.table(
        {
            "metric": ["vdr-rerank-image-to-text_ndcg@10"],
            "query_id": ["p1"],
            "before": [0.0],
            "after": [1.0],
            "top_ids_before": [["q1", "q3"]],
            "top_ids_after": [["q2", "q1"]],
        }
    )
    change = changes_of(data, table)["p1"]
    assert change.asking.picture is not None
    assert change.ranks == (None, 1)
    assert [each.text for each in change.found[1]] == [QUERIES["q2"], ATTACK]


def test_the_name_of_a_metric_says_what_asks_in_any_words(data: RetrievalDataset) -> None:
    row = {**per_query().slice(0, 1).to_pylist()[0], "query_id": "p1"}
    gallery = Gallery({"a": data}, "text+image", "text_to_image", thumbnails=True)
    for metric, direction in (
        ("vdr-rerank-a-text+image-to-text_ndcg@10", "image_to_text"),
        ("vdr-rerank-a-text-to-text+image_ndcg@10", "text_to_image"),
        ("vdr-rerank-a-image-to-text_ndcg@10", "image_to_text"),
    ):
        change = gallery.show([{**row, "metric": metric}])[0]
        assert (change.set_name, change.asking.picture is not None) == ("a", direction == "image_to_text")


def test_sets_are_told_apart_by_the_name_of_the_metric(data: RetrievalDataset, tmp_path: Path) -> None:
    other = data.select_queries(["q1"])
    for metric, name in (("vdr-b-a_cosine_ndcg@10", "b-a"), ("vdr-a_cosine_ndcg@10", "a"), ("guard_ndcg@10", "")):
        rows = per_query(metric).slice(1, 1).to_pylist()
        change = Gallery({"a": other, "b-a": data}, "image", "text_to_image", thumbnails=True).show(rows)[0]
        assert (change.set_name, bool(change.asking.text)) == (name, name == "b-a")
    rows = {"primary_metric": "vdr-mean_ndcg", "per_query": per_query("vdr-set-a_ndcg")}
    assert "set-a" in write(tmp_path / "r.html", None, datasets={"set-a": data}, **rows)


def test_texts_of_documents_are_cut(data: RetrievalDataset, tmp_path: Path) -> None:
    text = Elements(write(tmp_path / "report.html", data, documents="text")).text
    assert "Secret words of 1" in text
    assert ATTACK in text


@pytest.mark.parametrize("documents", ["image", "text", "text+image"])
def test_confidential_pages_leave_nothing_but_ids(data: RetrievalDataset, tmp_path: Path, documents: Any) -> None:
    text = write(tmp_path / "report.html", data, documents=documents, thumbnails=False)
    assert "data:image/webp" not in text
    assert "Secret words" not in text
    assert {image["src"].split(";")[0] for image in Elements(text).of("img")} == {"data:image/svg+xml"}
    assert html.escape("naïve ページ") in text
    assert ATTACK in Elements(text).text


def test_what_is_not_known_is_left_out(data: RetrievalDataset, tmp_path: Path) -> None:
    nothing = {"verdict": None, "rows": [], "primary_metric": None, "per_query": None, "log": [], "settings": {}}
    text = Elements(write(tmp_path / "report.html", None, **nothing)).text
    assert "nothing is known about the gain" in text
    assert "No verdict" in text
    partly = {"verdict": {"outcome": "WIN", "sentence": "Better"}, "per_query": per_query().slice(0, 0), "log": [{}]}
    text = Elements(write(tmp_path / "report.html", data, **partly)).text
    assert "No query won." in text
    unknown = {"interval": [float("nan"), None], "p_value": None, "delta": float("nan"), "wins": None}
    assert "nan" not in Elements(write(tmp_path / "report.html", data, verdict={**VERDICT, **unknown})).text.lower()


def test_characters_that_html_cannot_hold(data: RetrievalDataset, tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", data, title=BIDI, verdict={**VERDICT, "sentence": BIDI})
    assert "\x00" not in text
    assert "gnp.exe\ufffd\ufffd" in text


def test_a_report_is_whole_or_as_it_was(
    data: RetrievalDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with monkeypatch.context() as broken:
        whole = Path.write_text
        broken.setattr(Path, "write_text", lambda self, text, *rest: whole(self, text[:1000], *rest) and 1 / 0)
        with pytest.raises(ZeroDivisionError, match="zero"):
            write(path, data)
    assert path.read_text() == "old"
    won = {"per_query": per_query(top_ids_after=[["p2"]] * 4).slice(1, 1)}
    assert write(path, data, **won) == write(tmp_path / "again.html", data, **won)


def test_wrong_arguments_and_missing_packages(
    data: RetrievalDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="thumbnails='no'"):
        write(tmp_path / "report.html", data, thumbnails="no")
    monkeypatch.setattr(report_html, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs jinja2 and matplotlib.*pip install"):
        write(tmp_path / "report.html", data)


def test_fifty_of_each_side_at_most() -> None:
    changes = np.linspace(-1, 1, 201)
    won, lost = choose_changes(pa.table({"before": np.zeros(201), "after": changes}))
    assert [row["after"] for row in won] == changes[::-1][:MOST_SHOWN].tolist()
    assert [row["after"] for row in lost] == changes[:MOST_SHOWN].tolist()


@pytest.mark.slow
def test_many_pages_take_seconds_and_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scans = []
    for _ in range(50):
        file = io.BytesIO()
        ink = Image.fromarray(rng.integers(0, 2, (70, 50), dtype=np.uint8) * 80 + 150)
        ink.resize((200, 280)).save(file, "JPEG", quality=40)
        scans.append(file.getvalue())
    ids, queries = [f"p{at}" for at in range(20_000)], [f"q{at}" for at in range(2_000)]
    features = Features({"document_id": Value("string"), "image": ImageFeature(decode=False)})
    images = [{"bytes": scans[at % 50] + at.to_bytes(4, "big"), "path": None} for at in range(len(ids))]
    data = RetrievalDataset.from_beir(
        Dataset.from_dict({"document_id": ids, "image": images}, features=features),
        Dataset.from_dict({"query_id": queries, "text": queries}),
        Dataset.from_dict({"query_id": queries, "document_id": ids[: len(queries)], "score": [1] * len(queries)}),
    )
    tops = [[[ids[at] for at in row] for row in rng.integers(0, len(ids), (len(queries), 10))] for _ in range(2)]
    table = {"metric": [METRIC] * len(queries), "query_id": queries, "before": rng.random(len(queries))}
    table |= {"after": rng.random(len(queries)), "top_ids_before": tops[0], "top_ids_after": tops[1]}
    started = time.process_time()
    text = write(tmp_path / "report.html", data, per_query=pa.table(table))
    assert time.process_time() - started < 30
    assert text.count("data:image/webp") > 1_000
    assert len(text.encode()) < 10e6


def look(path: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """What Chromium says of a file; its profile stays in a folder."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *flags, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


def look_for_trouble(path: Path, folder: Path) -> tuple[list[str], list[str], str]:
    """What the console says, what a page (not the browser itself) asks the network for, and the page's title."""
    log = folder / "net.json"
    found = look(path, folder, "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom")
    events = [each.get("params", {}) for each in json.loads(log.read_text())["events"]]
    asked = [str(each["url"]) for each in events if each.get("initiator", "not an origin") != "not an origin"]
    title = re.search("<title>(.*?)</title>", found.stdout)
    return re.findall(r"CONSOLE.*", found.stderr), asked, html.unescape(title[1]) if title else ""


@needs_browser
def test_a_browser_runs_nothing_and_asks_for_nothing(page: Path, tmp_path: Path) -> None:
    assert look_for_trouble(page, tmp_path) == ([], [], f"Report of {QUOTES}")
    careless = tmp_path / "careless.html"
    careless.write_text(
        "<title></title><img src='http://127.0.0.1:9/page.png'><script>console.error('run');document.title='run'</script>",
        "utf-8",
    )
    console, asked, title = look_for_trouble(careless, tmp_path)
    assert console, "the search finds nothing any more"
    assert (set(asked), title) == ({"http://127.0.0.1:9/page.png"}, "run")


@needs_browser
def test_a_phone_scrolls_down_alone(page: Path, tmp_path: Path) -> None:
    # A frame of the width of a phone in a page of our own, which may run a script: the report may not.
    measuring = tmp_path / "measuring.html"
    text = page.read_text("utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    frame = (
        f'<iframe id="phone" width="390" height="800" style="border:0" srcdoc="{html.escape(text)}"></iframe><script>'
        "onload=()=>{const page=document.getElementById('phone').contentDocument;const images=[...page.images];"
        "document.title=JSON.stringify([page.documentElement.scrollWidth,page.documentElement.clientWidth,"
        "images.length,images.filter(each=>!each.alt).length,images.filter(each=>!each.naturalWidth).length])}"
        "</script>"
    )
    measuring.write_text(f"<!DOCTYPE html><body>{frame}</body>", "utf-8")
    found = look(measuring, tmp_path, "--window-size=800,900", "--dump-dom").stdout
    title = re.search(r"<title>(\[.*?\])</title>", found)
    assert title, found[:300]
    width, window, images, without_alt, undrawn = json.loads(title[1])
    assert width == window == 390
    assert images > 12
    assert (without_alt, undrawn) == (0, 0)


@pytest.mark.parametrize(
    ("primary", "shown"),
    [
        ("vdr_cosine_ndcg@10", ["vdr_cosine_ndcg@10"]),
        ("vdr-mean_cosine_ndcg@10", ["vdr-a_cosine_ndcg@10", "vdr-b-c_cosine_ndcg@10"]),
        ("vdr-rerank_ndcg@10", ["vdr-rerank_ndcg@10"]),
        ("my_own_cosine_ndcg@10", ["my_own_cosine_ndcg@10"]),
        ("score", []),
    ],
)
def test_only_queries_of_the_evaluation_at_full_size_are_shown(primary: str, shown: list[str]) -> None:
    others = ["vdr-64d_cosine_ndcg@10", "vdr-a-64d_cosine_ndcg@10", "guard_cosine_ndcg@10", "my_own-64d_cosine_ndcg@10"]
    metrics = [*shown, *others]
    table = pa.table({"metric": metrics, "query_id": ["q"] * len(metrics)})
    assert at_full_size(table, primary)["metric"].to_pylist() == shown
