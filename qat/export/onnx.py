"""``format=onnx``: a whole model for ONNX Runtime, its quantized layers as MatMulNBits.

The directory holds ``model.onnx`` (the graph), ``model.onnx.data`` (weights), the tokenizer and
generation defaults. Codes, scales and zero points are the trained ones; what is kept is stored as
the artifact stores it and computed in fp32. Inputs are input_ids, attention_mask, position_ids and
past_key_values.N.key / .value; outputs are logits and present.N.key / .value.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qat.errors import UserError
from qat.export.format import Loss, ReadMatrix, ReadTensor, require
from qat.export.onnx_cells import BLOCKS, Cells, block_size, cells_of, fill
from qat.export.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat.export.onnx_graph import Stored
    from qat.export.run import ExportOptions

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("phi", "phi3", "gpt_neox", "stablelm"),
)
"""Families whose graphs were held against transformers, as transformers names them."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""
MODEL = "model.onnx"

USE = """```python
import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
session = ort.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
cache = {  # empty at first: [batch, heads, 0, size]
    i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
    for i in session.get_inputs()
    if i.name.startswith("past_key_values")
}
ids = step = tokenizer("Once upon a time", return_tensors="np").input_ids.astype(np.int64)
for _ in range(16):
    past, total = ids.shape[1] - step.shape[1], ids.shape[1]
    inputs = {
        "input_ids": step,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(past, total)[None],
    }
    logits, *present = session.run(None, inputs | cache)
    cache = dict(zip(cache, present))
    step = logits[:, -1:].argmax(-1)
    ids = np.concatenate([ids, step], 1)
    if step.item() == tokenizer.eos_token_id:
        break
print(tokenizer.decode(ids[0]))
```

Run it in this directory. The weights are multiplied in fp32 (`accuracy_level=1`); quantized layers
are `MatMulNBits` nodes of the domain `com.microsoft`, which ONNX Runtime implements.
"""


class Onnx:
    """The ONNX format; see `qat.export.format.Format`."""

    suffix = None
    use = USE

    def __init__(self, options: "ExportOptions") -> None:
        del options

    @property
    def reader(self) -> str:
        """Packages that read the output back."""
        runtime, onnx = require("onnxruntime", "export"), require("onnx", "export")
        return f"onnx {onnx.__version__} and onnxruntime {runtime.__version__}"

    def losses(self, source: Source) -> Sequence[Loss]:
        """What a graph with MatMulNBits cannot carry.

        Raises:
            UserError: a package is missing.
        """
        for package in ("onnx", "onnxruntime", "onnxscript"):
            require(package, "export")
        if source.kind != "compressed-tensors":
            return [Loss("NF4 weights", "MatMulNBits multiplies by integer codes",
                         "format=bitsandbytes", writable=False)]  # fmt: skip
        return [*_model_losses(source), *_layer_losses(source)]

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """Write the graph, its weights, the tokenizer and config.json.

        Raises:
            UserError: a tensor is missing or its shape differs from the configuration's.
        """
        from qat.export.onnx_graph import save, skeleton, store, trace

        model = skeleton(source.hf_config)
        weights = _weights(source, model)
        graph = trace(model, list(weights))
        store(graph, weights)
        facts = {key: notes[key] for key in ("converter", "source_sha256")}
        if notes["lossy"]:
            facts["lossy"] = json.dumps(notes["lossy"])
        save(graph, directory / MODEL, facts)
        for path in source.side_files():
            shutil.copy(path, directory)
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        text = json.dumps(config, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What onnx and onnxruntime find."""
        from qat.export.onnx_read import read_model

        return read_model(directory / MODEL, set(source.kept))


def _model_losses(source: Source) -> Iterator[Loss]:
    """Models whose graph would not compute what they compute."""
    nearest = "format=compressed-tensors"
    if source.model_type not in FAMILIES:
        reason = f"the graphs that were checked are of {', '.join(FAMILIES)}"
        yield Loss(f"model_type={source.model_type}", reason, nearest, writable=False)
        return
    for kind in sorted(_rope_types(source.hf_config.rope_parameters) - set(ROPE_TYPES)):
        reason = "its frequencies change with the length of the text, and a graph's cannot"
        yield Loss(f"rope_type={kind}", reason, nearest, writable=False)
    from qat.export.onnx_graph import skeleton

    model = skeleton(source.hf_config)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    seen: dict[int, str] = {}
    for name in source.kept:
        if name not in tensors:
            yield Loss(name, "the model has no such tensor", nearest, writable=False)
        elif (first := seen.setdefault(id(tensors[name]), name)) != name:
            reason = f"it is tied to {first}, and a graph holds tied tensors once"
            yield Loss(name, reason, nearest, writable=False)
    for name in source.matrices:
        if type(_module(model, name)) is not nn.Linear:
            yield Loss(name, "it is no linear layer of the model", nearest, writable=False)


def _layer_losses(source: Source) -> Iterator[Loss]:
    """Quantized layers that MatMulNBits does not compute."""
    nearest = "format=compressed-tensors"
    for name, info in source.matrices.items():
        # any K will do here: only groups can be wrong
        if block_size(info.spec, BLOCKS[0]) is None:
            reason = f"a block is a power of two from {BLOCKS[-1]} to {BLOCKS[0]}, its groups are "
            yield Loss(name, f"{reason}{info.spec.group_size}", nearest, writable=False)
        if info.inputs is not None:
            reason = "MatMulNBits takes its inputs as they are; only the weights are carried"
            yield Loss(f"quantized inputs of {name}", reason, nearest)


def _rope_types(parameters: dict[str, Any] | None) -> set[str]:
    """Kinds of rotary embedding, of one set of parameters or of one for each kind of layer."""
    if parameters is None:
        return {"default"}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each.get("rope_type", "default")) for each in nested or [parameters]}


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _weights(source: Source, model: "PreTrainedModel") -> "dict[str, Stored]":
    """Every weight of the graph by its name in the skeleton, whose layers are swapped here."""
    from qat.export.onnx_graph import QuantizedLinear, Stored

    weights: dict[str, Stored] = {}
    # the parts of one matrix are written one after the other: unpack it once
    filled = lru_cache(maxsize=1)(functools.partial(_filled, source))
    for name, info in source.matrices.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = QuantizedLinear(
            linear, cells_of(info.spec, linear.out_features, linear.in_features)
        )
        model.set_submodule(name, layer)
        for part, buffer in layer.named_buffers():
            read = functools.partial(_part, filled, name, layer.cells, part)
            weights[f"{name}.{part}"] = Stored(buffer.dtype, tuple(buffer.shape), read)
    return weights | _kept(source, model)


def _filled(source: Source, name: str, cells: Cells) -> dict[str, Tensor]:
    matrix = source.matrix(name)
    if tuple(matrix.codes.shape) != (cells.n, cells.k):
        raise UserError(
            f"{name}: {tuple(matrix.codes.shape)} in {source.path}, but its config.json says "
            f"{(cells.n, cells.k)}"
        )
    parts = zip(("codes", "scales", "zeros"), fill(matrix, cells), strict=True)
    return {part: tensor for part, tensor in parts if tensor is not None}


def _part(filled: Callable[..., dict[str, Tensor]], name: str, cells: Cells, part: str) -> Tensor:
    return filled(name, cells)[part]


def _kept(source: Source, model: "PreTrainedModel") -> "dict[str, Stored]":
    """The tensors that are stored as values."""
    from qat.export.onnx_graph import Stored

    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    weights = {}
    for name in source.kept:
        tensor = source.tensor(name)
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{name}: {tuple(tensor.shape)} in {source.path}, but its config.json says "
                f"{tuple(tensors[name].shape)}"
            )
        read = functools.partial(source.tensor, name)
        weights[name] = Stored(tensor.dtype, tuple(tensor.shape), read)
    # tied parameters are one object under several names, of which one is stored
    stored = {id(tensors[name]) for name in source.kept}
    missing = [name for name, p in model.named_parameters() if id(p) not in stored]
    if missing:
        raise UserError(
            f"{missing[0]}: missing ({len(missing)} such tensors); the artifact is not complete"
        )
    return weights
