"""``qat inspect``: what an artifact holds, read from JSON files, safetensors headers and scales."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat.artifact_scales import plot_scales, scale_table
from qat.errors import UserError
from qat.safetensors_header import BITS, TensorEntry
from qat.stored_layers import Stored, aligned, raw_bytes, stored_layers, weight_spec

COUNTED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale")
"""What bits per weight counts, beside `weight` where codes are stored unpacked."""


@dataclass(frozen=True)
class Row:
    """One layer or bare parameter; rows of equal content are merged for the table."""

    name: str
    shape: tuple[int, ...]
    bits: str
    group: str
    numel: int
    counted_bytes: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        """Whether codes are stored instead of values."""
        return self.group != "-"


def inspect(directory: Path, every_layer: bool = False, plot: Path | None = None) -> str:
    """A readable summary of an artifact: architecture, scheme, layers, sizes.

    Args:
        directory: the artifact.
        every_layer: one row per layer instead of one per kind (numbers in names become ``*``).
        plot: a PNG file to draw scales and codes into.

    Raises:
        UserError: no ``config.json``, one that is not JSON, a broken safetensors file, or a plot
            that cannot be drawn or written.
    """
    config = _json(directory / "config.json", directory)
    quantization = config.get("quantization_config") or {}
    rows = _rows(directory, quantization)
    sizes = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    lines = [f"{directory}", "", *_architecture(config), *_scheme(quantization), ""]
    lines += [*_table(rows, merge=not every_layer), "", *_totals(rows), ""]
    lines += [*scale_table(directory, quantization)]
    if plot is not None:
        plot_scales(directory, quantization, plot)
        lines += [f"plot: {plot}", ""]
    files = [*sizes.items(), ("total", sum(sizes.values()))]
    lines += aligned([(name, f"{size:,} bytes") for name, size in files])
    return "\n".join(line.rstrip() for line in lines)


def bits_per_weight(directory: Path) -> float | None:
    """Stored bits of the quantized matrices (codes, scales, zero points) per weight of theirs.

    None where nothing is quantized.

    Raises:
        UserError: see `inspect`.
    """
    config = _json(directory / "config.json", directory)
    rows = _rows(directory, config.get("quantization_config") or {})
    weights = sum(row.numel for row in rows if row.quantized)
    return 8 * sum(row.counted_bytes for row in rows) / weights if weights else None


def _json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{directory}: not an artifact, it has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def _architecture(config: dict[str, Any]) -> list[str]:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    facts = [f"{key}={config[key]}" for key in keys if key in config]
    return [f"architecture  {', '.join(names)}" + (f"  ({', '.join(facts)})" if facts else "")]


def _scheme(quantization: dict[str, Any]) -> list[str]:
    if not quantization:
        return ["scheme        not quantized"]
    method = quantization.get("quant_method", "unknown")
    kind = quantization.get("format") or quantization.get("bnb_4bit_quant_type", "unknown")
    lines = [f"scheme        {method}, format {kind}"]
    for group in (quantization.get("config_groups") or {}).values():
        targets = ", ".join(group.get("targets") or ["?"])
        lines.append(f"              {targets}: {_describe('weights', group.get('weights'))}")
        if group.get("input_activations"):
            inputs = _describe("inputs", group["input_activations"])
            lines.append(f"              {' ' * len(targets)}  {inputs}")
    ignored = quantization.get("ignore") or quantization.get("llm_int8_skip_modules") or []
    if ignored:
        more = f" and {len(ignored) - 8} more" if len(ignored) > 8 else ""
        lines.append(f"kept          {', '.join(ignored[:8])}{more}")
    return lines


def _describe(what: str, args: dict[str, Any] | None) -> str:
    if not args:
        return f"{what} in 16 bit"
    strategy = str(args.get("strategy", "tensor"))
    if strategy == "group":
        strategy = f"group of {args.get('group_size')}"
    signs = "symmetric" if args.get("symmetric", True) else "asymmetric"
    dynamic = ", dynamic" if args.get("dynamic") else ""
    return (
        f"{what} {args.get('type', 'int')}{args.get('num_bits', '?')} {signs}, {strategy}{dynamic}"
    )


# --- layers --------------------------------------------------------------------------------------


def _rows(directory: Path, quantization: dict[str, Any]) -> list[Row]:
    return [_row(n, parts, quantization) for n, parts in stored_layers(directory).items()]


def _row_4bit(name: str, parts: dict[str, Stored], total: int) -> Row:
    """A layer in bitsandbytes' serialization; its shape and block size lie in a JSON tensor."""
    state = json.loads(raw_bytes(*parts["quant_state"]))
    shape = tuple(state["shape"])
    counted = sum(
        parts[part][1].nbytes for part in ("weight", "absmax", "nested_absmax") if part in parts
    )
    blocks = str(state["blocksize"])
    return Row(name, shape, state["quant_type"], blocks, math.prod(shape), counted, total)


def _row(name: str, parts: dict[str, Stored], quantization: dict[str, Any]) -> Row:
    total = sum(entry.nbytes for _, entry in parts.values())
    if "quant_state" in parts:
        return _row_4bit(name, parts, total)
    _, codes = parts.get("weight_packed") or parts.get("weight") or next(iter(parts.values()))
    if "weight_scale" not in parts or codes is parts["weight_scale"][1]:
        return Row(name, codes.shape, codes.dtype, "-", codes.numel, 0, total)
    spec = weight_spec(name, quantization)
    shape = _int64s(*parts["weight_shape"]) if "weight_shape" in parts else codes.shape
    numel = math.prod(shape)
    # stored bits, from the sizes, where the configuration does not say
    bits = spec.get("num_bits") or codes.nbytes * 8 // max(numel, 1)
    _, scale = parts["weight_scale"]
    per_row = scale.shape[-1] if scale.shape else 1
    if scale.numel == 1 and spec.get("strategy", "tensor") == "tensor":
        group = "tensor"
    elif per_row == 1:
        group = "channel"
    else:
        group = str(-(-shape[-1] // per_row))
    counted = sum(e.nbytes for part, (_, e) in parts.items() if part in COUNTED or e is codes)
    return Row(name, shape, f"{spec.get('type', 'int')}{bits}", group, numel, counted, total)


def _int64s(path: Path, entry: TensorEntry) -> tuple[int, ...]:
    raw = raw_bytes(path, entry)
    width = BITS[entry.dtype] // 8
    cells = range(0, len(raw), width)
    return tuple(int.from_bytes(raw[i : i + width], "little") for i in cells)


# --- printing ------------------------------------------------------------------------------------


def _table(rows: list[Row], merge: bool) -> list[str]:
    """Aligned table; with `merge`, rows that differ only in the numbers of their names are one."""
    merged: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name) if merge else row.name
        merged.setdefault((pattern, row.shape, row.bits, row.group), []).append(row)
    cells = [("layer", "count", "shape", "bits", "group", "bytes")]
    for (pattern, shape, bits, group), same in merged.items():
        size = sum(row.nbytes for row in same)
        shown = " x ".join(map(str, shape)) or "scalar"
        cells.append((pattern, str(len(same)), shown, bits, group, f"{size:,}"))
    return aligned(cells)


def _totals(rows: list[Row]) -> list[str]:
    quantized = [row for row in rows if row.quantized]
    weights = sum(row.numel for row in quantized)
    everything = sum(row.numel for row in rows)
    lines = [f"parameters       {everything:,} in matrices, embeddings and norms"]
    if quantized:
        bits = 8 * sum(row.counted_bytes for row in quantized) / weights
        lines.append(f"quantized        {weights:,} ({weights / everything:.1%})")
        lines.append(f"bits per weight  {bits:.4f} (codes, scales and zero points)")
    return lines
