"""Your own clips and the words for them: a table in, a better model and a search out.

    python examples/own_clips.py --table clips.csv --model Qwen/Qwen3-VL-Embedding-2B
    python examples/own_clips.py --tiny        # drawn clips and a tiny model, on a CPU

The table has one row per clip: ``file`` (whatever FFmpeg reads), ``words`` (empty for a clip that nobody asked for;
clips with the same words all answer them), and if you have it ``film``, what it was cut from. Models of clips need
torchvision. docs/video_tutorial.md goes through it slowly.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from mmtune import RetrievalDataset, encode_corpus, finetune, load_model, read_shards
from mmtune.testing import generated_clips, tiny_qwen3_vl


def main() -> None:
    """Train on a table; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="a CSV file")
    parser.add_argument("--model", help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, default=Path("my-clips"))
    parser.add_argument("--eval-queries", type=int, default=100, help="queries kept unseen to measure on")
    parser.add_argument("--max-frames", type=int, default=16, help="frames that are read of a clip")
    parser.add_argument("--search", default="a door that opens", help="what to look for in the end")
    parser.add_argument("--tiny", action="store_true", help="draw a table and a tiny model first")
    options = parser.parse_args()
    if options.tiny:
        options.table, options.model, options.eval_queries = *draw_inputs(options.output), 8
    if options.table is None or options.model is None:
        parser.error("--table and --model are needed, or --tiny")

    dataset = read_table(options.table)
    print(dataset)
    print(dataset.audit())
    group = "film" if "film" in dataset.corpus.column_names else None
    train, evaluation = dataset.split(options.eval_queries, group_column=group)
    model = load_model(options.model, max_frames=options.max_frames)
    result = finetune(model, train, evaluation, documents="video", output_dir=options.output, overwrite=options.tiny)
    print(result)

    index = encode_corpus(dataset, result.model, options.output / "index", documents="video")
    print(f"For {options.search!r}:")
    for file, score in find(options.search, result.model, index):
        print(f"  {score:.3f}  {file}")


def read_table(path: Path) -> RetrievalDataset:
    """What can be found, what is asked, and what answers what."""
    rows = Dataset.from_csv(str(path))
    answers = [(row["words"], row["file"]) for row in rows if row["words"]]
    words, files = [each for each, _ in answers], [each for _, each in answers]
    queries = Dataset.from_dict({"query_id": sorted({*words}), "text": sorted({*words})})
    qrels = Dataset.from_dict({"query_id": words, "document_id": files, "score": [1] * len(answers)})
    corpus = rows.remove_columns("words").rename_column("file", "document_id").add_column("video", rows["file"][:])
    return RetrievalDataset(corpus, queries, qrels)


def find(words: str, model: SentenceTransformer, index: Path, count: int = 3) -> list[tuple[str, float]]:
    """The best documents for a query, with their scores; ``index`` is what ``encode_corpus`` returned."""
    table = pa.concat_tables(read_shards(index))
    vectors = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    scores = model.similarity(model.encode_query(words), vectors)[0]
    best = scores.argsort(descending=True)[:count].tolist()
    return [(table["document_id"][row].as_py(), float(scores[row])) for row in best]


def draw_inputs(output: Path) -> tuple[Path, str]:
    """A table and a checkpoint to try this with, beside the output folder."""
    folder = output.with_name(f"{output.name}-files")
    folder.mkdir(parents=True, exist_ok=True)
    rows = generated_clips(48)
    files = [folder / f"{name}.mp4" for name in rows["id"]]
    for file, clip in zip(files, rows["video"], strict=True):
        file.write_bytes(clip["bytes"])
    table = folder / "clips.csv"
    Dataset.from_dict({"file": [*map(str, files)], "words": rows["query"]}).to_csv(table)
    return table, tiny_qwen3_vl(output.with_name(f"{output.name}-base"))


if __name__ == "__main__":
    main()
