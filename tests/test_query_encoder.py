"""A small query encoder learns a model's query embeddings, and the documents' stay as they were, to the bit."""

import json
import math

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from mmtune import (
    ConfigError,
    DatasetError,
    RetrievalDataset,
    compose_router,
    distill_query_encoder,
    finetune,
    load_model,
)
from mmtune.evaluation.pipeline import open_retriever
from mmtune.models.adapters import save_model
from mmtune.models.query_routes import route_queries
from mmtune.testing import generated_pages, tiny_clap, tiny_clip, tiny_text_encoder
from mmtune.training import query_encoder
from mmtune.training.query_encoder import milliseconds_a_query
from mmtune.training.trainers import PageTrainer
from seeds import SEEDS
from test_distributed import run_processes

SHORT = {"num_train_epochs": 2, "disable_tqdm": True, "use_cpu": True}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("query-encoder")
    tiny_clip(folder / "clip")
    tiny_text_encoder(folder / "text", hidden_size=32, num_layers=1)
    return folder


@pytest.fixture(scope="module")
def pages():
    return [row["image"] for row in generated_pages(6)]


def teacher_of(kind, place):
    if kind == "router":
        return compose_router(str(place / "text"), str(place / "clip"))
    model = load_model(place / "clip", dtype="bfloat16" if kind == "bfloat16" else "float32")
    if kind == "normalised":
        model = SentenceTransformer(modules=[*model, Normalize()], prompts={"query": "find: ", "document": "page: "})
    if kind == "cut":
        model.truncate_dim = 16
    return model


@pytest.mark.parametrize("kind", ["plain", "normalised", "cut", "bfloat16", "router"])
def test_documents_are_embedded_as_before_to_the_bit(kind, place, pages, tmp_path):
    teacher = teacher_of(kind, place)
    before = teacher.encode_document(pages, convert_to_tensor=True)
    texts = teacher.encode_document(["a text as a document"], convert_to_tensor=True)
    queries = [f"question {number}" for number in range(8)]
    result = distill_query_encoder(teacher, place / "text", queries, output_dir=tmp_path / "run", **SHORT)
    assert result.settings["gates"]["host"].endswith("8 queries and 0 documents")
    plain = SentenceTransformer(str(tmp_path / "run" / "final"))
    for model in (result.model, plain):
        assert model.encode_document(pages, convert_to_tensor=True).equal(before)
        assert model.encode_document(["a text as a document"], convert_to_tensor=True).equal(texts)
    asked = plain.encode_query(["question 3"], convert_to_tensor=True)
    assert asked.equal(result.model.encode_query(["question 3"], convert_to_tensor=True))
    assert asked.shape[-1] == before.shape[-1]
    ends_normalised = kind in ("normalised", "router")
    assert math.isclose(float(asked.norm()), 1, abs_tol=1e-5) is ends_normalised
    assert plain.similarity_fn_name == teacher.similarity_fn_name
    assert plain.prompts["document"] == teacher.prompts["document"]


def test_queries_take_the_small_encoder_and_the_teacher_stays(place, pages):
    teacher = load_model(place / "clip")
    before = teacher.encode_query(["a question"], convert_to_tensor=True)
    routed = route_queries(teacher, str(place / "text"))
    with torch.no_grad():
        for weight in routed.student.parameters():
            weight.add_(0.1)
    assert teacher.encode_query(["a question"], convert_to_tensor=True).equal(before)
    small = routed.student.encode(["a question"], convert_to_tensor=True)
    assert routed.model.encode_query(["a question"], convert_to_tensor=True).equal(small)


def test_the_report_tells_what_was_kept_and_what_a_query_costs(place, tmp_path):
    data = RetrievalDataset.from_id_rows(generated_pages(20))
    train, evaluation = data.split(8)
    result = distill_query_encoder(
        str(place / "clip"), str(place / "text"), train, evaluation, output_dir=tmp_path / "run", **SHORT
    )
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The small query encoder keeps " in report
    assert " ms on one core of a CPU" in report
    saved = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert saved["before"][result.primary_metric] == result.before[result.primary_metric]
    assert saved["settings"]["queries"]["texts"] == len(train)
    assert saved["settings"]["queries"]["ms_a_query_after"] > 0
    assert "worse than it was" not in str(result)
    with pytest.raises(ConfigError, match="holds a run already"):
        distill_query_encoder(place / "clip", place / "text", train, output_dir=tmp_path / "run", **SHORT)
    again = distill_query_encoder(
        place / "clip", place / "text", train, output_dir=tmp_path / "run", overwrite=True, **SHORT
    )
    assert again.before == {}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["before"] == {}


def test_the_same_seed_gives_the_same_encoder(place, tmp_path):
    queries = [f"question {number}" for number in range(8)]
    found = [
        distill_query_encoder(place / "clip", place / "text", queries, output_dir=tmp_path / name, **SHORT).model
        for name in ("one", "two")
    ]
    one, two = (model.encode_query(queries, convert_to_tensor=True) for model in found)
    assert one.equal(two)


def test_a_killed_run_goes_on_to_the_same_encoder(place, tmp_path, monkeypatch):
    queries = [f"question {number}" for number in range(12)]
    train = PageTrainer.training_step

    def train_until(trainer, *given, **options):
        if trainer.state.global_step == 6:
            raise RuntimeError("killed")
        return train(trainer, *given, **options)

    def run(name, **options):
        given = {"output_dir": tmp_path / name, "save_strategy": "epoch", "per_device_train_batch_size": 3, **SHORT}
        return distill_query_encoder(place / "clip", place / "text", **{"queries": queries, **given, **options}).model

    whole = run("whole").encode_query(queries, convert_to_tensor=True)
    monkeypatch.setattr(PageTrainer, "training_step", train_until)
    with pytest.raises(RuntimeError, match="killed"):
        run("killed")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"holds a run already \(checkpoint-4\)"):
        run("killed")
    for other in ({"queries": queries[1:]}, {"learning_rate": 1e-3}):
        with pytest.raises(ConfigError, match=f"begun with other settings: {next(iter(other))}: "):
            run("killed", resume=True, **other)
    gone_on = run("killed", resume=True)
    assert gone_on.encode_query(queries, convert_to_tensor=True).equal(whole)
    again = SentenceTransformer(str(tmp_path / "killed" / "final"), device="cpu")
    assert again.encode_query(queries, convert_to_tensor=True).equal(whole)
    with pytest.raises(ConfigError, match="no checkpoint to go on from"):
        run("nothing", resume=True)


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from mmtune import distill_query_encoder

folder, given = Path(sys.argv[1]), eval(sys.argv[2])
queries = [f"question {number}" for number in range(16)]
options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True}
model = distill_query_encoder(*given, queries, output_dir=folder / "run", **options).model
found = model.encode_query(queries[:2], convert_to_tensor=True).tolist(), (folder / "run" / "final").is_dir()
(folder / f"rank-{os.environ['RANK']}.txt").write_text(repr(found))
"""


@pytest.mark.slow
def test_two_processes_train_one_encoder(place, tmp_path):
    one, other = run_processes(tmp_path, TWO_PROCESSES, (str(place / "clip"), str(place / "text")))
    assert one == other
    assert one[1]


def test_a_teacher_that_reads_sounds(place, tmp_path):
    given = (tiny_clap(tmp_path / "clap"), place / "text", ["one", "two"])
    with pytest.raises(ConfigError, match="embeds no images"):
        distill_query_encoder(*given, output_dir=tmp_path / "run", **SHORT)
    result = distill_query_encoder(*given, documents="audio", output_dir=tmp_path / "run", **SHORT)
    assert list(result.model[0].sub_modules) == ["document", "small_query"]


def test_processes_that_would_train_apart(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = (place / "clip", place / "text", ["one", "two"])
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 processes were started, .* each would train apart"):
        distill_query_encoder(*given, output_dir=tmp_path / "run", use_cpu=False)
    assert not any((tmp_path / "run").glob("[!.]*"))


def test_what_was_saved_wrong_ends_the_run(place, tmp_path, monkeypatch):
    def save_something_else(model, folder):
        learned = {name: weight.clone() for name, weight in model.state_dict().items()}
        with torch.no_grad():
            model[0].sub_modules["small_query"][0].model.embeddings.word_embeddings.weight.normal_()
        save_model(model, folder)
        model.load_state_dict(learned)

    monkeypatch.setattr(query_encoder, "save_model", save_something_else)
    with pytest.raises(ConfigError, match="the model that Sentence Transformers loads from this folder"):
        distill_query_encoder(place / "clip", place / "text", ["one", "two"], output_dir=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_known_queries_are_counted(place, tmp_path):
    data = RetrievalDataset.from_id_rows(generated_pages(12))
    with pytest.warns(UserWarning, match="evaluation queries are among those that the encoder learns from"):
        distill_query_encoder(place / "clip", place / "text", data, data, output_dir=tmp_path, **SHORT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": 5}, "queries=5: expected texts in a list"),
        ({"queries": ["one", " "]}, r"queries\[1\]=' ': expected a text"),
        ({"queries": ["one", None]}, r"queries\[1\]=None: expected a text"),
        ({"queries": ["one", "one"]}, "queries has 1 distinct texts"),
        ({"queries": []}, "queries has 0 distinct texts"),
        ({"text_encoder": 5}, "text_encoder=5 is no encoder"),
        ({"text_encoder": "nowhere/at-all"}, "nowhere/at-all"),
        ({"model": 5}, "model=5"),
        ({"model": CrossEncoder.__new__(CrossEncoder)}, "no embeddings of queries to learn from"),
        ({"learing_rate": 1}, "Did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"overwrite": "no"}, "overwrite='no'"),
        ({"resume": "no"}, "resume='no'"),
        ({"resume": True, "overwrite": True}, "overwrite=True deletes the run that resume=True"),
        ({"seed": True}, "seed=True"),
        ({"documents": "pictures", "eval_dataset": "pages"}, "pictures"),
    ],
)
def test_bad_input_is_named(changed, message, place, tmp_path):
    if "eval_dataset" in changed:
        changed["eval_dataset"] = RetrievalDataset.from_id_rows(generated_pages(6))
    given = {"model": place / "clip", "text_encoder": place / "text", "queries": ["one", "two"], **changed}
    with pytest.raises((ConfigError, DatasetError), match=message):
        distill_query_encoder(output_dir=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_reranker_in_place_of_the_model(text_reranker_path):
    with pytest.raises(ConfigError, match="is a reranker, which scores pairs"):
        open_retriever(text_reranker_path, "text")


def test_a_router_with_layers_around_it_is_refused(place):
    encoder = Transformer(str(place / "text"))
    router = Router({"query": [encoder], "document": [encoder]}, default_route="document")
    model = SentenceTransformer(modules=[router, Pooling(32, pooling_mode="mean")])
    with pytest.raises(ConfigError, match="a Router with other layers around it"):
        route_queries(model, str(place / "text"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_small_encoder_keeps_what_the_model_finds_for_unseen_queries(seed, tmp_path, pages):
    data = RetrievalDataset.from_id_rows(generated_pages(700, num_negatives=1, seed=seed))
    train, evaluation = data.split(100, seed=seed)
    recipe = {"disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3, "seed": seed}
    clip, text = tiny_clip(tmp_path / "clip", seed=seed), tiny_text_encoder(tmp_path / "text", num_layers=1, seed=seed)
    teacher = finetune(
        clip,
        train,
        output_dir=tmp_path / "teacher",
        num_train_epochs=6,
        per_device_train_batch_size=32,
        matryoshka_dims=None,
        **recipe,
    ).model
    before = teacher.encode_document(pages, convert_to_tensor=True)
    result = distill_query_encoder(
        teacher, text, train, evaluation, output_dir=tmp_path / "small", num_train_epochs=20, **recipe
    )
    own, small = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    assert own >= 0.6
    assert small >= 0.95 * own
    assert result.model.encode_document(pages, convert_to_tensor=True).equal(before)


@pytest.mark.slow
def test_a_query_is_five_times_faster_than_with_twelve_layers(tmp_path):
    teacher = load_model(tiny_clip(tmp_path / "clip", hidden_size=512, num_layers=12))
    routed = route_queries(teacher, tiny_text_encoder(tmp_path / "text", num_layers=2))
    texts = [f"what was the turnover of the year {year} in the north" for year in range(2000, 2020)]
    assert milliseconds_a_query(teacher, texts) >= 5 * milliseconds_a_query(routed.student.eval(), texts)
