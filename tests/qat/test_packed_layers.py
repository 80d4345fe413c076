"""Layers of a served model: what is kept in 16 bit computes a row alike in every batch."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.packed_layers import KeptLinear


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
    torch.testing.assert_close(kept(x[:6].view(2, 3, k)).flatten(0, 1), together[:6])
    assert tuple(kept(x[:0]).shape) == (0, n)


def test_the_result_is_that_of_the_linear_layer() -> None:
    plain = layer(64, 128)
    kept, x = KeptLinear(plain), rows(5, 128)
    assert kept.weight is plain.weight
    torch.testing.assert_close(kept(x), functional.linear(x, plain.weight, plain.bias))
    # one row: equal up to the order of 128 additions, a rounding to bf16, and the bias
    exact = x[:1].double() @ plain.weight.double().T + plain.bias.double()
    size = x[:1].double().abs() @ plain.weight.double().abs().T + plain.bias.double().abs()
    bound = 130 * 2.0**-24 * size + 2.0**-8 * exact.abs() * 1.01
    assert bool(((kept(x[:1]).double() - exact).abs() <= bound).all())


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
    assert set(seen) == {KeptLinear.TILE}
