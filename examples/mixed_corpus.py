"""One corpus of pages, passages, sounds and clips, and one model of four routes that searches all of it.

    python examples/mixed_corpus.py pages.parquet sounds-saved clips-saved passages-saved
    python examples/mixed_corpus.py --tiny      # drawn documents and tiny encoders, on a CPU

Each argument is what ``RetrievalDataset.load`` takes, such as a folder that ``save`` wrote. The tutorials on sounds and
on clips in docs/ make such datasets of folders of files. The encoder of clips needs torchvision.
"""

import argparse
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmtune import RetrievalDataset, finetune, router_preset
from mmtune.testing import (
    generated_audio,
    generated_clips,
    generated_pages,
    tiny_ast,
    tiny_siglip,
    tiny_text_encoder,
    tiny_videomae,
)


def main() -> None:
    """Train on several datasets as one; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", help="datasets: folders, parquet files, or names on the Hub")
    parser.add_argument("--output", type=Path, default=Path("one-model"))
    parser.add_argument("--eval-queries", type=int, default=400, help="queries kept unseen to measure on")
    parser.add_argument("--tiny", action="store_true", help="drawn documents and tiny encoders instead of real ones")
    options = parser.parse_args()
    if not options.data and not options.tiny:
        parser.error("pass datasets, or --tiny")

    parts = (
        drawn_datasets() if options.tiny else {Path(each).stem: RetrievalDataset.load(each) for each in options.data}
    )
    dataset = RetrievalDataset.concatenate(parts)
    print(dataset)
    train, evaluation = dataset.split(16 if options.tiny else options.eval_queries)
    # the preset of pages, with two routes more
    presets = {"audio": "MIT/ast-finetuned-audioset-10-10-0.4593", "video": "facebook/vjepa2-vitl-fpc64-256"}
    model = router_preset("minilm-siglip2", **(tiny_sides(options.output) if options.tiny else presets))
    result = finetune(
        model, train, evaluation, documents="mixed", output_dir=options.output, num_negatives=0, overwrite=options.tiny
    )
    print(result)
    for key, value in result.after.items():
        kind = key.rpartition("ndcg@10_")[2]
        if kind != key and "d_cosine" not in key:
            print(f"{kind:>6}: nDCG@10 {value:.2f}")


def drawn_datasets() -> list[RetrievalDataset]:
    """A few documents of each kind."""
    drawn = [generated_pages(16), generated_audio(16), generated_clips(16)]
    ids = [str(at) for at in range(16)]
    passages = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"Room {at} is on floor {at // 4}." for at in range(16)]}),
        Dataset.from_dict({"query_id": ids, "text": [f"Where is room {at}?" for at in range(16)]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * 16}),
    )
    return [*(RetrievalDataset.from_id_rows(rows, negatives_column=None) for rows in drawn), passages]


def tiny_sides(output: Path) -> dict[str, Any]:
    """Arguments of the preset: tiny checkpoints beside the output folder."""
    makers = {"text": tiny_text_encoder, "image": tiny_siglip, "audio": tiny_ast, "video": tiny_videomae}
    return {name: make(output.with_name(f"{name}-base")) for name, make in makers.items()} | {"dimension": None}


if __name__ == "__main__":
    main()
