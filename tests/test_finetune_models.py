"""The call with every kind of model: Routers, adapters, frozen parts, late interaction."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from transformers import AutoTokenizer

from mmtune import (
    ConfigError,
    DatasetError,
    FinetuneResult,
    RetrievalDataset,
    build_late_interaction,
    compose_router,
    extract_route,
    finetune,
    merge_lora,
)
from mmtune.models.adapters import save_model
from mmtune.models.fresh import fresh_layers
from mmtune.models.lora import add_lora
from mmtune.models.parts import describe_training, model_parts
from mmtune.testing import generated_pages, tiny_siglip, tiny_text_encoder
from mmtune.training.embedding import kind_of
from mmtune.training.run import ready_model

QUIET = {"disable_tqdm": True, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(24, seed=1, page_size_px=64)).split(6)


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text encoder that is narrower than the image encoder."""
    return tiny_text_encoder(tmp_path_factory.mktemp("models") / "text", hidden_size=32)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_siglip(tmp_path_factory.mktemp("models") / "image")


def a_router(text_path: str, image_path: str, **arguments) -> SentenceTransformer:
    return compose_router(text_path, image_path, device="cpu", **arguments)


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def assert_reloads(
    result: FinetuneResult, data: tuple[RetrievalDataset, RetrievalDataset], *, tolerance: float = 1e-6
) -> None:
    """The saved model embeds in the plain host as the one in memory."""
    loaded = type(result.model)(str(result.output_dir / "final"), device="cpu")
    pages = data[1].training_rows(0)[:3]["image"]
    for one, other in ((result.model, loaded), (loaded, result.model)):
        queries = [vector for text in ("revenue", "staff in 2021") for vector in one.encode_query([text])]
        same = [vector for text in ("revenue", "staff in 2021") for vector in other.encode_query([text])]
        assert max(float(abs(a - b).max()) for a, b in zip(queries, same, strict=True)) <= tolerance
        both = zip(one.encode_document(pages), other.encode_document(pages), strict=True)
        assert max(float(abs(a - b).max()) for a, b in both) <= tolerance


# Routers


@pytest.fixture(scope="module")
def routed(data, text_path: str, image_path: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    model = a_router(text_path, image_path)
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finetune(model, *data, output_dir=folder, freeze=("text",), num_train_epochs=4, **QUIET)


def test_a_router_trains_by_one_call_and_reloads(routed: FinetuneResult, data) -> None:
    training = routed.settings["training"]
    assert training["router_mapping"] == {"query": "query", "image": "document", "negative_0": "document"}
    assert routed.after[routed.primary_metric] != routed.before[routed.primary_metric]
    assert_reloads(routed, data)


def test_what_is_frozen_stays_to_the_last_bit_and_the_rest_learns(
    routed: FinetuneResult, text_path: str, image_path: str
) -> None:
    before = copies(a_router(text_path, image_path))
    names = changed(before, routed.model)
    text_encoder = {name for name in before if ".text.0." in name}
    assert text_encoder
    assert not names & text_encoder
    assert any(".image.0." in name for name in names)
    assert any(".text." in name and "linear" in name for name in names)
    assert routed.settings["model"]["frozen_parts"] == ["text"]
    assert 0 < routed.settings["model"]["trained_share"] < 1


def test_a_fresh_projection_learns_at_ten_times_the_rate_and_the_result_says_so(routed: FinetuneResult) -> None:
    layers = routed.settings["model"]["fresh_layers"]
    assert len(layers) == 1
    ((pattern, rate),) = routed.settings["training"]["learning_rate_mapping"].items()
    assert rate == pytest.approx(1e-2)
    groups = routed.trainer.optimizer.param_groups
    projection = routed.model.get_submodule(layers[0]).linear
    faster = [group for group in groups if group["initial_lr"] == pytest.approx(1e-2)]
    assert {id(p) for group in faster for p in group["params"]} == {id(p) for p in projection.parameters()}
    assert layers[0].replace(".", r"\.") in pattern
    assert fresh_layers(routed.model) == {}


def test_a_saved_router_trains_from_its_folder(routed: FinetuneResult, data, tmp_path: Path) -> None:
    result = finetune(str(routed.output_dir / "final"), data[0], output_dir=tmp_path / "again", max_steps=1, **QUIET)
    assert result.settings["training"]["router_mapping"]["negative_0"] == "document"
    assert result.settings["training"]["learning_rate_mapping"] == {}


def test_a_router_resumes_to_the_same_weights(data, text_path: str, image_path: str, tmp_path: Path) -> None:
    arguments = {"num_train_epochs": 4, "freeze": ("image",), **QUIET}
    whole = finetune(a_router(text_path, image_path), *data, output_dir=tmp_path / "whole", **arguments)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    last = max(stopped.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    again = finetune(a_router(text_path, image_path), *data, output_dir=stopped, resume=True, **arguments)
    assert changed(copies(whole.model), again.model) == set()
    assert again.after == whole.after


def test_args_of_the_host_get_the_mapping_on_a_copy(data, text_path: str, image_path: str, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, disable_tqdm=True)
    with pytest.warns(UserWarning, match="may put documents that are relevant"):
        result = finetune(a_router(text_path, image_path), data[0], args=args)
    assert result.settings["training"]["router_mapping"]["image"] == "document"
    assert result.settings["training"]["learning_rate_mapping"] == {}
    assert not args.router_mapping


def test_static_queries_train_beside_a_frozen_image_encoder(data, text_path, image_path, tmp_path: Path) -> None:
    static = [StaticEmbedding(AutoTokenizer.from_pretrained(text_path), embedding_dim=32)]
    model = compose_router(static, image_path, route_by="task", freeze=("image",), device="cpu")
    before = copies(model)
    result = finetune(model, *data, output_dir=tmp_path / "run", num_train_epochs=2, **QUIET)
    names = changed(before, result.model)
    assert any("embedding" in name for name in names)
    assert not any(".image.0." in name or ".document.0." in name for name in names)
    assert result.settings["training"]["loss"] == "MultipleNegativesRankingLoss"
    assert_reloads(result, data)


def test_pages_with_text_into_a_router_that_takes_none_are_refused(text_path: str, image_path: str) -> None:
    rows = generated_pages(8, page_size_px=64)
    rows = rows.add_column("words", [f"page {k}" for k in range(len(rows))])
    data = RetrievalDataset.from_id_rows(rows)
    corpus = data.corpus.rename_column("words", "text")
    with_text = RetrievalDataset(corpus, data.queries, data.qrels, data.negatives)
    with pytest.raises(ConfigError, match=r"can't embed documents='text\+image'|can't embed text\+image documents"):
        finetune(a_router(text_path, image_path), with_text, documents="text+image")


def test_routes_of_different_dimensions_are_refused(data, text_path: str, image_path: str, tmp_path: Path) -> None:
    text = list(SentenceTransformer(text_path, device="cpu"))
    image = list(SentenceTransformer(image_path, device="cpu"))
    model = SentenceTransformer(modules=[Router({"text": text, "image": image})], device="cpu")
    with pytest.raises(ConfigError, match="text queries in 32, image documents in 64"):
        finetune(model, data[0], output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Adapters and frozen parts


@pytest.fixture(scope="module")
def adapted(data, clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    pytest.importorskip("peft")
    return finetune(clip_path, *data, output_dir=tmp_path_factory.mktemp("runs") / "run", lora=True, **QUIET)


def test_adapters_train_alone_and_reload(adapted: FinetuneResult, data) -> None:
    facts = adapted.settings["model"]
    assert facts["lora"]["rank"] == 32
    assert facts["trained_share"] < 0.5
    assert facts["trained_parameters"] == facts["lora"]["parameters"]
    assert (adapted.output_dir / "final" / "adapter_model.safetensors").is_file()
    assert_reloads(adapted, data)


def test_merged_adapters_embed_the_same(adapted: FinetuneResult, data, tmp_path: Path) -> None:
    loaded = SentenceTransformer(str(adapted.output_dir / "final"), device="cpu")
    merge_lora(loaded).save_pretrained(str(tmp_path / "merged"))
    assert not (tmp_path / "merged" / "adapter_model.safetensors").exists()
    plain = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    pages = data[1].training_rows(0)[:3]["image"]
    one, other = (model.encode(pages, normalize_embeddings=True) for model in (plain, adapted.model))
    assert float(abs(one - other).max()) <= 1e-6


def test_adapters_learn_at_ten_times_the_rate_of_the_recipe(data, clip_path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = finetune(clip_path, data[0], output_dir=tmp_path / "run", lora=True, max_steps=1, disable_tqdm=True)
    assert result.settings["training"]["learning_rate"] == pytest.approx(2e-4)


def test_the_best_adapters_are_the_result(data, clip_path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    result = finetune(
        clip_path, *data, output_dir=tmp_path / "run", lora=True, num_train_epochs=6, save_total_limit=None, **QUIET
    )
    best = tmp_path / "run" / f"checkpoint-{result.settings['training']['best_step']}"
    saved = SentenceTransformer(str(best), device="cpu")
    pages = data[1].training_rows(0)[:3]["image"]
    assert float(abs(saved.encode(pages) - result.model.encode(pages)).max()) <= 1e-6


# peft looks for the config of the base model, which is one tower of a checkpoint here (peft 0.21)
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_adapters_in_a_router_resume_and_are_saved_merged(data, text_path, image_path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    arguments = {"num_train_epochs": 2, "lora": True, **QUIET}
    whole = finetune(a_router(text_path, image_path), *data, output_dir=tmp_path / "whole", **arguments)
    assert_reloads(whole, data)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    last = max(stopped.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    again = finetune(a_router(text_path, image_path), *data, output_dir=stopped, resume=True, **arguments)
    assert changed(copies(whole.model), again.model) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"freeze": ("language", "nose")}, r"no part 'nose'.*'vision', 'text', 'projection'"),
        ({"freeze": ("vision", "text", "projection")}, "leaves nothing to train"),
        ({"freeze": "vision"}, r'pass freeze=\("vision",\)'),
        ({"lora": 16}, r"lora=16 is a int\. Expected True, None or a config"),
    ],
)
def test_parts_that_do_not_fit_are_refused(data, clip_path: str, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(clip_path, data[0], output_dir=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_lora_without_peft_is_refused_before_weights_load(data, clip_path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mmtune.models.lora.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install peft \(in a clone of mmtune: pip install "\.\[lora\]"\)'):
        finetune(clip_path, data[0], output_dir=tmp_path / "run", lora=True)


def test_all_of_a_clip_but_its_projections_can_be_frozen(data, clip_path: str, tmp_path: Path) -> None:
    result = finetune(
        clip_path, data[0], output_dir=tmp_path / "run", freeze=("vision", "text"), num_train_epochs=2, **QUIET
    )
    before = copies(SentenceTransformer(clip_path, device="cpu"))
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed(before, result.model)} == {
        "text_projection",
        "visual_projection",
    }
    trained = {id(p) for p in model_parts(result.model)["projection"]}
    assert {id(p) for p in result.model.parameters() if p.requires_grad} >= trained


# Late interaction


@pytest.fixture(scope="module")
def late(data, qwen3_vl_path: str, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    model = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    return finetune(model, *data, output_dir=tmp_path_factory.mktemp("runs") / "run", num_train_epochs=2, **QUIET)


def test_late_interaction_trains_by_the_same_call_and_reloads(late: FinetuneResult, data) -> None:
    assert isinstance(late.model, MultiVectorEncoder)
    assert late.primary_metric == "vdr_maxsim_ndcg@10"
    assert {"final", "metrics.json", "report.md"} <= {path.name for path in late.output_dir.iterdir()}
    assert late.settings["training"]["loss"] == "CachedMultiVectorMultipleNegativesRankingLoss"
    assert late.settings["training"]["matryoshka_dims"] == []
    assert "full" in str(late).splitlines()[3]
    assert_reloads(late, data)


def test_a_fresh_projection_of_late_interaction_gets_a_looser_clip_too(late: FinetuneResult) -> None:
    training = late.settings["training"]
    assert training["max_grad_norm"] == 30.0
    assert list(training["learning_rate_mapping"].values()) == [pytest.approx(1e-2)]
    assert late.settings["model"]["fresh_layers"] == ["1"]


def test_late_interaction_with_adapters_keeps_the_looser_clip(data, qwen3_vl_path: str, tmp_path: Path) -> None:
    model = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    result = finetune(model, data[0], output_dir=tmp_path / "run", lora=True, max_steps=1, **QUIET)
    assert result.settings["training"]["max_grad_norm"] == 30.0


def test_late_interaction_trains_from_its_folder_as_what_it_is(late: FinetuneResult, data, tmp_path: Path) -> None:
    result = finetune(str(late.output_dir / "final"), data[0], output_dir=tmp_path / "again", max_steps=1, **QUIET)
    assert isinstance(result.model, MultiVectorEncoder)
    assert result.settings["training"]["max_grad_norm"] == 1.0
    assert result.settings["training"]["learning_rate_mapping"] == {}


def test_a_model_that_the_host_made_of_a_backbone_has_a_fresh_projection_too(data, qwen3_vl_path, tmp_path) -> None:
    model = MultiVectorEncoder(qwen3_vl_path, device="cpu")
    result = finetune(model, data[0], output_dir=tmp_path / "run", max_steps=1, **QUIET)
    assert result.settings["model"]["fresh_layers"] == ["1"]


def test_late_interaction_resumes_to_the_same_weights(data, qwen3_vl_path: str, tmp_path: Path) -> None:
    def model() -> MultiVectorEncoder:
        return build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")

    arguments = {"num_train_epochs": 1, **QUIET}
    whole = finetune(model(), *data, output_dir=tmp_path / "whole", **arguments)
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    last = max(stopped.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(last)
    again = finetune(model(), *data, output_dir=stopped, resume=True, **arguments)
    assert changed(copies(whole.model), again.model) == set()


def test_late_interaction_has_no_smaller_sizes(data, late: FinetuneResult, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"matryoshka_dims=\[64\].*one vector a token"):
        finetune(late.model, data[0], output_dir=tmp_path / "run", matryoshka_dims=[64])


def test_arguments_for_another_kind_of_model_are_refused(data, late: FinetuneResult, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(output_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="expected MultiVectorEncoderTrainingArguments"):
        finetune(late.model, data[0], args=args)


def test_a_reranker_is_refused(data, text_path: str) -> None:
    with pytest.raises(ConfigError, match="Use finetune_reranker"):
        finetune(CrossEncoder(text_path, device="cpu"), data[0])


def test_a_fresh_projection_that_is_given_a_rate_keeps_it(data, text_path, image_path, tmp_path: Path) -> None:
    model = a_router(text_path, image_path)
    result = finetune(
        model, data[0], output_dir=tmp_path / "run", max_steps=1, learning_rate_mapping={r"linear": 5e-3}, **QUIET
    )
    assert result.settings["training"]["learning_rate_mapping"] == {"linear": 5e-3}


def test_several_sets_train_a_router_together(data, text_path, image_path, tmp_path: Path) -> None:
    first, second = data[0].split(6)
    result = finetune(
        a_router(text_path, image_path),
        {"one": first, "two": second},
        {"own": data[1]},
        output_dir=tmp_path / "run",
        num_train_epochs=1,
        **QUIET,
    )
    assert result.primary_metric == "vdr-mean_cosine_ndcg@10"
    dense = [module for module in result.model.modules() if isinstance(module, Dense)]
    assert dense
    assert isinstance(data[0].training_rows(1), Dataset)


# Refused, and afterwards


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_model_that_is_frozen_altogether_is_refused(data, clip_path: str, tmp_path: Path) -> None:
    model = SentenceTransformer(clip_path, device="cpu")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Nothing is left to train.*'vision', 'text', 'projection'.*requires_grad_"):
        finetune(model, data[0], output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("freeze", "targets"), [(("vision",), ["nowhere"]), (("vision",), ["q_proj"])])
def test_a_refused_call_leaves_the_model_as_it_was(data, clip_path, tmp_path, freeze, targets) -> None:
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(clip_path, device="cpu")
    model[0].model.logit_scale.requires_grad_(False)
    before = trainable(model)
    with pytest.raises(ConfigError, match="target_modules"):
        finetune(
            model,
            data[0],
            output_dir=tmp_path / "run",
            freeze=freeze,
            lora=peft.LoraConfig(target_modules=targets),
        )
    assert trainable(model) == before


@pytest.mark.parametrize(
    ("freeze", "lora", "thawed"),
    [
        (("vision",), None, {"vision"}),
        (iter(["vision"]), None, {"vision"}),
        (None, None, set()),
        (("vision",), True, set()),
    ],
    ids=["frozen", "iterator", "nothing", "beside adapters"],
)
def test_freezing_is_over_with_the_run(clip_path: str, freeze, lora, thawed) -> None:
    if lora:
        pytest.importorskip("peft")
    model = SentenceTransformer(clip_path, device="cpu")
    with ready_model(model, kind_of(model), documents="image", freeze=freeze, lora=lora, seed=1) as start:
        trained = set(start.facts["trained_parts"])
    assert set(describe_training(model)["trained_parts"]) == trained | thawed


def test_a_projection_after_adapters_learns_again(qwen3_vl_path: str) -> None:
    pytest.importorskip("peft")
    model = build_late_interaction(qwen3_vl_path, max_pixels=64 * 64, device="cpu")
    with ready_model(model, kind_of(model), documents="image", freeze=("projection",), lora=True, seed=1) as start:
        assert "projection" in start.facts["frozen_parts"]
    assert describe_training(model)["trained_parts"] == ["language", "projection"]


def test_what_a_router_froze_on_purpose_stays_frozen(text_path: str, image_path: str) -> None:
    model = a_router(text_path, image_path, freeze=("image",))
    with ready_model(model, kind_of(model), documents="image", freeze=("image", "text"), lora=None, seed=1):
        pass
    assert describe_training(model)["frozen_parts"] == ["image"]


def test_adapters_on_a_model_that_was_trained_before_reload(data, clip_path: str, tmp_path: Path) -> None:
    """As after an interrupted run: the weights in memory are in no checkpoint that the model names."""
    pytest.importorskip("peft")
    model = SentenceTransformer(clip_path, device="cpu")
    with torch.no_grad():
        model[0].model.text_projection.weight.mul_(torch.linspace(0.5, 1.5, 64))
    result = finetune(model, data[0], output_dir=tmp_path / "run", lora=True, max_steps=1, **QUIET)
    assert_reloads(result, data, tolerance=1e-5)


def test_adapters_on_a_route_that_was_trained_in_its_router_reload(routed: FinetuneResult, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = extract_route(routed.model, "image")
    add_lora(model, True)
    assert save_model(model, tmp_path / "saved")


# peft looks for the config of the base model when a checkpoint is saved (peft 0.21)
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_overwriting_the_base_of_the_adapters_keeps_it_in_the_result(data, clip_path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    arguments = {"output_dir": tmp_path / "run", "max_steps": 1, **QUIET}
    first = finetune(clip_path, data[0], **arguments)
    second = finetune(first.model, data[0], lora=True, overwrite=True, **arguments)
    assert_reloads(second, data, tolerance=1e-5)


def test_static_queries_learn_beside_adapters(data, text_path: str, image_path: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    static = StaticEmbedding(AutoTokenizer.from_pretrained(text_path), embedding_dim=32)
    model = compose_router([static], image_path, route_by="task", device="cpu")
    before = static.embedding.weight.detach().clone()
    result = finetune(model, data[0], output_dir=tmp_path / "run", lora=True, max_steps=2, **QUIET)
    assert not torch.equal(static.embedding.weight, before)
    assert_reloads(result, data, tolerance=1e-5)


def test_a_run_resumes_on_the_same_object_with_the_rates_that_it_began_with(
    data, text_path, image_path, tmp_path
) -> None:
    model = a_router(text_path, image_path)
    first = finetune(model, data[0], output_dir=tmp_path / "run", max_steps=4, save_steps=2, **QUIET)
    assert fresh_layers(model) == {}
    again = finetune(model, data[0], output_dir=tmp_path / "run", max_steps=4, save_steps=2, resume=True, **QUIET)
    mapping = first.settings["training"]["learning_rate_mapping"]
    assert mapping
    assert again.settings["training"]["learning_rate_mapping"] == mapping


def test_a_run_with_adapters_does_not_go_on_without(adapted: FinetuneResult, data, clip_path: str, tmp_path) -> None:
    shutil.copytree(adapted.output_dir, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lora: True then, None now"):
        finetune(clip_path, *data, output_dir=tmp_path / "run", resume=True, **QUIET)


def test_adapters_that_a_model_brings_learn_at_their_rate(adapted: FinetuneResult, data, tmp_path: Path) -> None:
    model = SentenceTransformer(str(adapted.output_dir / "final"), device="cpu")
    result = finetune(model, data[0], output_dir=tmp_path / "run", max_steps=1, disable_tqdm=True)
    assert result.settings["training"]["learning_rate"] == pytest.approx(2e-4)


def test_a_document_without_a_text_is_found_before_weights_load(data, clip_path: str, tmp_path: Path) -> None:
    shutil.copytree(clip_path, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"no weights")
    texts: list[str | None] = [f"page {k}" for k in range(len(data[0].corpus))]
    texts[3] = None
    corpus = data[0].corpus.add_column("text", texts)
    with_text = RetrievalDataset(corpus, data[0].queries, data[0].qrels, data[0].negatives)
    with pytest.raises(DatasetError, match="1 documents have no text"):
        finetune(str(tmp_path / "clip"), with_text, documents="text", output_dir=tmp_path / "run")
