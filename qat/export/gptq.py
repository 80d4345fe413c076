"""GPTQ directories, version 1 and version 2.

For a layer of K inputs, N outputs and G groups of b-bit codes u = q + 2^(b-1)::

    qweight  int32 [K b / 32, N]   codes along K
    qzeros   int32 [G, N b / 32]   zero points along N; version 1 stores z - 1, version 2 stores z
    scales   fp16  [G, N]
    g_idx    int32 [K]             group of each input feature, here always k // group_size

The two versions look alike; only ``checkpoint_format`` tells them apart (``gptq`` or ``gptq_v2``),
and under the wrong label every weight is off by its scale. Version 1 is what most readers mean;
it cannot hold the zero point 0, which wraps around. It is the format of ``checkpoint_format`` in
GPTQModel and vLLM; transformers reads it through optimum and GPTQModel.

The version, widths and group stand in config.json and once more in quantize_config.json.
"""

import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from qat import __version__
from qat.convert import write_shards
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import (
    copy_side_files,
    kept_linears,
    opened,
    read_kept,
    with_progress,
    write_config,
    write_json,
)
from qat.export.integer_layout import Grid, grid_of, layout_losses, outside_blocks
from qat.export.source import Matrix, Source
from qat.fidelity import FidelityError
from qat.tensor_files import TensorFiles, read_json
from qat_kernels.layouts import pack_along_k, pack_gptq_zeros

WIDTHS = (2, 3, 4, 8)
PARTS = ("qweight", "qzeros", "scales", "g_idx")

USE = """
Readers that know GPTQ load this directory: transformers with optimum and GPTQModel, vLLM
(`vllm serve .`; symmetric weights of 4 or 8 bits), onnxruntime-genai's model builder.
"""
USE_V2 = """
This is version 2 of the format (`checkpoint_format: gptq_v2`). A reader that does not look at that
label computes other weights: take transformers with optimum and GPTQModel, or vLLM (which reads
symmetric weights of 4 or 8 bits).
"""


class Gptq:
    """``format=gptq``: version 1."""

    version = 1
    suffix = None
    use = USE.strip()

    def __init__(self, options: Any = None) -> None:
        del options
        self.take_apart = _with_gptqmodel
        try:
            self.reader = f"gptqmodel {metadata.version('gptqmodel')}"
        except metadata.PackageNotFoundError:
            self.take_apart = _with_numpy
            self.reader = f"numpy {numpy.__version__} by the specification (no gptqmodel installed)"

    @property
    def label(self) -> str:
        """``checkpoint_format``, which is the name of the export format too."""
        return "gptq" if self.version == 1 else "gptq_v2"

    def losses(self, source: Source) -> Sequence[Loss]:
        """Part-filled words, scales that fp16 rounds, quantized inputs; version 1: zeros of 0."""
        losses = layout_losses(source, self.label, WIDTHS, along_k=True)
        if self.version == 2 or any(not loss.writable for loss in losses):
            return losses
        grid = grid_of(source, WIDTHS)
        for name in with_progress(list(source.matrices), "check zero points"):
            zero_point = source.zero_point(name)
            if zero_point is not None and int(zero_point.min()) <= -(2 ** (grid.bits - 1)):
                why = "version 1 stores zero points less one, and its zero point 0 would wrap"
                losses.append(Loss(name, why, "format=gptq_v2", writable=False))
        return losses

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        grid = grid_of(source, WIDTHS)
        write_shards(_tensors(source, grid, self.version), directory, f"export {self.label}")
        section = _section(source, grid, self.label)
        write_config(source, directory, section, notes)
        write_json(directory / "quantize_config.json", section)
        copy_side_files(source, directory)

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What GPTQModel dequantizes where it is installed, else the bits by the specification."""
        with opened(directory) as (files, section):
            if section != read_json(directory / "quantize_config.json"):
                raise FidelityError("quantize_config.json and config.json differ")
            used: set[str] = set()
            for name in source.matrices:
                used |= {f"{name}.{part}" for part in PARTS}
                yield self.take_apart(name, _parts(files, name), section)
            yield from read_kept(source, files, used)


class GptqV2(Gptq):
    """``format=gptq_v2``."""

    version = 2
    use = USE_V2.strip()


def _tensors(source: Source, grid: Grid, version: int) -> Iterator[dict[str, Tensor]]:
    for matrix in source.all_matrices():
        parts = _packed(matrix, grid, version)
        yield {f"{matrix.name}.{part}": value for part, value in parts.items()}
    for name in source.kept:
        yield {name: source.tensor(name)}


def _packed(matrix: Matrix, grid: Grid, version: int) -> dict[str, Tensor]:
    k = matrix.codes.shape[1]
    group = k if grid.group == -1 else grid.group
    return {
        "qweight": pack_along_k(matrix.codes, grid.bits),
        "qzeros": pack_gptq_zeros(grid.zero_point(matrix), grid.bits, version),
        "scales": grid.scale(matrix).t().contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32) // group,
    }


def _section(source: Source, grid: Grid, label: str) -> dict[str, Any]:
    """``quantization_config`` of config.json, and quantize_config.json."""
    section: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": label,
        "bits": grid.bits,
        "group_size": grid.group,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": any(outside_blocks(name) for name in source.matrices),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qat-lightning:{__version__}"]},
    }
    kept = [name for name in kept_linears(source) if not outside_blocks(name)]
    if kept:
        # GPTQModel and vLLM read the first, optimum the second
        section["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in kept}
        section["modules_in_block_to_quantize"] = [list(source.matrices)]
    return section


def _parts(files: TensorFiles, name: str) -> dict[str, Tensor]:
    missing = [part for part in PARTS if f"{name}.{part}" not in files]
    if missing:
        raise FidelityError(f"{name}.{missing[0]} is missing")
    return {part: files.get(f"{name}.{part}") for part in PARTS}


def _with_numpy(name: str, parts: dict[str, Tensor], section: dict[str, Any]) -> ReadMatrix:
    """Read a layer as the specification says, without code of the writer."""
    bits = section["bits"]
    codes = _fields(parts["qweight"].numpy().T, bits)
    zeros = _fields(parts["qzeros"].numpy(), bits).T
    if section["checkpoint_format"] == "gptq":
        zeros = zeros + 1
    of_input = parts["g_idx"].numpy()
    scales = parts["scales"].numpy().T.astype(numpy.float32)
    values = (codes - zeros[:, of_input]).astype(numpy.float32) * scales[:, of_input]
    middle = 1 << (bits - 1)
    return ReadMatrix(
        name,
        torch.from_numpy(codes - middle),
        torch.from_numpy(scales),
        torch.from_numpy(zeros - middle),
        torch.from_numpy(values),
    )


def _fields(words: Any, bits: int) -> Any:
    """Unsigned numbers int16 [R, W 32 / bits] in a row-wise little-endian stream int32 [R, W]."""
    stream = numpy.ascontiguousarray(words).view(numpy.uint32).astype(numpy.uint64)
    count = stream.shape[1] * 32 // bits
    word, offset = numpy.divmod(numpy.arange(count) * bits, 32)
    after = numpy.pad(stream, ((0, 0), (0, 1)))[:, 1:]
    found = numpy.empty((len(stream), count), dtype=numpy.int16)
    for row, (own, following) in enumerate(zip(stream, after)):
        pair = own | (following << numpy.uint64(32))
        found[row] = (pair[word] >> offset.astype(numpy.uint64)) & numpy.uint64((1 << bits) - 1)
    return found


def _with_gptqmodel(name: str, parts: dict[str, Tensor], section: dict[str, Any]) -> ReadMatrix:
    """Read a layer with GPTQModel's torch kernel, in fp32."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    k, n = len(parts["g_idx"]), parts["scales"].shape[1]
    layer = TorchLinear(
        bits=section["bits"],
        group_size=section["group_size"],
        sym=section["sym"],
        desc_act=section["desc_act"],
        in_features=k,
        out_features=n,
    )
    for part, value in parts.items():
        setattr(layer, part, value.clone())
    if section["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, section["bits"], torch.int32)
    layer.post_init()
    layer.scales = parts["scales"].float()
    values = layer.dequantize_weight().t()
    layer.scales = torch.ones_like(layer.scales)
    levels = layer.dequantize_weight().t().to(torch.int16)
    return ReadMatrix(name, levels, parts["scales"].t().float(), None, values)
