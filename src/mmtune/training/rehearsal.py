"""The plan of a run, from a few steps of it that are timed.

The steps are real ones: of the model, the rows, the loss and the optimizer of the call. The weights are put back, and
what is saved to time it goes into a folder that is deleted.
"""

import copy
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import TrainerCallback

from mmtune.data.arrow import column
from mmtune.data.dataset import RetrievalDataset
from mmtune.evaluation.mean import AnyEvaluator
from mmtune.inference.page_store import MemoryPageStore, PageStore
from mmtune.inference.preprocessing import PageProcessing, processings_of
from mmtune.training.inputs import TrainingSets
from mmtune.training.plan import Plan
from mmtune.training.recipe import EVALUATIONS, EvenTenths
from mmtune.training.trainers import PageTrainer

TIMED_STEPS = 3

clock = time.perf_counter
"""Seconds; a benchmark on a busy machine puts those of the processor in their place."""

_SAMPLE_QUERIES, _SAMPLE_DOCUMENTS = 16, 48


@dataclass(frozen=True)
class Rehearsed:
    """What is needed to rehearse the evaluations of a run.

    Attributes:
        build: Makes the evaluator for some data.
        data: What is evaluated on, by name; then the guard sets.
        given: An evaluator of the caller; ``None`` without one.
    """

    build: Callable[[Mapping[str, RetrievalDataset]], AnyEvaluator]
    data: Sequence[Mapping[str, RetrievalDataset]]
    given: Any = None


def rehearse(
    trainer: PageTrainer,
    train: TrainingSets,
    evaluation: Rehearsed,
    store: PageStore | None,
    choices: Mapping[str, tuple[Any, str]],
    begun: "Begun",
) -> Plan:
    """Time a few steps, an evaluation of a few pages and a checkpoint, and tell what the run will come to.

    Args:
        trainer: Ready to train, its model within ``reading_pages``; no use after this.
        train: The training data.
        evaluation: The evaluation data.
        store: Where pages are kept.
        choices: As for ``Plan``.
        begun: When the call was.
    """
    known = processings_of(trainer.model)
    processing = known[0] if len(known) == 1 else None
    set_up_s = clock() - begun.at
    batches = len(trainer.get_train_dataloader())
    steps = count_steps(trainer, batches)
    evaluations, saves = count_events(trainer, steps, batches)
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in trainer.model.state_dict().items()}
    kept_bytes = 0 if torch.cuda.is_available() else sum(weight.nbytes for weight in kept.values())
    try:
        with tempfile.TemporaryDirectory(prefix="mmtune-") as folder:
            timed = _time_steps(trainer, processing, folder)
            save_s = _time_saving(trainer, Path(folder))
        evaluated = _time_evaluation(trainer, evaluation, evaluations, processing)
        peak = begun.memory.above_start() - kept_bytes
        if not begun.had_model:
            peak -= sum(weight.nbytes for weight in trainer.model.parameters())
        peak = max(peak, _bytes_of_training(trainer))
    finally:
        trainer.model.load_state_dict(kept)
    page_s = processing.seconds / processing.count if processing is not None and processing.count else 0.0
    page_bytes = processing.num_bytes / processing.count if processing is not None and processing.count else 0.0
    documents = count_documents(train)
    asks_with_images = any("image" in part.view.queries for part in train.by_name.values())
    measured = sum(
        len(data.corpus) + asks_with_images * len(data) for sets in evaluation.data for data in sets.values()
    )
    room = math.inf if store is None or not page_bytes else store.max_bytes / page_bytes
    reads = steps * timed.pages if store is None else documents + steps * timed.pages * _share_missed(documents, room)
    loads_beside = trainer.args.dataloader_num_workers > 0
    seconds = {
        "checks and loading": set_up_s,
        "training": steps * timed.seconds + (0.0 if loads_beside else reads * page_s),
        "evaluation": evaluated.total(evaluations, page_s, keeps=store is not None and measured + documents <= room),
        "saving": (saves + 1) * save_s,
    }
    stored = 0.0 if store is None else min(room, documents + (measured if evaluations else 0)) * page_bytes
    grows = max(0.0, stored - store.num_bytes) if isinstance(store, MemoryPageStore) else 0.0
    facts = {
        "training rows": train.num_rows,
        "batches an epoch": batches,
        "evaluations": evaluations,
        "checkpoints": saves,
        **timed.facts,
        **{f"seconds of {name}": f"{value:.1f}" for name, value in seconds.items()},
    }
    return Plan(steps, sum(seconds.values()), int(peak + grows), choices, facts)


def _share_missed(documents: int, room: float) -> float:
    return max(0.0, 1 - room / documents) if documents else 0.0


def _bytes_of_training(trainer: PageTrainer) -> int:
    """What gradients and the state of the optimizer hold; in a process that has trained before, the peak tells less."""
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else []
    held = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(value.nbytes for value in [*trained, *held])


# How much there is to do


def count_steps(trainer: PageTrainer, batches: int) -> int:
    """Steps of the optimizer, as the host counts them."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def count_events(trainer: PageTrainer, steps: int, batches: int) -> tuple[int, int]:
    """Evaluations, that before and that after training among them, and checkpoints."""
    args = trainer.args
    if any(isinstance(callback, EvenTenths) for callback in trainer.callback_handler.callbacks):
        events = {"eval": min(EVALUATIONS, steps), "save": min(EVALUATIONS, steps)}
    else:
        epochs = math.ceil(steps / max(1, math.ceil(batches / args.gradient_accumulation_steps)))
        events = {}
        for name, strategy, interval in (
            ("eval", args.eval_strategy, args.eval_steps),
            ("save", args.save_strategy, args.save_steps),
        ):
            share = interval or 1.0
            every = math.ceil(steps * share) if share <= 1 else int(share)
            # the recipe's trainer also evaluates and saves after the last step
            by_strategy = {"no": 0, "epoch": epochs, "steps": math.ceil(steps / max(1, every))}
            events[name] = by_strategy.get(str(getattr(strategy, "value", strategy)), EVALUATIONS)
    evaluates = trainer.evaluator is not None
    during = events["eval"] if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" else 0
    saves = events["save"] if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no" else 0
    return (during + 2 if evaluates else 0), saves


def count_documents(train: TrainingSets) -> int:
    """Different documents that the rows name, and queries that are read as documents are."""
    count = 0
    for part in train.by_name.values():
        ids = part.rows.with_format(None)
        kinds = [{"document_id", "document_ids", "negative_document_ids"}]
        kinds += [{"query_id", "query_ids"}] if "image" in part.view.queries else []
        for names in kinds:
            named = [column(ids, name) for name in names & set(ids.column_names)]
            flat = [pc.list_flatten(each) if pa.types.is_nested(each.type) else each for each in named]
            count += len(pa.chunked_array([each.cast(pa.large_string()) for each in flat], pa.large_string()).unique())
    return count


# What is timed


@dataclass(frozen=True)
class TimedSteps:
    """Steps that were timed.

    Attributes:
        seconds: Of one step, without what image processors took for it in this process.
        pages: That were read for one step.
        facts: What the batches were like.
    """

    seconds: float
    pages: float
    facts: Mapping[str, Any]


class _Watch(TrainerCallback):
    """Notes when each step ended, what image processors had taken by then, and how many pages they had made."""

    def __init__(self, processing: PageProcessing | None) -> None:
        self.processing = processing
        self.noted: list[tuple[float, float, int]] = []

    def note(self) -> None:
        """Take the time."""
        seconds = 0.0 if self.processing is None else self.processing.seconds
        self.noted.append((clock(), seconds, 0 if self.processing is None else self.processing.count))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The model is in its place."""
        self.note()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer has moved the weights."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.note()


def _time_steps(trainer: PageTrainer, processing: PageProcessing | None, folder: str) -> TimedSteps:
    args = copy.copy(trainer.args)
    args.max_steps, args.output_dir = TIMED_STEPS + 1, folder
    args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
    args.load_best_model_at_end = False
    trainer.args = args
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, EvenTenths) or not type(callback).__module__.startswith(("transformers.", "mmtune.")):
            trainer.remove_callback(callback)
    watch, shapes = _Watch(processing), _Shapes(trainer)
    trainer.add_callback(watch)
    with shapes.noted():
        trainer.train()
    seconds, pages = [], []
    for (start, made_s, made), (end, then_s, then) in zip(watch.noted, watch.noted[1:], strict=False):
        seconds.append(end - start - (then_s - made_s))
        pages.append(then - made)
    # the first step warms up what is made once
    return TimedSteps(statistics.median(seconds[1:] or seconds), statistics.fmean(pages), shapes.facts())


class _Shapes:
    """What the batches of a trainer are like."""

    def __init__(self, trainer: PageTrainer) -> None:
        self._trainer = trainer
        self._tokens: list[float] = []
        self._pixels: list[float] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Look at each batch that is trained on."""
        own = self._trainer.training_step

        def step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._look_at(inputs)
            return own(model, inputs, *args, **kwargs)

        self._trainer.training_step = step
        try:
            yield
        finally:
            del self._trainer.training_step

    def _look_at(self, inputs: Mapping[str, Any]) -> None:
        for name, value in inputs.items():
            if not name.endswith("_pixel_values"):
                continue
            column = name.removesuffix("_pixel_values")
            grids, mask = inputs.get(f"{column}_image_grid_thw"), inputs.get(f"{column}_attention_mask")
            count = len(value) if grids is None else len(grids)
            repeats = 1 if value.dtype == torch.uint8 or grids is None else 2
            self._pixels.append(value.numel() / 3 / repeats / max(1, count))
            if mask is not None:
                self._tokens.append(float(mask.sum()) / max(1, count))

    def facts(self) -> dict[str, Any]:
        """Means over the batches."""
        found = {"pixels a page": self._pixels, "tokens a page": self._tokens}
        return {name: f"{statistics.fmean(values):,.0f}" for name, values in found.items() if values}


def _time_saving(trainer: PageTrainer, folder: Path) -> float:
    started = clock()
    trainer.save_model(str(folder / "model"))
    if trainer.optimizer is not None and trainer.args.should_save:
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    return clock() - started


@dataclass(frozen=True)
class TimedEvaluation:
    """Evaluations that were timed, on a part of the data or on all.

    Attributes:
        seconds: Of one, when its pages have been processed before.
        pages: That it reads.
        scale: How many times as much there is to evaluate.
    """

    seconds: float = 0.0
    pages: int = 0
    scale: float = 0.0

    def total(self, evaluations: int, page_s: float, *, keeps: bool) -> float:
        """Seconds of all evaluations; with a store that has room each page is processed once."""
        read = (1 if keeps else evaluations) * self.pages * self.scale
        return evaluations * self.scale * self.seconds + (read * page_s if evaluations else 0.0)


def _time_evaluation(
    trainer: PageTrainer, evaluation: Rehearsed, evaluations: int, processing: PageProcessing | None
) -> TimedEvaluation:
    if not evaluations:
        return TimedEvaluation()
    samples = [{name: _sample_of(data) for name, data in sets.items()} for sets in evaluation.data]
    evaluators = [evaluation.build(sample) for sample in samples]
    evaluators += [] if evaluation.given is None else [evaluation.given]
    seconds = []
    before = 0 if processing is None else processing.count
    for _ in range(2):
        made = 0.0 if processing is None else processing.seconds
        started = clock()
        with trainer.as_saved():
            for evaluator in evaluators:
                evaluator(trainer.model)
        taken = 0.0 if processing is None else processing.seconds - made
        seconds.append(max(0.0, clock() - started - taken))  # threads may process more than one page at a time
    sizes = [
        sum(len(data.corpus) + len(data) for sets in each for data in sets.values())
        for each in (evaluation.data, samples)
    ]
    pages = 0 if processing is None else processing.count - before
    return TimedEvaluation(min(seconds), pages, sizes[0] / sizes[1] if samples else 1.0)


def _sample_of(data: RetrievalDataset) -> RetrievalDataset:
    """Some queries with what is relevant to them, and some more documents."""
    relevance = data.relevance
    queries = np.arange(min(_SAMPLE_QUERIES, len(data)))
    needed = np.unique(relevance.judged_document[np.isin(relevance.judged_query, queries)])
    others = np.setdiff1d(np.arange(len(data.corpus)), needed)[: max(0, _SAMPLE_DOCUMENTS - len(needed))]
    return RetrievalDataset.from_tables(relevance.subset(queries, np.union1d(needed, others)))


class Begun:
    """When a call was begun, and what memory was taken then.

    Attributes:
        had_model: Whether the model was in memory.
    """

    def __init__(self, *, had_model: bool) -> None:
        self.at, self.memory, self.had_model = clock(), PeakMemory(), had_model


class PeakMemory:
    """The most memory that this process holds from now on: of its GPU if it has one, else its own."""

    def __init__(self) -> None:
        gc.collect()
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            _forget_peak()
            self._start = _status_bytes("VmRSS")

    @staticmethod
    def of_process() -> int:
        """Bytes that this process has held at most, of its GPU if it has one; 0 where the system does not tell."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")

    def above_start(self) -> int:
        """Bytes, as far as the system tells."""
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _status_bytes("VmHWM")
        return max(0, peak - self._start)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not on Linux, or not allowed
        return


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
