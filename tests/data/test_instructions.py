import re
from functools import lru_cache

import pytest

from data import corpus, instructions
from qat.chat_config import ChatConfig
from qat.chat_rows import messages_of


@pytest.fixture(scope="module")
def rows():
    return {split: list(instructions.conversations(split)) for split in corpus.SPLITS}


def test_sizes(rows):
    # bounds, not numbers: Python versions differ
    assert 2500 < len(rows["train"]) < 8000
    assert 200 < len(rows["validation"]) < 1000
    assert 150 < len(rows["calibration"]) < 1000


def test_rows_are_short_messages(rows):
    for split in corpus.SPLITS:
        for messages in rows[split]:
            assert messages_of({"messages": messages}, "messages", ChatConfig()) == messages
            assert [m["role"] for m in messages] in (["user", "assistant"] * n for n in (1, 2))
            assert all(0 < len(m["content"]) < 240 for m in messages)


def names_and_facts(rows):
    """Objects that questions name, and what answers say, but for what the question gives."""
    objects, facts = set(), set()
    for messages in rows:
        question, answer = messages[0]["content"], messages[1]["content"]
        found = re.search(r"[\w.]+\.\w+", question)
        if found and "parameters" not in question:
            objects.add(found.group())
            if not answer.startswith("It is a"):
                facts.add((found.group().rpartition(".")[2], answer))
    return objects, facts


def test_held_out_rows_are_about_other_objects(rows):
    objects, facts = names_and_facts(rows["train"])
    assert len(objects) > 1500
    for split in ("validation", "calibration"):
        others, said = names_and_facts(rows[split])
        assert others
        assert not objects & others
        # neither the description nor the signature has been told before
        assert not facts & said
        assert {corpus.split_of(f"module:{module_of(name)}") for name in others} == {split}


@lru_cache
def modules():
    return {module for module, _ in corpus.python_sources()}


def module_of(name):
    """The longest prefix that is a module of the standard library."""
    known = modules()
    parts = name.split(".")
    return next(
        ".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known
    )


def test_several_kinds_and_wordings(rows):
    questions = [messages[0]["content"] for messages in rows["train"]]
    for words in (
        "What does",
        "Describe",
        "Explain",
        "signature",
        "called",
        "module",
        "parameters",
    ):
        assert sum(words in question for question in questions) > 50
    assert sum(len(messages) == 4 for messages in rows["train"]) > 100
    assert len(set(questions)) > 0.98 * len(questions)


def test_order_is_fixed_and_named(rows):
    before = instructions.fingerprint()
    instructions._shared_out.cache_clear()
    instructions.fingerprint.cache_clear()
    assert instructions.fingerprint() == before
    assert len(before) == 64
    assert list(instructions.conversations("train")) == rows["train"]
    with pytest.raises(ValueError, match="split='test'"):
        instructions.conversations("test")


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the root.  It is exact.\n\nMore.", "Return the root."),
        ("Return the\n   root of a tree.", "Return the root of a tree."),
        ("Perform any action (e.g. this one).", ""),
        ("Too short.", ""),
        ("No full stop at its end", ""),
        ("x" * 200 + ".", ""),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert instructions._first_sentence(docstring) == sentence


def test_objects_of_a_module():
    source = b'''
def f(a, /, b=1, *args, c, **rest):
    """Return the sum of all."""
def _hidden():
    """Return what nobody asks."""
class C:
    """Hold a number of things."""
    def get(self, key=None):
        """Return the thing of a key."""
    @classmethod
    def make(cls):
        """Return a new holder of things."""
    def bare(self): ...
'''
    found = {item.path: item for item in instructions._objects("m", source)}
    assert sorted(found) == ["C", "C.get", "C.make", "f"]
    assert found["f"].call == "f(a, /, b=1, *args, c, **rest)"
    assert found["f"].parameters == ("a", "b", "args", "c", "rest")
    assert found["C.get"].call == "get(key=None)"
    assert (found["C.make"].call, found["C.make"].kind) == ("make()", "method")
    assert list(instructions._objects("_m", source)) == []
