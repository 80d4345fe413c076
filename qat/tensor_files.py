"""The tensors of a checkpoint directory, one at a time, from memory-mapped safetensors."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.errors import UserError
from qat.manifest import PICKLES, is_pickle, is_safe

INDEX = "model.safetensors.index.json"
"""Tensor → file, of a checkpoint in several files."""
_PICKLE = (
    "Pickles can run code when they are loaded and are never read here: give a copy of the model "
    "in safetensors, from a source that you trust"
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where it cannot be read."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return content


def weight_files(directory: Path) -> dict[str, str]:
    """Tensor → name of its file, from the index of a checkpoint; empty where there is no index.

    Raises:
        UserError: an index that cannot be read, or names something outside the directory.
    """
    index = directory / INDEX
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: weight_map is no table of tensors and files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_safe(name):
            raise UserError(
                f"{index}: {tensor} lies in {name!r}, which is no file of this directory; such an "
                "index could make a reader open any file of this machine. Get the model from a "
                "source that you trust"
            )
        if not name.endswith(".safetensors"):
            raise UserError(f"{index}: {tensor} lies in {name!r}, no safetensors file. {_PICKLE}")
    return dict(weight_map)


def _missing(path: Path) -> str:
    """What to say of a weight file that is not there."""
    pickles = sorted(p.name for p in path.parent.iterdir() if p.name.endswith(PICKLES))
    if pickles and not any(path.parent.glob("*.safetensors")):
        return f"{path.parent}: has {pickles[0]} and no safetensors. {_PICKLE}"
    return f"{path}: missing; copy the artifact again, with all its files"


class TensorFiles:
    """The tensors of a checkpoint directory by name, read from memory-mapped safetensors."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """Open every shard; ``stack`` closes them.

        Raises:
            UserError: no weights, a shard is missing or unreadable, or a tensor is missing.
        """
        self._handles: dict[str, Any] = {}
        weight_map = weight_files(directory)
        for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
            path = directory / file
            if not path.is_file():
                raise UserError(_missing(path))
            if is_pickle(path):
                raise UserError(f"{path}: a pickle under the name of a safetensors file. {_PICKLE}")
            try:
                handle = stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: not a whole safetensors file ({error}); it may be truncated. Run "
                    f"`qat verify {directory}` and copy the artifact again"
                ) from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))
        absent = sorted(weight_map.keys() - self._handles.keys())
        if absent:
            raise UserError(
                f"{directory / INDEX}: {len(absent)} tensors are in no file, first {absent[0]}"
            )
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def names(self) -> set[str]:
        """All tensor names."""
        return set(self._handles)

    def get(self, name: str) -> Tensor:
        """One tensor, as stored."""
        self.used.add(name)
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor
