"""Tokenizing once: a stream of documents becomes a memory-mapped file of tokens.

File layout, little-endian: a header (`_HEADER`), the tokens (uint16 for vocabularies up to 65536,
else uint32), zeros up to a multiple of 8 bytes; where only some tokens are trained on, a byte for
each token (1: it is to be predicted) and zeros again; int64 [D + 1]: where each document starts,
and the number of tokens at the end; a JSON object with what the builder has to say. Header and
file agree in length and CRC, so a damaged file is noticed and written anew. Files appear under
their name by a rename: any number of processes may build the same one, the last one wins, and all
of them have written the same bytes.
"""

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qat.errors import UserError
from qat.text import Piece, Split, TextConfig, cache_dir, read, text_file

_VERSION = 2  # raise it when the same text would give other tokens
_MAGIC = b"QATTOKEN"
# magic, tokens, documents, bytes per token, per target (0 or 1), of the JSON, CRC-32 of the rest
_HEADER = struct.Struct("<8sQQIIII")
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
    targets: NDArray[np.uint8] | None = None
    """uint8 [T], memory-mapped; 1 where the token is to be predicted. None: everywhere."""
    info: dict[str, Any] = field(default_factory=dict)
    """JSON values that the builder left, see `qat.chat`; empty for text."""

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
    target = store_path(folder, [identity, max_tokens], tokenizer)
    store = open_store(target)
    if store is None:
        with new_store(target, len(tokenizer)) as writer:
            for ids, ends in _encode(documents, tokenizer, name):
                full = max_tokens is not None and writer.total + len(ids) >= max_tokens
                writer.add(ids[: max_tokens - writer.total] if full and max_tokens else ids)
                if ends or full:
                    writer.end_document()
                if full:
                    break
        store = open_store(target)
        assert store is not None
    return store


def store_path(folder: Path, identity: list[Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    """The cache file of the documents that ``identity`` (JSON values) names."""
    parts = [_VERSION, identity, _tokenizer_hash(tokenizer)]
    return folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.tokens"


@contextmanager
def new_store(path: Path, vocabulary: int, targets: bool = False) -> Iterator["StoreWriter"]:
    """A writer whose file appears under its name when the block ends without an error.

    Args:
        path: see `store_path`; its folder is made.
        vocabulary: number of tokens, from which their width follows.
        targets: whether there is a byte for each token.

    Raises:
        NoTextError: there is no document.
        UserError: the folder cannot be written.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.stem}.")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"text.cache_dir={folder}: cannot be written ({error.strerror}). Give another "
            "folder with text.cache_dir="
        ) from None
    try:
        with (
            os.fdopen(handle, "w+b") as file,
            tempfile.TemporaryFile() as offsets,
            tempfile.TemporaryFile() as spool,
        ):
            writer = StoreWriter(file, vocabulary, offsets, spool if targets else None)
            yield writer
            writer.finish()
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # set by calls, not part of the tokenizer
    state.pop("truncation", None)
    state.pop("padding", None)
    special = [tokenizer.bos_token_id if adds_bos(tokenizer) else None, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def adds_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself begins a text with its bos token."""
    # asked by example: add_bos_token is an attribute of some tokenizer classes only
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode(
    documents: Iterable[Piece | str], tokenizer: PreTrainedTokenizerFast, name: str
) -> Iterator[tuple[list[int], bool]]:
    """Token ids of each piece, and whether the document ends with it."""
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
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


class StoreWriter:
    """Writes the file of one store, in constant memory; see the module docstring."""

    def __init__(
        self, file: IO[bytes], vocabulary: int, offsets: IO[bytes], targets: IO[bytes] | None
    ) -> None:
        self.total = 0
        """Tokens written."""
        self.documents = 0
        """Documents ended."""
        self.info: dict[str, Any] = {}
        """Stored beside the tokens."""
        self._file = file
        self._dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self._start = 0
        self._checksum = 0
        # temporary files of what follows the tokens
        self._targets, self._offsets = targets, offsets
        file.write(bytes(_HEADER.size))

    def add(self, ids: Any, targets: NDArray[np.uint8] | None = None) -> None:
        """Append tokens to the document, with as many targets if the store has them."""
        raw = np.asarray(ids, self._dtype)
        self._append(raw.tobytes())
        self.total += len(raw)
        if self._targets is not None:
            assert targets is not None
            assert len(targets) == len(raw)
            self._targets.write(targets.astype(np.uint8).tobytes())

    def end_document(self) -> None:
        """The document ends; one without tokens is none."""
        if self.total > self._start:
            self._offsets.write(struct.pack("<q", self._start))
            self.documents, self._start = self.documents + 1, self.total

    def finish(self) -> None:
        """Complete the file.

        Raises:
            NoTextError: there is no document.
        """
        self.end_document()  # where the stream broke off within one
        if self.documents == 0:
            raise NoTextError("no document to tokenize")
        self._offsets.write(struct.pack("<q", self.total))
        info = json.dumps(self.info).encode()
        self._align()
        if self._targets is not None:
            self._copy(self._targets)
            self._align()
        self._copy(self._offsets)
        self._append(info)
        self._file.seek(0)
        width, flag = self._dtype.itemsize, int(self._targets is not None)
        sizes = (self.total, self.documents, width, flag, len(info))
        self._file.write(_HEADER.pack(_MAGIC, *sizes, self._checksum))

    def _append(self, raw: bytes) -> None:
        self._checksum = zlib.crc32(raw, self._checksum)
        self._file.write(raw)

    def _align(self) -> None:
        self._append(bytes(-self._file.tell() % 8))

    def _copy(self, spool: IO[bytes]) -> None:
        spool.seek(0)
        while chunk := spool.read(_COPY):
            self._append(chunk)


def open_store(path: Path) -> TokenStore | None:
    """The store in a file; None when there is none, or a damaged one."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            magic, total, documents, width, flag, info_size, expected = _HEADER.unpack(header)
            targets_at = _aligned(_HEADER.size + total * width)
            offsets_at = targets_at + _aligned(total * flag)
            info_at = offsets_at + 8 * (documents + 1)
            known = magic == _MAGIC and width in (2, 4) and flag in (0, 1)
            if not known or os.fstat(file.fileno()).st_size != info_at + info_size:
                return None
            checksum = 0
            while chunk := file.read(_COPY):
                checksum = zlib.crc32(chunk, checksum)
            if checksum != expected:
                return None
            file.seek(info_at)
            info = json.loads(file.read())
            # from the open file: its name may already stand for another process's copy
            tokens = np.memmap(file, f"<u{width}", "r", _HEADER.size, (total,))
            targets = np.memmap(file, "u1", "r", targets_at, (total,)) if flag else None
            offsets = np.memmap(file, "<i8", "r", offsets_at, (documents + 1,))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return TokenStore(tokens, offsets, targets, info)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8
