"""Databases filled from shards find what exact search finds; skipped where they are not installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from sentence_transformers import MultiVectorEncoder

from mmtune import RetrievalDataset, encode_corpus, read_shards
from test_mining import VectorsInTexts

EXAMPLES = Path(__file__).parents[1] / "examples"
COUNT, WIDTH, DEPTH = 240, 16, 20

pytestmark = pytest.mark.filterwarnings("ignore")  # of the databases


class ByCosine(VectorsInTexts):
    """Embeds a text of numbers as these, of any length, and compares by cosine."""

    def __init__(self):
        super().__init__()
        self.similarity_fn_name = "cosine"

    def encode_query(self, inputs, **options):
        return super().encode_query([{"text": text} if isinstance(text, str) else text for text in inputs])

    encode_document = encode_query


class ByMaxSim(MultiVectorEncoder):
    """Embeds a text of numbers as a vector of length 1 for every eight of them."""

    def __init__(self):
        super().__init__(modules=[torch.nn.Identity()], device="cpu")

    def encode_query(self, inputs, **options):
        texts = [text if isinstance(text, str) else text["text"] for text in inputs]
        rows = [torch.tensor([float(part) for part in text.split()]).view(-1, 8) for text in texts]
        return [torch.nn.functional.normalize(row, dim=1) for row in rows]

    encode_document = encode_query


def number_texts(rng, count, lengths):
    return [" ".join(f"{part:.4f}" for part in rng.normal(size=length)) for length in rng.choice(lengths, size=count)]


@pytest.fixture(scope="module")
def queries():
    return number_texts(np.random.default_rng(1), 4, [WIDTH])


def encode(tmp_path, model, **options):
    lengths = [WIDTH] if isinstance(model, ByCosine) else [24, 40, 72]
    rows = number_texts(np.random.default_rng(0), COUNT, lengths)
    corpus = Dataset.from_dict({"document_id": [f'p/{at} "ü"' for at in range(COUNT)], "text": rows})
    qrels = Dataset.from_dict({"query_id": ["q"], "document_id": ['p/0 "ü"'], "score": [1]})
    data = RetrievalDataset(corpus, Dataset.from_dict({"query_id": ["q"], "text": ["1"]}), qrels)
    return encode_corpus(
        data, model, tmp_path / "shards", documents="text", shard_size=100, show_progress_bar=False, **options
    )


def exact(folder, model, query, *, normalizes=False):
    """All ids by the model's own similarity with the vectors of the shards, best first."""
    ids, scores = [], []
    asking = model.encode_query([query])
    for table in read_shards(folder):
        kept = [torch.tensor(row) for row in table["embedding"].to_pylist()]
        if normalizes:
            kept = [torch.nn.functional.normalize(row, dim=-1) for row in kept]
        ids += table["document_id"].to_pylist()
        if isinstance(model, ByMaxSim):
            scores += model.similarity(asking, kept)[0].tolist()
        else:
            kept = torch.stack(kept)
            scores += model.similarity(asking[:, : kept.shape[1]], kept)[0].tolist()
    return [ids[at] for at in np.argsort(-np.array(scores), kind="stable")]


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def into_lancedb():
    pytest.importorskip("lancedb")
    return example("into_lancedb")


@pytest.fixture(scope="module")
def into_qdrant():
    pytest.importorskip("qdrant_client")
    return example("into_qdrant")


KINDS = {
    "dense": (ByCosine, {}),
    "cut": (ByCosine, {"dim": 8}),
    "float16": (ByCosine, {"dtype": "float16"}),
    "int8": (ByCosine, {"dtype": "int8"}),
    "late": (ByMaxSim, {}),
    "late float16": (ByMaxSim, {"dtype": "float16"}),
    "late int8": (ByMaxSim, {"dtype": "int8"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_lancedb_finds_in_the_order_of_exact_search(tmp_path, into_lancedb, queries, kind):
    model, options = KINDS[kind][0](), KINDS[kind][1]
    folder = encode(tmp_path, model, **options)
    table = into_lancedb.fill(folder, str(tmp_path / "database"))
    assert table.count_rows() == COUNT
    for query in queries:
        found = [
            row["document_id"]
            for first in (0, DEPTH)
            for row in into_lancedb.search(table, model, query, limit=DEPTH, offset=first)
        ]
        # it compares several vectors by their angles alone; halves and int8 are not quite of length 1
        assert found == exact(folder, model, query, normalizes=True)[: 2 * DEPTH]


def test_lancedb_finds_bits_in_the_order_of_their_distance(tmp_path, into_lancedb, queries):
    model = ByCosine()
    folder = encode(tmp_path, model, dtype="binary")
    table = into_lancedb.fill(folder, str(tmp_path / "database"))
    kept = pq.read_table(folder)
    bits = np.unpackbits(np.array(kept["embedding"].to_pylist(), dtype=np.uint8), axis=1)
    for query in queries:
        asked = model.encode_query([query])[0].numpy() > 0
        distances = dict(zip(kept["document_id"].to_pylist(), (bits != asked).sum(axis=1).tolist(), strict=True))
        found = into_lancedb.search(table, model, query, limit=DEPTH)
        assert [row["_distance"] for row in found] == sorted(distances.values())[:DEPTH]
        assert all(row["_distance"] == distances[row["document_id"]] for row in found)


@pytest.mark.parametrize("kind", KINDS)
def test_qdrant_finds_in_the_order_of_exact_search(tmp_path, into_qdrant, queries, kind):
    model, options = KINDS[kind][0](), KINDS[kind][1]
    folder = encode(tmp_path, model, **options)
    client = into_qdrant.QdrantClient(":memory:")
    into_qdrant.fill(folder, client)
    assert client.count("pages").count == COUNT
    for query in queries:
        found = [
            point.payload["document_id"]
            for first in (0, DEPTH)
            for point in into_qdrant.search(client, model, query, limit=DEPTH, offset=first)
        ]
        assert found == exact(folder, model, query)[: 2 * DEPTH]
        if isinstance(model, ByMaxSim):
            near = into_qdrant.search(client, model, query, limit=DEPTH, candidates=COUNT)
            assert [point.payload["document_id"] for point in near] == found[:DEPTH]
    client.close()


@pytest.mark.parametrize("name", ["into_lancedb", "into_qdrant"])
@pytest.mark.parametrize("late", [False, True])
def test_the_examples_run_in_tiny_mode(tmp_path, name, late, monkeypatch, capsys, request):
    module = request.getfixturevalue(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--tiny", "--output", "out", *["--late-interaction"] * late])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in lines[-10:]] == list(range(1, 11))
    assert len({line.split()[2] for line in lines[-10:]}) == 10
