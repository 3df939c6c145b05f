"""Pages as bytes, kept by content, decoded small: the same numbers to the bit, and nothing of it saved."""

import io
import pickle
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.cross_encoder.losses import LambdaLoss
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import TrainingArguments

import families
from comparing import assert_same_weights
from conftest import TORCHVISION_WORKS
from mmtune import (
    ConfigError,
    ImageDecodeError,
    RetrievalDataset,
    build_evaluator,
    build_reranker,
    finetune,
    finetune_reranker,
    load_model,
)
from mmtune.data.documents import DocumentReader
from mmtune.data.pages import Page
from mmtune.inference import encoder, preprocessing
from mmtune.inference.encoder import DatasetReader, encode
from mmtune.inference.page_store import FolderPageStore, MemoryPageStore, open_page_store
from mmtune.inference.preprocessing import (
    count_reading_threads,
    enough_for,
    page_bytes,
    prepare_pages,
    probe,
    reading_pages,
)
from mmtune.models.adapters import encoders_of
from mmtune.models.pixels import image_processor_of
from mmtune.testing import generated_pages, tiny_clip, tiny_llava, tiny_qwen3_vl, tiny_siglip
from mmtune.training import recipe

MB = 1 << 20
AS_BYTES: dict[str, Callable[[Path], str]] = {
    "clip": tiny_clip,
    "siglip": tiny_siglip,
    "llava": tiny_llava,
    "qwen3_vl": tiny_qwen3_vl,
    "chinese_clip": families.tiny_chinese_clip,
}
AS_FLOATS: dict[str, Callable[[Path], str]] = {
    "siglip2_naflex": families.tiny_siglip2_naflex,
    "idefics3": families.tiny_idefics3,
    "modernvbert": families.tiny_modernvbert,
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The checkpoint of a family, made once."""
    made: dict[str, str] = {}

    def path(family: str) -> str:
        if family == "qwen3_vl" and not TORCHVISION_WORKS:
            pytest.skip("Qwen3-VL needs torchvision, which is not installed")
        if family not in made:
            made[family] = (AS_BYTES | AS_FLOATS)[family](tmp_path_factory.mktemp("families") / family)
        return made[family]

    return path


@pytest.fixture(scope="module")
def data() -> RetrievalDataset:
    """Pages of several sizes, so that a model that keeps their shape sees several grids."""
    rows = generated_pages(12, num_negatives=1, seed=3)
    sizes = [(128, 128), (96, 160), (200, 120)]
    images = [image.resize(sizes[at % 3]) for at, image in enumerate(rows["image"][:])]
    features = rows.features
    rows = rows.remove_columns("image").add_column("image", [_png(image) for image in images])
    data = RetrievalDataset.from_id_rows(rows.cast_column("image", features["image"]))
    texts = [f"page {number}" for number in range(len(data.corpus))]
    return RetrievalDataset(data.corpus.add_column("text", texts), data.queries, data.qrels, data.negatives)


def _png(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _jpeg(size: tuple[int, int], **options: Any) -> dict[str, Any]:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 20, size[0] // 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).save(file, "JPEG", quality=90, **options)
    return {"bytes": file.getvalue(), "path": None}


def pages_of(data: RetrievalDataset, count: int = 6, documents: Any = "image") -> tuple[list[Any], list[Any]]:
    """The same documents as images, and as pages that are not decoded yet."""
    ids = data.corpus["document_id"][:count]
    reader = DocumentReader(data.corpus, documents)
    return reader.read(ids), reader.lazily().read(ids)


# As bytes


@pytest.mark.parametrize("family", AS_BYTES)
@pytest.mark.parametrize(("cached", "documents"), [(2, "image"), (None, "image"), (4, "text+image")])
def test_loss_and_gradients_are_the_same_to_the_bit(family, cached, documents, paths, data) -> None:
    if documents == "text+image" and family in ("clip", "siglip", "chinese_clip"):
        pytest.skip("its encoder takes one of both")
    images, pages = pages_of(data, documents=documents)
    queries = [{"text": text} for text in data.queries["text"][: len(pages)]]
    found = []
    for documents_given, store in ((images, None), (pages, None), (pages, MemoryPageStore(MB))):
        model = load_model(paths(family), device="cpu").train()
        loss: Any = MultipleNegativesRankingLoss(model)
        if cached:
            loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=cached)
        with reading_pages(model, store):
            features = [model.preprocess(queries), model.preprocess(documents_given)]
            value = loss(features, torch.arange(len(pages)))
            value.backward()
        pixels = features[1]["pixel_values"]
        assert pixels.dtype == (torch.float32 if documents_given is images else torch.uint8)
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((value, gradients))
    for value, gradients in found[1:]:
        assert torch.equal(value, found[0][0])
        assert gradients.keys() == found[0][1].keys()
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in gradients.items())


# the name of transformers before 5.23
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradient_checkpointing_changes_nothing(family: str, paths, data) -> None:
    images, pages = pages_of(data)
    found = []
    for given in (images, pages):
        model = load_model(paths(family), device="cpu").train()
        encoders_of(model)[0].model.gradient_checkpointing_enable()
        with reading_pages(model):
            features = [
                model.preprocess([{"text": text} for text in data.queries["text"][:6]]),
                model.preprocess(given),
            ]
            CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)(features, None).backward()
        found.append([weight.grad for weight in model.parameters() if weight.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("family", AS_FLOATS)
def test_where_it_is_not_exact_pages_travel_as_floats(family: str, paths, data) -> None:
    images, pages = pages_of(data)
    model = load_model(paths(family), device="cpu")
    with reading_pages(model, MemoryPageStore(MB)) as found:
        assert list(found.values()) == ["floats"]
        assert torch.equal(model.encode(pages, convert_to_tensor=True), model.encode(images, convert_to_tensor=True))


@pytest.mark.parametrize("wrong", ["value", "order"])
def test_a_probe_that_is_off_by_one_bit_leaves_floats(wrong: str, clip_path: str, monkeypatch) -> None:
    table_of = preprocessing.read_table

    def spoilt(*args: Any) -> preprocessing.FloatTable:
        table = table_of(*args)
        if wrong == "value":
            table.values[1, 200] = torch.nextafter(table.values[1, 200], torch.tensor(9.0))
        else:
            table.values.copy_(table.values.flip(0))
        return table

    monkeypatch.setattr(preprocessing, "read_table", spoilt)
    assert probe(encoders_of(load_model(clip_path))[0]).table is None


def test_nothing_of_it_is_saved_or_stays(clip_path: str, data, tmp_path: Path) -> None:
    model = load_model(clip_path, device="cpu")
    processor = image_processor_of(encoders_of(model)[0])
    with reading_pages(model, MemoryPageStore(MB)), reading_pages(model):
        model.preprocess(pages_of(data)[1])
        model.encode("a text", show_progress_bar=False)  # sets the truncation that a tokenizer is saved with
        model.save_pretrained(str(tmp_path / "within"))
        assert image_processor_of(encoders_of(model)[0]) is processor
    model.save_pretrained(str(tmp_path / "after"))
    saved = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("within", "after")
    ]
    assert saved[0] == saved[1]
    assert "preprocess" not in vars(encoders_of(model)[0])
    assert model.preprocess(pages_of(data)[1])["pixel_values"].dtype == torch.float32


def test_a_model_that_reads_pages_goes_to_another_process(clip_path: str, data) -> None:
    images, pages = pages_of(data)
    model = load_model(clip_path, device="cpu")
    with reading_pages(model, MemoryPageStore(MB)):
        there = pickle.loads(pickle.dumps(model))
        assert there.preprocess(pages)["pixel_values"].dtype == torch.uint8
        assert torch.equal(there.encode(pages, convert_to_tensor=True), model.encode(images, convert_to_tensor=True))


def test_images_of_a_user_are_read_as_ever(clip_path: str, data) -> None:
    images, pages = pages_of(data)
    model = load_model(clip_path, device="cpu")
    with reading_pages(model):
        assert model.preprocess([*images[:1], *pages[1:]])["pixel_values"].dtype == torch.float32


# Kept by content


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the pages that are decoded, one after the other."""
    ids: list[str] = []
    decode = Page.decoded

    def noted(page: Page, enough: Any) -> Image.Image:
        ids.append(page.document_id)
        return decode(page, enough)

    monkeypatch.setattr(Page, "decoded", noted)
    return ids


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_a_page_is_processed_once(kind: str, clip_path: str, data, decoded: list[str], tmp_path: Path) -> None:
    store = MemoryPageStore(MB) if kind == "memory" else FolderPageStore(tmp_path / "pages", MB)
    model = load_model(clip_path, device="cpu")
    evaluator = build_evaluator(data, show_progress_bar=False)
    expected = evaluator(model)
    decoded.clear()
    with reading_pages(model, store):
        assert evaluator(model) == expected
        assert sorted(decoded) == sorted(data.corpus["document_id"][:])
        assert evaluator(model) == expected
    assert len(decoded) == len(data.corpus), "a page was decoded twice"
    if kind == "folder":
        with reading_pages(model, FolderPageStore(tmp_path / "pages", MB)):
            assert evaluator(model) == expected
        assert len(decoded) == len(data.corpus), "another run does not find them"


def test_another_processor_and_another_page_are_others(clip_path: str, siglip_path: str, data, tmp_path: Path) -> None:
    store = FolderPageStore(tmp_path / "pages", MB)
    for path in (clip_path, siglip_path):
        model = load_model(path, device="cpu")
        expected = model.encode(pages_of(data)[0], convert_to_tensor=True)
        with reading_pages(model, store):
            assert torch.equal(model.encode(pages_of(data)[1], convert_to_tensor=True), expected)
    other = Page(_jpeg((200, 100)), data.corpus["document_id"][0])
    with reading_pages(model, store):
        assert not torch.equal(model.encode([other], convert_to_tensor=True)[0], expected[0])


def test_a_store_keeps_to_its_budget(tmp_path: Path) -> None:
    array = {"pixel_values": np.zeros((10, 100), dtype=np.uint8)}
    for store in (MemoryPageStore(2500), FolderPageStore(tmp_path / "a", 2500)):
        for name in ("aa1", "ab2", "ac3"):
            store.put(name, array)
        assert [store.get(name) is not None for name in ("aa1", "ab2", "ac3")] == [True, True, False]
    again = FolderPageStore(tmp_path / "a", 2500)
    assert again.num_bytes > 2000, "what is there counts"
    again.put("ad4", array)
    assert again.get("ad4") is None


def test_a_damaged_file_counts_as_not_there(clip_path: str, data, tmp_path: Path) -> None:
    model = load_model(clip_path, device="cpu")
    expected = model.encode(pages_of(data)[0], convert_to_tensor=True)
    for damage in (b"", b"no safetensors", None):
        store = FolderPageStore(tmp_path / "pages", MB)
        with reading_pages(model, store):
            model.encode(pages_of(data)[1])
            files = sorted((tmp_path / "pages").rglob("*.safetensors"))
            assert len(files) == 6
            for file in files:
                file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
            assert torch.equal(model.encode(pages_of(data)[1], convert_to_tensor=True), expected)


def test_a_full_disk_costs_the_store_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FolderPageStore(tmp_path / "pages", MB)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmtune.inference.page_store.save_file", full)
    store.put("aa1", {"pixel_values": np.zeros(3, dtype=np.uint8)})
    assert store.get("aa1") is None
    assert not list((tmp_path / "pages").rglob("*.partial"))


def test_the_store_of_a_run(tmp_path: Path) -> None:
    with open_page_store("auto", tmp_path / "run", is_shared=False) as store:
        assert isinstance(store, MemoryPageStore)
    with open_page_store("auto", tmp_path / "run", is_shared=True) as store:
        assert isinstance(store, FolderPageStore)
        store.put("aa1", {"pixel_values": np.zeros(3, dtype=np.uint8)})
    assert not list((tmp_path / "run").iterdir())
    with open_page_store(tmp_path / "mine", tmp_path / "run", is_shared=False) as store:
        assert isinstance(store, FolderPageStore)
        store.put("aa1", {"pixel_values": np.zeros(3, dtype=np.uint8)})
    assert list((tmp_path / "mine").rglob("*.safetensors"))
    with open_page_store(None, tmp_path / "run", is_shared=False) as store:
        assert store is None


# In a run

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_any_store_and_any_number_of_workers_train_the_same_weights(clip_path: str, data, tmp_path: Path) -> None:
    train, evaluation = data.split(3)
    results = []
    runs = {"none": {"page_store": None}, "auto": {}, "folder": {"page_store": tmp_path / "pages"}}
    runs |= {f"{count} workers": {"dataloader_num_workers": count} for count in (1, 2, 4)}
    for name, options in runs.items():
        result = finetune(clip_path, train, evaluation, output_dir=tmp_path / name, **OPTIONS, **options)
        results.append(result)
        assert not (tmp_path / name / ".pages").exists()
        assert result.settings["training"]["pages"] == {"CLIPImageProcessor": "bytes"}
    for result in results[1:]:
        assert_same_weights(result.model, results[0].model)
        assert (result.before, result.after) == (results[0].before, results[0].after)
    assert results[0].settings["training"]["page_store"] == "None"
    assert "in memory" in results[1].settings["training"]["page_store"]


@pytest.mark.parametrize("loss", [None, "lists"])
def test_rerankers_train_the_same_with_and_without(loss, data, tmp_path: Path) -> None:
    path = tiny_llava(tmp_path / "llava")
    results = []
    for workers, store in ((0, None), (0, "auto"), (2, "auto")):
        reranker = build_reranker(path, device="cpu")
        options = {"page_store": store, "dataloader_num_workers": workers, "loss": LambdaLoss if loss else None}
        results.append(
            finetune_reranker(
                reranker, data, output_dir=tmp_path / f"{workers} {store}", num_negatives=1, **OPTIONS, **options
            )
        )
    for result in results[1:]:
        assert_same_weights(result.model, results[0].model)


def test_a_rerankers_worker_hands_over_bytes(data, tmp_path: Path, decoded: list[str]) -> None:
    reranker = build_reranker(tiny_llava(tmp_path / "llava"), device="cpu")
    with reading_pages(reranker):
        decoded.clear()  # the probe has drawn pages of its own
        pages = prepare_pages(reranker, pages_of(data)[1])
        there = pickle.loads(pickle.dumps(pages))
        reranker.preprocess([["a page", page] for page in there])
    assert len(decoded) == len(pages), "the pages were decoded again"


@pytest.mark.parametrize("family", ["clip", "qwen3_vl", "siglip2_naflex"])
def test_threads_prepare_the_pages_of_a_model_on_a_gpu(
    family: str, paths, data, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(paths(family), device="cpu")
    ids, reader = data.corpus["document_id"][:], DatasetReader(data.corpus, data.queries, "image")
    alone = torch.cat(list(encode(model, "document", ids, reader, batch_size=2)))
    made_in: set[str] = set()
    work = Page.decoded

    def noted(page: Page, enough: Any) -> Any:
        made_in.add(threading.current_thread().name)
        time.sleep(0.01)  # long enough for the others to begin
        return work(page, enough)

    monkeypatch.setattr(Page, "decoded", noted)
    for module in (preprocessing, encoder):
        monkeypatch.setattr(module, "count_reading_threads", lambda model: 3)
    portions = list(encode(model, "document", ids, reader, batch_size=2))
    assert [len(each) for each in portions] == [8] * (len(ids) // 8) + [len(ids) % 8] * bool(len(ids) % 8)
    torch.testing.assert_close(torch.cat(portions), alone, atol=1e-6, rtol=0)
    assert {name[-2:] for name in made_in} == {"_0", "_1", "_2"}


def test_threads_are_for_those_who_wait_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    on_gpu, on_cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    assert (count_reading_threads(on_gpu), count_reading_threads(on_cpu), count_reading_threads(None)) == (8, 1, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert count_reading_threads(on_gpu) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert count_reading_threads(on_gpu) == 1


@pytest.mark.parametrize("wrong", [5, True, b"x", "", ["auto"]])
def test_a_store_that_is_no_folder_is_refused(wrong: Any, clip_path: str, data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="page_store="):
        finetune(clip_path, data, output_dir=tmp_path / "run", page_store=wrong)


def test_a_page_that_is_damaged_is_named_in_training(clip_path: str, data, tmp_path: Path) -> None:
    corpus = data.corpus
    images = corpus.with_format(None)["image"][:]
    paths = []
    for at, image in enumerate(images):
        paths.append(str(tmp_path / f"{at}.png"))
        Path(paths[-1]).write_bytes(image["bytes"])
    in_files = corpus.remove_columns("image").add_column("image", [{"bytes": None, "path": path} for path in paths])
    in_files = in_files.cast(corpus.features)
    train = RetrievalDataset(in_files, data.queries, data.qrels, data.negatives)
    rows = train.training_rows(1)
    Path(paths[3]).write_bytes(images[3]["bytes"][:200] + b"\0" * 3000 + images[3]["bytes"][-100:])
    with pytest.raises(ImageDecodeError, match=in_files["document_id"][3]):
        finetune(clip_path, rows, output_dir=tmp_path / "run", **{**OPTIONS, "max_steps": 12})


# Decoded small


def test_enough_is_more_than_the_sides_and_the_area() -> None:
    assert enough_for((224, 320)) == (560, 800)
    assert enough_for(360_000) == 540_000
    assert enough_for(None) == 8_000_000


@pytest.mark.parametrize(
    ("size", "enough", "expected"),
    [
        ((1600, 2000), (256, 256), (400, 500)),
        ((1600, 2000), (800, 256), (800, 1000)),
        ((1600, 300), (256, 256), (1600, 300)),
        ((1600, 2000), (1601, 10), (1600, 2000)),
        ((1600, 2000), 800_000, (800, 1000)),
        ((1600, 2000), 810_000, (1600, 2000)),
    ],
)
def test_no_side_of_a_jpeg_falls_below_what_is_enough(size, enough, expected) -> None:
    assert Page(_jpeg(size), "p").decoded(enough).size == expected
    upright = Page(_jpeg(size[::-1], exif=_lying()), "p")
    turned = enough[::-1] if isinstance(enough, tuple) else enough
    assert upright.size == size
    assert upright.decoded(enough).size == expected, turned


def _lying() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.skipif(not TORCHVISION_WORKS, reason="Qwen3-VL needs torchvision")
def test_a_page_decoded_small_keeps_its_grid(paths) -> None:
    model = load_model(paths("qwen3_vl"), device="cpu")
    rng = np.random.default_rng(1)
    for _ in range(30):
        page = _jpeg((int(rng.integers(300, 1500)), int(rng.integers(300, 1500))))
        full = model.preprocess([Page(page, "p").decoded(None)])["image_grid_thw"]
        with reading_pages(model):
            assert torch.equal(model.preprocess([Page(page, "p")])["image_grid_thw"], full)


# Pages


def test_a_page_is_an_image_that_waits(data, decoded: list[str]) -> None:
    images, pages = pages_of(data)
    assert [page.size for page in pages] == [image.size for image in images]
    assert decoded == []
    for image, page in zip(images, pages, strict=True):
        sent = pickle.loads(pickle.dumps(page))
        assert np.array_equal(np.asarray(page), np.asarray(image))
        assert page.resize((9, 9)).tobytes() == image.resize((9, 9)).tobytes()
        assert page.copy().tobytes() == sent.tobytes() == pickle.loads(pickle.dumps(page)).tobytes() == image.tobytes()
    assert len(decoded) == 2 * len(pages), "once here and once where it was sent before"


def test_the_plain_host_takes_pages(clip_path: str, data) -> None:
    images, pages = pages_of(data)
    model = SentenceTransformer(clip_path, device="cpu")
    assert torch.equal(model.encode(pages, convert_to_tensor=True), model.encode(images, convert_to_tensor=True))


def test_rows_that_a_user_reads_are_decoded(data) -> None:
    assert not isinstance(data.training_rows(1)[0]["image"], Page)


def test_a_deleted_folder_is_made_again(clip_path: str, data, tmp_path: Path) -> None:
    model = load_model(clip_path, device="cpu")
    store = FolderPageStore(tmp_path / "pages", MB)
    shutil.rmtree(tmp_path / "pages")
    with reading_pages(model, store):
        model.encode(pages_of(data)[1])
    assert len(list((tmp_path / "pages").rglob("*.safetensors"))) == 6


@pytest.mark.parametrize(
    ("free", "workers", "expected"), [(64 * MB, 4, 4), (3 * MB, 4, 2), (MB // 2, 4, 0), (0, 4, 0), (MB, 0, 0)]
)
def test_workers_hand_over_no_more_than_fits(free, workers, expected, clip_path, tmp_path, monkeypatch, caplog) -> None:
    model = load_model(clip_path, device="cpu")
    assert page_bytes(encoders_of(model)[0]) == 3 * 64 * 64
    args: Any = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=16, dataloader_num_workers=workers, use_cpu=True
    )
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    # two pages a row, sixteen rows, two batches a worker
    assert 0.8 * MB > 2 * 16 * 2 * 3 * 64 * 64
    assert recipe.fit_workers(args, model, ["query", "image", "negative_0"]) == expected
    assert ("--shm-size" in caplog.text) == (expected < workers)
