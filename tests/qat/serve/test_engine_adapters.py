"""Adapters by name over one 4-bit base: each answers as alone, and the base is there once."""

import asyncio
from pathlib import Path

import pytest
import torch

from qat.adapter_runtime import load_nf4
from qat.errors import UserError
from qat.serve.engine import Engine, EngineOptions
from qat.serve.requests import Sampling
from tests.qat.serve.engine_running import Answer, ask_alone, collect, generated_by, prompts
from tests.qat.test_adapter_files import trained

pytest.importorskip("bitsandbytes")
# PEFT 0.21 asks transformers 5.23 by a name that is called old there
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SMALL = {"max_sequences": 8, "cache_tokens": 512}
OTHERS = {
    "dora": {"dora": True, "rank": 2},
    "few": {"targets": ["q_proj", "*.1.mlp.*"]},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """nf4/ directories of runs that began with the same model."""
    found = {}
    for name, options in {"own": {}, **OTHERS}.items():
        folder = tmp_path_factory.mktemp("adapters") / name
        trained(folder / "model", "llama", **options).write(["nf4"], folder)
        found[name] = folder / "nf4"
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_each_adapter_beside_the_others(runs: dict[str, Path], dtype: str) -> None:
    adapters = {name: str(runs[name]) for name in OTHERS}
    adapters["few"] += "/adapter"
    engine = Engine(runs["own"], EngineOptions(dtype=dtype, adapters=adapters, **SMALL))
    names = engine.models
    assert names == ["own", *OTHERS]
    texts = prompts([3, 40, 17, 66, 9, 12, 30, 5])
    sampling = Sampling(5, top_logprobs=1)

    async def together() -> list[Answer]:
        handles = [engine.submit(p, sampling, names[i % 4]) for i, p in enumerate(texts)]
        return [await collect(handle) for handle in handles]

    try:
        alone = [ask_alone(engine, [(p, sampling)], names[i % 4])[0] for i, p in enumerate(texts)]
        assert asyncio.run(together()) == alone
        held = [memory(lane._manager.model) for lane in engine._lanes.values()]
    finally:
        engine.close()
    # uint8: the codes of the 4-bit base, once for all
    codes = [{place for place, kind in found if kind == torch.uint8} for found in held]
    assert codes[0]
    assert all(found == codes[0] for found in codes)
    for i, prompt in enumerate(texts[:4]):
        # what qat generate loads for the run that the adapter comes from
        model = load_nf4(runs[names[i]], getattr(torch, dtype), torch.device("cpu"))
        assert generated_by(model, [(prompt, sampling)]) == [alone[i].content]


def memory(model: torch.nn.Module) -> set[tuple[int, torch.dtype]]:
    tensors = [*model.parameters(), *model.buffers()]
    return {(tensor.data_ptr(), tensor.dtype) for tensor in tensors}


def test_adapters_that_do_not_belong(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, path, message in (
        ("own", runs["few"], "name of the model itself"),
        ("other", tmp_path, "holds no adapter_config.json"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(runs["own"], EngineOptions(adapters={name: str(path)}, **SMALL))
    trained(tmp_path / "model", "llama", base="fp4").write(["nf4"], tmp_path)
    with pytest.raises(UserError, match="another 4-bit base"):
        Engine(runs["own"], EngineOptions(adapters={"b": str(tmp_path / "nf4")}, **SMALL))
