"""Put the shards of encode_corpus into LanceDB, a database in a folder, and search them.

    pip install lancedb
    python examples/into_lancedb.py --tiny

or, with a model and a dataset of your own,

    python examples/into_lancedb.py --model tuned/final --data pages.parquet --query "revenue in 2021"

Vectors of any kind that encode_corpus writes: one a page or several, float32, float16, int8 or binary.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmtune import build_late_interaction, encode_corpus, load_model, read_shards
from mmtune.testing import generated_pages, tiny_clip, tiny_llava


def fill(folder: Path, database: str, name: str = "pages") -> Any:
    """A new table of all documents, shard by shard, so that memory holds one."""
    is_int8 = json.loads((folder / "_encoding.json").read_text())["dtype"] == "int8"
    # floats, halves and packed bits are searched as they are kept; int8 can't be (LanceDB 0.40), so it is read back
    shards = read_shards(folder) if is_int8 else map(pq.read_table, sorted(folder.glob("*.parquet")))
    table = None
    for shard in shards:
        plain = shard.replace_schema_metadata(None)
        if table is None:
            table = lancedb.connect(database).create_table(name, plain, mode="overwrite")
        else:
            table.add(plain)
    return table


def search(table: Any, model: Any, text: str, *, limit: int = 10, offset: int = 0) -> list[dict[str, Any]]:
    """The rows that fit a text best, from rank ``offset`` on; ``_distance`` is smallest for the best."""
    query = np.asarray(model.encode_query([text])[0])
    kept = table.schema.field("embedding").type
    kept = kept.value_type if pa.types.is_list(kept) else kept
    if kept.value_type == pa.uint8():
        query, metric = np.packbits(query > 0, axis=-1)[..., : kept.list_size], "hamming"
    else:
        query, metric = query[..., : kept.list_size], "cosine"
    found = table.search(query, vector_column_name="embedding").distance_type(metric)
    return found.limit(limit).offset(offset).to_list()


def main() -> None:
    """Encode, fill, search; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a finetuned model")
    parser.add_argument("--data", help="what RetrievalDataset.load takes")
    parser.add_argument("--query", default="What was the revenue in 2021?")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "int8", "binary"])
    parser.add_argument("--late-interaction", action="store_true", help="with --tiny: several vectors a page")
    parser.add_argument("--tiny", action="store_true", help="random weights and drawn pages")
    parser.add_argument("--output", type=Path, default=Path("lancedb-output"))
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
    table = fill(folder, str(options.output / "database"))
    for first in (0, 5):
        for rank, row in enumerate(search(table, model, options.query, limit=5, offset=first), start=first + 1):
            print(f"{rank:>2}  {row['_distance']:.3f}  {row['document_id']}")


if __name__ == "__main__":
    main()
