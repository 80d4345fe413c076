"""How the fake-quantization kernel is cut, and the gates of its binaries, without a GPU."""

from dataclasses import replace

import pytest
import torch

from qat_kernels import fake_quant_launch
from qat_kernels.aot import inspect, table
from qat_kernels.fake_quant_launch import configuration, mode_of, shipped, tile
from qat_kernels.numerics import QuantSpec


def test_every_group_has_a_tile():
    for group in (1, 2, 31, 32, 64, 128, 256, 4096, 11008, 16384, 16385, 32768):
        shape = tile(group)
        threads = 32 * shape.num_warps
        assert shape.block & (shape.block - 1) == 0
        assert shape.rows & (shape.rows - 1) == 0
        assert threads <= 512
        assert shape.rows * shape.block <= 32 * threads
        assert shape.block >= group or group > fake_quant_launch.MAX_BLOCK
    assert mode_of(QuantSpec(grid="mse")) is None
    assert mode_of(QuantSpec(granularity="tensor")) is None


def test_binaries_pass_their_gates():
    pytest.importorskip("triton")
    binaries = [inspect(item, 90) for item in shipped()]
    assert not [b for b in binaries if b.problems], table(binaries)
    assert all(item.most_instructions for item in shipped())


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_rarer_kinds_compile_without_spills(scale_dtype):
    pytest.importorskip("triton")
    given = QuantSpec(
        bits=8, symmetric=False, grid="absmax", scale_dtype=scale_dtype, group_size=48
    )
    types = (torch.bfloat16, torch.float16)
    item = configuration("learned", given, 4800, *types, given=True)
    constants = {**item.constants, "ZERO": True}
    item = replace(item, types={**item.types, "zero_ptr": "*i8"}, constants=constants)
    channel = replace(given, granularity="channel")
    others = [configuration(op, channel, 20000, *types) for op in ("forward", "backward")]
    binaries = [inspect(item, 90) for item in (item, *others)]
    assert not [b for b in binaries if b.spilled], table(binaries)
