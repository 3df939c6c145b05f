"""``distill_query_encoder``: a small encoder for queries, trained to give the embeddings of the tuned model."""

import copy
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss

from mmtune.arguments import require_flag, require_seed, shown
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind, as_host_input
from mmtune.data.identity import text_digest
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.errors import ConfigError
from mmtune.evaluation.pipeline import open_retriever
from mmtune.evaluation.retrieval import build_evaluator
from mmtune.inference.store import model_fingerprint
from mmtune.models.adapters import save_model
from mmtune.models.fresh import fresh_layers, mark_fresh
from mmtune.models.loading import describe_model, full_dimension
from mmtune.models.query_routes import route_queries
from mmtune.models.routers import Side
from mmtune.serving.gates import check_saved
from mmtune.training import recipe
from mmtune.training.checks import check_training_arguments, require_connected
from mmtune.training.embedding import kind_of
from mmtune.training.inputs import DatasetsLike, evaluation_sets
from mmtune.training.output import check_output_dir, delete_set_aside, only_run, recover, resolve_output_dir, set_aside
from mmtune.training.progress import progress_bars
from mmtune.training.records import RunRecord, describe_arguments, describe_structure, require_same
from mmtune.training.result import FinetuneResult, describe_recipe, describe_steps
from mmtune.training.trainers import EMBEDDING, PageTrainer

RECIPE: Mapping[str, Any] = {"num_train_epochs": 10, "learning_rate": 1e-4, "save_strategy": "no"}
"""What differs from the recipe of ``finetune``: texts are cheap, and the small encoder has a new space to learn."""
TIMED_QUERIES = 20


@dataclass(frozen=True)
class DistillationResult(FinetuneResult):
    """What a distillation gives: ``before`` is the model with its own query encoder, ``after`` with the small one."""

    @property
    def first_lines(self) -> list[str]:
        """What was kept, and what a query costs now."""
        facts, lines = self.settings["queries"], []
        before, after = (metrics.get(self.primary_metric or "") for metrics in (self.before, self.after))
        if before and after is not None:
            lines.append(
                f"The small query encoder keeps {after / before:.1%} of {self.measure}: {before:.4f} with the model's "
                f"own, {after:.4f} with it."
            )
        own, small = facts["ms_a_query_before"], facts["ms_a_query_after"]
        times = f", {own:.1f} with the model's own ({own / small:.1f} times as many)" if own else ""
        return [
            *lines,
            f"A query takes {small:.1f} ms on one core of a CPU{times}. Embeddings of documents are unchanged.",
        ]


def distill_query_encoder(
    model: SentenceTransformer | str | os.PathLike[str],
    text_encoder: Side,
    queries: Sequence[str] | DatasetLike,
    eval_dataset: DatasetsLike | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    documents: DocumentKind = "image",
    overwrite: bool = False,
    resume: bool = False,
    seed: int = 42,
    **training_arguments: Any,
) -> FinetuneResult:
    """Train a small text encoder to give the query embeddings of a tuned model, so that queries need no GPU.

    The small encoder learns the direction of each embedding, by cosine (NanoVDR, arXiv 2603.12824): the texts of
    queries are enough, and no page is read for it. What comes out is one model in which queries take the small encoder
    and documents go the way they went, so that an index stays valid to the bit.

    Args:
        model: The tuned model, or its checkpoint. It is not changed; its modules are part of the result.
        text_encoder: What becomes the query encoder: a checkpoint's name or folder, or a list of host modules. Pooling
            and a projection are added where they are missing. Modules are trained in place.
        queries: What to learn from: texts, or a dataset whose queries are taken. More texts of the kind that users type
            are better; they need no judgements.
        eval_dataset: What to measure on, with the model's own query encoder and with the small one; queries that are
            learned from say little, and a warning counts them. ``None`` measures nothing.
        output_dir: Folder for model and report; ``None`` is ``mmtune-output``.
        documents: What the model reads, and a document of ``eval_dataset`` is made of, as in ``finetune``.
        overwrite: Replace the run that ``output_dir`` holds.
        resume: Go on from its last checkpoint, by the same call; there are some with ``save_strategy="epoch"``.
        seed: Of the order of the texts.
        **training_arguments: Training arguments of the host by name, in place of ten epochs in batches of 64 at a
            learning rate of 1e-4.

    Returns:
        The model with the small query encoder; ``before`` has the metrics of the model with its own, ``after`` those
        with the small one. ``settings["queries"]`` has the milliseconds a query on one core. ``final/``,
        ``metrics.json`` and ``report.md`` are in ``output_dir``.

    Raises:
        ConfigError: An argument, a model or the output folder does not fit.
        DatasetError: The data can't be used.
        MissingExtraError: A model needs a package that is not installed.

    Example:
        >>> from mmtune import distill_query_encoder
        >>> from mmtune.testing import tiny_clip, tiny_text_encoder
        >>> result = distill_query_encoder(
        ...     tiny_clip("clip"), tiny_text_encoder("text"), ["total of march", "who signed"], output_dir="small"
        ... )
        >>> result.model.encode_query("total of march").shape
        (128,)
    """
    own = set(signature(distill_query_encoder).parameters) - {"training_arguments"}
    given = check_training_arguments(EMBEDDING, None, training_arguments, own=own)
    require_flag("overwrite", overwrite)
    require_flag("resume", resume)
    require_seed("seed", seed)
    if isinstance(model, CrossEncoder):
        raise ConfigError(
            "model=a CrossEncoder: it scores pairs and gives no embeddings of queries to learn from. Pass a "
            "SentenceTransformer, or its checkpoint."
        )
    if kind_of(model, documents) is not EMBEDDING:
        raise ConfigError(
            "model= is a late-interaction model, which has a vector for each token of a query: a small encoder can't "
            "learn them by their direction. Pass a SentenceTransformer, or its checkpoint."
        )
    texts = read_texts(queries)
    folder = resolve_output_dir(output_dir, None)
    with progress_bars(shown=given.get("disable_tqdm") is not True), only_run(folder):
        inputs = (model, text_encoder, queries, eval_dataset)
        checkpoint = check_output_dir(folder, overwrite=overwrite, resume=resume, inputs=inputs)
        evaluation = evaluation_sets(eval_dataset, documents)
        _warn_of_known(texts, evaluation)
        args: Any = recipe.training_arguments(
            EMBEDDING,
            len(texts),
            output_dir=str(folder),
            seed=seed,
            evaluates=False,
            in_batch_negatives=False,
            **{**RECIPE, **given},
        )
        require_connected(args)
        teacher = cast(SentenceTransformer, open_retriever(model, documents))
        routed = route_queries(teacher, text_encoder)
        evaluator = (
            build_evaluator(
                evaluation[""] if list(evaluation) == [""] else evaluation,
                model=teacher,
                documents=documents,
                batch_size=args.per_device_eval_batch_size,
                show_progress_bar=not args.disable_tqdm,
            )
            if evaluation
            else None
        )
        began_with = {
            **describe_arguments(args),
            "queries": f"{len(texts)} texts {text_digest(repr(texts))}",
            "model": model_fingerprint(teacher),
            "structure of the query encoder": describe_structure(routed.student),
        }
        began = RunRecord.read(checkpoint) if checkpoint else None
        if began:
            require_same(folder, began.settings, began_with)
        before = evaluator(teacher) if evaluator else {}
        record = began or RunRecord(began_with, {}, dict(before))
        trainer = _train(routed.student, teacher, texts, args, given, record, checkpoint)
        student, result_model = routed.student.eval(), routed.model.eval()
        after = evaluator(result_model) if evaluator else {}
        on_cpu = student if student.device.type == "cpu" else copy.deepcopy(student).to("cpu")
        facts = {
            "texts": len(texts),
            "query_encoder": list(routed.notes),
            "parameters_of_query_encoder": sum(weight.numel() for weight in student.parameters()),
            "ms_a_query_before": milliseconds_a_query(teacher, texts),
            "ms_a_query_after": milliseconds_a_query(on_cpu, texts),
        }
        settings = {
            "model": describe_model(result_model),
            "data": {f"{name}: evaluation_queries".removeprefix(": "): len(part) for name, part in evaluation.items()},
            "training": {**describe_recipe(trainer), **describe_steps(trainer)},
            "queries": facts,
        }
        metric = evaluator.primary_metric if evaluator else None
        result = DistillationResult(result_model, trainer, dict(before), dict(after), metric, folder, settings)
        if trainer.is_world_process_zero():
            with _replacing(folder, overwrite=overwrite):
                save_model(result_model, folder / "final")
                measured = next((part.training_rows(documents=documents) for part in evaluation.values()), None)
                rows = measured or Dataset.from_dict({"query": texts})
                settings["gates"] = check_saved(result_model, folder / "final", rows, may_be_base=False)
                result.save({}, documents)
        trainer.accelerator.wait_for_everyone()
        return result


def read_texts(queries: Any) -> list[str]:
    """The distinct texts to learn from, in their order.

    Raises:
        ConfigError: There are fewer than two, or one is no text or blank.
        DatasetError: The dataset can't be read.
    """
    is_dataset = isinstance(queries, (str, os.PathLike, Dataset, RetrievalDataset))
    if not is_dataset and not isinstance(queries, Sequence):
        raise ConfigError(f"queries={shown(queries)}: expected texts in a list, or a dataset whose queries are taken.")
    given = as_retrieval_dataset(queries, "queries").queries["text"][:] if is_dataset else list(queries)
    for position, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"queries[{position}]={shown(text)}: expected a text that is not blank. Leave it out.")
    texts = list(dict.fromkeys(given))
    if len(texts) < 2:
        raise ConfigError(f"queries has {len(texts)} distinct texts. Expected two or more, and thousands for good use.")
    return texts


def _warn_of_known(texts: Sequence[str], evaluation: Mapping[str, RetrievalDataset]) -> None:
    known = set(texts)
    for data in evaluation.values():
        asked = set(data.queries["text"][:])
        if asked & known:
            warnings.warn(
                f"{len(asked & known)} of the {len(asked)} evaluation queries are among those that the encoder learns "
                "from, so the result says little about new ones. Leave them out of queries=.",
                stacklevel=3,
            )


def _train(
    student: SentenceTransformer,
    teacher: SentenceTransformer,
    texts: Sequence[str],
    args: Any,
    given: Mapping[str, Any],
    record: RunRecord,
    checkpoint: Path | None,
) -> PageTrainer:
    """Train the student, in place, towards the direction of the teacher's embeddings at their full size."""
    inputs = [as_host_input(text) for text in texts]
    targets = teacher.encode_query(
        inputs,
        batch_size=args.per_device_eval_batch_size,
        show_progress_bar=not args.disable_tqdm,
        truncate_dim=full_dimension(teacher),
    )
    features = Features({"query": Value("string"), "label": List(Value("float32"))})
    rows = Dataset.from_dict({"query": list(texts), "label": np.asarray(targets, dtype=np.float32)}, features=features)
    fresh = fresh_layers(student)
    rates = recipe.choose_rates(args, student, fresh, None, given)
    loss = EmbedDistillLoss(student, distance_metric="cosine")
    prompt = student.prompts.get("query") or ""
    prompts = {"query": prompt} if prompt else {}
    args = recipe.complete_arguments(args, student, loss, ["query"], prompts=prompts, metric=None, rates=rates)
    # there is one forward pass a step, and no text reaches the pooler of a BERT
    args.ddp_find_unused_parameters = given.get("ddp_find_unused_parameters", True)
    trainer = EMBEDDING.trainer_class(model=student, args=args, train_dataset=rows, loss=loss)
    trainer.record = record
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.check_weights()
    for layer in fresh.values():
        mark_fresh(layer, fresh=False)
    return trainer


def milliseconds_a_query(model: SentenceTransformer, texts: Sequence[str]) -> float | None:
    """The median time of one core to embed a query by itself; ``None`` for a model that is not on the CPU.

    It is the processor's time: what else runs on the machine does not count.
    """
    if model.device.type != "cpu":
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for text in (texts[0], *texts[:TIMED_QUERIES]):  # the first one warms up
            began = time.process_time()
            model.encode_query(as_host_input(text), show_progress_bar=False)
            seconds.append(time.process_time() - began)
        return 1000 * statistics.median(seconds[1:])
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _replacing(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """While the result is written: the run that it replaces is kept until it stands."""
    if overwrite:
        set_aside(folder)
    try:
        yield
        delete_set_aside(folder)
    except BaseException:
        recover(folder)
        raise
