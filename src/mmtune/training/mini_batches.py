"""How many rows go through a model at once: found on the device by a real pass over the largest pages."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from sentence_transformers.base.losses import uses_gradient_cache
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from mmtune.data.documents import as_host_input
from mmtune.data.pages import Page
from mmtune.inference.encoder import Retriever
from mmtune.inference.preprocessing import reading_pages
from mmtune.models.memory import optimizer_bytes, portions_of
from mmtune.training.inputs import TrainingSets

logger = logging.getLogger(__name__)

MINI_BATCHES = "mini-batches"
"""Their key in the record of a run."""

_SHARE = 0.85
"""Of the memory of a device; the rest is for gaps between tensors, and for batches that are larger than those tried."""
_LOOKED_AT = 512


@dataclass(frozen=True)
class MiniBatches:
    """How a batch goes through the model.

    Attributes:
        size: Rows in one pass.
        is_cached: Whether gradients are cached, so that a batch takes several passes. Without, it takes one, and a
            third less work: the first pass needs no second one.
        reason: Why, as a sentence without its full stop.
    """

    size: int
    is_cached: bool
    reason: str


def describe_mini_batches(loss: Any, batch_size: int) -> dict[str, Any]:
    """How a loss takes a batch, for the record of a run, which goes on as it began."""
    first = plain_losses(loss)[0]
    return {"size": getattr(first, "mini_batch_size", None) or batch_size, "is_cached": uses_gradient_cache(first)}


def plain_losses(loss: Any) -> list[Any]:
    """Each loss of a call, that of several datasets or the one, out of its ``MatryoshkaLoss``."""
    losses = list(loss.values()) if isinstance(loss, Mapping) else [loss]
    return [part.loss if isinstance(part, MatryoshkaLoss) else part for part in losses]


def halve_mini_batches(loss: Any) -> int | None:
    """Let a loss take mini-batches of half the size: that size; ``None`` where they can't be smaller."""
    losses = plain_losses(loss)
    size = min(getattr(part, "mini_batch_size", None) or 1 for part in losses) // 2
    if not size:
        return None
    for part in losses:
        part.mini_batch_size = size
    return size


def choose_mini_batches(
    model: Retriever, args: BaseTrainingArguments, train: TrainingSets, began: dict[str, Any] | None
) -> MiniBatches:
    """The largest mini-batches that fit, the same in all processes.

    On a GPU a real forward and backward pass over the largest pages is tried with more and more of them. Where the
    whole batch fits with all its documents, gradients are not cached. Elsewhere the size goes by that of the model.

    Args:
        model: On its device.
        args: The host's arguments.
        train: The training data.
        began: ``describe_mini_batches`` of the run that goes on; ``None`` for a new one.
    """
    batch_size = args.per_device_train_batch_size
    if began is not None:
        return MiniBatches(began["size"], began["is_cached"], "the run began with it")
    if model.device.type != "cuda":
        parameters = sum(parameter.numel() for parameter in model.parameters())
        size = 1 if parameters > 1_000_000_000 else 8 if parameters > 150_000_000 else 32
        return MiniBatches(min(size, batch_size), True, "by the number of parameters")
    documents = batch_size * (1 + max(part.view.num_negatives for part in train.by_name.values()))
    pages = largest_documents(train, min(documents, _LOOKED_AT))
    found = largest_that_fits(lambda count: _fits(model, args, pages, count), documents)
    found = min(gather_object([found]))
    if found >= documents:
        return MiniBatches(batch_size, False, f"the whole batch of {documents} documents fits at once")
    size = max(1, min(found, batch_size))
    return MiniBatches(size, True, f"the largest of which one pass fits, with {1 - _SHARE:.0%} to spare")


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 1, 2, 4, ... and ``most`` that fits, tried in this order; 0 where not even 1 does."""
    found, tried = 0, 1
    while fits(tried):
        found = tried
        if tried >= most:
            break
        tried = min(2 * tried, most)
    return found


def largest_documents(train: TrainingSets, count: int) -> list[Any]:
    """``count`` times the largest document among some hundred of the training data, as a model takes it.

    Queries are among them where they are no texts.
    """
    best, best_size = None, -1
    for part in train.by_name.values():
        source = part.view.lazily().source
        sides = [(part.data.corpus["document_id"], source.reader)]
        sides += [(part.data.queries["query_id"], source.queries)] if part.view.queries != "text" else []
        for ids, reader in sides:
            at = np.unique(np.linspace(0, len(ids) - 1, min(_LOOKED_AT, len(ids))).astype(int))
            for document in reader.read([ids[int(row)] for row in at]):
                size = _size_of(document)
                if size > best_size:
                    best, best_size = document, size
    return [as_host_input(best)] * count


def _size_of(document: Any) -> int:
    if isinstance(document, Page):
        return document.size[0] * document.size[1]
    if isinstance(document, dict):
        return sum(_size_of(part) for part in document.values())
    return len(document)


def _fits(model: Retriever, args: BaseTrainingArguments, documents: Sequence[Any], count: int) -> bool:
    """Whether a forward and a backward pass over ``count`` documents leaves room for the optimizer."""
    device = model.device
    total = torch.cuda.get_device_properties(device).total_memory
    taken_by_others = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
    state = optimizer_bytes(portions_of(model), compensated=True)  # not there yet
    was_training = model.training
    model.train()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        given = [documents[at % len(documents)] for at in range(count)]
        with reading_pages(model), torch.autocast("cuda", torch.bfloat16, enabled=bool(args.bf16)):
            features = model.preprocess(given)
            features = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in features.items()}
            outputs = model(features)
        outputs.get("sentence_embedding", outputs.get("token_embeddings")).float().sum().backward()
        peak = torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        torch.cuda.empty_cache()
    fits = peak + state + taken_by_others <= _SHARE * total
    logger.info("A pass over %d documents takes %.1f GB%s.", count, peak / 1e9, "" if fits else ", which is too much")
    return fits
