"""The NF4 (or FP4) base of an ``nf4/`` directory, as bitsandbytes stores it.

Weights are copied byte for byte, shard by shard; config.json says how transformers loads them. The
adapter is not part of a bitsandbytes checkpoint: it is exported by ``format=peft``, and the two
together compute what was trained. Because the base alone does not, the adapter is a loss here.
"""

import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.bitsandbytes_format import read as read_layer
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import copy_side_files, opened, write_config
from qat.export.source import Source
from qat.fidelity import FidelityError
from qat.tensor_files import TensorFiles

STATE = ".weight.quant_state.bitsandbytes__"
"""In the name of the entry that describes a 4-bit weight."""

USE = """
```python
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained(".")  # this directory; needs bitsandbytes
```

This is the frozen base. The adapter that was trained on it is exported by `format=peft`:
`PeftModel.from_pretrained(base, ADAPTER)` computes what was trained.

On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in eval mode
and computes in bf16 from then on: set `support_avx512bf16_for_cpu = False` on each of its
Linear4bit for fp32.
"""


class Bitsandbytes:
    """``format=bitsandbytes``."""

    reader = f"bitsandbytes {metadata.version('bitsandbytes')}"
    suffix = None
    use = USE.strip()

    def __init__(self, options: Any = None) -> None:
        del options

    def losses(self, source: Source) -> Sequence[Loss]:
        """Integer codes (fatal), and an adapter, which a base does not hold."""
        if source.kind != "bitsandbytes":
            why = "its codes are integers times a scale, and bitsandbytes stores NF4 or FP4"
            nearest = (
                "format=compressed-tensors, or format=bitsandbytes of the run's nf4/ directory"
            )
            return [Loss("the integer codes", why, nearest, writable=False)]
        if not source.has_adapter:
            return []
        why = "the base is written without the adapter that was trained on it"
        return [Loss("adapter", why, "format=peft, to be loaded on this base")]

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        for path in sorted(source.path.glob("model*.safetensors*")):
            shutil.copyfile(path, directory / path.name)
        write_config(source, directory, source.quantization, notes)
        copy_side_files(source, directory)

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """Every entry, and the weights as bitsandbytes dequantizes them."""
        with opened(directory) as (files, section):
            if section != source.quantization:
                raise FidelityError("quantization_config differs from the artifact's")
            for name in sorted(files.names()):
                if name not in source.files:
                    raise FidelityError(f"{name} does not belong there")
                yield ReadTensor(name, files.get(name))
                layer, found, _ = name.partition(STATE)
                if found:
                    expected = read_layer(layer, source.files.get, source.files.names()).weight
                    yield ReadTensor(f"{layer}.weight", dequantized(files, layer), expected)


def dequantized(files: TensorFiles, layer: str) -> Tensor:
    """A 4-bit weight [N, K] as bitsandbytes computes it, in the dtype that it was stored from."""
    import bitsandbytes

    prefix = f"{layer}.weight"
    entries = {
        name.removeprefix(f"{prefix}."): files.get(name)
        for name in files.names()
        if name.startswith(f"{prefix}.")
    }
    device = torch.device("cpu")
    state = bitsandbytes.functional.QuantState.from_dict(entries, device)
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(files.get(prefix), state)
    return weight
