"""The kernel's inline PTX, which the interpreter cannot run: executed here, instruction by
instruction, for every code, field, type and zero point."""

import itertools
import re

import pytest
import torch

from qat_kernels.w4a16_planes import FIELDS
from qat_kernels.w4a16_triton import dequant_asm

WORD = 0xFFFFFFFF


def execute(text: str, operands: dict[str, int]) -> int:
    """The value of $0 after the instructions ``text``: shr, shl, and, or, mov, lop3, fma."""
    registers = dict(operands)

    def value(name: str) -> int:
        return (
            int(name, 16)
            if name.startswith("0x")
            else int(name)
            if name.isdigit()
            else registers[name]
        )

    for line in re.findall(r"[^;{}]+;", text):
        opcode, _, rest = line.strip(" ;").partition(" ")
        if opcode == ".reg":
            continue
        target, *names = [part.strip() for part in rest.split(",")]
        a = [value(name) for name in names]
        if opcode == "shr.b32":
            result = a[0] >> a[1]
        elif opcode == "shl.b32":
            result = a[0] << a[1]
        elif opcode == "and.b32":
            result = a[0] & a[1]
        elif opcode == "or.b32":
            result = a[0] | a[1]
        elif opcode == "mov.b32":
            result = a[0]
        elif opcode == "lop3.b32":
            # bit i of the table is the result for inputs whose bits spell i (PTX ISA, lop3)
            result = sum(
                (a[3] >> ((a[0] >> i & 1) << 2 | (a[1] >> i & 1) << 1 | (a[2] >> i & 1)) & 1) << i
                for i in range(32)
            )
        else:
            dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[opcode]
            x, y, z = (halves(part, dtype).double() for part in a)
            result = pack_halves((x * y + z).to(dtype))
        registers[target] = result & WORD
    return registers["$0"]


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    signed = [part - 65536 if part >= 32768 else part for part in (word & 0xFFFF, word >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype)


def pack_halves(values: torch.Tensor) -> int:
    low, high = values.view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("bits", "zero"),
    [(2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (8, False)],
)
def test_every_code_in_every_field(bits: int, zero: bool, half: str) -> None:
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    magic = 128 if half == "bf16" else 1024
    low_bits = 2 if bits == 3 else bits
    middle = 1 << (bits - 1)
    texts = dequant_asm(bits, half, zero)
    assert len(texts) == FIELDS[bits]
    generator = torch.Generator().manual_seed(bits)
    for field, text in enumerate(texts):
        for code in range(-middle, middle):
            z = code % 5 - 2 if zero else 0
            # the neighbours' bits are random
            noise = torch.randint(0, 1 << 32, (2,), generator=generator).tolist()
            pair = (code, -1 - code)
            words, high = noise
            for place, q in enumerate(pair):
                u = q & 0xFF if bits == 8 else q + middle
                at = 16 * place + field * low_bits
                words = words & ~(((1 << low_bits) - 1) << at) | (u & ((1 << low_bits) - 1)) << at
                at = 16 * place + field
                high = high & ~(1 << at) | (u >> 2 & 1) << at
            offset = pack_halves(torch.full((2,), -(magic + middle + z), dtype=dtype))
            operands = [words] + [high] * (bits == 3) + [offset] * zero
            names = {f"${i + 1}": value for i, value in enumerate(operands)}
            got = halves(execute(text, names), dtype)
            assert got.tolist() == [pair[0] - z, pair[1] - z], (field, code, text)


def test_the_offsets_are_exact() -> None:
    """-(magic + 2^(bits-1) + z) is an integer that the 16-bit type holds, for every zero point."""
    for dtype, magic in ((torch.bfloat16, 128), (torch.float16, 1024)):
        for bits, z in itertools.product((2, 3, 4), range(-8, 8)):
            value = -(magic + (1 << (bits - 1)) + z)
            assert float(torch.tensor(value, dtype=dtype)) == value
