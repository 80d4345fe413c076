"""Other projects' kernels for the same work, where they are installed and run on this device.

A peer quantizes the same weight by its own method to as many bits and groups of the same size; only
time is compared here. One that is missing, or refuses, is named in a line and left out. The
builders for CUDA only (tinygemm, gemlite, Marlin) follow their projects' sources and have not run
yet.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from qat_kernels import activation_quant
from qat_kernels.bench.timing import Call

Build = Callable[[Tensor, Tensor, int], Call]
"""From a weight [N, K], activations [M, K] and a group size to one call."""


def tinygemm(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The int4 kernel of torch on CUDA (``_weight_int4pack_mm``)."""
    if not w_NK.is_cuda:
        raise RuntimeError("a CUDA kernel")
    n, k = w_NK.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=w_NK.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(k // group, n, 2, dtype=torch.bfloat16, device=w_NK.device)
    return partial(torch.ops.aten._weight_int4pack_mm, x_MK, packed, group, scales)


def scaled_mm(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The FP8 matmul of torch (``_scaled_mm``) with a scale for each row of x and of w."""
    (x, s_x), (w, s_w) = (activation_quant.reference(t, to="e4m3") for t in (x_MK, w_NK))
    return partial(torch._scaled_mm, x, w.t(), s_x, s_w.t(), out_dtype=torch.bfloat16)


def torchao_int4(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The weight-only int4 layer of torchao, in the packing that fits the device."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = _linear(w_NK)
    if w_NK.is_cuda:
        config = Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=group)
    quantize_(layer, config)
    return partial(layer, x_MK)


def gemlite_int4(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The weight-only int4 layer of gemlite, whose Triton kernels run on CUDA."""
    if not w_NK.is_cuda:
        raise RuntimeError("a CUDA kernel")
    from gemlite.helper import A16Wn

    n, k = w_NK.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=w_NK.device)
    scales = torch.rand(n * k // group, 1, dtype=x_MK.dtype, device=w_NK.device)
    maker = A16Wn(device=str(w_NK.device), dtype=x_MK.dtype)
    layer = maker.from_weights(codes, scales, torch.full_like(scales, 8.0), 4, group)
    return partial(layer, x_MK)


def marlin_int4(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """Marlin's int4 matmul, through the functions by which vLLM tests and calls it."""
    if not w_NK.is_cuda:
        raise RuntimeError("a CUDA kernel")
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    n, k = w_NK.shape
    kind = scalar_types.uint4b8
    made = marlin_utils_test.marlin_quantize(w_NK.t().contiguous(), kind, group, False)
    _, packed, scales, _, _, _ = made
    empty = marlin_utils.marlin_make_empty_g_idx(w_NK.device)
    return partial(
        marlin_utils.apply_gptq_marlin_linear,
        input=x_MK,
        weight=packed,
        weight_scale=scales,
        weight_zp=empty,
        g_idx=empty,
        g_idx_sort_indices=empty,
        workspace=marlin_utils.marlin_make_workspace_new(w_NK.device),
        wtype=kind,
        output_size_per_partition=n,
        input_size_per_partition=k,
        is_k_full=True,
    )


def torchao_int8(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The linear layer of torchao with dynamic int8 activations and int8 weights."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = _linear(w_NK)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return partial(layer, x_MK)


def bitsandbytes_nf4(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The NF4 layer of bitsandbytes, with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = w_NK.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=x_MK.dtype, quant_type="nf4")
    layer.weight = Params4bit(
        w_NK.cpu(), requires_grad=False, quant_type="nf4", blocksize=group, compress_statistics=True
    )
    return partial(layer.to(w_NK.device).eval(), x_MK)


def bitsandbytes_dequantize(w_NK: Tensor, x_MK: Tensor, group: int) -> Call:
    """The NF4 dequantization of bitsandbytes, with double quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(w_NK, blocksize=group, compress_statistics=True, quant_type="nf4")
    return partial(dequantize_4bit, packed, state)


def torchao_fake_quant(w_NK: Tensor, grad: Tensor, group: int) -> Call:
    """The int4 fake quantizer of torchao in eager mode, forward and backward."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    four_bits = torch.int4  # type: ignore[attr-defined]
    quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(four_bits, group_size=group))

    def step() -> None:
        with torch.enable_grad():
            leaf = w_NK.detach().requires_grad_()
            quantizer(leaf).to(grad.dtype).backward(grad)

    return step


def _linear(w_NK: Tensor) -> nn.Linear:
    layer = nn.Linear(w_NK.shape[1], w_NK.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(w_NK, requires_grad=False)
    return layer


PEERS: dict[str, tuple[str, Build]] = {
    "torch tinygemm": ("torch", tinygemm),
    "torch._scaled_mm": ("torch", scaled_mm),
    "torchao int4": ("torchao", torchao_int4),
    "gemlite int4": ("gemlite", gemlite_int4),
    "Marlin int4 (vLLM)": ("vllm", marlin_int4),
    "torchao W8A8 eager": ("torchao", torchao_int8),
    "torchao fake-quant": ("torchao", torchao_fake_quant),
    "bitsandbytes NF4": ("bitsandbytes", bitsandbytes_nf4),
    "bitsandbytes dequantize": ("bitsandbytes", bitsandbytes_dequantize),
}
"""Name to the package that carries it, and its builder."""


def build(name: str, weights: list[Tensor], x_MK: Tensor, group: int) -> list[Call]:
    """The peer's calls, one for each copy of the weight; empty, with a line said, if it cannot."""
    package, builder = PEERS[name]
    if importlib.util.find_spec(package) is None:
        _say(f"{name}: {package} is not installed")
        return []
    try:
        calls = [builder(w_NK, x_MK, group) for w_NK in weights]
        calls[0]()
    # another project's code fails in its own ways, and the comparison goes on without it
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _say(f"{name}: not measured here ({first[:120]})")
        return []
    return calls


@functools.cache
def _say(line: str) -> None:
    """Print a line once, however many cases it concerns."""
    print(line)
