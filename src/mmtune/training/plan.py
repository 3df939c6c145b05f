"""What a run will do, as ``finetune(..., dry_run=True)`` tells it: how much, how long, and every choice."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmtune.report.markdown import markdown_table, show_seconds
from mmtune.training.call import Finetuning
from mmtune.training.trainers import PageTrainer
from mmtune.training.weights import COMPENSATED


@dataclass(frozen=True)
class Plan:
    """What ``finetune(..., dry_run=True)`` returns; ``print(plan)`` shows it on one screen.

    Attributes:
        steps: Steps of the optimizer.
        seconds: Of the whole run, from the call to its result: estimated from steps that were timed.
        memory_bytes: The most that one process will hold above the loaded model, on the GPU if there is one: measured
            during these steps.
        choices: What was chosen automatically or given, by name: the value, and the reason.
        facts: What else is known, by name: rows, batches, pixels and tokens a page, seconds of each part.
    """

    steps: int
    seconds: float
    memory_bytes: int
    choices: Mapping[str, tuple[Any, str]]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        took = show_seconds(self.seconds)
        head = f"{self.steps:,} steps, about {took}, {self.memory_bytes / 1e9:.2f} GB above the model"
        facts = [f"  {name:<28} {value}" for name, value in self.facts.items()]
        rows = [[name, str(value), reason] for name, (value, reason) in self.choices.items()]
        return "\n".join([head, "", *facts, "", markdown_table(("choice", "value", "reason"), rows)])


def describe_choices(
    call: Finetuning, trainer: PageTrainer, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Any, str]]:
    """What was chosen for a run, and why: by the caller, by the recipe, or by what the model and the data are."""
    args, training = trainer.args, settings["training"]
    given = set(call.training_arguments)

    def why(name: str, reason: str) -> str:
        return "given in args" if call.args else "given" if name in given else reason

    most = call.kind.batch_size
    batch = args.per_device_train_batch_size
    shrunk = "the recipe's, lowered so that the run has ten steps" if batch < most else "the recipe's"
    rate = "ten times the recipe's, for adapters" if settings["model"]["lora"] else "the recipe's"
    mini_batch = getattr(call, "mini_batch_size", "auto")
    on_gpu = trainer.model.device.type == "cuda"
    sized = "by passes over the largest pages" if on_gpu else "by the number of parameters"
    choices = {
        "per_device_train_batch_size": (batch, why("per_device_train_batch_size", shrunk)),
        "gradient_accumulation_steps": (
            args.gradient_accumulation_steps,
            why("gradient_accumulation_steps", "the recipe's"),
        ),
        "learning_rate": (args.learning_rate, why("learning_rate", rate)),
        "learning_rate_mapping": (
            args.learning_rate_mapping,
            why("learning_rate_mapping", "layers that start from random numbers learn ten times as fast"),
        ),
        "warmup_steps": (args.warmup_steps, why("warmup_steps", "a tenth of the run; none below ten steps")),
        "weights": (training["weights"], training["weights_reason"]),
        "optim": (
            training["optimizer"],
            why("optim", "keeps what bfloat16 rounds away" if training["optimizer"] == COMPENSATED else "the recipe's"),
        ),
        "precision": (training["precision"], why("bf16", "bf16 on a GPU that computes in it")),
        "loss": (training["loss"], "given" if call.loss is not None else "the recipe's"),
        "mini_batch_size": (
            training["mini_batch_size"],
            "given" if mini_batch != "auto" else sized,
        ),
        "matryoshka_dims": (training.get("matryoshka_dims"), "the model's size and the usual ones below it"),
        "batch_sampler": (training["batch_sampler"], why("batch_sampler", "no page is a negative of its own query")),
        "dataloader_num_workers": (
            args.dataloader_num_workers,
            why("dataloader_num_workers", "by the cores beside a GPU; none on a CPU, whose cores train"),
        ),
        "pages": (training["pages"], "as bytes where a probe on drawn pages showed the same numbers to the bit"),
        "page_store": (training["page_store"], "given" if call.page_store != "auto" else "a quarter of what is free"),
        "keep": (call.keep, "the best measurement, the start included" if call.keep == "best" else "given"),
    }
    return {name: (value, reason) for name, (value, reason) in choices.items() if value not in (None, {}, [])}
