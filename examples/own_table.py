"""Your own pages and queries: a table in, a better model out.

    python examples/own_table.py --table pages.parquet --model Qwen/Qwen3-VL-Embedding-2B
    python examples/own_table.py --tiny         # a drawn table and a tiny model, on a CPU

The table has one row per page: ``id``, ``query`` (null for a page that nobody asked about), ``image`` (encoded, or a
path), and if you have them ``negatives`` (ids of pages that look right and are not). Other names go into
``from_id_rows``, as shown below.
"""

import argparse
from pathlib import Path

from datasets import load_dataset

from mmtune import RetrievalDataset, finetune
from mmtune.testing import generated_pages, tiny_clip


def main() -> None:
    """Train on a table; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="a parquet file")
    parser.add_argument("--model", help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, default=Path("my-model"))
    parser.add_argument("--eval-queries", type=int, default=100, help="queries kept unseen to measure on")
    parser.add_argument("--group-column", help="a column such as the file a page is from: kept whole on one side")
    parser.add_argument("--tiny", action="store_true", help="draw a table and a tiny model first")
    options = parser.parse_args()
    if options.tiny:
        options.table, options.model, options.eval_queries = *draw_inputs(options.output), 8
    if options.table is None or options.model is None:
        parser.error("--table and --model are needed, or --tiny")

    rows = load_dataset("parquet", data_files=str(options.table), split="train")
    dataset = RetrievalDataset.from_id_rows(
        rows,
        id_column="id",
        query_column="query",
        image_column="image",
        negatives_column="negatives" if "negatives" in rows.column_names else None,
    )
    print(dataset)
    train, evaluation = dataset.split(options.eval_queries, group_column=options.group_column)
    print(finetune(options.model, train, evaluation, output_dir=options.output, overwrite=options.tiny))


def draw_inputs(output: Path) -> tuple[Path, str]:
    """A table and a checkpoint to try this with, beside the output folder."""
    table = output.with_name(f"{output.name}-table.parquet")
    generated_pages(40).to_parquet(table)
    return table, tiny_clip(output.with_name(f"{output.name}-base"))


if __name__ == "__main__":
    main()
