"""Rows of instruction files as conversations, in the five forms that data sets come in.

=================  =============================================================================
messages           ``messages``: a list of {"role", "content"}, roles system, user, assistant
sharegpt           ``conversations``: a list of {"from", "value"}, human and gpt for the roles
alpaca             ``instruction``, ``output``, and an ``input`` that may be absent or empty
prompt_completion  two text columns, named by chat.prompt_column and chat.completion_column
text               read by `qat.text`, with a loss on all tokens
=================  =============================================================================

The last forms but text may have a text column ``system``. A row that does not fit is no error
here: it comes out with the reason, and who reads the rows counts them. All readers stream (an
array in .json is the exception).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qat.chat_config import ChatConfig, Format
from qat.errors import UserError, did_you_mean

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

ROLES = ("system", "user", "assistant")

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}
# What a message may carry beside its text. Dropped silently, the model would learn another task.
_UNSUPPORTED = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
)
_RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
_SAMPLE_ROWS = 20
_PEEK_ROWS = 1000


class RowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Item:
    """One row."""

    where: str
    """Such as ``line 3``."""
    messages: list[Message] | None
    """The conversation, or None."""
    reason: str = ""
    """Why there is none."""


def read_conversations(
    path: Path, form: Format, config: ChatConfig, key: str = "data"
) -> Iterator[Item]:
    """Stream the conversations of a file.

    Args:
        path: a JSON-lines, JSON or parquet file.
        form: of the rows, from `find_format`; not text.
        config: column names and the system message.
        key: the configuration key of the file, for messages.

    Raises:
        UserError: a .json array or a parquet file that cannot be read at all.
    """
    for where, row in _rows(path, key):
        try:
            if isinstance(row, RowError):
                raise row
            yield Item(where, messages_of(row, form, config))
        except RowError as error:
            yield Item(where, None, str(error))


def find_format(path: Path, config: ChatConfig, text_column: str, key: str = "data") -> Format:
    """The form of a file's rows.

    Args:
        path: of the file.
        config: with ``format=auto`` the columns of the first rows decide, in the order of the
            module's table, and prompt_completion comes first where its columns are named.
        text_column: column that makes it text.
        key: the configuration key of the file, for messages.

    Raises:
        UserError: no form has these columns, or the form asked for needs another kind of file.
    """
    records = path.suffix.lower() in _RECORDS
    if config.format != "auto":
        if not records and config.format != "text":
            raise UserError(
                f"chat.format={config.format}: {key}={path} is read as one text. Give a .jsonl, "
                ".json or .parquet file"
            )
        return config.format
    if not records:
        return "text"
    good, reasons = [], []
    for where, row in islice(_rows(path, key), _PEEK_ROWS):
        if isinstance(row, dict):
            good.append(row)
        else:
            reasons.append(f"{where}: {row if isinstance(row, RowError) else _not_object(row)}")
        if len(good) == _SAMPLE_ROWS:
            break
    if not good:
        problem = reasons[0] if reasons else "no row in it"
        raise UserError(f"{key}={path}: {problem}. Each row must be one object")
    columns = list(dict.fromkeys(name for row in good for name in row))
    form = _guess(good, columns, config, text_column)
    if form is None:
        raise UserError(_no_format(path, key, columns, config, text_column))
    return form


def _guess(
    rows: list[dict[str, Any]], columns: list[str], config: ChatConfig, text_column: str
) -> Format | None:
    pair = {config.prompt_column, config.completion_column} <= set(columns)
    if pair and config.names_prompt:
        return "prompt_completion"
    for row in rows:
        turns = row.get(_messages_column(row, config))
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            return "sharegpt" if "from" in turns[0] else "messages"
    column = _messages_column(columns, config)
    if column in columns:
        return "sharegpt" if column == "conversations" else "messages"
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if pair:
        return "prompt_completion"
    return "text" if text_column in columns else None


def _no_format(
    path: Path, key: str, columns: list[str], config: ChatConfig, text_column: str
) -> str:
    wanted = [config.messages_column, "conversations", "instruction", config.prompt_column]
    wanted += [config.completion_column, "output", text_column]
    hints = [did_you_mean(name, columns) for name in dict.fromkeys(wanted) if name not in columns]
    hint = next((hint for hint in hints if hint), "")
    return (
        f"chat.format=auto: {key}={path} has the columns {', '.join(columns) or '(none)'}; known "
        f"are {config.messages_column} or conversations, instruction and output, "
        f"{config.prompt_column} and {config.completion_column}, {text_column}.{hint} Name yours "
        "with chat.messages_column=, or chat.prompt_column= and chat.completion_column=, or "
        "text.column="
    )


# --- rows


def _rows(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    """Place and value of each row; a value that cannot be read is a RowError."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path, key)
    elif suffix == ".json" and _is_array(path):
        yield from _array_rows(path, key)
    else:
        yield from _line_rows(path)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not line.strip():
                continue
            yield f"line {number}", _loads(line)


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RowError(f"byte {error.start} is not valid UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"column {error.colno}: not valid JSON ({error.msg})")
    except RecursionError:
        return RowError("JSON nested too deeply")


def _array_rows(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path}: byte {error.start} is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{key}={path}: line {error.lineno}, column {error.colno}: not valid JSON "
            f"({error.msg}). An array is read as a whole; in a .jsonl file such a row is left out "
            "and reported"
        ) from None
    for index, row in enumerate(rows):
        yield f"element {index}", row


def _parquet_rows(path: Path, key: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield f"row {index}", row
                    index += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{key}={path}: damaged parquet file, or none at all ({error})") from None


# --- one row


def messages_of(row: Any, form: Format, config: ChatConfig) -> list[Message]:
    """The conversation of a row.

    Raises:
        RowError: the row does not fit the form, or has no assistant turn, or an empty one.
    """
    if not isinstance(row, dict):
        raise RowError(_not_object(row))
    if form in ("messages", "sharegpt"):
        messages = _listed(row, form, config)
    elif form == "alpaca":
        extra = row.get("input")
        prompt = _text(row, "instruction")
        if extra is not None and _text(row, "input").strip():
            prompt = f"{prompt}\n\n{extra}"
        messages = [_message("user", prompt), _message("assistant", _text(row, "output"))]
    else:
        prompt = _text(row, config.prompt_column)
        answer = _text(row, config.completion_column)
        messages = [_message("user", prompt), _message("assistant", answer)]
    if form != "messages" and row.get("system") is not None and messages[0]["role"] != "system":
        messages.insert(0, _message("system", _text(row, "system")))
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, _message("system", config.system))
    _check(messages)
    return messages


def _listed(row: dict[str, Any], form: Format, config: ChatConfig) -> list[Message]:
    column = _messages_column(row, config)
    turns = _value(row, column)
    if not isinstance(turns, list):
        raise RowError(f"column '{column}' holds {_kind(turns)}, not a list of messages")
    if not turns:
        raise RowError(f"column '{column}' holds no message")
    role_key, text_key = ("from", "value") if form == "sharegpt" else ("role", "content")
    messages = []
    for index, turn in enumerate(turns):
        place = f"message {index}"
        if not isinstance(turn, dict):
            raise RowError(f"{place} is {_kind(turn)}, not an object")
        for name in _UNSUPPORTED:
            if turn.get(name):
                raise RowError(f"{place} has '{name}', which is not supported")
        for name in (role_key, text_key):
            if name not in turn:
                raise RowError(f"{place} has no '{name}'; its keys: {', '.join(turn) or 'none'}")
        role = turn[role_key]
        known = _SHAREGPT_ROLES if form == "sharegpt" else {name: name for name in ROLES}
        if not isinstance(role, str) or role not in known:
            raise RowError(f"{place}: role {role!r} is unknown; known are {', '.join(known)}")
        if not isinstance(turn[text_key], str):
            raise RowError(f"{place}: '{text_key}' holds {_kind(turn[text_key])}, not text")
        messages.append(_message(known[role], turn[text_key]))
    return messages


def _check(messages: list[Message]) -> None:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant turn, so there is nothing to learn")
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise RowError("half of a surrogate pair (\\ud800 to \\udfff) is no text") from None
    for index in answers:
        if not messages[index]["content"].strip():
            raise RowError(f"message {index}: the assistant's text is empty")


def _messages_column(columns: Any, config: ChatConfig) -> str:
    column = config.messages_column
    if column == "messages" and column not in columns and "conversations" in columns:
        return "conversations"
    return column


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise RowError(
            f"no column '{column}'. Columns: {', '.join(row) or 'none'}.{did_you_mean(column, row)}"
        )
    return row[column]


def _text(row: dict[str, Any], column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise RowError(f"column '{column}' holds {_kind(value)}, not text")
    return value


def _not_object(row: Any) -> str:
    return f"holds {_kind(row)}, not an object"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
