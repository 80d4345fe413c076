"""What the kernel modules share: choices, and the self-test that a compiled kernel must pass."""

import subprocess
import sys
import warnings

import pytest
import torch

from qat_kernels import support

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_VERIFIED", {})


def test_the_cpu_is_no_place_for_triton() -> None:
    choice = support.kernels_run_on(CPU)
    assert choice is not None
    assert str(choice) == "reference: Triton kernels are for CUDA, this is cpu"


def test_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    choice = support.kernels_run_on(torch.device("cuda"))
    assert choice == support.Choice("reference", "no CUDA device here")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "triton", None)
    choice = support.kernels_run_on(torch.device("cuda"))
    assert choice == support.Choice("reference", "Triton is not installed")
    assert not support.interpreted()
    assert support.jit(len) is len


def test_old_gpus_take_the_slow_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "capability_of", lambda device: (7, 5))
    choice = support.kernels_run_on(torch.device("cuda"))
    assert choice is not None
    assert "compute capability 7.5 is below 8.0" in choice.reason
    monkeypatch.setattr(support, "capability_of", lambda device: (9, 0))
    assert support.kernels_run_on(torch.device("cuda")) is None


def test_a_kernel_is_tested_once() -> None:
    runs = []
    for _ in range(3):
        assert support.verified("kernel", CPU, lambda: runs.append(1) is None)
    assert runs == [1]


def test_a_miscompiled_kernel_is_named_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(support, "ptxas", lambda: "ptxas 12.8")
    with pytest.warns(RuntimeWarning, match=r"w4a16 fast computes wrong values on Some GPU.*12\.8"):
        assert not support.verified("w4a16 fast", CPU, lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert not support.verified("w4a16 fast", CPU, lambda: True)


def test_no_self_test_inside_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run the model once before capturing"):
        support.verified("kernel", CPU, lambda: True)


def test_the_assembler_is_named() -> None:
    pytest.importorskip("triton")
    assert support.ptxas_version() >= (12, 0)
    assert support.ptxas().startswith("ptxas 1")


def test_importing_needs_neither_gpu_nor_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import pkgutil, importlib, qat_kernels\n"
        "names = [m.name for m in pkgutil.iter_modules(qat_kernels.__path__)]\n"
        "for name in names: importlib.import_module('qat_kernels.' + name)\n"
        "print(len(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
