"""Rerankers from random weights that must learn. 45 to 110 seconds of CPU time each; ``make slow`` runs them."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image, ImageDraw
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from mmtune import FinetuneResult, RetrievalDataset, build_reranker, build_reranking_evaluator, finetune_reranker
from mmtune.arguments import MediaLimits
from mmtune.models.recordings import apply_media_limits
from mmtune.models.rerankers import HEADS
from mmtune.testing import tiny_qwen3_vl
from seeds import SEEDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    # four colours are all the words that there are: new pages are asked for with the same ones
    pytest.mark.filterwarnings("ignore:Training has seen a part of the evaluation:UserWarning"),
]

DIRECTIONS = ("text_to_image", "image_to_text")
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200), "yellow": (220, 200, 40)}
SHAPES = ("square", "circle")
GREY = (128, 128, 128)
SIZE_PX = 64
NUM_NEGATIVES = 9
NUM_FRAMES = 8
CHANCE = 0.454
"""nDCG@10 of one relevant among ten in random order.

A score that orders the colours and knows nothing of the other side comes to 0.513: of ten candidates, three each are of
the three other colours, and the relevant one is first, fourth, seventh or last.
"""


def drawn(colour: tuple[int, int, int], shape: str, random: np.random.Generator) -> np.ndarray:
    """A page of one colour, or with a shape of that colour, and with noise, so that no two are byte-identical."""
    page = Image.new("RGB", (SIZE_PX, SIZE_PX), "white" if shape else colour)
    if shape:
        draw = ImageDraw.Draw(page)
        (draw.ellipse if shape == "circle" else draw.rectangle)((8, 8, SIZE_PX - 8, SIZE_PX - 8), fill=colour)
    return np.clip(np.asarray(page) + random.integers(-8, 9, (SIZE_PX, SIZE_PX, 3)), 0, 255).astype("uint8")


def to_png(page: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(page).save(buffer, "PNG")
    return buffer.getvalue()


def to_mp4(frames: list[np.ndarray]) -> bytes:
    av, buffer = pytest.importorskip("av"), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"qp": "0", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = SIZE_PX, SIZE_PX, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def coloured_pages(
    count: int, seed: int, *, shapes: tuple[str, ...] = ("",), blank: bool = False, num_frames: int = 0
) -> RetrievalDataset:
    """Pages and a query for each, which names what is on the page; nine pages of other looks are its negatives.

    The number in a query tells it from the others of its kind and says nothing. As the looks take turns, each page is a
    negative of nine queries, too: in both directions there are ten candidates with one relevant.

    Args:
        count: Pages, a multiple of the number of looks.
        seed: Of the noise.
        shapes: What is drawn in the colour; ``""`` fills the page.
        blank: Whether all pages are grey instead.
        num_frames: Of clips, in the place of pages.
    """
    random = np.random.default_rng(seed)
    looks = [(colour, shape) for shape in shapes for colour in COLOURS]
    steps = [step for step in range(1, count) if step % len(looks)][:NUM_NEGATIVES]
    rows = []
    for row in range(count):
        colour, shape = looks[row % len(looks)]
        look = (GREY, "") if blank else (COLOURS[colour], shape)
        drawings = [drawn(*look, random) for _ in range(num_frames or 1)]
        rows.append(
            {
                "id": f"{seed}-{row}",
                "query": f"a {colour} {shape or 'page'} ({row})",
                **({"video": to_mp4(drawings)} if num_frames else {"image": to_png(drawings[0])}),
                "negatives": [f"{seed}-{(row + step) % count}" for step in steps],
            }
        )
    return RetrievalDataset.from_id_rows(Dataset.from_list(rows))


def trained(
    folder: Path,
    head: str,
    seed: int,
    *,
    num_steps: int = 200,
    shapes: tuple[str, ...] = ("",),
    documents: str = "image",
) -> FinetuneResult:
    model = build_reranker(
        tiny_qwen3_vl(folder / "base", max_pixels=SIZE_PX * SIZE_PX, seed=seed),
        head=head,
        # short ones: most of the time of so small a model goes into the tokens of the prompt
        prompts={"text_to_image": "Page?", "image_to_text": "Text?"},
        device="cpu",
    )
    # beside every two frames stands their time, in a dozen tokens: of all eight nothing is learned in so few steps
    apply_media_limits(model, MediaLimits(max_frames=2))
    look = {"shapes": shapes, "num_frames": NUM_FRAMES if documents == "video" else 0}
    return finetune_reranker(
        model,
        coloured_pages(240, seed, **look),
        coloured_pages(48, 1000 + seed, **look),
        documents=documents,
        output_dir=folder / "run",
        directions=DIRECTIONS,
        learning_rate=1e-3,
        max_steps=num_steps,
        per_device_train_batch_size=32,
        eval_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )


def ndcg(model: CrossEncoder, data: RetrievalDataset, direction: str, documents: str = "image") -> float:
    evaluator = build_reranking_evaluator(data, direction=direction, documents=documents, show_progress_bar=False)
    assert {len(each.candidate_ids) for each in evaluator.lists} == {10}
    assert {each.all_gains for each in evaluator.lists} == {(1,)}
    return evaluator(model)[evaluator.primary_metric]


def ndcg_of_empty_queries(model: CrossEncoder, data: RetrievalDataset) -> float:
    """By the host's own evaluator, with the same candidates."""
    image_by_id = {
        row["document_id"]: Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in data.corpus
    }
    samples = []
    for each in build_reranking_evaluator(data, show_progress_bar=False).lists:
        pages = {True: [], False: []}
        for candidate, gain in zip(each.candidate_ids, each.gains, strict=True):
            pages[gain > 0].append(image_by_id[candidate])
        samples.append({"query": {"text": ""}, "positive": pages[True], "negative": pages[False]})
    host = CrossEncoderRerankingEvaluator(samples, at_k=10, show_progress_bar=False, write_csv=False)
    return host(model)[host.primary_metric]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_reranker_learns_both_directions_and_uses_both_sides(
    head: str, seed: int, qwen3_vl_path: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = trained(tmp_path, head, seed)
    keys = {direction: f"vdr-rerank-{direction.replace('_', '-')}_ndcg@10" for direction in DIRECTIONS}
    by_direction = {direction: (result.before[key], result.after[key]) for direction, key in keys.items()}
    blank = coloured_pages(96, 2000 + seed, blank=True)
    blind = {direction: ndcg(result.model, blank, direction) for direction in DIRECTIONS}
    unasked = ndcg_of_empty_queries(result.model, coloured_pages(96, 1000 + seed))
    with capsys.disabled():
        sys.stdout.write(f"\n{head}, seed {seed}: {by_direction}, blank pages {blind}, empty queries {unasked:.4f}\n")
    for before, after in by_direction.values():
        assert before <= 0.6
        assert after >= 0.9
    assert blind == pytest.approx(dict.fromkeys(DIRECTIONS, CHANCE), abs=0.1)
    assert unasked == pytest.approx(CHANCE, abs=0.1)


def test_a_reranker_of_clips_learns_both_directions(
    qwen3_vl_path: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = trained(tmp_path, "logit_score", 0, num_steps=240, documents="video")
    keys = {direction: f"vdr-rerank-{direction.replace('_', '-')}_ndcg@10" for direction in DIRECTIONS}
    by_direction = {direction: (result.before[key], result.after[key]) for direction, key in keys.items()}
    blank = coloured_pages(96, 2000, blank=True, num_frames=NUM_FRAMES)
    blind = {direction: ndcg(result.model, blank, direction, "video") for direction in DIRECTIONS}
    with capsys.disabled():
        sys.stdout.write(f"\nclips: {by_direction}, blank clips {blind}\n")
    for before, after in by_direction.values():
        assert before <= 0.6
        assert after >= 0.8
    assert blind == pytest.approx(dict.fromkeys(DIRECTIONS, CHANCE), abs=0.1)


def test_colour_and_shape_as_it_comes(qwen3_vl_path: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No floor: whether the shape is learned, too, depends on the seed."""
    result = trained(tmp_path, "logit_score", 0, shapes=SHAPES)
    with capsys.disabled():
        sys.stdout.write(f"\ncolour and shape:\n{result}\n")
    assert result.after
