"""What a checkpoint is, read from its small files: the weights are not touched."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors import safe_open
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoProcessor,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from mmtune.arguments import PLURALS, nearest_name
from mmtune.errors import ConfigError, MissingExtraError, MmtuneError
from mmtune.host import WithoutWeights, describe_offline
from mmtune.models.kinds import HostModel

MARKERS = ("modules.json", "config.json", "adapter_config.json")
"""A folder or repository with one of these is a checkpoint."""

TEXT_ONLY = frozenset({"text"})

TEXT_MODULES = ("StaticEmbedding", "WordEmbeddings", "BoW")
"""The host's encoders that are no transformers models."""

SAMPLES = {"text": "total revenue of the year", "image": Image.new("RGB", (64, 64), "white")}
"""What encoders are tried with: a short text and a small blank page."""

EXTRA_BY_PACKAGE = {
    **{"torchvision": "vlm", "peft": "lora", "bitsandbytes": "qlora", "openai": "generate"},
    **{"matplotlib": "report", "jinja2": "report"},
    "mteb": "mteb",
}


@dataclass(frozen=True)
class Encoder:
    """One encoder of a checkpoint; a Router has several.

    Attributes:
        modalities: What it embeds (``"text"``, ``"image"``, ...), or ``None`` for a module with code of its own, which
            only shows once it is built.
        config: The transformers config, or ``None`` where there is none (an adapter, another kind of module).
        processor: What ``AutoProcessor`` gives, for transformers models; else ``None``.
        image_arguments: Image arguments that the host applies on every call, from the saved ``processing_kwargs``.
        refusals: Why it does not embed one of the modalities that its processor knows, by modality.
        joins: Whether it takes several modalities in one input; ``None`` where that only shows once it is built.
    """

    modalities: frozenset[str] | None
    config: PreTrainedConfig | None = None
    processor: object | None = None
    image_arguments: Mapping[str, Any] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)
    joins: bool | None = None


@dataclass(frozen=True)
class CheckpointFiles:
    """Reads a checkpoint's files, from a folder or from the Hub and its cache.

    Attributes:
        name: A folder, or the full name of a repository.
        hub: ``cache_dir``, ``token``, ``revision`` and ``local_files_only``, as the Hub's functions name them.
        processor_kwargs: Given to ``AutoProcessor``.
        config_kwargs: Given to ``AutoConfig``.
    """

    name: str
    hub: Mapping[str, Any] = field(default_factory=dict)
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    config_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def path(self, filename: str, subfolder: str = "") -> Path | None:
        """Where a file lies on this machine, downloaded if need be, or ``None`` where the checkpoint has none."""
        if Path(self.name).is_dir():
            path = Path(self.name, subfolder, filename)
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, filename, subfolder=subfolder or None, **self.hub))
        except EntryNotFoundError:
            return None

    def read_json(self, filename: str, subfolder: str = "") -> Any:
        """The content of a JSON file, a dictionary, or ``None`` where the checkpoint has no such file.

        ``modules.json`` is a list of dictionaries, which say of each module what it is and where it lies.

        Raises:
            ConfigError: The file is damaged.
        """
        with reading(self.name):
            path = self.path(filename, subfolder)
            if path is None:
                return None
            content = json.loads(path.read_text(encoding="utf-8"))
            parts = content if filename == "modules.json" else [content]
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise ValueError(f"{filename} holds {content!r:.80}")
            return content

    @cached_property
    def modules(self) -> list[dict[str, Any]] | None:
        """What the host saved of each module; ``None`` for a checkpoint that was made for something else."""
        return self.read_json("modules.json")

    @cached_property
    def saved_type(self) -> str | None:
        """``model_type`` of a checkpoint that the host, or PyLate, saved; ``None`` for any other."""
        if self.modules is None:
            return None
        return (self.read_json("config_sentence_transformers.json") or {}).get("model_type", "SentenceTransformer")

    @cached_property
    def architectures(self) -> list[str]:
        """The model classes of a checkpoint without ``modules.json``; empty for any other."""
        config = None if self.modules is not None else self.read_json("config.json")
        names = (config or {}).get("architectures")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def has_router(self) -> bool:
        """Whether it begins with the host's Router."""
        return bool(self.modules) and is_router_type(self.modules[0]["type"])

    @property
    def classifies(self) -> bool:
        """Whether it is a transformers model for sequence classification."""
        return any(architecture.endswith("ForSequenceClassification") for architecture in self.architectures)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The type in which the host loads the one encoder of a checkpoint; ``None`` for a Router, or an adapter."""
        config = None if self.has_router else self.config(self.modules[0]["path"] if self.modules else "")
        if config is None:
            return None
        named = getattr(config, "dtype", None) or _first_dtype(self.weight_files())
        return named if isinstance(named, torch.dtype) else getattr(torch, str(named), None)

    def weight_files(self) -> list[Path]:
        """Where the weights lie on this machine, as safetensors or as torch saves them; empty where there are none."""
        with reading(self.name):
            for filename in ("model.safetensors", "pytorch_model.bin"):
                index = self.read_json(f"{filename}.index.json")
                filenames = sorted(set(index["weight_map"].values())) if index else [filename]
                paths = [path for path in map(self.path, filenames) if path is not None]
                if paths:
                    return paths
        return []

    def config(self, subfolder: str) -> PreTrainedConfig | None:
        """The transformers config, or ``None`` for an adapter, whose config is that of its base model."""
        if self.read_json("config.json", subfolder) is None:
            return None
        with reading(self.name):
            config = AutoConfig.from_pretrained(self.name, **self.hub, **{"subfolder": subfolder, **self.config_kwargs})
            if not all(isinstance(name, str) for name in config.architectures or ()):
                raise ValueError(f"config.json holds the architectures {config.architectures!r:.80}")
            return config

    def processor(self, subfolder: str) -> object:
        """Tokenizer, image processor, or both in one."""
        return AutoProcessor.from_pretrained(self.name, **self.hub, **{"subfolder": subfolder, **self.processor_kwargs})


class Blueprint(WithoutWeights, Transformer):
    """The host's encoder without weights: its processor, and the modalities that the host finds in it."""


def lay_out(files: CheckpointFiles, model_class: type[HostModel]) -> Blueprint:
    """The first encoder of a checkpoint as the host would build it, without weights.

    Args:
        files: The checkpoint.
        model_class: What it is loaded as: a language model that becomes a reranker keeps its output layer.
    """
    code = {"trust_remote_code": files.config_kwargs.get("trust_remote_code", False)}
    processor_kwargs = {**files.hub, **files.processor_kwargs}
    config_kwargs = {**files.hub, **files.config_kwargs}
    if files.modules:
        hub = {"cache_folder" if name == "cache_dir" else name: value for name, value in files.hub.items()}
        subfolder = files.modules[0]["path"]
        own = {"processor_kwargs": processor_kwargs, "config_kwargs": config_kwargs}
        return Blueprint.load(files.name, subfolder=subfolder, **hub, **code, **own)
    task: Any = "feature-extraction"
    if issubclass(model_class, CrossEncoder):
        task = "sequence-classification" if files.classifies else "any-to-any"
    return Blueprint(
        files.name,
        transformer_task=task,
        model_kwargs=code,
        processor_kwargs=processor_kwargs,
        config_kwargs=config_kwargs,
    )


def find_checkpoint(name: str, *, hub: Mapping[str, Any] | None = None, **kwargs: Mapping[str, Any]) -> CheckpointFiles:
    """The files of a checkpoint in a folder or on the Hub, by the names that the host takes.

    Args:
        name: A folder, ``"organisation/model"``, or a bare name as the host completes it.
        hub: See ``CheckpointFiles``.
        **kwargs: ``processor_kwargs`` and ``config_kwargs``, see ``CheckpointFiles``.

    Raises:
        ConfigError: Nothing is there, or nothing that is a checkpoint.
    """
    path = Path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # too long for a name
        raise ConfigError(
            f"{name!r:.80} can't be a path: {first_line(error):.80} Pass that of a checkpoint."
        ) from error
    if is_folder:
        if not _holds_checkpoint(path):
            entries = sorted(path.iterdir())
            inside = next(filter(_holds_checkpoint, entries), None)
            remedy = f"Pass {str(inside)!r}, which holds one." if inside else "Pass the folder that holds these files."
            more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
            listing = ", ".join(entry.name for entry in entries[:10]) + more or "no files"
            raise ConfigError(
                f"{str(path)!r} holds no checkpoint: found {listing}. Expected one of {', '.join(MARKERS)}. {remedy}"
            )
        return CheckpointFiles(name, hub or {}, **kwargs)
    if is_file:
        raise ConfigError(f"{name!r} is a file. Expected the folder of a checkpoint: pass {str(path.parent)!r}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ConfigError(
            f"{str(path)!r} does not exist: {_nearest_folder(path)}. Expected the folder of a checkpoint, or a name on "
            f"the Hub such as 'Qwen/Qwen3-VL-Embedding-2B'. Correct the path."
        )
    return CheckpointFiles(_find_on_hub(name, dict(hub or {})), hub or {}, **kwargs)


def _holds_checkpoint(folder: Path) -> bool:
    return any((folder / marker).is_file() for marker in MARKERS)


def _find_on_hub(name: str, hub: dict[str, Any]) -> str:
    organization = SentenceTransformer.default_huggingface_organization
    candidates = [name] if "/" in name else [f"{organization}/{name}", name]
    failure: Exception | None = None
    for candidate in candidates:
        for marker in MARKERS:
            try:
                hf_hub_download(candidate, marker, **hub)
                return candidate
            except LocalEntryNotFoundError as error:
                # no connection: each further try would wait through the retries again
                hub["local_files_only"] = True
                failure = failure or error
            except EntryNotFoundError:
                continue
            except (OSError, ValueError) as error:
                failure = failure or error
                break
    reason = first_line(failure) if failure else f"The repository has none of {', '.join(MARKERS)}."
    raise ConfigError(
        f"The model {name!r} was not found: {_nearest_folder(Path(name))}, and the Hub and its cache did not give it "
        f"either. {reason} Expected the folder of a checkpoint or the name of a model on the Hub, such as "
        f"'Qwen/Qwen3-VL-Embedding-2B'. Check the spelling and the connection, and for a private or gated model run "
        f"`hf auth login`.{describe_offline()}"
    ) from failure


def _nearest_folder(path: Path) -> str:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    alike = nearest_name(missing, [entry.name for entry in parent.iterdir()], cutoff=0.6)
    hint = f" (did you mean {alike!r}?)" if alike else ""
    return f"{str(parent)!r} exists and holds no {missing!r}{hint}"


def read_encoders(
    files: CheckpointFiles,
    modality: str = "image",
    *,
    model_class: type[HostModel] = SentenceTransformer,
    or_else: Sequence[str] = (),
) -> list[Encoder]:
    """The encoders of a checkpoint, after checking that it can be read and that one of them takes what it must.

    Args:
        files: A checkpoint as ``find_checkpoint`` gives it.
        modality: What one of the encoders must take by itself, ``"image"`` or ``"text"``, ``"audio"`` or ``"video"``.
        model_class: What is to be made of it. A checkpoint without ``modules.json`` is several things: late interaction
            and rerankers find other modalities in it than an embedding model.
        or_else: What is enough in place of ``modality``.

    Returns:
        One encoder, or one for each route of a Router.

    Raises:
        ConfigError: The checkpoint embeds no ``modality``, or its config or processor can't be read.
        MissingExtraError: A package that its processor needs is not installed.
    """
    with reading(files.name):
        modules = files.modules
        if modules:
            encoders = _saved_encoders(files, modules[0]["type"], modules[0]["path"])
        else:
            encoders = [_fresh_encoder(files, model_class)]
        for encoder in encoders:
            _require_words(files, encoder)
    if not any({*or_else} & (encoder.modalities or frozenset()) for encoder in encoders):
        require_modality(files, encoders, modality, model_class=model_class)
    return encoders


def _require_words(files: CheckpointFiles, encoder: Encoder) -> None:
    """Refuse a tokenizer without its vocabulary, which transformers makes up where the files are missing."""
    tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or "text" not in (encoder.modalities or ()):
        return
    if set(tokenizer.encode(SAMPLES["text"])) <= set(tokenizer.all_special_ids):
        raise ConfigError(
            f"The tokenizer of {files.name!r} knows no words, so that all texts would be alike. Expected its "
            f"vocabulary, such as tokenizer.json. Download or save the checkpoint again."
        )


def _saved_encoders(files: CheckpointFiles, module_type: str, subfolder: str) -> list[Encoder]:
    """The encoders of a module that the host saved: itself, or those that begin the routes of a Router."""
    class_name = module_type.rpartition(".")[2] if module_type.startswith("sentence_transformers.") else ""
    if is_router_type(module_type):
        router = files.read_json("router_config.json", subfolder) or files.read_json("config.json", subfolder)
        first_modules = dict.fromkeys(modules[0] for modules in router["structure"].values())
        return [
            encoder
            for module in first_modules
            for encoder in _saved_encoders(files, router["types"][module], Path(subfolder, module).as_posix())
        ]
    if class_name not in ("Transformer", "CLIPModel"):
        return [Encoder(modalities=TEXT_ONLY if class_name in TEXT_MODULES else None)]
    saved = files.read_json("sentence_bert_config.json", subfolder) or {}
    # combinations are saved as "image+text"; versions before 5.4 saved none, and CLIP had a class of its own
    keys = saved.get("modality_config", ["text", "image"] if class_name == "CLIPModel" else ["text"])
    modalities = frozenset(part for key in keys for part in key.split("+"))
    config = files.config(subfolder)
    encoder = Encoder(
        modalities=modalities,
        config=config,
        processor=files.processor(subfolder) if config is not None or "image" in modalities else None,
        image_arguments=dict(saved.get("processing_kwargs", {}).get("image", {})),
        joins=any(key == "message" or "+" in key for key in keys),
    )
    return [encoder]


def is_router_type(module_type: str) -> bool:
    """Whether the ``type`` of a module in ``modules.json`` is the host's Router, by its new or its old name."""
    return module_type.startswith("sentence_transformers.") and module_type.endswith((".Router", ".Asym"))


def _first_dtype(paths: list[Path]) -> torch.dtype | None:
    """The type of the first weight of a checkpoint in safetensors."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    for path in (path for path in paths if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as tensors:
            types = (names.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys())  # noqa: SIM118
            return next(filter(None, types), None)
    return None


def _fresh_encoder(files: CheckpointFiles, model_class: type[HostModel]) -> Encoder:
    """What the host would make of a checkpoint without ``modules.json``."""
    config = files.config("")
    if config is not None and type(config) in MODEL_MAPPING and issubclass(model_class, SentenceTransformer):
        blueprint = lay_out(files, model_class)
        refused = _refusals(blueprint)
        alone = {key for key in blueprint.modalities if isinstance(key, str) and key != "message"} - refused.keys()
        joins = any(key == "message" or isinstance(key, tuple) for key in blueprint.modalities)
        return Encoder(frozenset(alone), blueprint.config, blueprint.processor, refusals=refused, joins=joins)
    processor = files.processor("")
    is_image_processor = isinstance(processor, ImageProcessingMixin)
    takes_images = is_image_processor or hasattr(processor, "image_processor")
    modalities = (["image"] if takes_images else []) + ([] if is_image_processor else ["text"])
    modalities += ["video"] if hasattr(processor, "video_processor") else []
    return Encoder(frozenset(modalities), config, processor)


def _refusals(encoder: Transformer) -> dict[str, str]:
    """Why an encoder does not embed a text alone, or an image alone, as the end of a sentence."""
    reasons: dict[str, str] = {}
    for modality, sample in SAMPLES.items():
        if modality not in encoder.modalities:
            for key in encoder.modalities:
                if isinstance(key, tuple) and modality in key:
                    reasons[modality] = f"it takes {' and '.join(sorted(key))} only together"
            continue
        try:
            features = encoder.preprocess([sample])
        except ImportError:
            raise
        except Exception as error:  # processors refuse in every way
            reasons[modality] = f"its processor does not take one by itself ({type(error).__name__}: {error})"
            continue
        if modality == "image" and "input_ids" not in features:
            # images that go the way of the tokens, and not through a tower of their own, need a place among these
            methods = {str(key): params["method"] for key, params in encoder.modality_config.items()}
            by_forward = all(methods.get(key) == "forward" for key in SAMPLES)
            if by_forward and isinstance(encoder.model.get_input_embeddings(), torch.nn.Embedding):
                reasons[modality] = "it has no chat template that gives an image its place in a text"
    return reasons


@contextmanager
def reading(name: str) -> Iterator[None]:
    """What the files of a checkpoint raise when they are damaged, or foreign, as an error that names the checkpoint.

    Raises:
        ConfigError: They can't be read.
        MissingExtraError: A package that reading them needs is not installed.
    """
    try:
        yield
    except MmtuneError:
        raise
    except ImportError as error:
        raise missing_extra(name, error) from error
    except Exception as error:  # damaged files fail in every way
        raise ConfigError(
            f"The config or processor of {name!r} can't be read: {type(error).__name__}: {first_line(error)} Expected "
            f"a checkpoint that transformers {transformers.__version__} knows. Check its files, or update transformers."
        ) from error


def require_modality(
    files: CheckpointFiles,
    encoders: list[Encoder],
    modality: str,
    *,
    model_class: type[HostModel] = SentenceTransformer,
) -> None:
    """Make sure that one of a checkpoint's encoders takes a modality by itself.

    Args:
        files: The checkpoint.
        encoders: Its encoders.
        modality: What one of them must take; several in one input are joined by ``+``.
        model_class: What is to be made of it, for the message.

    Raises:
        ConfigError: None does; the message has the reason.
    """
    is_joined = "+" in modality
    if any(encoder.modalities is None or modality in encoder.modalities for encoder in encoders) or (
        is_joined and any(encoder.joins is not False for encoder in encoders)
    ):
        return
    kinds = sorted({encoder.config.model_type for encoder in encoders if encoder.config is not None})
    kind = f" (model type {', '.join(kinds)})" if kinds else ""
    if is_joined:
        raise ConfigError(
            f"{files.name!r} can't embed {modality}{kind}: it takes each in an input of its own, and none with both. "
            "Expected a language model that reads images, such as Qwen3-VL. Pass one, or leave one of them out."
        )
    reason = next((encoder.refusals[modality] for encoder in encoders if modality in encoder.refusals), None)
    if reason:
        raise ConfigError(
            f"{files.name!r} can't embed {modality}s by themselves{kind}: {reason}. Expected a checkpoint that embeds "
            f"texts, as queries are, and images, as pages are, each alone. Pass one such as Qwen3-VL, CLIP or SigLIP."
        )
    modalities = ", ".join(sorted(frozenset().union(*(encoder.modalities or () for encoder in encoders))))
    expected = {
        "image": "a checkpoint with an image processor, such as Qwen3-VL, CLIP or SigLIP. Pass one of those, or join "
        "this one with an image encoder by compose_router(text, image)",
        "text": "a checkpoint with a tokenizer, such as MiniLM. Pass one, or join this one with a text encoder by "
        "compose_router(text, image)",
        "audio": "a checkpoint with a feature extractor of sounds, such as CLAP, AST or Whisper. Pass one of those, or "
        "join one with a text encoder by compose_router(text, audio=...)",
        "video": "a checkpoint with a video processor, such as Qwen3-VL or V-JEPA 2. Pass one of those, or join one "
        "with a text encoder by compose_router(text, video=...); an encoder of clips that lies beside an image "
        "processor, as VideoMAE does, goes into a new folder with the one that AutoVideoProcessor makes of it",
    }
    if model_class is CrossEncoder:
        expected["image"] = (
            "a language model that reads images, such as Qwen/Qwen3-VL-2B-Instruct, or a ready reranker. Pass one; a "
            'reranker of texts goes with documents="text"'
        )
    raise ConfigError(
        f"{files.name!r} embeds no {PLURALS[modality]}, only {modalities}{kind}. Expected {expected[modality]}."
    )


def missing_extra(name: str, error: ImportError) -> MissingExtraError:
    """The error for a package that a checkpoint needs, with the extra of mmtune that brings it."""
    package = next((package for package in EXTRA_BY_PACKAGE if package in str(error).lower()), None)
    package = package or next(iter(re.findall(r"pip install `?([\w-]+)", str(error))), None)
    remedy = how_to_install(package) if package else "Install that package."
    missing = f"{package}, which is not installed" if package else "a package that is not installed"
    return MissingExtraError(f"{name!r} needs {missing}: {first_line(error)} {remedy}")


def how_to_install(package: str) -> str:
    """The command that brings a package, and the extra of mmtune that has it, as one sentence."""
    extra = EXTRA_BY_PACKAGE.get(package)
    in_a_clone = f' (in a clone of mmtune: pip install ".[{extra}]")' if extra else ""
    return f"Run: pip install {package}{in_a_clone}"


def first_line(error: BaseException) -> str:
    """The first line of a message with words in it, ending in a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."
