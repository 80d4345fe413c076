"""What the exports that are Hugging Face directories share: config.json, side files, common losses.

The weights are safetensors under the artifact's names, the tokenizer files are the artifact's.
config.json is the artifact's with another ``quantization_config`` and a section ``qat_lightning``
that says where the weights come from and what was lost.
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from qat.export.format import Loss, ReadTensor
from qat.export.source import Source
from qat.fidelity import FidelityError
from qat.tensor_files import TensorFiles, read_json

FACTS = "qat_lightning"
"""Section of config.json with the facts of the conversion; readers ignore it."""


def copy_side_files(source: Source, directory: Path) -> None:
    """Tokenizer, chat template and generation defaults."""
    for path in source.side_files():
        shutil.copyfile(path, directory / path.name)


def write_config(
    source: Source,
    directory: Path,
    quantization: dict[str, Any] | None,
    notes: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json.

    Args:
        source: the artifact.
        directory: where to.
        quantization: the ``quantization_config``; None leaves it out.
        notes: the facts of the conversion, see `qat.export.format.Format.write`.
        dtype: what the weights are loaded in; None keeps the artifact's.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config[FACTS] = notes
    if quantization is not None:
        config["quantization_config"] = quantization
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype_name(dtype)
    write_json(directory / "config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON object as a file of sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def model_dtype(source: Source) -> torch.dtype:
    """Dtype of what is kept.

    config.json says the same but for experts, where it says float32 because of their scales.
    """
    for name in source.kept:
        value = source.tensor(name)
        if value.is_floating_point() and value.ndim == 2:
            return value.dtype
    stored: torch.dtype = getattr(torch, str(source.config["dtype"]))
    return stored


def is_exact(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds every value (any shape); integers are taken as they are."""
    if not values.is_floating_point():
        return True
    return torch.equal(values.to(dtype).to(torch.float64), values.to(torch.float64))


def kept_linears(source: Source) -> list[str]:
    """Names of the linear layers that stayed unquantized, as the artifact lists them."""
    ignored: list[str] = source.quantization.get("ignore") or []
    return [name for name in ignored if not name.startswith("re:")]


def with_progress(names: list[str], what: str) -> Iterator[str]:
    """The names, with a bar where they take longer than two seconds."""
    yield from tqdm(names, desc=what, delay=2, leave=False, disable=None)


def input_losses(source: Source) -> list[Loss]:
    """Quantized inputs, which only compressed-tensors and onnx know how to declare."""
    quantized = [name for name, info in source.matrices.items() if info.inputs is not None]
    if not quantized:
        return []
    why = (
        f"the inputs of {len(quantized)} layers are quantized to 8 bits (first {quantized[0]}), "
        "and this format carries weights only"
    )
    return [Loss("quantized inputs", why, "format=compressed-tensors")]


def scale_losses(source: Source, dtype: torch.dtype, names: list[str] | None = None) -> list[Loss]:
    """Scales that the format's dtype rounds; portable scales are exact in each."""
    losses = []
    for name in with_progress(list(source.matrices) if names is None else names, "check scales"):
        if not is_exact(source.scale(name), dtype):
            why = f"its scales are not exact in {dtype_name(dtype)}, in which the format keeps them"
            losses.append(Loss(name, why, "format=merged dtype=float32"))
    return losses


def integers_only(source: Source, name: str) -> list[Loss]:
    """The loss of every format for integer codes when the artifact is an ``nf4/`` directory."""
    if source.kind == "compressed-tensors":
        return []
    why = (
        f"{source.path} holds NF4 codes, which are no integers times a scale; the run's artifact/ "
        "holds integer codes"
    )
    nearest = "format=bitsandbytes for the base and format=peft for its adapter"
    return [Loss("the NF4 base", why, f"{nearest}; or {name} of the run's artifact/", False)]


def common_group(source: Source) -> int:
    """Length of the groups that all matrices can share exactly; -1 if each row has one scale.

    Scales of larger groups are repeated.
    """
    groups = []
    for name in source.matrices:
        k = source.shape(name)[1]
        count = source.scale(name).shape[1]
        groups.append((k // count, count))
    if all(count == 1 for _, count in groups):
        return -1
    return math.gcd(*(group for group, _ in groups))


@contextmanager
def opened(directory: Path) -> Iterator[tuple[TensorFiles, dict[str, Any]]]:
    """Files and ``quantization_config`` of an output that is read back."""
    with ExitStack() as stack:
        files = TensorFiles(directory, stack)
        yield files, read_json(directory / "config.json").get("quantization_config") or {}


def read_kept(source: Source, files: TensorFiles, used: set[str]) -> Iterator[ReadTensor]:
    """Every tensor of an output that is no part of a quantized weight.

    Args:
        source: the artifact.
        files: the output.
        used: names in it that belong to quantized weights.

    Raises:
        FidelityError: the output holds a tensor that the artifact does not.
    """
    kept = set(source.kept)
    for name in sorted(files.names() - used):
        if name not in kept:
            raise FidelityError(f"{name} does not belong there")
        yield ReadTensor(name, files.get(name))
