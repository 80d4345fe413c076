"""Chat templates: conversations as text, and which characters of it the assistant wrote.

The span of an assistant turn runs from the end of what the template renders as the prompt for
generation to the token that ends the turn: just what a model has to produce in that place. How it
is found, for a conversation F = render(all messages):

- a template with ``{% generation %}`` marks its spans itself, and they are taken as they are;
- else every message's text is replaced by a marker that occurs nowhere, the rendering is cut at
  the markers, and F must be those pieces with the texts between them, whole or stripped of outer
  white space. So a text that equals another one, or looks like the template, is found all the
  same. The span begins where render(messages before the turn, with the prompt for generation)
  ends, if F begins with that, else where the text begins. It ends behind the first special token
  that follows the text within the turn, or where the turn ends if there is none.

Either way F must agree, up to the end of each span, with the rendering of the messages up to that
turn: a template that rewrites earlier turns (one that strips reasoning, say) trains something
else than what generation sees. A conversation that fails one of the checks is a `RowError`, never
a guess.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qat.chat_rows import Message, RowError
from qat.errors import UserError, did_you_mean

# Jinja drops the line end behind a block, so line ends of the text are written as '\n'.
_PLAIN = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ 'User: ' + message['content'] + '\\n' }}
{%- elif message['role'] == 'assistant' %}
{{ 'Assistant: ' + message['content'] }}{{ eos_token }}{{ '\\n' }}
{%- else %}
{{ message['content'] + '\\n' }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:' }}
{%- endif %}
"""

_CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{ '<|begin_of_text|>' }}
{%- for message in messages %}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_ALPACA = """\
{% if messages[0]['role'] == 'system' %}
{{ messages[0]['content'] + '\\n\\n' }}
{%- else %}
{{ 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.\\n\\n' }}
{%- endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{ '### Response:\\n' + message['content'] }}{{ eos_token }}{{ '\\n\\n' }}
{%- elif not loop.first %}
{{ raise_exception('only the first message can be of the system') }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '### Response:\\n' }}
{%- endif %}
"""

BUILT_IN = {"plain": _PLAIN, "chatml": _CHATML, "llama3": _LLAMA3, "alpaca": _ALPACA}

TEMPLATE_TOKENS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "alpaca": (),
}
"""Special tokens that the built-in templates write."""

# The day that templates with a date get, so that tomorrow's run sees the same tokens.
_DATE = {"%d %b %Y": "26 Jul 2024", "%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024"}
_SPECIAL_LOOK = re.compile(r"<\|\w+\|>")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """First character and the one behind the last, of each assistant turn, in order."""


@dataclass(frozen=True)
class NamedTemplate:
    """A template before it meets a tokenizer."""

    name: str
    source: str
    note: str = ""
    """What the user should know about the choice."""


def resolve_template(
    name: str | None, tokenizer: PreTrainedTokenizerFast, adds_bos: bool
) -> NamedTemplate:
    """The Jinja source of ``chat.template``.

    Args:
        name: null for the tokenizer's own (plain if it has none); a built-in name; a path; the
            name of one of several templates that the tokenizer has.
        tokenizer: of the model, with the run's new tokens already added.
        adds_bos: the tokenizer begins a text with its bos token; a built-in template then does so.

    Raises:
        UserError: no such template, or its special tokens are not in the tokenizer.
    """
    own = tokenizer.chat_template
    if name is None:
        if own:
            try:
                return NamedTemplate("the tokenizer's", tokenizer.get_chat_template())
            except ValueError:
                raise UserError(
                    f"chat.template=null: the tokenizer has several templates and no default; name "
                    f"one of {', '.join(sorted(own))}"
                ) from None
        note = "the tokenizer has no chat template, so chat.template=plain is taken"
        return NamedTemplate("plain", _built_in("plain", adds_bos), note)
    if name in BUILT_IN:
        _check_tokens(name, tokenizer)
        return NamedTemplate(name, _built_in(name, adds_bos))
    if isinstance(own, dict) and name in own:
        return NamedTemplate(name, own[name])
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return NamedTemplate(name, path.read_text("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"chat.template={name}: not a text file in UTF-8") from None
    raise UserError(
        f"chat.template={name}: neither a built-in template ({', '.join(BUILT_IN)}) nor a file."
        f"{did_you_mean(name, BUILT_IN)} null takes the tokenizer's own"
    )


def _built_in(name: str, adds_bos: bool) -> str:
    bos = "{{ bos_token }}" if adds_bos and name != "llama3" else ""
    return bos + BUILT_IN[name]


def _check_tokens(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    known = tokenizer.get_added_vocab()
    missing = [token for token in TEMPLATE_TOKENS[name] if token not in known]
    if missing:
        raise UserError(
            f"chat.template={name}: the tokenizer lacks its special tokens {', '.join(missing)}. "
            "Add them to the model as new tokens, or take chat.template=plain, which needs none"
        )


class ChatTemplate:
    """A template together with a tokenizer's special tokens.

    Args:
        named: the source.
        tokenizer: its bos, eos ... tokens are the template's variables.

    Raises:
        UserError: the template does not compile, fails on the simplest conversation, or masks
            cannot follow it.
    """

    def __init__(self, named: NamedTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
        self.name, self.source = named.name, named.source
        self.notes = {"choice": named.note} if named.note else {}
        """What the user should know, by kind; the first row that shows it words it."""
        self.variables = {
            name: str(value)
            for name, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(self.variables.values()) - {""}
        # the longest first: one special token may begin like another
        words = sorted(special, key=lambda word: (-len(word), word))
        self._special = re.compile("|".join(map(re.escape, words)) or r"(?!)")
        known = set(tokenizer.get_added_vocab())
        foreign = sorted(set(_SPECIAL_LOOK.findall(self.source)) - known)
        if foreign:
            self._note(
                "tokens", f"writes {', '.join(foreign)}, which the tokenizer reads as common text"
            )
        self._marked = bool(_MARKS.search(self.source))
        self._program = _fixed_date(self.source)
        user = {"role": "user", "content": "Question"}
        answer = {"role": "assistant", "content": "Answer"}
        try:
            self._prompts = self._render([user], prompt=True) != self._render([user])
            self.rendered([user, answer])
        except RowError as error:
            raise UserError(
                f"chat.template={self.name}: unusable, already for one question and one answer: "
                f"{error}. Take another template: {', '.join(BUILT_IN)} or a .jinja file"
            ) from None

    @property
    def identity(self) -> list[object]:
        """JSON values that change whenever a conversation could be rendered differently."""
        return [self._program, sorted(self.variables.items()), self._special.pattern]

    @property
    def turn_ends(self) -> list[str]:
        """Special tokens that end the assistant's turn, so that generation must stop at them."""
        text, spans = self.rendered(
            [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
        )
        begin, end = spans[-1]
        return self._special.findall(text[begin:end])

    def rendered(self, messages: Sequence[Message]) -> Rendered:
        """Text and assistant spans of a conversation.

        Raises:
            RowError: the template refuses it, or the spans cannot be told exactly.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self._marked:
            text, spans = self._marked_spans(messages, len(answers))
        else:
            text, spans = self._render(messages), []
        # the conversation as it was when each turn was the last one
        alone = [
            self._render(messages[: i + 1]) if i + 1 < len(messages) else text for i in answers
        ]
        if not self._marked:
            spans = self._derived_spans(text, messages, answers, alone)
        for (_, end), index, then in zip(spans, answers, alone):
            if then[:end] != text[:end]:
                raise RowError(
                    f"message {index}: the template renders it differently once other messages "
                    "follow (it rewrites earlier turns), which masks cannot follow"
                )
        return Rendered(text, spans)

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        text, _ = self._run(messages, prompt, marks=False)
        return text

    def _run(
        self, messages: Sequence[Message], prompt: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self._program,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except _FAILURES as error:
            reason = str(error).strip() or type(error).__name__
            raise RowError(f"the chat template refuses it: {reason}") from None
        return texts[0], spans[0] if marks else []

    def _marked_spans(
        self, messages: Sequence[Message], answers: int
    ) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self._run(messages, prompt=False, marks=True)
        if len(spans) != answers or any(begin >= end for begin, end in spans):
            raise RowError(
                f"the template marks {len(spans)} texts of the assistant, of {answers} in the row"
            )
        if not any(self._special.search(text[begin:end]) for begin, end in spans):
            self._note(
                "stop", "marks no token that ends a turn, so the model will not learn to stop"
            )
        return text, spans

    def _derived_spans(
        self, text: str, messages: Sequence[Message], answers: list[int], alone: list[str]
    ) -> list[tuple[int, int]]:
        places = self._content_places(text, messages)
        spans = []
        for index, then in zip(answers, alone):
            begin, end = places[index]
            if self._prompts and index:
                prompt = self._render(messages[:index], prompt=True)
                if not text.startswith(prompt):
                    self._note(
                        "prompt",
                        f"asks for an answer with {_tail(prompt)} but writes "
                        f"{_tail(text[:begin])} before one: generation begins elsewhere",
                    )
                elif len(prompt) <= end:
                    begin = len(prompt)
            spans.append((begin, self._turn_end(text, then, end)))
        return spans

    def _turn_end(self, text: str, alone: str, end: int) -> int:
        """Where the turn's last token ends; its text ends at ``end``."""
        # what the next message brings, or what only the last message has, is not in both
        tail = _common_start(text[end:], alone[end:])
        stop = self._special.search(tail)
        if stop:
            return end + stop.end()
        if not tail:
            self._note("stop", "ends a turn with no token, so the model will not learn to stop")
        return end + len(tail)

    def _content_places(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]]:
        """Where the text of each message that is not blank stands."""
        contents = {i: m["content"] for i, m in enumerate(messages) if m["content"].strip()}
        mark = _unused("".join(contents.values()))
        marked = [
            {**message, "content": f"{mark}{i}{mark}"} if i in contents else message
            for i, message in enumerate(messages)
        ]
        pieces = re.split(f"{mark}(\\d+){mark}", self._render(marked))
        literals, order = pieces[::2], [int(piece) for piece in pieces[1::2]]
        if sorted(order) != sorted(contents) or any(mark in piece for piece in literals):
            lost = sorted(set(contents) - set(order))
            what = f"leaves out message {lost[0]}" if lost else "repeats or changes the messages"
            raise RowError(f"the chat template {what}")
        roles = sorted({messages[i]["role"] for i in order if _padded(contents[i])})
        for trims in product(_TRIMS, repeat=len(roles)):
            trim = dict(zip(roles, trims))
            inserted = [trim.get(messages[i]["role"], str)(contents[i]) for i in order]
            places, at = {}, 0
            for literal, index, content in zip(literals, order, inserted):
                at += len(literal)
                places[index] = (at, at + len(content))
                at += len(content)
            joined = "".join(x for pair in zip(literals, [*inserted, ""]) for x in pair)
            if joined == text:
                return places
        raise RowError("the chat template changes the text of a message, which masks cannot follow")

    def _note(self, kind: str, note: str) -> None:
        self.notes.setdefault(kind, f"chat.template={self.name}: {note}")


def _common_start(first: str, second: str) -> str:
    if first.startswith(second):
        return second
    pairs = zip(first, second)
    return first[: next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))]


def _padded(text: str) -> bool:
    return text != text.strip()


def _unused(text: str) -> str:
    """A private-use character that the text does not hold."""
    for code in range(0xE000, 0xF900):
        if chr(code) not in text:
            return chr(code)
    raise RowError("its text holds every private-use character of Unicode")


def _tail(text: str) -> str:
    return repr(text[-24:])


def _fixed_date(source: str) -> str:
    """The source with a fixed day behind ``strftime_now``, if it asks for the date."""
    if "strftime_now" not in source:
        return source
    # a macro of that name goes before the global one
    return (
        "{%- macro strftime_now(format) -%}"
        f"{{{{- {_DATE!r}.get(format, '2024-07-26') -}}}}"
        "{%- endmacro -%}" + source
    )
