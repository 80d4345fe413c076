"""Golden losses: a pure refactor reproduces them to the last bit.

Recorded at full precision for a CPU capability and torch version; elsewhere the order of additions
differs and the losses agree within `rounding_bound`. After a change that is meant to change the
numbers, print the new ones with ``python -m tests.recipes.test_golden`` and say why in the commit.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from tests.recipes.running import adapter_setup, curve, rounding_bound, run, tiny_setup

GOLDEN = Path(__file__).with_name("golden.json")
RECIPES = ("qat_int4", "qat_int8", "qlora_nf4", "qlora_int4")


def key() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.partition('+')[0]}"


def losses_of(recipe: str, directory: Path) -> dict[str, list[float]]:
    """Training losses of both phases of a tiny run."""
    out = directory / "run"
    adapters = recipe.startswith("qlora")
    setup = adapter_setup(directory) if adapters else tiny_setup(directory)
    assert run([f"recipe={recipe}", f"output_dir={out}", *setup]) == 0
    phases = ("finetune", "adapter" if adapters else "qat")
    return {phase: [*curve(out, phase, "train_loss").values()] for phase in phases}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses(recipe: str, tmp_path: Path):
    golden = json.loads(GOLDEN.read_text("utf-8"))
    found = losses_of(recipe, tmp_path)
    if key() in golden:
        assert found == golden[key()][recipe]
        return
    recorded = next(iter(golden.values()))[recipe]
    bound = rounding_bound(adapters=recipe.startswith("qlora"))
    for phase, values in found.items():
        assert values == pytest.approx(recorded[phase], rel=bound)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for name in RECIPES:
            (Path(folder) / name).mkdir()
            made[name] = losses_of(name, Path(folder) / name)
    GOLDEN.write_text(json.dumps({key(): made}, indent=1) + "\n", "utf-8")
