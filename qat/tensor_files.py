"""The tensors of a checkpoint directory, one at a time, from memory-mapped safetensors."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    return content


class TensorFiles:
    """The tensors of a checkpoint directory by name, read from memory-mapped safetensors."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        """Open every shard; ``stack`` closes them.

        Raises:
            UserError: no weights, a shard is missing or unreadable, or a tensor is missing.
        """
        self._handles: dict[str, Any] = {}
        index = directory / "model.safetensors.index.json"
        weight_map: dict[str, str] = {}
        if index.is_file():
            weight_map = read_json(index).get("weight_map", {})
        for file in sorted(set(weight_map.values())) or ["model.safetensors"]:
            path = directory / file
            if not path.is_file():
                raise UserError(f"{path}: missing; copy the artifact again, with all its files")
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
            raise UserError(f"{index}: {len(absent)} tensors are in no file, first {absent[0]}")
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
