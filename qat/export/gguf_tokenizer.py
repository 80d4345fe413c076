"""The tokenizer in GGUF, from ``tokenizer.json``: what llama.cpp splits as the tokenizer does.

llama.cpp has two tokenizers that matter here. ``gpt2`` is byte-level BPE: the text is cut by a
regular expression that llama.cpp knows by name only (``tokenizer.ggml.pre``), then pairs are merged
in the order of the list of merges. ``llama`` stands for SentencePiece's BPE: no cutting, spaces are
``▁``, and of all neighbours that together make a token those with the highest score merge first.
Texts of any other tokenizer would be cut wrongly without a word, so each difference is a `Loss`.

llama.cpp normalizes no text: where ``tokenizer.json`` asks for NFC, text must be NFC already.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.export.format import Loss
from qat.export.source import Source
from qat.tensor_files import read_json

NEAREST = "format=compressed-tensors, which keeps tokenizer.json"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (llama.h)."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
QWEN2 = rf"{_WORDS}\p{{N}}{_REST}"
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_SLASH}"
)
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|\p{{N}}{{1,3}}|{_SLASH}"
)

PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    (GPT2, False): "gpt-2",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "smaug-bpe",
    (QWEN2, False): "qwen2",
    (QWEN35, False): "qwen35",
    ("digits", False): "smollm",
    (TEKKEN, True): "tekken",
    (GPT4O, False): "gpt-4o",
}
"""(regular expression, whether whole words skip the merges) → ``tokenizer.ggml.pre``."""

APPROXIMATE = {
    "tekken": "llama.cpp knows upper and lower case of ASCII only",
    "gpt-4o": "llama.cpp knows upper and lower case of ASCII only",
}
"""Names whose expression in llama.cpp differs from the tokenizer's."""


@dataclass
class Vocabulary:
    """What GGUF holds of a tokenizer."""

    model: str
    """``gpt2`` or ``llama``."""
    pre: str
    """Name of the pre-tokenizer."""
    tokens: list[str]
    """Text of each token, as many as the embedding has rows."""
    types: list[int]
    """Type of each token."""
    merges: list[str] = field(default_factory=list)
    """Pairs joined by a space, for gpt2."""
    scores: list[float] = field(default_factory=list)
    """For llama."""
    special: dict[str, int] = field(default_factory=dict)
    """bos, eos, pad, unk, eot → id."""
    flags: dict[str, bool] = field(default_factory=dict)
    """bos_token, eos_token, space_prefix → whether llama.cpp adds it."""
    problems: list[str] = field(default_factory=list)
    """Why texts may be cut differently there."""

    def losses(self) -> list[Loss]:
        """One for each problem."""
        return [Loss("tokenizer", problem, NEAREST) for problem in self.problems]


def read_vocabulary(source: Source) -> Vocabulary:
    """The tokenizer of an artifact in GGUF's terms.

    Raises:
        UserError: there is no tokenizer.json, or it is of a kind that llama.cpp has no place for.
    """
    path = source.path / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"format=gguf: {path.name} is missing in the artifact, and a GGUF file holds its "
            "tokenizer; add it, or take format=compressed-tensors"
        )
    content = read_json(path)
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise UserError(
            f"format=gguf: tokenizers of type {model.get('type')} are not written, only BPE; the "
            f"nearest format: {NEAREST}"
        )
    rows = int(source.hf_config.get_text_config().vocab_size)
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    is_llama = bool(model.get("byte_fallback"))
    tokens, types = _tokens(content, rows, spaces=is_llama)
    if is_llama:
        found = Vocabulary("llama", "default", tokens, types)
        found.scores = _scores(found, model["vocab"], merges)
        found.problems += _llama_problems(found, content)
    else:
        found = Vocabulary("gpt2", "default", tokens, types)
        found.merges = [" ".join(pair) for pair in merges]
        _name_pre_tokenizer(found, content)
    found.problems += _common_problems(content)
    _specials(found, source, path)
    return found


def _tokens(content: dict[str, Any], rows: int, spaces: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids without a token are unused, as in llama.cpp's converter."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    vocab: dict[str, int] = content["model"]["vocab"]
    added = content.get("added_tokens", [])
    highest = max([*vocab.values(), *(token["id"] for token in added)])
    if highest >= rows:
        raise UserError(
            f"format=gguf: the tokenizer has a token {highest}, the embedding {rows} rows; "
            "llama.cpp loads no such model"
        )
    for text, number in vocab.items():
        tokens[number] = text
        is_byte = spaces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        types[number] = BYTE if is_byte else NORMAL
    for token in added:
        number, text = token["id"], token["content"]
        types[number] = CONTROL if token["special"] else USER_DEFINED
        # llama.cpp looks for these in the text as it is, where spaces are still spaces
        tokens[number] = text.replace("▁", " ") if spaces and not token["special"] else text
    unknown = content["model"].get("unk_token")
    if unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


# --- SentencePiece -------------------------------------------------------------------------------


def _scores(found: Vocabulary, vocab: dict[str, int], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the place of a token's first merge; tokens that no merge makes come last."""
    first: dict[str, int] = {}
    for pair in merges:
        first.setdefault("".join(pair), len(first))
    scores = [-float(len(first))] * len(found.tokens)
    for text, place in first.items():
        if text in vocab:
            scores[vocab[text]] = -float(place)
    return scores


def _llama_problems(found: Vocabulary, content: dict[str, Any]) -> Iterator[str]:
    model = content["model"]
    prefix = _space_prefix(content)
    if prefix is None:
        yield (
            "its normalizer and pre-tokenizer are none that llama.cpp's SentencePiece tokenizer "
            "follows (spaces to ▁, with or without one in front)"
        )
    elif prefix == "first":
        yield "a space goes before the first word only; llama.cpp adds one after special tokens too"
    found.flags["space_prefix"] = prefix in ("always", "first")
    if sum(kind == BYTE for kind in found.types) != 256:
        yield "it lacks byte tokens, into which llama.cpp splits unknown characters"
    for token in content.get("added_tokens", []):
        after_prefix = prefix == "always" and content.get("normalizer") is not None
        if token["normalized"] and (after_prefix or " " in token["content"]):
            yield f"the token {token['content']!r} is looked for in normalized text only"
            break
    if model.get("ignore_merges"):
        yield "whole words skip the merges; llama.cpp merges always"
    unmerged = _unmerged(found, model)
    if unmerged is not None:
        yield (
            f"llama.cpp merges any neighbours that make a token, such as {unmerged[0]!r} + "
            f"{unmerged[1]!r}, in the order of scores; this tokenizer's merges differ"
        )


def _space_prefix(content: dict[str, Any]) -> str | None:
    """always, first or never: where ▁ goes before a text; None for anything else."""
    prefix = "never"
    replaced = False
    normalizer = content.get("normalizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    for step in steps:
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = "always"
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
            replaced = True
        else:
            return None
    pre = content.get("pre_tokenizer")
    if pre is None or (replaced and _is_space_split(pre)):
        return prefix if replaced else None
    if pre["type"] == "Metaspace" and pre["replacement"] == "▁" and not steps:
        return None if pre.get("split", True) else str(pre["prepend_scheme"])
    return None


def _is_space_split(pre: dict[str, Any]) -> bool:
    """Gemma's: it splits at spaces, of which the normalizer has left none."""
    return bool(pre["type"] == "Split" and pre["pattern"] == {"String": " "})


def _unmerged(found: Vocabulary, model: dict[str, Any]) -> tuple[str, str] | None:
    """A pair that llama.cpp would merge at another time than this tokenizer, or None.

    Greedy merging by score is merging by rank if every pair that makes a token is in the list of
    merges, and the pairs of one token stand together there. Only ordinary tokens are looked at:
    the others are found in the text before anything is merged.
    """
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    pairs, finished, last = set(merges), set(), ""
    for pair in merges:
        made = "".join(pair)
        if made not in vocab or found.types[vocab[made]] != NORMAL:
            continue
        if made in finished:
            return pair[0], pair[1]
        if made != last:
            finished.add(last)
            last = made
    for text, number in vocab.items():
        if found.types[number] != NORMAL:
            continue
        for at in range(1, len(text)):
            left, right = text[:at], text[at:]
            whole = all(len(part) == 1 or part in vocab for part in (left, right))
            if whole and (left, right) not in pairs:
                return left, right
    return None


# --- byte-level BPE ------------------------------------------------------------------------------


def _name_pre_tokenizer(found: Vocabulary, content: dict[str, Any]) -> None:
    """Set ``pre``, and say so where llama.cpp has no name for this pre-tokenizer."""
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        found.problems.append(f"llama.cpp does not normalize text by {normalizer['type']}")
    pattern = _pattern(content.get("pre_tokenizer"))
    key = (pattern or "", bool(content["model"].get("ignore_merges")))
    name = PRE_TOKENIZERS.get(key)
    if name is None:
        shown = json.dumps(content.get("pre_tokenizer"), ensure_ascii=False)
        shown = shown if len(shown) < 160 else f"{shown[:160]}…"
        found.problems.append(
            "llama.cpp knows pre-tokenizers by name, and none of the known ones is "
            f"{shown}{' with ignore_merges' if key[1] else ''}; stored as 'default'"
        )
        return
    found.pre = name
    if name in APPROXIMATE:
        found.problems.append(f"pre-tokenizer {name}: {APPROXIMATE[name]}")


def _pattern(pre: dict[str, Any] | None) -> str | None:
    """The regular expression that a pre-tokenizer cuts by, ``digits``, or None if it is another."""
    steps = [] if pre is None else pre.get("pretokenizers", [pre])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    own = steps[-1].get("use_regex", True)
    before = steps[:-1]
    if not before:
        return GPT2 if own else None
    if len(before) > 1:
        return None
    step = before[0]
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits" if own else None
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"] or own:
        return None
    pattern = step["pattern"].get("Regex")
    return None if pattern is None else str(pattern)


# --- both ----------------------------------------------------------------------------------------


def _common_problems(content: dict[str, Any]) -> Iterator[str]:
    model = content["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"llama.cpp's BPE has no {key}"
    for token in content.get("added_tokens", []):
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            yield (
                f"the token {token['content']!r} takes spaces around it, or only whole words; "
                "llama.cpp matches just its text"
            )
            break


def _specials(found: Vocabulary, source: Source, path: Path) -> None:
    """Ids of special tokens, and which of them llama.cpp is to add around a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    config_path = source.path / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    for name in ("bos", "eos", "pad", "unk"):
        token = config.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        number = None if text is None else tokenizer.token_to_id(text)
        if number is None and name in ("bos", "eos"):
            number = next(iter(_as_list(source.config.get(f"{name}_token_id"))), None)
        if number is not None:
            found.special[name] = number
    others = [i for i in _eos_ids(source) if i != found.special.get("eos")]
    if others:
        found.special["eot"] = others[0]
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    start, end = [], []
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            start, end = full[:at], full[at + len(bare) :]
            break
    for name, around in (("bos", start), ("eos", end)):
        found.flags[f"{name}_token"] = around == [found.special.get(name)]
        if around and not found.flags[f"{name}_token"]:
            found.problems.append(f"it puts the tokens {around} around a text, not just {name}")


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _eos_ids(source: Source) -> list[int]:
    """All ids that end a text, as generation_config.json has them."""
    path = source.path / "generation_config.json"
    return _as_list(read_json(path).get("eos_token_id")) if path.is_file() else []


def chat_template(source: Source) -> str | list[dict[str, str]] | None:
    """The chat template: one text, or a list with names; None if there is none."""
    path = source.path / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    config = source.path / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str | list) else None


def add_vocabulary(writer: Any, found: Vocabulary) -> None:
    """Write the tokenizer's metadata."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores:
        writer.add_token_scores(found.scores)
    if found.merges:
        writer.add_token_merges(found.merges)
    for name, number in found.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name, value in found.flags.items():
        getattr(writer, f"add_add_{name}" if "space" not in name else "add_add_space_prefix")(value)
