"""``from_pretrained`` with ``config=qat.packed_config(path)`` against `load_packed`."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import qat
from qat.errors import UserError
from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat.runtime import load_packed
from qat_kernels.numerics import QuantSpec
from tests.qat.test_runtime import (
    INT4,
    LLAMA_SIZES,
    drop,
    int8_input,
    llama,
    logits,
    plain,
    write_artifact,
)

INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
ZERO = QuantSpec(bits=4, symmetric=False, grid="absmax", scale_dtype="float32")


def packed(path: Path, dtype: torch.dtype | str = torch.float32, **options: object):
    return AutoModelForCausalLM.from_pretrained(
        path, config=qat.packed_config(path), dtype=dtype, **options
    )


def layers_of(model: PreTrainedModel) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("config", "spec", "inputs"),
    [
        (llama(), INT4, None),
        (llama(), ZERO, None),
        (llama(), INT8, int8_input(True)),
        (llama(), INT8, int8_input(False)),
        (llama(tie_word_embeddings=True), INT4, None),
        (llama(attention_bias=True, mlp_bias=True), INT4, None),
        (Qwen3Config(**LLAMA_SIZES, head_dim=16), INT4, None),
    ],
    ids=["w4", "w4 zero points", "w8a8", "w8a8 static", "tied", "biases", "qwen3"],
)
def test_layers_and_logits_are_those_of_load_packed(
    tmp_path: Path,
    config: PreTrainedConfig,
    spec: QuantSpec,
    inputs: dict[str, object] | None,
    dtype: torch.dtype,
) -> None:
    write_artifact(tmp_path / "a", config, spec, inputs)
    served = load_packed(tmp_path / "a", dtype)
    ours, report = packed(tmp_path / "a", dtype, output_loading_info=True)
    assert layers_of(ours) == layers_of(served)
    kind = PackedLinear if inputs is None else Int8Linear
    assert sum(isinstance(m, kind) for m in ours.modules()) == 14
    assert any(isinstance(m, KeptLinear) for m in ours.modules()) == (dtype == torch.bfloat16)
    torch.testing.assert_close(logits(ours), logits(served), atol=0, rtol=0)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    # transformers found no tensor without a place, and made none up
    assert not report["unexpected_keys"]
    assert not report["missing_keys"] - {"lm_head.weight"}
    if config.tie_word_embeddings:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
    text = ours.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    expected = served.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(text, expected)


def test_dtype_auto_is_that_of_the_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    ours = packed(tmp_path / "a", "auto", device_map={"": "cpu"})
    assert ours.dtype == ours.model.layers[0].mlp.up_proj.dtype == torch.bfloat16
    served = load_packed(tmp_path / "a", torch.bfloat16)
    torch.testing.assert_close(logits(ours), logits(served), atol=0, rtol=0)


def test_the_independent_reader_stays(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    packed(tmp_path / "a")
    independent = plain(tmp_path / "a")
    assert not any(isinstance(m, PackedLinear) for m in independent.modules())
    assert "compressed" in type(independent.hf_quantizer).__name__.lower()


def test_what_is_not_covered_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    file = tmp_path / "a" / "config.json"
    content = json.loads(file.read_text())
    broken = copy.deepcopy(content)
    broken["quantization_config"]["format"] = "float-quantized"
    file.write_text(json.dumps(broken))
    with pytest.raises(UserError, match=r"format=float-quantized.*transformers' own reader"):
        packed(tmp_path / "a")
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r'device_map=auto.*"": "cuda:0"'):
        packed(tmp_path / "a", device_map="auto")
    with pytest.raises(UserError, match="no such directory"):
        qat.packed_config(tmp_path / "none")


@pytest.mark.parametrize("suffix", ["norm.weight", "up_proj.weight_scale", "up_proj.weight_packed"])
def test_missing_tensors_are_not_made_up(tmp_path: Path, suffix: str) -> None:
    write_artifact(tmp_path / "a", llama())
    drop(tmp_path / "a", suffix)
    with pytest.raises(UserError, match="missing"):
        packed(tmp_path / "a")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    state = load_file(tmp_path / "a" / "model.safetensors")
    state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(128)
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj\.bias have no place"):
        packed(tmp_path / "a")


def test_a_served_model_is_not_saved_as_something_else(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    for model in (packed(tmp_path / "a"), load_packed(tmp_path / "a")):
        with pytest.raises(UserError, match=f"copy {tmp_path / 'a'}"):
            model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    # the configuration alone names the public method
    packed(tmp_path / "a").config.save_pretrained(tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors"
    assert AutoConfig.from_pretrained(tmp_path / "c").quantization_config["config_groups"]


def test_import_stays_light() -> None:
    code = "import sys, qat; print(any(m in sys.modules for m in ('torch', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qat.nothing  # noqa: B018


def test_nothing_is_left_in_the_skeleton(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    ours = packed(tmp_path / "a")
    assert not any(type(m) is nn.Identity for m in ours.modules())
    assert not any(t.is_meta for t in (*ours.parameters(), *ours.buffers()))
