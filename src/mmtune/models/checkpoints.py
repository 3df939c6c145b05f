"""What a checkpoint is, read from its small files: the weights are not touched."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from transformers import MODEL_MAPPING, AutoConfig, AutoProcessor, ImageProcessingMixin, PreTrainedConfig

from mmtune.errors import ConfigError, MissingExtraError
from mmtune.models.blueprints import Blueprint, refusals
from mmtune.models.kinds import HostModel

MARKERS = ("modules.json", "config.json", "adapter_config.json")
"""A folder or repository with one of these is a checkpoint."""

TEXT_ONLY = frozenset({"text"})

TEXT_MODULES = ("StaticEmbedding", "WordEmbeddings", "BoW")
"""The host's encoders that are no transformers models."""

EXTRA_BY_PACKAGE = {"torchvision": "vlm", "peft": "lora", "bitsandbytes": "qlora"}


@dataclass(frozen=True)
class Encoder:
    """One encoder of a checkpoint; a Router has several.

    Attributes:
        modalities: What it embeds (``"text"``, ``"image"``, ...), or ``None`` for a module with code of its own, which
            only shows once it is built.
        config: The transformers config, or ``None`` where there is none (an adapter, another kind of module).
        processor: What ``AutoProcessor`` gives, for encoders that take images; else ``None``.
        image_arguments: Image arguments that the host applies on every call, from the saved ``processing_kwargs``.
        refusals: Why it does not embed one of the modalities that its processor knows, by modality.
    """

    modalities: frozenset[str] | None
    config: PreTrainedConfig | None = None
    processor: object | None = None
    image_arguments: Mapping[str, Any] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointFiles:
    """Reads a checkpoint's small files, from a folder or from the Hub and its cache.

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

    def read_json(self, filename: str, subfolder: str = "") -> Any:
        """The content of a JSON file, or ``None`` where the checkpoint has no such file."""
        path = Path(self.name, subfolder, filename)
        if not Path(self.name).is_dir():
            try:
                path = Path(hf_hub_download(self.name, filename, subfolder=subfolder or None, **self.hub))
            except EntryNotFoundError:
                return None
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def config(self, subfolder: str) -> PreTrainedConfig | None:
        """The transformers config, or ``None`` for an adapter, whose config is that of its base model."""
        if self.read_json("config.json", subfolder) is None:
            return None
        return AutoConfig.from_pretrained(self.name, **self.hub, **{"subfolder": subfolder, **self.config_kwargs})

    def processor(self, subfolder: str) -> object:
        """Tokenizer, image processor, or both in one."""
        return AutoProcessor.from_pretrained(self.name, **self.hub, **{"subfolder": subfolder, **self.processor_kwargs})

    def blueprint(self) -> Blueprint:
        """What the host makes of a checkpoint without ``modules.json``, without weights."""
        return Blueprint(
            self.name,
            model_kwargs={"trust_remote_code": self.config_kwargs.get("trust_remote_code", False)},
            processor_kwargs={**self.hub, **self.processor_kwargs},
            config_kwargs={**self.hub, **self.config_kwargs},
        )


def read_encoders(
    files: CheckpointFiles, modality: str = "image", *, model_class: type[HostModel] = SentenceTransformer
) -> list[Encoder]:
    """The encoders of a checkpoint, after checking that it can be read and that one of them takes what it must.

    Args:
        files: A checkpoint as ``find_checkpoint`` gives it.
        modality: What one of the encoders must take by itself, ``"image"`` or ``"text"``.
        model_class: What is to be made of it. A checkpoint without ``modules.json`` is several things: late interaction
            and rerankers find other modalities in it than an embedding model.

    Returns:
        One encoder, or one for each route of a Router.

    Raises:
        ConfigError: The checkpoint embeds no ``modality``, or its config or processor can't be read.
        MissingExtraError: A package that its processor needs is not installed.
    """
    try:
        encoders = _saved_encoders(files) or [_fresh_encoder(files, model_class)]
    except ImportError as error:
        raise missing_extra(files.name, error) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The config or processor of {files.name!r} can't be read: {first_line(error)} Expected a checkpoint "
            f"that transformers {transformers.__version__} knows. Check its files, or update transformers."
        ) from error
    require_modality(files, encoders, modality)
    return encoders


def require_modality(files: CheckpointFiles, encoders: list[Encoder], modality: str) -> None:
    """Make sure that one of a checkpoint's encoders takes a modality by itself.

    Raises:
        ConfigError: None does; the message has the reason.
    """
    if not any(encoder.modalities is None or modality in encoder.modalities for encoder in encoders):
        raise ConfigError(_lacking_message(files.name, encoders, modality))


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
    if path.is_dir():
        if not any((path / marker).is_file() for marker in MARKERS):
            raise ConfigError(_no_checkpoint_message(path))
        return CheckpointFiles(name, hub or {}, **kwargs)
    if path.is_file():
        raise ConfigError(f"{name!r} is a file. Expected the folder of a checkpoint: pass {str(path.parent)!r}.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ConfigError(_no_path_message(path))
    return CheckpointFiles(_find_on_hub(name, dict(hub or {})), hub or {}, **kwargs)


def missing_extra(name: str, error: ImportError) -> MissingExtraError:
    """The error for a package that a checkpoint needs, with the extra of mmtune that brings it.

    Args:
        name: The checkpoint.
        error: What transformers or the host raised.
    """
    package = next((package for package in EXTRA_BY_PACKAGE if package in str(error).lower()), None)
    package = package or next(iter(re.findall(r"pip install `?([\w-]+)", str(error))), None)
    requirement = f'"mmtune[{EXTRA_BY_PACKAGE[package]}]"' if package in EXTRA_BY_PACKAGE else package
    remedy = f"Run: pip install {requirement}" if package else "Install that package."
    missing = f"{package}, which is not installed" if package else "a package that is not installed"
    return MissingExtraError(f"{name!r} needs {missing}: {first_line(error)} {remedy}")


def first_line(error: BaseException) -> str:
    """The first line of a message with words in it, ending in a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[0] if lines else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _saved_encoders(files: CheckpointFiles) -> list[Encoder]:
    modules = files.read_json("modules.json")
    return _encoders(files, modules[0]["type"], modules[0]["path"]) if modules else []


def _encoders(files: CheckpointFiles, module_type: str, subfolder: str) -> list[Encoder]:
    class_name = module_type.rpartition(".")[2] if module_type.startswith("sentence_transformers.") else ""
    if class_name in ("Router", "Asym"):
        return _route_encoders(files, subfolder)
    if class_name in ("Transformer", "CLIPModel"):
        return [_saved_encoder(files, subfolder, default={"text", "image"} if class_name == "CLIPModel" else {"text"})]
    return [Encoder(modalities=TEXT_ONLY if class_name in TEXT_MODULES else None)]


def _route_encoders(files: CheckpointFiles, subfolder: str) -> list[Encoder]:
    router = files.read_json("router_config.json", subfolder) or files.read_json("config.json", subfolder)
    first_modules = dict.fromkeys(modules[0] for modules in router["structure"].values())
    return [
        encoder
        for module in first_modules
        for encoder in _encoders(files, router["types"][module], Path(subfolder, module).as_posix())
    ]


def _saved_encoder(files: CheckpointFiles, subfolder: str, *, default: set[str]) -> Encoder:
    saved = files.read_json("sentence_bert_config.json", subfolder) or {}
    # combinations are saved as "image+text"; versions before 5.4 saved none, and were as the default says
    modalities = frozenset(part for key in saved.get("modality_config", default) for part in key.split("+"))
    return Encoder(
        modalities=modalities,
        config=files.config(subfolder),
        processor=files.processor(subfolder) if "image" in modalities else None,
        image_arguments=saved.get("processing_kwargs", {}).get("image", {}),
    )


def _fresh_encoder(files: CheckpointFiles, model_class: type[HostModel]) -> Encoder:
    config = files.config("")
    if config is not None and type(config) in MODEL_MAPPING and issubclass(model_class, SentenceTransformer):
        return _blueprint_encoder(files.blueprint())
    processor = files.processor("")
    takes_images = isinstance(processor, ImageProcessingMixin) or hasattr(processor, "image_processor")
    takes_text = not isinstance(processor, ImageProcessingMixin)
    modalities = frozenset({"image"} if takes_images else ()) | frozenset({"text"} if takes_text else ())
    return Encoder(modalities=modalities, config=config, processor=processor)


def _blueprint_encoder(blueprint: Blueprint) -> Encoder:
    refused = refusals(blueprint)
    alone = {key for key in blueprint.modalities if isinstance(key, str) and key != "message"} - refused.keys()
    return Encoder(
        modalities=frozenset(alone),
        config=blueprint.config,
        processor=blueprint.processor,
        refusals=refused,
    )


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
    raise ConfigError(_not_on_hub_message(name, failure)) from failure


def _not_on_hub_message(name: str, failure: Exception | None) -> str:
    reason = first_line(failure) if failure else f"The repository has none of {', '.join(MARKERS)}."
    return (
        f"{name!r} was not found: {_folder_here(Path(name))}, and the Hub and its cache did not give it either. "
        f"{reason} Expected the folder of a checkpoint or the name of a model on the Hub, such as "
        f"'Qwen/Qwen3-VL-Embedding-2B'. Check the spelling and the connection, and for a private or gated model run "
        f"`hf auth login`."
    )


def _no_path_message(path: Path) -> str:
    return (
        f"{str(path)!r} does not exist: {_folder_here(path)}. Expected the folder of a checkpoint, or a name on the "
        f"Hub such as 'Qwen/Qwen3-VL-Embedding-2B'. Correct the path."
    )


def _folder_here(path: Path) -> str:
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    nearest = path.absolute().relative_to(parent).parts[0]
    names = sorted(entry.name for entry in parent.iterdir())
    alike = difflib.get_close_matches(nearest, names, n=1)
    hint = f" (did you mean {alike[0]!r}?)" if alike else ""
    return f"{str(parent)!r} exists and holds no {nearest!r}{hint}"


def _no_checkpoint_message(folder: Path) -> str:
    inside = [entry for entry in sorted(folder.iterdir()) if any((entry / marker).is_file() for marker in MARKERS)]
    remedy = f"Pass {str(inside[0])!r}, which holds one." if inside else "Pass the folder that holds these files."
    return (
        f"{str(folder)!r} holds no checkpoint: found {_listing(folder)}. Expected one of {', '.join(MARKERS)}. {remedy}"
    )


def _listing(folder: Path, limit: int = 10) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "no files"


def _lacking_message(name: str, encoders: list[Encoder], modality: str) -> str:
    modalities = sorted(frozenset().union(*(encoder.modalities or () for encoder in encoders)))
    kinds = sorted({encoder.config.model_type for encoder in encoders if encoder.config is not None})
    kind = f" (model type {', '.join(kinds)})" if kinds else ""
    reason = next((encoder.refusals[modality] for encoder in encoders if modality in encoder.refusals), None)
    if reason:
        return (
            f"{name!r} can't embed {modality}s by themselves{kind}: {reason}. Expected a checkpoint that embeds texts, "
            f"as queries are, and images, as pages are, each alone. Pass one such as Qwen3-VL, CLIP or SigLIP."
        )
    expected = {
        "image": "a checkpoint with an image processor, such as Qwen3-VL, CLIP or SigLIP. Pass one of those, or join "
        "this one with an image encoder by compose_router",
        "text": "a checkpoint with a tokenizer, such as MiniLM. Pass one, or join this one with a text encoder by "
        "compose_router",
    }
    return f"{name!r} embeds no {modality}s, only {', '.join(modalities)}{kind}. Expected {expected[modality]}."
