import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from data.module import TextDataModule, data_source
from data.sampler import StepBatchSampler
from qat.errors import UserError
from qat.text import TextConfig
from tests.text_fixtures import byte_tokenizer

WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext-2"
COUNTS = np.arange(100, 123)


def sampler(**changes) -> StepBatchSampler:
    values = {"global_batch_size": 8, "micro_batch_size": 2, "seed": 3} | changes
    counts = values.pop("counts", COUNTS)
    return StepBatchSampler(len(counts), counts, **values)


def take(source, count):
    return list(itertools.islice(iter(source), count))


@pytest.mark.parametrize("step", [0, 1, 2, 3, 11])
def test_resumed_order_is_the_tail(step):
    per_step = 4
    assert take(sampler(start_step=step), 20) == take(sampler(), 20 + step * per_step)[-20:]


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (1, 1), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_steps_do_not_depend_on_the_split(world, micro):
    per_step = 8 // (world * micro)
    ranks = [
        take(sampler(micro_batch_size=micro, world_size=world, rank=r), 6 * per_step)
        for r in range(world)
    ]
    for step in range(6):
        expected = sampler().step_blocks(step)
        items = []
        for k in range(step * per_step, (step + 1) * per_step):
            for rank in ranks:
                assert len(rank[k]) == micro
                items += rank[k]
        assert [block for block, _ in items] == expected
        assert {n for _, n in items} == {int(COUNTS[expected].sum())}


def test_epochs_are_permutations():
    order = [block for batch in take(sampler(), 23 * 4) for block, _ in batch]
    epochs = [order[i : i + 23] for i in range(0, 23 * 8, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert order != [b for batch in take(sampler(seed=4), 23 * 4) for b, _ in batch]


def test_fewer_blocks_than_a_batch():
    small = sampler(counts=np.array([5, 7, 9]))
    blocks = small.step_blocks(0)
    assert len(blocks) == 8
    assert sorted(blocks[:3]) == sorted(blocks[3:6]) == [0, 1, 2]
    assert sampler(counts=np.array([0])).__iter__().__next__() == [(0, 1), (0, 1)]


def test_batch_that_does_not_divide():
    with pytest.raises(UserError, match=r"trainer\.global_batch_size=9.* Take 12"):
        sampler(global_batch_size=9, world_size=2)


# --- the data module


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    rows = ["".join(map(chr, rng.integers(97, 123, rng.integers(5, 90)))) for _ in range(400)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def module(source, **text) -> TextDataModule:
    config = TextConfig(
        **{"seq_len": 32, "validation_fraction": 0.2, "cache_dir": f"{source}.cache"} | text
    )
    return TextDataModule(str(source), byte_tokenizer(), config, 8, 2, seed=1)


class Recorder(LightningModule):
    """Keeps the batches; one parameter, so that Lightning has something to train."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.validated = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append((batch_idx, batch["input_ids"].clone(), int(batch["loss_tokens"])))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch["input_ids"].clone())


def fit(source, directory, steps, checkpoint=None, **options):
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        accumulate_grad_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=8,
        default_root_dir=directory,
        **options,
    )
    trainer.fit(recorder, module(source), ckpt_path=checkpoint, weights_only=False)
    trainer.save_checkpoint(directory / f"{steps}.ckpt")
    return recorder, directory / f"{steps}.ckpt"


# Lightning 2.6 asks torch's pytree in a way that torch 2.13 calls deprecated
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")
# about Lightning's own advice on worker processes, which depends on the machine's core count
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_resumes_in_the_middle_of_an_epoch(source, tmp_path):
    whole, _ = fit(source, tmp_path, 70)
    steps_per_epoch = len(module(source).train_blocks) / 8
    assert 25 < steps_per_epoch < 65
    for stop in (5, 6):  # 6 validates at its end
        _, checkpoint = fit(source, tmp_path, stop)
        rest, _ = fit(source, tmp_path, 70, str(checkpoint))
        assert len(rest.seen) == (70 - stop) * 4
        for (i, ids, n), (j, expected, m) in zip(rest.seen, whole.seen[stop * 4 :]):
            assert i == j
            assert n == m
            assert torch.equal(ids, expected)


def test_loss_tokens_are_those_of_the_step(source):
    steps = take(module(source).train_dataloader(), 12)
    for k in range(0, 12, 4):
        targets = sum(int((b["labels"] != -100).sum()) for b in steps[k : k + 4])
        assert all(int(b["loss_tokens"]) == targets for b in steps[k : k + 4])


def test_global_random_state_is_untouched(source):
    data = module(source)
    data.prepare_data()
    data.setup()
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(data.train_dataloader(), 9)
    list(data.val_dataloader())
    data.calibration_blocks(4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


class Rank:
    """What the data module asks of a trainer."""

    def __init__(self, world_size, global_rank, global_step=0):
        self.world_size, self.global_rank, self.global_step = world_size, global_rank, global_step


def test_validation_is_divided_without_a_rest(source):
    data = module(source)
    rows = []
    for rank in range(3):
        data.trainer = Rank(3, rank)
        rows += [row.tolist() for b in data.val_dataloader() for row in b["input_ids"]]
    data.trainer = None
    alone = [row.tolist() for b in data.val_dataloader() for row in b["input_ids"]]
    assert sorted(rows) == sorted(alone)
    offline = [row.tolist() for b in data.validation_blocks(10**9) for row in b["input_ids"]]
    assert offline == alone
    assert len(data.validation_blocks(64, batch_size=1)) == 2


def test_calibration_blocks(source):
    data = module(source)
    many = data.calibration_blocks(5, batch_size=2)
    assert [len(b["input_ids"]) for b in many] == [2, 2, 1]
    assert sum(len(b["input_ids"]) for b in data.calibration_blocks(10**6)) == len(
        data.train_blocks
    )


def test_validation_file(source, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("abc\n" * 40)
    data = module(source, validation=str(held_out), max_train_tokens=320)
    assert len(data.train_blocks) == 10
    # 160 characters and the end-of-text token
    assert len(data.held_out_blocks) == 6
    assert data.fingerprint() != module(source).fingerprint()
    with pytest.raises(UserError, match=r"text\.validation="):
        module(source, validation=str(tmp_path / "absent.txt"))


def test_shorter_than_a_block(source):
    with pytest.raises(UserError, match=r"do not fill one block of text\.seq_len=100000"):
        module(source, seq_len=100_000).setup()


def test_data_source(source):
    assert data_source("demo") == "demo"
    assert data_source(str(source)) == str(source)
    with pytest.raises(UserError, match="Hub dataset"):
        data_source("someone/dataset")


def test_demo(tmp_path):
    config = TextConfig(seq_len=256, cache_dir=str(tmp_path), max_train_tokens=20_000)
    data = TextDataModule("demo", byte_tokenizer(), config, 4, 2, seed=0)
    data.prepare_data()
    data.setup()
    assert len(data.train_blocks) == 20_000 // 256
    train = {row.tobytes() for b in data.train_blocks for row in [b["input_ids"].numpy()]}
    other = [*data.validation_blocks(10_000), *data.calibration_blocks(8)]
    assert not train & {row.numpy().tobytes() for b in other for row in b["input_ids"]}
    assert len(data.fingerprint()) == 64


@pytest.mark.skipif(not WIKITEXT.exists(), reason="shared data absent")
def test_wikitext(tmp_path):
    config = TextConfig(seq_len=256, cache_dir=str(tmp_path), validation=str(WIKITEXT / "test.txt"))
    data = TextDataModule(str(WIKITEXT / "valid.txt"), byte_tokenizer(), config, 4, 2, seed=0)
    data.setup()
    assert len(data.train_blocks) == (len((WIKITEXT / "valid.txt").read_bytes()) + 1) // 256
    assert take(data.train_dataloader(), 3)[0]["input_ids"].shape == (2, 256)
