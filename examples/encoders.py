"""Four ways to a model that finds pages, by the same call: one VLM, a Router, late interaction, LoRA.

    python examples/encoders.py router --table pages.parquet      # needs the Hub; a GPU helps
    python examples/encoders.py late-interaction --tiny           # drawn pages and a tiny model, on a CPU

The ways are "vlm", "router", "late-interaction" and "lora". The table has one row per page, with the columns id, query,
image and negatives. The real VLM needs mmtune[vlm], which brings torchvision.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from mmtune import RetrievalDataset, build_late_interaction, extract_route, finetune, load_model, router_preset
from mmtune.testing import generated_pages, tiny_llava, tiny_siglip, tiny_text_encoder

VLM = "Qwen/Qwen3-VL-Embedding-2B"
MAX_PIXELS = 600 * 600


def main() -> None:
    """Train in one of the ways; ``--help`` lists the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--table", type=Path, help="parquet with id, query, image, negatives")
    parser.add_argument("--output", type=Path, default=Path("tuned"))
    parser.add_argument("--eval-queries", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and drawn pages instead of the real ones")
    options = parser.parse_args()
    if options.table is None and not options.tiny:
        parser.error("pass --table, or --tiny")
    if options.tiny:
        train, evaluation = RetrievalDataset.from_id_rows(generated_pages(24, page_size_px=64)).split(6)
    else:
        train, evaluation = RetrievalDataset.load(options.table).split(options.eval_queries)
    print(WAYS[options.way](train, evaluation, options.output, options.tiny))


def vlm(train: RetrievalDataset, evaluation: RetrievalDataset, output: Path, tiny: bool) -> object:
    """One model for queries and pages, all of its weights trained."""
    model = load_model(vlm_checkpoint(output, tiny), max_pixels=pixels(tiny))
    return finetune(model, train, evaluation, output_dir=output, overwrite=True)


def router(train: RetrievalDataset, evaluation: RetrievalDataset, output: Path, tiny: bool) -> object:
    """A text encoder and an image encoder, joined by a projection that learns to align them."""
    sides = {}
    if tiny:
        text = tiny_text_encoder(output.with_name("text-base"), hidden_size=32)
        sides = {"text": text, "image": tiny_siglip(output.with_name("image-base")), "dimension": None}
    model = router_preset("minilm-siglip2", **sides)
    result = finetune(model, train, evaluation, output_dir=output, overwrite=True, freeze=("text",))
    # a server that only embeds queries needs only this side
    extract_route(result.model, "text").save_pretrained(str(output / "queries"))
    return result


def late_interaction(train: RetrievalDataset, evaluation: RetrievalDataset, output: Path, tiny: bool) -> object:
    """A vector for each patch and each word, as ColPali."""
    model = build_late_interaction(vlm_checkpoint(output, tiny), max_pixels=pixels(tiny))
    return finetune(model, train, evaluation, output_dir=output, overwrite=True)


def lora(train: RetrievalDataset, evaluation: RetrievalDataset, output: Path, tiny: bool) -> object:
    """Adapters on the language model, the vision tower as it is."""
    model = load_model(vlm_checkpoint(output, tiny), max_pixels=pixels(tiny))
    return finetune(model, train, evaluation, output_dir=output, overwrite=True, lora=True)


def vlm_checkpoint(output: Path, tiny: bool) -> str:
    """The name of the VLM, or the folder of a tiny one with random weights."""
    return tiny_llava(output.with_name("vlm-base")) if tiny else VLM


def pixels(tiny: bool) -> int | None:
    """Largest size of a page, in pixels; the tiny model has its own."""
    return None if tiny else MAX_PIXELS


WAYS: dict[str, Callable[[RetrievalDataset, RetrievalDataset, Path, bool], object]] = {
    "vlm": vlm,
    "router": router,
    "late-interaction": late_interaction,
    "lora": lora,
}


if __name__ == "__main__":
    main()
