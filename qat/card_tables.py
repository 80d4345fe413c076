"""Tables of the model card: what is stored how, what was checked, with which versions."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from qat.prepare import Coverage, CoverageEntry
from qat.report import Report
from qat.stored_layers import kind_of
from qat_kernels import QuantSpec


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> str:
    """A Markdown table; ``right`` has an ``r`` at the place of each right-aligned column."""
    ruler = ["---:" if right[i : i + 1] == "r" else "---" for i in range(len(head))]
    lines = [head, ruler, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def layer_table(coverage: Coverage, keep_dtype: str) -> str:
    """One row for each kind of matrix and way of storing it, and one for everything small."""
    groups: dict[tuple[Any, ...], list[CoverageEntry]] = {}
    small: list[CoverageEntry] = []
    for entry in coverage.entries:
        if len(entry.shape) < 2:
            small.append(entry)
            continue
        key = (kind_of(entry.name), entry.shape, entry.weight, entry.input, entry.status)
        groups.setdefault(key, []).append(entry)
    rows = []
    for (kind, shape, weight, inputs, _), entries in groups.items():
        numel = sum(entry.numel for entry in entries)
        stored = [keep_dtype, "", "", entries[0].reason] if weight is None else _stored(weight)
        what = "16 bit" if weight is not None else ""
        if inputs is not None:
            scale = "per token" if inputs.dynamic else "static"
            what = f"{inputs.family}{inputs.bits}, {scale}"
        places = _ranges([int(n) for n in (_layer(entry.name) for entry in entries) if n])
        cells = [f"`{kind}`", places, str(len(entries)), " x ".join(map(str, shape))]
        rows.append([*cells, *stored, what, f"{numel:,}"])
    if small:
        numel = sum(entry.numel for entry in small)
        kept = [keep_dtype, "", "", "kept"]
        rows.append(["norms, biases", "", str(len(small)), "", *kept, "", f"{numel:,}"])
    head = ["matrices", "layers", "count", "shape", "stored as", "one scale for", "scales in"]
    head += ["grid, or why kept", "inputs", "parameters"]
    return markdown_table(head, rows, "  r      r")


def _stored(spec: QuantSpec) -> list[str]:
    """Type, granularity, dtype of the scales, and grid."""
    signs = "" if spec.symmetric else ", zero point"
    unit = {"group": f"{spec.group_size} weights", "channel": "a row", "tensor": "the matrix"}
    scale_for = unit.get(spec.granularity, spec.granularity)
    return [f"{spec.family}{spec.bits}{signs}", scale_for, spec.scale_dtype, spec.grid]


def _layer(name: str) -> str | None:
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else None


def _ranges(numbers: list[int]) -> str:
    """``0-2, 5`` for [0, 1, 2, 5]."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def engine_table(report: Report) -> str:
    """What read the files in this run, in which arithmetic, with what result."""
    versions, f = report.environment["versions"], report.fidelity
    compressed = f"compressed-tensors {versions['compressed-tensors']}"
    plain = f"transformers {versions['transformers']} with {compressed}"
    logits = "equal, bit for bit" if f.logits == "equal" else f.logits
    text = f"logits on {f.logit_blocks} blocks of text" if f.logit_blocks else "logits"
    rows = [
        [compressed, "", f"codes of {f.codes_compared} matrices", "equal, bit for bit"],
        [plain, "fp32", text, logits],
    ]
    if f.weights_equal is not None:
        what = f"{f.weights_compared} weights as loaded"
        rows.insert(1, [plain, "fp32", what, "equal, bit for bit"])
    if "served" in report.rows:
        served = report.rows["served"]
        arithmetic, _, how = served.dtype.partition(", ")
        loss = f"{served.quality.loss:.4f}"
        if "artifact" in report.rows:
            loss += f" (in fp32 {report.rows['artifact'].quality.loss:.4f})"
        engine = f"`qat generate`, qat-lightning {versions['qat-lightning']}"
        rows.append([engine, arithmetic, f"loss on the held-out text; {how}", loss])
    return markdown_table(["engine", "arithmetic", "checked", "result"], rows)


def version_table(report: Report, git: dict[str, Any] | None) -> str:
    """Versions of the converter and of the libraries."""
    environment = report.environment
    versions = environment["versions"]
    commit = "none: installed without a checkout"
    if git is not None:
        changed = ", with changes that were not committed" if git["dirty"] else ""
        commit = f"`{git['commit']}`{changed}"
    rows = [
        ["converter", f"qat-lightning {versions['qat-lightning']}"],
        ["commit of the training code", commit],
        ["Python", environment["python"]],
    ]
    rows += [
        [name, version]
        for name, version in versions.items()
        if name != "qat-lightning" and version != "not installed"
    ]
    return markdown_table(["what", "version"], rows)
