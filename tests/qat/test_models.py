"""Loading models and tokenizers: each way to fail, with the message that says what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from qat.errors import UserError
from qat.models import load_config, load_model, load_tokenizer, meta_model
from tests.tiny import save_tiny, tiny, tiny_tokenizer


@pytest.fixture
def model_dir(tmp_path):
    return save_tiny("llama", tmp_path / "llama")


def test_load_in_fp32_and_eval_mode(tmp_path):
    path = save_tiny("llama", tmp_path, torch.bfloat16)
    model = load_model(str(path))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = tiny("llama").to(torch.bfloat16).state_dict()
    assert all(torch.equal(v, expected[n].float()) for n, v in model.state_dict().items())


def test_meta_model_has_the_same_parameters_and_no_weights(tmp_path):
    path = str(save_tiny("llama_tied", tmp_path))
    skeleton, model = meta_model(path), load_model(path)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in skeleton.named_parameters()} == shapes
    assert all(p.is_meta for p in skeleton.parameters())


def test_missing_directory_names_a_near_one(model_dir):
    with pytest.raises(UserError, match=rf"no such directory; did you mean {model_dir}"):
        load_config(str(model_dir.parent / "lama"))
    with pytest.raises(UserError, match=r"no such directory$"):
        load_config(str(model_dir.parent / "nowhere" / "at" / "all"))


def test_directory_without_config(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "unheard-of"}'])
def test_unreadable_config(content, model_dir):
    (model_dir / "config.json").write_text(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_config(str(model_dir))


def test_id_that_cannot_be_reached():
    # tests run offline
    with pytest.raises(UserError, match=r"model=nobody/nothing: cannot be loaded \(.*Give a local"):
        load_config("nobody/nothing")


def test_quantized_model(model_dir):
    path = model_dir / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"already quantized \(gptq\)"):
        load_model(str(model_dir))


def test_directory_without_weights(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="the weights cannot be loaded"):
        load_model(str(model_dir))


def test_truncated_weights(model_dir):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="the weights cannot be loaded"):
        load_model(str(model_dir))


def test_incomplete_weights(model_dir):
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"2 weights are missing, the first is model\.layers\.0"):
        load_model(str(model_dir))


def test_weights_of_other_shapes(model_dir):
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 128}))
    with pytest.raises(UserError, match="the weights cannot be loaded"):
        load_model(str(model_dir))


def test_model_that_is_not_a_causal_lm(tmp_path):
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    for load in (load_model, meta_model):
        with pytest.raises(UserError, match=r"T5Config"):
            load(str(tmp_path))


def test_tokenizer(model_dir):
    loaded = load_tokenizer(str(model_dir), vocab_size=256)
    assert loaded("Hello")["input_ids"] == tiny_tokenizer()("Hello")["input_ids"]
    with pytest.raises(UserError, match=r"the id \d+, the model's vocabulary ends at 99"):
        load_tokenizer(str(model_dir), vocab_size=100)


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_model_without_a_usable_tokenizer(content, model_dir):
    if content is None:
        (model_dir / "tokenizer.json").unlink()
        (model_dir / "tokenizer_config.json").unlink()
    else:
        (model_dir / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"no (fast )?tokenizer"):
        load_tokenizer(str(model_dir))
