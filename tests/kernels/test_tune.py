"""Tuning: candidates, the check of their results, and the table; measuring itself takes a GPU."""

import pytest
import torch

from qat_kernels import support, tune, tuning
from qat_kernels.w4a16_launch import Config, config_of
from qat_kernels.w4a16_planes import layout

PLAN = layout(4, 128)


def test_candidates_never_hold_wgmma_unless_it_is_safe() -> None:
    assert PLAN is not None
    safe = list(tune.candidates(PLAN, 4096, fast=False))
    assert all(config.block_n < 64 and config.num_warps < 4 for config in safe)
    assert len(set(tune.candidates(PLAN, 4096, fast=True))) > len(safe) == len(set(safe))
    assert {config.splits for config in tune.candidates(PLAN, 256, fast=False)} == {1}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as stop:
        tune.main([])
    assert stop.value.code == 2
    assert "there is none here" in capsys.readouterr().err


def test_a_table_is_merged_and_read_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "TABLES", tmp_path / "tables")
    tuning.table.cache_clear()
    config_of.cache_clear()
    assert PLAN is not None
    winner = {"block_n": 16, "num_warps": 1, "num_stages": 6, "splits": 8}
    tune.write({"n=64 k=512 bits=4 group=128": winner}, (9, 0), "some GPU")
    path = tune.write({"n=1 k=2 bits=4 group=128": {"splits": 1}}, (9, 0), "some GPU, later")
    assert path.name == "sm_90.json"
    assert config_of(64, 512, PLAN, (9, 0)) == Config(16, 1, 6, 8)
    # other families are not touched
    assert config_of(64, 512, PLAN, (8, 0)) != Config(16, 1, 6, 8)
    tuning.table.cache_clear()
    config_of.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's own test covers the CPU")
def test_a_configuration_that_cannot_run_is_left_out(capsys) -> None:
    """Without the interpreter nothing launches on the CPU: that is what a broken one looks like."""
    pytest.importorskip("triton")
    if support.interpreted():
        pytest.skip("kernels run here")
    assert PLAN is not None
    problem = tune.Problem(32, 256, PLAN, torch.device("cpu"))
    assert not problem.is_exact(Config(32, 2, 4, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_winner_computes_the_same() -> None:
    assert PLAN is not None
    device = torch.device("cuda")
    winner = tune.best(512, 1024, PLAN, device, seconds=0.2)
    problem = tune.Problem(512, 1024, PLAN, device)
    assert problem.is_exact(winner)
    problem.expected[3, 5] += 1
    assert not problem.is_exact(winner)
