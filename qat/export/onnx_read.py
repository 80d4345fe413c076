"""Read a model back: codes and scales with the onnx package, weights with onnxruntime itself.

Weights come from onnxruntime's own MatMulNBits: each block of a weight [N, K] stands as a row of a
weight [N B, block], and its product with the identity of that size is its dequantized value. That
takes ``block`` multiplications a weight, where the identity of K rows would take K.

Shape legend: N output features, K input features, B blocks a row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from tqdm import tqdm

from qat.export.format import ReadMatrix, ReadTensor

CHUNK = 1 << 24
"""Weights that onnxruntime dequantizes at once (64 MiB in fp32)."""
UNSIGNED = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}
"""Width of a cell → onnx type of its codes."""


def read_model(path: Path, kept: set[str]) -> Iterator[ReadMatrix | ReadTensor]:
    """Everything that a written model holds under the artifact's names, one tensor at a time.

    Args:
        path: the ``.onnx`` file; its data lies beside it.
        kept: names of the initializers that are tensors of the artifact.
    """
    model = onnx.load(str(path), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    tensors = sorted(kept & stored.keys())
    with tqdm(
        total=len(nodes) + len(tensors), desc="read back", delay=2, leave=False, disable=None
    ) as bar:
        for name in tensors:
            values = _array(stored[name], path.parent).astype(np.float32)
            yield ReadTensor(name, torch.from_numpy(values))
            bar.update()
        for node in nodes:
            parts = [_array(stored[name], path.parent) for name in node.input[1:]]
            yield _matrix(node, *parts)
            bar.update()


def _array(tensor: TensorProto, directory: Path) -> np.ndarray:
    """The values of one initializer; the model itself goes on without them."""
    whole = TensorProto()
    whole.CopyFrom(tensor)
    if onnx.external_data_helper.uses_external_data(whole):
        onnx.external_data_helper.load_external_data_for_tensor(whole, str(directory))
    values: np.ndarray = numpy_helper.to_array(whole)
    return values


def _matrix(
    node: Any, cells: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None
) -> ReadMatrix:
    """One quantized weight, from its node and what the node refers to."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    bits, n, k = attributes["bits"], attributes["N"], attributes["K"]
    offset = 1 << (bits - 1)
    block = attributes["block_size"]
    codes = _unpack(cells.reshape(n, -1), bits)[:, :k].astype(np.int16) - offset
    scales = scales.reshape(n, -1)
    unsigned = zero_point = None
    if zeros is not None:
        unsigned = _unpack(zeros.reshape(n, -1), bits)[:, : cells.shape[1]]
        zero_point = _per_row(unsigned.astype(np.int16) - offset, k, block)
    values = _dequantize(attributes, cells, scales, unsigned)[:, :k]
    return ReadMatrix(
        name=node.input[1].removesuffix(".codes"),
        codes=torch.from_numpy(codes),
        scale=_per_row(scales, k, block),
        zero_point=zero_point,
        values=torch.from_numpy(values),
    )


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, M] as the codes [N, M * 8 / bits] that onnx's own types hold."""
    tensor = TensorProto(data_type=UNSIGNED[bits], raw_data=packed.tobytes())
    tensor.dims.extend([packed.shape[0], packed.shape[1] * 8 // bits])
    return numpy_helper.to_array(tensor).astype(np.uint8)  # type: ignore[no-any-return]


def _per_row(per_block: np.ndarray, k: int, block: int) -> Tensor:
    """[N, B]; [N, 1] where the last block is cut off by K and all blocks of a row are equal."""
    if k % block and (per_block == per_block[:, :1]).all():
        per_block = per_block[:, :1]
    # a copy: onnx's arrays are read-only
    return torch.from_numpy(per_block.copy())


def _dequantize(
    attributes: dict[str, Any], cells: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
) -> np.ndarray:
    """fp32 [N, B * block] as MatMulNBits multiplies by it.

    Args:
        attributes: of the node.
        cells: uint8 [N, B, block * bits / 8].
        scales: fp32 [N, B].
        zeros: unsigned [N, B], or None.
    """
    block = attributes["block_size"]
    rows = cells.reshape(-1, 1, cells.shape[2])
    values = np.empty((len(rows), block), np.float32)
    step = max(1, CHUNK // block)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weights = {"codes": rows[part], "scales": scales.reshape(-1, 1)[part]}
        if zeros is not None:
            # a byte a row, its zero point in the low bits
            weights["zeros"] = zeros.reshape(-1, 1)[part]
        values[part] = _multiply(attributes | {"N": len(rows[part]), "K": block}, weights)
    return values.reshape(cells.shape[0], -1)


def _multiply(attributes: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    """fp32 [N, K]: the product with the identity, transposed, in a session of its own."""
    n, k = attributes["N"], attributes["K"]
    node = helper.make_node(
        "MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attributes
    )
    graph = helper.make_graph(
        [node],
        "dequantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [k, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [k, n])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (product,) = session.run(None, {"x": np.eye(k, dtype=np.float32)})
    return product.T  # type: ignore[no-any-return]
