"""Layers on a flat batch: pieces are what the layer computes of each sequence alone."""

import pytest
import torch
from torch import nn
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from qat.linear_4bit import Linear4bit
from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat.serve.engine_attention import _mask, _to_bytes
from qat.serve.engine_rows import Piece, Step, compute_by_piece
from qat_kernels import w4a16, w8a8
from qat_kernels.kv_cache_numerics import bytes_per_token, quantize
from qat_kernels.nf4 import Spec4bit
from qat_kernels.numerics import QuantSpec, compute_scale, pack
from qat_kernels.numerics import quantize as quantize_weight

LENGTHS = [1, 1, 70, 3, 1, 64, 63, 5]


def begun(lengths: list[int]) -> Step:
    step = Step()
    step.begin([Piece(str(i), 0, length) for i, length in enumerate(lengths)])
    return step


def test_slices() -> None:
    step = begun([1, 2, 70, 1, 64])
    assert step.slices(138, 64) == [(0, 3, True), (3, 73, False), (73, 74, True), (74, 138, False)]
    assert step.slices(138, 1) == [
        (0, 1, False),
        (1, 3, False),
        (3, 73, False),
        (73, 74, False),
        (74, 138, False),
    ]
    # the head gets one row of each
    assert step.slices(5, 64) == [(0, 5, True)]
    assert step.slices(5, 1) == [(i, i + 1, False) for i in range(5)]
    assert step.slices(17, 1) is None
    step.end()
    assert step.slices(138, 1) is None


def layer(kind: str, dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    n, k = 96, 128
    w = torch.randn(n, k, generator=generator) / 8
    bias = torch.randn(n, generator=generator).to(dtype)
    if kind == "nf4":
        return Linear4bit.from_weight(w, Spec4bit(block_size=32), torch.float32, bias)
    if kind.startswith("w"):
        bits = 4 if kind == "w4a16" else 8
        grouped = kind in ("w4a16", "w8a8 groups")
        spec = QuantSpec(bits=bits, granularity="group" if grouped else "channel", grid="absmax")
        scale, zero = compute_scale(w, spec)
        codes = quantize_weight(w, scale, zero, spec)
        if kind.startswith("w8a8"):
            return Int8Linear(w8a8.prepare(codes, scale, dtype=dtype), bias)
        packed = w4a16.prepare(pack(codes, bits), scale, None, spec, (n, k), "cpu", dtype)
        return PackedLinear(packed, bias)
    linear = nn.Linear(k, n)
    linear.weight, linear.bias = nn.Parameter(w.to(dtype)), nn.Parameter(bias)
    if kind == "activation":
        return nn.SiLU()
    return KeptLinear(linear) if kind == "kept" else linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "kind",
    ["w4a16", "w8a16", "w8a8", "w8a8 groups", "nf4", "kept", "linear", "activation"],
)
@torch.no_grad()
def test_a_flat_batch_is_its_pieces(kind: str, dtype: torch.dtype) -> None:
    """Exactly, in the order of the batch; and one row of each, as the head gets them."""
    plain = layer(kind, dtype)
    model, step = nn.ModuleDict({"layer": plain}), begun(LENGTHS)
    compute_by_piece(model, step, torch.device("cpu"))
    # 100 is no multiple of a vector
    width = 100 if kind == "activation" else 128
    x = torch.randn(1, sum(LENGTHS), width, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = torch.cat([plain(part) for part in x.split(LENGTHS, 1)], 1)
    assert torch.equal(model["layer"](x), expected)
    rows = x[:, : len(LENGTHS)]
    expected = torch.cat([plain(row) for row in rows.split(1, 1)], 1)
    assert torch.equal(model["layer"](rows), expected)
    step.end()
    assert torch.equal(model["layer"](x), plain(x))


@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("rope", ["default", "longrope"])
def test_rotary_embeddings(rope: str, size: int) -> None:
    """Long rotary embeddings choose their frequencies by the length of the sequence."""
    long = {"short_factor": [1.0] * (size // 2), "long_factor": [4.0] * (size // 2)}
    parameters = {"rope_type": rope, "rope_theta": 10000.0, **(long if rope == "longrope" else {})}
    config = Phi3Config(
        hidden_size=2 * size,
        num_attention_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
        rope_parameters=parameters,
        pad_token_id=0,
    )
    plain, step = Phi3RotaryEmbedding(config), begun(LENGTHS)
    model = nn.ModuleDict({"rotary": plain})
    x = torch.zeros(1, sum(LENGTHS), size)
    positions = [torch.arange(n)[None] + 7 * i for i, n in enumerate(LENGTHS)]
    expected = [plain(x, ids) for ids in positions]
    compute_by_piece(model, step, torch.device("cpu"))
    found = model["rotary"](x, torch.cat(positions, 1))
    for i in range(2):
        assert torch.equal(found[i], torch.cat([one[i] for one in expected], 1))


def test_masks() -> None:
    device = torch.device("cpu")

    def mask(past: int, length: int, seen: int, window: int | None) -> list[list[int]] | None:
        found = _mask(Piece("", past, length), seen, window, device)
        return None if found is None else found[0, 0].int().tolist()

    # a whole prompt, a new token, and either in a window that is longer
    assert (
        mask(0, 3, 0, None) is mask(7, 1, 7, None) is mask(2, 1, 2, 4) is mask(0, 3, 0, 4) is None
    )
    # the cache has cut the window; as in generate, there is a mask nevertheless
    assert mask(9, 1, 3, 4) == [[1, 1, 1, 1]]
    assert mask(2, 2, 2, None) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask(0, 3, 0, 2) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    # window 3: two cached ones are left
    assert mask(5, 2, 2, 3) == [[1, 1, 1, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_a_cached_head(bits: int) -> None:
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    stored = _to_bytes(*quantize(x, bits))
    assert stored.dtype == torch.uint8
    assert 2 * 2 * stored.shape[-1] == bytes_per_token(2, 16, bits)
