"""Which path an operation would take, and why: the same functions that the operators ask.

>>> from qat_kernels import explain
>>> print(explain("w4a16", (1, 4096, 4096), "cpu", dtype="float32"))
reference: fp32 is the exact reference: dequantize, then an fp32 matmul
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from qat_kernels.support import Choice

OPERATIONS = (
    "activation_quant",
    "fake_quant",
    "fp8",
    "kv_cache",
    "nf4",
    "scaled_matmul",
    "w4a16",
    "w8a8",
)
"""Operations, each a module with a function ``choose(shape, device, **options) -> Choice``."""


def explain(
    op: str, shape: tuple[int, ...], device: torch.device | str = "cpu", **options: Any
) -> Choice:
    """The path that ``op`` would take and the reason; runs nothing and needs no such tensors.

    Args:
        op: one of `OPERATIONS`.
        shape: the operation's sizes, as the module's ``choose`` names them: (M, N, K) for matmuls.
        device: where it would run.
        options: what else the choice depends on (dtype, bits, group size ...), see ``choose``;
            a dtype may be given by name.

    Raises:
        ValueError: no such operation, or options or sizes that it does not take.
    """
    if op not in OPERATIONS:
        raise ValueError(f"op={op}: one of {', '.join(OPERATIONS)}")
    module = importlib.import_module(f"qat_kernels.{op}")
    for name, value in options.items():
        if name.endswith("dtype") and isinstance(value, str):
            found = getattr(torch, value, None)
            if not isinstance(found, torch.dtype):
                raise ValueError(f"{name}={value}: no dtype of torch")
            options[name] = found
    try:
        choice: Choice = module.choose(shape, torch.device(device), **options)
    except (TypeError, IndexError) as error:
        raise ValueError(f"op={op}, shape={shape}: {error}") from error
    return choice
