"""Packed inference: the artifact served by our layers against the same artifact in transformers."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from qat.errors import UserError
from qat.packed_layers import Int8Linear, PackedLinear
from qat.runtime import load_packed
from qat_kernels.numerics import QuantSpec, compute_scale, dequantize, pack, quantize, unpack

IDS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
LLAMA_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
INT4 = QuantSpec()


def llama(**changes: object) -> PreTrainedConfig:
    return LlamaConfig(**{**LLAMA_SIZES, **changes})


def weights_section(spec: QuantSpec) -> dict[str, object]:
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": spec.granularity,
        "group_size": spec.group_size if spec.granularity == "group" else None,
    }


def int8_input(dynamic: bool) -> dict[str, object]:
    strategy = "token" if dynamic else "tensor"
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def layer_tensors(
    name: str, weight: torch.Tensor, spec: QuantSpec, inputs: dict[str, object] | None
) -> dict[str, torch.Tensor]:
    scale, zero_point = compute_scale(weight, spec)
    codes = quantize(weight, scale, zero_point, spec)
    dtype = torch.float32 if zero_point is not None else torch.bfloat16
    stored = {f"{name}.weight_scale": scale.to(dtype)}
    if spec.granularity == "tensor":
        stored = {f"{name}.weight_scale": scale.flatten().to(dtype)}
    if inputs is not None:
        stored[f"{name}.weight"] = codes
        if not inputs["dynamic"]:
            stored[f"{name}.input_scale"] = torch.tensor([0.03125])
        return stored
    stored[f"{name}.weight_packed"] = pack(codes, spec.bits)
    stored[f"{name}.weight_shape"] = torch.tensor(weight.shape)
    if zero_point is not None:
        packed = pack(zero_point.t().contiguous(), spec.bits).t().contiguous()
        stored[f"{name}.weight_zero_point"] = packed
    return stored


def write_artifact(
    path: Path,
    config: PreTrainedConfig,
    spec: QuantSpec = INT4,
    inputs: dict[str, object] | None = None,
) -> PreTrainedModel:
    """Quantize a random model and write it as compressed-tensors does; returns the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # biases and norms are initialised to constants, which would hide a swap
            parameter.add_(torch.randn_like(parameter) * 0.05)
            parameter.copy_(parameter.to(torch.bfloat16))
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    heads = {"lm_head", "embed_out"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in heads:
            del state[f"{name}.weight"]
            state.update(layer_tensors(name, module.weight.detach(), spec, inputs))
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    path.mkdir()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    form = "pack-quantized" if inputs is None else "int-quantized"
    section = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": sorted(heads),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights_section(spec),
                "input_activations": inputs,
            }
        },
    }
    if not spec.symmetric:
        section["dequantize"] = True
    config.architectures = [type(model).__name__]
    content = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": section}
    (path / "config.json").write_text(json.dumps(content, default=str))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


def plain(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def spec_cases() -> list[QuantSpec]:
    int3 = QuantSpec(bits=3)
    int8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
    whole = QuantSpec(bits=5, granularity="tensor")
    zero = QuantSpec(bits=4, symmetric=False, grid="absmax", scale_dtype="float32")
    return [INT4, QuantSpec(group_size=64), int3, int8, whole, zero]


@pytest.mark.parametrize("spec", spec_cases(), ids=str)
def test_fp32_logits_equal_plain_transformers(tmp_path: Path, spec: QuantSpec) -> None:
    write_artifact(tmp_path / "a", llama(), spec)
    served = load_packed(tmp_path / "a", torch.float32)
    assert sum(isinstance(m, PackedLinear) for m in served.modules()) == 14
    torch.testing.assert_close(logits(served), logits(plain(tmp_path / "a")), atol=0, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        llama(tie_word_embeddings=True),
        llama(attention_bias=True, mlp_bias=True),
        Qwen3Config(**LLAMA_SIZES, head_dim=16),
        GPTNeoXConfig(
            vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128,
        ),
    ],
    ids=["tied", "biases", "qwen3", "neox"],
)  # fmt: skip
def test_fp32_logits_equal_for_other_layouts(tmp_path: Path, config: PreTrainedConfig) -> None:
    write_artifact(tmp_path / "a", config)
    served = load_packed(tmp_path / "a", torch.float32)
    torch.testing.assert_close(logits(served), logits(plain(tmp_path / "a")), atol=0, rtol=0)
    if config.tie_word_embeddings:
        assert served.lm_head.weight is served.model.embed_tokens.weight


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_int8_weights_and_inputs_equal_plain_transformers(tmp_path: Path, dynamic: bool) -> None:
    spec = QuantSpec(bits=8, granularity="channel", grid="absmax")
    write_artifact(tmp_path / "a", llama(), spec, int8_input(dynamic))
    served = load_packed(tmp_path / "a", torch.float32)
    assert sum(isinstance(m, Int8Linear) for m in served.modules()) == 14
    torch.testing.assert_close(logits(served), logits(plain(tmp_path / "a")), atol=0, rtol=0)


def test_each_layer_takes_the_group_that_names_it(tmp_path: Path) -> None:
    model = write_artifact(tmp_path / "a", llama())
    name, spec = "model.layers.1.mlp.up_proj", QuantSpec(bits=8, granularity="channel")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state.update(layer_tensors(name, model.get_submodule(name).weight.detach(), spec, None))
    save_file(state, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    groups = content["quantization_config"]["config_groups"]
    groups["group_1"] = {"targets": [name], "weights": weights_section(spec)}
    (tmp_path / "a" / "config.json").write_text(json.dumps(content))
    served = load_packed(tmp_path / "a", torch.float32)
    assert served.get_submodule(name).packed.bits == 8
    torch.testing.assert_close(logits(served), logits(plain(tmp_path / "a")), atol=0, rtol=0)


def test_bf16_layer_outputs_are_the_exact_sums_rounded_once(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    served = load_packed(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    layer = served.model.layers[1].mlp.down_proj
    assert isinstance(layer, PackedLinear)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    name = "model.layers.1.mlp.down_proj"
    codes = unpack(stored[f"{name}.weight_packed"], 4, 128)
    weight = dequantize(codes, stored[f"{name}.weight_scale"], None).double()
    exact = x.double() @ weight.T
    size = x.double().abs() @ weight.abs().T
    # K = 128 fp32 additions of exact products, then one rounding to bf16 (8 significant bits)
    bound = 128 * 2.0**-24 * size * 1.001 + exact.abs() * 2.0**-8
    assert bool(((layer(x).double() - exact).abs() <= bound).all())


def test_bf16_logits_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    for layer in load_packed(tmp_path / "a").modules():
        if isinstance(layer, PackedLinear):
            x = torch.randn(17, layer.in_features).to(torch.bfloat16)
            alone = torch.cat([layer(x[i : i + 1]) for i in range(17)])
            torch.testing.assert_close(layer(x), alone, atol=0, rtol=0)


def test_no_16_bit_copy_of_a_quantized_layer(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    served = load_packed(tmp_path / "a")
    quantized = [m for m in served.modules() if isinstance(m, PackedLinear)]
    weights = sum(m.in_features * m.out_features for m in quantized)
    held = sum(b.numel() * b.element_size() for m in quantized for b in m.buffers())
    # 4 bits per code; with the ATen op, scale and offset in bf16 per group of 32 add one bit
    assert held * 8 / weights <= 5.0
    layer = quantized[0]
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16
    assert tuple(layer.weight.shape) == (layer.out_features, layer.in_features)
    served.to("cpu")
    with pytest.raises(RuntimeError, match="load the artifact again"):
        served.to(torch.float32)


def test_sharded_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama())
    whole = logits(load_packed(tmp_path / "a", torch.float32))
    state = load_file(tmp_path / "a" / "model.safetensors")
    names = sorted(state)
    parts = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in parts.items():
        save_file({n: state[n] for n in part}, tmp_path / "a" / file, metadata={"format": "pt"})
    (tmp_path / "a" / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(
        logits(load_packed(tmp_path / "a", torch.float32)), whole, atol=0, rtol=0
    )
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors: missing"):
        load_packed(tmp_path / "a")


def test_linear_subclass_goes_to_plain_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4,
        multi_query=True, bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    write_artifact(tmp_path / "a", config)
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    content["quantization_config"]["dequantize"] = True
    (tmp_path / "a" / "config.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, logger="qat.runtime"):
        served = load_packed(tmp_path / "a", torch.float32)
    assert "plain transformers" in caplog.text
    torch.testing.assert_close(logits(served), logits(plain(tmp_path / "a")), atol=0, rtol=0)


def drop(path: Path, suffix: str) -> None:
    state = load_file(path / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(suffix)}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("layers.0.mlp.up_proj.weight_packed", "up_proj.weight"),
        ("layers.0.mlp.up_proj.weight_scale", "up_proj.weight_scale"),
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, suffix: str, message: str) -> None:
    write_artifact(tmp_path / "a", llama())
    drop(tmp_path / "a", suffix)
    with pytest.raises(UserError, match=message):
        load_packed(tmp_path / "a")


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_packed(tmp_path / "none")
    write_artifact(tmp_path / "artifact", llama())
    with pytest.raises(UserError, match="did you mean"):
        load_packed(tmp_path)
    file = tmp_path / "artifact" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        load_packed(tmp_path / "artifact")
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        load_packed(tmp_path / "artifact")
    content = json.loads((tmp_path / "artifact" / "config.json").read_text())
    del content["quantization_config"]
    (tmp_path / "artifact" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not quantized"):
        load_packed(tmp_path / "artifact")
    (tmp_path / "artifact" / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_packed(tmp_path / "artifact")
