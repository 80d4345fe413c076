"""compressed-tensors in the layout that inference engines read.

The artifact itself is compressed-tensors; this export differs where engines need it to:

- no ``"dequantize": true``, and one class target where one spec covers all layers;
- scales in the model's dtype, because that is what engines hold them in (vLLM converts on loading);
- weight-only scales per tensor become scales per row, which is the same function: engines know
  weight-only layers by row and by group;
- scales of experts too, though plain transformers then rounds their weights to that dtype: it
  needs the artifact itself, which has them in fp32;
- asymmetric weights with zero points packed along N, as the artifact has them: vLLM reads them,
  plain transformers 5 does not (it stumbles over their shape), so it needs the artifact itself.

Integer weight-only of 2 to 8 bits (``pack-quantized``) and W8A8 (``int-quantized``) are all that a
scheme of this project can hold. There is no FP8 and no NVFP4 in it, hence none to export.
Engines have kernels for 4 and 8 bits; other widths are for readers that unpack.
"""

import copy
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import Tensor

from qat.convert import write_shards
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import (
    copy_side_files,
    integers_only,
    model_dtype,
    opened,
    read_kept,
    scale_losses,
    write_config,
)
from qat.export.source import Matrix, Source, group_of
from qat.fidelity import FidelityError
from qat.tensor_files import TensorFiles
from qat_kernels.numerics import pack

PLAIN = """
Plain transformers with the package compressed-tensors reads it too, in fp32 with the logits that
were trained:

```python
model = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
```
"""
ASYMMETRIC = """
The weights are asymmetric: plain transformers 5 does not read their zero points in this layout. Use
the artifact that this was made from with it.
"""
EXPERTS = """
Plain transformers multiplies experts in the dtype of their scales, which engines want in 16 bit: it
reads other weights than were trained. Use the artifact that this was made from with it.
"""
OTHER = """
Plain transformers does not read all of these layers in this layout. Use the artifact that this was
made from with it.
"""


class CompressedTensors:
    """``format=compressed-tensors``."""

    reader = f"compressed-tensors {metadata.version('compressed-tensors')}"
    suffix = None
    use = ""

    def __init__(self, options: Any = None) -> None:
        del options

    def losses(self, source: Source) -> Sequence[Loss]:
        """Scales that the model's dtype rounds."""
        fatal = integers_only(source, "format=compressed-tensors")
        if fatal:
            return fatal
        # engines hold the scales of int8 matmuls in fp32
        weight_only = [name for name, info in source.matrices.items() if info.inputs is None]
        return scale_losses(source, model_dtype(source), weight_only)

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        dtype = model_dtype(source)
        write_shards(_tensors(source, dtype), directory, "export compressed-tensors")
        write_config(source, directory, engine_config(source.quantization), notes, dtype)
        copy_side_files(source, directory)
        self.use = "```sh\nvllm serve .   # this directory\n```\n" + _plain(source)

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What the package compressed-tensors unpacks and dequantizes, by the written config."""
        with opened(directory) as (files, section):
            parsed = QuantizationConfig.model_validate(section)
            used: set[str] = set()
            for name, info in source.matrices.items():
                scheme = group_of(name, parsed)
                if _inputs(scheme.input_activations) != _inputs(info.inputs):
                    raise FidelityError(f"{name}: its inputs are declared otherwise")
                parts = _parts(files, name)
                used |= {f"{name}.{part}" for part in parts}
                yield _read_matrix(name, parts, scheme)
                if info.inputs is not None and not info.inputs.dynamic:
                    if "input_scale" not in parts:
                        raise FidelityError(f"{name}.input_scale is missing")
                    yield ReadTensor(f"{name}.input_scale", parts["input_scale"])
            yield from read_kept(source, files, used)


def _plain(source: Source) -> str:
    """What the card says of plain transformers."""
    if not all(info.spec.symmetric for info in source.matrices.values()):
        return ASYMMETRIC
    if any(".experts." in name for name in source.matrices):
        return EXPERTS
    # what the artifact declares where its own layout is read in no other way
    return OTHER if source.quantization.get("dequantize") else PLAIN


def engine_config(section: dict[str, Any]) -> dict[str, Any]:
    """The artifact's ``quantization_config`` as engines read it."""
    config = copy.deepcopy(section)
    config.pop("dequantize", None)
    for group in config["config_groups"].values():
        if group["weights"]["strategy"] == "tensor" and group.get("input_activations") is None:
            group["weights"]["strategy"] = "channel"
    return config


def _tensors(source: Source, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    for matrix in source.all_matrices():
        # W8A8 layers are stored by the artifact as engines read them
        int8 = source.matrices[matrix.name].inputs is not None
        parts = _parts(source.files, matrix.name) if int8 else _packed(matrix, dtype)
        yield {f"{matrix.name}.{part}": value for part, value in parts.items()}
    for name in source.kept:
        yield {name: source.tensor(name)}


def _packed(matrix: Matrix, dtype: torch.dtype) -> dict[str, Tensor]:
    """A weight-only matrix; a scale per tensor is repeated for each row."""
    n, bits = matrix.codes.shape[0], matrix.spec.bits
    parts = {
        "weight_packed": pack(matrix.codes, bits),
        "weight_scale": matrix.scale.expand(n, -1).to(dtype).contiguous(),
        "weight_shape": torch.tensor(matrix.codes.shape, dtype=torch.int64),
    }
    if matrix.zero_point is not None:
        zero_point = matrix.zero_point.expand(n, -1)
        parts["weight_zero_point"] = pack(zero_point.t().contiguous(), bits).t().contiguous()
    return parts


def _inputs(arguments: Any) -> tuple[Any, ...] | None:
    """What says how inputs are quantized."""
    if arguments is None:
        return None
    return (
        arguments.num_bits,
        arguments.type,
        arguments.symmetric,
        arguments.strategy,
        arguments.dynamic,
    )


def _parts(files: TensorFiles, name: str) -> dict[str, Tensor]:
    """The tensors of one quantized weight, without its bias."""
    parts = (
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "input_scale",
    )
    return {part: files.get(f"{name}.{part}") for part in parts if f"{name}.{part}" in files}


def _read_matrix(name: str, parts: dict[str, Tensor], scheme: QuantizationScheme) -> ReadMatrix:
    assert scheme.weights is not None
    wanted = {"weight_packed", "weight_shape", "weight_scale"}
    if not (wanted <= parts.keys() or {"weight", "weight_scale"} <= parts.keys()):
        raise FidelityError(f"{name}: {' or '.join(sorted(wanted - parts.keys()))} is missing")
    # in the dtype of the scales it computes; fp32 is what a model in fp32 computes with
    state = parts | {"weight_scale": parts["weight_scale"].to(torch.float32)}
    if "weight_packed" not in parts:
        values = NaiveQuantizationCompressor.decompress(state, scheme)["weight"]
        scale = state["weight_scale"]
        scale = scale.reshape(1, 1) if scale.ndim == 1 else scale
        return ReadMatrix(name, parts["weight"], scale, torch.zeros(1, 1, dtype=torch.int8), values)
    bits = scheme.weights.num_bits
    shape = torch.Size(parts["weight_shape"].tolist())
    codes = unpack_from_int32(parts["weight_packed"], bits, shape)
    unpacked = PackedQuantizationCompressor.decompress(state | {"weight_shape": shape}, scheme)
    zero_point = torch.zeros(1, 1, dtype=torch.int8)
    if not scheme.weights.symmetric:
        zero_point = unpacked["weight_zero_point"]
    return ReadMatrix(name, codes, state["weight_scale"], zero_point, unpacked["weight"])
