"""Launching the kernels of `nf4_triton`: configurations, self-tests, what is compiled ahead.

All tiles give the same values: an element of y is summed by the same instructions in the same
order whatever the tile, which is chosen by N and by M for speed alone.

Shape legend: M rows of activations, N output features, K input features, R rank of an adapter,
g values per block. ``x_MK, t_MR, B_NR, bias_N, y_MN``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat_kernels.aot import Shipped
from qat_kernels.nf4_numerics import (
    NESTED_BLOCK,
    Packed4bit,
    Spec4bit,
    codebook,
    dequantize_absmax,
    dynamic_map,
    reference,
)
from qat_kernels.nf4_triton import dequantize_kernel, matmul_kernel
from qat_kernels.support import interpreted, on, triton

if triton is not None:
    import triton.language as tl

CHUNK = 64
"""Weights that a lane looks up in one table: the matmul takes blocks of at least as many."""
SPLIT = 4
"""Warps of a program of the matmul, each with its part of K."""
TRIP = 4 * CHUNK * SPLIT
"""Inputs per trip of the matmul's loop: the four lanes of a row hold a chunk each."""
BLOCKS_M = (8, 16)
"""Rows of activations per program, of which the least that suffices is taken."""
BLOCK_R = 32
"""Ranks per step of the matmul's epilogue."""
NUM_STAGES = 3
"""Depth of the matmul's pipeline."""
WIDE_N = 8192
"""Least N at which a program takes 32 features; below, 16, so that a GPU's cores are filled."""
WIDE_SHARED = 110 * 1024
"""Bytes of shared memory per program that 32 features need."""
DEQUANTIZE_BLOCK, DEQUANTIZE_WARPS = 4096, 4
"""Weights and warps per program of `dequantize`; the largest g divides it."""
HALF = (torch.bfloat16, torch.float16)
"""Dtypes of the matmul."""
_MOST_WEIGHTS = 2**31 * CHUNK
"""The matmul counts chunks in 32 bits."""


class Adapter(NamedTuple):
    """What the epilogue adds: scaling * t B^T."""

    t: Tensor
    """x A^T [M, R], in the dtype of x."""
    b: Tensor
    """[N, R], any float dtype: rounded to that of x."""
    scaling: float
    """A factor."""


def multiplies(spec: Spec4bit, shape: Sequence[int], weight_dtype: torch.dtype) -> str | None:
    """None if `matmul` takes such a weight, else why not."""
    n, k = shape
    if spec.block_size < CHUNK:
        return f"the fused matmul takes blocks of at least {CHUNK}, this is {spec.block_size}"
    if k % CHUNK or not k:
        return f"the fused matmul takes K in multiples of {CHUNK}, this is {k}"
    if weight_dtype not in HALF:
        return f"the fused matmul takes bfloat16 and float16, this is {weight_dtype}"
    if n * k >= _MOST_WEIGHTS:
        return f"the fused matmul takes fewer than 2^37 weights, this is {n} x {k}"
    return None


def _type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _tensors(packed: Packed4bit, spec: Spec4bit) -> tuple[Tensor, ...]:
    """Codes, absmax, nested absmax, offset, dynamic map, codebook; what is missing is never read.

    Contiguous; views that start off 16 bytes are read by narrower loads.
    """
    codes, absmax, nested, offset = (None if t is None else t.contiguous() for t in packed)
    assert codes is not None and absmax is not None  # noqa: PT018
    device = codes.device
    values = codebook(spec.quant_type, device)
    if nested is None or offset is None:
        return codes, absmax, values, values, values, values
    return codes, absmax, nested, offset, dynamic_map(device), values


def dequantize(
    packed: Packed4bit, spec: Spec4bit, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The weight of ``shape`` in ``dtype`` (fp32, bf16, fp16) in one launch, any block size.

    Bit-equal to `reference` on `dequantize_absmax`.

    Args:
        packed: tensors that fit ``spec`` and ``shape``, on a GPU (the CPU in the interpreter).
        spec: how the weight was quantized.
        shape: any number of dimensions.
        dtype: of the result.
    """
    numel = math.prod(shape)
    # the interpreter truncates what it casts to bf16
    out = packed.codes.new_empty(numel, dtype=torch.float32 if interpreted() else dtype)
    if numel:
        with on(out):
            dequantize_kernel[(triton.cdiv(numel, DEQUANTIZE_BLOCK),)](
                *_tensors(packed, spec),
                out,
                numel,
                **_dequantize_constants(spec, dtype, numel % DEQUANTIZE_BLOCK == 0),
                num_warps=DEQUANTIZE_WARPS,
            )
    return out.to(dtype).view(tuple(shape))


def _dequantize_constants(spec: Spec4bit, dtype: torch.dtype, even: bool) -> dict[str, Any]:
    return {
        "BLOCK": DEQUANTIZE_BLOCK,
        "G": spec.block_size,
        "FP4": spec.quant_type == "fp4",
        "NESTED": spec.double_quant,
        "EVEN": even,
        "TYPE": _type(dtype),
    }


def _matmul_constants(
    spec: Spec4bit,
    dtype: torch.dtype,
    block: tuple[int, int],
    even: bool,
    bias: bool,
    adapter: bool,
) -> dict[str, Any]:
    return {
        "SHIFT": (spec.block_size // CHUNK).bit_length() - 1,
        "FP4": spec.quant_type == "fp4",
        "NESTED": spec.double_quant,
        "TYPE": _type(dtype),
        "BLOCK_M": block[0],
        "BLOCK_N": block[1],
        "BLOCK_R": BLOCK_R,
        "SPLIT": SPLIT,
        "EVEN": even,
        "HAS_BIAS": bias,
        "HAS_ADAPTER": adapter,
    }


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program can have."""
    if device.type != "cuda":
        return WIDE_SHARED
    found = torch.cuda.get_device_properties(device)
    # not in torch's stubs
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def block_of(m: int, n: int, nested: bool, device: torch.device) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N): rows and features per program; they change no value."""
    rows = BLOCKS_M[0] if m <= BLOCKS_M[0] else BLOCKS_M[1]
    # 16 x 32 with fp32 absmax spills two registers
    wide = n >= WIDE_N and _shared(device) >= WIDE_SHARED and (nested or rows == BLOCKS_M[0])
    return rows, (32 if wide else 16)


def matmul(
    x_MK: Tensor,
    packed: Packed4bit,
    spec: Spec4bit,
    n: int,
    bias_N: Tensor | None = None,
    adapter: Adapter | None = None,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """Y [M, N] = x W_hat^T + scaling t B^T + bias, fp32 sums, rounded once to the dtype of x.

    Args:
        x_MK: bf16 or fp16, to which W_hat is rounded, too.
        packed: tensors of a weight [n, K] that fit ``spec`` and that `multiplies` accepts.
        spec: how the weight was quantized.
        n: output features.
        bias_N: any float dtype, or None.
        adapter: what is added in the epilogue, or None.
        block: launch with this (BLOCK_M, BLOCK_N) instead of `block_of`'s.
    """
    (m, k), dtype = x_MK.shape, x_MK.dtype
    x = x_MK.contiguous()
    t, b, scaling = (x, x, 1.0) if adapter is None else adapter
    t, b, bias = t.contiguous(), b.contiguous(), x if bias_N is None else bias_N.contiguous()
    if interpreted():
        # its bf16 arithmetic is wrong: fp32 in and out, rounded here
        x, t, b = x.float(), t.float(), b.to(dtype).float()
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block = block or block_of(m, n, spec.double_quant, x.device)
    constants = _matmul_constants(
        spec, dtype, block, k % TRIP == 0, bias_N is not None, adapter is not None
    )
    if m and n:
        with on(x):
            matmul_kernel[(triton.cdiv(n, block[1]), triton.cdiv(m, block[0]))](
                x, *_tensors(packed, spec), bias, t, b, y,
                float(scaling), m, n, b.shape[1], k // CHUNK, **constants,
                num_warps=SPLIT, num_stages=NUM_STAGES,
            )  # fmt: skip
    return y.to(dtype)


def _moved(packed: Packed4bit, device: torch.device) -> Packed4bit:
    nested, offset = (None if t is None else t.to(device) for t in packed[2:])
    return Packed4bit(packed.codes.to(device), packed.absmax.to(device), nested, offset)


def _exact_case(spec: Spec4bit, numel: int, device: torch.device) -> Packed4bit:
    """All codes, with the absmax of each block a power of two (through the dynamic map, too)."""
    generator = torch.Generator().manual_seed(numel)
    codes = torch.arange((numel + 1) // 2) * 151 % 256
    blocks = spec.blocks(numel)
    pick = torch.randint(0, 2, (blocks,), generator=generator)
    absmax, nested, offset = torch.exp2(pick.float()), None, None
    if spec.double_quant:
        zero = int((dynamic_map(torch.device("cpu")) == 0).nonzero())
        absmax = torch.where(pick == 1, 255, zero).to(torch.uint8)
        nested = torch.arange(-(-blocks // NESTED_BLOCK)) % 2 * 2.0 + 1.0
        offset = torch.ones(1)
    return _moved(Packed4bit(codes.to(torch.uint8), absmax, nested, offset), device)


def check_dequantize(device: torch.device, spec: Spec4bit, dtype: torch.dtype) -> bool:
    """Whether `dequantize` equals the reference on ``device``, for all bytes, even and not."""
    generator = torch.Generator().manual_seed(0)
    for numel in (2 * DEQUANTIZE_BLOCK, DEQUANTIZE_BLOCK + 2 * spec.block_size + 77):
        codes = torch.arange((numel + 1) // 2).to(torch.uint8)
        blocks = spec.blocks(numel)
        absmax, nested, offset = torch.rand(blocks, generator=generator), None, None
        if spec.double_quant:
            absmax = torch.randint(0, 256, (blocks,), generator=generator).to(torch.uint8)
            nested = torch.rand(-(-blocks // NESTED_BLOCK), generator=generator)
            offset = torch.ones(1) / 3
        packed = Packed4bit(codes, absmax, nested, offset)
        expected = reference(codes, dequantize_absmax(packed), spec, (numel,), dtype)
        if not torch.equal(
            dequantize(_moved(packed, device), spec, (numel,), dtype).cpu(), expected
        ):
            return False
    return True


def check_matmul(
    device: torch.device,
    spec: Spec4bit,
    dtype: torch.dtype,
    shape: Sequence[int],
    adapter: bool,
) -> bool:
    """Whether `matmul` is exact on ``device`` in the forms that a weight of ``shape`` (N, K) uses.

    W_hat and x have few bits, so that fp32 holds every partial sum: y has one right value.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(dtype)

    n, k = 40, TRIP if shape[1] % TRIP == 0 else TRIP + 3 * CHUNK
    packed = _exact_case(spec, n * k, device)
    here = _moved(packed, torch.device("cpu"))
    weight = reference(here.codes, dequantize_absmax(here), spec, (n, k), dtype)
    x = integers(17, k) * (torch.rand(17, k, generator=generator) < 16 / k)
    bias, t, b = integers(n), integers(17, 40), integers(n, 40)
    exact = x.double() @ weight.double().T + bias.double()
    if adapter:
        exact = exact + 0.5 * (t.double() @ b.double().T)
    x, bias, t, b = (value.to(device) for value in (x, bias, t, b))
    added = Adapter(t, b, 0.5) if adapter else None
    for m in (1, BLOCKS_M[-1]):
        block = block_of(m, shape[0], spec.double_quant, device)
        y = matmul(x, packed, spec, n, bias, added, block)
        if not torch.equal(y.cpu(), exact.to(dtype)):
            return False
    return True


def shipped() -> Iterator[Shipped]:
    """What `dequantize` and `matmul` launch, for the ahead-of-time gates."""
    spec = Spec4bit()
    plain, fp4 = replace(spec, double_quant=False), replace(spec, quant_type="fp4")
    bf16, fp16 = HALF
    for one, dtype, even in ((spec, bf16, True), (spec, torch.float32, True), (plain, bf16, False)):
        yield _shipped_dequantize(one, dtype, even)
    # (BLOCK_M, BLOCK_N), K a multiple of TRIP, bias and adapter
    yield _shipped_matmul(spec, bf16, (8, 16), True, False)
    yield _shipped_matmul(spec, bf16, (8, 32), True, False)
    yield _shipped_matmul(spec, bf16, (16, 16), True, False)
    yield _shipped_matmul(spec, bf16, (16, 32), True, True)
    yield _shipped_matmul(spec, bf16, (8, 16), False, False)
    yield _shipped_matmul(plain, bf16, (8, 32), True, False)
    yield _shipped_matmul(plain, bf16, (16, 16), True, True)
    yield _shipped_matmul(replace(spec, block_size=128), fp16, (16, 32), True, True)
    yield _shipped_matmul(fp4, fp16, (8, 16), True, False)


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def _packed_types(spec: Spec4bit) -> dict[str, str]:
    names = ("nested_ptr", "offset_ptr", "map_ptr", "codebook_ptr")
    types = {"codes_ptr": "*u8", "absmax_ptr": "*u8" if spec.double_quant else "*fp32"}
    return types | dict.fromkeys(names, "*fp32")


def _name(spec: Spec4bit, dtype: torch.dtype) -> str:
    double = " double" if spec.double_quant else ""
    return f"{spec.quant_type}{double} g{spec.block_size} {_TYPES[dtype][1:]}"


def _shipped_dequantize(spec: Spec4bit, dtype: torch.dtype, even: bool) -> Shipped:
    return Shipped(
        name=f"nf4 dequantize {_name(spec, dtype)}{'' if even else ' odd'}",
        kernel=dequantize_kernel,
        types=_packed_types(spec) | {"out_ptr": _TYPES[dtype], "numel": "i32"},
        constants=_dequantize_constants(spec, dtype, even),
        num_warps=DEQUANTIZE_WARPS,
        divisible=("numel",) if even else (),
        values=DEQUANTIZE_BLOCK,
        # at the bandwidth of an H200 there are 17 issue slots per weight for 2.5 bytes
        most_instructions={90: 8.0} if even and dtype in HALF else {},
        # the mask of the last program may end anywhere
        wide_loads=even,
    )


def _shipped_matmul(
    spec: Spec4bit, dtype: torch.dtype, block: tuple[int, int], even: bool, epilogue: bool
) -> Shipped:
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "t_ptr", "b_ptr", "y_ptr"), _TYPES[dtype])
    sizes = dict.fromkeys(("M", "N", "R", "chunks"), "i32")
    details = (" + adapter" if epilogue else "") + ("" if even else " odd")
    return Shipped(
        name=f"nf4 matmul {_name(spec, dtype)} {block[0]}x{block[1]}{details}",
        kernel=matmul_kernel,
        types=pointers | _packed_types(spec) | {"scaling": "fp32"} | sizes,
        constants=_matmul_constants(spec, dtype, block, even, epilogue, epilogue),
        num_warps=SPLIT,
        num_stages=NUM_STAGES,
        divisible=("N", "R"),
        values=block[1] * TRIP,
        most_instructions={90: 5.0},
    )
