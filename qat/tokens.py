"""Tokenizing once: a stream of documents becomes a memory-mapped file of tokens.

File layout, little-endian: a header (`_HEADER`), the tokens (uint16 for vocabularies up to 65536,
else uint32), zeros up to a multiple of 8 bytes, then int64 [D + 1]: where each document starts,
and the number of tokens at the end. Header and file agree in length and CRC, so a damaged file is
noticed and written anew. Files appear under their name by a rename: any number of processes may
build the same one, the last one wins, and all of them have written the same bytes.
"""

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qat.errors import UserError
from qat.text import Piece, Split, TextConfig, cache_dir, read, text_file

_VERSION = 1  # raise it when the same text would give other tokens
_MAGIC = b"QATTOKEN"
_HEADER = struct.Struct("<8sQQII")  # magic, tokens, documents, bytes per token, CRC-32 of the rest
_BATCH_CHARACTERS = 1 << 18
_COPY = 1 << 22


class NoTextError(UserError):
    """Nothing is left to tokenize."""


@dataclass(frozen=True)
class TokenStore:
    """Tokens of all documents, one after the other."""

    tokens: NDArray[Any]
    """uint16 or uint32 [T], memory-mapped."""
    offsets: NDArray[np.int64]
    """int64 [D + 1], memory-mapped; document d is ``tokens[offsets[d]:offsets[d + 1]]``."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1


def token_store(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    config: TextConfig,
    split: Split | None = None,
    key: str = "data",
    max_tokens: int | None = None,
) -> TokenStore:
    """The tokens of a text file, from the cache where it has them.

    Args:
        name: path of the file.
        tokenizer: a fast tokenizer.
        config: how to read.
        split: a share of the file, or None for all of it as contiguous text.
        key: the configuration key of the file, for messages.
        max_tokens: stop reading after so many.

    Raises:
        UserError: see `qat.text.read`; also when no document is left.
    """
    path = text_file(name, key)
    status = path.stat()
    identity = [str(path), status.st_size, status.st_mtime_ns, config.column, split]
    if split is not None:
        identity.append(config.validation_fraction)
    try:
        return tokenize_to_cache(
            read(path, config, split, key),
            tokenizer,
            identity,
            cache_dir(config),
            max_tokens,
            name,
        )
    except NoTextError:
        if split is None:
            raise NoTextError(f"{key}={name}: no text in it, only blanks") from None
        raise NoTextError(
            f"{key}={name}: too small, or of too few lines, to hold out "
            f"text.validation_fraction={config.validation_fraction}: the {split} share is empty. "
            "Give a separate file with text.validation=, or raise text.validation_fraction"
        ) from None


def tokenize_to_cache(
    documents: Iterable[Piece | str],
    tokenizer: PreTrainedTokenizerFast,
    identity: list[Any],
    folder: Path,
    max_tokens: int | None = None,
    name: str = "text",
) -> TokenStore:
    """Tokenize a stream in constant memory, or open what an earlier call left.

    A document gets the tokenizer's bos token if the tokenizer itself would add it, and its eos
    token, if it has one, where the document is complete.

    Args:
        documents: consumed only when the cache has nothing; a str is a whole document.
        tokenizer: a fast tokenizer.
        identity: JSON values that name the documents (path, size, time, split).
        folder: the cache.
        max_tokens: stop after so many.
        name: shown by the progress bar, which appears after two seconds.

    Raises:
        NoTextError: there is no document.
        UserError: the folder cannot be written.
    """
    parts = [_VERSION, identity, max_tokens, _tokenizer_hash(tokenizer)]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    target = folder / f"{key}.tokens"
    store = _open(target)
    if store is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(
                f"text.cache_dir={folder}: cannot be written ({error.strerror}). Give another "
                "folder with text.cache_dir="
            ) from None
        try:
            with os.fdopen(handle, "w+b") as file:
                _write(file, _encode(documents, tokenizer, name), len(tokenizer), max_tokens)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        store = _open(target)
        assert store is not None
    return store


def _tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # set by calls, not part of the tokenizer
    state.pop("truncation", None)
    state.pop("padding", None)
    special = [tokenizer.bos_token_id if _adds_bos(tokenizer) else None, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def _adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    # asked by example: add_bos_token is an attribute of some tokenizer classes only
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode(
    documents: Iterable[Piece | str], tokenizer: PreTrainedTokenizerFast, name: str
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each piece, and whether the document ends with it."""
    bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    starts = True
    with tqdm(desc=f"tokenize {name}", unit="tok", unit_scale=True, delay=2, leave=False) as bar:
        for batch in _batches(documents):
            encoded = tokenizer(
                [piece.text for piece in batch],
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,  # no remark on texts longer than the model's context
            )
            for piece, ids in zip(batch, encoded["input_ids"]):
                head = bos if starts else []
                tail = eos if piece.ends and piece.complete else []
                yield head + ids + tail, piece.ends
                starts = piece.ends
                bar.update(len(ids))


def _batches(documents: Iterable[Piece | str]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for document in documents:
        piece = Piece(document) if isinstance(document, str) else document
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    file: IO[bytes],
    pieces: Iterator[tuple[list[int], bool]],
    vocabulary: int,
    max_tokens: int | None,
) -> None:
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    total = documents = start = 0
    checksum = 0
    with tempfile.TemporaryFile() as spool:  # offsets, which follow the tokens
        file.write(bytes(_HEADER.size))
        for ids, ends in pieces:
            full = max_tokens is not None and total + len(ids) >= max_tokens
            raw = np.asarray(ids[: max_tokens - total] if full and max_tokens else ids, dtype)
            checksum = zlib.crc32(raw.tobytes(), checksum)
            file.write(raw.tobytes())
            total += len(raw)
            if (ends or full) and total > start:
                spool.write(struct.pack("<q", start))
                documents, start = documents + 1, total
            if full:
                break
        if start < total:  # the stream broke off within a document
            spool.write(struct.pack("<q", start))
            documents += 1
        if documents == 0:
            raise NoTextError("no document to tokenize")
        spool.write(struct.pack("<q", total))
        padding = bytes(-file.tell() % 8)
        checksum = zlib.crc32(padding, checksum)
        file.write(padding)
        spool.seek(0)
        while chunk := spool.read(_COPY):
            checksum = zlib.crc32(chunk, checksum)
            file.write(chunk)
    file.seek(0)
    file.write(_HEADER.pack(_MAGIC, total, documents, dtype.itemsize, checksum))


def _open(path: Path) -> TokenStore | None:
    """The store in a file; None when there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, total, documents, width, expected = _HEADER.unpack(header)
            offsets_at = -(-(_HEADER.size + total * width) // 8) * 8
            length = offsets_at + 8 * (documents + 1)
            if magic != _MAGIC or width not in (2, 4) or os.fstat(file.fileno()).st_size != length:
                return None
            checksum = 0
            while chunk := file.read(_COPY):
                checksum = zlib.crc32(chunk, checksum)
            if checksum != expected:
                return None
            # from the open file: its name may already stand for another process's copy
            tokens = np.memmap(file, f"<u{width}", "r", _HEADER.size, (total,))
            offsets = np.memmap(file, "<i8", "r", offsets_at, (documents + 1,))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return TokenStore(tokens, offsets)
