"""The LoRA adapter of an ``nf4/`` directory, as PEFT loads it.

The files are copied; adapter_config.json names the 4-bit base that the adapter was trained on (the
``nf4/`` directory, as it was given on the command line), and base.json says by hashes which it is.
On the original 16-bit model the run's own ``adapter/`` belongs.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qat.errors import UserError
from qat.export.format import Loss, ReadMatrix, ReadTensor
from qat.export.hf_directory import FACTS, write_json
from qat.export.source import Source
from qat.fidelity import FidelityError
from qat.tensor_files import read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
BASE = "base_model_name_or_path"

USE = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, ".")  # this directory
```

The base is the 4-bit one that the adapter was trained on (sha256 of its codes in base.json), which
`format=bitsandbytes` writes for publishing; change `base_model_name_or_path` in
adapter_config.json to where it is then.
"""


class Peft:
    """``format=peft``."""

    reader = f"peft {metadata.version('peft')}"
    suffix = None
    use = USE.strip()

    def __init__(self, options: Any = None) -> None:
        del options

    def losses(self, source: Source) -> Sequence[Loss]:
        """Fatal where there is no adapter."""
        if source.has_adapter:
            return []
        why = f"{source.path} holds no adapter; an adapter run writes it to its nf4/ directory"
        nearest = "format=peft of the run's nf4/, or format=compressed-tensors of this artifact"
        return [Loss("an adapter", why, nearest, writable=False)]

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """See the module."""
        folder = source.path / "adapter"
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in (CONFIG, "README.md"):
                shutil.copyfile(path, directory / path.name)
        config = read_json(folder / CONFIG) | {BASE: str(source.path)}
        write_json(directory / CONFIG, config)
        base = read_json(folder / "base.json")
        write_json(directory / "base.json", base | {FACTS: notes})
        self.use = USE.strip().format(base=source.path)

    def expected(self, source: Source) -> Iterable[str]:
        """The adapter's tensors, without the base."""
        with ExitStack() as stack:
            return list(_stored(source, stack))

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What PEFT loads; its configuration must be the trained one but for the base's name."""
        trained = PeftConfig.from_pretrained(str(source.path / "adapter")).to_dict()
        written = PeftConfig.from_pretrained(str(directory)).to_dict()
        if written != trained | {BASE: str(source.path)}:
            raise FidelityError(f"{CONFIG} differs from the trained adapter's")
        with ExitStack() as stack:
            expected = _stored(source, stack)
            for name, value in load_peft_weights(str(directory), device="cpu").items():
                if name not in expected:
                    raise FidelityError(f"{name} does not belong there")
                yield ReadTensor(name, value, expected[name]())


def _stored(source: Source, stack: ExitStack) -> dict[str, Any]:
    """Name → function that reads it, of the trained adapter's tensors."""
    path = source.path / "adapter" / WEIGHTS
    try:
        file = stack.enter_context(safe_open(str(path), framework="pt"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error

    def reader(name: str) -> Any:
        def read() -> Tensor:
            value: Tensor = file.get_tensor(name)
            return value

        return read

    return {name: reader(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
