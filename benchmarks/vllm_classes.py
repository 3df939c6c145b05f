"""Exported folders through vLLM's own model classes, on a CPU and without a server: the largest gap to the models.

    python benchmarks/vllm_classes.py export FOLDER     # where mmtune is installed
    python benchmarks/vllm_classes.py run FOLDER        # where vLLM is installed

The first exports tiny models of each kind and keeps what they compute. The second reads the folders by vLLM: the
configuration, which weights find a place, pooling, projection, activation, chat template, parsing of requests.
Attention is that of plain torch, since the kernels want a GPU. The wheel of PyPI will do, installed with ``--no-deps``
beside a torch for the CPU, transformers as it asks, and the packages that its imports miss; set
``VLLM_TARGET_DEVICE=cpu``.
"""

import argparse
import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

QUERIES = ["total revenue of 2021", "Ünïcode “quotes” / slashes"]
PROMPTS = {"query": "Find the page: ", "document": "A page: "}


def export(folder: Path) -> None:
    """Export a model of each kind, with what it computes in ``expected.pt``."""
    from sentence_transformers import SentenceTransformer

    from mmtune import build_late_interaction, build_reranker, export_model, load_model
    from mmtune.testing import generated_pages, tiny_clip, tiny_qwen3_vl, tiny_text_encoder

    qwen, pages = tiny_qwen3_vl(folder / "qwen"), [row["image"].convert("RGB") for row in generated_pages(2)]
    models: dict[str, Any] = {
        "bert": SentenceTransformer(tiny_text_encoder(folder / "bert"), device="cpu"),
        "clip": load_model(tiny_clip(folder / "clip")),
        "dense": load_model(qwen, max_pixels=64 * 64),
        "late": build_late_interaction(qwen, dimension=16, max_pixels=64 * 64),
        "reranker-logit": build_reranker(qwen, max_pixels=64 * 64),
        "reranker-dense": build_reranker(qwen, head="dense", max_pixels=64 * 64),
    }
    models["dense"].truncate_dim = 32
    expected: dict[str, Any] = {"pages": pages}
    for name, model in models.items():
        if name in ("dense", "late"):
            model.prompts = PROMPTS
        if name.startswith("reranker"):
            pairs = [(query, document) for query in QUERIES for document in (*pages, "a text")]
            expected[name] = model.predict(pairs, batch_size=1, convert_to_tensor=True)
        else:
            documents = [] if name == "bert" else model.encode_document(pages, batch_size=1)
            expected[name] = [*model.encode_query(QUERIES, batch_size=1), *documents]
        export_model(model, folder / f"{name}-exported")
    torch.save(expected, folder / "expected.pt")


def run(folder: Path) -> None:
    """Read each folder by vLLM and print its row."""
    from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.model_loader import get_model_cls

    replace_kernels()
    expected = torch.load(folder / "expected.pt", weights_only=False)
    pages = expected.pop("pages")
    print("| folder | class | tensors | parameters not filled | largest gap |")
    print("|---|---|---:|---:|---:|")
    for name, wanted in expected.items():
        path = folder / f"{name}-exported"
        config = ModelConfig(model=str(path), runner="pooling", dtype="float32", enforce_eager=True)
        whole = VllmConfig(model_config=config)
        with set_current_vllm_config(whole), set_forward_context(None, whole), torch.inference_mode():
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{folder.resolve()}/meeting", 0, "gloo")
                initialize_model_parallel(1, 1)
            model = get_model_cls(config)(vllm_config=whole, prefix="").eval()
            row = load(model, path)
            gap = max(difference(model, config, path, name, pages, wanted))
        print(f"| {name} | {type(model).__name__} | {' | '.join(map(str, row))} | {gap:.1e} |", flush=True)


def replace_kernels() -> None:
    """Compute by plain torch what vLLM computes by kernels of its own."""
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.v1.attention.backend import AttentionType

    def attend(self: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        split = [states.view(len(states), -1, self.head_size).transpose(0, 1)[None] for states in (query, key, value)]
        options = {"is_causal": self.attn_type == AttentionType.DECODER, "scale": self.impl.scale, "enable_gqa": True}
        mixed = functional.scaled_dot_product_attention(*split, **options)
        return mixed[0].transpose(0, 1).reshape(len(query), -1)

    if not hasattr(torch.ops._C, "gelu_quick"):
        torch.library.define("_C::gelu_quick", "(Tensor out, Tensor input) -> ()")
    Attention.forward = attend
    CustomOp.dispatch_forward = lambda self, *_, **__: self.forward_native
    LinearBase.cpu_linear = staticmethod(functional.linear)


def load(model: Any, path: Path) -> tuple[int, int]:
    """How many tensors there are, each of which finds a place, and how many parameters were not filled."""
    from safetensors.torch import load_file

    tensors = {name: each for file in path.glob("model*.safetensors") for name, each in load_file(file).items()}
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(float("nan"))
    model.load_weights(iter(tensors.items()))  # raises where a name has no place
    return len(tensors), sum(bool(each.isnan().any()) for each in parameters.values())


def difference(model: Any, config: Any, path: Path, name: str, pages: list[Any], wanted: Any) -> list[float]:
    """How far each result is from that of the exported model: one minus the cosine, or the difference of scores."""
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(path)
    heads = model.pooler.poolers_by_task
    if name.startswith("reranker"):
        pairs = [(query, document) for query in QUERIES for document in (*pages, "a text")]
        scores = [score(model, config, path, processor, *pair) for pair in pairs]
        return [abs(own - float(each)) for own, each in zip(scores, wanted, strict=True)]
    items = QUERIES if name == "bert" else [*QUERIES, *pages]
    head = heads["token_embed" if name == "late" else "embed"].head
    found = []
    for item in items:
        if name in ("bert", "clip"):
            states = embed(model, processor, item)
        else:
            task = "query" if isinstance(item, str) else "document"
            part = {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}
            messages = [{"role": "system", "content": [{"type": "text", "text": PROMPTS[task]}]}]
            options = json.loads((path / "serve.json").read_text())["chat_arguments"]
            messages.append({"role": "user", "content": [part]})
            text = processor.apply_chat_template(messages, tokenize=False, **options)
            states = read(model, processor, text, [] if isinstance(item, str) else [item])
        pools = {"MEAN": lambda s: s.mean(0), "LAST": lambda s: s[-1], "CLS": lambda s: s[0]}
        states = states if name == "late" else pools[config.pooler_config.seq_pooling_type](states)
        vectors = head.projector(states) if head.projector else states
        found.append(vectors[..., : 32 if name == "dense" else None])
    pairs_of_vectors = zip(found, map(torch.as_tensor, wanted), strict=True)
    return [1 - functional.cosine_similarity(own, each, dim=-1).min().item() for own, each in pairs_of_vectors]


def embed(model: Any, processor: Any, item: Any) -> Any:
    """The states of a text, or of a page for CLIP."""
    if not isinstance(item, str):
        return model.embed_multimodal(**processor(images=[item], return_tensors="pt"))[0].reshape(1, -1)
    ids = getattr(processor, "tokenizer", processor)(item, return_tensors="pt")["input_ids"][0]
    return model(ids, torch.arange(len(ids)), inputs_embeds=model.embed_input_ids(ids))


def read(model: Any, processor: Any, text: str, images: list[Any]) -> Any:
    """The states of a Qwen3-VL for a filled template. The model itself rescales and normalises pixels."""
    raw = {"images": images, "do_rescale": False, "do_normalize": False} if images else {}
    inputs = processor(text=[text], return_tensors="pt", **raw)
    ids, places = inputs["input_ids"][0], []
    is_page = ids == model.config.image_token_id
    states = model.embed_input_ids(ids)
    if images:
        grid = inputs["image_grid_thw"]
        vectors = model.embed_multimodal(pixel_values=inputs["pixel_values"], image_grid_thw=grid)
        states = model.embed_input_ids(ids, vectors, is_multimodal=is_page)
        where = SimpleNamespace(offset=int(is_page.nonzero()[0]), length=int(is_page.sum()))
        data = {"image_grid_thw": SimpleNamespace(data=grid[0])}
        places = [SimpleNamespace(modality="image", mm_position=where, data=data)]
    positions, _ = model.get_mrope_input_positions(ids.tolist(), places)
    return model(ids, positions, inputs_embeds=states)


def score(model: Any, config: Any, path: Path, processor: Any, query: str, document: Any) -> float:
    """What vLLM answers for a pair, from the parts of a request on."""
    from vllm.entrypoints.pooling.scoring.utils import parse_score_data
    from vllm.renderers.hf import safe_apply_chat_template

    images, parts = [], document
    if not isinstance(document, str):
        file = io.BytesIO()
        document.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        images, parts = [document], [{"type": "image_url", "image_url": {"url": url}}]
    texts = parse_score_data(query, parts, config)[:2]
    messages = [{"role": role, "content": text} for role, text in zip(("query", "document"), texts, strict=True)]
    template = (path / "reranker.jinja").read_text()
    options = {"chat_template": template, "tools": None, "tokenize": False}
    filled = safe_apply_chat_template(config, processor.tokenizer, messages, **options)
    head = model.pooler.poolers_by_task["classify"].head
    return float(head.activation(head.classifier(read(model, processor, filled, images)[-1:])))


def main() -> None:
    """Export or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["export", "run"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    (export if options.what == "export" else run)(options.folder)


if __name__ == "__main__":
    main()
