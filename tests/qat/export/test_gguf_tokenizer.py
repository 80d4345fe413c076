"""The tokenizer in a GGUF file, and what is refused because llama.cpp cuts texts otherwise."""

import json
from contextlib import ExitStack

import pytest
from transformers import AutoTokenizer

from qat.errors import UserError
from qat.export.gguf_tokenizer import PRE_TOKENIZERS, read_vocabulary
from qat.export.source import Source
from tests.qat.export.artifacts import TEXT, make_artifact, make_tokenizer
from tests.qat.export.gguf_files import KINDS, convert, field, file_of

ODD = ["a  b   c    d", " lead", "tail ", "\n\n\nx\t\ty", "1234567 ½ ²", "IT'S it's", "zzz  \n q"]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "gemma2"])
def test_transformers_reads_the_tokenizer(family, tmp_path):
    artifact = make_artifact(tmp_path / "artifact", family, tokenizer=KINDS[family])
    convert(artifact, tmp_path / "out")
    path = file_of(tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(artifact)
    found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXT, *ODD, "<|user|>\nhi</s>"]:
        if family == "mistral" and text.startswith((" ", "<")):
            continue  # transformers' reader takes Metaspace for what was a normalizer
        ids = expected(text, add_special_tokens=False)["input_ids"]
        assert found(text, add_special_tokens=False)["input_ids"] == ids, text
    talk = [{"role": "user", "content": "hi"}]
    assert found.apply_chat_template(talk, tokenize=False) == expected.apply_chat_template(
        talk, tokenize=False
    )


@pytest.mark.parametrize(
    ("kind", "name", "add_bos"),
    [("gpt2", "gpt-2", True), ("llama3", "llama-bpe", True), ("qwen2", "qwen2", False)],
)
def test_pre_tokenizers_are_named(kind, name, add_bos, tmp_path):
    artifact = make_artifact(tmp_path / "artifact", "llama_tied", tokenizer=kind)
    convert(artifact, tmp_path / "out.gguf")
    path = tmp_path / "out.gguf"
    assert field(path, "tokenizer.ggml.model") == "gpt2"
    assert field(path, "tokenizer.ggml.pre") == name
    assert field(path, "tokenizer.ggml.add_bos_token") is add_bos
    assert field(path, "tokenizer.ggml.add_eos_token") is False
    special = [field(path, f"tokenizer.ggml.{n}_token_id") for n in ("padding", "bos", "eos")]
    assert special == [0, 1, 2]
    tokenizer = make_tokenizer(kind)
    tokens, types = field(path, "tokenizer.ggml.tokens"), field(path, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == 512
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ids = tokenizer.convert_tokens_to_ids(["<s>", "a", "<|user|>", "<|assistant|>"])
    assert [types[i] for i in ids] == [3, 1, 4, 3]
    assert (tokens[-1], types[-1]) == ("[PAD511]", 5)


def changed_tokenizer(tmp_path, change, kind="gpt2"):
    """An artifact whose tokenizer.json was changed, opened."""
    directory = make_artifact(tmp_path / "artifact", "llama_tied", tokenizer=kind)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return directory


def other_expression(content):
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\w+|\W+"}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False},
        ],
    }  # fmt: skip


def drop_a_merge(content):
    merges = content["model"]["merges"]
    made = [m[0] + m[1] for m in merges]
    del merges[next(i for i, text in enumerate(made) if made.count(text) > 1)]


def swap_merges(content):
    content["model"]["merges"].reverse()
    content["model"]["merges"].insert(0, content["model"]["merges"].pop())


PROBLEMS = {
    "expression": (other_expression, "gpt2", "none of the known ones is"),
    "ignore_merges": (
        lambda c: c["model"].update(ignore_merges=True), "gpt2", "with ignore_merges; stored as"
    ),
    "prefix space": (
        lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "gpt2", "none of the known"
    ),
    "normalizer": (
        lambda c: c.update(normalizer={"type": "Lowercase"}), "gpt2", "not normalize text by Lower"
    ),
    "stripping": (
        lambda c: c["added_tokens"][0].update(lstrip=True), "gpt2", "'<pad>' takes spaces around"
    ),
    "merges": (drop_a_merge, "llama2", "merges any neighbours that make a token"),
    "bytes": (
        lambda c: c["model"]["vocab"].pop("<0x41>"), "llama2", "lacks byte tokens"
    ),
    "metaspace": (
        lambda c: c.update(
            normalizer=None,
            pre_tokenizer={
                "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False
            },
        ),
        "llama2",
        "before the first word only",
    ),
    "normalized": (
        lambda c: c["added_tokens"][-1].update(normalized=True),
        "llama2",
        "'<|assistant|>' is looked for in normalized text",
    ),
    "split": (
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "llama2", "none that llama.cpp's"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_tokenizers_that_llama_cpp_would_cut_otherwise(name, tmp_path):
    change, kind, message = PROBLEMS[name]
    directory = changed_tokenizer(tmp_path, lambda content: None, kind)
    with ExitStack() as stack:
        assert read_vocabulary(Source(directory, stack)).losses() == []
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with ExitStack() as stack:
        (loss,) = read_vocabulary(Source(directory, stack)).losses()
    assert message in loss.reason
    assert loss.writable


def test_unigram_is_refused(tmp_path):
    def unigram(content):
        vocab = [[token, -1.0] for token in content["model"]["vocab"]]
        content["model"] = {"type": "Unigram", "vocab": vocab, "unk_id": 0, "byte_fallback": True}

    with ExitStack() as stack, pytest.raises(UserError, match="tokenizers of type Unigram"):
        read_vocabulary(Source(changed_tokenizer(tmp_path, unigram), stack))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    def grow(content):
        content["added_tokens"].append(content["added_tokens"][0] | {"id": 512, "content": "<x>"})

    with (
        ExitStack() as stack,
        pytest.raises(UserError, match="a token 512, the embedding 512 rows"),
    ):
        read_vocabulary(Source(changed_tokenizer(tmp_path, grow), stack))


def test_names_of_pre_tokenizers_are_known_to_transformers_too():
    """transformers has the expressions by name as well; smollm's digits are no expression there."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    checked = 0
    for (expression, _), name in PRE_TOKENIZERS.items():
        if name in GGUF_PRE_TOKENIZER_SPLITS:
            assert GGUF_PRE_TOKENIZER_SPLITS[name] == expression, name
            checked += 1
    assert checked == 6
