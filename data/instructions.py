"""The built-in instruction set: short questions about the standard library, in ``messages`` form.

Every public function, method and class of the standard library's Python modules with a docstring
of one sentence or more gives one conversation: what it does, how it is called, where it is
defined, which parameters it takes, or two of these in turn, in several wordings. Which ones is
decided by a hash of its name, so the set does not change with the order of files or with what
other modules hold. Text comes from the running Python, like that of `data.corpus`, and
`fingerprint()` names it.

An object belongs to the split that its module has in `data.corpus`, so the demo model has not
been trained on the documentation of held-out objects, and no held-out question can be answered
from the training rows: each description, and each name with its signature, occurs once in the
whole set, in the order train, validation, calibration.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from data import corpus
from qat.chat_rows import Message

_WORDINGS = {
    "describe": (
        "What does {name} do?",
        "Describe {name} in one sentence.",
        "Explain {name} briefly.",
        "What is {name} for?",
    ),
    "call": (
        "How is {name} called?",
        "What is the signature of {name}?",
        "Show how to call {name}.",
    ),
    "module": (
        "In which module is {name}?",
        "Where is {name} defined?",
        "Which module defines {name}?",
    ),
    "parameters": (
        "Which parameters does {call} take?",
        "Name the parameters of {call}.",
    ),
    "parameters_next": (
        "Which parameters does it take?",
        "And its parameters?",
    ),
}
_SHORTEST, _LONGEST = 15, 160
_LONGEST_SIGNATURE = 80
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "cf.", "vs.", "..")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


@dataclass(frozen=True)
class _Object:
    """A documented function, method or class."""

    module: str
    path: str
    """Name within the module: ``JSONDecoder.decode``."""
    kind: str
    """function, method or class."""
    parameters: tuple[str, ...] | None
    """Names, without self; None for a class."""
    signature: str
    """What stands between the parentheses."""
    sentence: str
    """First sentence of the docstring."""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.path}"

    @property
    def call(self) -> str:
        return f"{self.path.rpartition('.')[2]}({self.signature})"


def conversations(split: corpus.Split) -> Iterator[list[Message]]:
    """Yield the conversations of one split, ordered by the hash of the object's name."""
    if split not in corpus.SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(corpus.SPLITS)}")
    return (_conversation(item) for item in _shared_out()[split])


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Return the sha256 (hex) over split and text of every conversation."""
    digest = hashlib.sha256()
    for split in corpus.SPLITS:
        for messages in conversations(split):
            digest.update(json.dumps([split, messages]).encode() + b"\n")
    return digest.hexdigest()


def _conversation(item: _Object) -> list[Message]:
    draw = _hash(item.name)
    kinds = ["describe", "module"]
    if item.parameters is not None:
        kinds += ["call", "parameters", "describe_parameters"] if item.parameters else ["call"]
    kind = kinds[draw % len(kinds)]
    if kind == "describe_parameters":
        return _turn(item, "describe", draw >> 8) + _turn(item, "parameters_next", draw >> 16)
    return _turn(item, kind, draw >> 8)


def _turn(item: _Object, kind: str, draw: int) -> list[Message]:
    wordings = _WORDINGS[kind]
    question = wordings[draw % len(wordings)].format(name=item.name, call=item.call)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _answer(item, kind)},
    ]


def _answer(item: _Object, kind: str) -> str:
    if kind == "describe":
        return item.sentence
    if kind == "call":
        return item.call
    if kind == "module":
        return f"It is a {item.kind} of the module {item.module}."
    names = item.parameters or ()
    return (
        f"It takes {', '.join(names[:-1])} and {names[-1]}."
        if names[1:]
        else (f"It takes {names[0]}.")
    )


@lru_cache(maxsize=1)
def _shared_out() -> dict[corpus.Split, list[_Object]]:
    """The objects of each split; what has been said is not said again."""
    sources = sorted(corpus.python_sources())
    found = [item for name, source in sources for item in _objects(name, source)]
    found.sort(key=lambda item: (_hash(item.name), item.name))
    seen: set[str] = set()
    result: dict[corpus.Split, list[_Object]] = {}
    for split in corpus.SPLITS:
        result[split] = []
        for item in found:
            if corpus.split_of(f"module:{item.module}") == split:
                facts = {item.sentence} if item.parameters is None else {item.sentence, item.call}
                if seen.isdisjoint(facts):
                    result[split].append(item)
                seen |= facts
    return result


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _objects(module: str, source: bytes) -> Iterator[_Object]:
    if any(part.startswith("_") for part in module.split(".")):
        return
    for node in corpus.parse(source).body:
        yield from _documented(module, node, "")


def _documented(module: str, node: ast.stmt, owner: str) -> Iterator[_Object]:
    """A public definition and, of a class, its methods."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if node.name.startswith("_"):
        return
    sentence = _first_sentence(ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        if sentence:
            yield _Object(module, owner + node.name, "class", None, "", sentence)
        for child in node.body:
            yield from _documented(module, child, f"{owner}{node.name}.")
    elif sentence:
        kind = "method" if owner else "function"
        parameters, signature = _signature(node, bool(owner))
        if len(signature) <= _LONGEST_SIGNATURE:
            yield _Object(module, owner + node.name, kind, parameters, signature, sentence)


def _first_sentence(docstring: str) -> str:
    """The first sentence on one line; empty when it is none, too short or too long."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph)[0]
    fits = _SHORTEST <= len(sentence) <= _LONGEST and sentence.isprintable()
    # cut at "e.g.", it would be half a sentence
    whole = sentence.endswith(".") and not sentence.endswith(_ABBREVIATIONS)
    return sentence if fits and whole and sentence.count("(") == sentence.count(")") else ""


def _signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool
) -> tuple[tuple[str, ...], str]:
    """Parameter names and the text between the parentheses, without self or cls."""
    given = node.args
    first = (given.posonlyargs or given.args)[:1]
    if method and first and first[0].arg in ("self", "cls"):
        (given.posonlyargs or given.args).pop(0)
    named = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return tuple(item.arg for item in named if item is not None), ast.unparse(given)
