"""Scales and codes of an artifact: a table of the scales, and a plot of both.

Read tensor by tensor from the files, in numpy; only the unpacking of codes needs torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qat.errors import UserError
from qat.safetensors_header import TensorEntry
from qat.stored_layers import Stored, aligned, kind_of, raw_bytes, stored_layers, weight_spec

Array = NDArray[Any]
DTYPES = {
    "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
"""Dtypes of safetensors that numpy has; BF16 is widened by hand."""
ROWS = 256
"""Rows of a matrix whose codes are unpacked at a time."""
BINS = 60


@dataclass
class Kind:
    """All matrices of one kind, stored alike."""

    name: str
    """Their name without the layer."""
    type: str
    """Type of the codes: int4, nf4 ..."""
    scales: list[Array] = field(default_factory=list)
    """fp32, of each matrix."""
    first_code: int = 0
    """The smallest code that the type has."""
    codes: Array | None = None
    """int64 [number of codes]: how often each occurs."""


def _array(stored: Stored) -> Array | None:
    """A tensor's values, flat; None for a dtype that is not read here."""
    path, entry = stored
    raw = raw_bytes(path, entry)
    if entry.dtype == "BF16":
        wide: Array = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return wide.view("<f4")
    return np.frombuffer(raw, DTYPES[entry.dtype]) if entry.dtype in DTYPES else None


def _scales(parts: dict[str, Stored]) -> Array | None:
    """The scales of a matrix, fp32; bitsandbytes' absmax with double quantization undone."""
    if "weight_scale" in parts:
        values = _array(parts["weight_scale"])
    elif "absmax" in parts:
        values = _array(parts["absmax"])
        if values is not None and values.dtype == np.uint8:
            state = json.loads(raw_bytes(*parts["quant_state"]))
            codebook, outer = (_array(parts[f"nested_{n}"]) for n in ("quant_map", "absmax"))
            assert codebook is not None
            assert outer is not None
            spread = np.repeat(outer, state["nested_blocksize"])[: len(values)]
            values = codebook[values] * spread + np.float32(state["nested_offset"])
    else:
        return None
    return None if values is None else values.astype(np.float32)


def _kinds(directory: Path, quantization: dict[str, Any], codes: bool) -> list[Kind]:
    """The quantized matrices by kind; ``codes`` counts their codes too."""
    kinds: dict[tuple[str, str], Kind] = {}
    layers = stored_layers(directory)
    for name, parts in tqdm(layers.items(), desc="read", delay=2, leave=False, disable=None):
        scales = _scales(parts)
        if scales is None:
            continue
        spec = weight_spec(name, quantization)
        if "quant_state" in parts:
            type_name, bits = json.loads(raw_bytes(*parts["quant_state"]))["quant_type"], 4
        else:
            bits = spec.get("num_bits", 8)
            type_name = f"{spec.get('type', 'int')}{bits}"
        kind = kinds.setdefault((kind_of(name), type_name), Kind(kind_of(name), type_name))
        kind.scales.append(scales)
        if codes:
            kind.first_code = 0 if "quant_state" in parts else -(2 ** (bits - 1))
            for values in _codes(parts, bits):
                low, high = kind.first_code, kind.first_code + 2**bits - 1
                if len(values) and not low <= values.min() <= values.max() <= high:
                    raise UserError(
                        f"{parts['weight'][0]}: {name} has codes outside {low} ... {high}, the "
                        f"range of the {type_name} that config.json says; run qat verify"
                    )
                counted = np.bincount(values - kind.first_code, minlength=2**bits)
                kind.codes = counted if kind.codes is None else kind.codes + counted
    return list(kinds.values())


def _codes(parts: dict[str, Stored], bits: int) -> Iterator[Array]:
    """The codes of a matrix, int64, some rows at a time; nothing for float formats."""
    if "quant_state" in parts:
        size = int(np.prod(json.loads(raw_bytes(*parts["quant_state"]))["shape"]))
        raw = _array(parts["weight"])
        if raw is not None:
            both = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)
            yield both[:size].astype(np.int64)
    elif "weight_packed" in parts and parts["weight_packed"][1].dtype == "I32":
        import torch

        from qat_kernels.numerics import unpack

        path, entry = parts["weight_packed"]
        shape = _array(parts["weight_shape"])
        assert shape is not None
        words_of_row = entry.shape[-1]
        for begin in range(0, entry.shape[0], ROWS):
            rows = min(ROWS, entry.shape[0] - begin)
            start = entry.begin + begin * words_of_row * 4
            piece = TensorEntry("", "I32", (), start, start + rows * words_of_row * 4)
            words = torch.frombuffer(bytearray(raw_bytes(path, piece)), dtype=torch.int32)
            found = unpack(words.view(rows, words_of_row), bits, int(shape[-1]))
            yield found.numpy().reshape(-1).astype(np.int64)
    elif "weight" in parts and parts["weight"][1].dtype == "I8":
        values = _array(parts["weight"])
        if values is not None:
            yield values.astype(np.int64)


def scale_table(directory: Path, quantization: dict[str, Any]) -> list[str]:
    """Smallest, median and largest magnitude of the scales by kind of matrix; [] without scales."""
    cells: list[tuple[str, ...]] = [
        ("scales", "count", "smallest", "median", "largest", "negative")
    ]
    for kind in _kinds(directory, quantization, codes=False):
        values = np.concatenate(kind.scales)
        sizes = np.abs(values)
        figures = [f"{f(sizes):.3g}" for f in (np.min, np.median, np.max)]
        share = f"{np.mean(values < 0):.1%}"
        cells.append((f"{kind.name} ({kind.type})", f"{len(values):,}", *figures, share))
    return [*aligned(cells), ""] if len(cells) > 1 else []


def plot_scales(directory: Path, quantization: dict[str, Any], path: Path) -> None:
    """Draw the magnitudes of the scales and the shares of the codes into a PNG file.

    Args:
        directory: the artifact.
        quantization: the section of its config.json.
        path: the file, which must not exist, outside the artifact.

    Raises:
        UserError: nothing is quantized, codes are outside their range, or the file is there or
            cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"plot={path}: the name of a PNG file, ending in .png")
    if path.exists():
        raise UserError(f"plot={path}: exists already; choose another name or remove it first")
    if path.resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"plot={path}: lies in the artifact, which would no longer be what its manifest says"
        )
    if not path.parent.is_dir():
        raise UserError(f"plot={path}: no directory {path.parent}; create it first")
    kinds = _kinds(directory, quantization, codes=True)
    if not kinds:
        raise UserError(f"plot={path}: {directory} has no quantized matrix, so nothing to draw")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_scales(left, kinds)
    _draw_codes(right, kinds)
    # whole or not at all
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, dpi=120, format="png")
        temporary.rename(path)
    except PermissionError as error:
        raise UserError(f"plot={path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


def _draw_scales(axes: Any, kinds: list[Kind]) -> None:
    """One line for each kind: share of its scales in bins of equal ratio."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    sizes = {id(kind): np.abs(np.concatenate(kind.scales)) for kind in kinds}
    positive = np.concatenate([values[values > 0] for values in sizes.values()])
    low, high = float(positive.min()), float(positive.max())
    # room for a single value
    edges = np.geomspace(low / 1.05, high * 1.05, BINS + 1)
    several = len({kind.type for kind in kinds}) > 1
    for kind in kinds:
        counts, _ = np.histogram(sizes[id(kind)], edges)
        label = f"{kind.name} ({kind.type})" if several else kind.name
        axes.stairs(counts / len(sizes[id(kind)]), edges, label=label, linewidth=1.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Magnitude of the scales", loc="left")
    axes.set_xlabel("|scale|" if all("int" in kind.type for kind in kinds) else "absmax of a block")
    axes.set_ylabel("share of the kind's scales per bin")
    axes.legend(fontsize="small", frameon=False)


def _draw_codes(axes: Any, kinds: list[Kind]) -> None:
    """Share of each code, over all matrices of a type."""
    totals: dict[str, tuple[int, Array]] = {}
    for kind in kinds:
        if kind.codes is not None:
            _, before = totals.get(kind.type, (0, np.zeros_like(kind.codes)))
            totals[kind.type] = (kind.first_code, before + kind.codes)
    axes.set_title("Share of each code", loc="left")
    axes.set_xlabel("code")
    axes.set_ylabel("share of the weights")
    if not totals:
        axes.text(0.5, 0.5, "codes are not integers", ha="center", transform=axes.transAxes)
        return
    for name, (first, counts) in totals.items():
        used = int((counts > 0).sum())
        edges = np.arange(len(counts) + 1) + first - 0.5
        label = f"{name}: {used} of {len(counts)} codes used"
        shares = counts / counts.sum()
        axes.stairs(shares, edges, fill=len(totals) == 1, label=label, alpha=0.8)
    if len(totals) == 1 and len(counts) <= 16:
        axes.set_xticks(np.arange(len(counts)) + first)
    axes.set_ylim(top=1.15 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize="small", frameon=False, loc="upper right")
