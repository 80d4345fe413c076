"""Memory of a served model: the growth of a process that loads it and generates.

    python -m recipes.resident KIND DIRECTORY WARM_UP NEW_TOKENS

runs in a process of its own and prints JSON. The libraries' code and buffers are not the model's:
the process first serves the small model ``WARM_UP`` in the same way, and what it then holds is the
base of all figures. File-backed pages count like all others.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from qat.mapped_tensors import (
    packed_bytes,
    release_freed_memory,
    reset_peak,
    resident_bytes,
)
from qat.runtime import load_packed

Kind = Literal["packed", "plain"]
"""`qat.runtime.load_packed`, or plain transformers in bf16."""
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Resident:
    """Bytes by which the process grew."""

    stored: int
    """Bytes of the tensors in the files: the packed size."""
    loaded: int
    """After loading."""
    served: int
    """After generating, every kept tensor read."""
    peak: int
    """Most at any time, while loading or generating."""


def _load(kind: Kind, directory: Path) -> PreTrainedModel:
    if kind == "packed":
        return load_packed(directory)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return model.eval()


def _generate(model: PreTrainedModel, new_tokens: int) -> None:
    ids = torch.arange(1, PROMPT_TOKENS + 1)[None]
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generate(ids, **lengths, do_sample=False, use_cache=True)


def measure(kind: Kind, directory: Path, warm_up: Path, new_tokens: int) -> Resident:
    """Growth of this process by the model of ``directory``; to be called once in a fresh one."""
    _generate(_load(kind, warm_up), new_tokens)
    release_freed_memory()
    base = resident_bytes()["now"]
    reset_peak()
    model = _load(kind, directory)
    loaded = resident_bytes()["now"]
    _generate(model, new_tokens)
    # pages of mapped tensors that this prompt happened not to read count, too
    for tensor in model.parameters():
        tensor.amax()
    found = resident_bytes()
    stored = packed_bytes(directory)
    return Resident(stored, loaded - base, found["now"] - base, found["peak"] - base)


def in_own_process(kind: Kind, directory: Path, warm_up: Path, new_tokens: int) -> Resident:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: it failed; the message holds what it printed last.
    """
    words = [sys.executable, "-m", __name__, kind, str(directory), str(warm_up), str(new_tokens)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[1:])} failed:\n{done.stderr[-2000:]}")
    return Resident(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    kind: Kind = "packed" if sys.argv[1] == "packed" else "plain"
    print(json.dumps(asdict(measure(kind, Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))))
