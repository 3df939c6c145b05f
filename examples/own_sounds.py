"""Your own sounds and the words for them: a table in, a better model and a search out.

    python examples/own_sounds.py --table sounds.csv --model laion/clap-htsat-unfused
    python examples/own_sounds.py --tiny        # drawn sounds and a tiny model, on a CPU

The table has one row per sound: ``file`` (WAV, FLAC, Ogg Vorbis or MP3), ``words`` (empty for a sound that nobody asked
for), and if you have it ``recording``, the take that it was cut from. docs/audio_tutorial.md goes through it slowly.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from mmtune import RetrievalDataset, encode_corpus, finetune, read_shards
from mmtune.testing import generated_audio, tiny_clap


def main() -> None:
    """Train on a table; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="a CSV file")
    parser.add_argument("--model", help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--output", type=Path, default=Path("my-sounds"))
    parser.add_argument("--eval-queries", type=int, default=100, help="queries kept unseen to measure on")
    parser.add_argument("--search", default="a dog that barks far away", help="what to look for in the end")
    parser.add_argument("--tiny", action="store_true", help="draw a table and a tiny model first")
    options = parser.parse_args()
    if options.tiny:
        options.table, options.model, options.eval_queries = *draw_inputs(options.output), 8
    if options.table is None or options.model is None:
        parser.error("--table and --model are needed, or --tiny")

    rows = Dataset.from_csv(str(options.table)).rename_columns({"words": "query", "file": "audio"})
    rows = rows.add_column("id", rows["audio"][:])
    dataset = RetrievalDataset.from_id_rows(rows, negatives_column=None)
    print(dataset)
    print(dataset.audit())
    group = "recording" if "recording" in rows.column_names else None
    train, evaluation = dataset.split(options.eval_queries, group_column=group)
    result = finetune(
        options.model, train, evaluation, documents="audio", output_dir=options.output, overwrite=options.tiny
    )
    print(result)

    index = encode_corpus(dataset, result.model, options.output / "index", documents="audio")
    print(f"For {options.search!r}:")
    for file, score in find(options.search, result.model, index):
        print(f"  {score:.3f}  {file}")


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
    rows = generated_audio(40)
    files = [folder / f"{name}.wav" for name in rows["id"]]
    for file, sound in zip(files, rows["audio"], strict=True):
        file.write_bytes(sound["bytes"])
    table = folder / "sounds.csv"
    Dataset.from_dict({"file": [*map(str, files)], "words": rows["query"]}).to_csv(table)
    return table, tiny_clap(output.with_name(f"{output.name}-base"))


if __name__ == "__main__":
    main()
