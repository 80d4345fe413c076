"""`explain` asks the operators' own choice functions, and says what is wrong with a question."""

import importlib

import pytest

from qat_kernels import explain
from qat_kernels.dispatch import OPERATIONS

SHAPES = {
    "fake_quant": (64, 128),
    "activation_quant": (4, 64),
    "kv_cache": (1, 8, 2, 64, 128),
}
"""Sizes for operations that are no matmul (M, N, K)."""


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_explains_itself(name):
    module = importlib.import_module(f"qat_kernels.{name}")
    assert callable(module.choose)
    choice = explain(name, SHAPES.get(name, (1, 64, 128)), "cpu")
    assert choice.path
    assert len(choice.reason) > 10


def test_dtypes_by_name():
    choice = explain("w4a16", (1, 64, 64), "cpu", dtype="float32")
    assert choice.path == "reference"
    assert "fp32" in choice.reason


def test_unknown_operations_and_options_are_refused():
    with pytest.raises(ValueError, match=r"op=w5a16: one of .*w4a16"):
        explain("w5a16", (1, 2, 3))
    for name in OPERATIONS:
        with pytest.raises(ValueError, match=rf"op={name}, .*colour"):
            explain(name, SHAPES.get(name, (1, 64, 128)), colour="red")
    with pytest.raises(ValueError, match="dtype=float33: no dtype"):
        explain("w4a16", (1, 64, 64), dtype="float33")
    with pytest.raises(ValueError, match=r"shape=\(1,\)"):
        explain("w4a16", (1,))
