"""Text sources: which files are read, how they become documents, how they are split.

==================  ==============================================================
.jsonl, .ndjson     one JSON object per line, its text under ``text.column``
.json               the same, or one array of such objects
.parquet            rows with a string column ``text.column``
anything else       UTF-8 text, one contiguous document
==================  ==============================================================

All readers stream: memory does not grow with the file (an array in .json is the exception). The
training and validation shares of one file are fixed by the file alone: a record goes by the hash
of its text, so a repeated record cannot be trained on and validated on; of a text file every k-th
piece is held out, cut at line ends.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qat.errors import UserError, nearest

Split = Literal["train", "validation"]

_CHUNK = 1 << 16
# A validation piece is long enough for context, and a small file still gets two of them.
_PIECE_MIN, _PIECE_MAX = 256, 8192


@dataclass(frozen=True)
class TextConfig:
    """Reading and packing of the text."""

    seq_len: int = 512
    """Tokens of one block."""
    column: str = "text"
    """Column (key) with the text, in JSON and parquet files."""
    validation: str | None = None
    """File with the validation text; null holds out a share of data."""
    validation_fraction: float = 0.02
    """Share of data that is held out for validation, when text.validation is null."""
    max_train_tokens: int | None = None
    """Read no more training tokens than this; null reads all."""
    max_validation_tokens: int = 131072
    """Read no more validation tokens than this."""
    cache_dir: str | None = None
    """Folder of the token caches; null takes $XDG_CACHE_HOME/qat-lightning (~/.cache)."""

    def __post_init__(self) -> None:
        """Raise ValueError for values out of range."""
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len}: at least 2")
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: above 0 and at most 0.5"
            )
        if self.max_train_tokens is not None and self.max_train_tokens < self.seq_len:
            raise ValueError(
                f"max_train_tokens={self.max_train_tokens}: at least seq_len={self.seq_len}"
            )
        if self.max_validation_tokens < 2:
            raise ValueError(f"max_validation_tokens={self.max_validation_tokens}: at least 2")


class Piece(NamedTuple):
    """A stretch of a document; a short document is one piece."""

    text: str
    ends: bool = True
    """The document ends here."""
    complete: bool = True
    """Where it ends, its author ended it (a cut made by the split gets no end-of-text token)."""


def cache_dir(config: TextConfig) -> Path:
    """The folder of the token caches."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qat-lightning"


def text_file(name: str, key: str = "data") -> Path:
    """The absolute path of a text source.

    Args:
        name: what the user wrote.
        key: the configuration key, for the message.

    Raises:
        UserError: missing (the nearest name in the folder is given), a directory, or empty.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{key}={name}: {_why_missing(path, name)}")
    if not path.is_file():
        raise UserError(f"{key}={name}: a directory; give one text, .jsonl or .parquet file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}={name}: no permission to read this file; change its mode")
    if path.stat().st_size == 0:
        raise UserError(f"{key}={name}: the file is empty; give a file with text")
    return path.resolve()


def _why_missing(path: Path, name: str) -> str:
    if path.parent.is_dir():
        near = nearest(path.name, (p.name for p in path.parent.iterdir()))
        if near:
            return f"no such file. Did you mean '{path.parent / near}'?"
    if name.count("/") == 1 and not path.suffix and not name.startswith((".", "~", "/")):
        return (
            "no such file. This looks like the name of a Hub dataset; download it first and give "
            "a local text, .jsonl or .parquet file"
        )
    return "no such file. Give a local text, .jsonl or .parquet file, or demo"


def read(
    path: Path, config: TextConfig, split: Split | None = None, key: str = "data"
) -> Iterator[Piece]:
    """Stream the documents of a file.

    Args:
        path: see `text_file`.
        config: column and validation fraction.
        split: a share of the file, or None for all of it.
        key: the configuration key of the file, for messages.

    Raises:
        UserError: naming file and line: undecodable bytes, malformed JSON, no such column, a
            column that is not text.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".json", ".parquet"):
        yield from _text_pieces(path, config.validation_fraction, split, key)
        return
    reader = _parquet if suffix == ".parquet" else _json
    for text in reader(path, config.column, key):
        if text.strip() and (split is None or split == hash_split(text, config)):
            yield Piece(text)


def hash_split(text: str, config: TextConfig) -> Split:
    """The share that a record belongs to, by its text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return "validation" if share < config.validation_fraction else "train"


# --- text files


def _lines(path: Path, key: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each line; a line above 64 KiB comes in several parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    number, offset = 1, 0
    with path.open("rb") as file:
        while True:
            chunk = file.readline(_CHUNK)
            pending = decoder.getstate()[0]
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                byte = (pending + chunk)[error.start]
                raise UserError(
                    f"{key}={path}: line {number}, byte {offset - len(pending) + error.start}: "
                    f"0x{byte:02x} is not valid UTF-8. Convert the file, for example with "
                    "`iconv -f LATIN1 -t UTF-8`"
                ) from None
            if not chunk:
                return
            if offset == 0:
                text = text.removeprefix("\ufeff")
            if text:
                yield number, text.replace("\r\n", "\n")
            offset += len(chunk)
            number += chunk.endswith(b"\n")


def _text_pieces(path: Path, fraction: float, split: Split | None, key: str) -> Iterator[Piece]:
    if split is None:
        # documents are long: one piece is what the tokenizer gets at once
        yield from _close(_cut(path, _CHUNK, key))
        return
    every = max(2, round(1 / fraction))
    size = path.stat().st_size / every / 2
    length = int(min(max(size, _PIECE_MIN), _PIECE_MAX))
    run: list[str] = []
    for index, text in enumerate(_cut(path, length, key)):
        held_out = index % every == every // 2
        if held_out == (split == "validation"):
            if run:
                yield Piece("".join(run), ends=False)
                run = []
            run.append(text)
        elif run:
            yield Piece("".join(run), ends=True, complete=False)
            run = []
    if run:
        yield Piece("".join(run))


def _cut(path: Path, length: int, key: str) -> Iterator[str]:
    """The file in pieces of at least ``length`` characters, cut at line ends."""
    parts: list[str] = []
    size = 0
    blank = True
    for _, text in _lines(path, key):
        parts.append(text)
        size += len(text)
        blank = blank and not text.strip()
        if size >= length and not blank and (text.endswith("\n") or size >= length + _CHUNK):
            yield "".join(parts)
            parts, size, blank = [], 0, True
    if parts and not blank:
        yield "".join(parts)


def _close(pieces: Iterator[str]) -> Iterator[Piece]:
    """One document out of all pieces."""
    last: str | None = None
    for text in pieces:
        if last is not None:
            yield Piece(last, ends=False)
        last = text
    if last is not None:
        yield Piece(last)


# --- records


def _json(path: Path, column: str, key: str) -> Iterator[str]:
    # The json module instead of datasets' reader, which does not say in which line it stumbled.
    if path.suffix.lower() == ".json" and _first_character(path) == "[":
        yield from _json_array(path, column, key)
        return
    parts: list[str] = []
    for number, text in _lines(path, key):
        parts.append(text)
        if text.endswith("\n"):
            yield from _json_line("".join(parts), column, f"{key}={path}: line {number}")
            parts = []
    if parts:
        yield from _json_line("".join(parts), column, f"{key}={path}: line {number}")


def _first_character(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(1024).decode("utf-8-sig", "replace").lstrip()[:1]


def _json_array(path: Path, column: str, key: str) -> Iterator[str]:
    try:
        rows = json.loads("".join(text for _, text in _lines(path, key)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}={path}: line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        ) from None
    for index, row in enumerate(rows):
        yield _field(row, column, f"{key}={path}: element {index}")


def _json_line(line: str, column: str, where: str) -> Iterator[str]:
    if not line.strip():
        return
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}, column {error.colno}: not valid JSON ({error.msg}). Each line must hold "
            "one object"
        ) from None
    yield _field(row, column, where)


def _field(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(
            f'{where}: holds {type(row).__name__}, not an object such as {{"{column}": "..."}}'
        )
    if column not in row:
        raise UserError(f"{where}: {_no_column(column, list(row))}")
    value = row[column]
    if not isinstance(value, str):
        raise UserError(
            f"{where}: column '{column}' holds {type(value).__name__}, not text. Name another "
            "one with text.column=, or remove the row"
        )
    return value


def _no_column(column: str, present: list[str]) -> str:
    near = nearest(column, present)
    hint = f" Did you mean '{near}'?" if near else ""
    return (
        f"no column '{column}'. Columns: {', '.join(present) or 'none'}.{hint} "
        "Name one with text.column="
    )


def _parquet(path: Path, column: str, key: str) -> Iterator[str]:
    # imported here: datasets takes a second to import, and text files do not need it
    import pyarrow
    from datasets import load_dataset
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{key}={path}: not a parquet file ({error})") from None
    if column not in schema.names:
        raise UserError(f"{key}={path}: {_no_column(column, schema.names)}")
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        texts = [f.name for f in schema if pyarrow.types.is_string(f.type)]
        raise UserError(
            f"{key}={path}: column '{column}' holds {kind}, not text. Columns with text: "
            f"{', '.join(texts) or 'none'}. Name one with text.column="
        )
    rows = load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True, columns=[column]
    )
    try:
        for index, row in enumerate(rows):
            yield _field(row, column, f"{key}={path}: row {index}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{key}={path}: damaged parquet file ({error})") from None
