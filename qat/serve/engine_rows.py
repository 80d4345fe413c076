"""Layers that give a sequence the same bits whatever else is in the batch.

Continuous batching puts the tokens of all sequences into one flat batch [1, T, K]. Multiplied
together, a sequence's rows would depend on T: matmuls take another routine for other numbers of
rows, packed layers another operation for prefill (`qat_kernels.w4a16_cpu.PREFILL_TOKENS`), and
vectorised loops end in scalar code. Here each layer computes the flat batch as ``generate``
computes its sequences one by one, and shares what can be shared without a change of bits:

* operations whose rows are computed one by one (4-bit and 8-bit codes in 16 bit) or in tiles take
  all short pieces together; a piece of prefill length goes by itself;
* what dequantizes its weight does so once, and multiplies piece by piece;
* everything else with weights, activation functions and rotary embeddings: piece by piece.

A piece is what one sequence adds to a step: its prompt, a part of a long one, or one token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qat.linear_4bit import Linear4bit
from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat_kernels import w4a16, w4a16_cpu, w8a8

_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_VECTOR = 64
"""Elements that a vectorised loop of ATen takes at a time, at most (two vectors of 32 bf16)."""
_GRAIN = 32768
"""Elements from which on ATen gives a loop to several threads."""


_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose frequencies do not depend on the length of the sequence."""


def _serial(elements: int) -> bool:
    """Whether one thread computes a loop over so many elements."""
    return elements < _GRAIN or torch.get_num_threads() == 1


@dataclass(frozen=True)
class Piece:
    """What one sequence adds to a step."""

    request_id: str
    """The sequence."""
    past: int
    """Its tokens that are in the cache already."""
    length: int
    """Its tokens in this step."""


class Step:
    """The pieces of the step that is being computed; shared by the layers of one model."""

    def __init__(self) -> None:
        self.pieces: tuple[Piece, ...] = ()
        self.total = 0
        """Tokens of the step."""

    def begin(self, pieces: Sequence[Piece]) -> None:
        """Say what the flat batch of the next forward pass consists of."""
        self.pieces = tuple(pieces)
        self.total = sum(piece.length for piece in pieces)
        self._slices: dict[int, list[tuple[int, int, bool]]] = {}

    def end(self) -> None:
        """Outside of a step layers compute what they are given as a whole."""
        self.pieces, self.total = (), 0

    def slices(self, tokens: int, together: int) -> list[tuple[int, int, bool]] | None:
        """Slices (start, stop, short) of a flat batch.

        Args:
            tokens: rows of the flat batch: of all pieces, or one for each (the head's input).
            together: neighbours shorter than this share a slice; 1 separates all.

        Returns:
            None where the rows are those of no flat batch.
        """
        if not self.pieces or tokens not in (self.total, len(self.pieces)):
            return None
        if tokens != self.total:
            if together > 1:
                return [(0, tokens, True)]
            return [(i, i + 1, False) for i in range(tokens)]
        if together not in self._slices:
            self._slices[together] = self._find(together)
        return self._slices[together]

    def _find(self, together: int) -> list[tuple[int, int, bool]]:
        found: list[tuple[int, int, bool]] = []
        start = 0
        for piece in self.pieces:
            stop, short = start + piece.length, piece.length < together
            if short and found and found[-1][2]:
                found[-1] = (found[-1][0], stop, True)
            else:
                found.append((start, stop, short))
            start = stop
        return found

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: bool = False) -> Tensor:
        """``function`` of a flat batch, piece by piece.

        Args:
            function: maps [..., K] to [..., N].
            x: [1, T, K], or [T, K]; other shapes go to ``function`` whole.
            rows: its rows do not depend on each other below the length of prefill: short pieces
                are given together, as [M, K].
        """
        if len(self.pieces) < 2:
            return function(x)
        axis = x.ndim - 2
        flat = axis == 0 or (axis == 1 and x.shape[0] == 1)
        together = w4a16_cpu.PREFILL_TOKENS if rows else 1
        slices = self.slices(x.shape[axis], together) if flat else None
        if slices is None:
            return function(x)
        parts = []
        for start, stop, short in slices:
            part = x[0, start:stop] if axis else x[start:stop]
            # a new axis has the stride it has in a tensor of its own, by which matmuls choose
            parts.append(function(part[None])[0] if axis and not short else function(part))
        y = torch.cat(parts)
        return y[None] if axis else y


class _Wrapper(nn.Module):
    """A layer that computes a flat batch through another one, whose attributes it shows."""

    inner: nn.Module

    def __init__(self, inner: nn.Module, step: Step) -> None:
        super().__init__()
        self.inner, self.step = inner, step
        self.train(inner.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class ByPiece(_Wrapper):
    """Anything that maps [1, T, K] to [1, T, N], piece by piece."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [1, T, N]."""
        return self.step.apply(self.inner, x)


class ByRow(_Wrapper):
    """A layer with independent rows: short pieces together; see `Step.apply`."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [1, T, N]."""
        return self.step.apply(self.inner, x, rows=True)


class LoraFactor(_Wrapper):
    """A or B of an adapter: DoRA calls it with a unit matrix [K, K], which is no batch."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [..., R or N]."""
        if x.ndim == 2:
            y: Tensor = self.inner(x)
            return y
        return self.step.apply(self.inner, x)


class Elementwise(_Wrapper):
    """An activation function: together where no element can end in a loop's scalar rest."""

    def forward(self, x: Tensor) -> Tensor:
        """The function of each element."""
        if len(self.step.pieces) < 2:
            alone: Tensor = self.inner(x)
            return alone
        if _serial(x.numel()) and x.shape[-1] % _VECTOR == 0 and x.is_contiguous():
            y: Tensor = self.inner(x)
            return y
        return self.step.apply(self.inner, x)


class Rotary(_Wrapper):
    """A rotary embedding; some choose their frequencies by the longest sequence they are given."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(cos, sin), each [1, T, D]."""
        slices = self.step.slices(position_ids.shape[-1], 1)
        if slices is None or len(slices) == 1 or self._rows_agree(position_ids.shape[-1]):
            return self.inner(x, position_ids, *args, **kwargs)
        parts = [
            self.inner(x, position_ids[:, start:stop], *args, **kwargs) for start, stop, _ in slices
        ]
        return tuple(torch.cat(part, 1) for part in zip(*parts))

    def _rows_agree(self, tokens: int) -> bool:
        """Whether the frequencies are fixed, and no cosine ends in a loop's scalar rest."""
        fixed = getattr(self.inner, "rope_type", None) in _FIXED_ROPE
        frequencies = getattr(self.inner, "inv_freq", None)
        if not fixed or not isinstance(frequencies, Tensor):
            return False
        width = 2 * frequencies.numel()
        return width % _VECTOR == 0 and _serial(width * tokens)


class Dequantized(_Wrapper):
    """A layer that multiplies with a dequantized weight: made once, multiplied piece by piece.

    Covers `PackedLinear` on the path ``reference``, `Int8Linear` on ``dequantize`` and
    `Linear4bit`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [1, T, N]."""
        layer = self.inner
        if isinstance(layer, PackedLinear):
            packed = layer.packed
            stored = (packed.codes, packed.scale, packed.zero_point)
            multiply = self._multiply(x.dtype)
            return w4a16.reference(x, *stored, layer.bias, bits=packed.bits, multiply=multiply)
        if isinstance(layer, Int8Linear):
            int8 = layer.packed
            stored = (int8.codes, int8.scale, int8.zero_point)
            multiply = self._multiply(x.dtype)
            return w8a8.dequantized(x, *stored, layer.bias, int8.input_scale, multiply=multiply)
        assert isinstance(layer, Linear4bit)
        weight = layer.weight.to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return self.step.apply(lambda part: functional.linear(part, weight, bias), x)

    def _multiply(self, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        tiles = dtype != torch.float32
        linear = w4a16_cpu.linear_by_tiles if tiles else functional.linear

        def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.step.apply(lambda part: linear(part, weight, bias), x, rows=tiles)

        return multiply


def compute_by_piece(model: nn.Module, step: Step, device: torch.device) -> None:
    """Put these layers around those of a model, in place; what they compute alone stays equal.

    On a GPU only around packed layers, so that decoding many sequences does not pass for prefill;
    everything else is computed together there, and may depend on the batch in its last bits.
    """
    if device.type == "cuda":
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, ByRow(module, step))
        return
    blocks = [
        name
        for name, module in model.named_modules()
        if any(type(child).__name__.endswith("Experts") for child in module.children())
    ]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if any(name.startswith(f"{block}.") for block in blocks):
            continue
        if ".lora_A." in name or ".lora_B." in name:
            wrapper: type[_Wrapper] | None = LoraFactor
        else:
            wrapper = ByPiece if name in blocks else _wrapper_of(module)
        if wrapper is not None:
            model.set_submodule(name, wrapper(module, step))


def _wrapper_of(module: nn.Module) -> type[_Wrapper] | None:
    """The wrapper that a layer needs, if any."""
    if isinstance(module, PackedLinear):
        return Dequantized if module.packed.path == "reference" else ByRow
    if isinstance(module, Int8Linear):
        # integer sums have no order
        return Dequantized if module.packed.path == "dequantize" else None
    if isinstance(module, KeptLinear):
        return ByRow
    if isinstance(module, Linear4bit):
        return Dequantized
    if isinstance(module, nn.Linear | Conv1D):
        return ByPiece
    if type(module).__module__ in _ACTIVATIONS:
        return Elementwise
    if type(module).__name__.endswith("RotaryEmbedding"):
        return Rotary
    return None
