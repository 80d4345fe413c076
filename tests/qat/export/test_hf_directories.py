"""compressed-tensors, GPTQ, AWQ and merged exports: the trained codes and scales, or a refusal."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.artifact import verify, write_manifest
from qat.errors import UserError
from qat.export import ExportOptions, export
from qat.export import gptq as gptq_module
from qat.export.compressed_tensors import CompressedTensors
from qat.fidelity import FidelityError
from qat.runtime import load_packed
from qat.scheme import InputSpec, Rule, Scheme
from qat_kernels import QuantSpec
from tests.qat.export.artifacts import make_artifact
from tests.tiny import random_batch

IDS = random_batch()["input_ids"]
INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
STATIC = InputSpec(granularity="tensor", dynamic=False, scale_dtype="bfloat16")
SPECS = {
    "g32": QuantSpec(),
    "g64": QuantSpec(group_size=64, grid="absmax"),
    "g128": QuantSpec(group_size=128, grid="mse"),
    "channel": QuantSpec(granularity="channel"),
    "tensor": QuantSpec(granularity="tensor"),
    "int2": QuantSpec(bits=2, group_size=64),
    "int3": QuantSpec(bits=3),
    "int5": QuantSpec(bits=5),
    "int8": INT8,
    "asymmetric": QuantSpec(symmetric=False, grid="absmax"),
    "asymmetric channel": QuantSpec(symmetric=False, granularity="channel", grid="mse"),
    "asymmetric int2": QuantSpec(bits=2, symmetric=False, grid="absmax", group_size=128),
    "asymmetric int8": QuantSpec(bits=8, symmetric=False, grid="absmax"),
    "asymmetric tensor": QuantSpec(symmetric=False, granularity="tensor", grid="absmax"),
}
SCHEMES = {name: Scheme(weight=spec) for name, spec in SPECS.items()} | {
    "kept layers": Scheme(rules=[Rule("*.0.*o_proj", action="keep")]),
    "mixed": Scheme(rules=[Rule("*down_proj", weight=QuantSpec(bits=3, group_size=64))]),
    "quantized head": Scheme(rules=[Rule("lm_head")]),
    "fp16": Scheme(keep_dtype="float16"),
    "w8a8": Scheme(weight=INT8, input=InputSpec()),
    "w8a8 static": Scheme(weight=INT8, input=STATIC),
}
FAMILIES = [
    "llama_tied",
    "llama_bias",
    "qwen3",
    "gemma",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("mistral", "qwen2", "gemma2", "gemma3")),
]
FORMATS = ["compressed-tensors", "gptq", "gptq_v2", "awq", "merged"]
LAYER = "model.layers.0.mlp.down_proj"


def refusal(scheme, form):
    """Pattern of the error that a scheme gives with a format; empty when it is carried exactly."""
    if scheme in ("w8a8", "w8a8 static") and form != "compressed-tensors":
        inputs = r"quantized inputs .* nearest .*format=compressed-tensors"
        return r"codes of 8 bits.*: format=compressed-tensors$" if form == "awq" else inputs
    if form == "awq" and scheme in ("int5", "int8", "asymmetric int8"):
        return r"has codes of \d bits, the format has at most 4.* nearest .*: format=gptq_v2"
    if form == "awq" and scheme == "quantized head":
        return r"lm_head exactly: it is quantized, and AWQ keeps .* nearest .*: format=gptq_v2"
    return ""


def options(form, out, **changes):
    return ExportOptions(format=form, out=str(out), **changes)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def plain(path, **changes):
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32} | changes).eval()


def section_of(path):
    return json.loads((path / "config.json").read_text()).get("quantization_config")


def rewrite(path, edit):
    """Change a safetensors file in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Artifacts of the llama family by the name of their scheme, made once."""
    root = tmp_path_factory.mktemp("artifacts")

    def artifact(name):
        path = root / name.replace(" ", "_")
        return path if path.exists() else make_artifact(path, "llama", SCHEMES[name])

    return artifact


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_carried_exactly_or_refused(scheme, form, artifacts, tmp_path):
    source, out = artifacts(scheme), tmp_path / "out"
    message = refusal(scheme, form)
    if message:
        with pytest.raises(UserError, match=message):
            export(source, options(form, out))
        assert list(tmp_path.iterdir()) == []
        return
    report = export(source, options(form, out))
    found = report.read_back
    assert report.exact
    assert found.exact
    matrices = 0 if form == "merged" else 14 + (scheme == "quantized head")
    matrices -= form != "merged" and scheme == "kept layers"
    assert (found.matrices, found.codes_equal, found.scales_equal) == (matrices,) * 3
    assert found.values_equal == matrices
    assert found.tensors == found.tensors_equal > 5
    assert verify(out) == []
    assert report.size_bytes < sum(p.stat().st_size for p in out.iterdir())


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_carried_exactly(family, form, tmp_path):
    source = make_artifact(tmp_path / "artifact", family)
    report = export(source, options(form, tmp_path / "out"))
    assert report.exact
    scales = load_file(source / "model.safetensors")
    negative = [bool((v < 0).any()) for n, v in scales.items() if n.endswith("weight_scale")]
    assert len(negative) >= 14
    assert all(negative)
    kept = len(scales) - 3 * len(negative)
    assert report.read_back.tensors == kept + len(negative) * (form == "merged")
    # side files too: the same tokens for the same text
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Größe 12345, can't"
    assert read(text)["input_ids"] == AutoTokenizer.from_pretrained(source)(text)["input_ids"]


@pytest.mark.parametrize("form", ["compressed-tensors", "merged"])
@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("llama", "g128"),
        ("llama_tied", "channel"),
        ("llama_bias", "int3"),
        ("qwen3", "g32"),
        ("mistral", "tensor"),
        ("gemma", "g64"),
        pytest.param("gemma3", "mixed", marks=pytest.mark.slow),
        ("llama", "quantized head"),
        ("llama", "asymmetric"),
        ("llama", "w8a8 static"),
    ],
)
def test_logits_of_plain_transformers_are_those_of_the_artifact(family, scheme, form, tmp_path):
    """Plain transformers cannot read asymmetric engine layouts; our runtime reads those."""
    source = make_artifact(tmp_path / "artifact", family, SCHEMES[scheme])
    out = tmp_path / "out"
    lossy = scheme == "w8a8 static" and form == "merged"
    export(source, options(form, out, allow_lossy=lossy))
    expected = logits(plain(source))
    engine_asymmetric = scheme == "asymmetric" and form == "compressed-tensors"
    found = logits(load_packed(out, torch.float32) if engine_asymmetric else plain(out))
    # what the inputs' quantization does is the only thing that is lost
    assert torch.equal(found, expected) != lossy


# --- compressed-tensors -------------------------------------------------------------------------


def test_engines_get_native_scales_in_the_models_dtype(artifacts, tmp_path):
    source, out = artifacts("asymmetric"), tmp_path / "out"
    assert section_of(source)["dequantize"] is True
    export(source, options("compressed-tensors", out))
    section, tensors = section_of(out), load_file(out / "model.safetensors")
    assert "dequantize" not in section
    assert section["config_groups"]["group_0"]["targets"] == ["Linear"]
    stored = load_file(source / "model.safetensors")
    assert stored[f"{LAYER}.weight_scale"].dtype == torch.float32
    assert tensors[f"{LAYER}.weight_scale"].dtype == torch.bfloat16
    # 256 groups of 32, packed along N = 128
    assert tuple(tensors[f"{LAYER}.weight_zero_point"].shape) == (128 * 4 // 32, 256 // 32)
    assert "does not read their zero points" in (out / "README.md").read_text()


def test_a_scale_per_tensor_becomes_one_per_row(artifacts, tmp_path):
    export(artifacts("tensor"), options("compressed-tensors", tmp_path / "out"))
    weights = section_of(tmp_path / "out")["config_groups"]["group_0"]["weights"]
    assert weights["strategy"] == "channel"
    scale = load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.weight_scale"]
    assert tuple(scale.shape) == (128, 1)


@pytest.mark.parametrize(
    ("family", "plain_reads_it"), [("llama", True), ("qwen3_moe", False), ("falcon", False)]
)
def test_the_card_says_whether_plain_transformers_computes_the_same(
    family, plain_reads_it, tmp_path
):
    source, out = make_artifact(tmp_path / "artifact", family), tmp_path / "out"
    assert export(source, options("compressed-tensors", out)).exact
    try:
        same = torch.equal(logits(plain(out)), logits(plain(source)))
    except (ValueError, RuntimeError, AttributeError):
        same = False
    assert same == plain_reads_it
    card = (out / "README.md").read_text()
    assert ("with the logits that\nwere trained" in card) == same
    assert ("Use the artifact that" in card.replace("\n", " ")) != same


def test_w8a8_is_declared_as_it_was_trained(artifacts, tmp_path):
    source = artifacts("w8a8 static")
    report = export(source, options("compressed-tensors", tmp_path / "out"))
    section = section_of(tmp_path / "out")
    assert section["format"] == "int-quantized"
    assert section["config_groups"] == section_of(source)["config_groups"]
    # 14 input scales beside what is kept
    assert report.read_back.tensors == 7 + 14


def test_read_back_sees_inputs_that_are_declared_otherwise(artifacts, tmp_path, monkeypatch):
    write = CompressedTensors.write

    def wrong(self, source, directory, notes):
        write(self, source, directory, notes)
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        path.write_text(json.dumps(config))

    monkeypatch.setattr(CompressedTensors, "write", wrong)
    with pytest.raises(FidelityError, match="inputs are declared otherwise"):
        export(artifacts("w8a8"), options("compressed-tensors", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_read_back_misses_a_static_scale(artifacts, tmp_path, monkeypatch):
    write = CompressedTensors.write

    def wrong(self, source, directory, notes):
        write(self, source, directory, notes)
        rewrite(directory / "model.safetensors", lambda t: t.pop(f"{LAYER}.input_scale"))

    monkeypatch.setattr(CompressedTensors, "write", wrong)
    with pytest.raises(FidelityError, match=f"{LAYER}.input_scale is missing"):
        export(artifacts("w8a8 static"), options("compressed-tensors", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "awq"])
def test_scales_off_the_portable_grid(form, tmp_path):
    scheme = Scheme(weight=QuantSpec(scale_dtype="float32"))
    source = make_artifact(tmp_path / "artifact", "llama", scheme)
    dtype = "bfloat16" if form == "compressed-tensors" else "float16"
    with pytest.raises(
        UserError,
        match=f"scales are not exact in {dtype}.*nearest .*: format=merged dtype=float32; or write",
    ):
        export(source, options(form, tmp_path / "out"))
    report = export(source, options(form, tmp_path / "out", allow_lossy=True))
    assert not report.exact
    assert len(report.losses) == 14
    # half a unit in the last place of the scale, and never nothing
    assert 0 < report.read_back.relative_error <= 2.0 ** (-9 if dtype == "bfloat16" else -12)
    assert report.read_back.codes_equal == 14
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["qat_lightning"]
    assert facts["lossy"][0].startswith(f"{LAYER}: its scales are not exact")
    assert "largest relative error" in report.text()
    assert export(source, options("merged", tmp_path / "m", dtype="float32")).exact


# --- GPTQ ---------------------------------------------------------------------------------------


def test_versions_differ_in_label_and_zeros_alone(artifacts, tmp_path):
    for form in ("gptq", "gptq_v2"):
        export(artifacts("g128"), options(form, tmp_path / form))
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("gptq", "gptq_v2"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) != name.endswith("qzeros"), name
    assert set(first[f"{LAYER}.qzeros"].flatten().tolist()) == {0x77777777}
    sections = [section_of(tmp_path / form) for form in ("gptq", "gptq_v2")]
    assert [s.pop("checkpoint_format") for s in sections] == ["gptq", "gptq_v2"]
    assert sections[0] == sections[1]
    facts = {key: sections[0][key] for key in ("bits", "group_size", "sym", "desc_act", "lm_head")}
    assert facts == {
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
    }


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_a_flipped_version_label_is_detected(form, artifacts, tmp_path, monkeypatch):
    other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[form]
    section = gptq_module._section
    monkeypatch.setattr(gptq_module, "_section", lambda s, g, label: section(s, g, other))
    with pytest.raises(FidelityError, match=r"14 differences, .*codes, weights, relative error"):
        export(artifacts("g32"), options(form, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_shapes_are_those_that_readers_expect(artifacts, tmp_path):
    export(artifacts("int3"), options("gptq", tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shapes = {part: tuple(tensors[f"{LAYER}.{part}"].shape) for part in gptq_module.PARTS}
    # K = 256, N = 128, 8 groups of 32, 3 bits
    assert shapes == {"qweight": (24, 128), "qzeros": (8, 12), "scales": (8, 128), "g_idx": (256,)}
    assert tensors[f"{LAYER}.scales"].dtype == torch.float16
    assert tensors[f"{LAYER}.g_idx"].tolist() == [k // 32 for k in range(256)]


def zero_points_of_zero(artifact):
    """Give one zero point the least code, whose unsigned value is 0."""

    def edit(tensors):
        tensors[f"{LAYER}.weight_zero_point"][0, 0] &= ~0xF

    rewrite(artifact / "model.safetensors", edit)
    write_manifest(artifact, {})


def test_version_1_refuses_a_zero_point_of_0(artifacts, tmp_path):
    source = tmp_path / "artifact"
    shutil.copytree(artifacts("asymmetric"), source)
    zero_points_of_zero(source)
    message = f"cannot carry {LAYER} exactly: version 1 .* would wrap.*that can: format=gptq_v2$"
    with pytest.raises(UserError, match=message):
        export(source, options("gptq", tmp_path / "out", allow_lossy=True))
    for form in ("gptq_v2", "awq"):
        assert export(source, options(form, tmp_path / form)).exact


def test_kept_layers_are_named_for_every_reader(artifacts, tmp_path):
    export(artifacts("kept layers"), options("gptq", tmp_path / "gptq"))
    export(artifacts("kept layers"), options("awq", tmp_path / "awq"))
    kept = "model.layers.0.self_attn.o_proj"
    section = section_of(tmp_path / "gptq")
    assert section["dynamic"] == {r"-:^model\.layers\.0\.self_attn\.o_proj$": {}}
    (names,) = section["modules_in_block_to_quantize"]
    assert len(names) == 13
    assert kept not in names
    assert section_of(tmp_path / "awq")["modules_to_not_convert"] == [kept, "lm_head"]


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_narrow_and_mixed_codes_share_a_width_and_a_group(form, artifacts, tmp_path):
    export(artifacts("mixed"), options(form, tmp_path / "out"))
    section = section_of(tmp_path / "out")
    # 3 bits in groups of 64 beside 4 bits in groups of 32
    assert (section["bits"], section["group_size"]) == (4, 32)
    export(artifacts("tensor"), options(form, tmp_path / "rows"))
    assert section_of(tmp_path / "rows")["group_size"] == -1


@pytest.mark.parametrize("form", ["gptq", "gptq_v2", "awq"])
def test_features_that_do_not_fill_words_are_refused(form, tmp_path):
    scheme = Scheme(weight=QuantSpec(group_size=4))
    changes = {"intermediate_size": 132}
    source = make_artifact(tmp_path / "artifact", "llama", scheme, **changes)
    with pytest.raises(
        UserError, match=r"132 \w+ features of 4 bits do not fill .* format=compressed-tensors$"
    ):
        export(source, options(form, tmp_path / "out", allow_lossy=True))


# --- merged -------------------------------------------------------------------------------------


def test_auto_takes_the_smallest_exact_dtype(artifacts, tmp_path):
    def dtype_of(path):
        values = {v.dtype for v in load_file(path / "model.safetensors").values()}
        assert json.loads((path / "config.json").read_text())["dtype"] in str(values)
        assert section_of(path) is None
        return values

    # symmetric 4 bits times 8 significant bits, and kept values that are fp16 already
    export(artifacts("fp16"), options("merged", tmp_path / "a"))
    assert dtype_of(tmp_path / "a") == {torch.float16}
    # one bit more than fp16 has: codes up to 255 times 8 bits
    export(artifacts("asymmetric int8"), options("merged", tmp_path / "b"))
    assert dtype_of(tmp_path / "b") == {torch.float32}
    # codes -2 ... 1 times 8 bits, beside bf16 values of which fp16 does not reach the smallest
    source = artifacts("int2")
    export(source, options("merged", tmp_path / "c"))
    assert dtype_of(tmp_path / "c") == {torch.bfloat16}
    with pytest.raises(UserError, match=r"exactly: its values are not exact in float16"):
        export(source, options("merged", tmp_path / "d", dtype="float16"))


def test_an_inexact_dtype_is_refused_and_measured(artifacts, tmp_path):
    source = artifacts("g32")
    with pytest.raises(UserError, match=r"not exact in bfloat16.*: format=merged dtype=auto; or"):
        export(source, options("merged", tmp_path / "out", dtype="bfloat16"))
    report = export(source, options("merged", tmp_path / "o", dtype="bfloat16", allow_lossy=True))
    # half a unit in the last of 8 places
    assert 0 < report.read_back.relative_error <= 2.0**-9
    assert export(source, options("merged", tmp_path / "f", dtype="float32")).exact


# --- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["flipped", "truncated", "extra", "missing"])
def test_damaged_outputs_are_noticed_and_removed(kind, form, artifacts, tmp_path, monkeypatch):
    """The writer is right; what reaches the disk is not."""
    from qat.export import run

    load = run.load_format

    def damage(directory):
        path = directory / "model.safetensors"
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        elif kind == "flipped":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(bytes(content))
        elif kind == "extra":
            rewrite(path, lambda t: t.update(other=torch.ones(1)))
        else:
            rewrite(path, lambda t: t.pop(next(n for n in t if LAYER in n and "g_idx" not in n)))

    def broken(options):
        made = load(options)
        write = made.write

        def wrong(source, directory, notes):
            write(source, directory, notes)
            damage(directory)

        made.write = wrong
        return made

    monkeypatch.setattr(run, "load_format", broken)
    with pytest.raises((FidelityError, UserError)) as error:
        export(artifacts("g32"), options(form, tmp_path / "out"))
    expected = {
        "flipped": "differ",
        "truncated": "truncated",
        "extra": "other does not belong there",
        "missing": "missing|not found",
    }
    assert error.match(expected[kind])
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_that_does_not_verify_is_not_exported(artifacts, tmp_path):
    source = tmp_path / "artifact"
    shutil.copytree(artifacts("g32"), source)
    path = source / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="does not verify"):
        export(source, options("gptq", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
