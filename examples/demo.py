"""The main job from end to end, on drawn report pages and a small model with random weights.

Draws pages in the id layout, keeps some unseen, trains, evaluates at each dimension, searches once, and saves. No
network, no GPU; a few minutes on one core. ``make demo`` runs it.
"""

import argparse
import tempfile
from pathlib import Path

import datasets
from PIL import Image, ImageDraw, ImageFont
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import semantic_search

from mmtune import RetrievalDataset, finetune
from mmtune.testing import generated_pages, tiny_clip


def main() -> None:
    """Run the demonstration; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the model and the report")
    parser.add_argument("--seed", type=int, default=0, help="of pages, split, weights and training")
    parser.add_argument("--queries", type=int, default=400, help="queries to draw; 80 of them are kept for evaluation")
    parser.add_argument("--epochs", type=float, default=30)
    options = parser.parse_args()

    print(f"Drawing report pages for {options.queries} queries ...")
    dataset = RetrievalDataset.from_id_rows(generated_pages(options.queries, seed=options.seed))
    train, evaluation = dataset.split(min(80, options.queries // 4), seed=options.seed)
    print(f"\nTo train on: {train}\n\nUnseen, to measure on: {evaluation}\n")

    with tempfile.TemporaryDirectory() as folder:
        result = finetune(
            tiny_clip(folder, hidden_size=128, image_size=128, seed=options.seed),
            train,
            evaluation,
            output_dir=options.output,
            num_train_epochs=options.epochs,
            learning_rate=1e-3,  # from random weights; a pretrained model takes the recipe's 2e-5
            seed=options.seed,
            overwrite=True,
        )
    print(f"\n{result}\n")

    model = SentenceTransformer(str(options.output / "final"), device="cpu")
    search(model, evaluation, options.output / "search.png")


def search(model: SentenceTransformer, evaluation: RetrievalDataset, picture: Path, top_k: int = 5) -> None:
    """Search the unseen pages for one query, print what was found, and draw it."""
    query = evaluation.queries[0]
    relevant = set(evaluation.qrels.filter(lambda row: row["query_id"] == query["query_id"])["document_id"])
    pages = evaluation.corpus.cast_column("image", datasets.Image())
    hits = semantic_search(
        # As a dictionary, a query is a text, also one that looks like the path or the URL of an image.
        model.encode_query([{"text": query["text"]}], convert_to_tensor=True),
        model.encode_document(pages["image"][:], convert_to_tensor=True),
        top_k=top_k,
    )[0]
    found = pages.select([hit["corpus_id"] for hit in hits])
    print(f"Searching {len(pages)} unseen pages for: {query['text']!r}")
    for rank, (hit, document_id) in enumerate(zip(hits, found["document_id"], strict=True), start=1):
        mark = "<- the page that answers it" if document_id in relevant else ""
        print(f"  {rank}. {hit['score']:.3f}  {document_id}  {mark}")
    draw_hits(query["text"], found["image"][:], [name in relevant for name in found["document_id"]], picture)
    print(f"The pages found are drawn in {picture}")


def draw_hits(query: str, images: list[Image.Image], answers: list[bool], picture: Path, size_px: int = 256) -> None:
    """Draw the pages found side by side, best first; a green frame marks one that answers the query."""
    margin, head = 12, 44
    sheet = Image.new("RGB", (len(images) * (size_px + margin) + margin, head + size_px + margin), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), query, fill="black", font=ImageFont.load_default(20))
    for at, (image, is_answer) in enumerate(zip(images, answers, strict=True)):
        left = margin + at * (size_px + margin)
        sheet.paste(image.resize((size_px, size_px), Image.Resampling.LANCZOS), (left, head))
        frame = (left - 3, head - 3, left + size_px + 2, head + size_px + 2)
        draw.rectangle(frame, outline="#1a9850" if is_answer else "#bbbbbb", width=4 if is_answer else 1)
    sheet.save(picture)


if __name__ == "__main__":
    main()
