"""The demo corpus repeats exactly, its splits share no text, and the tokenizer loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data import corpus
from data.tokenizer import END_OF_TEXT, train_tokenizer

ROOT = Path(__file__).parents[2]


def paragraphs(split):
    return {
        " ".join(paragraph.split())
        for text in corpus.documents(split)
        for paragraph in text.split("\n\n")
    }


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus.documents("calibration"), vocab_size=512)


def test_the_corpus_has_a_useful_size_and_three_proportionate_splits():
    sizes = corpus.sizes()
    total = sum(size.bytes for size in sizes.values())
    # Measured 2.1 to 2.3 MB over Python 3.11 … 3.13, with and without distributions' omissions.
    assert total > 1_500_000
    assert sizes["train"].bytes / total == pytest.approx(0.86, abs=0.04)
    assert sizes["validation"].bytes / total == pytest.approx(0.08, abs=0.03)
    assert sizes["calibration"].bytes / total == pytest.approx(0.06, abs=0.03)


def test_no_paragraph_occurs_in_two_splits():
    train, validation, calibration = (paragraphs(split) for split in corpus.SPLITS)
    assert train.isdisjoint(validation)
    assert train.isdisjoint(calibration)
    assert validation.isdisjoint(calibration)


def test_an_accelerator_shares_the_split_of_its_python_twin():
    for twins in (("decimal", "_decimal", "_pydecimal"), ("io", "_io", "_pyio")):
        assert len({corpus.split_of(f"module:{name}") for name in twins}) == 1
    assert corpus.split_of("module:email._policybase") == corpus.split_of("module:email.policybase")


def test_documents_are_prose_in_utf8_without_empty_ones():
    for split in corpus.SPLITS:
        for text in corpus.documents(split):
            assert text.strip()
            assert text.encode().decode() == text


def test_an_unknown_split_names_the_allowed_ones():
    with pytest.raises(ValueError, match="'test' is not one of train, validation, calibration"):
        corpus.documents("test")


def test_the_fingerprint_depends_on_no_hash_seed_and_no_imported_module():
    # The second process has other modules loaded and a Python object where a builtin was.
    codes = (
        "from data import corpus; print(corpus.fingerprint())",
        "import asyncio, builtins, decimal, idlelib.config, sqlite3\n"
        "builtins.extra = lambda: None\n"
        "from data import corpus; print(corpus.fingerprint())",
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for code, seed in zip(codes, ("1", "2"))
    }
    assert found == {corpus.fingerprint()}


def test_parsing_collects_nested_and_conditional_definitions_in_source_order():
    source = b'''"""Module."""
if True:
    class A:
        """Class."""
        async def f(self):
            """Method."""
            def inner():
                """Inner."""
try:
    pass
except ImportError:
    def g():
        """Fallback."""
'''
    assert corpus._docstrings(source) == ["Module.", "Class.", "Method.", "Inner.", "Fallback."]


def test_source_that_this_python_cannot_parse_has_no_docstrings():
    assert corpus._docstrings(b'"""Python 2."""\nprint "x"') == []
    assert corpus._docstrings(b"\x00") == []


def test_a_repeated_paragraph_is_kept_once_and_white_space_does_not_hide_it():
    seen = set()
    assert (
        corpus._without_repetitions(["One.\n\nTwo\nlines.", "One."], seen) == "One.\n\nTwo\nlines."
    )
    assert corpus._without_repetitions(["  Two  lines.\n\nThree \udc80."], seen) == "Three ?."


def test_xz_gains_from_the_training_text():
    baseline = corpus.xz_bits_per_byte()
    # English text: far below 8 bits, and no compressor of this kind reaches 1 bit per byte.
    assert 1 < baseline.with_prefix < baseline.alone < 4


@given(text=st.text())
def test_the_tokenizer_returns_every_text_unchanged(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_returns_documents_unchanged(tokenizer):
    for text in corpus.documents("validation"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_survives_saving_and_training_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    again = train_tokenizer(corpus.documents("calibration"), vocab_size=512)
    assert len(loaded) == 512
    assert loaded.get_vocab() == tokenizer.get_vocab() == again.get_vocab()
    assert loaded.eos_token == loaded.bos_token == loaded.pad_token == END_OF_TEXT
    assert loaded.eos_token_id == 0
    text = next(corpus.documents("validation"))
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"] == again(text)["input_ids"]


@pytest.mark.parametrize(
    ("size", "message"),
    [(256, "vocab_size=256: at least 257"), (4096, "merges for 260 tokens only")],
)
def test_a_vocabulary_that_cannot_be_filled_is_an_error(size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(["aaa aaa aaa"], size)
