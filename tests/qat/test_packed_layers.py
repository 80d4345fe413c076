"""Layers of a served model: rows alike in every batch, copies, and the memory that is counted."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.packed_layers import Int8Linear, KeptLinear, PackedLinear
from qat_kernels import w4a16_cpu, w8a8
from qat_kernels.w4a16 import PackedWeight


def layer(n: int, k: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(n + k)
    return nn.Linear(k, n, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def rows(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (1000, 2048), (7, 33)])
def test_a_row_does_not_depend_on_the_others(n: int, k: int, tiled: bool) -> None:
    kept = KeptLinear(layer(n, k))
    kept.tiled = kept.tiled or tiled
    x = rows(33, k)
    together = kept(x)
    for m in (1, 2, 3, 16):
        parts = torch.cat([kept(part) for part in x.split(m)])
        torch.testing.assert_close(parts, together, atol=0, rtol=0)
    cubic = kept(x[:6].view(2, 3, k))
    torch.testing.assert_close(cubic.flatten(0, 1), together[:6], atol=0, rtol=0)
    assert tuple(kept(x[:0]).shape) == (0, n)


def test_the_result_is_that_of_the_linear_layer() -> None:
    plain = layer(64, 128)
    kept, x = KeptLinear(plain), rows(5, 128)
    assert kept.weight is plain.weight
    if not kept.tiled:
        assert torch.equal(kept(x), functional.linear(x, plain.weight, plain.bias))
    # one row or tiles: equal up to the order of 128 additions, a rounding to bf16, and the bias
    exact = x.double() @ plain.weight.double().T + plain.bias.double()
    size = x.double().abs() @ plain.weight.double().abs().T + plain.bias.double().abs()
    bound = 130 * 2.0**-24 * size + 2.0**-8 * exact.abs() * 1.01
    for count in (1, 5):
        error = (kept(x[:count]).double() - exact[:count]).abs()
        assert bool((error <= bound[:count]).all())


def test_tiles_are_used_where_rows_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = functional.linear, []

    def by_number(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A matmul whose rounding changes with the number of rows."""
        seen.append(len(x))
        return real(x, weight, bias) * (1 + len(x) * 2.0**-6)

    plain = layer(64, 128)
    monkeypatch.setattr(functional, "linear", by_number)
    kept = KeptLinear(plain)
    assert kept.tiled
    seen.clear()
    x = rows(33, 128)
    together = kept(x)
    assert torch.equal(torch.cat([kept(part) for part in x.split(1)]), together)
    assert set(seen) == {w4a16_cpu.TILE_ROWS}


def test_an_int8_layer_is_copied_and_saved() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (24, 64), generator=generator, dtype=torch.int8)
    weight = w8a8.prepare(codes, torch.rand(24, 1, generator=generator))
    bias = torch.randn(24, generator=generator).to(torch.bfloat16)
    reuse = w8a8.InputReuse()
    layers = nn.ModuleList([Int8Linear(weight, bias, reuse) for _ in range(2)])
    x = rows(3, 64)
    file = io.BytesIO()
    with torch.no_grad():
        y = layers[0](x)
        torch.save(layers, file)
        file.seek(0)
        for copied in (copy.deepcopy(layers), torch.load(file, weights_only=False)):
            assert torch.equal(copied[1](x), y)
            assert copied[0].reuse is copied[1].reuse is not reuse
            assert copied[0].codes is copied[0].packed.codes is not weight.codes
            assert list(copied.state_dict()) == list(layers.state_dict())


def test_all_tensors_of_a_packed_weight_are_counted() -> None:
    words, high = torch.zeros(8, 32, dtype=torch.int16), torch.zeros(8, 32, dtype=torch.int8)
    scale = torch.ones(8, 2, dtype=torch.bfloat16)
    weight = PackedWeight("triton", words, scale, None, 3, 8, 128, torch.bfloat16, high, 64)
    layer = PackedLinear(weight, None)
    assert sum(b.nbytes for b in layer.buffers()) == words.nbytes + high.nbytes + scale.nbytes
    assert not layer.state_dict()
