"""Put the shards of encode_corpus into Qdrant, in this process or on a server, and search them.

    pip install qdrant-client
    python examples/into_qdrant.py --tiny

or, with a model and a dataset of your own,

    python examples/into_qdrant.py --model tuned/final --data pages.parquet --query "revenue in 2021"

Several vectors a page are compared by MaxSim; with their pooled vector first, that is quick.
"""

import argparse
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from qdrant_client import QdrantClient, models

from mmtune import build_late_interaction, encode_corpus, load_model, read_shards
from mmtune.testing import generated_pages, tiny_clip, tiny_llava


def fill(folder: Path, client: QdrantClient, name: str = "pages") -> None:
    """A new collection of all documents, shard by shard; ids are payload, as points have numbers."""
    numbers = count()
    for at, shard in enumerate(read_shards(folder)):
        columns = [each for each in ("embedding", "pooled_embedding") if each in shard.column_names]
        if at == 0:
            client.create_collection(name, vectors_config={each: vector_params(shard, each) for each in columns})
        vectors = {each: shard[each].to_pylist() for each in columns}
        payloads = shard.drop_columns(columns).to_pylist()
        ids = [next(numbers) for _ in payloads]
        client.upsert(name, models.Batch(ids=ids, vectors=vectors, payloads=payloads))


def vector_params(shard: pa.Table, column: str) -> models.VectorParams:
    """How a column of vectors is compared: by cosine, or by MaxSim of dot products, as late interaction does."""
    kind = shard[column].type
    if pa.types.is_list(kind):
        maxsim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        size = kind.value_type.list_size
        return models.VectorParams(size=size, distance=models.Distance.DOT, multivector_config=maxsim)
    return models.VectorParams(size=kind.list_size, distance=models.Distance.COSINE)


def search(
    client: QdrantClient,
    model: Any,
    text: str,
    *,
    limit: int = 10,
    offset: int = 0,
    candidates: int | None = None,
    name: str = "pages",
) -> list[models.ScoredPoint]:
    """The points that fit a text best, from rank ``offset`` on.

    With ``candidates``, for several vectors a page: only so many are compared, the nearest by their pooled vector.
    """
    query = np.asarray(model.encode_query([text])[0])
    params = client.get_collection(name).config.params.vectors
    query = query[..., : params["embedding"].size]
    options: dict[str, Any] = {}
    if candidates is not None:
        pooled = query.mean(axis=0).tolist()
        options["prefetch"] = models.Prefetch(query=pooled, using="pooled_embedding", limit=candidates)
    asked = {"query": query.tolist(), "using": "embedding", "limit": limit, "offset": offset}
    return client.query_points(name, **asked, **options).points


def main() -> None:
    """Encode, fill, search; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a finetuned model")
    parser.add_argument("--data", help="what RetrievalDataset.load takes")
    parser.add_argument("--query", default="What was the revenue in 2021?")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "int8"])
    parser.add_argument("--url", help="of a server; in this process without")
    parser.add_argument("--late-interaction", action="store_true", help="with --tiny: several vectors a page")
    parser.add_argument("--tiny", action="store_true", help="random weights and drawn pages")
    parser.add_argument("--output", type=Path, default=Path("qdrant-output"))
    options = parser.parse_args()
    if options.tiny:
        path = options.output / "model"
        model = build_late_interaction(tiny_llava(path)) if options.late_interaction else load_model(tiny_clip(path))
        data = generated_pages(24)
    elif options.model and options.data:
        model, data = load_model(options.model), options.data
    else:
        parser.error("pass --model and --data, or --tiny")
    folder = encode_corpus(data, model, options.output / "shards", dtype=options.dtype)
    client = QdrantClient(url=options.url) if options.url else QdrantClient(":memory:")
    fill(folder, client)
    for first in (0, 5):
        for rank, point in enumerate(search(client, model, options.query, limit=5, offset=first), start=first + 1):
            print(f"{rank:>2}  {point.score:.3f}  {point.payload['document_id']}")


if __name__ == "__main__":
    main()
