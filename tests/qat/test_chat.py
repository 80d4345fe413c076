import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qat.chat import Share, bad_rows, canonical, chat_stores, chat_template, file_stores
from qat.chat_config import ChatConfig
from qat.chat_rows import Item
from qat.errors import UserError
from qat.text import TextConfig
from qat.tokens import NoTextError
from tests.qat.test_chat_templates import MARKED, chat, tokenizer

WORDS = st.lists(
    st.sampled_from(["a", "  ", "\n", "<eos>", "<|im_end|>", "日", "👩‍👧", "e\u0301", "User:"]),
    min_size=1,
    max_size=6,
).map("".join)
ANSWERS = WORDS.filter(str.strip)


def stored(tmp_path, conversations, tokens=None, **config):
    """Store of conversations that are all in one share."""
    tokens = tokens or tokenizer()
    chat_config = ChatConfig(**config)
    (store,) = chat_stores(
        "data=x",
        lambda: [Item(f"line {i}", messages) for i, messages in enumerate(conversations, 1)],
        [canonical(messages) for messages in conversations],
        tokens,
        chat_template(chat_config, tokens),
        chat_config,
        tmp_path,
        [Share("all")],
        lambda _: "all",
    )
    return store


def targets(store, tokens):
    """Text of each run of targets, by conversation."""
    result = []
    for begin, end in zip(store.offsets[:-1], store.offsets[1:]):
        ids, flags = store.tokens[begin:end], np.asarray(store.targets[begin:end])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]]).astype(int)))
        result.append([tokens.decode(ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)])
    return result


@pytest.mark.parametrize("template", ["plain", "chatml", "llama3", "alpaca"])
def test_targets_are_the_answers(tmp_path, template):
    rows = [
        chat("q", "a"),
        chat("a", "a", "日本", "  b👩‍👧 c"),
        chat("<eos>", "x<|im_end|>y", system="a"),
    ]
    store = stored(tmp_path, rows, template=template)
    head = " " if template == "plain" else ""
    tail = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "<eos>")
    second = "b👩‍👧 c" if template == "llama3" else "  b👩‍👧 c"
    assert targets(store, tokenizer()) == [
        [f"{head}a{tail}"],
        [f"{head}a{tail}", f"{head}{second}{tail}"],
        [f"{head}x<|im_end|>y{tail}"],
    ]
    assert store.tokens.dtype == np.uint16
    assert store.targets.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3), min_size=1, max_size=3
    )
)
def test_targets_equal_those_of_transformers(tmp_path_factory, rows):
    """A template that marks the assistant's text; the mask is made by apply_chat_template."""
    conversations = [chat(*[text for turn in row for text in turn]) for row in rows]
    tokens = tokenizer()
    tokens.chat_template = MARKED
    store = stored(tmp_path_factory.mktemp("cache"), conversations, tokens)
    at = 0
    for messages in conversations:
        expected = tokens.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        end = at + len(expected["input_ids"])
        assert store.tokens[at:end].tolist() == expected["input_ids"]
        assert store.targets[at:end].tolist() == expected["assistant_masks"]
        at = end
    assert at == len(store.tokens)


def test_train_on_all(tmp_path):
    store = stored(tmp_path, [chat("q", "a")], train_on="all")
    assert store.targets.tolist() == [1] * len(store.tokens)


def merging(*merges):
    """A byte tokenizer with merges that cross every border."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"".join(pair): 256 + i for i, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_token_across_a_border_is_a_target(tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokens = merging((":", "x"), ("Ċ", "u"))
    store = stored(tmp_path, [chat("q", "xy", "q", "z")], tokens, template=str(path))
    pieces = [tokens.decode([token]) for token in store.tokens.tolist()]
    # "a:" is the header: ":x" holds a letter of the answer, and so it is trained on as a whole
    assert list(zip(pieces, store.targets.tolist())) == [
        *[("u", 0), (":", 0), ("q", 0), ("\n", 0), ("a", 0)],
        # and so is the line end of the turn together with the next header's first letter
        *[(":x", 1), ("y", 1), ("\nu", 1), (":", 0), ("q", 0), ("\n", 0)],
        *[("a", 0), (":", 0), ("z", 1), ("\n", 1)],
    ]


@pytest.mark.parametrize("trim", [True, False])
def test_spaces_are_targets_whatever_the_offsets_say(tmp_path, trim):
    tokens = tokenizer()
    tokens.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    store = stored(tmp_path, [chat("q  q", "  a   b  ")], tokens)
    assert targets(store, tokens) == [["   a   b  <eos>"]]


def test_sentencepiece_spaces(tmp_path):
    letters = sorted(set("▁User:Assistant:qab\n."))
    model = models.BPE(vocab={c: i for i, c in enumerate(["<unk>", *letters])}, merges=[])
    model.unk_token = "<unk>"
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    store = stored(tmp_path, [chat("q  q", "a  b")], tokens)
    pieces = tokens.convert_ids_to_tokens(store.tokens.tolist())
    chosen = [piece for piece, flag in zip(pieces, store.targets) if flag]
    assert chosen in ([*list("▁a▁▁b"), "</s>"], ["▁", *list("▁a▁▁b"), "</s>"])


# --- files, shares, bad rows


@pytest.fixture
def text(tmp_path):
    return TextConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def of_file(path, text, shares, **config):
    tokens, chat_config = tokenizer(), ChatConfig(**config)
    template = chat_template(chat_config, tokens)
    form = "prompt_completion"
    return file_stores(str(path), form, tokens, template, chat_config, text, shares)


def pairs(count, offset=0):
    return [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(offset, offset + count)]


BOTH = [Share("train"), Share("validation")]


def test_shares_are_a_partition_by_conversation(tmp_path, text):
    path = write(tmp_path / "a.jsonl", [{**row, "id": i} for i, row in enumerate(pairs(50) * 3)])
    stores = of_file(path, text, BOTH)
    train, validation = ([t[0] for t in targets(store, tokenizer())] for store in stores)
    assert sorted(train + validation) == sorted(f" a{i}<eos>" for i in range(50) for _ in range(3))
    assert not set(train) & set(validation)
    assert 3 <= len(set(validation)) <= 27
    (whole,) = of_file(path, text, [Share("all")])
    assert whole.documents == 150


def test_limits_keep_conversations_whole(tmp_path, text):
    path = write(tmp_path / "a.jsonl", pairs(10))
    (store,) = of_file(path, text, [Share("all")])
    size = len(store.tokens) // 10
    for limit, expected in ((3 * size, 3), (4 * size - 1, 3), (1, 1)):
        (store,) = of_file(path, text, [Share("all", limit)])
        assert store.documents == expected
        assert len(store.tokens) == expected * size


def test_bad_rows_are_counted_and_named(tmp_path, text, monkeypatch):
    broken = ["{oops", {"prompt": "q"}, {"prompt": "q", "completion": " "}, "[]"] * 3
    path = write(tmp_path / "a.jsonl", [*pairs(30), *broken])
    for _ in range(2):  # built, then from the cache
        stores = of_file(path, text, BOTH, max_bad_rows=0.3)
        for store in stores:
            bad = bad_rows(store)
            assert (bad.rows, bad.bad, len(bad.first)) == (42, 12, 10)
            assert bad.first[0].startswith("line 31: column 2: not valid JSON")
            assert bad.first[1] == "line 32: no column 'completion'. Columns: prompt."
            lines = bad.lines()
            assert lines[0] == f"data={path}: 12 of 42 rows left out:"
            assert lines[1].startswith(f"data={path}: line 31: ")
            assert lines[-1] == f"data={path}: ... and 2 more"
        assert sum(store.documents for store in stores) == 30
        monkeypatch.setattr("qat.chat.read_conversations", lambda *_: pytest.fail("read again"))
    match = r"12 of 42 rows left out(.|\n)*line 40(.|\n)*chat\.max_bad_rows=0\.25"
    with pytest.raises(UserError, match=match):
        of_file(path, text, BOTH, max_bad_rows=0.25)
    assert bad_rows(stores[0]).lines() != []


def test_above_the_threshold_nothing_is_stored(tmp_path, text):
    path = write(tmp_path / "a.jsonl", [*pairs(30), {}])
    with pytest.raises(UserError, match="1 of 31 rows"):
        of_file(path, text, BOTH)
    assert list((tmp_path / "cache").iterdir()) == []
    assert sum(s.documents for s in of_file(path, text, BOTH, max_bad_rows=0.05)) == 30


def test_a_hopeless_file_is_not_read_to_its_end(tmp_path, text, monkeypatch):
    path = write(tmp_path / "a.jsonl", ["{}"] * 5000)
    with pytest.raises(UserError, match="1000 of 1000 rows left out"):
        of_file(path, text, BOTH)


def test_rows_that_the_template_refuses_are_bad(tmp_path, text):
    own = tmp_path / "t.jinja"
    own.write_text(
        "{% if 'q7' in messages[0]['content'] %}{{ raise_exception('not this one') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", pairs(10))
    (store,) = of_file(path, text, [Share("all")], template=str(own), max_bad_rows=0.1)
    assert bad_rows(store).first == ("line 8: the chat template refuses it: not this one",)
    assert store.documents == 9


def test_empty_share(tmp_path, text):
    path = write(tmp_path / "a.jsonl", pairs(1))
    with pytest.raises(NoTextError, match=r"too few to hold out text\.validation_fraction=0\.3"):
        of_file(path, text, BOTH)
    path.write_text("\n\n")
    with pytest.raises(NoTextError, match="no conversation in it"):
        of_file(path, text, [Share("all")])
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_key(tmp_path, text):
    path = write(tmp_path / "a.jsonl", pairs(4))

    def tokens(**config):
        (store,) = of_file(path, text, [Share("all")], **config)
        return store.tokens.tolist(), store.targets.tolist()

    variants = [
        tokens(),
        tokens(train_on="all"),
        tokens(template="chatml"),
        tokens(system="Be brief."),
        tokens(prompt_column="completion", completion_column="prompt"),
    ]
    assert all(a != b for i, a in enumerate(variants) for b in variants[:i])
    assert tokens() == variants[0]
    own = tmp_path / "t.jinja"
    seen = []
    for word in ("one", "two"):
        own.write_text(f"{word}{{% for m in messages %}}{{{{ m['content'] }}}}<eos>{{% endfor %}}")
        seen.append(tokens(template=str(own)))
    assert seen[0] != seen[1]
    write(path, pairs(4, offset=4))
    assert tokens() != variants[0]


def test_damage_is_noticed(tmp_path, text):
    path = write(tmp_path / "a.jsonl", pairs(6))
    (first,) = of_file(path, text, [Share("all")])
    flags = first.targets.tolist()
    (cache,) = (tmp_path / "cache").iterdir()
    good = cache.read_bytes()
    at = good.index(bytes(flags[:12]))  # the targets, which are bytes of 0 and 1
    flipped = bytearray(good)
    flipped[at] ^= 1
    for damaged in (bytes(flipped), good[:-1], good + b" "):
        cache.unlink()
        cache.write_bytes(damaged)
        (again,) = of_file(path, text, [Share("all")])
        assert again.targets.tolist() == flags
        assert cache.read_bytes() == good


def test_the_global_random_state_is_untouched(tmp_path, text):
    before = torch.get_rng_state()
    of_file(write(tmp_path / "a.jsonl", pairs(6)), text, [Share("all")])
    assert torch.equal(before, torch.get_rng_state())
