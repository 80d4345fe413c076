import json

import pyarrow
import pytest
from omegaconf import OmegaConf
from pyarrow import parquet

from qat.chat_config import ChatConfig
from qat.chat_rows import RowError, find_format, messages_of, read_conversations
from qat.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
ROWS = {
    "messages": {"messages": TURNS, "id": 1},
    "sharegpt": {"conversations": SHARED},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
}


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith("array.json"):
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


def test_config():
    tree = OmegaConf.merge(OmegaConf.structured(ChatConfig), OmegaConf.create({"system": "s"}))
    assert OmegaConf.to_object(tree) == ChatConfig(system="s")
    for values in ({"max_bad_rows": 1.5}, {"prompt_column": ""}, {"completion_column": "prompt"}):
        with pytest.raises(ValueError, match=next(iter(values))):
            ChatConfig(**values)


@pytest.mark.parametrize("form", sorted(ROWS))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "array.json", "a.parquet"])
def test_every_form_from_every_file(tmp_path, form, name):
    path = write(tmp_path / name, [ROWS[form]] * 2)
    assert find_format(path, ChatConfig(), "text") == form
    items = list(read_conversations(path, form, ChatConfig()))
    assert [item.messages for item in items] == [TURNS, TURNS]
    places = {"a.parquet": ["row 0", "row 1"], "array.json": ["element 0", "element 1"]}
    assert [item.where for item in items] == places.get(name, ["line 1", "line 2"])


@pytest.mark.parametrize(
    ("row", "config", "form"),
    [
        ({"conversations": TURNS}, {}, "messages"),
        ({"messages": SHARED}, {}, "sharegpt"),
        ({"talk": TURNS}, {"messages_column": "talk"}, "messages"),
        (
            {"question": "q", "answer": "a", "messages": TURNS},
            {"prompt_column": "question", "completion_column": "answer"},
            "prompt_completion",
        ),
        ({"text": "x", "id": 3}, {}, "text"),
        ({"text": "x", **ROWS["messages"]}, {}, "messages"),
    ],
)
def test_auto_goes_by_the_columns(tmp_path, row, config, form):
    path = write(tmp_path / "a.jsonl", [row])
    assert find_format(path, ChatConfig(**config), "text") == form
    if form != "text":
        (item,) = read_conversations(path, form, ChatConfig(**config))
        assert item.messages == TURNS


def test_auto_reads_past_bad_first_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{oops\n[]\n{"messages": null}\n' + json.dumps(ROWS["sharegpt"]) + "\n")
    assert find_format(path, ChatConfig(), "text") == "sharegpt"


def test_unknown_columns_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"promt": "q", "reply": "a"}, {"extra": 1}])
    match = r"has the columns promt, reply, extra; known are.*Did you mean 'promt'.*chat\.prompt_c"
    with pytest.raises(UserError, match=match):
        find_format(path, ChatConfig(), "text")
    with pytest.raises(UserError, match="line 1: holds list, not an object"):
        find_format(write(tmp_path / "b.jsonl", [[1]]), ChatConfig(), "text")


def test_text_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert find_format(path, ChatConfig(), "text") == "text"
    with pytest.raises(UserError, match=r"chat\.format=alpaca: .* is read as one text"):
        find_format(path, ChatConfig(format="alpaca"), "text")


def test_details_of_the_forms():
    config = ChatConfig()
    alpaca = messages_of({"instruction": "q", "input": "i", "output": "a"}, "alpaca", config)
    assert alpaca[0]["content"] == "q\n\ni"
    assert (
        messages_of({"instruction": "q", "input": None, "output": "a"}, "alpaca", config) == TURNS
    )
    with_system = [SYSTEM, *TURNS]
    assert messages_of({"system": "s", **ROWS["sharegpt"]}, "sharegpt", config) == with_system
    asked = ChatConfig(system="s")
    assert messages_of(ROWS["alpaca"], "alpaca", asked) == with_system
    own = {"messages": [{"role": "system", "content": ""}, *TURNS]}
    assert messages_of(own, "messages", asked) == own["messages"]


def listed(*turns):
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("form", "row", "match"),
    [
        ("messages", [], "holds list, not an object"),
        ("messages", {"message": TURNS}, "no column 'messages'. Columns: message. Did you mean"),
        ("messages", {"messages": "x"}, "column 'messages' holds str, not a list"),
        ("messages", {"messages": None}, "column 'messages' holds null"),
        ("messages", listed(), "holds no message"),
        ("messages", listed("x"), "message 0 is str, not an object"),
        ("messages", listed({"role": "user"}), "message 0 has no 'content'; its keys: role"),
        ("messages", listed({"role": "robot", "content": "x"}), "role 'robot' is unknown; known"),
        ("messages", listed({"role": ["user"], "content": "x"}), "is unknown"),
        ("messages", listed({"role": "user", "content": ["x"]}), "'content' holds list, not text"),
        ("messages", listed(TURNS[0]), "no assistant turn"),
        ("messages", listed({**TURNS[1], "content": " \n"}), "message 0: the assistant's text is"),
        ("messages", listed({**TURNS[1], "tool_calls": [1]}), "has 'tool_calls', which is not"),
        ("messages", listed({**TURNS[1], "content": "\ud800"}), "half of a surrogate pair"),
        ("sharegpt", {"conversations": [{"from": "tool", "value": "x"}]}, "role 'tool' is unknown"),
        ("sharegpt", {"conversations": [{"role": "user", "content": "x"}]}, "has no 'from'"),
        ("alpaca", {"instruction": "q"}, "no column 'output'"),
        ("alpaca", {"instruction": "q", "output": 3}, "column 'output' holds int, not text"),
        ("alpaca", {"instruction": "q", "output": "a", "input": 3}, "column 'input' holds int"),
        ("prompt_completion", {"prompt": "q", "completion": ""}, "text is empty"),
        ("prompt_completion", {"prompt": None, "completion": "a"}, "column 'prompt' holds null"),
    ],
)
def test_rows_that_do_not_fit(form, row, match):
    with pytest.raises(RowError, match=match):
        messages_of(row, form, ChatConfig())


def test_broken_lines_are_items_with_their_line(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS["messages"]).encode()
    deep = b"[" * 200_000
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, b"{oops}", b"", b'{"\xe9": 1}', deep, good])
    )
    items = list(read_conversations(path, "messages", ChatConfig()))
    assert [item.where for item in items] == ["line 1", "line 2", "line 4", "line 5", "line 6"]
    assert [item.messages for item in items] == [TURNS, None, None, None, TURNS]
    assert "column 2: not valid JSON" in items[1].reason
    assert "byte 2 is not valid UTF-8" in items[2].reason
    assert items[3].reason


def test_files_that_cannot_be_read_at_all(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"a": 1},\n{"a": }]')
    with pytest.raises(UserError, match=r"data=.*a\.json: line 3, column 7: not valid JSON"):
        list(read_conversations(path, "messages", ChatConfig()))
    path = tmp_path / "a.parquet"
    path.write_text("text")
    with pytest.raises(UserError, match="damaged parquet file"):
        list(read_conversations(path, "messages", ChatConfig()))
