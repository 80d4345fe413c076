"""The packed checkpoint is the trained model, for every architecture and scheme.

Each test writes a checkpoint and lets `qat.fidelity.compare` read it back through plain
transformers and compressed-tensors; what that comparison notices is tested in test_fidelity.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Llama4TextConfig, PhimoeConfig

from qat import convert, fidelity
from qat.errors import UserError
from qat.fake_quant import observers
from qat.loss import forward_logits, loss_sum
from qat.models import load_model
from qat.prepare import prepare
from qat.scheme import InputSpec, Rule, Scheme
from qat.trained import quantized_parameters
from qat.training import calibrate
from qat_kernels import QuantSpec
from tests.tiny import BASE, CONFIGS, random_batch, save_tiny, tiny, tiny_tokenizer

INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
ASYMMETRIC = QuantSpec(symmetric=False, grid="absmax")
STATIC = InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16")
SCHEMES = {
    "int4": Scheme(),
    "int3": Scheme(weight=QuantSpec(bits=3, grid="mse")),
    "int2": Scheme(weight=QuantSpec(bits=2)),
    "int8_channel": Scheme(weight=INT8),
    "int4_tensor": Scheme(weight=QuantSpec(granularity="tensor")),
    "asymmetric": Scheme(weight=ASYMMETRIC),
    "asymmetric_channel": Scheme(
        weight=QuantSpec(bits=3, symmetric=False, granularity="channel", grid="mse")
    ),
    "asymmetric_tensor": Scheme(
        weight=QuantSpec(symmetric=False, granularity="tensor", grid="absmax")
    ),
    "first_layer_int8": Scheme(rules=[Rule("*.0.*", weight=INT8)]),
    "first_layer_kept": Scheme(rules=[Rule("*.0.*", action="keep")], min_coverage=0),
    "w8a8_dynamic": Scheme(weight=INT8, input=InputSpec()),
    "w8a8_static": Scheme(weight=INT8, input=STATIC),
}
MIXTURES = ("mixtral", "qwen3_moe")


def refusal(family: str, name: str) -> str:
    """Pattern of the error that a family gives with a scheme; empty when it must work."""
    scheme = SCHEMES[name]
    if family == "gpt2":
        return "Conv1D stores its weight transposed"
    if family in MIXTURES and not scheme.weight.symmetric:
        return r"symmetric=false: the experts model\.layers\.0\.mlp\.experts\.\S+ cannot be stored"
    if family in MIXTURES and name == "first_layer_int8":
        return "experts can be stored with one weight spec"
    if family == "falcon" and scheme.input is not None:
        return "inputs of FalconLinear cannot be quantized"
    if family == "falcon" and name == "first_layer_int8":
        return r"FalconLinear \(a subclass of Linear\) can be stored with one weight spec"
    if family == "opt" and name == "w8a8_dynamic":
        return "gets inputs of 2 axes"
    return ""


@functools.cache
def tokenizer():
    return tiny_tokenizer()


def convert_and_compare(model, scheme, directory, coverage=None):
    """Write the checkpoint of a model (prepared if it is not yet), compare; the reloaded model."""
    if coverage is None:
        coverage = prepare(model, scheme)
        calibrate(model, [random_batch(seed=1)])
    convert.write_checkpoint(model.eval(), tokenizer(), coverage, scheme, directory)
    result, reloaded = fidelity.compare(model, coverage, directory, [random_batch()])
    assert (result.codes_equal, result.weights_equal) == (True, True)
    assert (result.logits, result.logit_blocks, result.max_logit_diff) == ("equal", 2, 0.0)
    assert result.codes_compared >= len(coverage.quantized) > 0
    assert result.weights_compared >= len(coverage.entries)
    return reloaded


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_scheme(family, name, tmp_path):
    message = refusal(family, name)
    if message:
        with pytest.raises(UserError, match=message):
            convert_and_compare(tiny(family), SCHEMES[name], tmp_path)
    else:
        convert_and_compare(tiny(family), SCHEMES[name], tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product(["llama", "phi"], ["int4", "asymmetric", "w8a8_dynamic", "w8a8_static"]),
        ("mixtral", "int4"),
        ("mixtral", "w8a8_static"),
    ],
)
def test_untied_head_quantized_by_rule(family, name, tmp_path):
    """Phi's head has a bias."""
    scheme = SCHEMES[name]
    scheme = Scheme(weight=scheme.weight, input=scheme.input, rules=[Rule("lm_head")])
    convert_and_compare(tiny(family), scheme, tmp_path)
    head = [key for key in load_file(tmp_path / "model.safetensors") if "lm_head.weight" in key]
    assert "lm_head.weight_scale" in head
    assert "lm_head" not in config_of(tmp_path)["quantization_config"]["ignore"]


@pytest.mark.parametrize("family", ["llama_tied", "gemma", "opt", "falcon"])
def test_tied_head_by_rule_is_refused(family):
    with pytest.raises(UserError, match="'lm_head' selects lm_head, an embedding"):
        prepare(tiny(family), Scheme(rules=[Rule("lm_head")]))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            Scheme(weight=ASYMMETRIC, rules=[Rule("*down_proj", weight=INT8)]),
            "asymmetric weights can be stored with one weight spec for all",
        ),
        (
            Scheme(weight=ASYMMETRIC, input=InputSpec()),
            "asymmetric weights cannot be stored with quantized inputs",
        ),
    ],
)
def test_asymmetric_weights_take_no_company(scheme, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert_and_compare(tiny("llama"), scheme, tmp_path)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(
            rules=[
                Rule("*down_proj", weight=INT8),
                Rule("*o_proj", action="keep"),
                Rule("*.1.self_attn.*", weight=QuantSpec(bits=3, group_size=16)),
            ]
        ),
        Scheme(rules=[Rule("*.mlp.*", weight=INT8, input=InputSpec())]),
        Scheme(weight=INT8, input=STATIC, rules=[Rule("*.mlp.*", weight=INT8, input=InputSpec())]),
        Scheme(weight=QuantSpec(scale_dtype="float32"), keep_dtype="float16"),
        Scheme(keep_dtype="float32"),
    ],
    ids=["specs", "w4a16 and w8a8", "static and dynamic", "fp32 scales, fp16", "keep fp32"],
)
def test_mixed_rules_and_dtypes(scheme, tmp_path):
    convert_and_compare(tiny("llama_bias"), scheme, tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama_tied", "int2"),
        ("llama", "asymmetric"),
        ("llama", "w8a8_static"),
        ("mixtral", "int4"),
        ("falcon", "int3"),
        ("phi", "w8a8_dynamic"),
    ],
)
def test_after_training(family, name, tmp_path):
    """Not only at initialisation: the codes follow the weights that training moved."""
    model, scheme = tiny(family), SCHEMES[name]
    coverage = prepare(model, scheme)
    calibrate(model, [random_batch(seed=1)])
    before = {i.name: i.weight.detach().clone() for i in quantized_parameters(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        batch = random_batch(seed=step)
        model.train()
        loss = loss_sum(forward_logits(model, batch), batch["labels"]) / batch["loss_tokens"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for observer in observers(model):
            observer.commit()
    assert all(not torch.equal(before[i.name], i.weight) for i in quantized_parameters(model))
    convert_and_compare(model, scheme, tmp_path, coverage)


def test_a_bf16_model_on_disk(tmp_path):
    model = load_model(str(save_tiny("qwen3", tmp_path / "model", torch.bfloat16)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    convert_and_compare(model, Scheme(), tmp_path)


def test_kept_parameters_are_bf16_and_the_config_says_so(tmp_path):
    convert_and_compare(tiny("llama_bias"), Scheme(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t.dtype for n, t in tensors.items() if n.endswith((".weight", ".bias"))}
    assert {"model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.bias"} <= set(kept)
    assert set(kept.values()) == {torch.bfloat16}
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    config = config_of(tmp_path)
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_tied_parameters_are_stored_once(tmp_path):
    convert_and_compare(tiny("llama_tied"), Scheme(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert config_of(tmp_path)["tie_word_embeddings"] is True


@pytest.mark.parametrize("keep_dtype", ["bfloat16", "float32"])
def test_one_weight_although_the_flag_says_untied(keep_dtype, tmp_path):
    model = tiny("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    convert_and_compare(model, Scheme(keep_dtype=keep_dtype), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("rules", [[], [Rule("lm_head")]], ids=["kept", "quantized"])
def test_two_weights_although_the_flag_says_tied(rules, tmp_path):
    model = tiny("llama_tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.25)
    convert_and_compare(model, Scheme(rules=rules), tmp_path)
    assert config_of(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize("action", ["quantize", "keep"])
def test_layers_that_share_a_weight_are_refused(action):
    model = tiny("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(UserError, match=r"0\.mlp\.up_proj\.weight and .* are one weight"):
        prepare(model, Scheme(rules=[Rule("*up_proj", action=action)]))


def test_layer_that_the_group_does_not_divide_is_stored_unpacked(tmp_path):
    # K = 96 in down_proj, 64 elsewhere
    scheme = Scheme(weight=QuantSpec(group_size=64))
    convert_and_compare(tiny("llama"), scheme, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert tensors[f"{name}.weight"].dtype == torch.bfloat16
    assert f"{name}.weight_packed" not in tensors
    assert name in config_of(tmp_path)["quantization_config"]["ignore"]


def test_persistent_buffers_survive_in_their_dtype(tmp_path):
    """DeepSeek's routers correct expert scores by an fp32 buffer that is not on the bf16 grid."""
    heads = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
    sizes = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    config = DeepseekV3Config(**(BASE | heads | sizes | experts | groups))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    value = torch.randn(4)
    model.get_buffer(name).copy_(value)
    reloaded = convert_and_compare(model.eval(), Scheme(), tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[name], value)
    assert torch.equal(reloaded.get_buffer(name), value)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_stored_one_by_one_with_fp32_scales(family, tmp_path):
    convert_and_compare(tiny(family), Scheme(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = [n for n in tensors if ".experts." in n and n.endswith("weight_packed")]
    # 2 layers of 4 experts of 3 matrices
    assert len(packed) == 24
    assert all(n.split(".experts.")[1].split(".")[0].isdigit() for n in packed)
    scales = {n: t.dtype for n, t in tensors.items() if n.endswith("weight_scale")}
    assert {d for n, d in scales.items() if ".experts." in n} == {torch.float32}
    assert {d for n, d in scales.items() if ".self_attn." in n} == {torch.bfloat16}
    config = config_of(tmp_path)
    assert config["dtype"] == "float32"
    assert any("gate" in name for name in config["quantization_config"]["ignore"])


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_kept_by_a_rule_are_stored_fused(family, tmp_path):
    scheme = Scheme(rules=[Rule("*experts", action="keep")], min_coverage=0)
    convert_and_compare(tiny(family), scheme, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]
    assert (fused.ndim, fused.dtype) == (3, torch.bfloat16)
    assert not any(".experts.0." in name for name in tensors)
    assert config_of(tmp_path)["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(rules=[Rule("*experts", weight=INT8)]),
        Scheme(weight=ASYMMETRIC, rules=[Rule("*experts", action="keep")], min_coverage=0),
        Scheme(weight=ASYMMETRIC, rules=[Rule("*experts", weight=QuantSpec())]),
        # gate_up_proj has K = 64, down_proj 96
        Scheme(weight=QuantSpec(group_size=64)),
    ],
    ids=["other bits", "kept beside asymmetric", "beside asymmetric", "half of an expert"],
)
def test_experts_that_differ_from_the_rest(scheme, tmp_path):
    convert_and_compare(tiny("mixtral"), scheme, tmp_path)


def test_experts_in_another_layout_are_refused():
    """Llama 4 stores its experts [E, K, N], without saying so."""
    sizes = {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96}
    config = Llama4TextConfig(**(BASE | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with pytest.raises(UserError, match="Llama4TextExperts stores its experts transposed"):
        prepare(model, Scheme())


def test_routers_are_kept_even_where_they_are_linear_layers(tmp_path):
    torch.manual_seed(0)
    config = PhimoeConfig(**BASE, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model.model.layers[0].mlp.router, nn.Linear)
    coverage = prepare(model, Scheme())
    routers = [entry for entry in coverage.entries if ".router." in entry.name]
    assert {(entry.status, entry.reason) for entry in routers} == {("kept", "router")}
    convert_and_compare(model, Scheme(), tmp_path, coverage)


READER = """
import sys
import torch
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids, logits = torch.load(directory + "/logits.pt")
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits), directory
assert not any(name.split(".")[0] in ("qat", "qat_kernels") for name in sys.modules)
print("equal")
"""


def test_a_process_without_this_project_computes_the_same_logits(tmp_path):
    directories = []
    for family in ("llama", "mixtral", "falcon"):
        directory = tmp_path / family
        directory.mkdir()
        model = tiny(family)
        coverage = prepare(model, Scheme())
        convert.write_checkpoint(model, tokenizer(), coverage, Scheme(), directory)
        ids = random_batch()["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        torch.save((ids, logits), directory / "logits.pt")
        directories.append(str(directory))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", READER, *directories],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shards(family, tmp_path, monkeypatch):
    """Written shards leave memory before the next one fills; the index covers every tensor."""
    limit = 40_000
    monkeypatch.setattr(convert, "SHARD_BYTES", limit)
    alive, sizes, held = [], [], []

    def nbytes(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(tensors, path, metadata):
        held.append(nbytes(t for t in (ref() for ref in alive) if t is not None))
        sizes.append(nbytes(tensors.values()))
        largest.append(max(nbytes([t]) for t in tensors.values()))
        alive.extend(weakref.ref(t) for t in tensors.values())
        save_file(tensors, path, metadata)

    largest: list[int] = []
    monkeypatch.setattr(convert, "save_file", save)
    convert_and_compare(tiny(family), Scheme(), tmp_path)

    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == len(sizes) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    # a tensor larger than the limit gets a shard of its own
    assert all(size <= max(limit, big) for size, big in zip(sizes, largest))
    # of earlier shards nothing is left but the tensors of the matrix in work
    assert all(size <= max(largest) for size in held)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    for name in files:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert set(file.keys()) == {n for n, f in index["weight_map"].items() if f == name}


def test_one_shard_has_the_plain_name_and_no_index(tmp_path):
    convert_and_compare(tiny("llama"), Scheme(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
