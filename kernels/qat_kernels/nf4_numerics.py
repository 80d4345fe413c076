"""The numerics of NF4 / FP4 weights, bit-equal to bitsandbytes: the reference of `nf4`.

Equations. The weight is flattened and cut into blocks of g values (the last may be shorter); with
T the 16 values of the data type and a the absmax of a block, all in fp32::

    v = clamp(w * (1 / a), -1, 1)      (in a last, shorter block: w / a)
    u = the index of the value of T nearest to v, the lower one where v is a midpoint
    w_hat = T[u] * a                                                rounded once to the dtype asked

(a is raised to 1e-38 before it divides.) Double quantization stores the absmax values in 8 bits:
their mean ``offset`` is subtracted, and blocks of 256 of what remains, with n their absmax, are
coded with the dynamic map D of 256 values::

    t = clamp((a - offset) * (1 / n), -1, 1)
    i = trunc((t + 1) / 2 * 65535 + 1/2)                            the sum rounded once
    b = the index of the value of D nearest to 2 i / 65535 - 1      (b = 0 where n = 0)
    a_hat = D[b] * n + offset

Layout: codes uint8 [ceil(numel / 2)], the first value of a pair in the high nibble, an odd last
one padded with the code of zero. 4 + 32 / g bits per weight, 4 + 8 / g + 1 / (8 g) with double
quantization: 4.127 at the usual g = 64.

Shape legend: B blocks of g values.

Which bitsandbytes. The definition is that of its CPU backend (0.50), whose results differ from
those of its CUDA kernels in a few places; what was quantized by either is read exactly by all:

- CUDA divides nowhere (a short last block, too, is multiplied by a reciprocal), and may break the
  ties of v differently.
- CUDA rounds b to the nearest value of D itself; the CPU goes through the 16-bit index i above, so
  that an absmax equal to the mean is coded as 2.1e-5 * n and not as zero.
- The mean depends on the order of the sum, hence on the device, on the vector width of the CPU
  and, in bitsandbytes, on the number of threads (above 32768 blocks). Here it is summed as one
  thread does, so that the same weight gives the same bytes whatever OMP_NUM_THREADS says.
- Of FP4's two zeros (codes 0 and 8) the second is -0.0 in some of bitsandbytes' kernels, +0.0 here
  and in the others. Where the CPU has AVX512-BF16, its bf16 output flushes subnormal weights
  (below 1.2e-38) to zero; here they are rounded.

Sources: Dettmers et al., QLoRA (arXiv:2305.14314) and 8-bit optimizers (arXiv:2110.02861, the
dynamic map); bitsandbytes 0.50.2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from qat_kernels.numerics import check_finite

QuantType = Literal["nf4", "fp4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Values per absmax that bitsandbytes takes."""
NESTED_BLOCK = 256
"""Absmax values that share one fp32 scale under double quantization."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights, before and after."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution, in order (QLoRA, appendix E)."""
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""Magnitudes * 12 of FP4's codes 0 ... 7; codes 8 ... 15 are their negatives."""
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
"""FP4 codes by ascending value: +0 takes negative values that round to zero, and zero itself."""
_CHUNK = {"cpu": 1 << 19}
"""Values handled at a time: on the CPU what fits the cache (see numerics.CHUNK_ELEMENTS)."""
_CHUNK_ELSEWHERE = 1 << 25


@dataclass(frozen=True)
class Spec4bit:
    """How a weight is quantized to 4 bits.

    >>> packed = quantize_4bit(torch.ones(8, 40), Spec4bit())
    >>> tuple(packed.codes.shape), tuple(packed.absmax.shape), packed.absmax.dtype
    ((160,), (5,), torch.uint8)
    """

    quant_type: QuantType = "nf4"
    """Data type of the codes: nf4 (quantiles of a normal distribution) or fp4 (1-2-1 bits)."""
    block_size: int = 64
    """Values that share one absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096."""
    double_quant: bool = True
    """Store the absmax values in 8 bits: 4.13 bits per weight instead of 4.5 at block_size 64."""

    def __post_init__(self) -> None:
        """Raise ValueError for what bitsandbytes does not carry, naming the field."""
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type={self.quant_type}: nf4 or fp4")
        if self.block_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size={self.block_size}: one of {allowed}")

    def blocks(self, numel: int) -> int:
        """The number of blocks of a weight of ``numel`` values."""
        return -(-numel // self.block_size)


class Packed4bit(NamedTuple):
    """A 4-bit weight: plain tensors, on one device."""

    codes: Tensor
    """uint8 [ceil(numel / 2)], the first value of a pair in the high nibble."""
    absmax: Tensor
    """fp32 [B]; with double quantization uint8 [B]."""
    nested_absmax: Tensor | None
    """fp32 [ceil(B / 256)], or None without double quantization."""
    offset: Tensor | None
    """fp32 scalar, the mean that was subtracted, or None without double quantization."""


def check_packed(packed: Packed4bit, spec: Spec4bit, shape: Sequence[int]) -> list[Tensor]:
    """The tensors that are not None, checked against spec and shape.

    Raises:
        ValueError: dtypes or sizes are not those of a weight of this shape and spec.
    """
    numel = math.prod(shape)
    blocks = spec.blocks(numel)
    expected = [(torch.uint8, (numel + 1) // 2), (torch.float32, blocks)]
    if spec.double_quant:
        nested = (torch.float32, -(-blocks // NESTED_BLOCK))
        expected = [expected[0], (torch.uint8, blocks), nested, (torch.float32, 1)]
    tensors = [tensor for tensor in packed if tensor is not None]
    found = [(tensor.dtype, tensor.numel()) for tensor in tensors]
    if found != expected:
        raise ValueError(
            f"a weight {tuple(shape)} as {spec} consists of (dtype, values) {expected}, not {found}"
        )
    return tensors


def unpack(
    tensors: Sequence[Tensor], quant_type: str, block_size: int
) -> tuple[Packed4bit, Spec4bit]:
    """The inverse of `check_packed`."""
    nested, offset = tensors[2:] if len(tensors) == 4 else (None, None)
    spec = Spec4bit(cast(QuantType, quant_type), block_size, nested is not None)
    return Packed4bit(tensors[0], tensors[1], nested, offset), spec


@cache
def codebook(quant_type: str, device: torch.device) -> Tensor:
    """The fp32 values [16] of a data type, by code (bitsandbytes' ``quant_map``)."""
    with torch.inference_mode(False):
        if quant_type == "nf4":
            return torch.tensor(_NF4, dtype=torch.float32, device=device)
        # divided in fp32, as 1/3 and 1/6 need one rounding
        half = torch.tensor(_FP4, dtype=torch.float32) / 12.0
        return torch.cat((half, -half)).add_(0.0).to(device)


@cache
def dynamic_map(device: torch.device) -> Tensor:
    """The fp32 values [256] of the 8-bit dynamic map, ascending (``nested_quant_map``).

    Seven decades; decade i holds 2^i means of neighbours on an even grid over [0.1, 1], of both
    signs; with 0 and 1.
    """
    values = [0.0, 1.0]
    with torch.inference_mode(False):
        for i in range(7):
            grid = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
            means = (grid[:-1] + grid[1:]) / 2.0 * 10 ** (i - 6)
            values += means.tolist() + (-means).tolist()
        return torch.tensor(sorted(values), dtype=torch.float32).to(device)


@cache
def _bounds(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(midpoints [15] of the sorted codebook, code [16] by rank) of a data type."""
    order = torch.arange(16) if quant_type == "nf4" else torch.tensor(_FP4_ORDER)
    ascending = codebook(quant_type, torch.device("cpu"))[order]
    with torch.inference_mode(False):
        bounds = (ascending[:-1] + ascending[1:]) / 2
        return bounds.to(device), order.to(torch.uint8).to(device)


@cache
def _pairs(quant_type: str, device: torch.device) -> Tensor:
    """fp32 [256, 2]: the two values of each byte of codes."""
    values = codebook(quant_type, device)
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device)
        return torch.stack((values[byte >> 4], values[byte & 15]), -1)


@cache
def _nested_codes(device: torch.device) -> Tensor:
    """uint8 [65536]: code of the dynamic map for each 16-bit index of [-1, 1]."""
    values = dynamic_map(torch.device("cpu"))
    with torch.inference_mode(False):
        index = torch.arange(65536, dtype=torch.float32)
        grid = -1.0 + 2.0 * index / 65535.0
        return torch.bucketize(grid, 0.5 * (values[:-1] + values[1:])).to(torch.uint8).to(device)


def _chunks(numel: int, block_size: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of whole blocks; a last, shorter block is a piece of its own."""
    step = max(_CHUNK.get(device.type, _CHUNK_ELSEWHERE), block_size)
    full = numel - numel % block_size
    for start in range(0, full, step):
        yield start, min(start + step, full)
    if full < numel:
        yield full, numel


def _mean(absmax: Tensor) -> Tensor:
    """Mean of absmax [B], a scalar. On the CPU the same for every number of threads."""
    if absmax.device.type == "cpu":
        # a sum over a whole tensor is split among threads, sums of two equal rows are not
        return absmax.expand(2, -1).mean(1)[0]
    return absmax.mean()


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [B], nested absmax fp32 [ceil(B / 256)], offset) of absmax fp32 [B]."""
    offset = _mean(absmax)
    if not bool(torch.isfinite(offset)):
        raise ValueError(
            "double_quant=true: the mean of the blocks' largest values overflows fp32; weights "
            "that large need double_quant=false"
        )
    blocks = absmax.numel()
    rest = functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = rest.abs().amax(1)
    unit = (rest * (1.0 / nested).unsqueeze(1)).clamp_(-1.0, 1.0)
    # fp64 holds the product exactly, so the sum is rounded once, to fp32, before truncation
    index = ((unit + 1.0) * 0.5).to(torch.float64).mul_(65535.0).add_(0.5).to(torch.float32)
    # 0 * (1 / subnormal) is NaN, whose index is 0 like that of a block of zeros
    index = torch.where(torch.isnan(index) | (nested == 0).unsqueeze(1), 0.0, index)
    codes = _nested_codes(absmax.device)[index.to(torch.int64)]
    return codes.flatten()[:blocks].contiguous(), nested, offset


def _codes(unit: Tensor, bounds: Tensor) -> Tensor:
    """For each value the number of bounds below it, uint8: a vectorised torch.bucketize."""
    count = torch.zeros(unit.shape, dtype=torch.uint8, device=unit.device)
    above = torch.empty(unit.shape, dtype=torch.bool, device=unit.device)
    for bound in bounds:
        torch.gt(unit, bound, out=above)
        count += above.view(torch.uint8)
    return count


def quantize_4bit(w: Tensor, spec: Spec4bit) -> Packed4bit:
    """Quantize a weight; see the module's equations.

    Beyond the result, memory is constant (a chunk) on top of 6 bytes per block.

    Args:
        w: any shape; fp32, bf16 or fp16. Read in row-major order.
        spec: data type, block size, double quantization.

    Raises:
        ValueError: another dtype, no values, NaN or infinity, or values so large that the mean
            of the absmax overflows under double quantization.
    """
    if w.dtype not in DTYPES or not w.numel():
        raise ValueError(
            f"a 4-bit weight is made from a non-empty float32, bfloat16 or float16 tensor, got "
            f"{w.dtype} {tuple(w.shape)}"
        )
    flat, device = w.detach().reshape(-1), w.device
    numel = flat.numel()
    bounds, ranks = _bounds(spec.quant_type, device)
    order = None if spec.quant_type == "nf4" else ranks  # already ascending
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(spec.blocks(numel), dtype=torch.float32, device=device)
    for start, stop in _chunks(numel, spec.block_size, device):
        short = (stop - start) % spec.block_size
        blocks = flat[start:stop].to(torch.float32).view(-1, short or spec.block_size)
        largest = blocks.abs().amax(1)
        # NaN wins in amax, too
        if not bool(torch.isfinite(largest).all()):
            check_finite(flat, "weight")
        floor = largest.clamp(min=1e-38).unsqueeze(1)
        unit = blocks / floor if short else blocks * (1.0 / floor)
        u = _codes(unit.clamp_(-1.0, 1.0).flatten(), bounds)
        if order is not None:
            u = order[u.to(torch.int32)]
        if u.numel() % 2:
            u = torch.cat((u, u.new_full((1,), 7 if spec.quant_type == "nf4" else 0)))
        codes[start // 2 : (stop + 1) // 2] = (u[::2] << 4) | u[1::2]
        first = start // spec.block_size
        absmax[first : first + len(largest)] = floor.view(-1) if short else largest
    if not spec.double_quant:
        return Packed4bit(codes, absmax, None, None)
    return Packed4bit(codes, *_nest(absmax))


def dequantize_absmax(packed: Packed4bit) -> Tensor:
    """The fp32 absmax [B] that weights are multiplied by."""
    if packed.nested_absmax is None or packed.offset is None:
        return packed.absmax
    blocks = packed.absmax.numel()
    values = dynamic_map(packed.absmax.device)[packed.absmax.to(torch.int32)]
    scale = packed.nested_absmax.repeat_interleave(NESTED_BLOCK)[:blocks]
    return values.mul_(scale).add_(packed.offset)


def reference(
    codes: Tensor, absmax: Tensor, spec: Spec4bit, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The definition of dequantizing, in torch.

    Args:
        codes: uint8 [ceil(numel / 2)].
        absmax: fp32 [B].
        spec: data type and block size.
        shape: shape of the weight.
        dtype: dtype of the result; T[u] * absmax is fp32 and rounded to it once.
    """
    numel, device = math.prod(shape), codes.device
    out = torch.empty(numel, dtype=dtype, device=device)
    pairs = _pairs(spec.quant_type, device)
    for start, stop in _chunks(numel, spec.block_size, device):
        values = pairs.index_select(0, codes[start // 2 : (stop + 1) // 2].to(torch.int32))
        values = values.view(-1)[: stop - start].view(spec.blocks(stop - start), -1)
        first = start // spec.block_size
        scale = absmax[first : first + len(values)].unsqueeze(1)
        torch.mul(values, scale, out=values)
        out[start:stop] = values.view(-1)
    return out.view(tuple(shape))
