"""What is undocumented in other packages is still there: a touch with a fallback would otherwise fail in silence."""

import inspect
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base import trainer as host_trainer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertForSequenceClassification, CLIPModel

from mmtune import host


def numbers() -> Dataset:
    return Dataset.from_dict({"number": list(range(6))})


def test_the_stored_row_behind_each_row() -> None:
    assert host.stored_positions(numbers()) is None
    assert host.stored_positions(numbers().select([4, 1, 1])).tolist() == [4, 1, 1]


def test_equal_contents_have_equal_fingerprints() -> None:
    rows = numbers()
    assert host.fingerprint(rows) == host.fingerprint(rows)
    assert host.fingerprint(rows.select([0])) == host.fingerprint(rows.select([0])) != host.fingerprint(rows)


def test_a_transform_is_hashed_by_its_key_and_not_by_its_pickle() -> None:
    @host.hashed_by(lambda view: view.key)
    class View:
        def __init__(self, key: str) -> None:
            self.key = key

        def __reduce__(self):
            raise AssertionError("pickled")

        def __call__(self, batch):
            return batch

    one, same, other = (numbers().with_transform(View(key)).select([1]) for key in ("a", "a", "b"))
    assert one[0] == {"number": 1}
    assert host.fingerprint(one) != host.fingerprint(other)
    assert type(host.own_transform(same)) is View


def test_the_transform_of_the_host_is_looked_behind() -> None:
    assert "add_dataset_name_transform" in inspect.getsource(host_trainer)

    def own(batch):
        return batch

    def add_dataset_name_transform(batch, transform):
        return transform(batch)

    wrapped = partial(add_dataset_name_transform, transform=own)
    assert host.own_transform(numbers().with_transform(wrapped)) is own
    assert host.own_transform(numbers()) is None


def test_static_embeddings_read_typed_texts() -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "revenue": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")
    plain = model.encode(["revenue"])
    host.let_read_typed_texts(model)
    assert model.encode([{"text": "revenue"}]).tolist() == plain.tolist()


def test_an_encoder_is_told_its_modalities(clip_path: str) -> None:
    encoder = SentenceTransformer(clip_path, device="cpu")[0]
    assert list(encoder.input_formatter.supported_modalities) == list(encoder.modality_config)
    host.declare_modalities(encoder, {"text": encoder.modality_config["text"]})
    assert list(encoder.input_formatter.supported_modalities) == ["text"] == list(encoder.modalities)


def test_the_hooks_that_are_overridden_exist() -> None:
    assert callable(Transformer._load_model)
    assert callable(SentenceTransformerTrainer._load_from_checkpoint)
    assert callable(SentenceTransformerTrainer._run_epoch)
    assert list(inspect.signature(SentenceTransformerTrainer._save).parameters)[1:] == ["output_dir", "state_dict"]


def test_the_attention_and_what_a_class_supports(clip_path: str) -> None:
    model = CLIPModel.from_pretrained(clip_path, attn_implementation="eager")
    assert host.attention_of(model.config) == "eager"
    assert host.supports_flash_attention(CLIPModel) is True


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch 2.13, when its compiler is imported
def test_the_model_behind_a_compiled_one() -> None:
    layer = torch.nn.Linear(2, 2)
    assert host.uncompiled(torch.compile(layer)) is layer
    assert host.uncompiled(layer) is layer


def test_weights_that_are_in_no_file_are_known(clip_path: str, text_encoder_path: str) -> None:
    assert host.unread_weights(CLIPModel.from_pretrained(clip_path)) == []
    assert host.unread_weights(CLIPModel.from_pretrained(clip_path).to(torch.float16)) == []
    scores = BertForSequenceClassification.from_pretrained(text_encoder_path, num_labels=1)
    assert host.unread_weights(scores) == ["classifier.weight", "classifier.bias"]
    assert host.unread_weights(torch.nn.Linear(2, 2)) == []


def test_adapters_are_found_and_taken_out(clip_path: str) -> None:
    peft = pytest.importorskip("peft")
    model = CLIPModel.from_pretrained(clip_path)
    names = set(model.state_dict())
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert vars(model)["_hf_peft_config_loaded"] is True
    assert host.adapter_layers(model)
    assert names == {name for name in host.weights_beside_adapters(model) if "lora_" not in name}
    host.take_out_adapters(model, merge=True)
    assert not host.adapter_layers(model)
    assert set(model.state_dict()) == names


def test_accelerate_wraps_forward_and_is_looked_behind() -> None:
    assert "_original_forward" in inspect.getsource(Accelerator.prepare_model)
    model = torch.nn.Linear(2, 2)
    plain = model(torch.ones(2))
    model._original_forward, model.forward = model.forward, lambda values: "wrapped"
    with host.without_autocast(model):
        assert torch.equal(model(torch.ones(2)), plain)
    assert model(torch.ones(2)) == "wrapped"
