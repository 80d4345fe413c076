r"""How the Triton kernels of `w4a16` store codes: in planes that one shift and mask take apart.

`numerics.pack` stores neighbours along K beside each other, which costs a shuffle per weight to
take apart. Here a 16-bit word holds codes that lie W apart, so that one shift and mask of a tile of
words is a whole tile of weights, which meets W consecutive columns of x. In a chunk of ``F * W``
input features, F = 16 / bits::

    word w of the chunk, field f (bits f*bits ...)  <->  k = chunk * F * W + f * W + w

3 bits are a plane of the low 2 bits (F = 8) and one of the high bit (8 fields in 8-bit words).
8-bit codes are stored signed. K is padded to whole chunks with codes whose scale is zero.

Shape legend: N features, K inputs, C chunks, W words of a chunk, F fields of a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BITS = (2, 3, 4, 8)
"""Code widths that have planes; others are widened to the next."""
FIELDS = {2: 8, 3: 8, 4: 4, 8: 2}
"""Codes per word."""


@dataclass(frozen=True)
class Layout:
    """How the codes of one weight lie in planes."""

    bits: int
    """2, 3, 4 or 8."""
    group: int
    """Inputs per scale as the kernel sees it: divides a chunk, or is a multiple of it."""
    width: int
    """W, words per chunk and row."""

    @property
    def fields(self) -> int:
        """F, codes per word."""
        return FIELDS[self.bits]

    @property
    def chunk(self) -> int:
        """Input features of a chunk."""
        return self.fields * self.width

    @property
    def repeat(self) -> int:
        """Chunks per trip of the kernel's loop: short ones share its overhead."""
        return 64 // self.width

    @property
    def step(self) -> int:
        """Input features of a trip; K is padded to a multiple of it."""
        return self.chunk * self.repeat


def layout(bits: int, group: int) -> Layout | None:
    """Planes for codes of ``bits`` in groups of ``group``; None where the group has no tile.

    A group that is no multiple of the chunk and does not divide it is read as several smaller ones
    with one scale.
    """
    stored = next((b for b in BITS if b >= bits), None)
    if stored is None:
        return None
    for width in (64, 32, 16):
        chunk = FIELDS[stored] * width
        if group % chunk == 0:
            return Layout(stored, group, width)
        if group % width == 0:
            parts = [g for g in (width * f for f in (8, 4, 2, 1)) if chunk % g == 0]
            return Layout(stored, next(g for g in parts if group % g == 0), width)
    return None


def to_planes(codes_NK: Tensor, plan: Layout) -> tuple[Tensor, Tensor | None]:
    """Codes int8 [N, K] as (int16 words [N, C * W], int8 high bits [N, C * W] for 3 bits).

    Values are codes of at most ``plan.bits`` bits, signed. Exact: `from_planes` is the inverse.
    """
    bits = plan.bits
    pad = -codes_NK.shape[1] % plan.step
    half = 0 if bits == 8 else 1 << (bits - 1)
    u = functional.pad(codes_NK.to(torch.int32), (0, pad)) + half
    u_NCFW = (u & ((1 << bits) - 1)).unflatten(1, (-1, plan.fields, plan.width))
    high = None
    if bits == 3:
        high = _merge(u_NCFW >> 2, 1).to(torch.uint8).view(torch.int8)
        u_NCFW = u_NCFW & 3
    words = _merge(u_NCFW, min(bits, 2) if bits == 3 else bits)
    # above 2^15 int32 does not convert to int16 portably
    words = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    return words, high


def _merge(u_NCFW: Tensor, bits: int) -> Tensor:
    shift = torch.arange(u_NCFW.shape[2], device=u_NCFW.device, dtype=torch.int32) * bits
    # fields do not overlap: adding is OR
    return (u_NCFW << shift[:, None]).sum(2, dtype=torch.int32).flatten(1)


def from_planes(words: Tensor, high: Tensor | None, plan: Layout, k: int) -> Tensor:
    """The inverse of `to_planes`: int8 codes [N, k]."""
    bits = plan.bits
    field_bits = 2 if bits == 3 else bits
    shift = torch.arange(plan.fields, device=words.device, dtype=torch.int32)

    def split(plane: Tensor, width: int) -> Tensor:
        plane = plane.to(torch.int32).unflatten(1, (-1, 1, plan.width))
        return (plane >> (shift * width)[:, None]) & ((1 << width) - 1)

    u = split(words, field_bits)
    if high is not None:
        u = u | (split(high, 1) << 2)
    q = torch.where(u >= 128, u - 256, u) if bits == 8 else u - (1 << (bits - 1))
    return q.flatten(1)[:, :k].to(torch.int8).contiguous()


def to_groups(scale: Tensor, plan: Layout, group: int, k: int) -> Tensor:
    """Scales (or zero points) [N, K / group] for the kernel's groups, zeros where K is padded."""
    per_group = scale.repeat_interleave(group // plan.group, dim=1)
    padded = -(-k // plan.step) * plan.step
    groups = max(padded // plan.group, 1)
    return functional.pad(per_group, (0, groups - per_group.shape[1])).contiguous()
