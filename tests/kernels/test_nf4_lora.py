"""The operator of a 4-bit layer with an adapter: values, gradients, registration, bad input."""

import pytest
import torch
from torch import Tensor

from qat_kernels import nf4_lora
from qat_kernels.nf4 import Packed4bit, Spec4bit, dequantize_4bit, quantize_4bit
from qat_kernels.nf4_lora import linear_4bit_lora, reference

SPECS = [Spec4bit(), Spec4bit("fp4", 32, False)]
N, K, R = 48, 160, 6
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative error of one rounding (of fp32: of one addition)."""


class Case:
    """A packed weight with x [2, 3, K], A, B, a bias, and W in the dtype of x."""

    def __init__(self, spec: Spec4bit, dtype: torch.dtype, integers: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            if integers:
                return torch.randint(-2, 3, size, generator=generator).float()
            return torch.randn(size, generator=generator)

        self.spec, self.dtype = spec, dtype
        self.packed = quantize_4bit(random(N, K), spec)
        if integers:
            # FP4 times 12 are numbers of few bits, whose sums fp32 holds
            absmax = torch.full_like(self.packed.absmax, 12.0)
            self.packed = self.packed._replace(absmax=absmax)
        self.weight = dequantize_4bit(self.packed, spec, (N, K), dtype)
        self.x = random(2, 3, K).to(dtype).requires_grad_()
        self.a = (random(R, K) if integers else random(R, K) / 12).requires_grad_()
        self.b = random(N, R).requires_grad_()
        self.bias = random(N).requires_grad_()

    def __call__(self, scaling: float = 0.5) -> Tensor:
        shape = (N, K)
        return linear_4bit_lora(
            self.x, self.packed, self.spec, shape, self.dtype, self.a, self.b, scaling, self.bias
        )

    def reference(self, scaling: float = 0.5) -> Tensor:
        return reference(self.x, self.weight, self.a, self.b, scaling, self.bias)

    def grad(self) -> Tensor:
        """A gradient of y, of small integers."""
        size, generator = (*self.x.shape[:-1], N), torch.Generator().manual_seed(1)
        return torch.randint(-2, 3, size, generator=generator).to(self.dtype).to(self.x.device)

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [self.x, self.a, self.b, self.bias], self.grad())

    def bounds(self) -> list[Tensor]:
        """Largest differences between two computations of y and of the four gradients.

        Each is a chain of fp32 sums of at most K + N + R terms in all, and of at most five
        roundings to the dtype, of what does not exceed the sum of magnitudes; two of them differ by
        at most twice that.
        """
        x, w, bias, grad = (
            t.detach().double().abs().cpu() for t in (self.x, self.weight, self.bias, self.grad())
        )
        a, b = (t.detach().to(self.dtype).double().abs().cpu() for t in (self.a, self.b))
        grad_t = 0.5 * grad @ b
        sizes = [
            x @ w.T + bias + 0.5 * x @ a.T @ b.T,
            grad @ w + grad_t @ a,
            (grad_t.mT @ x).sum(0),
            0.5 * (grad.mT @ (x @ a.T)).sum(0),
            grad.sum((0, 1)),
        ]
        error = (K + N + R) * 2.0**-24 + 5 * EPSILON[self.dtype]
        # fp16: halves of the smallest subnormal, times what they are multiplied by
        return [2.05 * error * size + 2.0**-20 for size in sizes]


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], bounds: list[Tensor]) -> None:
    for one, other, bound in zip(found, expected, bounds, strict=True):
        assert one.dtype == other.dtype
        assert bool(((one.double() - other.double()).abs().cpu() <= bound).all())


def test_integers_are_exact() -> None:
    case = Case(Spec4bit("fp4", 32, False), torch.float32, integers=True)
    y, expected = case(), case.reference()
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
    for ours, theirs in zip(case.gradients(y), case.gradients(expected)):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_within_the_derived_bound(spec: Spec4bit, dtype: torch.dtype) -> None:
    case = Case(spec, dtype)
    y, bounds = case(), case.bounds()
    check((y,), (case.reference(),), bounds[:1])
    a, b = case.a.to(dtype), case.b.to(dtype)
    separate = case.x @ case.weight.T + case.bias.to(dtype) + 0.5 * ((case.x @ a.T) @ b.T)
    check((y, *case.gradients(y)), (separate, *case.gradients(separate)), bounds)


def test_only_what_is_asked_for_is_differentiated() -> None:
    case = Case(SPECS[0], torch.float32)
    case.x, case.bias = case.x.detach(), case.bias.detach()
    case().sum().backward()
    assert case.a.grad is not None
    assert case.b.grad is not None
    assert case.x.grad is None


def test_registration_and_compile() -> None:
    case = Case(SPECS[0], torch.float32)
    tensors = [t for t in case.packed if t is not None]
    arguments = (case.x, case.a, case.b, tensors, case.bias, 0.5, "nf4", 64, torch.float32)
    torch.library.opcheck(nf4_lora.linear_4bit_lora_op, arguments)
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    y, again = case(), compiled()
    torch.testing.assert_close(again, y, atol=0, rtol=0)
    for one, other in zip(case.gradients(again), case.gradients(y)):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_autocast_and_no_tokens() -> None:
    case = Case(SPECS[0], torch.float32)
    plain = case()
    with torch.autocast("cpu", torch.bfloat16):
        under = case()
    torch.testing.assert_close(under, plain, atol=0, rtol=0)
    case.x = case.x.detach()[:0].requires_grad_()
    y = case()
    assert y.shape == (0, 3, N)
    y.sum().backward()
    assert case.x.grad is not None
    assert case.a.grad is not None
    assert not bool(case.a.grad.any())


def test_bad_input() -> None:
    case = Case(SPECS[0], torch.float32)
    options = (case.spec, (N, K), torch.float32)
    for a, b in ((case.a[:, 1:], case.b), (case.a, case.b[:, 1:]), (case.a, case.b[1:])):
        with pytest.raises(ValueError, match=r"do not fit a weight \(48, 160\): expected \(R, 160"):
            linear_4bit_lora(case.x, case.packed, *options, a, b, 1.0)
    with pytest.raises(ValueError, match=r"A is torch\.int64"):
        linear_4bit_lora(case.x, case.packed, *options, case.a.long(), case.b, 1.0)
    with pytest.raises(ValueError, match=r"B is torch\.float32 on meta"):
        linear_4bit_lora(case.x, case.packed, *options, case.a, case.b.to("meta"), 1.0)
    with pytest.raises(ValueError, match=r"x \(2, 3, 159\)"):
        linear_4bit_lora(case.x[..., 1:], case.packed, *options, case.a, case.b, 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_the_gpu(dtype: torch.dtype) -> None:
    case = Case(Spec4bit("fp4", 64, False), dtype)
    y = case()
    expected, bounds = (case.reference(), *case.gradients(y)), case.bounds()
    case.packed = Packed4bit(*(None if t is None else t.cuda() for t in case.packed))
    case.x, case.a, case.b, case.bias = (
        t.detach().cuda().requires_grad_() for t in (case.x, case.a, case.b, case.bias)
    )
    y = case()
    found = (y, *case.gradients(y))
    check(tuple(t.cpu() for t in found), tuple(t.detach() for t in expected), bounds)
