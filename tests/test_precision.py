"""The type of weights: what fits is chosen, no step is lost in rounding, and what is saved is what was measured."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optimi
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import CrossEncoder, SentenceTransformer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import TrainerCallback

from comparing import assert_same_weights, weights
from mmtune import (
    ConfigError,
    FinetuneResult,
    RetrievalDataset,
    build_evaluator,
    build_late_interaction,
    build_reranker,
    compose_router,
    finetune,
    finetune_reranker,
    load_model,
)
from mmtune.models.lora import add_lora
from mmtune.models.memory import (
    GIB,
    Portion,
    WeightCounts,
    choose_dtype,
    count_weights,
    free_bytes,
    portions_of,
    training_bytes,
)
from mmtune.models.opening import open_checkpoint
from mmtune.models.parts import freeze_parts
from mmtune.models.precision import as_saved, share_lost
from mmtune.testing import generated_pages, tiny_llava
from mmtune.training import weights as run_weights
from mmtune.training.trainers import EMBEDDING, RERANKING
from mmtune.training.weights import choose_weights, warn_of_rounding
from test_finetune_reranker import table

QUIET: dict[str, Any] = {"disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 4}
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def data() -> tuple[RetrievalDataset, RetrievalDataset]:
    return RetrievalDataset.from_id_rows(generated_pages(24, seed=1, page_size_px=64)).split(6)


@pytest.fixture(scope="module")
def half_path(clip_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP that was saved in bfloat16, as VLMs are."""
    folder = tmp_path_factory.mktemp("models") / "half"
    load_model(clip_path, dtype="bfloat16", device="cpu").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def llava_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its LM head is not tied to the input embeddings."""
    return tiny_llava(tmp_path_factory.mktemp("models") / "llava")


def in_half(path: str) -> SentenceTransformer:
    return load_model(path, dtype="bfloat16", device="cpu")


def types_of(model: nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters()}


def types_in(folder: Path) -> set[str]:
    """The types in the files of weights below a folder."""
    found = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return found


# What fits


@pytest.mark.parametrize(
    ("portion", "options", "expected"),
    [
        (Portion(10, FLOAT32, True), {"autocast": False}, 160),
        (Portion(10, FLOAT32, True), {"autocast": True}, 180),
        (Portion(10, FLOAT32, True), {"autocast": True, "compensated": True}, 180),
        (Portion(10, FLOAT32, True), {"autocast": True, "processes": 2}, 220),
        (Portion(10, BFLOAT16, True), {"autocast": True}, 80),
        (Portion(10, BFLOAT16, True), {"autocast": True, "compensated": True}, 100),
        (Portion(10, BFLOAT16, True), {"autocast": True, "compensated": True, "processes": 2}, 120),
        (Portion(10, FLOAT32, False), {"autocast": True}, 40),
        (Portion(10, BFLOAT16, False), {"autocast": True, "compensated": True, "processes": 2}, 20),
    ],
)
def test_the_bytes_of_a_training(portion: Portion, options: dict[str, Any], expected: int) -> None:
    assert training_bytes([portion], **options) == expected
    assert training_bytes([portion, portion], **options) == 2 * expected


@pytest.mark.parametrize("compensated", [False, True])
def test_the_bytes_are_those_of_a_real_step(compensated: bool, clip_path: str, data: Any, tmp_path: Path) -> None:
    model = in_half(clip_path) if compensated else load_model(clip_path, device="cpu")
    held = {}

    class Counting(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):  # the gradients are still there
            optimizer = kwargs["optimizer"]
            states = [part for state in optimizer.state.values() for part in state.values()]
            tensors = [part for part in states if isinstance(part, torch.Tensor) and part.numel() > 1]
            tensors += [part for weight in model.parameters() for part in (weight, weight.grad) if part is not None]
            held["bytes"] = sum(part.numel() * part.itemsize for part in tensors)

    result = finetune(model, data[0], output_dir=tmp_path, freeze=("vision",), callbacks=[Counting()], **QUIET)
    estimate = result.settings["training"]["bytes_of_weights_gradients_optimizer"]
    assert estimate == pytest.approx(held["bytes"], rel=0.01)


BIG = WeightCounts(trained=2_000_000_000)


@pytest.mark.parametrize(
    ("counts", "memory", "options", "dtype", "fits"),
    [
        (BIG, 80, {}, FLOAT32, True),
        (BIG, 32, {}, BFLOAT16, True),
        (BIG, 8, {}, BFLOAT16, False),
        (BIG, 50, {"processes": 1}, FLOAT32, True),
        (BIG, 50, {"processes": 2}, BFLOAT16, True),
        # half of it frozen
        (WeightCounts(1_000_000_000, 1_000_000_000), 32, {}, FLOAT32, True),
        # adapters beside it
        (WeightCounts(0, 2_000_000_000, 40_000_000), 80, {"saved": BFLOAT16}, BFLOAT16, True),
        (WeightCounts(0, 2_000_000_000, 40_000_000), 80, {"saved": FLOAT32}, FLOAT32, True),
        (WeightCounts(0, 2_000_000_000, 40_000_000), 8, {"saved": FLOAT32}, BFLOAT16, True),
        (None, 80, {}, BFLOAT16, True),
    ],
)
def test_the_widest_type_that_fits_is_chosen(
    counts: WeightCounts | None, memory: int, options: dict[str, Any], dtype: torch.dtype, fits: bool
) -> None:
    choice = choose_dtype(counts, memory * GIB, **options)
    assert (choice.dtype, choice.fits) == (dtype, fits)


def test_the_reason_has_the_numbers() -> None:
    assert choose_dtype(BIG, 32 * GIB).reason == (
        "weights, gradients and optimizer take 33.5 GiB in float32 and 18.6 GiB in bfloat16, with 24.0 GiB, which is "
        "75% of the memory that is free"
    )


@pytest.mark.parametrize(
    ("fixture", "load", "options"),
    [
        ("clip_path", load_model, {}),
        ("clip_path", load_model, {"freeze": ("image",)}),
        ("clip_path", load_model, {"lora": True}),
        ("clip_path", load_model, {"lora": True, "freeze": ("text",)}),
        ("half_path", load_model, {"freeze": ("text",)}),
        ("qwen3_vl_path", load_model, {"freeze": ("vision",)}),
        ("qwen3_vl_path", load_model, {"lora": True}),
        ("llava_path", build_reranker, {}),
        ("text_reranker_path", build_reranker, {}),
    ],
)
def test_weights_are_counted_before_they_are_there(
    fixture: str, load: Callable[..., Any], options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    if "lora" in options:
        pytest.importorskip("peft")
    path = request.getfixturevalue(fixture)
    model = load(path, device="cpu")
    counts = count_weights(open_checkpoint(path), type(model), **options)
    freeze_parts(model, options.get("freeze"))
    add_lora(model, options.get("lora"), freeze=options.get("freeze", ()))
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert counts.trained + counts.adapters == trained
    assert counts.trained + counts.adapters + counts.frozen == total
    assert bool(counts.adapters) == bool(options.get("lora"))


def test_what_can_not_be_counted_is_not_guessed(clip_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor")

    monkeypatch.setattr("mmtune.models.memory.lay_out", fail)
    assert count_weights(open_checkpoint(clip_path), SentenceTransformer) is None


def test_memory_that_torch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (5, 80), "memory_reserved": 4, "memory_allocated": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 8


# What a call chooses


def choose(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    *,
    free: float = 80 * GIB,
    began_in: str | None = None,
    call: dict[str, Any] | None = None,
    **given: Any,
) -> run_weights.WeightsChoice:
    """What a call on a GPU chooses, without one."""
    monkeypatch.setattr(run_weights, "free_bytes", lambda device: free)
    plain = {"bf16": True, "fp16": False, "device": torch.device("cuda"), "fsdp": [], "deepspeed": None}
    args: Any = SimpleNamespace(**{**plain, "world_size": 1, **given})
    own = {"kind": EMBEDDING, "lora": None, "freeze": (), "args": None, "training_arguments": {}, **(call or {})}
    return choose_weights(SimpleNamespace(model=model, **own), args, began_in)  # type: ignore[arg-type]


def test_a_checkpoint_is_trained_in_float32_where_that_fits(half_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(half_path, monkeypatch)
    assert (choice.dtype, choice.saved) == (FLOAT32, BFLOAT16)
    assert "in float32, within 60.0 GiB" in choice.reason


def test_a_checkpoint_is_trained_in_bfloat16_where_only_that_fits(
    half_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_weights(open_checkpoint(half_path), SentenceTransformer).trained
    choice = choose(half_path, monkeypatch, free=15 * counted)
    assert (choice.dtype, choice.saved) == (BFLOAT16, BFLOAT16)
    # the caller's own AdamW keeps no compensation, which leaves room for nothing more than it takes
    assert choose(half_path, monkeypatch, free=25 * counted).dtype == FLOAT32


def test_a_call_that_will_not_fit_says_so(
    half_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose(half_path, monkeypatch, free=1000).dtype == BFLOAT16
    assert "will probably not fit" in caplog.text
    assert "lora=True" in caplog.text


@pytest.mark.parametrize(
    ("given", "dtype", "reason"),
    [
        ({"bf16": False}, FLOAT32, "no CUDA device"),
        ({"bf16": False, "fp16": True}, FLOAT32, "no CUDA device"),
        ({"device": torch.device("cpu")}, FLOAT32, "no CUDA device"),
        ({"fsdp": ["full_shard"]}, BFLOAT16, "FSDP and DeepSpeed"),
        ({"deepspeed": "zero.json"}, BFLOAT16, "FSDP and DeepSpeed"),
        ({"began_in": "bfloat16"}, BFLOAT16, "the run began with it"),
        ({"began_in": "float32", "free": 0}, FLOAT32, "the run began with it"),
    ],
)
def test_what_the_caller_or_the_run_has_settled_is_kept(
    given: dict[str, Any], dtype: torch.dtype, reason: str, clip_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose(clip_path, monkeypatch, **given)
    assert choice.dtype == dtype
    assert reason in choice.reason


def test_a_model_that_is_given_keeps_its_type(clip_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(in_half(clip_path), monkeypatch)
    assert (choice.dtype, choice.saved) == (BFLOAT16, None)


def test_a_router_is_trained_in_float32(
    text_encoder_path: str, siglip_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compose_router(text_encoder_path, siglip_path, dimension=16, device="cpu").save_pretrained(str(tmp_path))
    choice = choose(str(tmp_path), monkeypatch, free=0)
    assert (choice.dtype, choice.saved) == (FLOAT32, None)


def test_weights_beside_adapters_stay_as_they_were_saved(
    half_path: str, clip_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    assert choose(half_path, monkeypatch, call={"lora": True}).dtype == BFLOAT16
    assert choose(clip_path, monkeypatch, call={"lora": True}).dtype == FLOAT32


def test_the_processes_agree_on_the_least_memory(half_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_weights, "gather_object", lambda own: [*own, 0])
    assert choose(half_path, monkeypatch).dtype == BFLOAT16


def test_a_type_for_weights_belongs_to_the_model(clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'dtype' is neither.*belongs to the model: .*path, dtype='bfloat16'\)"):
        finetune(clip_path, generated_pages(6), output_dir=tmp_path, dtype="bfloat16")


# The optimizer


def test_weights_in_bfloat16_get_the_compensated_optimizer(clip_path: str, data: Any, tmp_path: Path) -> None:
    result = finetune(in_half(clip_path), data[0], output_dir=tmp_path, **QUIET)
    optimizer = result.trainer.optimizer.optimizer
    assert type(optimizer) is optimi.AdamW
    assert all(group["kahan_sum"] for group in optimizer.param_groups if group["params"])
    assert optimizer.defaults["triton"] is False, "no kernel that adds up in another order each time"
    kept = [state["kahan_comp"] for state in optimizer.state.values()]
    assert {comp.dtype for comp in kept} == {BFLOAT16}
    assert any(bool(comp.any()) for comp in kept)
    assert result.trainer.args.optim == "stable_adamw"
    told = result.settings["training"]
    assert told["optimizer"] == "optimi.AdamW, compensated"
    assert told["adam_betas"] == [0.9, 0.99]
    assert told["weights"] == told["weights_saved_in"] == "bfloat16"
    assert told["weights_reason"] == "the model was given with weights of this type"


def test_weights_in_float32_keep_the_usual_optimizer(clip_path: str, data: Any, tmp_path: Path) -> None:
    result = finetune(clip_path, data[0], output_dir=tmp_path, **QUIET)
    assert type(result.trainer.optimizer.optimizer) is torch.optim.AdamW
    assert result.settings["training"]["adam_betas"] == [0.9, 0.999]


def test_the_compensated_optimizer_follows_the_arguments(clip_path: str, data: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 at learning_rate=0.001 is rounded away at every step"):
        result = finetune(
            in_half(clip_path),
            data[0],
            output_dir=tmp_path,
            weight_decay=0.1,
            learning_rate=1e-3,
            adam_beta2=0.95,
            adam_epsilon=1e-7,
            learning_rate_mapping={r"text_projection": 5e-3},
            **QUIET,
        )
    groups = [group for group in result.trainer.optimizer.param_groups if group["params"]]
    assert {(group["initial_lr"], group["weight_decay"]) for group in groups} == {(1e-3, 0.1), (1e-3, 0.0), (5e-3, 0.1)}
    assert {(group["beta1"], group["beta2"], group["eps"]) for group in groups} == {(0.9, 0.95, 1e-7)}
    # the schedule has reached its end
    assert {group["lr"] for group in groups} == {0.0}


def test_an_optimizer_of_the_caller_that_compensates_is_taken(clip_path: str, data: Any, tmp_path: Path) -> None:
    result = finetune(in_half(clip_path), data[0], output_dir=tmp_path, optim="stable_adamw", **QUIET)
    assert type(result.trainer.optimizer.optimizer) is optimi.StableAdamW
    assert result.settings["training"]["optimizer"] == "stable_adamw"
    assert result.settings["training"]["adam_betas"] == [0.9, 0.999]


def test_an_optimizer_of_the_caller_is_taken_with_a_warning(clip_path: str, data: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"bfloat16, and optim='adamw_torch' loses about \d\d% of its steps") as told:
        result = finetune(in_half(clip_path), data[0], output_dir=tmp_path, optim="adamw_torch", **QUIET)
    assert "optim='stable_adamw'" in str(told[0].message)
    assert type(result.trainer.optimizer.optimizer) is torch.optim.AdamW
    assert result.settings["training"]["adam_betas"] == [0.9, 0.999]


def test_arguments_of_the_host_are_taken_with_a_warning(clip_path: str, data: Any, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        learning_rate=2e-5,
    )
    with pytest.warns(UserWarning, match="loses about|in-batch negatives") as told:
        result = finetune(in_half(clip_path), data[0], args=args)
    assert [str(each.message) for each in told if "loses about" in str(each.message)]
    assert type(result.trainer.optimizer.optimizer) is torch.optim.AdamW
    assert args.optim == "adamw_torch_fused"


# Steps that are lost


@pytest.mark.parametrize("rate", [2e-4, 2e-5, 5e-6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_lost_steps_is_that_of_a_real_step(rate: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(200, 100, generator=generator)).to(dtype))
    before = weight.detach().clone()
    weight.grad = torch.randn(200, 100, generator=generator).to(dtype)
    torch.optim.AdamW([weight], lr=rate, weight_decay=0.0).step()
    lost = (weight == before).float().mean().item()
    assert share_lost([(before, rate)]) == pytest.approx(lost, abs=0.02)


def test_the_share_counts_weights_and_not_tensors() -> None:
    large, small = torch.full((300,), 0.02, dtype=BFLOAT16), torch.full((100,), 1e-6, dtype=BFLOAT16)
    assert share_lost([(large, 2e-5), (small, 2e-5)]) == 0.75
    assert share_lost([(large, 2e-5), (small, 0.0)]) == 1.0
    assert share_lost([(torch.zeros(5, dtype=BFLOAT16), 2e-5)]) == 0.0
    assert share_lost([]) == 0.0


class Layer(nn.Module):
    """One layer whose weights all have the same spacing."""

    def __init__(self, dtype: torch.dtype = BFLOAT16) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8, bias=False, dtype=dtype)
        nn.init.constant_(self.one.weight, 0.02)


def arguments(**given: Any) -> Any:
    plain = {"optim": "adamw_torch", "learning_rate": 1e-4, "weight_decay": 0.0, "lr_scheduler_type": "linear"}
    return SimpleNamespace(**{**plain, "learning_rate_mapping": {}, "fsdp": [], "deepspeed": None, **given})


# neighbours of 0.02 are 1.2e-4 away in bfloat16, and half of that is 6.1e-5
@pytest.mark.parametrize(
    ("given", "warns"),
    [
        ({}, True),
        ({"lr_scheduler_type": "constant"}, False),
        ({"learning_rate": 2e-4}, False),
        ({"learning_rate_mapping": {r"\.one\.": 2e-4}}, False),
        ({"learning_rate_mapping": {r"\.two\.": 2e-4}}, True),
        ({"optim": "stable_adamw"}, False),
        ({"optim": "sgd"}, False),
        ({"optim": "lion_32bit"}, True),
        ({"fsdp": ["full_shard"]}, False),
    ],
)
def test_a_warning_goes_by_the_mean_step_of_each_weight(
    given: dict[str, Any], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    warn_of_rounding(Layer(), arguments(**given))
    assert [str(each.message).partition(" of its steps")[0][-4:] for each in recwarn] == (["100%"] if warns else [])


def test_weights_in_float32_and_frozen_ones_lose_nothing(recwarn: pytest.WarningsRecorder) -> None:
    warn_of_rounding(Layer(FLOAT32), arguments(learning_rate=1e-6, weight_decay=0.1))
    frozen = Layer()
    frozen.requires_grad_(False)
    warn_of_rounding(frozen, arguments(learning_rate=1e-6, weight_decay=0.1))
    assert not list(recwarn)


def test_float16_is_not_sent_to_an_optimizer_that_fails_on_it() -> None:
    with pytest.warns(UserWarning, match="float16, and optim='adamw_torch' loses about 100%") as told:
        warn_of_rounding(Layer(torch.float16), arguments(learning_rate=1e-6))
    assert "stable_adamw" not in str(told[0].message)


# Resuming


def assert_resumes(call: Callable[..., Any], folder: Path) -> Any:
    """A run that is cut off after half of its steps ends with the weights of one that was not; its first result."""
    options = {"max_steps": 8, "save_steps": 4, "save_total_limit": None, "disable_tqdm": True, "learning_rate": 1e-4}
    whole = call(output_dir=folder, **options)
    then = weights(whole.model)
    shutil.rmtree(folder / "checkpoint-8")
    resumed = call(output_dir=folder, resume=True, **options)
    assert_same_weights(then, weights(resumed.model))
    assert resumed.after == whole.after
    first, second = (each.settings["training"] for each in (whole, resumed))
    assert first["optimizer"] == second["optimizer"]
    assert first["weights"] == second["weights"]
    return whole


def test_a_compensated_run_resumes_to_the_bit(clip_path: str, data: Any, tmp_path: Path) -> None:
    result = assert_resumes(lambda **options: finetune(in_half(clip_path), *data, **options), tmp_path)
    assert result.settings["training"]["optimizer"] == "optimi.AdamW, compensated"


def test_a_checkpoint_in_bfloat16_trained_in_float32_resumes_to_the_bit(
    half_path: str, data: Any, tmp_path: Path
) -> None:
    result = assert_resumes(lambda **options: finetune(half_path, *data, **options), tmp_path)
    assert result.settings["training"]["weights"] == "float32"


@pytest.mark.parametrize("head", ["dense", "logit_score"])
def test_a_reranker_with_an_exact_head_resumes_to_the_bit(
    head: str, llava_path: str, data: Any, tmp_path: Path
) -> None:
    def call(**options: Any) -> Any:
        model = build_reranker(llava_path, head=head, dtype="bfloat16", device="cpu")
        return finetune_reranker(model, data[0], num_negatives=1, **options)

    result = assert_resumes(call, tmp_path)
    assert result.settings["training"]["weights"] == "bfloat16, float32"


def test_a_run_does_not_go_on_with_weights_of_another_type(clip_path: str, data: Any, tmp_path: Path) -> None:
    options = {**QUIET, "save_steps": 1}
    finetune(in_half(clip_path), data[0], output_dir=tmp_path, **options)
    with pytest.raises(ConfigError, match="type of the weights: 'bfloat16' then, 'float32' now"):
        finetune(load_model(clip_path, device="cpu"), data[0], output_dir=tmp_path, resume=True, **options)


# What is saved


def measured_at(result: FinetuneResult, step: int) -> float:
    """The primary metric as it was measured in the training after a step."""
    key = f"eval_{result.primary_metric}"
    return next(log[key] for log in result.trainer.state.log_history if log["step"] == step and key in log)


def test_the_result_has_the_type_of_the_checkpoint(half_path: str, data: Any, tmp_path: Path) -> None:
    result = finetune(half_path, *data, output_dir=tmp_path, learning_rate=1e-3, keep="last", **QUIET)
    final = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert types_of(result.model) == types_of(final) == {BFLOAT16}
    assert_same_weights(result.model, final)
    assert types_in(tmp_path / "final") == {"BF16"}
    assert types_in(tmp_path / "checkpoint-1") == {"F32"}, "checkpoints are exact"
    told = result.settings["training"]
    assert (told["weights"], told["weights_saved_in"]) == ("float32", "bfloat16")
    # what was measured is the model as it is saved
    dims = told["evaluated_dims"][1:]
    evaluator = build_evaluator(data[1], truncate_dims=dims, show_progress_bar=False)
    assert evaluator(final) == result.after
    assert evaluator(SentenceTransformer(half_path, device="cpu")) == result.before
    assert measured_at(result, 2) == evaluator(final)[result.primary_metric]


def test_the_start_is_kept_bit_for_bit(half_path: str, data: Any, tmp_path: Path) -> None:
    result = finetune(half_path, *data, output_dir=tmp_path, learning_rate=0.0, **QUIET)
    assert result.settings["training"]["kept"].startswith("the start")
    assert types_in(tmp_path / "start") == {"BF16"}
    assert_same_weights(SentenceTransformer(half_path, device="cpu"), result.model)
    assert_same_weights(SentenceTransformer(half_path, device="cpu"), SentenceTransformer(str(tmp_path / "final")))


def test_a_model_that_was_given_in_float32_is_saved_in_it(half_path: str, data: Any, tmp_path: Path) -> None:
    model = load_model(half_path, dtype="float32", device="cpu")
    finetune(model, data[0], output_dir=tmp_path, **QUIET)
    assert types_of(model) == {FLOAT32}
    assert types_in(tmp_path / "final") == {"F32"}


@pytest.mark.parametrize("fixture", ["half_path", "clip_path"])
def test_under_autocast_too_the_result_embeds_as_it_is_saved(
    fixture: str, data: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    options = {"keep": "last", "learning_rate": 1e-3, "bf16": True, "use_cpu": True, **QUIET}
    result = finetune(request.getfixturevalue(fixture), *data, output_dir=tmp_path, **options)
    assert result.settings["training"]["weights"] == "float32"
    final = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    texts = ["revenue in 2021", "the red planet"]
    assert torch.equal(*(model.encode(texts, convert_to_tensor=True) for model in (result.model, final)))
    assert measured_at(result, 2) == result.after[result.primary_metric]


def test_a_model_shown_as_saved_is_what_it_was_afterwards(clip_path: str) -> None:
    model = load_model(clip_path, device="cpu")
    embeddings = model[0].model.text_model.embeddings.token_embedding
    model.tied = nn.Embedding.from_pretrained(embeddings.weight.detach())
    model.tied.weight = embeddings.weight
    before = dict(model.named_parameters())
    exact = weights(model)
    with as_saved(model, {id(weight): BFLOAT16 for weight in model.parameters()}):
        assert types_of(model) == {BFLOAT16}
        assert model.tied.weight is embeddings.weight
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert_same_weights(exact, model)


# Adapters


def test_adapters_beside_bfloat16_learn_in_float32(clip_path: str, data: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = in_half(clip_path)
    result = finetune(model, data[0], output_dir=tmp_path, lora=True, **QUIET)
    by_kind = {"lora_" in name: weight.dtype for name, weight in model.named_parameters()}
    assert by_kind == {True: FLOAT32, False: BFLOAT16}
    assert type(result.trainer.optimizer.optimizer) is torch.optim.AdamW
    assert result.settings["training"]["weights"] == "float32"
    assert types_in(tmp_path / "checkpoint-2") == {"F32"}


def test_adapters_that_a_model_brings_are_trained_and_saved_in_float32(
    half_path: str, data: Any, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    finetune(half_path, data[0], output_dir=tmp_path / "first", lora=True, **QUIET)
    brought = in_half(str(tmp_path / "first" / "final"))
    assert types_of(brought) == {BFLOAT16}
    result = finetune(brought, data[0], output_dir=tmp_path / "second", **QUIET)
    told = result.settings["training"]
    assert (told["weights"], told["weights_saved_in"]) == ("float32", "float32")
    assert types_in(tmp_path / "second" / "final") == {"F32"}
    by_path = finetune(tmp_path / "first" / "final", data[0], output_dir=tmp_path / "third", **QUIET)
    assert by_path.settings["training"]["weights_saved_in"] == "float32"
    assert types_in(tmp_path / "third" / "final") == {"F32"}


def test_a_projection_beside_adapters_loses_no_steps(qwen3_vl_path: str, data: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = build_late_interaction(qwen3_vl_path, dimension=32, dtype="bfloat16", device="cpu")
    result = finetune(model, data[0], output_dir=tmp_path, lora=True, **QUIET)
    assert result.settings["training"]["weights"] == "bfloat16, float32"
    assert result.settings["training"]["optimizer"] == "optimi.AdamW, compensated"


# Rerankers


def heads_of(model: CrossEncoder) -> dict[str, torch.Tensor]:
    names = ("classifier", "lm_head", "1.linear", "2.linear")
    return {name: value for name, value in weights(model).items() if any(part in name for part in names)}


@pytest.mark.parametrize("head", ["dense", "logit_score", "classifier"])
def test_the_head_of_a_reranker_learns_in_float32(
    head: str, llava_path: str, text_reranker_path: str, data: Any, tmp_path: Path
) -> None:
    if head == "classifier":
        model = build_reranker(text_reranker_path, dtype="bfloat16", device="cpu")
    else:
        model = build_reranker(llava_path, head=head, dtype="bfloat16", device="cpu")
    seen = {}

    class Looking(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.update(heads_of(model))

    before = heads_of(model)
    options = {"num_negatives": 1, "learning_rate": 1e-6, "callbacks": [Looking()], **QUIET}
    if head == "classifier":
        finetune_reranker(model, table(8), documents="text", output_dir=tmp_path, **options)
    else:
        finetune_reranker(model, data[0], output_dir=tmp_path, **options)
    assert {value.dtype for value in seen.values()} == {FLOAT32}
    assert any(not torch.equal(seen[name], before[name].float()) for name in seen), "no step was lost"
    assert types_of(model) == {BFLOAT16}, "and it is saved as it came"
    assert types_in(tmp_path / "final") == {"BF16"}
    assert "F32" in types_in(tmp_path / "checkpoint-2")


def test_a_head_that_is_tied_to_the_embeddings_stays_with_them(qwen3_vl_path: str, data: Any, tmp_path: Path) -> None:
    model = build_reranker(qwen3_vl_path, dtype="bfloat16", device="cpu")
    result = finetune_reranker(model, data[0], num_negatives=1, output_dir=tmp_path, **QUIET)
    assert result.settings["training"]["weights"] == "bfloat16"
    assert result.settings["training"]["optimizer"] == "optimi.AdamW, compensated"


def test_a_call_that_fails_leaves_the_head_in_its_type(llava_path: str, data: Any, tmp_path: Path) -> None:
    model = build_reranker(llava_path, head="dense", dtype="bfloat16", device="cpu")

    def fail(model: Any) -> nn.Module:
        assert model[-1].linear.weight.dtype == FLOAT32
        raise RuntimeError("no loss")

    with pytest.raises(ConfigError, match="RuntimeError: no loss"):
        finetune_reranker(model, data[0], output_dir=tmp_path, loss=fail, **QUIET)
    assert types_of(model) == {BFLOAT16}


def test_a_reranker_is_built_for_what_fits(llava_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count_weights(open_checkpoint(llava_path), CrossEncoder).trained
    total = sum(portion.count for portion in portions_of(build_reranker(llava_path, device="cpu")))
    assert counted == total
    for free, dtype in ((25 * counted, FLOAT32), (15 * counted, BFLOAT16)):
        assert choose(llava_path, monkeypatch, free=free, call={"kind": RERANKING}).dtype == dtype
