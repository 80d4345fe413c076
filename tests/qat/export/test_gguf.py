"""GGUF: what is written is what was trained, as gguf's reader and transformers find it."""

import functools
import json
import math
from contextlib import ExitStack

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qat.artifact import verify
from qat.errors import UserError
from qat.export import ExportOptions
from qat.export import gguf as exporter
from qat.export.gguf_blocks import choose, pack, permutation, unpack
from qat.export.gguf_families import rope_factors
from qat.export.source import Matrix, Source
from qat.fidelity import FidelityError
from qat.scheme import InputSpec, Rule, Scheme
from qat_kernels import QuantSpec
from tests.qat.export.artifacts import CHAT_TEMPLATE, make_artifact
from tests.qat.export.gguf_files import KINDS, convert, field, file_of, types_of

# transformers does not take biases of llama, nor any Gemma 1, from a GGUF file
READ_BY_TRANSFORMERS = [name for name in KINDS if name not in ("llama_bias", "gemma")]


def assert_exact(report):
    assert report.exact
    found = report.read_back
    assert found.exact
    assert found.matrices > 0
    assert found.codes_equal == found.scales_equal == found.values_equal == found.matrices
    assert found.tensors_equal == found.tensors > 0


@pytest.mark.parametrize("family", KINDS)
def test_every_family(family, tmp_path):
    artifact = make_artifact(tmp_path / "artifact", family, tokenizer=KINDS[family])
    report = convert(artifact, tmp_path / "out")
    assert_exact(report)
    path = file_of(tmp_path / "out")
    assert path.name == "tiny-base-Q4_0.gguf"
    types = types_of(path)
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["output_norm.weight"] == "F32"
    assert ("output.weight" in types) == (
        family not in ("llama_tied", "qwen3") and family[0] != "g"
    )
    assert ("blk.0.attn_q.bias" in types) == (family in ("llama_bias", "qwen2"))
    assert verify(tmp_path / "out") == []
    if family in READ_BY_TRANSFORMERS:
        assert_same_logits(artifact, path)


def assert_same_logits(artifact, path):
    expected = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    # longer than the sliding windows of 64
    ids = torch.randint(3, 400, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


SPECS = {
    "g32": (QuantSpec(), "Q4_0"),
    "g64": (QuantSpec(group_size=64), "Q4_0"),
    "g128": (QuantSpec(group_size=128), "Q4_0"),
    "channel": (QuantSpec(granularity="channel"), "Q4_0"),
    "tensor": (QuantSpec(granularity="tensor"), "Q4_0"),
    "2 bits": (QuantSpec(bits=2), "Q4_0"),
    "3 bits": (QuantSpec(bits=3, grid="mse", group_size=64), "Q4_0"),
    "5 bits": (QuantSpec(bits=5), "Q8_0"),
    "8 bits": (QuantSpec(bits=8, granularity="channel", grid="absmax"), "Q8_0"),
    "8 bits signed": (QuantSpec(bits=8), "Q8_0"),
    "asymmetric": (QuantSpec(symmetric=False, grid="absmax"), "Q8_0"),
    "asymmetric g128": (QuantSpec(symmetric=False, grid="absmax", group_size=128), None),
    "asymmetric tensor": (
        QuantSpec(bits=3, symmetric=False, granularity="tensor", grid="absmax"),
        "Q4_1",
    ),
    "asymmetric 3 bits": (
        QuantSpec(bits=3, symmetric=False, granularity="channel", grid="mse"),
        None,
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name, tmp_path):
    spec, kind = SPECS[name]
    artifact = make_artifact(tmp_path / "artifact", "llama_tied", Scheme(weight=spec))
    assert_exact(convert(artifact, tmp_path / "out.gguf"))
    types = types_of(tmp_path / "out.gguf")
    quantized = {kind for kind in types.values() if kind.startswith("Q")}
    assert kind is None or quantized == {kind}
    assert quantized <= {"Q4_0", "Q4_1", "Q8_0"}
    if spec.grid == "signed_absmax":
        with ExitStack() as stack:
            source = Source(artifact, stack)
            assert any(bool((m.scale < 0).any()) for m in source.all_matrices())


@functools.cache
def matrix(symmetric=True, bits=4, scale=0.5, zero=3):
    generator = torch.Generator().manual_seed(0)
    spec = QuantSpec(bits=bits, symmetric=symmetric, grid="absmax")
    codes = torch.randint(spec.q_min, spec.q_max + 1, (6, 64), generator=generator).to(torch.int8)
    scales = torch.full((6, 2), scale) * torch.tensor([1.0, -0.25])
    zeros = None if symmetric else torch.tensor([[zero, -2]], dtype=torch.int8).expand(6, 2)
    return Matrix("m", spec, codes, scales, zeros)


def test_q4_1_where_the_minimum_is_an_fp16_number():
    """3/8 has two bits, 11 · 3/8 six: exact; a scale of 11 bits times 11 needs 15."""
    found = matrix(symmetric=False, scale=0.375)
    assert choose(found).type == "Q4_1"
    back = unpack(pack(found, "Q4_1"), "Q4_1")
    assert torch.equal(back.codes, found.codes.to(torch.int16))
    assert torch.equal(back.scale, found.scale)
    assert torch.equal(back.zero_point, found.zero_point.to(torch.int16))
    assert torch.equal(back.values, found.weight())

    wide = matrix(symmetric=False, scale=2047 / 2048)
    assert choose(wide).type == "Q8_0"
    assert choose(wide).problem is None
    back = unpack(pack(wide, "Q8_0"), "Q8_0")
    assert torch.equal(back.codes, wide.levels)
    assert int(wide.levels.abs().max()) > 8  # which Q4_0 could not hold
    assert torch.equal(back.values, wide.weight())


def test_blocks_are_those_that_gguf_writes():
    """On a grid where gguf's own quantizer finds the same scales, the bytes are the same."""
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(4).reshape(1, 64)
    found = Matrix("m", QuantSpec(), codes, torch.tensor([[0.5, -2.0]]), None)
    theirs = gguf.quants.quantize(found.weight().numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(pack(found, "Q4_0"), theirs)


@pytest.mark.parametrize(
    ("changed", "kind", "problem"),
    [
        ({"scale": 1 / 3}, "Q4_0", "rounded to fp16"),
        ({"scale": 1e-6}, "Q4_0", "rounded to fp16"),
        ({"scale": 1e6}, "F32", "overflow fp16"),
        ({"bits": 8, "symmetric": False, "zero": 120, "scale": 0.5}, "F16", "exceed 8 bits"),
    ],
)
def test_what_blocks_cannot_hold(changed, kind, problem):
    found = choose(matrix(**changed))
    assert found.type == kind
    assert problem in found.problem


def test_fp32_scales_are_refused_or_rounded(tmp_path):
    scheme = Scheme(weight=QuantSpec(scale_dtype="float32", grid="absmax"))
    artifact = make_artifact(tmp_path / "artifact", "llama_tied", scheme)
    with pytest.raises(UserError, match="scales are not fp16 numbers") as caught:
        convert(artifact, tmp_path / "out")
    # compressed-tensors would round such scales to bfloat16
    assert "nearest format that can: format=merged dtype=float32; or" in str(caught.value)
    assert "allow_lossy=true" in str(caught.value)
    assert not (tmp_path / "out").exists()
    report = convert(artifact, tmp_path / "out", allow_lossy=True)
    found = report.read_back
    assert not report.exact
    assert (found.codes_equal, found.scales_equal) == (14, 0)
    # half a unit in the last of fp16's 11 bits
    assert 0 < found.relative_error <= 2**-11
    path = file_of(tmp_path / "out")
    lossy = field(path, "qat.lossy")
    assert len(lossy) == 14
    assert lossy[0].startswith("model.layers.0.mlp.down_proj: scales are not fp16 numbers")
    assert field(path, "qat.exact") is False
    assert "does not carry that artifact exactly" in (tmp_path / "out" / "README.md").read_text()


def test_groups_of_16_are_stored_as_weights(tmp_path):
    scheme = Scheme(weight=QuantSpec(group_size=16))
    artifact = make_artifact(tmp_path / "artifact", "llama_tied", scheme)
    with pytest.raises(UserError, match="scales cover 16 inputs, a block of GGUF covers 32"):
        convert(artifact, tmp_path / "out")
    report = convert(artifact, tmp_path / "out", allow_lossy=True)
    assert report.read_back.relative_error <= 2**-11
    assert file_of(tmp_path / "out").name.endswith("16.gguf")


def test_quantized_inputs_are_refused(tmp_path):
    spec = QuantSpec(bits=8, granularity="channel", grid="absmax")
    artifact = make_artifact(tmp_path / "artifact", "llama_tied", Scheme(spec, input=InputSpec()))
    with pytest.raises(UserError, match="cannot carry quantized inputs exactly"):
        convert(artifact, tmp_path / "out")
    report = convert(artifact, tmp_path / "out", allow_lossy=True)
    assert report.read_back.exact  # the weights are all there
    assert not report.exact
    assert field(file_of(tmp_path / "out"), "qat.lossy")[0].startswith(
        "quantized inputs: 14 layers"
    )


@pytest.mark.parametrize(
    ("keep_dtype", "kinds"),
    [("bfloat16", {"F16", "BF16"}), ("float16", {"F16"}), ("float32", {"F32"})],
)
def test_kept_tensors_in_the_smallest_exact_type(keep_dtype, kinds, tmp_path):
    rules = [Rule("*down_proj", action="keep"), Rule("lm_head")]
    artifact = make_artifact(
        tmp_path / "artifact", "llama", Scheme(rules=rules, keep_dtype=keep_dtype), "gpt2"
    )
    assert_exact(convert(artifact, tmp_path / "out"))
    types = types_of(file_of(tmp_path / "out"))
    assert types["output.weight"] == "Q4_0"
    assert {types["token_embd.weight"], types["blk.0.ffn_down.weight"]} <= kinds
    assert {types[name] for name in types if "norm" in name} == {"F32"}


def test_metadata(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", "gemma3", tokenizer="gemma")
    convert(artifact, tmp_path / "out")
    path = file_of(tmp_path / "out")
    expected = {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": "tiny-base",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "tiny-base",
        "general.base_model.0.organization": "example",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "general.author": None,
        "qat.exact": True,
        "qat.lossy": None,
        "gemma3.vocab_size": 512,
        "gemma3.context_length": 256,
        "gemma3.embedding_length": 128,
        "gemma3.block_count": 6,
        "gemma3.feed_forward_length": 256,
        "gemma3.attention.head_count": 2,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": 256,
        "gemma3.attention.value_length": 256,
        "gemma3.rope.freq_base": 1_000_000.0,
        "gemma3.rope.freq_base_swa": 10_000.0,
        "gemma3.attention.sliding_window": 64,
        "gemma3.attention.sliding_window_pattern": None,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: field(path, name) for name in expected} == expected
    assert math.isclose(field(path, "gemma3.attention.layer_norm_rms_epsilon"), 1e-6, rel_tol=1e-6)
    assert field(path, "general.quantized_by").startswith("qat-lightning ")
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert field(path, "qat.source_sha256") == report["source_sha256"]


def test_softcaps_and_other_patterns_of_layers(tmp_path):
    layers = ["full_attention", "sliding_attention"]
    artifact = make_artifact(tmp_path / "artifact", "gemma2", None, "gemma", layer_types=layers)
    convert(artifact, tmp_path / "out.gguf")
    assert field(tmp_path / "out.gguf", "gemma2.attn_logit_softcapping") == 50.0
    assert field(tmp_path / "out.gguf", "gemma2.final_logit_softcapping") == 30.0
    pattern = field(tmp_path / "out.gguf", "gemma2.attention.sliding_window_pattern")
    assert pattern == [False, True]


def test_rope_of_llama_3(tmp_path):
    """Factors are inv_freq of a plain model over inv_freq of this one, in transformers."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    artifact = make_artifact(tmp_path / "artifact", "llama", rope_parameters=rope)
    assert_exact(convert(artifact, tmp_path / "out.gguf"))
    model = AutoModelForCausalLM.from_pretrained(artifact)
    plain = 500_000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    with ExitStack() as stack:
        factors = rope_factors(Source(artifact, stack))
    # in fp32, units of 2^-24: the exponent is rounded by at most one, which the power makes
    # ln(500,000) = 13.2 of; the power, its reciprocal, and the sums and products of the smoothing
    # between the two ends add less than that again
    rtol = 32 * 2.0**-24
    torch.testing.assert_close(
        (plain / model.model.rotary_emb.inv_freq.double()).float(), factors, rtol=rtol, atol=0
    )
    assert len(set(factors.tolist())) > 2
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert np.array_equal(stored["rope_freqs.weight"], factors.numpy())
    assert field(tmp_path / "out.gguf", "llama.rope.scaling.type") is None


def test_rope_of_yarn(tmp_path):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    artifact = make_artifact(tmp_path / "artifact", "qwen2", None, "qwen2", rope_parameters=rope)
    convert(artifact, tmp_path / "out.gguf")
    keys = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 64,
    }
    assert {k: field(tmp_path / "out.gguf", f"qwen2.rope.scaling.{k}") for k in keys} == keys


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi", {}, r"model_type=phi is not written; this exporter knows llama, .*compressed"),
        ("mixtral", {}, "model_type=mixtral is not written"),
        ("llama", {"hidden_act": "gelu"}, "activation gelu exactly: llama.cpp's llama computes"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias exactly: llama.cpp's qwen3 has no bias"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "scales queries of this size by 256"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_models_that_llama_cpp_would_compute_wrongly(family, changes, message, tmp_path):
    artifact = make_artifact(tmp_path / "artifact", family, **changes)
    with pytest.raises(UserError, match=message):
        convert(artifact, tmp_path / "out", allow_lossy=True)
    assert not (tmp_path / "out").exists()


def test_sliding_window_of_mistral(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", "mistral", sliding_window=32)
    with pytest.raises(
        UserError, match=r"sliding window exactly: llama\.cpp's llama attends to all"
    ):
        convert(artifact, tmp_path / "out")
    assert convert(artifact, tmp_path / "out", allow_lossy=True).read_back.exact
    # a window that no text is longer than is none
    artifact = make_artifact(tmp_path / "wide", "mistral", sliding_window=256)
    assert_exact(convert(artifact, tmp_path / "out2"))


def test_permutation_is_that_of_the_rotary_embedding():
    """Rotating halves, then permuting, is permuting, then rotating neighbours."""
    heads, size = 2, 8
    rows = torch.arange(heads * size)
    order = permutation(heads * size, heads)
    halves = rows.reshape(heads, 2, size // 2)  # [head, half, frequency]
    neighbours = order.reshape(heads, size // 2, 2)  # [head, frequency, half]
    assert torch.equal(neighbours, halves.transpose(1, 2))


# --- damage --------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", "llama_tied")
    convert(artifact, tmp_path / "out")
    path = file_of(tmp_path / "out")
    content = path.read_bytes()
    handler = exporter.Gguf(ExportOptions(format="gguf", out=""))
    with ExitStack() as stack:
        source = Source(artifact, stack)
        for keep in (0, 3, 20, 400, 9_000, len(content) // 2, len(content) - 40):
            path.write_bytes(content[:keep])
            with pytest.raises(UserError, match="not a whole GGUF file"):
                list(handler.read(source, tmp_path / "out"))
    assert any("tiny-base-Q4_0.gguf" in str(problem) for problem in verify(tmp_path / "out"))


@pytest.mark.parametrize("what", ["scale", "code", "norm"])
def test_a_writer_that_errs_is_found_out(what, tmp_path, monkeypatch):
    """One bit of one block, or one norm, differs from the artifact: nothing is left behind."""
    artifact = make_artifact(tmp_path / "artifact", "llama_tied")

    def spoil(data):
        data = data.copy()
        data.view(np.uint8).reshape(-1)[{"scale": 1, "code": 2, "norm": 3}[what]] ^= 1
        return data

    if what == "norm":
        real = exporter.pack_values
        monkeypatch.setattr(
            exporter, "pack_values", lambda v, k: spoil(real(v, k)) if v.ndim == 1 else real(v, k)
        )
    else:
        real_pack = exporter.pack
        monkeypatch.setattr(exporter, "pack", lambda m, k: spoil(real_pack(m, k)))
    with pytest.raises(FidelityError, match=r"gguf 0\.\d+\.\d+ does not read what was trained"):
        convert(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()
