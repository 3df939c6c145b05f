"""What ``finetune`` and ``finetune_reranker`` share: a call from its arguments to its result."""

import copy
import errno
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.training_args import BaseTrainingArguments
from sentence_transformers.util.distributed import distributed_evaluation
from torch import nn
from tqdm.auto import tqdm

from mmtune.arguments import ALL_OF_IT, MIXED, listed
from mmtune.data.dataset import RetrievalDataset
from mmtune.data.documents import DocumentKind
from mmtune.data.query_kinds import QueryKind
from mmtune.errors import ConfigError
from mmtune.evaluation.history import CHECKPOINT_FILE, PER_QUERY_FILE, History
from mmtune.evaluation.mean import AnyEvaluator
from mmtune.evaluation.significance import Verdict
from mmtune.evaluation.verdict import describe_measuring, judge
from mmtune.host import is_in_parts, let_read_typed_texts
from mmtune.inference.page_store import open_page_store
from mmtune.inference.preprocessing import reading_pages
from mmtune.models.adapters import encoders_of, has_lora, save_model
from mmtune.models.fresh import fresh_layers, guess_fresh_layers, mark_fresh
from mmtune.models.kinds import HostModel
from mmtune.models.loading import check_documents, describe_model, load_host_model
from mmtune.models.lora import LoraChoice, add_lora, check_lora
from mmtune.models.opening import LoadOptions
from mmtune.models.parts import describe_training, freeze_parts, model_parts, part_names
from mmtune.models.pixels import PixelLimits, limit_pixels
from mmtune.models.precision import convert_to_saved, learn_score_in_float32, score_in_float32
from mmtune.models.recordings import apply_media_limits, read_all_frames
from mmtune.models.routes import check_routes, freeze_unreached
from mmtune.serving.gates import check_saved
from mmtune.training import recipe
from mmtune.training.call import Finetuning
from mmtune.training.callbacks import AfterFirstSave, StartCompetes
from mmtune.training.checks import (
    check_choices,
    check_early_stopping,
    check_host_arguments,
    check_metric,
    check_resumed,
    check_training_arguments,
)
from mmtune.training.evaluators import GUARD, RunEvaluator
from mmtune.training.inputs import TrainingSets, check_pages, evaluation_sets, refuse_overlap, warn_of_leaks
from mmtune.training.interruption import Interrupted, SavesWhenAsked
from mmtune.training.mini_batches import MINI_BATCHES, describe_mini_batches
from mmtune.training.output import (
    START,
    check_output_dir,
    delete_set_aside,
    find_run,
    is_finished,
    is_first_process,
    only_run,
    recover,
    resolve_output_dir,
    set_aside,
)
from mmtune.training.plan import Plan, describe_choices
from mmtune.training.progress import progress_bars
from mmtune.training.records import (
    RunRecord,
    as_json,
    checkpoints_of,
    describe_arguments,
    describe_checkpoint,
    describe_content,
    describe_structure,
    describe_training_data,
    require_same,
    why_unusable,
)
from mmtune.training.rehearsal import Begun, PeakMemory, Rehearsed, rehearse
from mmtune.training.result import KEPT_START, FinetuneResult, describe_data, describe_recipe, describe_steps
from mmtune.training.trainers import Kind, PageTrainer
from mmtune.training.weights import (
    COMPENSATED,
    SavedTypes,
    WeightsChoice,
    choose_weights,
    describe_weights,
    saved_types,
    warn_of_rounding,
)

_WEIGHTS = "type of the weights"
_LIMITS = ("min_pixels", "max_pixels", "media_limits")
_NOT_DECIDING = {
    # told apart by what they hold
    *("model", "train_dataset", "eval_dataset", "guard_dataset", "args", "training_arguments"),
    # may change from call to call of one run
    *("kind", "output_dir", "overwrite", "resume", "allow_overlap", "mini_batch_size", "callbacks", "evaluator"),
    *("page_store", "dry_run", "thumbnails"),
}


def run(call: Finetuning) -> FinetuneResult | Plan:
    """A call from its arguments to its result; no bars where the training arguments want none.

    With ``dry_run`` to its plan, and nothing is left in the output folder.
    """
    # what can be known before weights load is checked before, the cheapest first
    own_names = {field.name for field in fields(call)} - {"kind", "training_arguments"}
    given = check_training_arguments(call.kind, call.args, call.training_arguments, own=own_names)
    check_choices(call)
    call = replace(call, training_arguments=given)
    call.check_arguments()
    check_lora(call.lora)
    folder = resolve_output_dir(call.output_dir, call.args.output_dir if call.args else None)
    if call.dry_run:
        with tempfile.TemporaryDirectory(prefix="mmtune-") as scratch, progress_bars(shown=False):
            return _run_in(Path(scratch), call)
    quiet = call.args.disable_tqdm if call.args else given.get("disable_tqdm")
    try:
        with progress_bars(shown=quiet is not True), only_run(folder):
            return _run_in(folder, call)
    except Interrupted as interrupted:
        raise interrupted.end from None


def _run_in(folder: Path, call: Finetuning) -> FinetuneResult | Plan:
    began_at = time.monotonic()
    begun = Begun(had_model=isinstance(call.model, nn.Module)) if call.dry_run else None
    inputs = (call.model, call.train_dataset, call.eval_dataset)
    is_over = call.resume == "auto" and is_finished(folder)
    checkpoint = check_output_dir(folder, overwrite=call.overwrite, resume=call.resume, inputs=inputs)

    train = call.read_rows(call.form_of(call.loss))
    evaluation = evaluation_sets(call.eval_dataset, call.documents, call.queries)
    guard = evaluation_sets(call.guard_dataset, call.documents, call.queries, "guard_dataset")
    for measured in (evaluation, guard):
        if not call.allow_overlap:
            refuse_overlap(train, measured)
            warn_of_leaks(train, measured)
    args = _fit_arguments(call, folder, train, evaluation, guard)
    began_with = _describe_beginning(call, args, train, evaluation, guard)
    if is_first_process() and not checkpoint and not is_over:  # a run that goes on has read these pages before
        check_pages(train, [*evaluation.values(), *guard.values()], call.documents, call.queries)
    if is_over:
        require_same(folder, RunRecord.read(folder).settings, began_with)
        return FinetuneResult.read(folder, call.kind)
    began = RunRecord.read(checkpoint) if checkpoint else None
    if began:
        require_same(folder, began.settings, began_with)

    kinds = {"documents": call.documents, "queries": call.queries}
    choices = {**kinds, "freeze": call.freeze, "lora": call.lora, "seed": call.seed}
    weights = choose_weights(call, args, began.settings.get(_WEIGHTS) if began else None)
    began_with[_WEIGHTS] = weights.name
    with ready_model(call.model, call.kind, max_pixels=call.max_pixels, weights=weights, **choices) as start:
        model = start.model
        check_resumed(checkpoint, has_adapters=bool(start.facts["lora"]))
        began_with["structure of the model"] = describe_structure(model)
        began_with["limits of the model"] = {name: start.facts[name] for name in _LIMITS}
        if began:
            require_same(folder, began.settings, began_with)
        loss = call.build_loss(model, args, train, began)
        began_with[MINI_BATCHES] = describe_mini_batches(loss, args.per_device_train_batch_size)
        if call.form_of(loss) != train.form:  # a callable has only now told what it makes
            train = call.read_rows(call.form_of(loss))
            args = _fit_arguments(call, folder, train, evaluation, guard)

        build_evaluator = partial(call.build_evaluator, model=model, loss=loss, args=args)
        evaluator: Any = None
        if evaluation or call.evaluator is not None:
            evaluator = RunEvaluator(
                build_evaluator(evaluation) if evaluation else None,
                call.evaluator,
                build_evaluator(guard, name=GUARD) if guard else None,
                History.read(checkpoint) if checkpoint else None,
            )
            if checkpoint and evaluator.tells_values and not evaluator.history.values:
                warnings.warn(
                    f"{checkpoint.name} has no {CHECKPOINT_FILE}, with what each query scored before: the run "
                    f"goes on without a verdict{' and without its guard set' if guard else ''}.",
                    stacklevel=4,
                )
        rates = None if call.args else recipe.choose_rates(args, model, start.fresh, began, call.training_arguments)
        args = recipe.complete_arguments(
            args,
            model,
            loss,
            train.columns,
            prompts=call.settle_prompts(model, train, args),
            metric=(evaluator.metric_name(model) or None) if evaluator else None,
            rates=rates,
            saved_steps=recipe.steps_of_fractions(args, checkpoint),
        )
        if not call.args and "dataloader_num_workers" not in call.training_arguments:
            args.dataloader_num_workers = recipe.fit_workers(args, model, train.columns)
        warn_of_rounding(model, args)
        follows_tenths = not call.args and not recipe.follows_own_schedule(call.training_arguments)
        trainer = call.kind.trainer_class(
            model=model,
            args=args,
            train_dataset=train.for_host,
            loss=loss,
            evaluator=evaluator,
            callbacks=[*([recipe.EvenTenths()] if follows_tenths else []), *call.callbacks],
        )
        trainer.saved_types, trainer.compensates = start.saved_types, (rates or {}).get("optim") == COMPENSATED

        own, found = call.describe(train, evaluator, model, loss), describe_data(train, evaluation)
        settings = {
            "model": start.facts,
            "data": {**found["data"], **own["data"], "seed_of_filling": call.seed},
            "training": {**describe_recipe(trainer), **describe_weights(trainer, weights), **own["training"]},
            "audit": found["audit"],
            "call": call.describe_call(),
        }
        is_shared = trainer.args.world_size > 1 or trainer.args.dataloader_num_workers > 0
        with (
            open_page_store(call.page_store, folder, is_shared=is_shared) as store,
            reading_pages(model, store) as reading,
        ):
            settings["training"] |= {"pages": reading, "page_store": str(store)}
            if begun is not None:
                choices = describe_choices(call, trainer, settings)
                measured = Rehearsed(build_evaluator, [part for part in (evaluation, guard) if part], call.evaluator)
                return rehearse(trainer, train, measured, store, choices, begun)
            before = began.before if began else measure(trainer, evaluator)
            if began and evaluator and not primary_of(evaluator, model):
                measure(trainer, evaluator)  # evaluators of the host tell their metric when they have been called
            recipe.settle_metric(trainer.args, primary_of(evaluator, model))
            check_metric(trainer.args, before)
            trainer.record = began or RunRecord(began_with, rates or {}, before)
            # without overwrite, what a start from the beginning finds is what a kill left
            leftover = not checkpoint and bool(find_run(folder))
            with _written_in(folder, trainer, overwrite=call.overwrite or leftover):
                settle_size = partial(call.settle_size, model, loss, args, evaluation)
                writing = Writing(folder, evaluation, call.documents, call.thumbnails, settle_size, began_at)
                return _train(trainer, evaluator, start, settings, writing, checkpoint)


def _fit_arguments(
    call: Finetuning,
    folder: Path,
    train: TrainingSets,
    evaluation: Mapping[str, RetrievalDataset],
    guard: Mapping[str, RetrievalDataset],
) -> BaseTrainingArguments:
    """The caller's arguments, or the recipe's for these rows, checked against the data."""
    evaluates = bool(evaluation) or call.evaluator is not None
    facts = {"evaluates": evaluates, "in_batch_negatives": train.form == "columns"}
    kept = {"load_best_model_at_end": False} if call.keep == "last" else {}
    args = call.args or recipe.training_arguments(
        call.kind,
        train.num_rows,
        output_dir=str(folder),
        seed=call.seed,
        **facts,
        **{**kept, **call.training_arguments},
    )
    check_host_arguments(args, **facts)
    check_early_stopping(args, call.callbacks)
    for measured in (evaluation, guard):
        call.check_data(train, measured, args)
    if call.dry_run:  # nothing is written, published or reported
        args = copy.copy(args)
        args.output_dir, args.push_to_hub, args.report_to, args.disable_tqdm = str(folder), False, [], True
    return args


def _describe_beginning(
    call: Finetuning,
    args: BaseTrainingArguments,
    train: TrainingSets,
    evaluation: Mapping[str, RetrievalDataset],
    guard: Mapping[str, RetrievalDataset],
) -> dict[str, Any]:
    """What decides the weights and the scores of a run, as JSON has it; a model in memory has no name."""
    choices = {field.name: as_json(getattr(call, field.name)) for field in fields(call)}
    given = {name: value for name, value in choices.items() if name not in _NOT_DECIDING}
    named = {"model": describe_checkpoint(os.fspath(call.model))} if isinstance(call.model, (str, os.PathLike)) else {}
    sets = {"training": train.by_name, "evaluation": evaluation, "guard": guard}
    names = {f"{what} sets": sorted(by_name) for what, by_name in sets.items()}
    measured = {
        f"{name}: {what}".removeprefix(": "): describe_content(data)
        for what, sets in (("evaluation data", evaluation), ("guard data", guard))
        for name, data in sets.items()
    }
    measured = {
        **({} if evaluation else {"evaluation data": "none"}),
        **({} if guard else {"guard data": "none"}),
        **measured,
    }
    return {**describe_arguments(args), **given, **named, **describe_training_data(train), **names, **measured}


@contextmanager
def _written_in(folder: Path, trainer: PageTrainer, *, overwrite: bool) -> Iterator[None]:
    """While a run writes into its folder: the run it replaces is kept until there is something in its place.

    Raises:
        OSError: The disk is full; the message names the last whole checkpoint.
    """
    if not trainer.is_world_process_zero():
        yield
        return
    if overwrite:
        set_aside(folder)
        trainer.add_callback(AfterFirstSave(partial(delete_set_aside, folder)))
    try:
        yield
        delete_set_aside(folder)
    except BaseException as error:
        recover(folder)
        if not checkpoints_of(folder):
            shutil.rmtree(folder / START, ignore_errors=True)
        if is_disk_full(error):
            raise OSError(
                errno.ENOSPC,
                f"The disk is full. {_describe_last_checkpoint(folder)} Free some space, or lower save_total_limit, "
                "and pass resume='auto'",
                str(folder),
            ) from error
        raise


def _describe_last_checkpoint(folder: Path) -> str:
    whole = next((path.name for path in checkpoints_of(folder) if why_unusable(path) is None), None)
    return f"The last whole checkpoint is {whole}." if whole else "There is no whole checkpoint yet."


def is_disk_full(error: BaseException) -> bool:
    """Whether writing failed for want of space, as the system, safetensors or torch says it."""
    signs = ("No space left on device", "file write failed")
    return getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in signs)


def _train(
    trainer: PageTrainer,
    evaluator: RunEvaluator | None,
    start: "Start",
    settings: dict[str, dict[str, Any]],
    writing: "Writing",
    checkpoint: Path | None,
) -> FinetuneResult:
    """Train, and write everything that the run leaves behind."""
    folder = writing.folder
    model, is_first_process, record = start.model, trainer.is_world_process_zero(), trainer.record
    assert record is not None
    if trainer.logs is not None:
        trainer.logs.before = record.before
    competes = trainer.args.load_best_model_at_end and bool(record.before)
    if competes:
        trainer.add_callback(StartCompetes(record.before))
        if checkpoint is None and is_first_process:
            with trainer.as_saved():
                model.save_pretrained(str(folder / START))
        trainer.accelerator.wait_for_everyone()
    asked = SavesWhenAsked()
    trainer.add_callback(asked)
    with asked.listening():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.check_weights()
    kept = _keep_best(trainer, folder) if competes else "the last weights"
    for layer in start.fresh.values():
        mark_fresh(layer, fresh=False)
    after = measure(trainer, evaluator)
    trainer.become_saved()
    settings["training"] |= writing.settle_size()
    if is_in_parts(trainer):
        trainer.save_model(str(folder / "final"))
    elif is_first_process:
        save_model(model, folder / "final")
    # after saving: a run without checkpoints has no other copy, should this fail
    verdict, measured = _judge(trainer, evaluator, was_chosen=competes)
    settings = {**settings, "training": {**settings["training"], **describe_steps(trainer), "kept": kept}}
    if is_first_process and not is_in_parts(trainer):
        settings["gates"] = check_saved(model, folder / "final", trainer.train_dataset, may_be_base=kept == KEPT_START)
    metric = primary_of(evaluator, model) or ((trainer.args.metric_for_best_model or "") if record.before else "")
    metric = metric.removeprefix("eval_") or None
    if measured:
        settings["evaluation"] = measured
    settings["cost"] = {"seconds": time.monotonic() - writing.began_at, "peak_memory_bytes": PeakMemory.of_process()}
    settings["data"]["fingerprints"] = {name: what for name, what in record.settings.items() if name.endswith(" data")}
    result = FinetuneResult(model.eval(), trainer, record.before, after, metric, folder, settings, verdict)
    if is_first_process:
        record.write(folder)
        for name in (PER_QUERY_FILE, "report.html"):  # of a run that was killed while it wrote its result
            (folder / name).unlink(missing_ok=True)
        if evaluator is not None:
            evaluator.history.write_before_and_after(folder)
        result.save(writing.evaluation, writing.documents, thumbnails=writing.thumbnails)
        if verdict is not None:
            tqdm.write(f"{verdict}\n{verdict.line}", file=sys.stderr)
        if trainer.args.push_to_hub and (failed := trainer.push_result(folder / "final")):
            settings["training"]["failed_pushes"] = failed
            result.save_metrics()
            warnings.warn(f"{' '.join(failed)} The model is in {str(folder / 'final')!r}.", stacklevel=5)
        if kept != KEPT_START:
            shutil.rmtree(folder / START, ignore_errors=True)
    # A script that goes on with final/ in every process finds it whole.
    trainer.accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class Writing:
    """What a run has to know to write its result.

    Attributes:
        folder: Of the run.
        evaluation: The evaluation sets, for the report.
        documents: What a document is made of.
        thumbnails: Whether the report shows documents.
        settle_size: Cuts the model to the size that was asked for, and says so.
        began_at: When the call was, by the monotonic clock.
    """

    folder: Path
    evaluation: Mapping[str, RetrievalDataset]
    documents: DocumentKind
    thumbnails: bool
    settle_size: Callable[[], dict[str, Any]]
    began_at: float


def _judge(
    trainer: PageTrainer, evaluator: RunEvaluator | None, *, was_chosen: bool
) -> tuple[Verdict | None, dict[str, Any]]:
    """The verdict on the model as it was saved, and what else its measurement tells; alike in all processes."""
    found: tuple[Verdict | None, dict[str, Any]] = (None, {})
    if evaluator is not None and trainer.is_world_process_zero():
        verdict = judge(evaluator.history, evaluator, trainer.model, was_chosen=was_chosen)
        found = verdict, describe_measuring(evaluator, None if is_in_parts(trainer) else trainer.model)
    return broadcast_object_list([found])[0]


def _keep_best(trainer: PageTrainer, folder: Path) -> str:
    """Take the untrained model back where no checkpoint beat it; the host has loaded the best of these."""
    best = trainer.state.best_global_step
    if best:
        return f"checkpoint-{best}, the best of all measurements"
    trainer.read_best_checkpoint(str(folder / START))
    return KEPT_START


def measure(trainer: PageTrainer, evaluator: AnyEvaluator | None) -> dict[str, float]:
    """The evaluator's metrics for the model as it is, shared among the processes; empty without an evaluator.

    Not by ``trainer.evaluate()``: called before ``train()`` with several processes, it makes the trainer take the model
    for wrapped already, the loss never gets the wrapped one, and the processes train apart without a word
    (sentence-transformers 6.2, transformers 5.23).
    """
    if evaluator is None:
        return {}
    # the host's own exception: a model in parts answers only where all processes take part
    shares = not is_in_parts(trainer)
    with trainer.as_saved(), distributed_evaluation(trainer.model, enabled=shares) as evaluates:
        metrics = evaluator(trainer.model) if evaluates else {}
    return {key: float(value) for key, value in broadcast_object_list([metrics])[0].items()}


def primary_of(evaluator: AnyEvaluator | None, model: HostModel) -> str | None:
    """The key of the metric that says how good the model is, the same in all processes; ``None`` for an unknown one."""
    return broadcast_object_list([evaluator.metric_name(model)])[0] or None if evaluator else None


@dataclass(frozen=True)
class Start:
    """A model before training.

    Attributes:
        model: As it will be trained.
        facts: What it is, and which of its weights will change, for ``settings``.
        fresh: Its layers that start from random numbers, by name.
        saved_types: The type of each weight in ``final/``, by ``id``; adapters, which are not in it, keep theirs.
    """

    model: HostModel
    facts: dict[str, Any]
    fresh: dict[str, nn.Module]
    saved_types: SavedTypes


@contextmanager
def ready_model(
    model: HostModel | str | os.PathLike[str],
    kind: Kind,
    *,
    documents: DocumentKind,
    queries: QueryKind = "text",
    freeze: Iterable[str] | None,
    lora: LoraChoice,
    seed: int,
    max_pixels: int | None = None,
    weights: WeightsChoice | None = None,
) -> Iterator[Start]:
    """The model as it will be trained, loaded, checked, parts frozen, adapters attached; in place where it was given.

    A call that is refused here leaves what was frozen, and what was not, as it was. In the end the parts learn again
    that ``freeze`` kept as they were: it is a choice of one run, not of the model. What lies beside adapters stays
    frozen for as long as these are there. Weights have the type of ``final/`` then.

    Raises:
        ConfigError: The model does not embed these documents, lacks a part, or nothing is left to train.
        MissingExtraError: peft, or another package that the model needs, is not installed.
    """
    ready: Any = model
    if isinstance(model, (str, os.PathLike)):
        options: dict[str, Any] = {"max_pixels": max_pixels, **({"dtype": weights.dtype} if weights else {})}
        if documents == "text" and kind.model_class is SentenceTransformer:  # which may be one for texts alone
            ready = load_host_model(SentenceTransformer, os.fspath(model), LoadOptions(**options), modality="text")
        else:
            ready = kind.load(os.fspath(model), **options)
    else:
        limit_pixels(model, PixelLimits(max_pixels=max_pixels))
    let_read_typed_texts(ready)
    if isinstance(ready, CrossEncoder):
        score_in_float32(ready)
    check_documents(ready, documents, queries)
    check_routes(ready, documents, queries)
    if documents == MIXED or "audio" in f"{documents}+{queries}":
        apply_media_limits(ready, ALL_OF_IT)
    if documents == MIXED or "video" in documents:
        read_all_frames(ready)
    names = part_names(freeze)
    before = [(parameter, parameter.requires_grad) for parameter in ready.parameters()]
    try:
        freeze_parts(ready, names)
        freeze_unreached(ready, documents, queries)
        frozen = [parameter for parameter, learned in before if learned and not parameter.requires_grad]
        adapters = add_lora(ready, lora, freeze=names, seed=seed)
        parts = model_parts(ready)
        if not any(parameter.requires_grad for part in parts.values() for parameter in part):
            raise ConfigError(
                f"Nothing is left to train: all parts of the model ({listed(list(parts))}) are frozen. Expected one "
                "that learns. Call requires_grad_(True) on the model or a part of it, or pass lora=True."
            )
    except Exception:
        for parameter, learned in before:
            parameter.requires_grad_(learned)
        raise
    types = saved_types(ready, weights.saved if weights else None)
    if isinstance(ready, CrossEncoder):
        learn_score_in_float32(ready)
    guessed, fresh = guess_fresh_layers(ready), fresh_layers(ready)
    facts = {**describe_model(ready), **describe_training(ready), "lora": adapters, "fresh_layers": list(fresh)}
    facts["fresh_layers_guessed"] = list(guessed)
    encoders = encoders_of(ready) if has_lora(ready) else []
    beside_adapters = {id(parameter) for encoder in encoders for parameter in encoder.parameters()}
    try:
        yield Start(ready, facts, fresh, types)
    finally:
        convert_to_saved(ready, types)
        for parameter in frozen:
            if id(parameter) not in beside_adapters:
                parameter.requires_grad_(True)
