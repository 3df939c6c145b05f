"""A corpus as embeddings in files: by this process, by the processes of torchrun, or by workers of Ray."""

import logging
import os
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from tqdm.auto import tqdm

from mmtune.arguments import require_flag, require_one_of, require_path, require_whole
from mmtune.data.documents import DocumentKind, check_texts
from mmtune.data.identity import text_digest
from mmtune.data.intake import DatasetLike, as_retrieval_dataset
from mmtune.errors import ConfigError
from mmtune.inference.encoder import SHARD_SIZE, DatasetReader, Retriever, require_retriever, warn_of_cut_inputs
from mmtune.inference.processes import Processes
from mmtune.inference.ray_engine import require_ray, run_on_ray
from mmtune.inference.shard_writer import ShardWriter
from mmtune.inference.shards import Encoding, Shard, ShardFolder, digest_documents, metadata_columns, plan_shards
from mmtune.inference.store import model_fingerprint
from mmtune.inference.vectors import NumberType
from mmtune.models.loading import full_dimension

logger = logging.getLogger(__name__)

Engine: TypeAlias = Literal["local", "ray"]
"""Who encodes: this process and those of torchrun, or workers of Ray."""


def encode_corpus(
    dataset: DatasetLike,
    model: Retriever,
    folder: str | os.PathLike[str],
    *,
    dtype: NumberType = "float32",
    dim: int | None = None,
    engine: Engine = "local",
    documents: DocumentKind = "image",
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    calibration: DatasetLike | None = None,
    num_workers: int | None = None,
    show_progress_bar: bool = True,
) -> Path:
    """The embeddings of all documents in a folder of parquet files, for an index.

    ===========  ==================  ================  ==============
    document_id  embedding           pooled_embedding  (metadata)
    ===========  ==================  ================  ==============
    "p7"         a list of numbers   (none)            "report.pdf"
    "p7"         a list of vectors   their mean        "report.pdf"
    ===========  ==================  ================  ==============

    The second row is one of late interaction. Metadata are the columns of the corpus without its images. A file is
    there whole or not at all: a call that was killed goes on when it is made again, and encodes nothing twice that is
    there. Documents that have changed are encoded again with those of their shard; a model, prompt, pixel limit or
    setting that differs is refused. Memory holds one shard.

    Under torchrun each process writes its share of the shards, and Ray's workers write one each in turn; on a CPU all
    write the same bits, with as many threads. Several machines need the folder and the dataset at one path.

    Args:
        dataset: A ``RetrievalDataset``, rows in a known layout, or what ``RetrievalDataset.load`` takes. Queries don't
            matter.
        model: An embedding model, or a late-interaction one.
        folder: A new folder, or one of the same model and settings.
        dtype: What is kept of a number: ``"float32"``, ``"float16"``, ``"int8"``, or ``"binary"`` for its sign, eight a
            byte (uint8).
        dim: The first numbers of each vector to keep, at length 1 where the model compares by cosine; ``None`` keeps
            all, as the model gives them.
        engine: ``"local"``, also under torchrun, or ``"ray"`` (``pip install ray[data]``).
        documents: What a document is made of, such as ``"image"``, ``"text+image"``, ``"audio"`` or ``"mixed"``.
        batch_size: Documents a forward pass.
        shard_size: Documents a file; what a kill may cost, and what is held in memory.
        calibration: A dataset whose documents give the ranges of int8. ``None`` takes 1,024 documents from the whole of
            this one, or all where there are fewer. The ranges stand in ``_ranges.json`` and serve all later calls.
        num_workers: Of Ray, each with a model of its own. ``None`` is one a GPU of the cluster, or one.
        show_progress_bar: Whether to show a bar.

    Returns:
        The folder. Files beside the shards begin with ``_``.

    Raises:
        ConfigError: An argument does not fit, the corpus lacks what ``documents`` asks for, or the folder holds
            something else or can't be written to.
        MissingExtraError: Ray is not installed, and ``engine="ray"``.
        DatasetError: A document has no text where texts are read, or the model can't read one.
        ImageDecodeError: A page can't be decoded; the message names the document.

    Example:
        >>> from mmtune import encode_corpus, load_model
        >>> folder = encode_corpus("pages.parquet", load_model("my-model"), "encoded", dim=64, show_progress_bar=False)
        >>> sorted(path.name[:6] for path in folder.iterdir())
        ['000000', '_encod', '_shard']
    """
    require_retriever(model, "model", "encode_corpus(dataset, model, folder): the dataset comes first")
    require_path("folder", folder)
    require_one_of("dtype", dtype, get_args(NumberType))
    require_one_of("engine", engine, get_args(Engine))
    size, rows = require_whole("batch_size", batch_size), require_whole("shard_size", shard_size)
    workers = None if num_workers is None else require_whole("num_workers", num_workers, or_else="None")
    require_flag("show_progress_bar", show_progress_bar)
    kept_dim = _require_dim(dim, model)
    if calibration is not None and dtype != "int8":
        raise ConfigError(f"calibration= gives the ranges of int8, and dtype={dtype!r}. Leave it out.")
    if workers is not None and engine != "ray":
        raise ConfigError(
            f"num_workers={workers} is for engine='ray'; torchrun counts its own processes. Leave it out."
        )
    if engine == "ray":
        require_ray()
    reader = _reader_of(dataset, documents, "dataset")
    metadata_columns(reader)
    ranged = None if calibration is None else _reader_of(calibration, documents, "calibration")

    processes = Processes.running(model.device)
    if engine == "ray" and processes.count > 1:
        raise ConfigError("engine='ray' under torchrun would encode everything in each process. Start it without.")
    encoding = Encoding(
        model_fingerprint(model),
        documents,
        str(model.similarity_fn_name),
        dtype,
        kept_dim,
        rows,
        None if ranged is None else text_digest("".join(digest_documents(ranged, show_progress_bar=False))),
    )
    writer = ShardWriter(model, reader, encoding, size, ShardFolder(Path(folder)))
    shows = show_progress_bar and processes.rank == 0

    def prepare() -> tuple[list[Shard], list[Shard]]:
        warn_of_cut_inputs(model, reader)
        writer.folder.claim(encoding)
        shards = plan_shards(reader, encoding, shows)
        writer.folder.require_kin(shards)
        if dtype == "int8":
            writer.save_ranges(ranged, shows)
        return shards, writer.folder.missing(shards)

    # by one process, so that all share out the same shards
    shards, missing = processes.gather(lambda: prepare() if processes.rank == 0 else ([], []))[0]
    if len(missing) < len(shards) and processes.rank == 0:
        logger.info("%d of %d shards are in %s already.", len(shards) - len(missing), len(shards), folder)
    own = missing[processes.share(len(missing), 1)]
    with tqdm(
        total=sum(len(shard.digests) for shard in own), desc="Encoding documents", disable=not shows, leave=False
    ) as bar:
        if engine == "ray":
            run_on_ray(writer, own, workers, bar.update)
        else:
            processes.gather(lambda: [writer.write(shard, bar.update) for shard in own])
    # nobody goes on before the list is there
    processes.gather(lambda: writer.folder.finish(shards) if processes.rank == 0 else None)
    return writer.folder.path


def _reader_of(dataset: DatasetLike, documents: DocumentKind, name: str) -> DatasetReader:
    """The documents of a dataset, checked."""
    data = as_retrieval_dataset(dataset, name)
    check_texts(data.corpus, documents)
    return DatasetReader(data.corpus, data.queries, documents)


def _require_dim(dim: int | None, model: Retriever) -> int | None:
    """The numbers to keep of a vector; ``None`` for all.

    Raises:
        ConfigError: It is no such number.
    """
    if dim is None:
        return None
    asked, given = require_whole("dim", dim, or_else="None"), model.get_embedding_dimension()
    if given is not None and asked > given:
        cut = f" (its truncate_dim cuts {full_dimension(model)})" if given != full_dimension(model) else ""
        raise ConfigError(f"dim={asked} is larger than the {given} numbers that the model gives{cut}. Pass dim=None.")
    return None if asked == given else asked
