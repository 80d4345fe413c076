"""``qat export``: check what would be lost, write, read back, describe; whole or not at all."""

import errno
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qat import __version__
from qat.artifact import MANIFEST, staged_directory, verify, write_manifest
from qat.errors import UserError, disk_is_full
from qat.export.card import export_card
from qat.export.compare import ReadBack, read_back
from qat.export.format import Format, Loss, Selective
from qat.export.source import Source
from qat.fidelity import FidelityError
from qat.tensor_files import read_json

FormatName = Literal[
    "compressed-tensors", "gguf", "gptq", "gptq_v2", "awq", "onnx", "bitsandbytes", "merged", "peft"
]

FORMATS: dict[str, str] = {
    "compressed-tensors": "qat.export.compressed_tensors:CompressedTensors",
    "gguf": "qat.export.gguf:Gguf",
    "gptq": "qat.export.gptq:Gptq",
    "gptq_v2": "qat.export.gptq:GptqV2",
    "awq": "qat.export.awq:Awq",
    "onnx": "qat.export.onnx:Onnx",
    "bitsandbytes": "qat.export.bitsandbytes:Bitsandbytes",
    "merged": "qat.export.merged:Merged",
    "peft": "qat.export.peft:Peft",
}
"""Name → its `qat.export.format.Format`, imported when it is asked for."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of ``qat export``."""

    format: FormatName
    """gguf for llama.cpp and Ollama; compressed-tensors (as engines read it), gptq, gptq_v2 and awq
    for vLLM and others; onnx for ONNX Runtime; merged for plain transformers; bitsandbytes and peft
    for an nf4/ directory."""
    out: str
    """Directory to write, or for format=gguf a file that ends in .gguf; must not exist yet."""
    allow_lossy: bool = False
    """Write even what the format cannot carry exactly; the file and the report then say so."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Only for format=merged: dtype of the weights; auto takes the smallest that is exact."""


LONGEST_NAME = 200
"""Bytes of the name of an output."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and what an outside reader found in it."""

    format: str
    """Name of the format."""
    out: str
    """Base name of what was written."""
    losses: tuple[Loss, ...]
    """What the format cannot carry exactly; empty for an exact export."""
    read_back: ReadBack
    """Comparison with the artifact."""
    size_bytes: int
    """Of all files written."""
    source_sha256: str
    """sha256 of the artifact's manifest.json."""

    @property
    def exact(self) -> bool:
        """Whether the export carries the artifact's codes and scales exactly, as read back."""
        return not self.losses and self.read_back.exact

    def to_json(self) -> dict[str, Any]:
        """Content of export.json."""
        return {
            "format": self.format,
            "converter": f"qat-lightning {__version__}",
            "source_sha256": self.source_sha256,
            "exact": self.exact,
            "losses": [asdict(loss) for loss in self.losses],
            "read_back": asdict(self.read_back),
        }

    def text(self) -> str:
        """Lines for people."""
        lines = [f"{self.out}: {self.format}, {self.size_bytes:,} bytes", self.read_back.summary()]
        if self.exact:
            what = "codes and scales" if self.read_back.matrices else "values"
            return "\n".join([*lines, f"exact: the same {what} as the artifact"])
        lines.append("lossy, as allow_lossy=true allows:")
        if self.read_back.exact:
            lines[-1] = "lossy, as allow_lossy=true allows (what it changes was not measured):"
        return "\n".join([*lines, *(f"  {loss.what}: {loss.reason}" for loss in self.losses)])


def export(artifact: Path | str, options: ExportOptions) -> ExportReport:
    """Write an artifact in another format and read it back with a package that is not ours.

    Args:
        artifact: ``artifact/`` or ``nf4/`` of a run; must verify.
        options: see `ExportOptions`.

    Raises:
        UserError: the artifact does not verify, the format cannot carry it (the message names the
            nearest one that can), ``out`` exists, or a package is missing.
        FidelityError: the reader found other codes or scales; nothing is left behind.
        OSError: the disk is full; nothing is left behind.
    """
    path = Path(artifact)
    handler = load_format(options)
    # before anything is read: hashing a large artifact takes minutes
    out = Path(options.out).expanduser()
    _refuse_out(path, out, handler.suffix)
    with ExitStack() as stack:
        source = Source(path, stack)
        _check_source(path)
        losses = tuple(handler.losses(source))
        _refuse(losses, options)
        digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        with _naming_a_full_disk(out), _destination(out, handler.suffix) as directory:
            notes = {
                "converter": f"qat-lightning {__version__}",
                "source_sha256": digest,
                "lossy": [f"{loss.what}: {loss.reason}" for loss in losses],
            }
            handler.write(source, directory, notes)
            # whatever the source holds must be found again in the output
            names = handler.expected(source) if isinstance(handler, Selective) else source.names
            found = read_back(source, handler.read(source, directory), handler.reader, names)
            wrong = _unexplained(found, losses)
            if wrong:
                raise FidelityError(
                    f"{options.format}: {found.reader} does not read what was trained "
                    f"({len(wrong)} differences, first: {wrong[0]}); nothing was written"
                )
            size = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
            name = Path(options.out).name
            report = ExportReport(options.format, name, losses, found, size, digest)
            _describe(source, report, handler, directory)
    return report


def load_format(options: ExportOptions) -> Format:
    """The format's object, made with these options."""
    if options.dtype != "auto" and options.format != "merged":
        raise UserError(
            f"dtype={options.dtype}: only format=merged has a choice of dtype; leave it out"
        )
    module, _, name = FORMATS[options.format].partition(":")
    made: Format = getattr(importlib.import_module(module), name)(options)
    return made


def _unexplained(found: ReadBack, losses: tuple[Loss, ...]) -> list[str]:
    """Differences that no loss accounts for: what is allowed to be lossy is so in these alone."""
    if any(loss.everywhere for loss in losses):
        expected = [line.partition(":")[0] for line in found.differences]
    else:
        expected = [loss.what for loss in losses]
    wrong = [line for line in found.differences if line.partition(":")[0] not in expected]
    return [*wrong, *(f"{name}: not found" for name in found.not_compared)]


def _check_source(path: Path) -> None:
    problems = verify(path)
    if problems:
        raise UserError(
            f"artifact={path}: it does not verify ({len(problems)} problems, first: "
            f"{problems[0]}); copy it again, or run qat verify for the whole list"
        )


def _refuse(losses: tuple[Loss, ...], options: ExportOptions) -> None:
    """Raise UserError for losses that were not allowed, or cannot be."""
    fatal = [loss for loss in losses if not loss.writable]
    if not losses or (options.allow_lossy and not fatal):
        return
    first = (fatal or list(losses))[0]
    more = f" (and {len(losses) - 1} more)" if len(losses) > 1 else ""
    message = (
        f"format={options.format}: it cannot carry {first.what} exactly: {first.reason}{more}. "
        f"The nearest format that can: {first.nearest}"
    )
    if not fatal:
        message += "; or write it all the same with allow_lossy=true"
    raise UserError(message)


@contextmanager
def _naming_a_full_disk(out: Path) -> Iterator[None]:
    """Let the error of a full disk name the output; of the writers' own, few say where it was."""
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error


@contextmanager
def _destination(out: Path, suffix: str | None) -> Iterator[Path]:
    """A directory to write into; it, or the one file of its kind in it, becomes ``out``."""
    if suffix is None or out.suffix != suffix:
        with staged_directory(out) as staging:
            yield staging
        return
    beside = out.with_name(f"{out.name}.parts")
    with staged_directory(beside) as staging:
        yield staging
    try:
        (written,) = beside.glob(f"*{suffix}")
        # the file last: where it stands, its report does too
        (beside / "export.json").rename(_report_of(out))
        written.rename(out)
    except BaseException:
        _report_of(out).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _report_of(out: Path) -> Path:
    """Where the report of a one-file export lies."""
    return out.with_name(f"{out.name}.export.json")


def _refuse_out(artifact: Path, out: Path, suffix: str | None) -> None:
    """Raise UserError for an output that is there, cannot be, or would be part of the artifact."""
    # while it is written, the name is longer by some characters, and file systems allow 255 bytes
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(f"out={out}: longer than {LONGEST_NAME} bytes; choose a shorter name")
    parent = next(path for path in out.absolute().parents if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"out={out}: {parent} is no directory that you may write into")
    if out.resolve().is_relative_to(artifact.resolve()):
        raise UserError(
            f"out={out}: lies in the artifact, which would no longer be what its manifest says; "
            "choose a place outside"
        )
    one_file = suffix is not None and out.suffix == suffix
    empty = not one_file and out.is_dir() and not any(out.iterdir())
    for path in [out, _report_of(out)] if one_file else [out]:
        if os.path.lexists(path) and not empty:
            raise UserError(f"out={path} exists already; choose another name or remove it first")


def _describe(source: Source, report: ExportReport, handler: Format, directory: Path) -> None:
    """Write export.json, the model card and the manifest."""
    content = json.dumps(report.to_json(), indent=2)
    (directory / "export.json").write_text(content + "\n", encoding="utf-8")
    card = export_card(source.path, report.to_json(), handler.use)
    (directory / "README.md").write_text(card, encoding="utf-8")
    provenance = read_json(source.path / MANIFEST).get("provenance", {})
    export_facts = {key: report.to_json()[key] for key in ("format", "converter", "source_sha256")}
    write_manifest(directory, provenance | {"export": export_facts})
