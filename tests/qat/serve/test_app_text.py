"""Text from tokens: what is shown piece by piece is what decoding all at once gives."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.demo import MODEL_DIRECTORY
from qat.models import load_tokenizer
from qat.serve.requests import TokenEvent
from qat.serve.text import (
    BROKEN,
    LONGEST_WAIT,
    Detokenizer,
    OutputText,
    StopStrings,
    TokenTexts,
    joined,
)
from tests.text_fixtures import BOS, EOS, byte_tokenizer

BYTES = byte_tokenizer()
DEMO = load_tokenizer(str(MODEL_DIRECTORY))
SAMPLES = ["naïve café", "日本語 und 🙂🙃!", "a🏳️‍🌈b", "\n\t  x", "e\u0301\u200d", "plain"]


def sentencepiece_tokenizer():
    """Words with a leading ▁ and bytes as <0xXX>, decoded as Llama 2 does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁the", "▁quick"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary |= {"▁t": len(vocabulary), "▁th": len(vocabulary) + 1}
    model = models.BPE(
        vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


PIECES = sentencepiece_tokenizer()


def pieces_of(tokenizer, ids, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("tokenizer", [BYTES, DEMO, PIECES], ids=["bytes", "demo", "pieces"])
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = pieces_of(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert not any(BROKEN in piece for piece in shown)
    # one piece for each character at least, but for tokens of several characters
    assert sum(map(bool, shown)) >= min(len(text), len(ids) / 4)


def test_a_character_comes_with_its_last_byte():
    ids = BYTES("é🙂", add_special_tokens=False).input_ids
    assert len(ids) == 6
    assert pieces_of(BYTES, ids) == ["", "é", "", "", "", "🙂", ""]
    # an incomplete one at the end is shown as such, not lost
    assert pieces_of(BYTES, ids[:4])[-1] == BROKEN


@given(st.lists(st.integers(0, 257), max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_join_to_what_decoding_at_once_gives(ids):
    if len(ids) <= LONGEST_WAIT:
        assert "".join(pieces_of(BYTES, ids)) == BYTES.decode(ids, skip_special_tokens=True)


def test_garbage_is_shown_in_the_end_and_the_next_character_is_whole():
    broken = BYTES("é", add_special_tokens=False).input_ids[1]
    emoji = BYTES("🙂", add_special_tokens=False).input_ids
    shown = pieces_of(BYTES, [broken] * (3 * LONGEST_WAIT) + emoji)
    assert "".join(shown) == BROKEN * (3 * LONGEST_WAIT) + "🙂"
    # it comes in parts and does not wait for the end
    assert [len(piece) for piece in shown if piece][:2] == [LONGEST_WAIT - 3] * 2


def test_special_tokens_are_skipped():
    ids = [BOS, *BYTES("ab", add_special_tokens=False).input_ids, EOS]
    assert pieces_of(BYTES, ids) == ["", "a", "b", "", ""]


def test_a_continued_text_keeps_its_space():
    prompt = PIECES("the", add_special_tokens=False).input_ids
    ids = PIECES("the a", add_special_tokens=False).input_ids
    assert "".join(pieces_of(PIECES, ids, prompt)) == " the a"
    assert "".join(pieces_of(PIECES, ids)) == "the a"
    half = BYTES("é", add_special_tokens=False).input_ids[:1]
    assert "".join(pieces_of(BYTES, BYTES("x").input_ids, half)) == "x"


def feed(stops, text, sizes):
    checker, shown, place = StopStrings(stops), "", 0
    for size in sizes:
        part, stopped = checker.push(text[place : place + size])
        shown += part
        place += size
        if stopped:
            return shown, True
    return shown + checker.flush(), False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.text("ab", max_size=20),
    st.integers(0, 2**32),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_at_the_first_one_however_the_text_is_split(stops, text, seed):
    generator = random.Random(seed)
    sizes = [generator.randint(0, 3) for _ in range(3 * len(text))] + [len(text)]
    # the first stop string that is complete decides, its longest form where several end there
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    shown, stopped = feed(stops, text, sizes)
    assert stopped == bool(ends)
    if not ends:
        assert shown == text
        return
    assert text.startswith(shown)
    assert any(text.startswith(stop, len(shown)) for stop in stops)
    assert not any(stop in shown for stop in stops)
    if all(size <= 1 for size in sizes[:-1]):
        assert len(shown) == min(ends)[1]


def test_no_part_of_a_stop_string_is_ever_shown():
    checker = StopStrings(["###", "END"])
    assert checker.push("a #") == ("a ", False)
    assert checker.push("#") == ("", False)
    assert checker.push(" b") == ("## b", False)
    assert checker.push("E") == ("", False)
    assert checker.push("N") == ("", False)
    assert checker.push("D more") == ("", True)


def output(stops=()):
    return OutputText(BYTES, TokenTexts(BYTES), stops)


def events(text):
    ids = BYTES(text, add_special_tokens=False).input_ids
    return [TokenEvent(token, -float(i), ((token, -float(i)),)) for i, token in enumerate(ids)]


def test_log_probabilities_come_with_the_text_of_their_token():
    out = output()
    shown = [out.add(event) for event in events("aé")] + [out.finish()]
    assert [piece.text for piece in shown] == ["a", "", "é", ""]
    assert [[t.text.text for t in piece.tokens] for piece in shown] == [
        ["a"],
        [],
        ["bytes:\\xc3", "bytes:\\xa9"],
        [],
    ]
    assert [(t.offset, t.logprob) for t in joined(shown).tokens] == [(0, 0.0), (1, -1.0), (1, -2.0)]


def test_tokens_of_a_stop_string_are_not_reported():
    out = output(["cd"])
    shown = [out.add(event) for event in events("abcd")]
    assert [piece.text for piece in shown] == ["a", "b", "", ""]
    assert [piece.stopped for piece in shown] == [False, False, False, True]
    assert [t.text.text for t in joined(shown).tokens] == ["a", "b"]
    # what looked like one and was none comes at the end
    out = output(["cd"])
    shown = [out.add(event) for event in events("abc")] + [out.finish()]
    assert (joined(shown).text, len(joined(shown).tokens)) == ("abc", 3)


def test_minus_infinity_has_a_number():
    out = output()
    token = BYTES("a", add_special_tokens=False).input_ids[0]
    piece = out.add(TokenEvent(token, 0.0, ((token, 0.0), (token + 1, float("-inf")))))
    assert [value for _, value in piece.tokens[0].top] == [0.0, -9999.0]


@pytest.mark.parametrize("tokenizer", [BYTES, DEMO, PIECES], ids=["bytes", "demo", "pieces"])
def test_bytes_of_tokens_join_to_the_text(tokenizer):
    texts = TokenTexts(tokenizer)
    for sample in SAMPLES:
        ids = tokenizer(sample, add_special_tokens=False).input_ids
        data = b"".join(bytes(texts[token].bytes) for token in ids)
        assert data.decode().removeprefix(" ") == sample.removeprefix(" ")
    assert texts[len(tokenizer) + 5].bytes is None
    assert texts[tokenizer.eos_token_id].text == tokenizer.eos_token
