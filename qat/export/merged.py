"""Unpacked weights, for everything that reads plain transformers checkpoints.

From an artifact: (q - z) s of every quantized weight, and what was kept, in one dtype. ``auto``
takes the first of float16, bfloat16 and float32 that holds every value: symmetric weights of up to
4 bits with portable scales are exact in float16, kept bfloat16 tensors often are not. Reading in
float32 gives the trained model then.

From ``nf4/``: W + s B A in fp32, rounded once to the dtype. The trained model multiplies by W and
by B A apart, so the sum is not what it computes bit for bit: a loss. What is measured is the
rounding of the sum to the dtype, nothing in float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from qat.bitsandbytes_format import read as read_layer
from qat.convert import merged_tensors, write_shards
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import (
    copy_side_files,
    dtype_name,
    input_losses,
    is_exact,
    opened,
    with_progress,
    write_config,
)
from qat.export.source import Source
from qat.fidelity import FidelityError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""In the order in which ``auto`` tries them."""

USE = """
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this directory
model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
```

The weights are stored in {dtype}, unpacked; float32 computes with what was stored.
"""


class Merged:
    """``format=merged``."""

    reader = f"safetensors {metadata.version('safetensors')}"
    suffix = None
    use = USE.strip()

    def __init__(self, options: Any) -> None:
        self.asked = options.dtype
        self.dtype: torch.dtype | None = (
            None if options.dtype == "auto" else getattr(torch, options.dtype)
        )

    def losses(self, source: Source) -> Sequence[Loss]:
        """Values that the dtype rounds, quantized inputs; for ``nf4/`` the sum itself."""
        if source.has_adapter:
            return self._adapter_losses()
        losses = []
        if self.dtype is None:
            self.dtype = smallest_exact(source)
        elif self.dtype != torch.float32:
            first = next((n for n, v in _values(source) if not is_exact(v, self.dtype)), None)
            if first is not None:
                why = f"its values are not exact in {self.asked}"
                losses = [Loss(first, why, "format=merged dtype=auto", everywhere=True)]
        return [*losses, *input_losses(source)]

    def _adapter_losses(self) -> list[Loss]:
        self.dtype = self.dtype or torch.float32
        why = "its product is added to the base, which the trained model computes beside it"
        if self.dtype != torch.float32:
            why += f"; and the sum is rounded to {dtype_name(self.dtype)}"
        nearest = "format=bitsandbytes for the base and format=peft for its adapter"
        return [Loss("the adapter", why, nearest, everywhere=True)]

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        dtype = self.dtype or smallest_exact(source)
        stream = (
            {name: value.to(dtype) if value.is_floating_point() else value}
            for name, value in _values(source)
        )
        write_shards(stream, directory, "export merged")
        write_config(source, directory, None, notes, dtype)
        copy_side_files(source, directory)
        self.use = USE.strip().format(dtype=dtype_name(dtype))

    def expected(self, source: Source) -> Iterable[str]:
        """Names of the unpacked weights, and of what was kept."""
        if source.kind == "bitsandbytes":
            return [name for name in source.kept if ".weight." not in name]
        return [*(f"{name}.weight" for name in source.matrices), *source.kept]

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """Every stored tensor beside what was trained, in fp32."""
        with opened(directory) as (files, section):
            if section:
                raise FidelityError("config.json still declares a quantization")
            left = files.names()
            for name, expected in _values(source):
                if name in left:
                    left.remove(name)
                    yield ReadTensor(name, files.get(name), expected)
            if left:
                raise FidelityError(f"{min(left)} does not belong there")


def smallest_exact(source: Source) -> torch.dtype:
    """The first of `DTYPES` that holds every value of an artifact."""
    left = list(DTYPES[:-1])
    for _, value in _values(source):
        left = [dtype for dtype in left if is_exact(value, dtype)]
        if not left:
            break
    return left[0] if left else DTYPES[-1]


def _values(source: Source) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every tensor that a merged checkpoint holds, before it is rounded."""
    if source.has_adapter:
        yield from _with_adapter(source)
        return
    if source.kind == "bitsandbytes":
        yield from _base(source)
        return
    for name in with_progress(source.names, "unpack"):
        if name in source.matrices:
            yield f"{name}.weight", source.matrix(name).weight()
        else:
            yield name, source.tensor(name)


def _base(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The same of a 4-bit base without an adapter: its weights dequantized in fp32."""
    stored = source.files.names()
    for name in with_progress([n for n in source.kept if ".weight." not in n], "unpack"):
        if f"{name}.absmax" in stored:
            layer = read_layer(name.removesuffix(".weight"), source.files.get, stored)
            layer.weight_dtype = torch.float32
            yield name, layer.weight
        else:
            yield name, source.tensor(name)


def _with_adapter(source: Source) -> Iterator[tuple[str, Tensor]]:
    """The same of an ``nf4/`` directory: W + s B A in fp32, one weight at a time."""
    # imported here: an artifact needs neither PEFT nor the adapters' modules
    from qat.adapter_runtime import load_nf4_with_coverage

    model, coverage = load_nf4_with_coverage(source.path, torch.float32, torch.device("cpu"))
    for name, value in merged_tensors(model, coverage, torch.float32):
        # the experts of a layer are one tensor, and several in a checkpoint
        yield from revert_weight_conversion(model, {name: value}).items()
