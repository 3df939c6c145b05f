import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Image, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PillowImage

from mmtune import DatasetError, RetrievalDataset
from mmtune.data.arrow import with_columns, with_encoded_images

NUM_PAGES = 24
IMAGE_BYTES = 100_000


def page(number: int) -> bytes:
    buffer = io.BytesIO()
    PillowImage.new("RGB", (2, 2), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


# --- with_columns ------------------------------------------------------------------------------------------------


@given(data=st.data(), length=st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_new_columns_stand_beside_their_rows_after_any_selection(data, length):
    rows = Dataset.from_dict({"old": list(range(length))})
    for _ in range(data.draw(st.integers(0, 3))):
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=10))
        rows = rows.select(chosen)
    old = rows["old"][:]
    new = [f"new {k}" for k in range(len(rows))]
    joined = with_columns(rows, {"first": pa.array(new), "second": pa.array(old)})
    assert joined.column_names == ["first", "second", "old"]
    assert joined[:] == {"first": new, "second": old, "old": old}


def test_new_columns_keep_the_features_of_the_old_ones():
    rows = Dataset.from_dict({"image": [{"bytes": page(1), "path": None}] * 3}).cast_column("image", Image())
    joined = with_columns(rows.select([2, 0]), {"id": pa.array(["a", "b"])})
    assert joined.features["image"] == Image()
    assert joined[0]["image"].getpixel((0, 0)) == (1, 0, 0)


def test_a_row_that_is_repeated_often_costs_little():
    rows = Dataset.from_dict({"old": list(range(1000))})
    repeated = rows.select([*range(1000), *[7] * 1000])
    before = pa.total_allocated_bytes()
    joined = with_columns(repeated, {"new": pa.array(np.arange(2000))})
    assert joined[1500] == {"new": 1500, "old": 7}
    assert pa.total_allocated_bytes() - before < 2_000_000


# --- with_encoded_images -----------------------------------------------------------------------------------------

IMAGE_TYPES: dict[str, Callable[[list], pa.Array]] = {
    "binary": lambda values: pa.array(values, pa.binary()),
    "large binary": lambda values: pa.array(values, pa.large_binary()),
    "struct": lambda values: pa.array([value and {"bytes": value, "path": None} for value in values]),
    "struct, path first": lambda values: pa.array([value and {"path": None, "bytes": value} for value in values]),
}


@pytest.mark.parametrize("image_type", IMAGE_TYPES)
@pytest.mark.parametrize("order", [None, [3, 0, 2, 2], [1, 2]])
def test_encoded_images_of_any_type_become_an_image_column(image_type, order):
    values = [page(0), page(1), None, page(3)]
    rows = Dataset(pa.table({"image": IMAGE_TYPES[image_type](values), "other": ["a", "b", "c", "d"]}))
    rows = rows if order is None else rows.select(order)
    images = with_encoded_images(rows, "image")
    order = order or range(4)
    assert images.features["image"] == Image(decode=False)
    assert images["other"][:] == ["abcd"[k] for k in order]
    assert [image and image["bytes"] for image in images["image"]] == [values[k] for k in order]


@pytest.mark.parametrize("path_type", [pa.string(), pa.large_string()])
def test_paths_become_an_image_column(path_type):
    images = with_encoded_images(Dataset(pa.table({"image": pa.array(["a.png", None], path_type)})), "image")
    assert [image and image["path"] for image in images["image"]] == ["a.png", None]


def test_an_image_column_without_any_image_is_one_of_nulls():
    images = with_encoded_images(Dataset.from_dict({"image": [None, None]}), "image")
    assert images.features["image"] == Image(decode=False)
    assert images["image"][:] == [None, None]


@pytest.mark.parametrize("values", [[1, 2], [1.5, None], [["a"], ["b"]], [{"height": 3}, {"height": 4}]])
def test_a_column_that_holds_no_images_is_named(values):
    with pytest.raises(DatasetError, match=r"Column 'scan' holds .*, which can't be images.*datasets.Image"):
        with_encoded_images(Dataset.from_dict({"scan": values}), "scan")


# --- no copies ---------------------------------------------------------------------------------------------------


def random_pages() -> Dataset:
    """Rows in the id layout with integer ids and pages of 100 kB of noise, 2.4 MB in all."""
    generator = np.random.default_rng(0)
    numbers = range(NUM_PAGES)
    table = {
        "id": list(numbers),
        "query": [f"ask {k}" for k in numbers],
        "image": [{"bytes": generator.bytes(IMAGE_BYTES), "path": None} for _ in numbers],
        "negatives": [[(k + 1) % NUM_PAGES, (k + 2) % NUM_PAGES] for k in numbers],
        "source": [f"report {k // 3}" for k in numbers],
    }
    return Dataset.from_dict(table).cast_column("image", Image())


def files_below(*folders: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}


INPUTS = {
    "as they are": lambda rows: rows,
    "shuffled": lambda rows: rows.shuffle(seed=1),
    "selected": lambda rows: rows.select([*range(0, NUM_PAGES, 2), *range(1, NUM_PAGES, 2)]),
    "filtered": lambda rows: rows.filter(lambda number: number != 5, input_columns="id"),
    "plain bytes": lambda rows: plain_bytes(rows).shuffle(seed=1),
}

USES = {
    "from_id_rows": lambda rows: RetrievalDataset.from_id_rows(rows, on_missing="drop"),
    "from_columns": lambda rows: RetrievalDataset.from_columns(rows.remove_columns(["id", "negatives"])),
    "training_rows": lambda rows: RetrievalDataset.from_id_rows(rows, on_missing="drop").training_rows(1),
    "shuffled training_rows": lambda rows: USES["training_rows"](rows).shuffle(seed=1).select(range(5)),
    "split": lambda rows: RetrievalDataset.from_id_rows(rows, on_missing="drop").split(5, group_column="source"),
}


def plain_bytes(rows: Dataset) -> Dataset:
    content = pa.chunked_array(
        [pa.array([row["bytes"] for row in rows.cast_column("image", Image(decode=False))["image"]])]
    )
    return Dataset(rows.remove_columns("image").data.table.append_column("image", content))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", INPUTS)
@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_no_image_is_copied(use, change, storage, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = random_pages()
    if storage == "disk":
        rows.save_to_disk(tmp_path / "rows")
        rows = load_from_disk(str(tmp_path / "rows"))
    rows = INPUTS[change](rows)
    pages_in_bytes = NUM_PAGES * IMAGE_BYTES
    files, allocated = files_below(tmp_path), pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        result = USES[use](rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pa.total_allocated_bytes() - allocated < 0.02 * pages_in_bytes
    written = sum(files_below(tmp_path).values()) - sum(files.values())
    assert written < 0.01 * pages_in_bytes
    # Python memory: a fingerprint that pickles the table copies every page
    assert peak < 0.5 * pages_in_bytes
    assert result


@pytest.mark.parametrize("plain", [False, True])
def test_a_saved_dataset_holds_each_image_once(plain, tmp_path):
    rows = plain_bytes(random_pages()) if plain else random_pages()
    dataset = RetrievalDataset.from_id_rows(rows.shuffle(seed=1))
    dataset.save(tmp_path / "saved")
    assert sum(files_below(tmp_path).values()) < 1.01 * NUM_PAGES * IMAGE_BYTES + 20_000
