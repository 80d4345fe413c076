"""Which tensors of an artifact belong to which layer, from safetensors headers alone."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qat.errors import UserError
from qat.safetensors_header import BrokenHeader, TensorEntry, read_header

PARTS = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale",
    "weight", "bias",
)  # fmt: skip
"""Last components of the names that compressed-tensors writes for one layer."""
BITSANDBYTES = re.compile(
    r"(.+)\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state)"
    r"(?:\.bitsandbytes__\w+)?"
)
"""Names that bitsandbytes writes beside the codes, which are ``weight``."""


Stored = tuple[Path, TensorEntry]
"""A tensor and the file that holds it."""


def stored_layers(directory: Path) -> dict[str, dict[str, Stored]]:
    """Layer or bare parameter → part → where it lies, in the order of the files.

    The parts of one may lie in two shards.

    Raises:
        UserError: a broken safetensors file.
    """
    layers: dict[str, dict[str, Stored]] = {}
    for path in sorted(directory.rglob("*.safetensors")):
        try:
            entries = read_header(path).tensors
        except BrokenHeader as error:
            raise UserError(f"{path}: {error}") from error
        for entry in entries:
            name, part = _layer_and_part(entry.name)
            layers.setdefault(name, {})[part] = (path, entry)
    return layers


def kind_of(name: str) -> str:
    """A parameter's name without its layer: ``self_attn.q_proj`` for all layers' q_proj."""
    return re.sub(r"^(.*\.)?\d+\.|^model\.", "", name.removesuffix(".weight"))


def _layer_and_part(tensor: str) -> tuple[str, str]:
    match = BITSANDBYTES.fullmatch(tensor)
    if match:
        return match[1], match[2]
    prefix, _, part = tensor.rpartition(".")
    return (prefix, part) if part in PARTS else (tensor, "weight")


def raw_bytes(path: Path, entry: TensorEntry) -> bytes:
    """The bytes of a tensor."""
    with path.open("rb") as file:
        file.seek(entry.begin)
        return file.read(entry.nbytes)


def covering(name: str, targets: Sequence[Sequence[str]]) -> int | None:
    """Which of several lists of compressed-tensors' targets covers a layer; None if none does.

    Names and patterns come before classes; of equals the first.
    """
    by_class = None
    for index, group in enumerate(targets):
        for target in group:
            is_pattern = target.startswith("re:")
            if target == name or (is_pattern and re.match(target[3:], name)):
                return index
            if not is_pattern and "." not in target and by_class is None:
                by_class = index
    return by_class


def weight_spec(name: str, quantization: dict[str, Any]) -> dict[str, Any]:
    """The weight arguments that compressed-tensors applies to a layer; empty if none."""
    groups = list((quantization.get("config_groups") or {}).values())
    index = covering(name, [group.get("targets") or [] for group in groups])
    return {} if index is None else groups[index].get("weights") or {}


def aligned(cells: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column left-aligned, the others right-aligned."""
    table = list(cells)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in table
    ]
