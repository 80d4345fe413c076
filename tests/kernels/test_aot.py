"""The ahead-of-time gates: they read real machine code, and they can fail."""

from dataclasses import replace

import pytest

from qat_kernels import aot, support
from qat_kernels.aot import Sass, Shipped, all_shipped, inspect, parse_sass, table

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(support.interpreted(), reason="needs the compiler")

if support.triton is not None:
    import triton.language as tl


@support.jit
def _scale_kernel(x_ptr, y_ptr, N, FACTOR: "tl.constexpr", TRIPS: "tl.constexpr"):
    base = tl.program_id(0) * 512 * TRIPS
    for trip in range(TRIPS):
        i = base + trip * 512 + tl.arange(0, 512)
        value = tl.load(x_ptr + i, mask=i < N, other=0.0)
        tl.store(y_ptr + i, value * FACTOR, mask=i < N)


def scale(**changes) -> Shipped:
    item = Shipped(
        name="scale",
        kernel=_scale_kernel,
        types={"x_ptr": "*fp32", "y_ptr": "*fp32", "N": "i32"},
        constants={"FACTOR": 3.0, "TRIPS": 100},
        num_warps=4,
        num_stages=1,
        divisible=("N",),
        values=512,
    )
    return replace(item, **changes)


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_a_binary_without_a_gpu(capability):
    binary = inspect(scale(), capability)
    assert binary.problems == ()
    assert binary.spilled == 0
    assert 8 <= binary.registers <= 64
    assert binary.wide >= 1
    assert binary.tensor_core == ""
    # a load, a product and a store of 4 values per thread: at least 1.5 instructions per value
    assert 1.5 <= binary.instructions < 10


def test_the_gates_can_fail():
    narrow = inspect(scale(unaligned=("x_ptr",), divisible=()), 90)
    assert narrow.problems == ("no 16-byte loads",)
    assert inspect(scale(unaligned=("x_ptr",), wide_loads=False), 90).problems == ()
    many = inspect(scale(most_instructions={90: 0.5}), 90)
    assert many.problems == ("over 0.5 instructions per value",)
    assert inspect(scale(most_instructions={80: 0.5}), 90).problems == ()


def test_arguments_must_be_complete():
    with pytest.raises(AssertionError, match="TRIPS"):
        inspect(scale(constants={"FACTOR": 3.0}), 90)


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;   /* 0x0 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 FFMA R4, R4, 3, RZ ;
        /*0030*/                   STG.E R4, [R2.64] ;
        /*0040*/               @P1 BRA 0x10 ;
        /*0050*/               @P2 BRA 0x0 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
        /*0080*/                   NOP ;
"""


def test_reading_a_listing():
    code = parse_sass(LISTING)
    assert code.operations[1].startswith("LDG.E.128")
    assert code.operations[2].startswith("FFMA")
    # the inner loop is counted; a jump to itself is none
    assert code.loops == [(1, 4), (0, 5)]
    assert code.loop_length() == 4
    assert Sass(["FFMA", "EXIT", "NOP"], []).loop_length() == 2


def test_the_table_and_the_command(capsys, monkeypatch):
    monkeypatch.setattr(aot, "inspect_all", lambda names, sm: [inspect(scale(), 80)])
    assert aot.main([]) == 0
    out = capsys.readouterr().out
    assert "scale" in out
    assert "1 binaries, 0 miss a gate" in out
    failing = inspect(scale(most_instructions={80: 0.1}), 80)
    monkeypatch.setattr(aot, "inspect_all", lambda names, sm: [failing])
    assert aot.main([]) == 1
    assert "over 0.1 instructions per value" in table([failing])


def test_every_module_ships_something():
    for name in aot.MODULES:
        items = all_shipped([name])
        assert items
        assert len({item.name for item in items}) == len(items)


def test_one_shipped_configuration_passes_in_a_pool():
    """The whole list is compiled by ``python -m qat_kernels.aot``."""
    module = aot.MODULES[0]
    first = all_shipped([module])[0]
    binary = aot._inspect_one((module, 0, first.capabilities[0]))
    assert binary.problems == ()
