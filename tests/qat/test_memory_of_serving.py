"""What a served model holds in memory: measured in processes of their own, and op by op."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import qat
from qat.config import load
from qat.errors import UserError
from qat.mapped_tensors import MappedTensors, packed_bytes, resident_bytes
from qat.runtime import load_packed
from qat_kernels.numerics import QuantSpec
from recipes import CONFIGS, RECIPES, decoding
from recipes.resident import in_own_process
from tests.qat.test_runtime import INT4, int8_input, llama, write_artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MIB = 1 << 20
INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")


def test_mapped_tensors_are_those_of_the_file_and_leave_memory(tmp_path: Path) -> None:
    stored = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int8),
        "large": torch.randn(16 * MIB // 4),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
    }
    save_file(stored, tmp_path / "model.safetensors")
    files = MappedTensors(tmp_path)
    for name, tensor in stored.items():
        assert torch.equal(files.get(name), tensor)
        assert files.get(name).dtype == tensor.dtype
    assert files.nbytes == packed_bytes(tmp_path) == sum(t.nbytes for t in stored.values())
    before = resident_bytes()["now"]
    large = files.get("large")
    assert resident_bytes()["now"] - before < 4 * MIB
    large.amax()
    assert resident_bytes()["now"] - before > 12 * MIB
    large[0] = 7.0
    del large
    assert resident_bytes()["now"] - before < 4 * MIB
    assert files.get("large")[0] == stored["large"][0]
    with pytest.raises(UserError, match="missing"):
        MappedTensors(tmp_path.parent)


class Floats(TorchDispatchMode):
    """Notes the number of elements of every floating-point result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            # reserves addresses only; whatever fills it is seen
            return result
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                # a meta tensor has no memory
                self.sizes |= set() if tensor.is_meta else {tensor.numel()}
        return result


@pytest.mark.parametrize("reader", ["load_packed", "from_pretrained"])
@pytest.mark.parametrize(("spec", "inputs"), [(INT4, None), (INT8, int8_input(True))], ids=str)
def test_a_quantized_layer_never_exists_in_16_bit(
    tmp_path: Path, reader: str, spec: QuantSpec, inputs: dict[str, object] | None
) -> None:
    config = llama(hidden_size=160, intermediate_size=352)
    write_artifact(tmp_path / "a", config, spec, inputs)
    weights = {160 * 160, 160 * 80, 160 * 352}
    with Floats() as seen:
        if reader == "load_packed":
            load_packed(tmp_path / "a")
        else:
            packed = qat.packed_config(tmp_path / "a")
            AutoModelForCausalLM.from_pretrained(tmp_path / "a", config=packed, dtype="auto")
    assert not seen.sizes & weights
    # scales are seen: the probe sees what happens
    assert 160 * 352 // 32 in seen.sizes or spec is INT8
    with Floats() as seen:
        AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")(torch.tensor([[1]]))
    assert weights <= seen.sizes


def write_random_int4(path: Path, config: LlamaConfig) -> None:
    """An artifact of random codes; the scales are what a weight of that size would have."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in skeleton.state_dict().items():
        owner, n = name.removesuffix(".weight"), tensor.shape[0]
        if "proj" not in name:
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)
            state[name] = value.mul_(0.02).add_(float(tensor.ndim == 1))
            continue
        k, span = tensor.shape[1], (-(2**31), 2**31 - 1)
        words = torch.randint(*span, (n, k // 8), generator=generator, dtype=torch.int32)
        state[f"{owner}.weight_packed"] = words
        state[f"{owner}.weight_scale"] = torch.full((n, k // 32), 2.0**-9, dtype=torch.bfloat16)
        state[f"{owner}.weight_shape"] = torch.tensor(tensor.shape)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    weights["group_size"] = 32
    path.mkdir()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    content = {**config.to_dict(), "dtype": "bfloat16", "quantization_config": section}
    (path / "config.json").write_text(json.dumps(content))


def test_100_million_parameters_load_within_their_packed_size(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 4096}
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, **shape,
        tie_word_embeddings=False,
    )  # fmt: skip
    write_random_int4(tmp_path / "a", config)
    write_random_int4(tmp_path / "tiny", llama())
    found = in_own_process("packed", tmp_path / "a", tmp_path / "tiny", 12)
    quantized = 8 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 2816)
    # 4 bits and a bf16 scale per 32, and what is kept in 16 bit
    assert found.stored == pytest.approx(quantized * 4.5 / 8 + 2 * 2 * 4096 * 1024, rel=1e-3)
    # one layer of 2.9 million weights is repacked at a time, in blocks of 256 rows of int32; in
    # 16 bit the quantized layers alone would take 173 MiB, which is more than the bound
    constant = 32 * MIB
    assert found.peak <= found.stored + constant < 2 * quantized
    assert found.served <= found.stored + constant


LENGTHS = """
import sys, torch
from qat.mapped_tensors import release_freed_memory, resident_bytes
from qat.runtime import load_packed
model = load_packed(sys.argv[1])
grown = []
for length in range(64, 224):
    model(torch.arange(length)[None] % 96, logits_to_keep=1)
    if length % 80 == 63:
        release_freed_memory()
        grown.append(resident_bytes()["now"])
print(grown[1] - grown[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_every_new_prompt_length(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", llama(max_position_embeddings=256))
    grown = []
    for capacity in ("128", "1024"):
        limits = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), capacity)
        # 128 is what loading sets by itself
        environment = os.environ | (limits if capacity != "128" else {})
        words = [sys.executable, "-c", LENGTHS, str(tmp_path / "a")]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        grown.append(int(done.stdout))
    # the last 80 lengths: 0 of the cache that is full against 1 to 2 MiB each
    assert grown[0] < 8 * MIB
    assert grown[1] > 40 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4", "w4 head", "w8a8"])
def test_a_served_model_takes_its_packed_size_and_a_fifth(tmp_path: Path, name: str) -> None:
    recipe = RECIPES["benchmark_decode"]
    config: Any = load(recipe.schema(), ["recipe=benchmark_decode"], [recipe.config_file], CONFIGS)
    places = decoding.write_models(config.shape, 0, [name], tmp_path / "a")
    # 40 new tokens: buffers that grow with the text would show
    found = decoding.memory(replace(config, new_tokens=40), {name: places[name]})[name]
    assert found.stored < 0.6 * 2 * 342e6
    assert found.served <= 1.2 * found.stored
