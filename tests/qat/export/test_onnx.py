"""The ONNX export: cells and their reader, and whole models in onnxruntime against transformers."""

import itertools
import json
import math
import re
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.artifact import verify
from qat.errors import UserError
from qat.export import ExportOptions, export
from qat.export.compare import read_back
from qat.export.onnx import Onnx
from qat.export.onnx_cells import Cells, block_size, cells_of, fill
from qat.export.source import Matrix, Source
from qat.scheme import InputSpec, Rule, Scheme
from qat_kernels import QuantSpec
from tests.qat.export.artifacts import CONFIGS, make_artifact
from tests.qat.test_adapter_files import trained

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")

from qat.export import onnx_graph  # noqa: E402  (needs the packages above)
from qat.export.onnx_read import read_model  # noqa: E402

WINDOW = 16
GEMMA3 = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


def options(out, **changes):
    return ExportOptions(format="onnx", out=str(out), **changes)


def spec(bits=4, symmetric=True, **changes):
    grid = "signed_absmax" if symmetric else "absmax"
    return QuantSpec(bits=bits, symmetric=symmetric, grid=grid, **changes)


def matrix_of(spec, n, k, seed=0):
    """A matrix with every code, and scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (spec.bits - 1)), 1 << (spec.bits - 1)
    groups = k // spec.group_size if spec.granularity == "group" else 1
    rows = 1 if spec.granularity == "tensor" else n
    codes = torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.randn(rows, groups, generator=generator).bfloat16().float()
    zero = torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.int8)
    return Matrix("layer", spec, codes, scale, None if spec.symmetric else zero)


def write_matrices(matrices, directory):
    """A model that multiplies x by each matrix, written as an export writes its own."""
    nodes, inputs, outputs, weights = [], {}, [], {}
    for index, matrix in enumerate(matrices):
        n, k = matrix.codes.shape
        cells = cells_of(matrix.spec, n, k)
        parts = zip(("codes", "scales", "zeros"), fill(matrix, cells), strict=True)
        parts = {part: tensor for part, tensor in parts if tensor is not None}
        expected = [cells.codes_shape, cells.scales_shape]
        expected += [cells.zeros_shape] if cells.asymmetric else []
        assert [tuple(tensor.shape) for tensor in parts.values()] == expected
        values = [onnx_ir.val(f"x{index}", onnx_ir.DataType.FLOAT, ["m", k])]
        for part, tensor in parts.items():
            name = f"m{index}.{part}"
            weights[name] = onnx_graph.Stored(tensor.dtype, tuple(tensor.shape), tensor.clone)
            kind = onnx_ir.tensor_adapters.from_torch_dtype(tensor.dtype)
            values.append(onnx_ir.val(name, kind, list(tensor.shape)))
        attributes = {"N": n, "K": k, "bits": cells.bits, "block_size": cells.block}
        attributes["accuracy_level"] = 1
        node = onnx_ir.node("MatMulNBits", values, attributes, domain="com.microsoft")
        node.outputs[0].name, node.outputs[0].dtype = f"y{index}", onnx_ir.DataType.FLOAT
        nodes.append(node)
        inputs |= {value.name: value for value in values}
        outputs += node.outputs
    opsets = {"": 18, "com.microsoft": 1}
    graph = onnx_ir.Graph(list(inputs.values()), outputs, nodes=nodes, opset_imports=opsets)
    return save_graph(graph, weights, directory)


def save_graph(graph, weights, directory):
    model = onnx_ir.Model(graph, ir_version=10)
    onnx_graph.store(model, weights)
    onnx_graph.save(model, directory / "model.onnx", {"converter": "qat-lightning 0"})
    return directory / "model.onnx"


SPECS = [
    *(spec(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(
        spec(bits, symmetric, group_size=group)
        for bits, symmetric, group in itertools.product((2, 4, 8), (True, False), (16, 64, 96, 192))
    ),
    *(
        spec(bits, symmetric, granularity=granularity)
        for bits, symmetric in itertools.product((2, 3, 4, 6, 8), (True, False))
        for granularity in ("channel", "tensor")
    ),
]


def test_every_cell_is_read_back_as_it_was_trained(tmp_path):
    # 192 = 3 blocks of 64, so rows of zero points end within a byte; 100 is cut off by the block
    matrices = [matrix_of(s, 7, 192, seed) for seed, s in enumerate(SPECS)]
    matrices += [matrix_of(s, 5, 100, seed) for seed, s in enumerate(SPECS)
                 if s.granularity != "group"]  # fmt: skip
    path = write_matrices(matrices, tmp_path)
    found = {item.name: item for item in read_model(path, set())}
    assert len(found) == len(matrices)
    for index, matrix in enumerate(matrices):
        item, expected = found[f"m{index}"], matrix.levels
        n, k = matrix.codes.shape
        if matrix.zero_point is None:
            assert item.zero_point is None
            levels = item.codes
        else:
            assert torch.equal(item.codes, matrix.codes.to(torch.int16))
            zero = item.zero_point.repeat_interleave(k // item.zero_point.shape[1], dim=1)
            levels = item.codes - zero
        assert torch.equal(levels, expected)
        scale = item.scale.repeat_interleave(k // item.scale.shape[1], dim=1)
        trained_scale = matrix.scale.repeat_interleave(k // matrix.scale.shape[1], dim=1)
        assert torch.equal(scale, trained_scale.expand(n, k))
        assert torch.equal(item.values, matrix.weight())


def test_onnxruntime_multiplies_by_the_trained_weight(tmp_path):
    """The operator as a whole, on rows that are not the identity: exact in small integers."""
    matrices = [matrix_of(s, 6, 192, seed) for seed, s in enumerate(SPECS)]
    # powers of two and small integers: every product and sum is exact in fp32
    for matrix in matrices:
        matrix.scale.copy_(
            torch.sign(matrix.scale) * 2.0 ** (torch.arange(matrix.scale.shape[1]) % 3)
        )
    session = onnxruntime.InferenceSession(str(write_matrices(matrices, tmp_path)))
    x = torch.randint(-8, 9, (3, 192), generator=torch.Generator().manual_seed(0)).float()
    found = session.run(None, {f"x{index}": x.numpy() for index in range(len(matrices))})
    for matrix, y in zip(matrices, found, strict=True):
        assert torch.equal(torch.from_numpy(y), x @ matrix.weight().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_tensors_are_stored_in_their_dtype_and_computed_in_fp32(tmp_path, dtype):
    weight = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = onnx_ir.val("ids", onnx_ir.DataType.INT64, ["t"])
    value = onnx_ir.val("w", onnx_ir.DataType.FLOAT, [16, 8])
    rows = onnx_ir.node("Gather", [value, ids])
    whole = onnx_ir.node("Transpose", [value], {"perm": [1, 0]})
    for node, shape in ((rows, ["t", 8]), (whole, [8, 16])):
        node.outputs[0].dtype = onnx_ir.DataType.FLOAT
        node.outputs[0].shape = onnx_ir.Shape(shape)
    product = onnx_ir.node("MatMul", [rows.outputs[0], whole.outputs[0]])
    product.outputs[0].name, product.outputs[0].dtype = "y", onnx_ir.DataType.FLOAT
    kept = onnx_ir.node("Identity", [rows.outputs[0]])
    kept.outputs[0].name, kept.outputs[0].dtype = "rows", onnx_ir.DataType.FLOAT
    nodes = [rows, whole, product, kept]
    outputs = [product.outputs[0], kept.outputs[0]]
    graph = onnx_ir.Graph([ids, value], outputs, nodes=nodes, opset_imports={"": 18})
    path = save_graph(graph, {"w": onnx_graph.Stored(dtype, (16, 8), weight.clone)}, tmp_path)
    (stored,) = onnx.load(str(path), load_external_data=False).graph.initializer
    kinds = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16", torch.float32: "FLOAT"}
    assert onnx.TensorProto.DataType.Name(stored.data_type) == kinds[dtype]
    (item,) = read_model(path, {"w"})
    assert torch.equal(item.values, weight.float())
    session = onnxruntime.InferenceSession(str(path))
    y, found = session.run(None, {"ids": np.array([3, 15, 3])})
    assert torch.equal(torch.from_numpy(found), weight.float()[[3, 15, 3]])
    # sums of 8 products
    expected = weight.double()[[3, 15, 3]] @ weight.double().T
    bound = 8 * 2**-24 * (weight.double()[[3, 15, 3]].abs() @ weight.double().abs().T)
    assert bool(((torch.from_numpy(y) - expected).abs() <= bound).all())


def test_blocks_are_the_largest_that_share_a_scale():
    sizes = {g: block_size(spec(group_size=g), 768) for g in (8, 16, 24, 48, 96, 128, 384, 512)}
    assert sizes == {8: None, 16: 16, 24: None, 48: 16, 96: 32, 128: 128, 384: 128, 512: 256}
    channel = {k: block_size(spec(granularity="channel"), k) for k in (100, 96, 4096)}
    assert channel == {100: 16, 96: 32, 4096: 256}
    assert cells_of(spec(3, False, group_size=48), 6, 96) == Cells(6, 96, 4, 16, True)


class Runner:
    """A written model, run as its users run it."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.past = {i.name: i.shape for i in inputs if i.name.startswith("past_key_values")}

    def __call__(self, ids, mask=None, positions=None, cache=None):
        """Logits and the new cache; numpy, int64 [B, S] and mask [B, P + S]."""
        if cache is None:
            shapes = {n: (len(ids), s[1], 0, s[3]) for n, s in self.past.items()}
            cache = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        past = next(iter(cache.values())).shape[2]
        total = past + ids.shape[1]
        if mask is None:
            mask = np.ones((len(ids), total), np.int64)
        if positions is None:
            positions = np.broadcast_to(np.arange(past, total), ids.shape).copy()
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        logits, *present = self.session.run(None, inputs | cache)
        return logits, dict(zip(self.past, present, strict=True))

    def greedy(self, ids, tokens):
        """``ids`` [1, S] and the tokens that follow, each computed with the cache."""
        step, cache = ids, None
        for _ in range(tokens):
            logits, cache = self(step, cache=cache)
            step = logits[:, -1:].argmax(-1)
            ids = np.concatenate([ids, step], 1)
        return ids


@dataclass
class Case:
    """An artifact, its export, and the model that it has to agree with."""

    artifact: object
    out: object
    report: object
    reference: object
    run: Runner

    def ids(self, rows, tokens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        vocab = self.reference.config.vocab_size
        return torch.randint(3, vocab, (rows, tokens), generator=generator)

    def expected(self, ids):
        with torch.no_grad():
            return self.reference(ids).logits.numpy()

    def bound(self, logits):
        """Largest difference that the order of summation explains.

        Each sum of K products has, whatever its order, a relative error of at most 4 sqrt(K) u with
        u = 2^-24 (Higham and Mary 2019, with lambda = 4; norm-wise). A token passes through six
        products a layer (q k v, scores, values, o, gate and up, down) and the head; both sides err.
        """
        config = self.reference.config
        products = 6 * config.num_hidden_layers + 1
        terms = max(config.hidden_size, config.intermediate_size)
        return 2 * products * 4 * math.sqrt(terms) * 2**-24 * float(np.abs(logits).max())


def make_case(directory, family, **changes):
    artifact, out = directory / "artifact", directory / "onnx"
    make_artifact(artifact, family, **changes)
    report = export(artifact, options(out))
    reference = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    return Case(artifact, out, report, reference, Runner(out / "model.onnx"))


MIXED = Scheme(
    weight=spec(),
    rules=[
        Rule("*.k_proj", weight=spec(3, group_size=64)),
        Rule("*.v_proj", weight=spec(8, granularity="channel")),
        Rule("*.o_proj", weight=spec(4, group_size=128)),
        Rule("*.gate_proj", weight=spec(2)),
        Rule("*.up_proj", weight=spec(5, granularity="tensor")),
        Rule("*.down_proj", weight=spec(6, group_size=64)),
    ],
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One layer with biases and grouped queries, every matrix of another kind."""
    directory = tmp_path_factory.mktemp("mixed")
    changes = {"num_hidden_layers": 1, "tie_word_embeddings": True}
    return make_case(directory, "llama_bias", scheme=MIXED, **changes)


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A layer with a window of 16 tokens and one that sees everything, with zero points."""
    directory = tmp_path_factory.mktemp("sliding")
    scheme = Scheme(weight=spec(4, False))
    return make_case(directory, "gemma3", scheme=scheme, sliding_window=WINDOW, **GEMMA3)


@pytest.fixture(params=["mixed", "sliding"])
def case(request):
    return request.getfixturevalue(request.param)


def check_logits(case):
    """Prefill, decoding and chunks far beyond the window."""
    ids = case.ids(2, 40)
    expected = case.expected(ids)
    bound = case.bound(expected)
    found, _ = case.run(ids.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    # token by token, for one sequence
    cache, steps = None, []
    for step in ids[:1].split(1, dim=1):
        logits, cache = case.run(step.numpy(), cache=cache)
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, 1), expected[:1], rtol=0, atol=bound)
    # in two parts, for both
    head, cache = case.run(ids[:, :25].numpy())
    tail, cache = case.run(ids[:, 25:].numpy(), cache=cache)
    np.testing.assert_allclose(np.concatenate([head, tail], 1), expected, rtol=0, atol=bound)
    assert next(iter(cache.values())).shape[2] == 40


def test_logits_are_those_of_transformers(case):
    check_logits(case)


def test_padded_prompts_in_one_batch_answer_as_they_do_alone(case):
    """Left padding with positions from the mask, then one more token on the cache."""
    prompts = [case.ids(1, tokens, seed=tokens) for tokens in (29, 11, 20)]
    longest = 29
    ids = np.zeros((3, longest + 1), np.int64)
    mask = np.zeros((3, longest + 1), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] : longest] = prompt.numpy()
        mask[row, longest - prompt.shape[1] :] = 1
    ids[:, longest] = [7, 8, 9]
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    head, cache = case.run(ids[:, :longest], mask[:, :longest], positions[:, :longest])
    tail, _ = case.run(ids[:, longest:], mask, positions[:, longest:], cache)
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, torch.from_numpy(ids[row : row + 1, longest:])], 1)
        expected = case.expected(whole)[0]
        found = np.concatenate([head[row, longest - prompt.shape[1] :], tail[row]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=case.bound(expected))


def test_greedy_tokens_are_those_of_generate(case):
    prompt = case.ids(1, 9)
    expected = case.reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, min_new_tokens=16,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert case.run.greedy(prompt.numpy(), 16).tolist() == expected.tolist()


def test_report_says_what_was_read_back(mixed):
    found = mixed.report.read_back
    assert mixed.report.exact, found.summary()
    assert (found.matrices, found.codes_equal, found.scales_equal, found.values_equal) == (7,) * 4
    # embedding (which is the head too), three norms, four biases
    assert (found.tensors, found.tensors_equal) == (8, 8)
    assert f"onnxruntime {onnxruntime.__version__}" in found.reader


def test_directory_is_whole(mixed):
    names = {path.name for path in mixed.out.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx.data", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("README.md", "export.json", "manifest.json"),
    }
    assert verify(mixed.out) == []
    assert "quantization_config" not in json.loads((mixed.out / "config.json").read_text())
    card = (mixed.out / "README.md").read_text()
    assert "library_name: onnx" in card
    text = "Once upon a time"
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (mixed.artifact, mixed.out)]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]


def test_graph_has_the_names_that_tools_expect_and_no_others(mixed):
    onnx.checker.check_model(str(mixed.out / "model.onnx"))
    model = onnx.load(str(mixed.out / "model.onnx"), load_external_data=False)
    past, total = "past_sequence_length", "past_sequence_length + sequence_length"

    def shapes(values):
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    assert shapes(model.graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", total],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": ["batch_size", 2, past, 32],
        "past_key_values.0.value": ["batch_size", 2, past, 32],
    }
    assert shapes(model.graph.output) == {
        "logits": ["batch_size", "sequence_length", 512],
        "present.0.key": ["batch_size", 2, total, 32],
        "present.0.value": ["batch_size", 2, total, 32],
    }
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert facts.keys() == {"converter", "source_sha256"}
    assert facts["source_sha256"] == mixed.report.source_sha256
    content = (mixed.out / "model.onnx").read_bytes()
    # neither weights nor paths of the machine that wrote it
    assert len(content) < 64 * 1024
    assert b"site-packages" not in content
    assert str(mixed.out.parent).encode() not in content


def test_snippet_of_the_card_runs(mixed, monkeypatch, capsys):
    card = (mixed.out / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    monkeypatch.chdir(mixed.out)
    exec(compile(snippet, "README.md", "exec"), {})
    found = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(mixed.out)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = mixed.reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    assert found == tokenizer.decode(expected[0]) + "\n"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.0.mlp.gate_proj.codes", "codes, weights"),
        ("model.layers.0.mlp.gate_proj.zeros", "codes, weights"),
        ("model.layers.0.mlp.gate_proj.scales", "scales, weights"),
        ("model.embed_tokens.weight", "values"),
    ],
)
def test_reader_sees_a_changed_byte(sliding, tmp_path, name, what):
    copy = shutil.copytree(sliding.out, tmp_path / "copy")
    model = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with (copy / "model.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]) + 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    handler = Onnx(options("unused"))
    with ExitStack() as stack:
        source = Source(sliding.artifact, stack)
        expected = [*source.matrices, *source.kept]
        found = read_back(source, handler.read(source, copy), handler.reader, expected)
    (difference,) = found.differences
    stem, _, part = name.rpartition(".")
    assert difference.startswith(f"{name if part == 'weight' else stem}: {what}")


def refusal(artifact, tmp_path, **changes):
    with pytest.raises(UserError) as caught:
        export(artifact, options(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_what_no_graph_carries_is_refused_with_the_nearest_format(tmp_path):
    opt = make_artifact(tmp_path / "opt", "opt", Scheme(weight=spec(group_size=16)))
    message = refusal(opt, tmp_path, allow_lossy=True)
    assert "model_type=opt" in message
    assert "format=compressed-tensors" in message
    narrow = make_artifact(tmp_path / "narrow", scheme=Scheme(weight=spec(group_size=8)))
    message = refusal(narrow, tmp_path, allow_lossy=True)
    assert "power of two from 16 to 256" in message
    assert "format=compressed-tensors" in message
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    growing = make_artifact(tmp_path / "growing", rope_parameters=rope)
    assert "rope_type=dynamic" in refusal(growing, tmp_path)


def test_missing_package_is_named(tmp_path, monkeypatch):
    artifact = make_artifact(tmp_path / "artifact", num_hidden_layers=1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = refusal(artifact, tmp_path)
    assert "pip install 'qat-lightning[export]'" in message


def test_quantized_inputs_are_refused_unless_the_user_allows_it(tmp_path):
    scheme = Scheme(weight=spec(8, granularity="channel"), input=InputSpec())
    artifact = make_artifact(tmp_path / "artifact", scheme=scheme)
    message = refusal(artifact, tmp_path)
    assert "quantized inputs" in message
    assert "format=compressed-tensors" in message
    assert "allow_lossy=true" in message


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_nf4_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    trained(tmp_path / "model", "llama").write(["nf4"], tmp_path)
    assert "format=bitsandbytes" in refusal(tmp_path / "nf4", tmp_path, allow_lossy=True)


def test_incomplete_artifact_is_said_to_be(tmp_path):
    artifact = make_artifact(tmp_path / "artifact", num_hidden_layers=1)
    (tmp_path / "out").mkdir()
    notes = {"converter": "qat-lightning 0", "source_sha256": "", "lossy": []}
    with ExitStack() as stack:
        source = Source(artifact, stack)
        source.kept.remove("model.norm.weight")
        with pytest.raises(UserError, match=r"model\.norm\.weight: missing"):
            Onnx(options("unused")).write(source, tmp_path / "out", notes)


@pytest.mark.slow
def test_quantized_inputs_are_written_when_the_user_allows_it(tmp_path):
    scheme = Scheme(weight=spec(8, granularity="channel"), input=InputSpec())
    artifact = make_artifact(tmp_path / "artifact", scheme=scheme, num_hidden_layers=1)
    report = export(artifact, options(tmp_path / "out", allow_lossy=True))
    assert not report.exact
    # the weights are the trained ones all the same
    assert report.read_back.exact
    assert "quantized inputs" in (tmp_path / "out" / "README.md").read_text()
    model = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    facts = {prop.key: prop.value for prop in model.metadata_props}
    assert len(json.loads(facts["lossy"])) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheme", "changes"),
    [
        ("llama", Scheme(weight=spec(group_size=128)), {}),
        ("llama_tied", Scheme(weight=spec(granularity="channel"), keep_dtype="float32"), {}),
        ("mistral", Scheme(weight=spec(group_size=64)), {"sliding_window": WINDOW}),
        ("qwen2", Scheme(weight=spec(8)), {}),
        ("qwen3", Scheme(weight=spec(), keep_dtype="float16"), {}),
        ("gemma", Scheme(weight=spec(3)), {}),
        ("gemma2", Scheme(weight=spec(2)), {"sliding_window": WINDOW}),
        ("phi", Scheme(weight=spec()), {}),
        ("phi3", Scheme(weight=spec()), {}),
        ("gpt_neox", Scheme(weight=spec()), {}),
        ("stablelm", Scheme(weight=spec()), {}),
        (
            "llama",
            Scheme(weight=spec(), rules=[Rule("lm_head"), Rule("*.0.*", "keep")]),
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                 "original_max_position_embeddings": 64}},
        ),
    ],
    ids=["llama", "tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3",
         "gpt_neox", "stablelm", "head"],
)  # fmt: skip
def test_families(tmp_path, family, scheme, changes):
    layers = {"num_hidden_layers": 2} if family in CONFIGS else {}
    case = make_case(tmp_path, family, scheme=scheme, **layers, **changes)
    assert case.report.exact, case.report.read_back.summary()
    check_logits(case)
