"""Every undocumented touch of the packages below mmtune, each with its reason and what will allow its removal.

Seen in sentence-transformers 6.2, transformers 5.23, datasets 5.2 and peft 0.21. Nothing here imports torch before it
is called, so that the data layer, which has no models, can use what it needs.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import huggingface_hub
import numpy as np
from datasets import Dataset
from datasets.utils._dill import pklregister

Class = TypeVar("Class", bound=type)


# datasets


def stored_positions(rows: Dataset) -> np.ndarray | None:
    """The stored row behind each row, int64; ``None`` where the rows stand as they are stored.

    Without it, ids could only be laid beside shuffled images by writing the images anew. A public accessor would
    replace it.
    """
    mapping = rows._indices
    return None if mapping is None else mapping.column(0).to_numpy().astype(np.int64)


def fingerprint(rows: Dataset) -> str:
    """What ``datasets`` tells one content from another by. A public accessor would replace it."""
    return rows._fingerprint


def hashed_by(key: Callable[[Any], str]) -> Callable[[Class], Class]:
    """Lets ``datasets`` hash objects of a class by a key instead of by their pickle.

    It hashes the transform of a dataset whenever rows are selected or shuffled: with a corpus in memory that pickled
    every image. A public way to say how an object is hashed would replace it.
    """

    def register(cls: Class) -> Class:
        pklregister(cls)(lambda pickler, value: pickler.save_reduce(str, (key(value),), obj=value))
        return cls

    return register


def own_transform(rows: Dataset) -> Any:
    """The caller's own transform of some rows, or ``None``.

    With prompts or a loss for each dataset the host's trainer sets a transform of its own, also on rows without one. A
    trainer that leaves the caller's objects alone would replace the loop.
    """
    if rows.format["type"] != "custom":
        return None
    transform = rows.format["format_kwargs"].get("transform")
    while isinstance(transform, partial) and transform.func.__name__ == "add_dataset_name_transform":
        transform = transform.keywords.get("transform")
    return transform


# sentence-transformers


def let_read_typed_texts(model: Any) -> None:
    """Let the static embeddings of a model read ``{"text": ...}``; nothing else changes.

    The host's ``StaticEmbedding`` takes strings only, and a string may be the path of an image to a Router around it. A
    ``StaticEmbedding`` that takes the host's own dictionaries would replace it.

    Args:
        model: Any ``torch.nn.Module``, changed in place.
    """
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    for module in model.modules():
        if isinstance(module, StaticEmbedding):
            module.preprocess = MethodType(_preprocess_typed, module)


def _preprocess_typed(module: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    texts = [value["text"] if isinstance(value, dict) else value for value in inputs]
    return type(module).preprocess(module, texts, *args, **kwargs)


def declare_modalities(encoder: Any, modality_config: dict[Any, Any]) -> None:
    """Tell an encoder what it takes, its formatter of inputs too, which reads it once when it is built.

    Args:
        encoder: The host's ``Transformer`` module, changed in place.
        modality_config: As the host's, by modality.
    """
    encoder.modality_config = modality_config
    encoder.input_formatter.supported_modalities = list(modality_config)


class WithoutWeights:
    """For the host's ``Transformer`` module: laid out on the ``meta`` device, which holds no numbers.

    The host infers modalities from a model that is loaded. A public way to ask for those of a checkpoint would replace
    this class.
    """

    def _load_model(self, name: str, task: str, config: Any, *args: Any, **kwargs: Any) -> Any:
        import torch
        from transformers import AutoModel, AutoModelForMultimodalLM, AutoModelForSequenceClassification

        by_task = {
            "any-to-any": AutoModelForMultimodalLM,
            "sequence-classification": AutoModelForSequenceClassification,
        }
        with torch.device("meta"):
            model_class: Any = by_task.get(task, AutoModel)
            return model_class.from_config(config, trust_remote_code=kwargs.get("trust_remote_code", False))


class OwnCheckpoints:
    """For the host's trainers: ``read_checkpoint`` in place of the private hook by which they load one, and one writer.

    The host builds the whole model again for it, which fails for adapters in a Router, and does so on the GPU, beside
    the optimizer. ``read_best_checkpoint`` likewise, where the host goes on with the last weights if it fails. And it
    writes a checkpoint in every process at once, over one another (since transformers leaves it to the trainer to ask
    which one writes), and pickles the token for the Hub into each, which is published with it. From the checkpoint of
    the last step it takes one step more where that lies within an epoch. Public hooks would replace this class.
    """

    def read_checkpoint(self, folder: str) -> None:
        """Loads the weights of a checkpoint into the model that is trained, as the host does, on the CPU."""
        import torch
        from sentence_transformers.base.modules import Module
        from sentence_transformers.util import fullname

        model = uncompiled(self.model)  # type: ignore[attr-defined] - of the trainer beside this class
        classes = {fullname(part): type(part) for part in model.modules() if isinstance(part, Module)}
        # the host brings all weights to one type, in which those of a wider one would be rounded
        types = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
        exact = {"model_kwargs": {"dtype": torch.float32}} if len(types) > 1 else {}
        loaded = type(model)._load_with_module_classes(
            folder, classes, device="cpu", trust_remote_code=model.trust_remote_code, **exact
        )
        model.load_state_dict(loaded.state_dict())

    def read_best_checkpoint(self, folder: str) -> None:
        """Loads the best checkpoint."""
        self.read_checkpoint(folder)

    def push_checkpoint(self, folder: str) -> None:
        """Begins to publish a checkpoint. The host publishes the whole folder of the run with it."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        args: Any = self.args  # type: ignore[attr-defined] - of the trainer beside this class
        token = args.hub_token
        # a model in parts is put together by all processes, so all of them save
        if args.should_save or is_in_parts(self):
            try:
                args.hub_token = None
                super()._save(output_dir, state_dict)  # type: ignore[misc] - of the trainer beside this class
            finally:
                args.hub_token = token

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc] - of the trainer beside this class

    def may_be_best(self, metrics: dict[str, float]) -> bool:
        """Whether a measurement may be the best of all, whatever its metric."""
        return True

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not self.may_be_best(metrics):
            return False
        return super()._determine_best_metric(metrics, trial)  # type: ignore[misc] - of the trainer beside this class

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.read_checkpoint(checkpoint_path)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.push_checkpoint(checkpoint_folder)

    def _load_best_model(self) -> None:
        trainer: Any = self
        best = trainer.state.best_model_checkpoint
        trainer.model.model_card_data.set_best_model_step(int(best.rpartition("-")[2]))
        self.read_best_checkpoint(best)


# transformers, peft, torch


def is_in_parts(trainer: Any) -> bool:
    """Whether each process holds a part of the model, as under FSDP and DeepSpeed."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled


def attention_of(config: Any) -> str | None:
    """The attention that a transformers config chose. A public accessor would replace it."""
    return getattr(config, "_attn_implementation", None)


def flash_attention_loads() -> bool:
    """Whether flash attention 2 runs here: from flash-attn, or by the ``kernels`` package from the Hub or its cache.

    Older versions of transformers know the first only (5.4; 5.23 knows both). A lower bound above them would replace
    the look at the signature.
    """
    from transformers.utils import is_flash_attn_2_available

    by_kernels = {"kernels_fallback_ok": True}
    known = inspect.signature(is_flash_attn_2_available).parameters
    return is_flash_attn_2_available(**{name: value for name, value in by_kernels.items() if name in known})


def supports_flash_attention(model_class: Any) -> bool:
    """Whether a class of transformers runs with flash attention, and computes what it computes without.

    Flash attention is given no mask but that of the padding. A class that lets some tokens see later ones, as Gemma 3
    does with those of an image, says all the same that it supports it, and becomes causal without a word (transformers
    5.4 to 5.23). Only the module that defines it shows such a mask: by the arguments of transformers' own functions for
    masks. A flag that tells it would replace the look at the source.
    """
    if not getattr(model_class, "_supports_flash_attn", False):
        return False
    try:
        source = inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError):  # a class without a file
        return False
    return not any(argument in source for argument in ("or_mask_function", "block_sequence_ids"))


def tracker_names() -> list[str]:
    """What ``report_to`` can name, installed or not. The documented function lists what is installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return list(INTEGRATION_TO_CALLBACK)


def unread_weights(model: Any) -> list[str]:
    """The names of the weights of a transformers model that were in none of its files: they are drawn.

    transformers marks what it has read, and says what it has not in a log entry. The host passing on
    ``output_loading_info`` would replace the look at the marks. A class from elsewhere may load in its own way: empty.
    """
    if not type(model).__module__.startswith("transformers."):
        return []
    # what lies on a disk or in another process has a stand-in: on the device "meta", or empty
    here = [(name, weight) for name, weight in model.named_parameters() if weight.numel() and not weight.is_meta]
    return [name for name, weight in here if not hasattr(weight, "_is_hf_initialized")]


def describe_offline() -> str:
    """What to say beside a name that was not found, where the Hub was not asked; else ``""``.

    The variable is documented, the place where it was read is not. A public ``is_offline_mode`` in all versions of
    huggingface_hub that are allowed would replace it.
    """
    is_offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return " HF_HUB_OFFLINE=1 is set, so nothing is downloaded: unset it to ask the Hub." if is_offline else ""


def forget_adapter(model: Any) -> None:
    """Take out what an attempt to attach an adapter has left when it failed, and the mark that is set before it."""
    for name, layer in adapter_layers(model):
        model.set_submodule(name, layer.get_base_layer())
    model._hf_peft_config_loaded = False


def adapter_layers(model: Any) -> list[tuple[str, Any]]:
    """The layers of a transformers model that peft has wrapped, with their names.

    Documented for models of peft's own, by an inner module. A public way to list them would replace the import.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]


def take_out_adapters(model: Any, *, merge: bool) -> None:
    """Put the layers of a transformers model back that peft has wrapped, with the adapters added or without.

    peft has this for its own models only. An ``unload`` in the integration of transformers would replace it.
    """
    from peft.utils import ModulesToSaveWrapper

    for name, layer in adapter_layers(model):
        if merge:
            layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = wrapper.modules_to_save[wrapper.active_adapters[0]] if merge else wrapper.original_module
            model.set_submodule(name, kept)
    model.delete_adapter(list(model.peft_config))
    if merge:
        # Loading adapters leaves a renaming behind that is for their files: merged weights would be saved under names
        # that no model has, and load as random numbers with no more than a log entry.
        vars(model).pop("_weight_conversions", None)


def weights_beside_adapters(model: Any) -> dict[str, Any]:
    """The weights of a transformers model by the names that they had before peft wrapped them, tied ones as one object.

    Its words for what it has wrapped are in no documentation. A ``state_dict`` without adapters would replace it.
    """
    wrappers = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
    return {wrappers.sub("", name): weight for name, weight in model.state_dict(keep_vars=True).items()}


@contextmanager
def without_autocast(model: Any) -> Iterator[None]:
    """A model that accelerate has prepared, computing as it was built, for as long as the block runs.

    accelerate puts autocast around ``forward`` as an attribute of the model, and evaluation would go through it. Its
    own way back (``unwrap_model(keep_fp32_wrapper=False)``) is for good. A context for it would replace this one.
    """
    wrapped = vars(model).pop("forward", None) if "_original_forward" in vars(model) else None
    try:
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped


def uncompiled(model: Any) -> Any:
    """The model behind ``torch.compile``."""
    return getattr(model, "_orig_mod", model)


def innermost_sampler(loader: Any) -> Any:
    """The batch sampler of a data loader, behind the wrappers of accelerate."""
    sampler = loader
    while getattr(sampler, "batch_sampler", None) is not None:
        sampler = sampler.batch_sampler
    return sampler
