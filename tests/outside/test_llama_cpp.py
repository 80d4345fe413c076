"""llama.cpp on exported GGUF files: the same tokens, and logits as close as its int8 inputs allow.

Runs where ``llama_cpp`` can be imported, or with QAT_OUTSIDE naming the directory in which
``tests/outside/environments.py`` built the environment ``llama-cpp-python``.

llama.cpp multiplies a quantized weight with inputs that it rounds to blocks of 32 int8 values
(amax / 127, the scale rounded to fp16), and a BF16 or F16 matrix with inputs rounded to that type;
all else here is fp32. The same rounding put before each linear layer of the transformers model
says how far logits may be from the unrounded ones. Both models are then draws of the same rounding
noise: near-ties of the rounding fall either way, so their logits differ from each other, but their
distances from the unrounded model agree (measured: within 10 % in mean KL divergence).
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat.export import ExportOptions, export
from qat.scheme import Rule, Scheme
from qat_kernels import QuantSpec
from tests.outside import environments
from tests.qat.export.artifacts import TEXT, make_artifact, make_demo_artifact

READER = Path(__file__).parent / "readers" / "llama_cpp_reader.py"
ROOT = Path(__file__).parents[2]
INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A model that is exported and read."""

    family: str
    tokenizer: str
    scheme: Scheme = field(default_factory=Scheme)
    changes: tuple[tuple[str, object], ...] = ()


ASYMMETRIC = Scheme(weight=QuantSpec(symmetric=False, grid="absmax"))
CASES = {
    "llama": Case("llama", "llama3"),
    "llama int8": Case("llama", "gpt2", Scheme(weight=INT8)),
    "llama asymmetric": Case("llama", "gpt2", ASYMMETRIC),
    "llama 3 bits channel": Case("llama", "gpt2", Scheme(QuantSpec(3, granularity="channel"))),
    "llama head": Case("llama", "gpt2", Scheme(rules=[Rule("lm_head")], keep_dtype="float16")),
    "llama bias": Case("llama_bias", "gpt2"),
    "llama wide heads": Case("llama", "gpt2", changes=(("head_dim", 64),)),
    "llama 3 rope": Case("llama", "llama3", changes=(("rope_parameters", LLAMA3_ROPE),)),
    "llama yarn": Case("llama", "llama3", changes=(("rope_parameters", YARN),)),
    "mistral": Case("mistral", "llama2"),
    "qwen2": Case("qwen2", "qwen2"),
    "qwen3": Case("qwen3", "qwen2"),
    "qwen3 small heads": Case("qwen3", "qwen2", changes=(("head_dim", 32),)),
    "gemma": Case("gemma", "gemma"),
    "gemma2": Case("gemma2", "gemma"),
    "gemma2 other layers": Case(
        "gemma2", "gemma", changes=(("layer_types", ["full_attention", "sliding_attention"]),)
    ),
    "gemma3": Case("gemma3", "gemma"),
    "demo": Case("demo", ""),
}

TEXTS = [
    *TEXT,
    "a  b   c    d",
    " lead and trail ",
    "\n\n\nx\t\ty",
    "1234567 ½ ²",
    "IT'S it's",
    "aaa aaaaaa ... ---- ......",
    "<|user|>\nhi</s>\n<|assistant|>\n",
]
TALK = [{"role": "user", "content": "The lazy fox?"}]


def interpreter() -> Path:
    """A Python that has llama_cpp; skips the test where there is none."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return Path(sys.executable)
    root = os.environ.get("QAT_OUTSIDE")
    if root is None:
        pytest.skip("llama_cpp is not installed and QAT_OUTSIDE names no directory of environments")
    found = environments.state(Path(root), "llama-cpp-python")
    if not found["built"]:
        pytest.skip(f"llama-cpp-python: {found['reason']}")
    return environments.interpreter(Path(root), "llama-cpp-python")


def demo_ids(artifact: Path) -> list[int]:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return AutoTokenizer.from_pretrained(artifact)(text)["input_ids"][:240]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name of a case → its artifact and GGUF file, all read by llama.cpp in one process."""
    python = interpreter()
    root = tmp_path_factory.mktemp("gguf")
    jobs, made = [], {}
    for number, (name, case) in enumerate(CASES.items()):
        artifact, path = root / f"{number}", root / f"{number}.gguf"
        if case.family == "demo":
            make_demo_artifact(artifact)
            ids = demo_ids(artifact)
        else:
            make_artifact(artifact, case.family, case.scheme, case.tokenizer, **dict(case.changes))
            # past the sliding windows of 64
            ids = torch.randint(3, 400, (120,), generator=torch.Generator().manual_seed(0)).tolist()
        export(artifact, ExportOptions(format="gguf", out=str(path)))
        talk = TALK if case.tokenizer else []
        jobs.append({"model": str(path), "ids": ids, "texts": TEXTS, "talk": talk})
        made[name] = (artifact, path, ids)
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [str(python), str(READER), str(root / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_logits(name, exported):
    artifact, path, ids = exported[name]
    found = torch.from_numpy(np.load(f"{path}.npy"))
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    expected = logits(model, ids)
    round_inputs(model, head_bits(path))
    rounded = logits(model, ids)

    # another draw of the same noise: its KL divergence averages over more than 100 positions
    assert 0 < kl(expected, found) <= 2 * kl(expected, rounded)
    # argmax: equal wherever no logit can cross; one draw's largest error bounds another's within 2
    margin = expected.topk(2).values.diff().abs().squeeze(1)
    sure = margin > 2 * 2 * (expected - rounded).abs().max()
    assert sure.float().mean() > 0.2
    agree = expected.argmax(-1) == found.argmax(-1)
    assert bool(agree[sure].all())
    # as the rounded model agrees with the unrounded one, but for a few near-ties
    assert agree.float().mean() >= (expected.argmax(-1) == rounded.argmax(-1)).float().mean() - 0.05


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    """fp32 [T, V]."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def kl(expected: Tensor, found: Tensor) -> float:
    """Mean over positions of KL(expected || found), nats."""
    log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def head_bits(path: Path) -> str:
    """GGML type of the output head."""
    import gguf

    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    return types.get("output.weight", types["token_embd.weight"])


def round_inputs(model: nn.Module, head: str) -> None:
    """Round the inputs of linear layers as llama.cpp does."""
    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

    def to_type(_module, inputs):
        return (inputs[0].to(dtypes[head]).float(),)

    def to_int8(_module, inputs):
        return (q8(inputs[0]),)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kept = name == "lm_head" and head in dtypes
            module.register_forward_pre_hook(to_type if kept else to_int8)


def q8(x: Tensor) -> Tensor:
    """[..., K] rounded to ggml's block_q8_0."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0.0, blocks / scale).round()
    return (codes * scale.half().float()).reshape(x.shape)


@pytest.mark.parametrize("name", CASES)
def test_tokens(name, exported):
    artifact, path, _ = exported[name]
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    found = json.loads(Path(f"{path}.read.json").read_text(encoding="utf-8"))
    for text, ids in zip(TEXTS, found["tokens"], strict=True):
        assert ids == tokenizer(text)["input_ids"], text
    for text, back in zip(TEXTS[:-1], found["back"], strict=False):
        # SentencePiece's space in front is kept
        assert back in (text, f" {text}")


@pytest.mark.parametrize("name", [name for name in CASES if name != "demo"])
def test_chat_template(name, exported):
    artifact, path, _ = exported[name]
    found = json.loads(Path(f"{path}.read.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert found["prompt"] == expected
    # it may go on until a character is complete
    assert found["answer"] >= 1


def test_a_wrong_rotation_would_be_noticed(exported):
    """The bound can fail: positions that turn by a tenth less are another model."""
    artifact, path, ids = exported["llama"]
    found = torch.from_numpy(np.load(f"{path}.npy"))
    model = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32).eval()
    expected = logits(model, ids)
    model.model.rotary_emb.inv_freq.mul_(0.9)
    assert kl(logits(model, ids), found) > 10 * kl(expected, found)
