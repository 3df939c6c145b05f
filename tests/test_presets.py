"""Router presets: each is built through the code that users call, from tiny models in place of its checkpoints."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import ASTConfig, ASTForAudioClassification, AutoTokenizer

from families import tiny_vjepa2
from mmtune import RetrievalDataset, build_evaluator, load_model
from mmtune.arguments import MediaLimits
from mmtune.data.clips import Clip
from mmtune.errors import ConfigError
from mmtune.models.presets import ROUTER_PRESETS, router_preset
from mmtune.models.recordings import media_limits_of
from mmtune.models.routers import compose_router
from mmtune.models.routes import check_routes
from mmtune.testing import generated_clips, tiny_ast

TINY = {
    "minilm-siglip2": ("text_encoder_path", "siglip_path"),
    "multilingual-siglip2": ("text_encoder_path", "siglip_path"),
    "light": ("text_encoder_path", "clip_path"),
    "static-queries": ("static", "qwen3_vl_path"),
    "clip-towers": ("clip_path", "clip_path"),
    "sounds": ("text_encoder_path", "ast_path"),
    "clips": ("text_encoder_path", "vjepa2_path"),
}


@pytest.fixture
def static(text_encoder_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [StaticEmbedding(AutoTokenizer.from_pretrained(text_encoder_path), embedding_dim=32)]


@pytest.fixture
def ast_path(tmp_path):
    """As on the Hub: what classifies sounds, of which the encoder is taken."""
    folder = tiny_ast(tmp_path / "ast")
    ASTForAudioClassification(ASTConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def vjepa2_path(tmp_path):
    return tiny_vjepa2(tmp_path / "vjepa2")


def sides_of(preset):
    """The sides beside that of texts, by name."""
    return {name: source for name in ("image", "audio", "video") if (source := getattr(preset, name))}


def test_every_preset_has_a_tiny_double():
    assert set(TINY) == set(ROUTER_PRESETS)


@pytest.mark.parametrize("name", list(ROUTER_PRESETS))
def test_a_preset_builds(name, request):
    text, other = (request.getfixturevalue(fixture) for fixture in TINY[name])
    (side,) = sides_of(ROUTER_PRESETS[name])
    model = router_preset(name, text=text, device="cpu", **{side: other})
    check_routes(model, side)
    assert model.get_embedding_dimension() == ROUTER_PRESETS[name].dimension
    routes = model[0].route_mappings
    assert (("query", "text") in routes) == (ROUTER_PRESETS[name].route_by == "task")


def test_a_preset_takes_another_route_beside_its_own(text_encoder_path, ast_path, siglip_path):
    model = router_preset("sounds", text=text_encoder_path, audio=ast_path, image=siglip_path, device="cpu")
    assert set(model[0].sub_modules) == {"text", "image", "audio"}


@pytest.mark.parametrize(("max_frames", "read"), [(None, 8), (4, 4), (100, 8)])
def test_clips_of_a_preset_are_read_in_as_many_frames_as_fit(
    text_encoder_path, vjepa2_path, tmp_path, max_frames, read
):
    model = router_preset("clips", text=text_encoder_path, video=vjepa2_path, dimension=None, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    model = load_model(tmp_path / "saved", max_frames=max_frames, device="cpu")
    encoder = model[0].sub_modules["video"][0]
    assert media_limits_of(encoder, "video").num_frames == read
    clips = RetrievalDataset.from_id_rows(generated_clips(3))
    found = build_evaluator(clips, documents="video", show_progress_bar=False).encode(model).corpus
    frames = [Clip(each, "d").decode(MediaLimits(num_frames=read)) for each in clips.corpus["video"][:]]
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    expected = plain.encode_document([{"video": each} for each in frames], convert_to_tensor=True)
    torch.testing.assert_close(found, expected)


def test_a_preset_freezes_its_sides(static, qwen3_vl_path):
    model = router_preset("static-queries", text=static, image=qwen3_vl_path, device="cpu", dimension=64)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"text"}


def test_prompts_of_a_preset_belong_to_its_text_checkpoint(text_encoder_path, siglip_path):
    preset = replace(ROUTER_PRESETS["multilingual-siglip2"], text=text_encoder_path, image=siglip_path)
    assert preset.compose(device="cpu").prompts == {"query": "query: ", "document": "passage: "}
    replaced = router_preset("multilingual-siglip2", text=text_encoder_path, image=siglip_path, device="cpu")
    assert replaced.prompts == {"query": "", "document": ""}


def test_prompts_of_a_preset_for_texts_stay_away_from_the_pages_of_a_vlm(text_encoder_path, qwen3_vl_path):
    preset = replace(ROUTER_PRESETS["multilingual-siglip2"], text=text_encoder_path)
    model = preset.compose(image=qwen3_vl_path, device="cpu")
    assert {name: prompt for name, prompt in model.prompts.items() if prompt} == {"query": "query: "}


def test_prompts_of_a_text_encoder_are_texts(text_encoder_path, siglip_path):
    with pytest.raises(ConfigError, match=r"text_prompts=.'query': 1. is no mapping of texts"):
        compose_router(text_encoder_path, siglip_path, text_prompts={"query": 1})


def test_overrides_win(text_encoder_path, siglip_path):
    model = router_preset(
        "minilm-siglip2", text=text_encoder_path, image=siglip_path, device="cpu", dimension=None, freeze="text"
    )
    assert model.get_embedding_dimension() == 64
    assert not any(p.requires_grad for p in model[0].sub_modules["text"].parameters())


def test_every_preset_says_what_it_is():
    for name, preset in ROUTER_PRESETS.items():
        assert preset.name == name
        assert preset.purpose
        licenses = [getattr(preset, f"{side}_license") for side in ("text", *sides_of(preset))]
        assert all(source.count("/") == 1 for source in (preset.text, *sides_of(preset).values()))
        assert {*licenses} <= {"apache-2.0", "mit", "bsd-3-clause"}


def test_presets_do_not_change():
    with pytest.raises(TypeError, match="does not support item assignment"):
        ROUTER_PRESETS["mine"] = ROUTER_PRESETS["light"]
    with pytest.raises(FrozenInstanceError, match="dimension"):
        ROUTER_PRESETS["light"].dimension = 3


def test_an_unknown_preset_or_override_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no preset 'minilm-siglip'\. The nearest is 'minilm-siglip2'; known are"):
        router_preset("minilm-siglip")
    with pytest.raises(ConfigError, match=r"no argument 'dimensions'\. The nearest is 'dimension'; known are 'text'"):
        router_preset("light", dimensions=3)
    with pytest.raises(ConfigError, match=r"no preset 'zzz'\. Known are 'minilm-siglip2'"):
        router_preset("zzz")
