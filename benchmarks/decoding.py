"""How much a page that its decoder scaled down differs, for a model, from the page decoded whole.

Embeddings of untrained models are alike whatever they show, so a cosine is taken between embeddings from which the mean
over all pages is subtracted. Every page is embedded twice, by models with random weights: as mmtune decodes it for the
model, and whole.

    python benchmarks/decoding.py --data FOLDER

FOLDER holds parquet files with a column image; without it, noisy pages of the size of scans are drawn. The results go
into RESULTS.md.
"""

import argparse
import tempfile
from pathlib import Path

import without_gpu  # noqa: F401

# isort: split

import pyarrow.parquet as pq
import torch
from measure import write_section
from scans import scanned_pages
from sentence_transformers import SentenceTransformer

from mmtune import load_model
from mmtune.data.pages import Page
from mmtune.inference.preprocessing import reading_pages
from mmtune.report.markdown import markdown_table
from mmtune.testing import tiny_clip, tiny_qwen3_vl


def all_pages(data: Path | None) -> list[bytes]:
    """The encoded pages."""
    if data is None:
        return scanned_pages(24)
    files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    return [image["bytes"] for file in files for image in pq.read_table(file, columns=["image"])["image"].to_pylist()]


def embed(model: SentenceTransformer, contents: list[bytes], *, whole: bool) -> tuple[torch.Tensor, list[list[int]]]:
    """Embeddings and grids of patches, page by page."""
    embeddings, grids = [], []
    for content in contents:
        page = Page({"bytes": content}, "page")
        given = page.decoded(None) if whole else page
        features = model.preprocess([given])
        grids.append(features["image_grid_thw"].flatten().tolist() if "image_grid_thw" in features else [])
        embeddings.append(model.encode([given], convert_to_tensor=True, show_progress_bar=False))
    return torch.cat(embeddings), grids


def main() -> None:
    """Run the benchmark; ``--help`` lists its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="parquet file or folder with a column image; drawn pages without")
    options = parser.parse_args()
    contents, cells = all_pages(options.data), []
    with tempfile.TemporaryDirectory() as folder:
        models = {
            "CLIP, 128 x 128": tiny_clip(f"{folder}/128", image_size=128),
            "CLIP, 384 x 384": tiny_clip(f"{folder}/384", image_size=384),
            "Qwen3-VL, up to 600 x 600": tiny_qwen3_vl(f"{folder}/qwen", max_pixels=600 * 600),
        }
        for name, path in models.items():
            model = load_model(path, device="cpu")
            whole, grids = embed(model, contents, whole=True)
            with reading_pages(model):
                found, own_grids = embed(model, contents, whole=False)
            mean = whole.mean(dim=0)
            cosines = torch.cosine_similarity(whole - mean, found - mean)
            same = sum(cosine > 0.999999 for cosine in cosines.tolist())
            others = sum(one != other for one, other in zip(grids, own_grids, strict=True))
            cells.append([name, f"{cosines.min():.4f}", f"{cosines.mean():.4f}", f"{same}", f"{others}"])
    text = (
        f"`python benchmarks/decoding.py`: {len(contents)} pages, decoded as mmtune does it for a model, and whole; "
        "cosine of what is left when the mean over all pages is subtracted.\n\n"
        + markdown_table(("model", "least", "mean", "pages that are equal", "pages with another grid"), cells)
    )
    print(text)
    write_section("Decoding at a fraction", text)


if __name__ == "__main__":
    main()
