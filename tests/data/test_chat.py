import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.demo import MODEL_DIRECTORY
from data.module import TextDataModule
from data.sampler import StepBatchSampler
from qat.bestfit import PackedBlocks
from qat.chat_config import ChatConfig
from qat.errors import UserError
from qat.models import load_tokenizer
from qat.packing import IGNORE, Blocks
from qat.text import TextConfig
from tests.text_fixtures import byte_tokenizer

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)

    def words(limit):
        return "".join(map(chr, rng.integers(97, 123, rng.integers(1, limit))))

    path = tmp_path / "a.jsonl"
    rows = [{"prompt": words(20), "completion": words(30)} for _ in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def module(source, tokenizer=None, chat=None, **text):
    values = {"seq_len": 96, "validation_fraction": 0.2, "cache_dir": f"{source}.cache"} | text
    tokenizer = tokenizer or byte_tokenizer()
    return TextDataModule(
        str(source), tokenizer, TextConfig(**values), 8, 2, seed=1, chat=chat or ChatConfig()
    )


def answers(blocks):
    """Texts of the targets, one for each conversation."""
    for index in range(len(blocks)):
        block = blocks[index]
        for number in range(int(block["segment_ids"].max()) + 1):
            labels = block["labels"][block["segment_ids"] == number]
            chosen = labels[labels != IGNORE]
            if len(chosen):
                yield byte_tokenizer().decode(chosen.tolist())


def test_both_shares_hold_every_answer_once(source):
    data = module(source)
    data.prepare_data()
    data.setup()
    rows = [json.loads(line)["completion"] for line in source.read_text().splitlines()]
    train, held_out = list(answers(data.train_blocks)), list(answers(data.held_out_blocks))
    assert sorted(train + held_out) == sorted(f" {row}<eos>" for row in rows)
    assert 0.1 < len(held_out) / len(rows) < 0.3
    assert data.chat_summary()["train"]["conversations"] == len(train)


def test_what_became_of_the_rows_is_said_once(source, capsys):
    with source.open("a") as file:
        file.write("{oops\n" + json.dumps({"prompt": "x" * 120, "completion": "y" * 9}) + "\n")
        file.write(json.dumps({"prompt": "x", "completion": "y" * 150}) + "\n")
    data = module(source, validation_fraction=0.1)
    data.setup()
    data.setup()
    said = capsys.readouterr().err
    assert said.count("chat.format=prompt_completion, template: plain") == 1
    assert "chat.template=plain is taken" in said
    assert f"data={source}: 1 of 303 rows left out:\ndata={source}: line 301: column 2" in said
    assert "conversations 1 lost their end and" in said
    assert "and 1 were left out" in said
    (bad,) = data.chat.bad_rows
    assert (bad.rows, bad.bad) == (303, 1)
    summary = json.loads(json.dumps(data.chat_summary()))
    assert summary["bad_rows"][0]["bad"] == 1
    kinds = [summary[split] for split in ("train", "validation")]
    assert sum(kind["cut"] for kind in kinds) == sum(kind["dropped"] for kind in kinds) == 1
    assert sum(kind["conversations"] for kind in kinds) == 301


def test_too_many_bad_rows_stop(source):
    with source.open("a") as file:
        file.write('{"prompt": "x"}\n' * 10)
    with pytest.raises(UserError, match=r"10 of 310 rows left out(.|\n)*line 301: no column 'comp"):
        module(source).prepare_data()
    module(source, chat=ChatConfig(max_bad_rows=0.1)).prepare_data()


@pytest.mark.parametrize("step", [0, 3, 7])
def test_resumed_batches_are_the_tail(source, step):
    class Run:
        world_size, global_rank = 1, 0

        def __init__(self, global_step):
            self.global_step = global_step

    def seen(start):
        data = module(source)
        data.trainer = Run(start)
        return list(itertools.islice(data.train_dataloader(), 4 * (9 - start)))

    for expected, batch in zip(seen(0)[4 * step :], seen(step), strict=True):
        assert all(torch.equal(expected[name], batch[name]) for name in expected)
        assert expected["input_ids"].shape == (2, 96)
    for step_batches in zip(*[iter(seen(0))] * 4):
        targets = sum(int((batch["labels"] != IGNORE).sum()) for batch in step_batches)
        assert {int(batch["loss_tokens"]) for batch in step_batches} == {targets}


def test_fewer_blocks_than_a_batch(source):
    data = module(source, max_train_tokens=200)
    assert 1 <= len(data.train_blocks) < 8
    batches = list(itertools.islice(data.train_dataloader(), 8))
    assert all(batch["input_ids"].shape == (2, 96) for batch in batches)


def test_evaluation_and_calibration(source):
    data = module(source)
    held_out = data.validation_blocks(10**9)
    rows = [row.tolist() for batch in held_out for row in batch["input_ids"]]
    assert rows == [row.tolist() for b in data.val_dataloader() for row in b["input_ids"]]
    assert [len(b["input_ids"]) for b in data.calibration_blocks(5, batch_size=2)] == [2, 2, 1]


def test_validation_file(source, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "q", "completion": "a"}\n' * 3 + "{}\n")
    config = ChatConfig(max_bad_rows=0.3)
    data = module(source, chat=config, validation=str(held_out))
    assert list(answers(data.held_out_blocks)) == [" a<eos>"] * 3
    assert len(list(answers(data.train_blocks))) == 300
    assert [bad.bad for bad in data.chat.bad_rows] == [0, 1]
    assert data.fingerprint() != module(source).fingerprint()
    with pytest.raises(UserError, match=r"text\.validation=.*1 of 4 rows left out"):
        module(source, validation=str(held_out)).prepare_data()


def test_nothing_within_a_block(source):
    with pytest.raises(UserError, match=r"text\.seq_len=8: none of the \d+ train conversations"):
        module(source, seq_len=8).setup()


def test_text_rows_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " * 9}) + "\n" for i in range(60)))
    data, plain = (
        module(path),
        TextDataModule(str(path), byte_tokenizer(), module(path).text, 8, 2, seed=1),
    )
    assert data.chat is None
    assert data.chat_summary() is None
    assert isinstance(data.train_blocks, Blocks)
    assert all(
        torch.equal(data.train_blocks[0][name], plain.train_blocks[0][name])
        for name in plain.train_blocks[0]
    )
    assert data.fingerprint() == plain.fingerprint()


def test_demo(tmp_path):
    text = TextConfig(seq_len=256, cache_dir=str(tmp_path))
    tokenizer = load_tokenizer(str(MODEL_DIRECTORY))
    data = TextDataModule("demo", tokenizer, text, 4, 2, seed=0, chat=ChatConfig())
    data.prepare_data()
    data.setup()
    assert isinstance(data.train_blocks, PackedBlocks)
    assert data.train_blocks.efficiency > 0.95
    assert data.chat.bad_rows == []
    conversations = [
        {bytes(c) for block in blocks for c in segments(block)}
        for blocks in (
            [data.train_blocks[i] for i in range(len(data.train_blocks))],
            rows_of(data.validation_blocks(10**6)),
            rows_of(data.calibration_blocks(10**6)),
        )
    ]
    assert min(map(len, conversations)) > 100
    assert not conversations[0] & conversations[1]
    assert not conversations[0] & conversations[2]
    assert data.fingerprint() != TextDataModule("demo", tokenizer, text, 4, 2, 0).fingerprint()
    as_text = TextDataModule("demo", tokenizer, text, 4, 2, 0, chat=ChatConfig(format="text"))
    assert as_text.chat is None


def rows_of(batches):
    return [
        {name: batch[name][i] for name in ("input_ids", "labels", "segment_ids")}
        for batch in batches
        for i in range(len(batch["input_ids"]))
    ]


def segments(block):
    """Tokens of each conversation as bytes; padding, which has no label, is left out."""
    for number in range(int(block["segment_ids"].max()) + 1):
        chosen = block["segment_ids"] == number
        if (block["labels"][chosen] != IGNORE).any():
            yield block["input_ids"][chosen].numpy().tobytes()


@pytest.mark.skipif(not GSM8K.exists(), reason="shared data absent")
def test_gsm8k_needs_its_columns_named_only(tmp_path):
    text = TextConfig(
        seq_len=512,
        cache_dir=str(tmp_path),
        validation=str(GSM8K / "test.jsonl"),
        max_validation_tokens=20_000,
    )
    chat = ChatConfig(prompt_column="question", completion_column="answer")
    tokenizer = load_tokenizer(str(MODEL_DIRECTORY))
    data = TextDataModule(str(GSM8K / "train.jsonl"), tokenizer, text, 8, 2, seed=0, chat=chat)
    data.setup()
    summary = data.chat_summary()
    assert summary["format"] == "prompt_completion"
    assert [(b["rows"], b["bad"]) for b in summary["bad_rows"]][:1] == [(7473, 0)]
    train = summary["train"]
    assert train["conversations"] + train["dropped"] == 7473
    assert train["efficiency"] > 0.95
    # the answer of the first row, whole and with the token that ends it, and nothing else
    store = data.train_blocks.store
    first = np.asarray(store.tokens[: store.offsets[1]])[
        np.asarray(store.targets[: store.offsets[1]]) == 1
    ]
    with (GSM8K / "train.jsonl").open() as file:
        answer = json.loads(file.readline())["answer"]
    assert tokenizer.decode(first.tolist()) == f" {answer}<|endoftext|>"
    sampler = StepBatchSampler(len(data.train_blocks), data.train_blocks.loss_tokens(), 8, 2)
    assert next(iter(sampler))[0][1] > 500
