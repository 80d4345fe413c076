"""The checkpoint entries of bitsandbytes' 4-bit layers, written and read.

For a layer named ``p`` with a weight [N, K] in B blocks::

    p.weight                               uint8 [ceil(N K / 2), 1]
    p.weight.absmax                        fp32 [B]; uint8 [B] with double quantization
    p.weight.quant_map                     fp32 [16], the values of the data type
    p.weight.nested_absmax                 fp32 [ceil(B / 256)]        double quantization only
    p.weight.nested_quant_map              fp32 [256], the dynamic map double quantization only
    p.weight.quant_state.bitsandbytes__nf4 uint8, UTF-8 JSON: type, block size, dtype, shape;
                                           with double quantization the offset, a JSON number that
                                           holds the fp32 value exactly
    p.bias                                 [N], where there is one

The block size stands here and not in ``config.json``: transformers reads every block size that
bitsandbytes has, each layer with its own (`caveat` names the exception on CPUs).

Source: bitsandbytes 0.50.2 (``QuantState.as_dict``), transformers 5.23 (``BitsAndBytesConfig``).
"""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.linear_4bit import Linear4bit
from qat_kernels.nf4 import (
    BLOCK_SIZES,
    DTYPES,
    NESTED_BLOCK,
    Packed4bit,
    Spec4bit,
    codebook,
    dynamic_map,
)

_CPU = torch.device("cpu")
_QUANT_STATE = "weight.quant_state.bitsandbytes__"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(prefix: str, layer: Linear4bit) -> dict[str, Tensor]:
    """The checkpoint entries of one layer, on its device; see the module's table.

    The codes are the layer's own memory, not a copy.
    """
    spec, packed = layer.spec, layer.packed
    state: dict[str, Any] = {
        "quant_type": spec.quant_type,
        "blocksize": spec.block_size,
        "dtype": _dtype_name(layer.weight_dtype),
        "shape": list(layer.shape),
    }
    entries = {
        "weight": packed.codes.view(-1, 1),
        "weight.absmax": packed.absmax,
        # cloned, since safetensors refuses tensors that share memory
        "weight.quant_map": codebook(spec.quant_type, packed.codes.device).clone(),
    }
    if packed.nested_absmax is not None and packed.offset is not None:
        entries["weight.nested_absmax"] = packed.nested_absmax
        entries["weight.nested_quant_map"] = dynamic_map(packed.codes.device).clone()
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": packed.offset.item(),
        }
    text = json.dumps(state).encode()
    entries[_QUANT_STATE + spec.quant_type] = torch.tensor(list(text), dtype=torch.uint8)
    if layer.bias is not None:
        entries["bias"] = layer.bias.detach()
    return {f"{prefix}.{name}": tensor for name, tensor in entries.items()}


def caveat(layer: Linear4bit) -> str | None:
    """Why plain bitsandbytes computes another weight than the one stored, or None if it does not.

    The stored values are right, and CUDA reads them rightly. On CPUs with AVX-512, bitsandbytes
    0.50 counts floor(K / block size) scales per row, which is wrong where a block runs over the
    end of a row (sizes of 2048 and more take another path there).
    """
    k, size = layer.in_features, layer.spec.block_size
    if k % size == 0 or k % 16 or size >= 2048:
        return None
    return (
        f"bitsandbytes 0.50 reads it wrongly on CPUs with AVX-512, since block_size={size} does "
        f"not divide the {k} input features; a block_size that does is read rightly everywhere"
    )


def _expect(condition: bool, prefix: str, message: str) -> None:
    if not condition:
        raise UserError(
            f"{prefix}: {message}. Quantize the 16-bit model instead of this checkpoint, or save "
            "it again with bitsandbytes 0.50 and nf4 or fp4 in uint8 storage"
        )


def _state(prefix: str, get: Callable[[str], Tensor], names: Collection[str]) -> dict[str, Any]:
    """The JSON of one layer, its values checked."""
    keys = [f"{prefix}.{_QUANT_STATE}{kind}" for kind in ("nf4", "fp4")]
    found = [key for key in keys if key in names]
    _expect(len(found) == 1, prefix, f"exactly one of {' and '.join(keys)} must be there")
    try:
        state: dict[str, Any] = json.loads(bytes(get(found[0]).cpu().tolist()))
    except ValueError as error:
        raise UserError(f"{found[0]} is not JSON ({error}): the checkpoint is damaged") from None
    _expect(
        state.get("quant_type") in ("nf4", "fp4") and found[0].endswith(state["quant_type"]),
        prefix,
        f"quant_type {state.get('quant_type')!r} under the name {found[0]}",
    )
    _expect(state.get("blocksize") in BLOCK_SIZES, prefix, f"blocksize {state.get('blocksize')}")
    allowed = {_dtype_name(dtype) for dtype in DTYPES}
    _expect(state.get("dtype") in allowed, prefix, f"weights of dtype {state.get('dtype')!r}")
    shape = state.get("shape")
    _expect(isinstance(shape, list) and len(shape) == 2, prefix, f"a weight of shape {shape}")
    return state


def read(prefix: str, get: Callable[[str], Tensor], names: Collection[str]) -> Linear4bit:
    """One layer from a checkpoint that bitsandbytes (or `tensors`) wrote.

    Args:
        prefix: name of the layer.
        get: reads a tensor by its full name.
        names: all names of the checkpoint.

    Raises:
        UserError: an entry is missing or is not what this project can hold bit for bit (8-bit
            weights, another storage than uint8, other tables of values).
    """
    state = _state(prefix, get, names)
    double = f"{prefix}.weight.nested_absmax" in names
    required = ["weight", "weight.absmax", "weight.quant_map"]
    required += ["weight.nested_absmax", "weight.nested_quant_map"] * double
    for name in required:
        _expect(f"{prefix}.{name}" in names, prefix, f"{prefix}.{name} is missing")
    spec = Spec4bit(state["quant_type"], state["blocksize"], double)
    codes = get(f"{prefix}.weight")
    _expect(codes.dtype == torch.uint8, prefix, f"codes stored as {codes.dtype}, not as uint8")
    same = torch.equal(get(f"{prefix}.weight.quant_map").cpu(), codebook(spec.quant_type, _CPU))
    _expect(same, prefix, f"another table of values than that of {spec.quant_type}")
    nested = offset = None
    if double:
        nested = get(f"{prefix}.weight.nested_absmax")
        same = torch.equal(get(f"{prefix}.weight.nested_quant_map").cpu(), dynamic_map(_CPU))
        _expect(same, prefix, "another 8-bit map of the absmax values than the dynamic one")
        _expect(
            state.get("nested_blocksize") == NESTED_BLOCK and "nested_offset" in state,
            prefix,
            f"nested_blocksize {state.get('nested_blocksize')}, or no nested_offset",
        )
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
    absmax = get(f"{prefix}.weight.absmax")
    packed = Packed4bit(codes.reshape(-1), absmax, nested, offset)
    bias = get(f"{prefix}.bias") if f"{prefix}.bias" in names else None
    n, k = state["shape"]
    try:
        return Linear4bit(packed, spec, (n, k), getattr(torch, state["dtype"]), bias)
    except ValueError as error:
        raise UserError(f"{prefix}: the checkpoint is damaged: {error}") from None


def quantization_config(
    spec: Spec4bit, compute_dtype: torch.dtype, skip_modules: Sequence[str]
) -> dict[str, Any]:
    """``quantization_config`` of config.json, what transformers 5.23 writes for the same model.

    Args:
        spec: of all quantized layers. The block size is not part of it (see the module).
        compute_dtype: dtype of the matmuls where activations are fp16; fp32 and bf16 activations
            decide for themselves only if it is unset, so name the dtype that was trained in.
        skip_modules: names of linear layers kept in 16 bit, e.g. ``lm_head``.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": _dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_modules),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def spec_of(config: dict[str, Any]) -> Spec4bit:
    """The spec that a ``quantization_config`` of config.json names, with the usual block size 64.

    The block size of a layer stands beside its weights: `read` returns the real one.

    Raises:
        UserError: not bitsandbytes, 8-bit, another type than nf4 and fp4, or codes that are
            stored as another dtype than uint8.
    """
    remedy = "use the 16-bit model, or one saved in 4 bits by bitsandbytes with uint8 storage"
    method = config.get("quant_method")
    if method != "bitsandbytes" or not config.get("load_in_4bit", config.get("_load_in_4bit")):
        what = "8-bit bitsandbytes" if method == "bitsandbytes" else f"quant_method={method!r}"
        raise UserError(f"quantization_config: {what} is no 4-bit bitsandbytes base; {remedy}")
    # the defaults of transformers, which older versions did not write out
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    if storage != "uint8":
        raise UserError(f"quantization_config.bnb_4bit_quant_storage={storage!r}; {remedy}")
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise UserError(f"quantization_config.bnb_4bit_quant_type={kind!r}: nf4 or fp4; {remedy}")
    return Spec4bit(kind, 64, bool(config.get("bnb_4bit_use_double_quant", False)))
