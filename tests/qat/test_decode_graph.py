"""Decoding on a static cache, compiled or captured, against transformers' own loop."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedModel

from qat.decode_graph import StaticDecoding, covers
from qat.generate import GenerateOptions, generate
from qat.runtime import load_packed
from qat_kernels.numerics import QuantSpec
from tests.qat.test_generate import tokenizer
from tests.qat.test_runtime import int8_input, llama, write_artifact

IDS = torch.tensor([[0, 0, 5, 7, 9], [1, 2, 3, 4, 5]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def answer(model: PreTrainedModel, decoding: StaticDecoding | None = None, **options: object):
    torch.manual_seed(4)
    device = model.device
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    inputs = {"input_ids": IDS.to(device), "attention_mask": MASK.to(device)}
    return model.generate(**inputs, **words, custom_generate=decoding).cpu()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "a", llama(max_position_embeddings=512))
    tokenizer().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_answers_are_those_of_the_dynamic_cache(artifact: Path) -> None:
    # bf16 on the CPU cuts attention to what a row may see: logits are equal, not only near
    model = load_packed(artifact)
    decoding = StaticDecoding(model)
    assert torch.equal(answer(model, decoding), answer(model))
    warm = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    assert torch.equal(answer(model, decoding, **warm), answer(model, **warm))
    assert len(decoding._steps) == 1
    # an end token: what follows is padding, and the longer answer goes on
    end = int(answer(model)[0, 7])
    ended = answer(model, decoding, eos_token_id=end)
    assert torch.equal(ended, answer(model, eos_token_id=end))
    # more tokens than the cache has room for
    assert torch.equal(
        answer(model, decoding, max_new_tokens=300), answer(model, max_new_tokens=300)
    )


def test_logits_are_those_of_the_dynamic_cache(artifact: Path) -> None:
    model = load_packed(artifact)
    step = StaticDecoding(model).step_of(model, 2, 20)
    with torch.no_grad():
        step.prefill(IDS, MASK)
        tokens = torch.tensor([[8, 9], [3, 3], [2, 1]])
        found = [step(pair, False).clone() for pair in tokens]
        ids, mask = torch.cat([IDS, tokens.T], 1), torch.nn.functional.pad(MASK, (0, 3), value=1)
        for i in range(3):
            length = 6 + i
            positions = (mask[:, :length].cumsum(-1) - 1).clamp(min=0)
            whole = model(ids[:, :length], attention_mask=mask[:, :length], position_ids=positions)
            torch.testing.assert_close(found[i], whole.logits[:, -1], atol=0, rtol=0)


def test_what_is_covered(artifact: Path) -> None:
    assert covers(load_packed(artifact))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    config = Gemma2Config(**sizes, num_hidden_layers=2, num_attention_heads=2)
    # sliding windows are counted in Python
    assert not covers(AutoModelForCausalLM.from_config(config))


def test_a_failed_capture_goes_on_eagerly(
    artifact: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_packed(artifact)
    expected = answer(model)
    decoding = StaticDecoding(model)
    assert not decoding.graphs
    # as on a GPU; this machine cannot capture
    decoding.graphs = True
    assert torch.equal(answer(model, decoding), expected)
    assert "decoding eagerly" in caplog.text


@pytest.mark.slow
def test_a_compiled_step(artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = generate(artifact, "hello", GenerateOptions(max_new_tokens=12, dtype="float32"))
    options = GenerateOptions(max_new_tokens=12, dtype="float32", compile=True)
    assert generate(artifact, "hello", options) == text
    assert "cannot be compiled" not in caplog.text
    # oneDNN's weights are opaque: compiled or not, the answer comes
    int8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
    write_artifact(tmp_path / "b", llama(), int8, int8_input(True))
    model = load_packed(tmp_path / "b")
    assert answer(model, StaticDecoding(model, compiled=True)).shape == (2, 17)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_the_gpu(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_packed(artifact, torch.bfloat16, "cuda")
    eager = StaticDecoding(model, graphs=False)
    graphs = StaticDecoding(model)
    for _ in range(2):
        assert torch.equal(answer(model, graphs), answer(model, eager))
    assert not caplog.text
    assert graphs._steps[2].graph is not None
