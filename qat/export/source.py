"""The artifact that is exported: its codes and scales, one matrix at a time.

A compressed-tensors artifact gives `Matrix` (codes, scales, zero points as trained) and kept
tensors; an ``nf4/`` directory gives its bitsandbytes tensors as stored. Files are memory-mapped, so
an export holds one matrix at a time.

Shape legend: N output features, K input features, G scales a row.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor

from qat.errors import UserError
from qat.packed_plan import spec_of, unpack_zero_point
from qat.runtime import read_artifact_config
from qat.stored_layers import covering
from qat.tensor_files import TensorFiles, read_json
from qat_kernels import QuantSpec
from qat_kernels.numerics import dequantize, unpack

LAYER_TENSORS = ("packed", "scale", "zero_point", "shape")
"""Suffixes of ``weight_`` under which compressed-tensors stores a packed layer."""


@dataclass(frozen=True)
class Matrix:
    """One quantized weight as it was trained."""

    name: str
    """Module name in the checkpoint, without ``.weight``."""
    spec: QuantSpec
    """Bits, symmetry and granularity of the codes."""
    codes: Tensor
    """int8 [N, K] in ``spec.q_min ... spec.q_max``."""
    scale: Tensor
    """fp32 [N, G]; tensor granularity is [1, 1]."""
    zero_point: Tensor | None
    """int8 like ``scale``, in the range of the codes; None where symmetric."""

    @property
    def group(self) -> int:
        """Input features that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def levels(self) -> Tensor:
        """int16 [N, K]: codes minus zero points, so that the weight is levels times scale."""
        levels = self.codes.to(torch.int16)
        if self.zero_point is None:
            return levels
        return levels - self.zero_point.to(torch.int16).repeat_interleave(self.group, dim=1)

    def row_scale(self, group: int) -> Tensor:
        """fp32 [N, K / group]: the scales repeated for smaller groups, which carry the same weight.

        Raises:
            ValueError: ``group`` does not divide this matrix's group.
        """
        if self.group % group:
            raise ValueError(f"{self.name}: groups of {self.group} are no multiple of {group}")
        rows = self.codes.shape[0]
        return self.scale.expand(rows, -1).repeat_interleave(self.group // group, dim=1)

    def weight(self) -> Tensor:
        """fp32 [N, K]: the trained weight, (q - z) s."""
        scale = self.scale.expand(self.codes.shape[0], -1)
        zero = None if self.zero_point is None else self.zero_point.expand_as(scale)
        return dequantize(self.codes, scale, zero)


@dataclass(frozen=True)
class MatrixInfo:
    """What is known of a matrix without reading it."""

    name: str
    """Module name in the checkpoint, without ``.weight``."""
    spec: QuantSpec
    """Of its weight."""
    inputs: Any | None
    """The compressed-tensors arguments of its quantized inputs, or None."""
    packed: bool
    """Stored as packed words (else as int8)."""


class Source:
    """An artifact opened for reading.

    Args:
        path: ``artifact/`` of a run (compressed-tensors) or ``nf4/`` (bitsandbytes).
        stack: closes the files.

    Raises:
        UserError: not an artifact, files missing or damaged, or of another quantization method.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self.hf_config, self.quantization = read_artifact_config(path)
        """transformers' configuration, and the section of config.json that says how."""
        method = self.quantization.get("quant_method")
        if method not in ("compressed-tensors", "bitsandbytes"):
            raise UserError(
                f"artifact={path}: quant_method={method}; this project writes and exports "
                "compressed-tensors and bitsandbytes"
            )
        self.kind: Literal["compressed-tensors", "bitsandbytes"] = method
        self.config: dict[str, Any] = read_json(path / "config.json")
        """config.json as it is."""
        self.files = TensorFiles(path, stack)

    @property
    def model_type(self) -> str:
        """Family, as transformers names it."""
        return str(self.config["model_type"])

    @property
    def has_adapter(self) -> bool:
        """Whether this is an ``nf4/`` directory with its adapter."""
        return (self.path / "adapter" / "adapter_config.json").is_file()

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.hf_config.get_text_config().tie_word_embeddings)

    @cached_property
    def matrices(self) -> dict[str, MatrixInfo]:
        """Module name → what is known of its quantized weight, in the order of their names.

        Empty for bitsandbytes.
        """
        if self.kind != "compressed-tensors":
            return {}
        parsed = QuantizationConfig.model_validate(self.quantization)
        suffix = ".weight_scale"
        names = sorted(n.removesuffix(suffix) for n in self.files.names() if n.endswith(suffix))
        return {name: self._info(name, parsed) for name in names}

    def _info(self, name: str, parsed: QuantizationConfig) -> MatrixInfo:
        group = group_of(name, parsed)
        arguments = group.weights
        if arguments is None or arguments.type != "int":
            raise UserError(f"{name}: weights={arguments}; integer codes are expected")
        packed = f"{name}.weight_packed" in self.files
        return MatrixInfo(name, spec_of(arguments), group.input_activations, packed)

    @cached_property
    def kept(self) -> list[str]:
        """Names of the tensors that are stored as values: embeddings, norms, biases."""
        own = set()
        for info in self.matrices.values():
            own |= {f"{info.name}.weight_{suffix}" for suffix in LAYER_TENSORS}
            own |= {f"{info.name}.input_scale", f"{info.name}.input_zero_point"}
            if not info.packed:
                own.add(f"{info.name}.weight")
        return sorted(self.files.names() - own)

    @property
    def names(self) -> list[str]:
        """Modules of the matrices, and kept tensors: all that an export must carry."""
        return [*self.matrices, *self.kept]

    def tensor(self, name: str) -> Tensor:
        """One kept tensor, as stored."""
        return self.files.get(name)

    def input_scale(self, name: str) -> Tensor | None:
        """fp32 [1]: the static scale of a layer's inputs, or None."""
        stored = f"{name}.input_scale"
        return self.files.get(stored) if stored in self.files else None

    def matrix(self, name: str) -> Matrix:
        """Codes and scales of one quantized weight.

        Raises:
            UserError: a part of it is missing.
        """
        info = self.matrices[name]
        if info.packed:
            codes = unpack(self._part(name, "weight_packed"), info.spec.bits, self.shape(name)[1])
        else:
            codes = self._part(name, "weight")
        return Matrix(name, info.spec, codes, self.scale(name), self.zero_point(name))

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of one quantized weight."""
        if self.matrices[name].packed:
            n, k = self._part(name, "weight_shape").tolist()
        else:
            n, k = self._part(name, "weight").shape
        return n, k

    def scale(self, name: str) -> Tensor:
        """fp32 [N, G] (tensor: [1, 1]): the scales of one quantized weight."""
        scale = self._part(name, "weight_scale").to(torch.float32)
        if self.matrices[name].spec.granularity == "tensor":
            return scale.reshape(1, 1)
        return scale.reshape(self.shape(name)[0], -1)

    def zero_point(self, name: str) -> Tensor | None:
        """int8, like `scale`: the zero points of one quantized weight; None where symmetric."""
        spec = self.matrices[name].spec
        if spec.symmetric:
            return None
        stored = self._part(name, "weight_zero_point")
        zero_point = unpack_zero_point(stored, spec.bits, self.shape(name)[0])
        return zero_point.reshape(self.scale(name).shape)

    def _part(self, name: str, part: str) -> Tensor:
        stored = f"{name}.{part}"
        if stored not in self.files:
            raise UserError(f"{stored}: missing; the artifact is not complete")
        return self.files.get(stored)

    def all_matrices(self) -> Iterator[Matrix]:
        """Each quantized weight, one at a time."""
        for name in self.matrices:
            yield self.matrix(name)

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation defaults: all that is neither weights nor facts."""
        written = {"README.md", "manifest.json", "config.json", "export.json"}
        return [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file()
            and path.name not in written
            and ".safetensors" not in path.name
            and path.suffix != ".sig"
        ]


def group_of(name: str, parsed: QuantizationConfig) -> Any:
    """The config group of a layer: names and patterns before the class.

    Args:
        name: of its module.
        parsed: a `QuantizationConfig` of compressed-tensors.

    Raises:
        UserError: no group covers it.
    """
    groups = list(parsed.config_groups.values())
    index = covering(name, [group.targets for group in groups])
    if index is None:
        raise UserError(f"{name}: no group of quantization_config covers it")
    return groups[index]
