"""What a command does in more than one call: what Python does in two lines."""

import os
from pathlib import Path
from typing import Any

from mmtune.data.dataset import RetrievalDataset
from mmtune.data.findings import AuditReport
from mmtune.data.intake import DatasetLike, DatasetsLike, as_retrieval_dataset
from mmtune.errors import ConfigError
from mmtune.evaluation.pipeline import open_retriever
from mmtune.evaluation.reranking import build_reranking_evaluator
from mmtune.evaluation.retrieval import build_evaluator
from mmtune.inference.encoder import Retriever
from mmtune.inference.mining import mine_hard_negatives
from mmtune.inference.processes import Processes
from mmtune.models.opening import open_checkpoint
from mmtune.models.rerankers import build_reranker, is_reranker


def evaluate(model: str, dataset: DatasetsLike, **options: Any) -> dict[str, float]:
    """Measure a model on a dataset: one that finds pages, or a reranker.

    Args:
        model: The folder or Hub name of a checkpoint. A reranker sorts lists of ten candidates.
        dataset: What to measure on: a saved dataset, parquet, or a Hub name.
        **options: Of ``build_evaluator``.

    Raises:
        ConfigError: The model or an option does not fit.
        DatasetError: The data can't be used.
    """
    if is_reranker(open_checkpoint(os.fspath(model))):
        unused = [name for name in ("truncate_dims", "ndcg_at_k") if name in options]
        if unused:
            raise ConfigError(f"{unused[0]}={options[unused[0]]!r}: a reranker has no such thing. Leave it out.")
        return build_reranking_evaluator(dataset, **options)(build_reranker(model))
    opened = open_retriever(model, options.get("documents", "image"))
    return build_evaluator(dataset, model=opened, **options)(opened)


def audit(dataset: DatasetLike, **options: Any) -> AuditReport:
    """Look for what is odd about a dataset, and can hurt training or scores.

    Args:
        dataset: What to look at: a saved dataset, parquet, or a Hub name.
        **options: Of ``RetrievalDataset.audit``.

    Raises:
        DatasetError: The data can't be used.
    """
    return as_retrieval_dataset(dataset).audit(**options)


def mine(
    dataset: DatasetLike, model: Retriever, output_dir: str | os.PathLike[str], **options: Any
) -> RetrievalDataset:
    """Find hard negatives for each query with a model, and save the dataset with them.

    Args:
        dataset: What to mine: a saved dataset, parquet, or a Hub name. Negatives that it has are not used.
        model: The checkpoint that searches.
        output_dir: The folder for the new dataset; one that holds something is refused.
        **options: Of ``mine_hard_negatives``.

    Raises:
        ConfigError: The folder holds something, or the model or an option does not fit.
        DatasetError: The data can't be used.
    """
    folder = Path(output_dir)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"output_dir={str(folder)!r} holds something already. Name another folder.")
    found = mine_hard_negatives(dataset, model, **options)
    processes = Processes.running(model.device)
    processes.gather(lambda: found.save(folder) if processes.rank == 0 else None)
    return found
