"""What an adapter run writes, read back by transformers, PEFT and bitsandbytes alone."""

import json
import math

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.adapter_config import TAKES_FROM_BASE, AdapterConfig
from qat.adapter_files import AdapterFiles, reload_nf4
from qat.adapter_state import base_sha256, in_fp32
from qat.adapters import prepare_adapters
from qat.fake_quant import set_enabled
from qat.fidelity import FidelityError, check_merged, reload
from qat.linear_4bit import Linear4bit
from qat.lora import LoraLinear
from qat.original import OriginalWeights
from qat.scheme import Rule, Scheme
from qat_kernels import QuantSpec
from tests.tiny import CONFIGS, VOCAB, random_batch, save_tiny, tiny_tokenizer

bitsandbytes = pytest.importorskip("bitsandbytes")

# PEFT 0.21 asks transformers 5.23 by a name that is called old there
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SCHEME = Scheme(weight=QuantSpec(bits=4, group_size=32), min_coverage=0.1)
ROWS = VOCAB + 2
FAMILIES = [f for f in CONFIGS if f not in ("gpt2", "falcon")]
KINDS = {
    "lora": {},
    "rslora": {"rslora": True, "alpha": 7.0, "rank": 3},
    "dora": {"dora": True},
    "bf16": {"dtype": "bfloat16"},
    "some": {"targets": ["q_proj", "*.1.mlp.*"]},
}
SAVED = {
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "both": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["*norm"]}),
    "norms with biases": ("phi", {"modules_to_save": ["*layernorm"]}),
    "tied": ("llama_tied", {"modules_to_save": ["embed_tokens"]}),
    "norms of a tied model": ("llama_tied", {"modules_to_save": ["*norm"]}),
    "new tokens": ("llama", {"new_rows": (VOCAB, VOCAB + 1)}),
    "new tokens, tied": ("llama_tied", {"new_rows": (VOCAB, VOCAB + 1)}),
    "new tokens and the head": (
        "llama",
        {"new_rows": (VOCAB, VOCAB + 1), "modules_to_save": ["lm_head"]},
    ),
}


def trained(directory, family="llama", scheme=SCHEME, new_rows=(), **options):
    """The files of a model whose adapters and named modules have moved."""
    save_tiny(family, directory, torch.bfloat16)
    adapter = AdapterConfig(**{"block_size": 32, "rank": 4} | options)
    original = OriginalWeights(str(directory), rows=ROWS if new_rows else 0)
    model, coverage = prepare_adapters(original, adapter, scheme, 0, new_rows=new_rows)
    sha256 = base_sha256(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # also off the grid of bf16, as after training; of a size that shows
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise, alpha=0.05)
    in_fp32(model)
    return AdapterFiles(
        model,
        coverage,
        original,
        adapter,
        torch.bfloat16,
        tiny_tokenizer(),
        sha256,
        {"recipe": "test"},
    )


def logits(model, tokens=None):
    ids = random_batch()["input_ids"] if tokens is None else tokens
    with torch.no_grad():
        return model(ids).logits


def inputs_of(files):
    """Random text, new tokens among it."""
    ids = random_batch()["input_ids"].clone()
    if files.original.added:
        ids[:, 3], ids[:, 7] = VOCAB, VOCAB + 1
    return ids


def plain_original(files, directory, dtype=torch.float32):
    """The original as anybody loads it, with room for new tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if files.original.added:
        model.resize_token_embeddings(ROWS, mean_resizing=False)
    return model


def with_adapter(model, directory):
    return PeftModel.from_pretrained(model, str(directory)).eval()


# --- adapter/ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_loads_in_peft_on_the_original(kind, tmp_path):
    """The 16-bit base is the original, so even the order of additions is the same."""
    files = trained(tmp_path / "model", base="16bit", **KINDS[kind])
    (tmp_path / "adapter").mkdir()
    files.write_adapter(tmp_path / "adapter", str(tmp_path / "model"), on_original=True)
    read = with_adapter(plain_original(files, tmp_path / "model"), tmp_path / "adapter")
    assert read.peft_config["default"].lora_alpha == files.adapter.alpha
    assert torch.equal(logits(read), logits(files.model))
    assert not torch.equal(logits(read), logits(plain_original(files, tmp_path / "model").eval()))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_of_every_family_loads_in_peft(family, tmp_path):
    files = trained(tmp_path / "model", family, base="16bit")
    (tmp_path / "adapter").mkdir()
    files.write_adapter(tmp_path / "adapter", str(tmp_path / "model"), on_original=True)
    read = with_adapter(plain_original(files, tmp_path / "model"), tmp_path / "adapter")
    assert torch.equal(logits(read), logits(files.model))


@pytest.mark.parametrize("case", SAVED)
def test_modules_and_rows_that_train_load_in_peft(case, tmp_path):
    family, options = SAVED[case]
    files = trained(tmp_path / "model", family, base="16bit", **options)
    (tmp_path / "adapter").mkdir()
    files.write_adapter(tmp_path / "adapter", str(tmp_path / "model"), on_original=True)
    read = with_adapter(plain_original(files, tmp_path / "model"), tmp_path / "adapter")
    ids = inputs_of(files)
    assert torch.equal(logits(read, ids), logits(files.model, ids))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_adapter_that_took_from_the_base_is_converted_for_the_original(
    init, rslora, dtype, tmp_path
):
    """Also where the adapter trains in bf16: what it took from the base is fp32 all the same."""
    files = trained(tmp_path / "model", init=init, rslora=rslora, dtype=dtype)
    (tmp_path / "adapter").mkdir()
    files.write_adapter(tmp_path / "adapter", str(tmp_path / "model"), on_original=True)
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.r == 8
    expected_scale = 32 / math.sqrt(4) if rslora else 32 / 4
    rank = math.sqrt(8) if rslora else 8
    assert config.lora_alpha / rank == pytest.approx(expected_scale, rel=1e-15)
    # in double precision, so that what is left is not rounding: W + s (B A - B0 A0) on both sides
    read = with_adapter(
        plain_original(files, tmp_path / "model", torch.float64), tmp_path / "adapter"
    ).double()
    expected = plain_original(files, tmp_path / "model", torch.float64)
    with torch.no_grad():
        for name, layer in files.model.named_modules():
            if isinstance(layer, LoraLinear):
                a, b = (f.double() for f in layer.factors)
                delta = b @ a - layer.initial_b.double() @ layer.initial_a.double()
                expected.get_submodule(name).weight.add_(expected_scale * delta)
    ours, theirs = logits(read), logits(expected.eval())
    assert ours.dtype == torch.float64
    # 2^-53 for each operation; some 10^3 of them in a row over two layers, whose condition is far
    # below the 10^4 that this leaves
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    assert (theirs - logits(plain_original(files, tmp_path / "model"))).abs().max() > 0.01


def test_configuration_and_identity(tmp_path):
    files = trained(tmp_path / "model", dropout=0.1, targets=["q_proj", "*.1.mlp.*"])
    files.write(["adapter", "nf4"], tmp_path)
    for directory, base in (("adapter", str(tmp_path / "model")), ("nf4/adapter", "..")):
        path = tmp_path / directory
        text = (path / "adapter_config.json").read_text()
        config = json.loads(text)
        assert config["base_model_name_or_path"] == base
        assert config["init_lora_weights"] is True
        assert config["inference_mode"] is True
        assert config["task_type"] == "CAUSAL_LM"
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 32.0, 0.1)
        # names in full, since others end in the same way
        assert "model.layers.1.mlp.up_proj" in config["target_modules"]
        assert text.replace(str(tmp_path / "model"), "").count(str(tmp_path)) == 0
        identity = json.loads((path / "base.json").read_text())
        assert identity["base_sha256"] == files.base_sha256 == base_sha256(files.model)
        assert identity["base_model"] == "model"
        quantizer = {"quant_type": "nf4", "block_size": 32, "double_quant": True}
        assert identity["quantizer"] == {"dtype": "bfloat16", **quantizer}
        assert len(AutoTokenizer.from_pretrained(path)) == VOCAB


def test_short_names_stand_for_all_layers_of_that_name(tmp_path):
    files = trained(tmp_path / "model", targets=["q_proj", "v_proj"])
    files.write(["adapter"], tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]


def test_the_same_files_come_out_again(tmp_path):
    files = trained(tmp_path / "model", init="pissa", modules_to_save=["lm_head"])
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files.write_adapter(tmp_path / name, "base", on_original=True)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


# --- nf4/ -----------------------------------------------------------------------------------------


def check_nf4(files, directory):
    files.write(["nf4"], directory)
    assert files.caveat() is None
    read = reload_nf4(directory / "nf4")
    ids = inputs_of(files)
    assert torch.equal(logits(read, ids), logits(files.model, ids))
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_base_and_adapter_are_the_trained_model(family, tmp_path):
    files = trained(tmp_path / "model", family)
    read = check_nf4(files, tmp_path)
    count = sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in read.modules())
    assert count == sum(isinstance(m, Linear4bit) for m in files.model.modules()) > 0
    assert {p.dtype for p in read.parameters()} <= {torch.float32, torch.uint8}


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        (kind, init)
        for kind in KINDS
        for init in ("default", *TAKES_FROM_BASE)
        if kind != "dora" or init == "default"  # the configuration refuses DoRA with these
    ],
)
def test_every_kind_of_adapter_on_the_4_bit_base(kind, init, tmp_path):
    files = trained(tmp_path / "model", init=init, base="fp4", double_quant=False, **KINDS[kind])
    check_nf4(files, tmp_path)


@pytest.mark.parametrize("case", SAVED)
def test_modules_and_rows_that_train_on_the_4_bit_base(case, tmp_path):
    family, options = SAVED[case]
    check_nf4(trained(tmp_path / "model", family, **options), tmp_path)


def test_layers_that_stay_in_16_bit_beside_the_4_bit_base(tmp_path):
    """A kept layer still has a 4-bit base; a head by rule and a layer that trains have none."""
    rules = [
        Rule(match="lm_head", weight=QuantSpec(bits=8, group_size=32)),
        Rule(match="*.0.*.k_proj", action="keep"),
        Rule(match="*.1.mlp.up_proj", action="keep"),
    ]
    scheme = Scheme(SCHEME.weight, rules=rules)
    files = trained(tmp_path / "model", scheme=scheme, modules_to_save=["*.1.mlp.up_proj"])
    read = check_nf4(files, tmp_path)
    plain = {n for n, m in read.named_modules() if type(m) is nn.Linear and ".lora_" not in n}
    assert {n.split(".base_layer")[0].split(".modules_to_save")[0] for n in plain} == {
        "lm_head",
        "model.layers.1.mlp.up_proj.original_module",
        "model.layers.1.mlp.up_proj",
    }


def test_base_that_was_4_bit_already_is_written_as_it_was(tmp_path):
    """The 4-bit base of one run is the model of the next."""
    trained(tmp_path / "model").write(["nf4"], tmp_path)
    original = OriginalWeights(str(tmp_path / "nf4"))
    adapter = AdapterConfig(block_size=32, rank=2, init="gaussian")
    model, coverage = prepare_adapters(original, adapter, SCHEME, 0)
    files = AdapterFiles(
        model, coverage, original, adapter, torch.bfloat16, tiny_tokenizer(), base_sha256(model), {}
    )
    (tmp_path / "again").mkdir()
    check_nf4(files, tmp_path / "again")
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("nf4", "again/nf4"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_base_that_bitsandbytes_misreads_is_announced(tmp_path):
    files = trained(tmp_path / "model", block_size=64)
    # K = 96 of the down projections
    assert files.caveat().startswith("model.layers.0.mlp.down_proj: bitsandbytes 0.50 reads")


# --- merged/ --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_model_loads_in_transformers(family, tmp_path):
    files = trained(tmp_path / "model", family)
    files.write(["merged"], tmp_path)
    read, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert read.dtype == torch.bfloat16
    expected = plain_original(files, tmp_path / "model")
    changed = 0
    with torch.no_grad():
        for name, layer in files.model.named_modules():
            if isinstance(layer, LoraLinear):
                a, b = layer.factors
                expected.get_submodule(name).weight.add_((b @ a) * 8.0)
                changed += 1
    assert changed > 0
    values = dict(expected.named_parameters())
    for name, value in read.named_parameters():
        assert torch.equal(value, values.pop(name).bfloat16()), name
    assert not values


@pytest.mark.parametrize("kind", ["dora", "rslora"])
@pytest.mark.parametrize("merged", [False, True])
def test_merged_model_does_not_depend_on_the_form(kind, merged, tmp_path):
    files = trained(tmp_path / "model", **KINDS[kind])
    set_enabled(files.model, merged)
    files.write(["merged"], tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, layer in files.model.named_modules():
        if isinstance(layer, LoraLinear):
            value = layer.merged_weight().detach().bfloat16().float()
            assert torch.equal(read.get_submodule(name).weight, value)


@pytest.mark.parametrize("case", SAVED)
def test_modules_and_rows_that_train_are_merged(case, tmp_path):
    family, options = SAVED[case]
    files = trained(tmp_path / "model", family, **options)
    files.write(["merged"], tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        ours, theirs = (getattr(m, get)().weight for m in (files.model, read))
        assert torch.equal(ours, theirs)
    assert read.config.vocab_size == (ROWS if files.original.added else VOCAB)
    norms = {n: p for n, p in read.named_parameters() if "norm" in n}
    assert norms
    for name, value in norms.items():
        owner, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(files.model.get_submodule(owner), leaf), value)


def test_merged_model_that_lacks_a_tensor_fails(tmp_path):
    """Also one to which transformers gives its old value by itself: a norm of ones."""
    files = trained(tmp_path / "model")
    files.write(["merged"], tmp_path)
    path = tmp_path / "merged" / "model.safetensors"
    check_merged(files.model, files.coverage, reload(path.parent), torch.bfloat16)
    whole = load_file(path)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file({n: v for n, v in whole.items() if n != name}, path, {"format": "pt"})
        with pytest.raises(FidelityError, match=rf"merged: missing_keys: \['{name}'\]"):
            reload(path.parent)


def test_merged_model_is_compared_name_by_name(tmp_path):
    """Parameters and persistent buffers: each must be there, and be equal."""
    files = trained(tmp_path / "model")
    files.model.model.layers[0].register_buffer("count", torch.tensor([3]))
    files.write(["merged"], tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)

    def check():
        check_merged(files.model, files.coverage, read, torch.bfloat16)

    count = r"model\.layers\.0\.count"
    with pytest.raises(FidelityError, match=f"^merged/ is not the .*: {count} is missing after"):
        check()
    read.model.layers[0].register_buffer("count", torch.tensor([4]))
    with pytest.raises(FidelityError, match=f"^merged/ is not the .*: {count} differs after"):
        check()
    read.model.layers[0].count -= 1
    check()
    with torch.no_grad():
        read.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(FidelityError, match=r"^merged/ .*layers\.1\.mlp\.up_proj\.weight differs"):
        check()
    read.lm_head = nn.Identity()
    with pytest.raises(FidelityError, match=r"^merged/ .*lm_head\.weight is missing"):
        check()
