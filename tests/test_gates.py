"""What a run saves is loaded, and compared with what was trained, before the run is at its end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from mmtune import ConfigError, RetrievalDataset, build_late_interaction, finetune, load_model
from mmtune.models.lora import add_lora
from mmtune.serving import gates
from mmtune.serving.gates import Samples, check_saved, largest_gap
from mmtune.serving.plain import PlainEncoder
from mmtune.training import run as runs


@pytest.fixture(scope="module")
def dataset(pages) -> RetrievalDataset:
    return RetrievalDataset.from_id_rows(pages)


@pytest.fixture(scope="module")
def rows(dataset: RetrievalDataset) -> Any:
    return dataset.training_rows(0)


@pytest.fixture(scope="module")
def model(qwen3_vl_path: str) -> SentenceTransformer:
    torch.manual_seed(0)
    loaded = load_model(qwen3_vl_path, max_pixels=64 * 64)
    layers = [Dense(64, 32, bias=True, activation_function=nn.Tanh()), Normalize()]
    prompts = {"query": "Find: ", "document": "Page: "}
    return SentenceTransformer(modules=[loaded[0], Pooling(64, "mean"), *layers], device="cpu", prompts=prompts).eval()


@pytest.fixture(scope="module")
def saved(model: SentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates") / "final"
    model.save_pretrained(str(folder))
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_weights(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[-1] if len(tensors) < 4 else "language_model.norm.weight"
    save_file({**tensors, name: torch.randn_like(tensors[name])}, path, metadata={"format": "pt"})


def smaller_pages(path: Path) -> None:
    content = json.loads(path.read_text())
    content["image_processor"]["image_mean"] = [0.0, 0.9, 0.1]
    path.write_text(json.dumps(content))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "model.safetensors": other_weights,
    "2_Dense/model.safetensors": other_weights,
    "1_Pooling/config.json": lambda path: edit(path, pooling_mode="lasttoken"),
    "sentence_bert_config.json": lambda path: edit(path, processing_kwargs={}),
    "config_sentence_transformers.json": lambda path: edit(path, prompts={"query": "", "document": ""}),
    "processor_config.json": smaller_pages,
}


def test_a_whole_folder_passes(model: SentenceTransformer, saved: Path, rows: Any) -> None:
    state = torch.random.get_rng_state()
    found = check_saved(model, saved, rows, may_be_base=False)
    assert found["adapters"] == "none"
    assert found["host"].startswith("passed") and found["host"].endswith("16 queries and 16 documents")  # noqa: PT018
    assert found["transformers"].startswith("passed")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_no_number_is_a_gap() -> None:
    for shape in ((4,), (2, 3)):
        assert not largest_gap([torch.full(shape, float("nan"))], [torch.ones(shape)]) <= 1


def test_late_interaction_passes_token_by_token(qwen3_vl_path: str, rows: Any, tmp_path: Path) -> None:
    model = build_late_interaction(qwen3_vl_path, dimension=16, max_pixels=64 * 64).eval()
    model.prompts = {"query": "Find the page: ", "document": "A page: "}
    model.save_pretrained(str(tmp_path))
    assert check_saved(model, tmp_path, rows, may_be_base=False)["transformers"].startswith("passed")
    other_weights(tmp_path / "1_Dense" / "model.safetensors")
    own = PlainEncoder(tmp_path, model[0].model).encode(["a query"], "Find the page: ")
    assert largest_gap([own], [torch.as_tensor(model.encode_query(["a query"])[0])]) > 0.1
    edit(tmp_path / "2_MultiVectorMask" / "config.json", skiplist_words=["."])
    assert "leaves tokens out" in str(PlainEncoder.refuse(tmp_path))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(model: SentenceTransformer, saved: Path, rows: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "final"
    shutil.copytree(saved, folder)
    DAMAGE[name](folder / name)
    with pytest.raises(
        ConfigError, match=rf"final/{name}: the model that Sentence Transformers loads .* computes something else"
    ):
        check_saved(model, folder, rows, may_be_base=False)


def test_plain_transformers_compute_what_the_host_does(saved: Path, siglip_path: str, rows: Any) -> None:
    for folder in (saved, Path(siglip_path)):
        host = SentenceTransformer(str(folder), device="cpu")
        samples = Samples.of(host, rows)
        plain = PlainEncoder(folder)  # loads the model itself
        for task, items in (("query", samples.queries[:3]), ("document", samples.documents[:3])):
            embed = host.encode_query if task == "query" else host.encode_document
            expected = torch.as_tensor(embed(items, batch_size=1))
            assert torch.allclose(plain.encode(items, plain.prompts.get(task, "")), expected, atol=1e-6)


def test_files_that_state_something_else_are_an_error(
    model: SentenceTransformer, saved: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a host that applies what no file states
    monkeypatch.setattr(PlainEncoder, "encode", lambda self, items, prompt: torch.ones(len(items), 32))
    with pytest.raises(ConfigError, match=r"modules.json and the files that it names .* state another computation"):
        check_saved(model, saved, rows, may_be_base=False)


def test_memory_that_does_not_suffice_is_said(
    model: SentenceTransformer, saved: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    found = check_saved(model, saved, rows, may_be_base=False)
    assert "skipped: loading once more takes" in found["host"]
    assert found["transformers"] == found["host"]


def test_a_folder_that_does_not_load_and_a_processor_of_another_kind(
    model: SentenceTransformer, saved: Path, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "final")
    (tmp_path / "final" / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(
        ConfigError, match="final: Sentence Transformers can't load what was saved there: JSONDecodeError"
    ):
        check_saved(model, tmp_path / "final", rows, may_be_base=False)
    monkeypatch.setattr(PlainEncoder, "encode", lambda self, items, prompt: items["no such key"])
    found = check_saved(model, saved, rows, may_be_base=False)
    assert found["transformers"].startswith("skipped: plain transformers can't run it: TypeError")


def test_adapters_that_add_nothing(clip_path: str, rows: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_model(clip_path)
    add_lora(model, True, freeze=(), seed=0)
    model.save_pretrained(str(tmp_path / "final"))
    with pytest.raises(ConfigError, match=r"final/adapter_model.safetensors: the product of all \d+ is zero"):
        check_saved(model, tmp_path / "final", rows, may_be_base=False)
    assert "zero" in check_saved(model, tmp_path / "final", rows, may_be_base=True)["adapters"]
    for name, weight in model.named_parameters():
        if "lora_B" in name and "text_model" in name:
            nn.init.normal_(weight)
    with pytest.raises(
        ConfigError, match=r"final/adapter_model.safetensors: the model that Sentence Transformers loads"
    ):
        check_saved(model, tmp_path / "final", rows, may_be_base=False)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_says_what_passed(clip_path: str, dataset: RetrievalDataset, tmp_path: Path, lora: bool) -> None:
    if lora:
        pytest.importorskip("peft")
    finetune(clip_path, dataset, output_dir=tmp_path, lora=lora, max_steps=2, per_device_train_batch_size=4)
    found = json.loads((tmp_path / "metrics.json").read_text())["settings"]["gates"]
    assert found["host"].startswith("passed")
    assert found["transformers"].startswith("passed")
    assert ("add something" in found["adapters"]) is lora


def test_a_run_whose_model_was_saved_wrong_does_not_end(
    clip_path: str, dataset: RetrievalDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = runs.save_model

    def save_otherwise(model: Any, folder: Path) -> bool:
        merged = save(model, folder)
        path = folder / "model.safetensors"
        save_file({k: v * 0.5 for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
        return merged

    monkeypatch.setattr(runs, "save_model", save_otherwise)
    with pytest.raises(ConfigError, match=r"final/model.safetensors: the model that Sentence Transformers loads"):
        finetune(clip_path, dataset, output_dir=tmp_path, max_steps=2, per_device_train_batch_size=4)
    assert not (tmp_path / "metrics.json").exists()
    assert list(tmp_path.glob("checkpoint-*"))
