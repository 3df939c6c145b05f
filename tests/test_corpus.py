"""Embeddings of a corpus as shards: what is in them, who writes them, and what a kill leaves."""

import json
import os
import shutil
import signal
import socket
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from mmtune import (
    ConfigError,
    DatasetError,
    MissingExtraError,
    RetrievalDataset,
    compare_models,
    encode_corpus,
    load_model,
    mine_hard_negatives,
    read_shards,
)
from mmtune.inference import ray_engine
from mmtune.inference.encoder import DatasetReader
from mmtune.inference.store import delete_partials, write_whole
from test_mining import VectorsInTexts, text_dataset
from test_mining_at_scale import TokensInTexts, in_children

QUIET = {"show_progress_bar": False}


@pytest.fixture(scope="module")
def dataset(pages):
    return RetrievalDataset.from_id_rows(pages)


@pytest.fixture(scope="module")
def model(clip_path):
    return load_model(clip_path, device="cpu")


@pytest.fixture(scope="module")
def whole(dataset, model, tmp_path_factory):
    """The shards of one process that was left in peace."""
    return encode_corpus(dataset, model, tmp_path_factory.mktemp("whole") / "shards", shard_size=6, **QUIET)


class Tokens(TokensInTexts):
    """Embeds a text of numbers as a vector for each of them."""

    encode_document = TokensInTexts.encode_query


def shards(folder):
    """The bytes of each shard, by its name."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.parquet")}


def vectors(table, name="embedding"):
    return np.array(table[name].to_pylist(), dtype=np.float32)


def joined(folder):
    return pa.concat_tables(read_shards(folder))


def texts(count=20, **columns):
    rng = np.random.default_rng(0)
    corpus = {
        "document_id": [f"d{at}" for at in range(count)],
        "text": [f"{a:.3f} {b:.3f} {c:.3f}" for a, b, c in rng.normal(size=(count, 3))],
        **columns,
    }
    queries = Dataset.from_dict({"query_id": ["q0", "q1"], "text": ["1 0 0", "0 1 0"]})
    qrels = Dataset.from_dict({"query_id": ["q0", "q1"], "document_id": ["d0", "d1"], "score": [1, 2]})
    return RetrievalDataset(Dataset.from_dict(corpus), queries, qrels)


def encode_texts(dataset, folder, model=None, **options):
    return encode_corpus(dataset, model or VectorsInTexts(), folder, documents="text", **QUIET, **options)


# ---- what is in them


def test_shards_hold_the_ids_the_vectors_of_the_model_and_metadata_in_order(whole, dataset, model):
    table = joined(whole)
    assert table.column_names == ["document_id", "embedding", "language"]
    assert table["document_id"].to_pylist() == dataset.corpus["document_id"][:]
    assert table["language"].to_pylist() == dataset.corpus["language"][:]
    reader = DatasetReader(dataset.corpus, dataset.queries, "image")
    ids = table["document_id"].to_pylist()
    own = [model.encode_document(reader.read("document", ids[at : at + 6])) for at in range(0, len(ids), 6)]
    assert (vectors(table) == np.concatenate(own)).all()
    assert table["embedding"].type == pa.list_(pa.float32(), 128)
    # engines that read folders of parquet see the shards alone
    assert pq.read_table(whole).num_rows == len(dataset.corpus)
    assert {path.name[0] for path in whole.iterdir() if path.suffix != ".parquet"} == {"_"}


def test_dtypes_are_those_of_the_host_and_read_back(tmp_path):
    data, model = texts(), VectorsInTexts()
    floats = model.encode_document([{"text": text} for text in data.corpus["text"][:]]).numpy()
    ranges = np.stack([floats.min(axis=0), floats.max(axis=0)])
    kept, read = {}, {}
    for dtype in ("float32", "float16", "int8", "binary"):
        folder = encode_texts(data, tmp_path / dtype, dtype=dtype, shard_size=7)
        kept[dtype], read[dtype] = pq.read_table(folder)["embedding"], vectors(joined(folder))
    assert (read["float32"] == floats).all()
    assert (read["float16"] == floats.astype(np.float16)).all()
    assert (np.array(kept["int8"].to_pylist()) == quantize_embeddings(floats, "int8", ranges=ranges)).all()
    assert np.abs(read["int8"] - floats).max() <= ((ranges[1] - ranges[0]) / 255).max() * 1.01
    assert (np.array(kept["binary"].to_pylist()) == quantize_embeddings(floats, "ubinary")).all()
    assert (read["binary"] == np.where(floats > 0, 1, -1)).all()
    assert [str(kept[dtype].type.value_type) for dtype in kept] == ["float", "halffloat", "int8", "uint8"]


def test_cut_vectors_have_length_one_where_angles_are_compared(dataset, model, whole, tmp_path):
    cut = vectors(joined(encode_corpus(dataset, model, tmp_path / "cosine", dim=20, **QUIET)))
    expected = vectors(joined(whole))[:, :20]
    assert np.allclose(cut, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)
    data = texts()
    dot = vectors(joined(encode_texts(data, tmp_path / "dot", dim=2)))
    assert [list(row) for row in dot] == [
        [np.float32(part) for part in text.split()[:2]] for text in data.corpus["text"][:]
    ]


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary"])
def test_late_interaction_has_a_list_of_vectors_and_their_mean(tmp_path, dtype):
    data, model = texts(), Tokens()
    folder = encode_texts(data, tmp_path / "late", model, dtype=dtype, shard_size=7)
    own = model.encode_document([{"text": text} for text in data.corpus["text"][:]])
    tables = list(read_shards(folder))
    assert [table.num_rows for table in tables] == [7, 7, 6]
    assert tables[0].column_names == ["document_id", "embedding", "pooled_embedding", "text"]
    found = [row for table in tables for row in table["embedding"].to_pylist()]
    pooled = np.concatenate([vectors(table, "pooled_embedding") for table in tables])
    expected = torch.stack([torch.nn.functional.normalize(item.mean(dim=0), dim=0) for item in own]).numpy()
    if dtype == "float32":
        assert found == [item.tolist() for item in own]
        assert np.allclose(pooled, expected, atol=1e-6)
    elif dtype == "int8":
        assert max(np.abs(np.array(a) - b.numpy()).max() for a, b in zip(found, own, strict=True)) < 0.01
        assert np.abs(pooled - expected).max() < 0.01
    else:
        assert all((np.array(a) == np.where(b > 0, 1, -1)).all() for a, b in zip(found, own, strict=True))


def test_ranges_come_from_a_calibration_and_stay(tmp_path):
    data, few = texts(), texts(4)
    folder = encode_texts(data, tmp_path / "int8", dtype="int8", calibration=few, shard_size=7)
    ranges = json.loads((folder / "_ranges.json").read_text())["embedding"]
    own = [[float(part) for part in text.split()] for text in few.corpus["text"][:]]
    assert np.allclose(ranges, [np.min(own, axis=0), np.max(own, axis=0)])
    before = shards(folder)
    shutil.copy(folder / "_ranges.json", tmp_path / "ranges")
    sorted(folder.glob("*.parquet"))[1].unlink()
    encode_texts(data, folder, dtype="int8", calibration=few, shard_size=7)
    assert shards(folder) == before
    with pytest.raises(ConfigError, match=r"calibration=.*this call: None"):
        encode_texts(data, folder, dtype="int8", shard_size=7)


def test_ranges_without_shards_are_found_again(tmp_path):
    few = encode_texts(texts(3), tmp_path / "shards", dtype="int8")
    next(few.glob("*.parquet")).unlink()
    encode_texts(texts(), few, dtype="int8")
    assert shards(few) == shards(encode_texts(texts(), tmp_path / "new", dtype="int8"))


def test_one_document_has_no_ranges(tmp_path):
    corpus = Dataset.from_dict({"document_id": ["d0"], "text": ["1 2 3"]})
    data = RetrievalDataset(corpus, texts().queries.select([0]), texts().qrels.select([0]))
    with pytest.raises(ConfigError, match="several documents, and there is one"):
        encode_texts(data, tmp_path / "one", dtype="int8")
    assert joined(encode_texts(data, tmp_path / "one", dtype="float16")).num_rows == 1


def test_any_id_and_any_metadata(tmp_path):
    ids = ['a/b "ü"\n', "..", "1", "漢", "_x"]
    corpus = Dataset.from_dict(
        {
            "document_id": ids,
            "text": ["1 1", "2 2", "3 3", "4 4", "5 5"],
            "page_number": [1, None, 3, 4, 5],
            "tags": [["x"], [], ["y", "z"], ["w"], []],
        }
    )
    queries = Dataset.from_dict({"query_id": ["q"], "text": ["1 0"]})
    qrels = Dataset.from_dict({"query_id": ["q"], "document_id": ["1"], "score": [1]})
    data = RetrievalDataset(corpus, queries, qrels)
    shuffled = RetrievalDataset(corpus.select([3, 1, 0, 2, 4]), queries, qrels)
    for name, each in {"whole": data, "shuffled": shuffled}.items():
        table = joined(encode_texts(each, tmp_path / name, shard_size=2))
        assert table["document_id"].to_pylist() == each.corpus["document_id"][:]
        assert table["page_number"].to_pylist() == each.corpus["page_number"][:]
        assert table["tags"].to_pylist() == each.corpus["tags"][:]
        assert vectors(table)[:, 0].tolist() == [float(text[0]) for text in each.corpus["text"][:]]


def test_a_dataset_without_queries_is_encoded(tmp_path, model, dataset):
    alone = RetrievalDataset(dataset.corpus, dataset.queries.select([]), dataset.qrels.select([]))
    assert joined(encode_corpus(alone, model, tmp_path / "alone", **QUIET)).num_rows == len(dataset.corpus)


# ---- calls that go on


def test_a_second_call_encodes_nothing(whole, dataset, model, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.parquet")}
    monkeypatch.setattr(SentenceTransformer, "encode_document", None)
    encode_corpus(dataset, model, whole, shard_size=6, **QUIET)
    assert {path.name: path.stat().st_mtime_ns for path in whole.glob("*.parquet")} == before


def test_changed_documents_and_metadata_are_encoded_again_with_their_shard(tmp_path, caplog):
    source = [f"file-{at}" for at in range(20)]
    data = texts(source=source)
    folder = encode_texts(data, tmp_path / "shards", shard_size=5)
    before = shards(folder)
    changed = data.corpus["text"][:]
    changed[7] = "9 9 9"
    encode_texts(texts(source=[*source[:19], "other"]), folder, shard_size=5)
    assert len(shards(folder).keys() - before.keys()) == 1
    corpus = Dataset.from_dict({"document_id": data.corpus["document_id"][:], "text": changed, "source": source})
    caplog.clear()
    encode_texts(RetrievalDataset(corpus, data.queries, data.qrels), folder, shard_size=5)
    assert "2 shards in" in caplog.text
    assert "are deleted" in caplog.text
    table = joined(folder)
    assert vectors(table)[7].tolist() == [9, 9, 9]
    assert table["source"].to_pylist() == source
    assert len(shards(folder).keys() & before.keys()) == 3


def test_a_changed_page_is_encoded_again_with_its_shard(tmp_path, whole, dataset, model):
    folder = shutil.copytree(whole, tmp_path / "copy")
    other = dataset.corpus[20]["image"]
    corpus = dataset.corpus.map(lambda row, at: {"image": other} if at == 7 else row, with_indices=True)
    encode_corpus(RetrievalDataset(corpus, dataset.queries, dataset.qrels), model, folder, shard_size=6, **QUIET)
    assert len(shards(folder).keys() & shards(whole).keys()) == len(shards(whole)) - 1
    assert np.allclose(vectors(joined(folder))[7], vectors(joined(whole))[20], atol=1e-5)


def test_another_model_or_setting_is_refused_by_name(whole, dataset, model, tmp_path, clip_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    prompted = load_model(clip_path, device="cpu", prompts={"document": "page: "})
    limited = load_model(clip_path, device="cpu")
    with torch.no_grad():
        next(limited.parameters()).add_(1)
    for other in (prompted, limited):
        with pytest.raises(ConfigError, match="encoded otherwise: model="):
            encode_corpus(dataset, other, folder, shard_size=6, **QUIET)
    for name, value in {"dtype": "int8", "dim": 64, "shard_size": 7}.items():
        with pytest.raises(ConfigError, match=f"encoded otherwise: {name}=.*{value}"):
            encode_corpus(dataset, model, folder, **{"shard_size": 6, name: value}, **QUIET)
    assert shards(folder) == shards(whole)


def test_shards_of_other_documents_are_not_deleted(tmp_path):
    folder = encode_texts(texts(), tmp_path / "shards")
    with pytest.raises(ConfigError, match="1 shards of other documents"):
        encode_texts(texts(19), folder)


def test_a_damaged_shard_is_made_again(whole, dataset, model, tmp_path, caplog):
    folder = shutil.copytree(whole, tmp_path / "copy")
    damaged = sorted(folder.glob("*.parquet"))[2]
    damaged.write_bytes(damaged.read_bytes()[:100])
    encode_corpus(dataset, model, folder, shard_size=6, **QUIET)
    assert f"{damaged} can't be used" in caplog.text
    assert shards(folder) == shards(whole)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "mine.parquet").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds 'mine.parquet'"):
        encode_texts(texts(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        encode_texts(texts(), tmp_path / "file")
    with pytest.raises(ConfigError, match="can't be written to"):
        encode_texts(texts(), tmp_path / "file" / "below")


def test_an_unfinished_folder_is_not_read(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    sorted(folder.glob("*.parquet"))[0].unlink()
    with pytest.raises(ConfigError, match="lacks the shard '000000"):
        read_shards(folder)
    (folder / "_shards.json").unlink()
    with pytest.raises(ConfigError, match="not all of them"):
        read_shards(folder)
    with pytest.raises(ConfigError, match="holds no shards"):
        read_shards(tmp_path)


# ---- kills


class Ticks:
    """Kills this process at one of the moments at which something begins or is done; notes what is encoded."""

    def __init__(self, notes, killed_at=None):
        self.notes, self.count, self.killed_at = notes, 0, killed_at

    def tick(self):
        self.count += 1
        if self.count == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call):
        def ticking(*given, **options):
            self.tick()
            found = call(*given, **options)
            self.tick()
            return found

        return ticking

    def reading(self, read):
        def noting(reader, task, ids):
            with self.notes.open("a") as file:
                file.writelines(f"{each}\n" for each in ids)
            return read(reader, task, ids)

        return noting


def encode_ticking(notes, killed_at, folder, dataset, model):
    """In a child: the call, killed at a moment."""
    ticks = Ticks(notes, killed_at)
    DatasetReader.read = ticks.reading(DatasetReader.read)
    model.encode_document = ticks.around(model.encode_document)
    pq.write_table = ticks.around(pq.write_table)
    Path.replace = ticks.around(Path.replace)
    encode_corpus(dataset, model, folder, shard_size=6, **QUIET)
    notes.with_name("ticks").write_text(str(ticks.count))


def go_on_after_kill(killed_at, tmp_path, dataset, model, whole):
    folder, first, second = tmp_path / "shards", tmp_path / "first.txt", tmp_path / "second.txt"
    assert in_children(encode_ticking, (first, killed_at, folder, dataset, model)) == [-signal.SIGKILL]
    there = shards(folder)
    finished = [each for name in there for each in pq.read_table(whole / name)["document_id"].to_pylist()]
    assert in_children(encode_ticking, (second, None, folder, dataset, model)) == [0]
    encoded = second.read_text().split() if second.exists() else []
    assert not set(encoded) & set(finished)
    assert sorted(encoded + finished) == sorted(dataset.corpus["document_id"][:])
    assert shards(folder) == shards(whole)
    assert joined(folder).equals(joined(whole))
    assert not list(folder.glob("*.partial"))
    return len(there)


def leave_partial(folder, path):
    """In a child: killed while it writes."""
    write_whole(folder / path, lambda partial: (partial.write_text("half"), os.kill(os.getpid(), signal.SIGKILL)))


def test_only_what_dead_processes_of_this_machine_left_is_deleted(tmp_path):
    dead = in_children(leave_partial, (tmp_path, "000000-0123456789abcdef.parquet"))
    assert dead == [-signal.SIGKILL]
    (left,) = tmp_path.glob("*.partial")
    machine = left.name.split(".")[2].rpartition("-")[0].rpartition("-")[0]
    own = tmp_path / left.name.replace(left.name.split("-")[-2], str(os.getpid()))
    others = tmp_path / left.name.replace(f".{machine}-", ".another_machine-")
    mine = tmp_path / "notes-of-a-person.partial"
    for path in (own, others, mine):
        path.write_text("half")
    delete_partials(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([own, others, mine])


@pytest.mark.parametrize("killed_at", [9, 20])
def test_what_was_killed_goes_on_with_equal_shards(killed_at, tmp_path, dataset, model, whole):
    assert go_on_after_kill(killed_at, tmp_path, dataset, model, whole) == {9: 1, 20: 3}[killed_at]


@pytest.mark.slow
def test_ten_kills_leave_equal_shards(tmp_path, dataset, model, whole):
    notes = tmp_path / "notes.txt"
    assert in_children(encode_ticking, (notes, None, tmp_path / "peace", dataset, model)) == [0]
    last = int((tmp_path / "ticks").read_text())
    moments = np.linspace(1, last, 10).astype(int).tolist()
    there = []
    for moment in moments:
        (tmp_path / str(moment)).mkdir()
        there.append(go_on_after_kill(moment, tmp_path / str(moment), dataset, model, whole))
    assert there[0] == 0
    assert there[-1] == len(shards(whole))
    assert len(set(there)) > 4


# ---- several at once


def encode_in_rank(rank, port, notes, dataset, model, options):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one was forked from
    DatasetReader.read = Ticks(notes.with_name(f"rank-{rank}")).reading(DatasetReader.read)
    try:
        encode_corpus(dataset, model, **options, **QUIET)
    except DatasetError as error:
        notes.with_name(f"error-{rank}").write_text(str(error))
    torch.distributed.destroy_process_group()


def in_two_ranks(notes, dataset, model, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    assert in_children(encode_in_rank, *((rank, port, notes, dataset, model, options) for rank in (0, 1))) == [0, 0]


def test_two_ranks_write_what_one_process_writes(tmp_path, dataset, model, whole):
    in_two_ranks(tmp_path / "notes", dataset, model, folder=tmp_path / "shards", shard_size=6)
    assert shards(tmp_path / "shards") == shards(whole)
    shares = [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(dataset.corpus["document_id"][:])
    assert min(map(len, shares)) >= 10


def test_ranks_share_what_is_missing_and_one_finds_the_ranges(tmp_path):
    data, options = texts(), {"dtype": "int8", "shard_size": 3}
    alone = encode_texts(data, tmp_path / "alone", **options)
    folder = shutil.copytree(alone, tmp_path / "shards")
    for path in sorted(folder.glob("*.parquet"))[:4]:
        path.unlink()
    in_two_ranks(tmp_path / "notes", data, VectorsInTexts(), folder=folder, documents="text", **options)
    assert shards(folder) == shards(alone)
    assert [len((tmp_path / f"rank-{rank}").read_text().split()) for rank in (0, 1)] == [6, 6]
    in_two_ranks(tmp_path / "notes", data, VectorsInTexts(), folder=tmp_path / "new", documents="text", **options)
    assert shards(tmp_path / "new") == shards(alone)


def test_an_error_of_one_rank_is_that_of_both(tmp_path):
    data = texts()
    corpus = data.corpus.map(lambda row, at: {"text": "nan 1 1" if at == 19 else row["text"]}, with_indices=True)
    broken = RetrievalDataset(corpus, data.queries, data.qrels)
    options = {"folder": tmp_path / "shards", "documents": "text", "shard_size": 3}
    in_two_ranks(tmp_path / "notes", broken, VectorsInTexts(), **options)
    assert all("the document 'd19'" in (tmp_path / f"error-{rank}").read_text() for rank in (0, 1))
    assert not (tmp_path / "shards" / "_shards.json").exists()


def encode_alone(folder, dataset, model):
    encode_corpus(dataset, model, folder, shard_size=6, **QUIET)


def test_two_calls_at_once_may_share_a_folder(tmp_path, dataset, model, whole):
    assert in_children(encode_alone, *[(tmp_path / "shards", dataset, model)] * 2) == [0, 0]
    assert shards(tmp_path / "shards") == shards(whole)


class KillsItsWorker(SentenceTransformer):
    """Kills the first worker that comes to a portion of documents."""

    def encode_document(self, inputs, **options):
        if os.environ.get("RAY_JOB_ID") and not (flag := Path(self.killed)).exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_document(inputs, **options)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_two_workers_of_ray_write_what_one_process_writes_also_where_one_is_killed(tmp_path, text_encoder_path):
    # texts: the workers don't find the torchvision that the tests keep apart
    model = KillsItsWorker(text_encoder_path, device="cpu")
    model.killed = str(tmp_path / "killed")
    alone = encode_texts(texts(40), tmp_path / "alone", model, shard_size=6)
    ray = encode_texts(texts(40), tmp_path / "ray", model, shard_size=6, engine="ray", num_workers=2)
    assert shards(ray) == shards(alone)
    assert (tmp_path / "killed").exists()
    data = texts()
    corpus = data.corpus.map(lambda row, at: {"text": "nan 1 1" if at == 19 else row["text"]}, with_indices=True)
    broken = RetrievalDataset(corpus, data.queries, data.qrels)
    with pytest.raises(DatasetError, match="the document 'd19'"):
        encode_texts(broken, tmp_path / "broken", engine="ray", num_workers=1)


def test_without_ray_its_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ray\[data\]'"):
        encode_texts(texts(), tmp_path / "shards", engine="ray")


# ---- read by mining


@pytest.mark.parametrize("kind", [VectorsInTexts, Tokens])
def test_mining_reads_what_was_encoded(tmp_path, kind, monkeypatch):
    data, model = texts(60), kind()
    folder = encode_texts(data, tmp_path / "shards", model, shard_size=7)
    options = {"documents": "text", "relative_margin": None, **QUIET}
    part = RetrievalDataset(data.corpus.select(range(49, -1, -1)), data.queries, data.qrels)
    expected = [mine_hard_negatives(each, model, **options) for each in (data, part)]
    monkeypatch.setattr(kind, "encode_document", None)
    for each, own in zip((data, part), expected, strict=True):
        found = mine_hard_negatives(each, model, embeddings=folder, **options)
        assert found.negatives.to_list() == own.negatives.to_list()


def test_models_are_compared_on_what_they_encoded(tmp_path, dataset, model, siglip_path, monkeypatch):
    models = {"read": model, "encoded": load_model(siglip_path, device="cpu")}
    expected = compare_models(models, dataset, **QUIET)
    folder = encode_corpus(dataset, model, tmp_path / "shards", shard_size=6, **QUIET)
    half = encode_corpus(dataset, model, tmp_path / "half", dtype="float16", shard_size=6, **QUIET)
    monkeypatch.setattr(model, "encode_document", None)
    for store in (None, tmp_path / "store", tmp_path / "store"):
        found = compare_models(models, dataset, embeddings=[folder], store=store, **QUIET)
        assert not found.failures
        assert [row.per_query for row in found.rows] == [row.per_query for row in expected.rows]
        assert {row.name: np.isnan(row.page_s) for row in found.rows} == {"read": True, "encoded": False}
        assert "nan" not in str(found)
    assert not compare_models(models, dataset, embeddings=[half, folder], **QUIET).failures
    assert "float16" in compare_models(models, dataset, embeddings=[half], **QUIET).failures["read"]
    for wrong in (folder, [5], [tmp_path / "nothing"]):
        with pytest.raises(ConfigError, match=r"embeddings=|holds no shards"):
            compare_models(models, dataset, embeddings=wrong, **QUIET)


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
    data, model = texts(), VectorsInTexts()
    options = {"documents": "text", **QUIET}
    half = encode_texts(data, tmp_path / "half", dtype="float16")
    with pytest.raises(ConfigError, match="is of dtype='float16', and 'float32' is needed"):
        mine_hard_negatives(data, model, embeddings=half, **options)
    folder = encode_texts(texts(19), tmp_path / "few")
    with pytest.raises(DatasetError, match=r"lacks 1 documents of the dataset, e.g. 'd19'"):
        mine_hard_negatives(data, model, embeddings=folder, **options)
    with pytest.raises(ConfigError, match="is of model="):
        mine_hard_negatives(data, Tokens(), embeddings=folder, **options)
    with pytest.raises(ConfigError, match="holds no shards"):
        mine_hard_negatives(data, model, embeddings=tmp_path, **options)
    with pytest.raises(ConfigError, match="embeddings=5"):
        mine_hard_negatives(data, model, embeddings=5, **options)


# ---- wrong values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "uint8"}, "dtype='uint8' is unknown"),
        ({"dtype": np.float16}, "dtype=.*is unknown"),
        ({"engine": "spark"}, "engine='spark' is unknown"),
        ({"dim": 0}, "dim=0"),
        ({"dim": True}, "dim=True"),
        ({"dim": 4}, "dim=4 is larger than the 3 numbers"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard_size": 2.5}, "shard_size=2.5"),
        ({"num_workers": 2}, "num_workers=2 is for engine='ray'"),
        ({"engine": "ray", "num_workers": "2"}, "num_workers='2'"),
        ({"calibration": texts(2)}, "calibration= gives the ranges of int8"),
        ({"dtype": "int8", "calibration": 5}, "calibration"),
        ({"show_progress_bar": "no"}, "show_progress_bar='no'"),
        ({"documents": "image"}, "documents='image' needs a column 'image'"),
        ({"documents": "pdf"}, "documents='pdf'"),
        ({"folder": 5}, "folder=5"),
        ({"folder": ""}, "folder=''"),
        ({"model": "my-model"}, "model='my-model' is no retriever"),
        ({"dataset": 5}, "5"),
    ],
    ids=str,
)
def test_wrong_values_are_named_before_anything_is_written(tmp_path, options, message):
    given = {
        "dataset": texts(),
        "model": VectorsInTexts(),
        "folder": tmp_path / "shards",
        "documents": "text",
        **options,
    }
    with pytest.raises((ConfigError, DatasetError), match=message):
        encode_corpus(**given, **({} if "show_progress_bar" in given else QUIET))
    if given["folder"] == tmp_path / "shards":
        assert not list((tmp_path / "shards").glob("*.parquet"))


def test_columns_with_the_names_of_the_vectors_and_documents_without_text_are_named(tmp_path):
    with pytest.raises(DatasetError, match="has a column 'embedding'"):
        encode_texts(texts(embedding=[1] * 20), tmp_path / "shards")
    data = texts()
    gaps = RetrievalDataset(
        data.corpus.map(lambda row, at: {"text": None if at == 3 else row["text"]}, with_indices=True),
        data.queries,
        data.qrels,
    )
    with pytest.raises(DatasetError, match=r"1 documents have no text, e.g. 'd3'"):
        encode_texts(gaps, tmp_path / "shards")


def test_numbers_that_float16_does_not_hold_are_named(tmp_path):
    data = text_dataset(["1 70000", "2 3"], ["1 1"], [(0, 0)])
    with pytest.raises(DatasetError, match="up to 70000, and float16 ends at 65504"):
        encode_texts(data, tmp_path / "shards", dtype="float16")
