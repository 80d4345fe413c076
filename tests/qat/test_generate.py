"""Generation: from an artifact on packed weights, and the sample of a model in memory."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from qat.errors import UserError
from qat.generate import GenerateOptions, generate, sample
from tests.qat.test_runtime import llama, plain, write_artifact

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Single bytes: 94 printable ASCII characters, ``<s>`` and ``</s>``."""
    vocabulary = {chr(33 + i): i for i in range(94)} | {"<s>": 94, "</s>": 95}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = CHAT
    return made


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "a", llama())
    tokenizer().save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_greedy_text_is_that_of_plain_transformers(artifact: Path) -> None:
    text = generate(artifact, "hello", GenerateOptions(max_new_tokens=12, dtype="float32"))
    assert text == sample(plain(artifact), tokenizer(), "hello", 12)
    assert text


def test_streaming_prints_the_text_and_the_speed(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(artifact, "hello", GenerateOptions(max_new_tokens=5), stream=True)
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert "tokens/s" in err
    generate(artifact, "hello", GenerateOptions(max_new_tokens=5))
    assert capsys.readouterr().out == ""


def test_sampling_repeats_with_its_seed_and_leaves_the_random_state(artifact: Path) -> None:
    hot = {"temperature": 2.0, "top_p": 0.95, "max_new_tokens": 16}
    state = torch.random.get_rng_state()
    texts = [generate(artifact, "x", GenerateOptions(seed=s, **hot)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_chat_template_is_used_where_there_is_one(artifact: Path) -> None:
    options = {"max_new_tokens": 8, "dtype": "float32"}
    bare = generate(artifact, "hi", GenerateOptions(**options))
    tokenizer(chat=True).save_pretrained(artifact)
    wrapped = generate(artifact, "hi", GenerateOptions(**options))
    assert wrapped == sample(plain(artifact), tokenizer(), "<user>hi", 8)
    assert generate(artifact, "hi", GenerateOptions(chat=False, **options)) == bare


def test_an_empty_prompt_starts_at_the_beginning_of_text(artifact: Path) -> None:
    assert generate(artifact, "", GenerateOptions(max_new_tokens=4)) is not None
    bare = tokenizer()
    bare.bos_token = None
    with pytest.raises(UserError, match="prompt is empty"):
        sample(plain(artifact), bare, "", 4)


def test_sample_keeps_the_training_mode(artifact: Path) -> None:
    model = plain(artifact).train()
    sample(model, tokenizer(), "hello", 2)
    assert model.training


def test_wrong_input(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="context of 64"):
        generate(artifact, "a" * 60, GenerateOptions(max_new_tokens=5))
    with pytest.raises(UserError, match="device=cuda:99"):
        generate(artifact, "a", GenerateOptions(device="cuda:99"))
    with pytest.raises(UserError, match="device=nonsense"):
        generate(artifact, "a", GenerateOptions(device="nonsense"))
    with pytest.raises(UserError, match="no such directory"):
        generate(tmp_path / "none", "a")
    for file in artifact.glob("token*"):
        file.unlink()
    with pytest.raises(UserError, match=r"artifact=.*tokenizer"):
        generate(artifact, "a")


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0)]
)
def test_options_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        GenerateOptions(**{field: value})


def test_a_quantized_cache_is_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"compile=true.*kv_cache=none"):
        GenerateOptions(compile=True, kv_cache="int8")


def test_a_model_that_is_not_covered_is_decoded_without_compiling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, sliding_window=8,
        max_position_embeddings=64, **sizes,
    )  # fmt: skip
    write_artifact(tmp_path / "a", config)
    tokenizer().save_pretrained(tmp_path / "a")
    plainly = generate(tmp_path / "a", "hello", GenerateOptions(max_new_tokens=8))
    options = GenerateOptions(max_new_tokens=8, compile=True)
    assert generate(tmp_path / "a", "hello", options) == plainly
    assert "mistral is not covered" in caplog.text
