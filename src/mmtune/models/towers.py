"""One tower of a dual encoder such as CLIP or SigLIP: the other one would be carried along and never used.

An unused tower costs memory (most of SigLIP2-base is its vocabulary), and torch's distributed training stops at
parameters without gradients unless it is told to look for them.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import nn
from transformers import MODEL_MAPPING, CLIPModel, PreTrainedModel, Siglip2Model, SiglipModel

from mmtune.host import attention_of, declare_modalities
from mmtune.models.checkpoints import SAMPLES

TOWERS = {"text": "text_model", "image": "vision_model"}
PROJECTIONS = {"text": "text_projection", "image": "visual_projection"}
PROCESSORS = {"text": "tokenizer", "image": "image_processor"}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
NO_TOWER = {
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "image_size": 1,
    "patch_size": 1,
    "num_patches": 1,
    "vision_use_head": False,
}
"""The smallest vision tower that the configs of SigLIP and SigLIP2 can say."""


def is_dual_encoder(module: nn.Module) -> bool:
    """Whether a host module embeds texts and images by two encoders side by side."""
    if not isinstance(module, Transformer):
        return False
    methods = [params["method"] for params in module.modality_config.values()]
    return len(methods) > 1 and methods == [f"get_{modality}_features" for modality in module.modality_config]


def take_tower(encoder: Transformer, modality: str) -> list[nn.Module] | None:
    """The modules that embed one modality as the dual encoder does, bit for bit, and load in the plain host.

    Args:
        encoder: A dual encoder. It is taken apart and not to be used afterwards.
        modality: ``"text"`` or ``"image"``.

    Returns:
        The tower, and for CLIP its projection as a ``Dense``; ``None`` where a family can't be taken apart. SigLIP's
        text tower keeps its shell, a ``SiglipModel`` with an empty image tower: transformers 5.23 has no ``AutoModel``
        for it, by which the host loads.
    """
    model = encoder.model
    if not isinstance(model, CLIPModel | SiglipModel | Siglip2Model):
        return None
    tower = getattr(model, TOWERS[modality])
    if MODEL_MAPPING.get(type(tower.config), None) is not type(tower):
        # older versions of transformers (5.4) have a class of its own for no tower: these stay whole
        return None if isinstance(model, CLIPModel) or modality == "image" else [_without_images(encoder)]
    projection = getattr(model, PROJECTIONS[modality], None)
    alone = _alone(encoder, tower, modality)
    if projection is None:
        return [alone]
    with torch.random.fork_rng(devices=[]):  # the host draws weights, which are replaced
        dense = Dense(
            projection.in_features,
            projection.out_features,
            bias=False,
            activation_function=nn.Identity(),
            init_weight=projection.weight.detach(),
        )
    return [alone, dense.eval()]


def freeze_unused(encoder: nn.Module, embeddings: Iterable[torch.Tensor]) -> int:
    """Freeze what has no part in these embeddings; it could not learn.

    Args:
        encoder: A dual encoder of which a Router uses one side, or a whole model.
        embeddings: All that is used of it, made with gradients.

    Returns:
        The number of parameters that were frozen.
    """
    # the parameters in the graph of gradients behind the embeddings
    reached, seen, waiting = set(), set(), [embedding.grad_fn for embedding in embeddings]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    unreached = [parameter for parameter in trained if id(parameter) not in reached]
    for parameter in unreached:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in unreached)


def _alone(encoder: Transformer, tower: PreTrainedModel, modality: str) -> Transformer:
    processor = getattr(encoder.processor, PROCESSORS[modality])
    given = encoder.processing_kwargs
    kwargs: dict[str, Any] = {key: value for key, value in given.items() if key in (modality, "common")}
    if hasattr(processor, "max_num_patches"):
        # SigLIP2's joint processor overrules its image processor, which is on its own from now on
        num_patches = encoder.preprocess([SAMPLES["image"]])["pixel_values"].shape[1]
        kwargs["image"] = {"max_num_patches": num_patches, **kwargs.get("image", {})}
    with TemporaryDirectory() as folder:
        tower.save_pretrained(folder)
        processor.save_pretrained(folder)
        # transformers can't load half of a processor where the files still name the whole
        for path in (Path(folder, name) for name in PROCESSOR_FILES):
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))
                content.pop("processor_class", None)
                path.write_text(json.dumps(content, indent=2), encoding="utf-8")
        alone = Transformer(
            folder,
            model_kwargs={"dtype": tower.dtype, "attn_implementation": attention_of(tower.config)},
            modality_config={modality: {"method": "forward", "method_output_name": "pooler_output"}},
            module_output_name="sentence_embedding",
            processing_kwargs=kwargs,
        )
    alone.config.name_or_path = encoder.config.name_or_path
    alone.model.name_or_path = ""  # the folder is gone, and the tower is in no checkpoint by itself
    return alone.to(tower.device).eval()


def _without_images(encoder: Transformer) -> Transformer:
    model = encoder.model
    config = model.config.vision_config
    model.config.vision_config = type(config)(**{key: size for key, size in NO_TOWER.items() if hasattr(config, key)})
    with torch.random.fork_rng(devices=[]):
        empty = type(model.vision_model)(model.config.vision_config)
    model.vision_model = empty.to(model.device, model.dtype)
    declare_modalities(encoder, {"text": encoder.modality_config["text"]})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("text_model."))
    return encoder
