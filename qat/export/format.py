"""What a format is: what it loses, how it is written, how an outside reader reads it back."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from qat.errors import UserError
from qat.export.source import Source


@dataclass(frozen=True)
class Loss:
    """Something of the artifact that a format cannot carry exactly."""

    what: str
    """Tensor or property, for example ``model.layers.0.mlp.up_proj`` or ``quantized inputs``."""
    reason: str
    """Why the format cannot carry it."""
    nearest: str
    """The nearest format (and option) that can, as it is written on the command line."""
    writable: bool = True
    """Whether ``allow_lossy=true`` can write it all the same."""
    everywhere: bool = False
    """Whether any tensor may differ by it; else, at most the one that ``what`` names."""


@dataclass(frozen=True)
class ReadMatrix:
    """A quantized weight as an outside reader found it; either codes or values may be missing."""

    name: str
    """Module name in the artifact, without ``.weight``."""
    codes: Tensor | None
    """Integer [N, K]; levels (codes minus zero points) where ``zero_point`` is None."""
    scale: Tensor | None
    """Float [N, G'] or [1, 1]; G' may be larger than the artifact's G (scales repeated)."""
    zero_point: Tensor | None
    """Integer like ``scale``, in the artifact's convention (codes from -2^(bits-1)), or None."""
    values: Tensor | None
    """Float [N, K] as the reader dequantizes, or None where it offers none."""


@dataclass(frozen=True)
class ReadTensor:
    """A tensor stored as values, as an outside reader found it."""

    name: str
    """Name in the artifact."""
    values: Tensor
    """As stored."""
    expected: Tensor | None = None
    """What it is held against, where that is computed from the artifact and no tensor of it."""


class Format(Protocol):
    """One export format; instances are stateless but for the options that they were made with."""

    reader: str
    """Package and version that reads the output back, for the report: ``gguf 0.19.0``."""
    suffix: str | None
    """Suffix of the one file that may be given as ``out`` (``.gguf``); None for directories."""
    use: str
    """Markdown: how the output is loaded; stands in its model card. Complete after `write`."""

    def losses(self, source: Source) -> Sequence[Loss]:
        """What cannot be carried exactly; empty for an exact export.

        Raises:
            UserError: a package is missing, or the family of models is not known to the format.
        """

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """Write everything into an empty directory, one matrix in memory at a time.

        Args:
            source: the artifact.
            directory: where to.
            notes: facts for the file's own metadata: ``source_sha256``, ``lossy`` (list of texts).
        """

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What an independent reader finds in the output, under the artifact's names."""


@runtime_checkable
class Selective(Protocol):
    """A format whose output holds other names than the artifact's matrices and kept tensors."""

    def expected(self, source: Source) -> Iterable[str]:
        """Names that its `read` must give back."""


def require(module: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is not installed; install it with: pip install 'qat-lightning[{extra}]'"
        ) from error
