"""The built-in demo corpus: English technical prose that every Python installation carries.

Sources, read at run time, so the repository ships no text of its own:

- the help topics of `pydoc_data.topics`, one document per topic;
- the docstrings of the standard library, one document per module. Python modules are parsed with
  `ast` and never imported (importing `this`, `antigravity` or `idlelib` has side effects, and
  parsing 730 files takes under two seconds); for extension modules written in C the docstrings
  exist only at run time, so a fixed list of them is imported.

A document belongs to `train`, `validation` or `calibration` by a hash of its name, hence a
module keeps its split when others come or go between Python versions. A C accelerator follows its
Python twin (`_decimal`, `_pydecimal` and `decimal` share one split), since their docstrings are
nearly the same. Every paragraph occurs once in the whole corpus: a repetition, ignoring white
space, is dropped where it comes second in the order train, validation, calibration, so no
held-out paragraph can be answered from memory. Platform modules missing from an installation are
left out. The text depends on the Python version and its build: `fingerprint()` names it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import lzma
import sysconfig
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "calibration"]
SPLITS: tuple[Split, ...] = get_args(Split)

# Upper bounds of the buckets [0, 1) that a document's hash falls into.
_SPLIT_BOUNDS: dict[Split, float] = {"train": 0.86, "validation": 0.94, "calibration": 1.0}

# Prefix of the hashed name. With most prefixes one large module (`_pydecimal`) fills a third of a
# split, or a split has hardly a topic. This one keeps every split close to its share of the text,
# with topics in each, on Python 3.11, 3.12 and 3.13; chosen by sizes, before training any model.
_SPLIT_SALT = 911

# Folders of the standard library that hold installed packages, test code, or build data.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "lib-dynload",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)

# Extension modules without import side effects. Left out on purpose: those that wrap an optional
# system library (_ssl, _sqlite3, _tkinter, readline …), whose presence depends on the build.
_C_MODULES = """
_abc _asyncio _bisect _bz2 _collections _contextvars _csv _datetime _decimal _elementtree
_functools _heapq _imp _io _json _locale _lsprof _lzma _operator _pickle _queue _random _signal
_socket _sre _statistics _string _struct _symtable _thread _tracemalloc _warnings _weakref
_zoneinfo array atexit binascii builtins cmath errno faulthandler fcntl gc itertools marshal math
mmap posix pwd pyexpat resource select sys syslog termios time unicodedata zlib
"""


@dataclass(frozen=True)
class Document:
    """One topic or one module: its name (`topic:with`, `module:json.decoder`), split and text."""

    name: str
    split: Split
    text: str


@dataclass(frozen=True)
class SplitSize:
    """Number of documents of a split and their length in UTF-8 bytes."""

    documents: int
    bytes: int


@dataclass(frozen=True)
class XzBaseline:
    """What `xz -9e` needs for the validation text, in bits per byte of that text.

    `alone` compresses only the validation text; `with_prefix` is the growth of the compressed
    training text when the validation text is appended to it (the 64 MiB dictionary of preset 9
    reaches over all of it).
    """

    alone: float
    with_prefix: float


def documents(split: Split) -> Iterator[str]:
    """Yield the texts of one split, ordered by document name."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    return (document.text for document in _corpus() if document.split == split)


def sizes() -> dict[Split, SplitSize]:
    """Return the number of documents and of UTF-8 bytes per split."""
    result: dict[Split, SplitSize] = {}
    for split in SPLITS:
        lengths = [len(text.encode()) for text in documents(split)]
        result[split] = SplitSize(len(lengths), sum(lengths))
    return result


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """Return the sha256 (hex) over name, split and text of every document of every split."""
    digest = hashlib.sha256()
    for document in _corpus():
        for part in (document.name, document.split, document.text):
            encoded = part.encode()
            # The length in front keeps the boundary between two parts from moving unnoticed.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def xz_bits_per_byte() -> XzBaseline:
    """Measure `xz -9e` on the validation text, alone and after the training text (about 4 s)."""
    train = _joined("train")
    validation = _joined("validation")
    bits = 8 / len(validation)
    prefix_bytes = _xz_bytes(train)
    return XzBaseline(
        alone=_xz_bytes(validation) * bits,
        with_prefix=(_xz_bytes(train + validation) - prefix_bytes) * bits,
    )


def _joined(split: Split) -> bytes:
    return "".join(text + "\n" for text in documents(split)).encode()


def _xz_bytes(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


@lru_cache(maxsize=1)
def _corpus() -> tuple[Document, ...]:
    """Read, split and deduplicate everything; documents come ordered by split, then by name."""
    raw = {f"topic:{name}": [text] for name, text in _topics()}
    raw |= {f"module:{name}": docstrings for name, docstrings in _python_modules()}
    raw |= {f"module:{name}": docstrings for name, docstrings in _c_modules()}
    seen: set[str] = set()
    result: list[Document] = []
    for split in SPLITS:
        for name in sorted(name for name in raw if split_of(name) == split):
            text = _without_repetitions(raw[name], seen)
            if text:
                result.append(Document(name, split, text))
    return tuple(result)


def split_of(name: str) -> Split:
    """The split of a document, by its name alone (`module:json.decoder`)."""
    kind, _, path = name.partition(":")
    family = ".".join(part.removeprefix("_py").lstrip("_") for part in path.split("."))
    digest = hashlib.sha256(f"{_SPLIT_SALT}{kind}:{family}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, bound in _SPLIT_BOUNDS.items() if position < bound)


def _without_repetitions(docstrings: list[str], seen: set[str]) -> str:
    """Join docstrings, leaving out paragraphs whose text is in `seen`; adds the others to it."""
    kept: list[str] = []
    for docstring in docstrings:
        # `replace` turns the lone surrogates of a few docstrings into "?": the text must be UTF-8.
        lines = docstring.encode("utf-8", "replace").decode().splitlines()
        for paragraph in "\n".join(line.rstrip() for line in lines).split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from topics.items()


def python_sources() -> Iterator[tuple[str, bytes]]:
    """Yield name and source of the standard library's Python modules, in no fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        # `config-3.11-x86_64-linux-gnu` and `_sysconfigdata_…` describe one machine's build.
        generated = parts[0].startswith("config-") or parts[-1].startswith("_sysconfigdata")
        if generated or not _SKIPPED_FOLDERS.isdisjoint(parts):
            continue
        yield ".".join(parts).removesuffix(".__init__"), path.read_bytes()


def parse(source: bytes) -> ast.Module:
    """Parse a source; one that this Python cannot parse (a template, a broken file) is empty."""
    try:
        with warnings.catch_warnings():
            # Old sources hold invalid escapes, about which the parser warns.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _python_modules() -> Iterator[tuple[str, list[str]]]:
    for name, source in python_sources():
        docstrings = _docstrings(source)
        if docstrings:
            yield name, docstrings


def _docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and functions in source order."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append(docstring)
        # Only statements can hold definitions; walking expressions too would take twice the time.
        for field in ("body", "handlers", "orelse", "finalbody"):
            for child in getattr(node, field, ()):
                if isinstance(child, ast.stmt | ast.ExceptHandler):
                    visit(child)

    visit(parse(source))
    return found


def _c_modules() -> Iterator[tuple[str, list[str]]]:
    for name in _C_MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # not on this platform, or not built
            continue
        docstrings = list(_runtime_docstrings(module))
        if docstrings:
            yield name, docstrings


# Of an extension module only what C defines is read: a debugger or `site` may have put Python
# objects (`builtins.exit`, a patched `open`) in their place, and the text must not follow that.
_C_CALLABLES = (
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


def _runtime_docstrings(namespace: types.ModuleType | type) -> Iterator[str]:
    """Yield the docstrings of a C module or class and of its members, ordered by member name."""
    members = vars(namespace)
    if isinstance(members.get("__doc__"), str):
        yield inspect.cleandoc(members["__doc__"])
    for _, member in sorted(members.items()):
        if isinstance(member, type) and isinstance(namespace, types.ModuleType):
            yield from _runtime_docstrings(member)
        elif isinstance(member, _C_CALLABLES) and member.__doc__:
            yield inspect.cleandoc(member.__doc__)
