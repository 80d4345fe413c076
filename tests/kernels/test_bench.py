"""The benchmark command: real measurements on tiny shapes, rows, plot, and honest errors."""

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat_kernels.bench import peers, report, timing
from qat_kernels.bench.__main__ import main
from qat_kernels.bench.cases import BENCHMARKS
from qat_kernels.dispatch import OPERATIONS

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_kernel_is_measured_beside_its_baseline(name: str, tmp_path: Path) -> None:
    words = [name, "--small", "--seconds", "0.01", "--device", "cpu", "--results", str(tmp_path)]
    for _ in range(2):  # the second run appends
        assert main(words) == 0
    with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(report.Row)]
    half = len(rows) // 2
    assert [row["case"] for row in rows[:half]] == [row["case"] for row in rows[half:]]
    assert {row["kernel"] for row in rows} == {name}
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        of_floor = float(row["floor_us"]) / float(row["p50_us"])
        # four digits are written
        assert float(row["of_floor"]) == pytest.approx(of_floor, rel=2e-3)
        assert row["device"]
        assert f"torch {torch.__version__}" in row["versions"]
    assert any(row["contestant"] == "ours" for row in rows)
    first = rows[0]
    assert float(first["speed_up"]) == 1.0
    assert (tmp_path / f"{name}-cpu.png").stat().st_size > 5000


def test_every_operation_has_a_benchmark() -> None:
    assert set(BENCHMARKS) == set(OPERATIONS)


def test_contestants_take_turns() -> None:
    order = []
    calls = {
        name: [lambda name=name, i=i: order.append((name, i)) for i in range(2)] for name in "ab"
    }
    found = timing.measure(calls, CPU, seconds=0.0)
    warm = order[: 2 * timing.WARM_UP]
    assert [name for name, _ in warm] == ["a"] * timing.WARM_UP + ["b"] * timing.WARM_UP
    timed = order[2 * timing.WARM_UP :]
    assert timed == [(name, turn % 2) for turn in range(5) for name in "ab"]
    assert set(found) == {"a", "b"}


def test_cold_data_needs_copies() -> None:
    assert timing.copies(1 << 20, CPU) == 64
    assert timing.copies(32 << 20, CPU) == 8
    assert timing.copies(1 << 30, CPU) == 1
    assert timing.copies(1, torch.device("cuda")) == 1


def test_the_floor_is_the_slower_of_the_two_limits() -> None:
    limit = timing.Floor(bandwidth=100.0, operations=10.0)
    assert limit.seconds(200.0, 5.0) == 2.0
    assert limit.seconds(1.0, 50.0) == 5.0
    here = timing.floor(CPU)
    assert here.bandwidth > 1e8
    assert here.operations > 1e8


def test_a_peer_that_fails_is_named_and_left_out(capsys, monkeypatch) -> None:
    def broken(w, x, group):
        raise RuntimeError("no kernel image\nlong trace")

    monkeypatch.setitem(peers.PEERS, "broken", ("torch", broken))
    monkeypatch.setitem(peers.PEERS, "absent", ("not_a_package", broken))
    x = torch.ones(1, 4)
    for _ in range(2):
        assert peers.build("broken", [x], x, 4) == []
        assert peers.build("absent", [x], x, 4) == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "broken: not measured here (no kernel image)",
        "absent: not_a_package is not installed",
    ]


def test_scaled_mm_runs_as_a_peer() -> None:
    w, x = torch.randn(64, 128).to(torch.bfloat16), torch.randn(4, 128).to(torch.bfloat16)
    (call,) = peers.build("torch._scaled_mm", [w], x, 128)
    y = call()
    # a sign or a scale in the wrong place would be far off
    assert float((y - x @ w.T).norm() / (x @ w.T).norm()) < 0.1


def test_bitsandbytes_runs_as_a_peer() -> None:
    w, x = torch.randn(64, 128).to(torch.bfloat16), torch.randn(2, 128).to(torch.bfloat16)
    (call,) = peers.build("bitsandbytes NF4", [w], x, 64)
    assert tuple(call().shape) == (2, 64)


def test_unknown_names_and_devices(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["w5a16"])
    assert stop.value.code == 2
    assert "no kernel named w5a16" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["w4a16", "--device", "cuda"])
        assert "no CUDA device" in capsys.readouterr().err


def test_the_command_starts() -> None:
    command = [sys.executable, "-m", "qat_kernels.bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "activation_quant" in done.stdout
