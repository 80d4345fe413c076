import json
import threading
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pytest
from omegaconf import OmegaConf
from pyarrow import parquet

from qat.errors import UserError
from qat.text import TextConfig, read, text_file
from qat.tokens import NoTextError, TokenStore, token_store, tokenize_to_cache
from tests.text_fixtures import BOS, EOS, byte_tokenizer, word_tokenizer

WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext-2" / "valid.txt"


@pytest.fixture
def config(tmp_path):
    return TextConfig(cache_dir=str(tmp_path / "cache"))


def store_of(name, config, split=None, tokenizer=None) -> TokenStore:
    return token_store(str(name), tokenizer or byte_tokenizer(), config, split)


def documents(store: TokenStore) -> list[str]:
    bounds = zip(store.offsets[:-1], store.offsets[1:])
    return [byte_tokenizer().decode(store.tokens[a:b].tolist()) for a, b in bounds]


def test_config_is_read_by_omegaconf():
    tree = OmegaConf.merge(OmegaConf.structured(TextConfig), OmegaConf.create({"seq_len": 8}))
    assert OmegaConf.to_object(tree) == TextConfig(seq_len=8)


@pytest.mark.parametrize(
    "values",
    [
        {"seq_len": 1},
        {"validation_fraction": 0.0},
        {"validation_fraction": 0.9},
        {"max_train_tokens": 3},
        {"max_validation_tokens": 0},
    ],
)
def test_config_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        TextConfig(**values)


def test_a_whole_text_file_is_one_document(tmp_path, config):
    path = tmp_path / "a.txt"
    text = "".join(f"line {i} äöü\r\n" for i in range(20_000))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    store = store_of(path, config)
    assert store.documents == 1
    assert documents(store) == [text.replace("\r\n", "\n") + "<eos>"]


@pytest.mark.parametrize("lines", [1_000, 4_000, 40_000])
def test_text_split_is_a_partition(tmp_path, config, lines):
    path = tmp_path / "a.txt"
    text = [f"line {i}\n" for i in range(lines)]
    path.write_text("".join(text))
    train, validation = (documents(store_of(path, config, s)) for s in ("train", "validation"))
    shares = ["".join(share).replace("<eos>", "").splitlines(True) for share in (train, validation)]
    assert sorted(shares[0] + shares[1]) == sorted(text)
    assert 0.01 < len(shares[1]) / lines < 0.04
    # only the true end of the text is an end to learn
    assert sum(d.endswith("<eos>") for d in train + validation) == 1


def test_record_split_keeps_repetitions_together(tmp_path):
    config = TextConfig(cache_dir=str(tmp_path / "cache"), validation_fraction=0.3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i % 50}"}) + "\n" for i in range(200)))
    train, validation = (documents(store_of(path, config, s)) for s in ("train", "validation"))
    assert len(train) + len(validation) == 200
    assert validation
    assert not set(train) & set(validation)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "array.json", "parquet"])
def test_records(tmp_path, config, suffix):
    texts = ["first", "zwei\nLinien", "日本"]
    path = tmp_path / f"a.{suffix}"
    rows = [{"id": i, "text": t} for i, t in enumerate([*texts, "  "])]
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "array.json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [p.text for p in read(path, config)] == texts


def test_bos_only_if_the_tokenizer_adds_it(tmp_path, config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "c"}\n')
    plain = store_of(path, config)
    with_bos = store_of(path, config, tokenizer=byte_tokenizer(bos=True))
    ids = byte_tokenizer()("abc")["input_ids"]
    assert plain.tokens.tolist() == [*ids[:2], EOS, ids[2], EOS]
    assert with_bos.tokens.tolist() == [BOS, *ids[:2], EOS, BOS, ids[2], EOS]
    assert with_bos.offsets.tolist() == [0, 4, 7]
    assert plain.tokens.dtype == np.uint16


# --- errors


def fails(match, path, config, split=None):
    with pytest.raises(UserError, match=match) as info:
        store_of(path, config, split)
    assert str(path) in str(info.value)
    assert not list(Path(config.cache_dir).glob(".*")), "temporary files are left"


def test_missing_file(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(UserError, match=r"Did you mean '.*train\.jsonl'"):
        text_file(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="Hub dataset"):
        text_file("nobody/nothing")
    with pytest.raises(UserError, match="directory"):
        text_file(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_empty_file(tmp_path, config, name):
    (tmp_path / name).touch()
    fails("empty", tmp_path / name, config)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "\n \n"), ("a.jsonl", '{"text": " "}')])
def test_blank_file(tmp_path, config, name, content):
    (tmp_path / name).write_text(content)
    fails("no text in it", tmp_path / name, config)


def test_too_small_to_split(tmp_path, config):
    (tmp_path / "a.txt").write_text("one line\n")
    fails(r"text\.validation=", tmp_path / "a.txt", config, "validation")


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b"ab\ncd\n\xff\n", 3, 6),
        (b"ab\n" + b"x" * 70_000 + b"\xe4x\n", 2, 70_003),
        # a character that the reading chunk cuts, and a truncated one at the end of the file
        (b"x" * 65_535 + b"\xc3x\n", 1, 65_535),
        (b"ab\n\xe2\x82", 2, 3),
    ],
)
def test_undecodable_bytes(tmp_path, config, content, line, byte):
    (tmp_path / "a.txt").write_bytes(content)
    fails(rf"line {line}, byte {byte}: 0x", tmp_path / "a.txt", config)


def test_undecodable_json_line(tmp_path, config):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ab"}\n{"text": "\xe9"}\n')
    fails(r"line 2, byte 25: 0xe9", tmp_path / "a.jsonl", config)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{oops}", "line 2, column 2: not valid JSON"),
        ('{"texts": "b"}', "line 2: no column 'text'. Columns: texts. Did you mean 'texts'"),
        ('{"text": 3}', "line 2: column 'text' holds int"),
        ('{"text": null}', "line 2: column 'text' holds NoneType"),
        ("[1]", "line 2: holds list"),
    ],
)
def test_bad_json_line(tmp_path, config, line, match):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    fails(match, tmp_path / "a.jsonl", config)


def test_bad_json_array(tmp_path, config):
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n{"text": }]')
    fails("line 3, column 10", tmp_path / "a.json", config)


@pytest.mark.parametrize(
    ("column", "match"), [("texd", "Did you mean 'text'"), ("id", "holds int64, not text")]
)
def test_bad_parquet_column(tmp_path, column, match):
    config = TextConfig(cache_dir=str(tmp_path / "cache"), column=column)
    parquet.write_table(pyarrow.table({"id": [1], "text": ["a"]}), tmp_path / "a.parquet")
    fails(match, tmp_path / "a.parquet", config)


def test_not_parquet(tmp_path, config):
    (tmp_path / "a.parquet").write_text("text")
    fails("not a parquet file", tmp_path / "a.parquet", config)


def test_cache_folder_is_a_file(tmp_path):
    (tmp_path / "cache").touch()
    (tmp_path / "a.txt").write_text("text\n")
    with pytest.raises(UserError, match=r"text\.cache_dir"):
        store_of(tmp_path / "a.txt", TextConfig(cache_dir=str(tmp_path / "cache")))


# --- the cache


def counted(texts, seen):
    for text in texts:
        seen.append(text)
        yield text


def test_cache_is_used_and_damage_is_noticed(tmp_path):
    seen: list[str] = []

    def build(limit=None):
        return tokenize_to_cache(
            counted(["abc", "defg"], seen), byte_tokenizer(), ["x"], tmp_path, limit
        )

    tokens = build().tokens.tolist()
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    build()
    assert len(seen) == 2
    flipped = bytearray(good)
    flipped[-20] ^= 1
    for damaged in (good[:-1], good + b"x", bytes(flipped), b"", good[:10], b"x" * len(good)):
        path.unlink()
        path.write_bytes(damaged)
        seen.clear()
        assert build().tokens.tolist() == tokens
        assert len(seen) == 2
        assert path.read_bytes() == good
    assert build(limit=6).tokens.tolist() == tokens[:6]
    assert build(limit=6).offsets.tolist() == [0, 4, 6]
    assert build(limit=4).offsets.tolist() == [0, 4]


def test_cache_key(tmp_path, config):
    path = tmp_path / "a.txt"
    path.write_text("abcd\n")
    first = store_of(path, config).tokens.tolist()
    path.write_text("abce\n" * 2)
    assert store_of(path, config).tokens.tolist() != first


def test_failing_stream_leaves_nothing(tmp_path):
    def stream():
        yield "abc"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tokenize_to_cache(stream(), byte_tokenizer(), ["x"], tmp_path)
    with pytest.raises(NoTextError):
        tokenize_to_cache([], byte_tokenizer(), ["x"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_builders(tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    results: list[TokenStore] = []

    def build():
        results.append(tokenize_to_cache(texts, byte_tokenizer(), ["x"], tmp_path))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(r.tokens, results[0].tokens) for r in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_does_not_grow_with_the_file(tmp_path, config):
    path = tmp_path / "large.jsonl"
    words = [f"word{i}" for i in range(1000)]
    rows = [" ".join(words[(i + k * k) % 1000] for k in range(260)) for i in range(1000)]
    with path.open("w") as file:
        for i in range(25_000):
            file.write(json.dumps({"text": rows[i % 1000]}) + "\n")
    assert path.stat().st_size > 45e6
    resident: list[int] = []

    def watched():
        for index, piece in enumerate(read(path, config)):
            if index % 500 == 0:
                resident.append(psutil.Process().memory_info().rss)
            yield piece

    store = tokenize_to_cache(watched(), word_tokenizer(words), ["x"], tmp_path / "cache")
    assert len(store.tokens) == 25_000 * 260
    assert len(resident) == 50
    # The first fifth warms up the tokenizer's threads and caches. After it, 36 MB of the file are
    # still to come, and 5.2 million tokens: 42 MB as a list of Python integers, 10 MB as uint16.
    # 8 MB are room for the allocator.
    assert max(resident) - max(resident[:10]) < 8e6


@pytest.mark.skipif(not WIKITEXT.exists(), reason="shared data absent")
def test_wikitext(config):
    whole = store_of(WIKITEXT, config)
    assert documents(whole) == [WIKITEXT.read_text() + "<eos>"]
    shares = [len(store_of(WIKITEXT, config, s).tokens) for s in ("train", "validation")]
    assert sum(shares) == len(whole.tokens)
    assert 0.01 < shares[1] / sum(shares) < 0.03
