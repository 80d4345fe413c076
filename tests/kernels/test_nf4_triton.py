"""The inline assembly of the kernels, which the interpreter does not run: executed here in torch.

The emulator knows the PTX instructions that the two programs use, as the PTX ISA defines them.
Everything around them is tested in test_nf4_launch.py.
"""

import re
import struct

import pytest
import torch
from torch import Tensor

from qat_kernels.nf4_numerics import Spec4bit, reference
from qat_kernels.nf4_triton import lookup_ptx, table_ptx

HALF = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Pick four of the eight bytes of (a, b) by the nibbles of the selector's low half."""
    source = [(word >> shift) & 255 for word in (a, b) for shift in (0, 8, 16, 24)]
    *source, selector = torch.broadcast_tensors(*source, selector)
    stacked = torch.stack(list(source))
    out = torch.zeros_like(selector)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        assert bool((nibble < 8).all()), "bit 3 repeats a byte's sign"
        out = out | (stacked.gather(0, nibble[None])[0] << (8 * i))
    return out


def half_bits(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).view(torch.int16).to(torch.int64) & 0xFFFF


def execute(program: str, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a program on registers that are int64 tensors (words) or fp32 tensors."""
    registers = dict(operands)

    def read(name: str) -> Tensor:
        if name.startswith("0f"):
            return torch.tensor(struct.unpack("<f", struct.pack("<I", int(name[2:], 16)))[0])
        return torch.tensor(int(name, 0)) if name[0].isdigit() else registers[name]

    for statement in re.split(r";\s*", program.strip()[1:-1]):
        operation, _, rest = statement.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        names = re.findall(r"[$\w]+", rest)
        if operation == "mov.b32":
            low, high, source = names
            registers[low], registers[high] = read(source) & 0xFFFF, read(source) >> 16
            continue
        target, values = names[0], [read(name) for name in names[1:]]
        if operation == "prmt.b32":
            registers[target] = prmt(*values)
        elif operation == "mul.rn.f32":
            registers[target] = values[0] * values[1]
        elif operation == "and.b32":
            registers[target] = values[0] & values[1]
        elif operation == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif operation == "lop3.b32":
            assert int(values[3]) == 0xEA  # the truth table of (a & b) | c
            registers[target] = (values[0] & values[1]) | values[2]
        else:
            kind = re.fullmatch(r"cvt\.rn\.(\w+)\.f32", operation)
            assert kind is not None, statement
            high, low = (half_bits(value, HALF[kind.group(1)]) for value in values)
            registers[target] = low | (high << 16)
    return registers


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("packed", HALF)
def test_the_programs_are_the_reference(quant_type: str, packed: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # every byte in every place, among random ones; absmax from subnormal results to overflow
    words = torch.randint(0, 2**32, (1024,), generator=generator)
    byte = torch.arange(1024)
    shift = byte // 256 * 8
    words = (words & ~(255 << shift)) | ((byte % 256) << shift)
    absmax = torch.logspace(-9, 5, 29).to(torch.float32)
    absmax = torch.cat((absmax, torch.tensor([0.0, 1.0, 2.0**-130, 2.0**-149])))
    table = execute(table_ptx(quant_type, packed), {"$8": absmax[:, None]})
    operands = {f"${i + 9}": table[f"${i}"] for i in range(8)}
    found = execute(lookup_ptx(), {**operands, "$8": words[None, :]})
    spec = Spec4bit(quant_type, 4096, double_quant=False)
    codes = words.to(torch.int32).view(torch.uint8)
    rows = [reference(codes, a.repeat(2), spec, (1024, 8), HALF[packed]) for a in absmax]
    expected = torch.stack(rows)
    for i in range(8):
        got = found[f"${i}"].to(torch.int16).view(HALF[packed])
        # bit for bit, the signs of zeros too
        assert torch.equal(got.view(torch.int16), expected[:, :, i].view(torch.int16))
