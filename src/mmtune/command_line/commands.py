"""The commands: for each the function that it calls, and what its result says to a shell."""

import ast
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command leaves on the screen.

    Attributes:
        text: For a person.
        data: The same as JSON has it.
        exit_code: 0, or 1 where a part of the work failed, or 3 for a regression.
    """

    text: str
    data: Any
    exit_code: int = 0


REGRESSION = 3
_PACKAGE = Path(__file__).parent.parent


def show(result: Any, _arguments: Mapping[str, Any]) -> Outcome:
    """A result that says itself what it is: a path, a mapping of numbers, or a value of mmtune."""
    data = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    if isinstance(result, os.PathLike):
        data = {"path": os.fspath(result)}
    if isinstance(result, Mapping):
        return Outcome("\n".join(f"{name:<40} {value:.4f}" for name, value in result.items()), data)
    return Outcome(str(result), data)


def show_run(result: Any, arguments: Mapping[str, Any]) -> Outcome:
    """What a finetuning gained, and where it lies; a plan of a dry run as it is."""
    if arguments.get("dry_run"):
        return show(result, arguments)
    verdict = result.verdict
    data = {
        "output_dir": str(result.output_dir),
        "primary_metric": result.primary_metric,
        "before": result.before,
        "after": result.after,
        "verdict": None if verdict is None else verdict.as_dict(),
    }
    is_worse = verdict is not None and verdict.outcome == "REGRESSION"
    return Outcome(str(result), data, REGRESSION if is_worse else 0)


def show_audit(result: Any, _arguments: Mapping[str, Any]) -> Outcome:
    """The report, in full as JSON."""
    return Outcome(str(result), result.to_dict())


def show_comparison(result: Any, arguments: Mapping[str, Any]) -> Outcome:
    """A regression is a model that is significantly worse than the first one named, where that is the best."""
    models = arguments["models"]
    parts = Path(next(iter(models))).parts
    of_first = [parts[-len(Path(row.name).parts) :] == Path(row.name).parts for row in result.rows]
    lost = [row for row in result.rows if row.against_best and row.against_best.outcome == "REGRESSION"]
    rows = [
        {
            **{name: value for name, value in vars(row).items() if name not in ("per_query", "against_best")},
            "sizes": [asdict(size) for size in row.sizes],
            "against_best": row.against_best and row.against_best.as_dict(),
        }
        for row in result.rows
    ]
    data = {**vars(result), "rows": rows}
    code = REGRESSION if of_first[0] and lost else 0
    return Outcome(str(result), data, 1 if result.failures else code)


def show_serving(result: Any, _arguments: Mapping[str, Any]) -> Outcome:
    """What differs between server and model, likeliest cause first."""
    return Outcome(str(result), asdict(result), 0 if result.ok else REGRESSION)


def show_mined(result: Any, arguments: Mapping[str, Any]) -> Outcome:
    """The dataset with its negatives, and where it lies."""
    folder = str(arguments["output_dir"])
    listed = 0 if result.negatives is None else len(result.negatives)
    counts = {"queries": len(result), "documents": len(result.corpus), "queries_with_negatives": listed}
    return Outcome(f"{result}\nsaved in {folder}", {"path": folder, **counts})


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: As it is typed.
        function: What it calls, as ``module:name`` below ``mmtune``.
        options_of: Where ``function`` takes ``**options`` for another one, that one, likewise.
        show: From the result and the arguments to what the shell says.
        kind: The kind of model whose training arguments ``function`` takes besides, likewise; ``""`` where it takes
            none.
        is_shared: Whether the processes of torchrun share its work; the first one alone does that of the others.
    """

    name: str
    function: str
    options_of: str = ""
    show: Callable[[Any, Mapping[str, Any]], Outcome] = show
    kind: str = ""
    is_shared: bool = False

    @property
    def summary(self) -> str:
        """The first line of the docstring of what it calls, read from the source: nothing is imported for it."""
        module, _, name = self.function.partition(":")
        source = _PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
        found = ast.parse(source.read_text("utf-8"))
        definitions = {node.name: node for node in found.body if isinstance(node, ast.FunctionDef)}
        return (ast.get_docstring(definitions[name]) or "").split("\n", 1)[0]


COMMANDS: Sequence[Command] = (
    Command(
        "finetune", "training.embedding:finetune", show=show_run, kind="training.trainers:EMBEDDING", is_shared=True
    ),
    Command(
        "finetune-reranker",
        "training.reranking:finetune_reranker",
        show=show_run,
        kind="training.trainers:RERANKING",
        is_shared=True,
    ),
    Command("evaluate", "command_line.steps:evaluate", options_of="evaluation.retrieval:build_evaluator"),
    Command("compare", "evaluation.comparison:compare_models", show=show_comparison),
    Command("audit", "command_line.steps:audit", options_of="data.dataset:RetrievalDataset.audit", show=show_audit),
    Command(
        "mine",
        "command_line.steps:mine",
        options_of="inference.mining:mine_hard_negatives",
        show=show_mined,
        is_shared=True,
    ),
    Command("encode", "inference.corpus:encode_corpus", is_shared=True),
    Command("export", "serving.export:export_model"),
    Command("check-serving", "serving.checking:check_serving", show=show_serving),
)


def load(path: str) -> Any:
    """What stands at ``module:name`` below ``mmtune``."""
    module, _, name = path.partition(":")
    found = importlib.import_module(f"mmtune.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    return found
