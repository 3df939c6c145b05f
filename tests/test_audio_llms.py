"""Language models that listen: Qwen2-Audio, and the Thinker of Qwen2.5-Omni, which sees as well."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from comparing import weights, without_weights
from families import tiny_omni, tiny_qwen2_audio
from mmtune import ConfigError, ConflictFreeBatchSampler, RetrievalDataset, build_evaluator, finetune, load_model
from mmtune.arguments import MediaLimits
from mmtune.data.arrow import with_encoded_images
from mmtune.data.documents import kinds_of_documents
from mmtune.data.sounds import Sound
from mmtune.models.loading import parts_apart
from mmtune.models.recordings import media_limits_of
from mmtune.testing import generated_audio, generated_clips, generated_pages
from mmtune.training.inputs import training_sets
from test_learning_recordings import learn_sounds

pytest.importorskip("soundfile")
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 4, "mini_batch_size": 2, "num_negatives": 0}


@pytest.fixture(scope="module")
def qwen2_audio(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_qwen2_audio(tmp_path_factory.mktemp("models") / "qwen2_audio")


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory, qwen3_vl_path: str) -> str:  # which skips without torchvision
    return tiny_omni(tmp_path_factory.mktemp("models") / "omni")


def of_kind(documents: str) -> RetrievalDataset:
    """Sounds alone, beside a text, or in one corpus with passages; with ``"all"`` also pages and clips."""
    sounds = generated_audio(6)
    if documents in ("audio", "text+audio"):
        texts = [f"recorded on day {at}" for at in range(6)]
        return RetrievalDataset.from_id_rows(sounds.add_column("text", texts), negatives_column=None)
    ids = [f"t/{at} ö" for at in range(6)]
    passages = RetrievalDataset(
        Dataset.from_dict({"document_id": ids, "text": [f"{at} is a number" for at in range(6)]}),
        Dataset.from_dict({"query_id": ids, "text": [f"what is {at}" for at in range(6)]}),
        Dataset.from_dict({"query_id": ids, "document_id": ids, "score": [1] * 6}),
    )
    parts = [RetrievalDataset.from_id_rows(sounds, negatives_column=None), passages]
    if documents == "all":
        pages = with_encoded_images(generated_pages(6).select_columns(["id", "query", "image"]), "image")
        parts += [RetrievalDataset.from_id_rows(pages, negatives_column=None)]
        parts += [RetrievalDataset.from_id_rows(generated_clips(6), negatives_column=None)]
    return RetrievalDataset.concatenate(parts)


def embeddings(model: SentenceTransformer, data: RetrievalDataset, documents: str, batch_size: int = 16):
    kind = "mixed" if documents == "all" else documents
    evaluator = build_evaluator(data, documents=kind, batch_size=batch_size, show_progress_bar=False)
    return evaluator.encode(model).corpus


@pytest.mark.parametrize(
    ("name", "documents", "more"),
    [
        ("qwen2_audio", "audio", {}),
        ("qwen2_audio", "text+audio", {"prompts": {"query": "Find the sound: ", "image": "Listen: "}}),
        ("qwen2_audio", "mixed", {}),
        ("qwen2_audio", "audio", {"lora": True}),
        ("omni", "all", {}),
    ],
)
def test_what_is_trained_loads_in_the_plain_host_and_embeds_alike(name, documents, more, request, tmp_path):
    if "lora" in more:
        pytest.importorskip("peft")
    data, before = of_kind(documents), load_model(request.getfixturevalue(name), device="cpu")
    kind = "mixed" if documents == "all" else documents
    start = weights(before)
    result = finetune(
        before, data, data, documents=kind, output_dir=tmp_path, allow_overlap=True, **ONE_STEP, **more, keep="last"
    )
    assert any(not torch.equal(start[key], value) for key, value in weights(result.model).items() if key in start) or (
        "lora" in more
    )
    assert result.settings["gates"]["host"].startswith("passed")
    plain = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    trained = embeddings(result.model, data, documents)
    torch.testing.assert_close(embeddings(plain, data, documents), trained, atol=1e-6, rtol=0)
    torch.testing.assert_close(embeddings(plain, data, documents, batch_size=1), trained, atol=1e-5, rtol=0)


def test_a_model_of_the_plain_host_is_saved_as_it_listens_too(qwen2_audio, tmp_path):
    data = of_kind("audio")
    model = SentenceTransformer(qwen2_audio, device="cpu")
    finetune(model, data, documents="audio", output_dir=tmp_path, **ONE_STEP)
    plain = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    assert torch.equal(embeddings(plain, data, "audio"), embeddings(model, data, "audio"))


@pytest.mark.parametrize("name", ["qwen2_audio", "omni"])
def test_sounds_are_read_whole_after_texts_and_loading(name, request, tmp_path):
    """The length at which a tokenizer cuts texts would become that of sounds: 1,024 samples."""
    model = load_model(request.getfixturevalue(name), device="cpu", max_seconds=0.5)
    rows = generated_audio(2)["audio"][:]
    sounds = [{"audio": Sound(row, "d").decode(MediaLimits(max_seconds=0.5))} for row in rows]
    before = model.encode_document(sounds)
    model.encode_query(["a text " * 50])
    model.save_pretrained(str(tmp_path))
    assert np.array_equal(SentenceTransformer(str(tmp_path), device="cpu").encode_document(sounds), before)
    loaded = load_model(tmp_path, device="cpu")
    assert media_limits_of(loaded[0], "audio").max_seconds == 0.5
    found = embeddings(loaded, RetrievalDataset.from_id_rows(generated_audio(2)), "audio")
    np.testing.assert_allclose(found.numpy(), before, atol=1e-6)


def test_clips_are_not_cut_at_the_window_of_sounds(omni):
    encoder = load_model(omni, device="cpu")[0]
    assert media_limits_of(encoder, "audio").max_seconds == 1.0
    assert media_limits_of(encoder, "video").max_seconds is None


def test_sounds_that_are_longer_than_the_window_are_counted(qwen2_audio, tmp_path):
    data = of_kind("audio")
    model = load_model(qwen2_audio, device="cpu", max_seconds=0.5)
    result = finetune(model, data, documents="audio", output_dir=tmp_path, **ONE_STEP)
    assert result.settings["data"]["read_in_part"] == {"audio": 6}


def gradients(loss_class: Callable, model: SentenceTransformer, documents: list, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    queries = [f"{word} beats" for word in ("one", "two", "four", "eight")]
    features = [dict(model.preprocess(each)) for each in (queries, documents)]
    loss_class(model, **options)(features, None).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["qwen2_audio", "omni"])
@pytest.mark.parametrize("beside", [False, True])
def test_losses_with_a_cache_give_the_same_gradients_where_all_rows_have_a_sound(name, beside, request):
    model = load_model(request.getfixturevalue(name), device="cpu")
    decoded = [Sound(row, "d").decode(MediaLimits(max_seconds=0.4 + 0.2 * at)) for at, row in enumerate(sounds(4))]
    documents = [
        {"text": "a word " * at, "audio": sound} if beside else {"audio": sound} for at, sound in enumerate(decoded)
    ]
    whole = gradients(MultipleNegativesRankingLoss, model, documents)
    for size in (1, 3):
        pieces = gradients(CachedMultipleNegativesRankingLoss, model, documents, mini_batch_size=size)
        assert pieces.keys() == whole.keys()
        for key, value in whole.items():
            torch.testing.assert_close(pieces[key], value, atol=1e-4, rtol=1e-3)


def test_losses_with_a_cache_still_fail_where_some_rows_have_none(qwen2_audio):
    """When this passes in the host, ``parts_apart`` can go (sentence-transformers 6.2)."""
    model = load_model(qwen2_audio, device="cpu")
    documents = [{"audio": Sound(row, "d").decode()} if at % 2 else "a passage" for at, row in enumerate(sounds(4))]
    with pytest.raises((ValueError, RuntimeError), match=r"audio|reshape"):
        gradients(CachedMultipleNegativesRankingLoss, model, documents, mini_batch_size=2)


def sounds(count: int) -> list[dict]:
    return generated_audio(count)["audio"][:]


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("qwen2_audio", {"audio"}),
        ("omni", {"audio", "video"}),
        ("qwen3_vl_path", set()),
        ("clip_path", {"text", "image", "audio", "video"}),
    ],
)
def test_what_lies_apart_is_known_of_a_checkpoint_and_of_its_model(name, apart, request):
    path = request.getfixturevalue(name)
    assert parts_apart(path) == parts_apart(load_model(path, device="cpu")) == apart


@pytest.mark.parametrize(
    ("apart", "names"), [({"audio"}, ["audio", "other"]), ({"audio", "video"}, ["audio", "other", "video"])]
)
def test_of_a_batch_all_rows_have_a_sound_or_none_and_none_conflict(apart, names):
    data = of_kind("all")
    kinds = dict(zip(data.corpus["document_id"][:], kinds_of_documents(data.corpus, "mixed"), strict=True))
    sets = training_sets(data, num_negatives=0, documents="mixed", seed=0, apart=apart)
    assert sorted(sets.by_name) == names
    seen = []
    for name, part in sets.by_name.items():
        for batch in ConflictFreeBatchSampler(part.rows, batch_size=4, drop_last=False):
            ids = part.rows.with_format(None)[batch]["document_id"]
            assert {"audio" in kinds[each].split("+") for each in ids} == {name == "audio"}
            assert len({*part.rows.with_format(None)[batch]["query_id"]}) == len(ids)
            seen += ids
    assert sorted(seen) == sorted(data.qrels["document_id"])


def test_clips_are_refused_by_name_before_weights(qwen2_audio, tmp_path):
    folder = without_weights(qwen2_audio, tmp_path / "no-weights")
    clips = RetrievalDataset.from_id_rows(generated_clips(4))
    for documents, data in (("video", clips), ("mixed", of_kind("all"))):
        with pytest.raises(ConfigError, match=r"embeds no (clips|images), only audio, text \(model type qwen2_audio\)"):
            finetune(folder, data, documents=documents, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_language_model_learns_to_find_sounds_it_has_not_heard(qwen2_audio, tmp_path):
    result = learn_sounds(load_model(qwen2_audio, device="cpu"), tmp_path, steps=192, rate=1e-3)
    before, after = (metrics[result.primary_metric] for metrics in (result.before, result.after))
    assert before < 0.2
    assert after >= 0.7
