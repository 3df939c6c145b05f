"""The door: exactly the public names, with the arguments that were promised, and no work at import."""

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mmtune
import mmtune.testing

PUBLIC = [
    "ROUTER_PRESETS",
    "AuditReport",
    "Comparison",
    "ConfigError",
    "ConflictFreeBatchSampler",
    "DatasetError",
    "FinetuneResult",
    "Frontier",
    "FrontierRow",
    "ImageDecodeError",
    "MediaDecodeError",
    "MissingDocumentError",
    "MissingExtraError",
    "MmtuneError",
    "OpenAICompatible",
    "PipelineReport",
    "Plan",
    "RetrievalDataset",
    "RouterPreset",
    "ServingReport",
    "TeacherScores",
    "Verdict",
    "as_mteb_task",
    "build_evaluator",
    "build_late_interaction",
    "build_reranker",
    "build_reranking_evaluator",
    "check_serving",
    "compare_models",
    "compare_per_query",
    "compose_router",
    "distill_query_encoder",
    "encode_corpus",
    "evaluate_pipeline",
    "export_model",
    "extract_route",
    "find_false_negatives",
    "finetune",
    "finetune_reranker",
    "generate_queries",
    "judge_negatives",
    "load_model",
    "merge_lora",
    "mine_hard_negatives",
    "read_shards",
    "router_preset",
    "score_rows",
    "size_frontier",
]
TESTING = [
    *("generated_audio", "generated_clips", "generated_pages", "generated_pdfs"),
    *("tiny_ast", "tiny_clap", "tiny_clip", "tiny_llava", "tiny_qwen3_vl", "tiny_siglip", "tiny_text_encoder"),
    *("tiny_videomae", "tiny_whisper"),
]


class Promised:
    """The signatures that users rely on. More arguments may follow, keyword-only and with a default."""

    def __init__(self, corpus, queries, qrels, negatives=None): ...

    def from_id_rows(
        self,
        rows,
        *,
        id_column="id",
        query_column="query",
        image_column="image",
        negatives_column="negatives",
        on_missing="error",
    ): ...

    def from_columns(self, rows, *, query_column="query", image_column="image", negative_columns=None): ...

    def from_pdfs(
        self, paths, queries=None, *, max_pixels=1_500_000, store=None, passwords=None, on_bad_file="report"
    ): ...

    def load(self, name_or_path, config=None, *, split=None, revision=None): ...

    def from_beir(self, corpus, queries, qrels): ...

    def concatenate(self, datasets): ...

    def save(self, folder): ...

    def export(self, folder, layout="beir"): ...

    def push_to_hub(self, repo_id): ...

    def select_queries(self, n_or_ids): ...

    def deduplicate(self): ...

    def audit(self, *, content=False, against=None): ...

    def without(self, findings): ...

    def labeled_pairs(self, num_negatives=4, *, direction="text_to_image", documents="image", seed=42): ...

    def split(self, eval_queries, *, seed=42, group_column=None): ...

    def training_rows(
        self, num_negatives=1, *, max_pixels=None, input_size=None, documents="image", on_short="random", seed=42
    ): ...

    @staticmethod
    def build_evaluator(
        dataset,
        *,
        model=None,
        name="vdr",
        truncate_dims=(),
        documents="image",
        ndcg_at_k=(10,),
        batch_size=16,
        show_progress_bar=True,
    ): ...

    @staticmethod
    def compare_per_query(before, after, *, groups=None, seed=0): ...

    @staticmethod
    def size_frontier(
        model, dataset, *, dims=None, dtypes=("float32", "int8", "binary"), calibration=None, tolerance=0.01
    ): ...

    @staticmethod
    def encode_corpus(dataset, model, folder, *, dtype="float32", dim=None, engine="local"): ...

    @staticmethod
    def load_model(
        name_or_path, *, max_pixels=None, min_pixels=None, dtype="auto", attention="auto", device=None, **host_kwargs
    ): ...

    @staticmethod
    def build_reranking_evaluator(
        dataset, *, direction="text_to_image", num_candidates=10, name="vdr-rerank", batch_size=16
    ): ...

    @staticmethod
    def build_reranker(
        name_or_path,
        *,
        head="logit_score",
        true_token="1",
        false_token="0",
        prompts=None,
        max_pixels=None,
        **host_kwargs,
    ): ...

    @staticmethod
    def compose_router(text, image=None, *, dimension=None, freeze=(), device=None): ...

    @staticmethod
    def router_preset(name, **overrides): ...

    @staticmethod
    def find_false_negatives(dataset, model): ...

    @staticmethod
    def mine_hard_negatives(
        dataset,
        model,
        *,
        num_negatives=4,
        relative_margin=0.05,
        absolute_margin=None,
        range_min=0,
        range_max=None,
        max_score=None,
        reranker=None,
        batch_size=16,
        cache_folder=None,
        show_progress_bar=True,
    ): ...

    @staticmethod
    def generate_queries(
        dataset,
        generator,
        *,
        queries_per_page=2,
        kinds=None,
        languages=None,
        judge=None,
        retriever=None,
        near_misses=0,
        existing="keep",
        store=None,
        max_workers=8,
        show_progress_bar=True,
    ): ...

    @staticmethod
    def judge_negatives(dataset, judge, *, store=None, show_progress_bar=True): ...

    @staticmethod
    def finetune_reranker(
        model,
        train_dataset,
        eval_dataset=None,
        *,
        output_dir=None,
        num_negatives=4,
        directions=("text_to_image",),
        loss=None,
        args=None,
        documents="image",
        lora=None,
        freeze=(),
        allow_overlap=False,
        overwrite=False,
        resume=False,
        seed=42,
        **training_arguments,
    ): ...

    @staticmethod
    def finetune(
        model,
        train_dataset,
        eval_dataset=None,
        *,
        output_dir=None,
        num_negatives=1,
        matryoshka_dims="auto",
        mini_batch_size="auto",
        loss=None,
        args=None,
        prompts="model",
        documents="image",
        lora=None,
        freeze=(),
        allow_overlap=False,
        overwrite=False,
        resume=False,
        seed=42,
        **training_arguments,
    ): ...

    @staticmethod
    def distill_query_encoder(
        model, text_encoder, queries, eval_dataset=None, *, output_dir=None, **training_arguments
    ): ...

    @staticmethod
    def compare_models(models, dataset, *, truncate_dims=(), name="vdr", store=None): ...

    @staticmethod
    def generated_pages(num_queries, *, num_negatives=4, seed=0): ...

    @staticmethod
    def generated_pdfs(folder, *, seed=0): ...

    @staticmethod
    def generated_audio(n, *, seed=0): ...

    @staticmethod
    def generated_clips(n, *, seed=0): ...

    @staticmethod
    def tiny_clip(folder): ...

    tiny_siglip = tiny_text_encoder = tiny_qwen3_vl = tiny_llava = tiny_clip
    tiny_clap = tiny_ast = tiny_whisper = tiny_videomae = tiny_clip


METHODS = [
    "__init__",
    *("from_id_rows", "from_columns", "from_beir", "from_pdfs", "load", "concatenate"),
    *("training_rows", "labeled_pairs", "split", "select_queries", "deduplicate", "audit", "without", "save"),
]
FUNCTIONS = [
    *("build_evaluator", "build_reranking_evaluator", "build_reranker", "compare_per_query"),
    *("compare_models", "compose_router", "finetune"),
    *("finetune_reranker", "load_model", "mine_hard_negatives", "router_preset"),
    *("distill_query_encoder", "find_false_negatives", "generate_queries", "judge_negatives"),
]


def actual(name: str) -> Callable[..., Any]:
    """The public callable of that name; class methods as plain functions, with ``cls``."""
    if name in METHODS:
        found = inspect.getattr_static(mmtune.RetrievalDataset, name)
        return found.__func__ if isinstance(found, classmethod) else found
    return getattr(mmtune.testing if name in TESTING else mmtune, name)


def test_all_is_sorted_and_exactly_the_public_names() -> None:
    assert list(mmtune.__all__) == PUBLIC
    assert sorted(mmtune.testing.__all__) == TESTING


def test_every_name_of_all_is_there() -> None:
    assert [name for name in PUBLIC if not hasattr(mmtune, name)] == []
    assert isinstance(mmtune.__version__, str)


@pytest.mark.parametrize("name", [*METHODS, *FUNCTIONS, *TESTING])
def test_arguments_are_as_promised(name: str) -> None:
    promised = dict(inspect.signature(getattr(Promised, name)).parameters)
    found = dict(inspect.signature(actual(name)).parameters)
    if name in METHODS:
        promised.pop("self")
        found.pop(next(iter(found)))
    assert [key for key in promised if key not in found] == []
    for key, parameter in promised.items():
        assert (key, found[key].kind, found[key].default) == (key, parameter.kind, parameter.default)
    positional = [key for key, parameter in found.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [key for key in promised if promised[key].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    for key in found.keys() - promised.keys():
        assert found[key].kind is inspect.Parameter.KEYWORD_ONLY, key
        assert found[key].default is not inspect.Parameter.empty, key


@pytest.mark.parametrize("name", ["from_id_rows", "from_columns", "load"])
def test_builders_are_class_methods(name: str) -> None:
    assert isinstance(inspect.getattr_static(mmtune.RetrievalDataset, name), classmethod)


def test_the_result_has_the_promised_fields() -> None:
    promised = {"model", "trainer", "before", "after", "primary_metric", "output_dir", "report"}
    fields = set(getattr(mmtune.FinetuneResult, "__dataclass_fields__", ()))
    assert promised <= fields | set(dir(mmtune.FinetuneResult))


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, and every public method that mmtune itself defines on a public class."""
    for module, names in ((mmtune, PUBLIC), (mmtune.testing, TESTING)):
        for name in names:
            if name == "ROUTER_PRESETS":  # a table, no callable
                continue
            exported = getattr(module, name, None)
            if not inspect.isclass(exported):
                if exported is not None:
                    yield name, exported
                continue
            for key, member in vars(exported).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                written_here = str(getattr(function, "__module__", "")).startswith("mmtune")
                if inspect.isfunction(function) and written_here and not (key.startswith("_") and key != "__init__"):
                    yield f"{name}.{key}", function


@pytest.mark.parametrize(("name", "function"), [pytest.param(*pair, id=pair[0]) for pair in public_callables()])
def test_public_functions_are_documented_and_typed(name: str, function: Callable[..., Any]) -> None:
    if not name.endswith("__init__"):
        assert (function.__doc__ or "").strip(), f"{name} has no docstring"
    signature = inspect.signature(function)
    parameters = [parameter for key, parameter in signature.parameters.items() if key not in ("self", "cls")]
    assert [str(p) for p in parameters if p.annotation is inspect.Parameter.empty] == []
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", sorted({*PUBLIC} - {"ROUTER_PRESETS"}))
def test_public_classes_are_documented(name: str) -> None:
    exported = getattr(mmtune, name)
    assert (exported.__doc__ or "").strip()
    assert exported.__module__.startswith("mmtune.")


ERRORS = {
    "MmtuneError": (Exception,),
    "DatasetError": (mmtune.MmtuneError, ValueError),
    "MissingDocumentError": (mmtune.DatasetError,),
    "ImageDecodeError": (mmtune.DatasetError,),
    "ConfigError": (mmtune.MmtuneError, ValueError),
    "MissingExtraError": (mmtune.MmtuneError, ImportError),
}


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_inherit_the_standard_type_and_pickle(name: str) -> None:
    kind = getattr(mmtune, name)
    assert all(issubclass(kind, base) for base in ERRORS[name])
    copy = pickle.loads(pickle.dumps(kind("3 negatives point nowhere")))
    assert type(copy) is kind
    assert str(copy) == "3 negatives point nowhere"


def test_the_sampler_pickles() -> None:
    # The host saves its training arguments with every checkpoint, the sampler class among them.
    assert pickle.loads(pickle.dumps(mmtune.ConflictFreeBatchSampler)) is mmtune.ConflictFreeBatchSampler


IMPORT_PROBE = """
import json, logging, os, random, socket, warnings

# What the packages below do at import is theirs.
import accelerate, datasets, numpy, PIL.Image, sentence_transformers, torch, transformers
import sentence_transformers.sentence_transformer.evaluation
import sentence_transformers.sentence_transformer.losses

def state():
    loggers = [logging.root, *map(logging.getLogger, ("mmtune", "sentence_transformers", "transformers", "datasets"))]
    return {
        "environment": dict(os.environ),
        "log handlers and levels": [(len(logger.handlers), logger.level) for logger in loggers],
        "warning filters": [str(entry) for entry in warnings.filters],
        "random numbers": [hash(random.getstate()), torch.initial_seed(), str(numpy.random.get_state()[1][:4])],
        "threads": torch.get_num_threads(),
        "image limit": PIL.Image.MAX_IMAGE_PIXELS,
        "verbosity": [transformers.logging.get_verbosity(), datasets.logging.get_verbosity()],
    }

def no_network(*args, **kwargs):
    raise AssertionError("mmtune opened a connection at import")

socket.socket.connect = no_network
before = state()
import mmtune
[getattr(mmtune, name) for name in mmtune.__all__]  # each is imported when it is first used
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


def test_importing_mmtune_does_no_work() -> None:
    probe = subprocess.run(
        [sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, check=False, env=os.environ, timeout=120
    )
    assert probe.returncode == 0, probe.stderr
    assert json.loads(probe.stdout.splitlines()[-1]) == {}
