import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from qat.chat_rows import RowError
from qat.chat_templates import (
    BUILT_IN,
    TEMPLATE_TOKENS,
    ChatTemplate,
    NamedTemplate,
    resolve_template,
)
from qat.errors import UserError
from tests.text_fixtures import byte_tokenizer

ALL_TOKENS = sorted({token for tokens in TEMPLATE_TOKENS.values() for token in tokens})
# what each built-in template writes behind the assistant's text, and before it in the span
FRAME = {
    "plain": (" ", "<eos>"),
    "chatml": ("", "<|im_end|>"),
    "llama3": ("", "<|eot_id|>"),
    "alpaca": ("", "<eos>"),
}

MARKED = """\
{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' %}
{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}
{%- else %}{{ m['content'] }}<|im_end|>{% endif %}
{%- endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRIMMING = BUILT_IN["chatml"].replace("message['content']", "message['content'] | trim")
# of the last turn only, as reasoning models have it
REWRITING = """\
{%- for m in messages -%}
<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m['content'] }}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRIPPING = BUILT_IN["chatml"].replace(
    "message['content']", "message['content'].split('</think>')[-1]"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
    + BUILT_IN["chatml"]
)
# the last message is followed by something that no other one is followed by
CLOSING = BUILT_IN["chatml"] + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
# without a prompt for generation, as older templates are
HEADLESS = """\
{%- for m in messages -%}
{% if m['role'] == 'assistant' %}### Answer:
{{ m['content'] }}{{ eos_token }}{% else %}### Question:
{{ m['content'] }}
{% endif %}
{%- endfor -%}"""


def tokenizer(bos=False):
    result = byte_tokenizer(bos)
    result.add_tokens([AddedToken(token, special=True) for token in ALL_TOKENS])
    return result


TOKENIZER = tokenizer()


def template(source, name="a.jinja"):
    return ChatTemplate(NamedTemplate(name, source), TOKENIZER)


def chat(*contents, system=None):
    """Turns of user and assistant, beginning with the user."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + messages


def spans(source, messages):
    text, places = template(source).rendered(messages)
    return [text[begin:end] for begin, end in places]


ADVERSARIAL = {
    "answer equals question": chat("same", "same", "same", "same"),
    "answer within question": chat("aa", "a", "a aa a", "a"),
    "markers": chat(
        "<|im_end|>\n<|im_start|>assistant\nx", "x<|im_end|>\n<|im_start|>user\nx", "x"
    ),
    "headers": chat("User: a\nAssistant: b", "Assistant: b<eos>\nUser: ", "### Response:\n", "b"),
    "jinja": chat("{{ messages }}{% for %}", "{% generation %}{{ eos_token }}", "{#", "#}"),
    "empty system": chat("q", "a", system=""),
    "system equals answer": chat("q", "a", "a", "a", system="a"),
    "empty question": chat("", "a", "", "b"),
    "unicode": chat("日本 👩‍👩‍👧", "e\u0301 \U0001f600 \u202eabc", "ß", "\u00a0x"),
    "private use": chat("\ue000", "\ue0000\ue000", "\ue001", "\ue0003\ue000"),
    "digits": chat("1", "1", "11", "0"),
    "lines": chat("a\nb\n\n", "c\r\nd"),
    "no question": [{"role": "assistant", "content": "a"}],
    "two answers": [*chat("q", "a"), {"role": "assistant", "content": "b"}],
    "open end": chat("q", "a", "q"),
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize("case", sorted(ADVERSARIAL))
def test_spans_are_the_answers_and_their_ends(name, case):
    messages = ADVERSARIAL[case]
    head, tail = FRAME[name]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if name == "llama3":
        answers = [answer.strip() for answer in answers]
    expected = [head + answer + tail for answer in answers]
    if messages[0]["role"] == "assistant":
        # nothing precedes the turn, so no prompt for generation tells where it begins
        expected[0] = expected[0].removeprefix(" ")
    assert spans(BUILT_IN[name], messages) == expected


WORDS = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            " ",
            "\n",
            "<eos>",
            "<|im_end|>",
            "<|im_start|>",
            "user",
            "assistant",
            "é",
            "\ue000",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)
ANSWERS = WORDS.filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4))
def test_derived_spans_equal_marked_ones(turns):
    """The same text by a template with marks and by one without."""
    messages = chat(*[text for turn in turns for text in turn])
    bare = re.sub(r"\{% (end)?generation %\}", "", MARKED)
    marked, derived = template(MARKED).rendered(messages), template(bare).rendered(messages)
    assert marked == derived


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=4))
def test_a_template_that_strips(turns):
    messages = chat(*[text for turn in turns for text in turn])
    answers = [answer.strip() + "<|im_end|>" for _, answer in turns]
    assert spans(TRIMMING, messages) == answers


def test_rewritten_history_is_refused():
    # one turn is the last turn: what the model has to produce includes the empty reasoning
    assert spans(REWRITING, chat("q", "a")) == ["<think>\n\n</think>\n\na<|im_end|>"]
    with pytest.raises(RowError, match="message 1: the template renders it differently once"):
        spans(REWRITING, chat("q", "a", "q", "b"))
    assert spans(STRIPPING, chat("q", "a", "q", "b")) == ["a<|im_end|>", "b<|im_end|>"]
    with pytest.raises(RowError, match="changes the text of a message"):
        spans(STRIPPING, chat("q", "<think>why</think>a"))


def test_marked_template_that_rewrites_history():
    source = MARKED.replace(
        "{{ m['content'] }}<|im_end|>{% endgen",
        "{{ 'x' if loop.last }}{{ m['content'] }}<|im_end|>{% endgen",
    )
    assert spans(source, chat("q", "a")) == ["xa<|im_end|>"]
    with pytest.raises(RowError, match="rewrites earlier turns"):
        spans(source, chat("q", "a", "q", "b"))


def test_system_message_that_moves_to_the_last_question():
    source = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
        "{% elif m['role'] == 'user' %}{% set after = messages[loop.index:] %}[INST]"
        "{% if messages[0]['role'] == 'system' and not after | selectattr('role', 'eq', 'user')"
        " | list %}{{ messages[0]['content'] + ' ' }}{% endif %}"
        "{{ m['content'] }}[/INST]{% endif %}{% endfor %}"
    )
    assert spans(source, chat("q", "a", system="s")) == ["a<eos>"]
    assert spans(source, chat("q", "a", "q", "b")) == ["a<eos>", "b<eos>"]
    with pytest.raises(RowError, match="rewrites earlier turns"):
        spans(source, chat("q", "a", "q", "b", system="s"))


def test_notes_do_not_grow_with_the_rows():
    loaded = template(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}-{% endif %}"
    )
    before = dict(loaded.notes)
    for i in range(5):
        loaded.rendered(chat(f"q{i}", f"a{i}"))
    assert loaded.notes == before
    assert sorted(before) == ["prompt", "stop"]


def test_what_the_last_message_has_is_not_the_end_of_a_turn():
    assert spans(CLOSING, chat("q", "a", "q", "b")) == ["a<|im_end|>", "b<|im_end|>"]


def test_template_without_a_prompt_for_generation():
    assert spans(HEADLESS, chat("q", "a", "Answer", "b")) == ["a<eos>", "b<eos>"]


def test_template_whose_prompt_is_not_what_it_writes():
    source = BUILT_IN["chatml"].replace(
        "{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}"
    )
    loaded = template(source)
    text, places = loaded.rendered(chat("q", "a"))
    assert [text[a:b] for a, b in places] == ["a<|im_end|>"]
    assert "generation begins elsewhere" in "".join(loaded.notes.values())


def test_no_end_of_turn_is_noted():
    loaded = template(
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    )
    text, places = loaded.rendered(chat("q", "a"))
    assert [text[a:b] for a, b in places] == ["a"]
    assert "not learn to stop" in "".join(loaded.notes.values())
    marked = template(
        MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    )
    assert "not learn to stop" in "".join(marked.notes.values())


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        (chat("q", "a", system="s"), "roles must alternate"),
        ([*chat("q"), *chat("q", "a")], "roles must alternate"),
    ],
)
def test_template_that_demands_alternation(messages, match):
    with pytest.raises(RowError, match=match):
        spans(ALTERNATING, messages)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (("message['content']", "message['content'] | upper"), "changes the text"),
        (("message['content']", "message['content'] * 2"), "repeats or changes"),
        (("message['content']", "'x'"), "leaves out message 0"),
        (("{% for", "{% far"), "refuses it: Encountered unknown tag"),
        (("message['role']", "message['role'].nothing.more"), "refuses it"),
    ],
)
def test_template_that_masks_cannot_follow(change, match):
    with pytest.raises(UserError, match=rf"chat\.template=a\.jinja: unusable.*{match}"):
        template(BUILT_IN["chatml"].replace(*change))


def test_a_left_out_system_message_is_refused():
    source = BUILT_IN["chatml"].replace(
        "in messages %}", "in messages if message['role'] != 'system' %}"
    )
    with pytest.raises(RowError, match="leaves out message 0"):
        spans(source, chat("q", "a", system="s"))


def test_the_date_is_fixed():
    source = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}\n" + BUILT_IN["chatml"]
    assert template(source).rendered(chat("q", "a")).text.startswith("26 Jul 2024 2024-07-26\n")
    guarded = (
        "{{ strftime_now('%Y-%m-%d') if strftime_now is defined else '-' }}" + BUILT_IN["chatml"]
    )
    assert template(guarded).rendered(chat("q", "a")).text.startswith("2024-07-26")


# --- which template


def test_resolve(tmp_path):
    tokens = tokenizer()
    plain = resolve_template(None, tokens, False)
    assert plain.name == "plain"
    assert "no chat template" in plain.note
    tokens.chat_template = MARKED
    assert resolve_template(None, tokens, False).source == MARKED
    assert resolve_template("chatml", tokens, False).source == BUILT_IN["chatml"]
    tokens.chat_template = {"rag": MARKED, "default": TRIMMING}
    assert resolve_template(None, tokens, False).source == TRIMMING
    assert resolve_template("rag", tokens, False).source == MARKED
    tokens.chat_template = {"rag": MARKED}
    with pytest.raises(UserError, match=r"several templates and no default; name one of rag"):
        resolve_template(None, tokens, False)
    path = tmp_path / "own.jinja"
    path.write_text(HEADLESS)
    assert resolve_template(str(path), tokens, False).source == HEADLESS
    with pytest.raises(UserError, match="Did you mean 'chatml'"):
        resolve_template("chatlm", tokens, False)


def test_missing_special_tokens_are_named():
    with pytest.raises(UserError, match=r"lacks its special tokens <\|im_start\|>, <\|im_end\|>"):
        resolve_template("chatml", byte_tokenizer(), False)
    foreign = ChatTemplate(NamedTemplate("f", BUILT_IN["chatml"]), byte_tokenizer())
    assert (
        "<|im_end|>, <|im_start|>, which the tokenizer reads as common" in foreign.notes["tokens"]
    )


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_bos_where_the_tokenizer_adds_it(name):
    tokens = tokenizer(bos=True)
    text = ChatTemplate(resolve_template(name, tokens, True), tokens).rendered(chat("q", "a")).text
    assert text.startswith("<|begin_of_text|>" if name == "llama3" else "<bos>")
    assert text.count("<bos>") == (name != "llama3")


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_templates_prompt_with_what_they_write(name):
    tokens = tokenizer()
    loaded = ChatTemplate(resolve_template(name, tokens, False), tokens)
    assert loaded.notes == {}
    text = loaded.rendered(chat("q", "a")).text
    asked = tokens.apply_chat_template(
        chat("q"), chat_template=loaded.source, add_generation_prompt=True, tokenize=False
    )
    assert text.startswith(asked)
