"""What is made of an ``nf4/`` directory: bitsandbytes base, PEFT adapter, merged weights."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qat.adapter_files import reload_nf4
from qat.artifact import verify
from qat.errors import UserError
from qat.export import ExportOptions, export
from qat.export import bitsandbytes as bitsandbytes_module
from qat.fidelity import FidelityError
from tests.qat.export.artifacts import make_artifact
from tests.qat.test_adapter_files import KINDS, SAVED, trained
from tests.tiny import random_batch

bitsandbytes = pytest.importorskip("bitsandbytes")

# PEFT 0.21 asks transformers 5.23 by a name that is called old there
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

IDS = random_batch()["input_ids"]


def options(form, out, **changes):
    return ExportOptions(format=form, out=str(out), **changes)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def nf4(directory, family="llama", **changes):
    """The nf4/ directory of a model whose adapter has moved."""
    trained(directory / "model", family, **changes).write(["nf4"], directory)
    return directory / "nf4"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return nf4(tmp_path_factory.mktemp("nf4"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return make_artifact(tmp_path_factory.mktemp("integers") / "artifact")


def test_base_and_adapter_together_are_the_trained_model(source, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    first = export(source, options("bitsandbytes", base, allow_lossy=True))
    second = export(source, options("peft", adapter))
    assert first.read_back.exact
    assert second.exact
    assert (verify(base), verify(adapter)) == ([], [])
    expected = logits(reload_nf4(source))
    assert torch.equal(logits(PeftModel.from_pretrained(plain_base(base), adapter)), expected)
    assert not torch.equal(logits(plain_base(base)), expected)


def plain_base(path):
    """The 4-bit base in plain transformers, computing in fp32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model.eval()


# --- bitsandbytes -------------------------------------------------------------------------------


def test_the_base_is_copied_byte_for_byte(source, tmp_path):
    with pytest.raises(UserError, match=r"cannot carry adapter exactly.*format=peft.*allow_lossy"):
        export(source, options("bitsandbytes", tmp_path / "out"))
    report = export(source, options("bitsandbytes", tmp_path / "out", allow_lossy=True))
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "adapter").exists()
    entries = load_file(source / name)
    layers = sum(name.endswith("__nf4") for name in entries)
    assert layers == 14
    # every entry, and every weight as bitsandbytes dequantizes it
    assert report.read_back.tensors == report.read_back.tensors_equal == len(entries) + layers
    # without an adapter a base is carried exactly
    again = export(tmp_path / "out", options("bitsandbytes", tmp_path / "again"))
    assert again.exact
    merged = export(tmp_path / "out", options("merged", tmp_path / "merged"))
    assert merged.exact
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert torch.equal(logits(found), logits(plain_base(source)))


def test_weights_that_bitsandbytes_computes_otherwise_are_noticed(source, tmp_path, monkeypatch):
    dequantized = bitsandbytes_module.dequantized
    monkeypatch.setattr(
        bitsandbytes_module, "dequantized", lambda *given: dequantized(*given) * 1.5
    )
    # the adapter may be left out; what is written must be right all the same
    with pytest.raises(FidelityError, match=r"14 differences, .* relative error 5.00e-01"):
        export(source, options("bitsandbytes", tmp_path / "out", allow_lossy=True))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_copy_is_noticed(source, tmp_path, monkeypatch):
    write = bitsandbytes_module.Bitsandbytes.write

    def wrong(self, source, directory, notes):
        write(self, source, directory, notes)
        path = directory / "config.json"
        path.write_text(path.read_text().replace("nf4", "fp4"))

    monkeypatch.setattr(bitsandbytes_module.Bitsandbytes, "write", wrong)
    with pytest.raises(FidelityError, match="quantization_config differs"):
        export(source, options("bitsandbytes", tmp_path / "out", allow_lossy=True))
    assert list(tmp_path.iterdir()) == []


# --- peft ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "dora",
        "new tokens, tied",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in [*KINDS, *SAVED]),
    ],
)
def test_every_kind_of_adapter(kind, tmp_path):
    family, changes = SAVED.get(kind, ("llama", KINDS.get(kind)))
    source = nf4(tmp_path, family, **changes)
    out = tmp_path / "out"
    report = export(source, options("peft", out))
    stored = load_file(source / "adapter" / "adapter_model.safetensors")
    assert report.exact
    assert report.read_back.tensors == len(stored)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source)
    trained_base = json.loads((source / "adapter" / "base.json").read_text())
    base = json.loads((out / "base.json").read_text())
    assert base.pop("qat_lightning")["lossy"] == []
    assert base == trained_base


def test_peft_finds_the_base_by_its_name(source, tmp_path):
    export(source, options("peft", tmp_path / "out"))
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.get_base_model().config.quantization_config.bnb_4bit_quant_type == "nf4"
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    assert torch.equal(logits(model.eval()), logits(reload_nf4(source)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'from_pretrained("{source}")' in card


# --- merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "new tokens and the head",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ["dora", "norms", "tied"]),
    ],
)
def test_merging_is_a_measured_loss(kind, tmp_path):
    family, changes = SAVED.get(kind, ("llama", KINDS.get(kind)))
    source = nf4(tmp_path, family, **changes)
    with pytest.raises(UserError, match=r"cannot carry the adapter exactly.*format=bitsandbytes"):
        export(source, options("merged", tmp_path / "out"))
    report = export(source, options("merged", tmp_path / "out", allow_lossy=True))
    # the files hold the sum as it was computed ...
    assert report.read_back.exact
    assert not report.exact
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected, found = logits(reload_nf4(source)), logits(model)
    # ... which is the trained function but for the order of additions: sums of at most 96 + 4
    # products through 2 layers, each with an error below 100 * 2^-24 of its size
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 2 * 7 * 100 * 2.0**-24
    rounded = options("merged", tmp_path / "bf16", allow_lossy=True, dtype="bfloat16")
    report = export(source, rounded)
    assert 0 < report.read_back.relative_error <= 2.0**-8
    assert "rounded to bfloat16" in report.text()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_nf4_has_no_integer_codes(form, source, tmp_path):
    with pytest.raises(UserError, match=rf"NF4 codes.*or format={form} of the run's artifact/$"):
        export(source, options(form, tmp_path / "out", allow_lossy=True))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("bitsandbytes", "stores NF4 or FP4.*format=bitsandbytes of the run's nf4/ directory$"),
        ("peft", "holds no adapter.*format=peft of the run's nf4/"),
    ],
)
def test_an_integer_artifact_has_neither_base_nor_adapter(form, message, artifact, tmp_path):
    with pytest.raises(UserError, match=message):
        export(artifact, options(form, tmp_path / "out", allow_lossy=True))
    assert not (tmp_path / "out").exists()
