"""A small query encoder beside a deeper model: nDCG@10 kept on unseen queries, and milliseconds a query on one core.

    python benchmarks/query_encoder.py --seeds 0 1 2

A tiny CLIP is finetuned on drawn pages; a BERT of one layer then learns its query embeddings from the training queries
alone. Pages are embedded before and after: the last column says whether all bits are the same. A second table has the
milliseconds a query beside models of other depths and widths, with random weights: time does not depend on these.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel

from mmtune import RetrievalDataset, distill_query_encoder, finetune, load_model
from mmtune.models.query_routes import route_queries
from mmtune.testing import generated_pages, tiny_clip, tiny_text_encoder
from mmtune.training.query_encoder import milliseconds_a_query


def deepen(path: Path, layers: int) -> str:
    """Give a trained CLIP more layers, which add nothing at first: a random one of twelve learns too slowly."""
    model = CLIPModel.from_pretrained(path)
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    deep = CLIPModel(config)
    for tower in (deep.text_model, deep.vision_model):
        for layer in tower.encoder.layers:
            for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)
    deep.load_state_dict(model.state_dict(), strict=False)
    deep.save_pretrained(path)
    return str(path)


def measure(seed: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """One row of the table."""
    data = RetrievalDataset.from_id_rows(generated_pages(options.pages, num_negatives=1, seed=seed))
    train, evaluation = data.split(options.eval_queries, seed=seed)
    common: dict[str, Any] = {"matryoshka_dims": None, "keep": "last", "eval_strategy": "no", "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 32, "disable_tqdm": True, "seed": seed}
    clip = tiny_clip(folder / "clip", hidden_size=options.hidden, seed=seed)
    steps = {"num_train_epochs": 6, "learning_rate": options.learning_rate}
    teacher = finetune(clip, train, evaluation, output_dir=folder / "shallow", **steps, **common).model
    if options.layers > 2:
        deep = deepen(folder / "shallow" / "final", options.layers)
        steps = {"num_train_epochs": options.epochs, "learning_rate": options.learning_rate / 4}
        teacher = finetune(deep, train, evaluation, output_dir=folder / "deep", **steps, **common).model
    pages = [row["image"] for row in generated_pages(20, seed=seed + 1)]
    embedded = teacher.encode_document(pages, convert_to_tensor=True)
    began = time.process_time()
    result = distill_query_encoder(
        teacher,
        tiny_text_encoder(folder / "text", num_layers=1, seed=seed),
        train,
        evaluation,
        output_dir=folder / "small",
        num_train_epochs=20,
        learning_rate=1e-3,
        disable_tqdm=True,
        seed=seed,
    )
    took = time.process_time() - began
    same = torch.equal(embedded, result.model.encode_document(pages, convert_to_tensor=True))
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    own, small = result.settings["queries"]["ms_a_query_before"], result.settings["queries"]["ms_a_query_after"]
    numbers = [f"{before:.4f}", f"{after:.4f}", f"{after / before:.1%}", f"{own:.2f}", f"{small:.2f}"]
    return [str(seed), *numbers, f"{own / small:.1f}", f"{took:.0f}", str(same)]


def time_beside(layers: int, hidden: int, folder: Path) -> str:
    """A row of the table of times."""
    teacher = load_model(tiny_clip(folder / f"clip-{layers}-{hidden}", num_layers=layers, hidden_size=hidden))
    small = route_queries(teacher, tiny_text_encoder(folder / f"text-{layers}-{hidden}", num_layers=1)).student.eval()
    texts = [f"what was the turnover of the year {year} in the north" for year in range(1980, 2020)]
    times = [milliseconds_a_query(model, texts) or 0.0 for model in (teacher, small)]
    return f"| {layers} x {hidden} | {times[0]:.2f} | {times[1]:.2f} | {times[0] / times[1]:.1f} |"


def main() -> None:
    """Measure each seed and print a row for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--pages", type=int, default=700)
    parser.add_argument("--eval-queries", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(seed, options, Path(folder)))
    print("| seed | own | small | kept | ms own | ms small | times | CPU s | pages equal |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print("\n| layers x width | ms own | ms small | times |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for layers, hidden in ((12, 256), (12, 512), (24, 512)):
            print(time_beside(layers, hidden, Path(folder)))


if __name__ == "__main__":
    main()
