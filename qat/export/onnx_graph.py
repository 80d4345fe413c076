"""The graph of a model for ONNX Runtime, traced without its weights.

transformers' own modeling code is traced by ``torch.export`` and translated by
``torch.onnx.export``. Weights are inputs of the traced function (placeholders without memory), so
that no pass of the optimizer folds or merges them; afterwards these inputs become initializers,
which are read from the artifact while the file is written, one at a time.

The cache is one key and one value tensor a layer over the whole context. Layers with a sliding
window attend through the mask, which is right at any length.
"""

import copy
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from qat.export.onnx_cells import Cells

OPSET = 18
"""Version of the operators that torch's translations are written in."""
DYNAMIC = torch.export.Dim.DYNAMIC
BATCH, SEQUENCE, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {SEQUENCE}"
"""Names of the dynamic dimensions, as optimum and transformers.js call them."""


@dataclass(frozen=True)
class Stored:
    """A weight of the graph: its shape now, its values when they are written."""

    dtype: torch.dtype
    """Of the values; uint8, fp32, or a 16-bit dtype that the graph casts to fp32."""
    shape: tuple[int, ...]
    """Of the values."""
    read: Callable[[], Tensor]
    """Reads them."""


def skeleton(config: Any) -> PreTrainedModel:
    """The fp32 model with its parameters on the meta device, tied where the configuration ties.

    Attention is the plain one (products and softmax), the only one that every family has.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        )
    model.tie_weights()
    return model.eval()


class QuantizedLinear(nn.Module):
    """y = x W^T + b as MatMulNBits: x fp32 [..., K] to [..., N]; for tracing only."""

    def __init__(self, linear: nn.Linear, cells: Cells) -> None:
        super().__init__()
        self.cells = cells
        shapes = {"codes": cells.codes_shape, "scales": cells.scales_shape}
        if cells.asymmetric:
            shapes["zeros"] = cells.zeros_shape
        for name, shape in shapes.items():
            dtype = torch.float32 if name == "scales" else torch.uint8
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The node; accuracy_level=1 is fp32."""
        cells = self.cells
        attributes: dict[str, Any] = {"K": cells.k, "N": cells.n, "bits": cells.bits}
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, *self.buffers()),
            attributes | {"block_size": cells.block, "accuracy_level": 1},
            dtype=x.dtype,
            shape=(*x.shape[:-1], cells.n),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class _Step(nn.Module):
    """One step of generation as a function of tensors: the weights are arguments too."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        # in a tuple, so that its parameters are none of this module's
        self.model = (model,)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]],
        weights: dict[str, Tensor],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        # without a configuration all its layers keep the whole context
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
        }
        found = torch.func.functional_call(self.model[0], weights, (), inputs)
        return found.logits, [(layer.keys, layer.values) for layer in cache.layers]


def cache_names(kind: str, layers: int) -> list[str]:
    """Names of the cache's tensors: ``past_key_values.0.key`` or ``present.0.key``, and so on."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def trace(model: PreTrainedModel, names: list[str]) -> Any:
    """Trace and translate a skeleton.

    Args:
        model: from `skeleton`, its quantized layers already `QuantizedLinear`.
        names: of parameters and buffers that become inputs of the graph, in this order.

    Returns:
        ``onnx_ir.Model`` with the inputs input_ids [B, S], attention_mask [B, P + S], position_ids
        [B, S], past_key_values.N.key and .value [B, H, P, D], then ``names``; and the outputs
        logits [B, S, V] and present.N.key and .value [B, H, P + S, D].
    """
    layers, cache_shape = _cache_shape(model.config.get_text_config())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    weights = {name: _placeholder(tensors[name]) for name in names}
    # sizes that no dimension of a model has, so that none is taken for another
    batch, length, past = 2, 3, 5
    heads, size = cache_shape
    # each a tensor of its own: one that stands for two inputs is traced as one
    tokens = [torch.ones(batch, columns, dtype=torch.int64) for columns in (length, past + length)]
    tokens.append(tokens[0].clone())
    cache = [
        (torch.zeros(batch, heads, past, size), torch.zeros(batch, heads, past, size))
        for _ in range(layers)
    ]
    free, free_cache = {0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC}
    shapes = (free, free, free, [(free_cache,) * 2] * layers, dict.fromkeys(weights))
    steps = tqdm(total=2, desc="graph", delay=2, leave=False, disable=None)
    with steps, torch.no_grad(), _quiet():
        program = torch.export.export(
            _Step(model), (*tokens, cache, weights), dynamic_shapes=shapes, strict=False
        )
        steps.update()
        translated = torch.onnx.export(
            program,
            input_names=[
                *("input_ids", "attention_mask", "position_ids"),
                *cache_names("past_key_values", layers),
                *names,
            ],
            output_names=["logits", *cache_names("present", layers)],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        steps.update()
    assert translated is not None
    _name_dimensions(translated.model, layers)
    return translated.model


def _cache_shape(config: Any) -> tuple[int, tuple[int, int]]:
    """Layers, heads of the cache and their size."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, (getattr(config, "num_key_value_heads", None) or heads, size)


def _placeholder(tensor: Tensor) -> Tensor:
    """A CPU tensor of that shape and dtype that takes no memory."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about packages and names of its own."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_dimensions(model: Any, layers: int) -> None:
    """Give the traced symbols (s26, s70 ...) their meaning, everywhere in the graph."""
    inputs = list(model.graph.inputs)
    found: dict[str, str] = {}
    tokens, cache = (BATCH, SEQUENCE), (BATCH, "", PAST, "")
    meanings = [tokens, (BATCH, TOTAL), tokens, *[cache] * (2 * layers)]
    for value, meaning in zip(inputs, meanings, strict=False):
        found |= {str(d): m for d, m in zip(value.shape, meaning, strict=True) if m}
    symbol = re.compile(r"\bs\d+\b")
    values = [v for node in model.graph for v in node.outputs]
    for value in [*inputs, *values]:
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and size.value is not None:
                name = symbol.sub(lambda m: found.get(m[0], m[0]), size.value)
                value.shape[axis] = name


def store(model: Any, weights: Mapping[str, Stored]) -> None:
    """Turn the inputs of the graph that are named in ``weights`` into initializers."""
    import onnx_ir

    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    for name, stored in weights.items():
        value = inputs[name]
        graph.inputs.remove(value)
        tensor = onnx_ir.LazyTensor(
            functools.partial(_as_onnx, stored.read),
            dtype=onnx_ir.tensor_adapters.from_torch_dtype(stored.dtype),
            shape=onnx_ir.Shape(stored.shape),
            name=name,
        )
        used = value.dtype
        value.dtype = tensor.dtype
        if used != tensor.dtype:
            _cast_uses(graph, value, used)
        value.const_value = tensor
        graph.register_initializer(value)


def _as_onnx(read: Callable[[], Tensor]) -> Any:
    import onnx_ir

    return onnx_ir.tensor(read().contiguous())


def _cast_uses(graph: Any, value: Any, target: Any) -> None:
    """Cast a weight that is stored in 16 bit where it is used: after a look-up, else as a whole."""
    import onnx_ir

    def cast(source: Any) -> Any:
        node = onnx_ir.node("Cast", [source], {"to": target.value})
        (output,) = node.outputs
        output.name, output.shape, output.dtype = f"{source.name}.cast", source.shape, target
        return node

    uses = list(value.uses())
    looked_up = [use for use in uses if use.node.op_type == "Gather" and use.idx == 0]
    for use in looked_up:
        rows = use.node.outputs[0]
        node = cast(rows)
        graph.insert_after(use.node, node)
        rows.replace_all_uses_with(node.outputs[0])
        node.replace_input_with(0, rows)
        rows.dtype = value.dtype
    if len(looked_up) < len(uses):
        node = cast(value)
        graph.insert_before(graph[0], node)
        for use in uses:
            if use not in looked_up:
                use.node.replace_input_with(use.idx, node.outputs[0])


def save(model: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Write ``path`` and beside it ``path``.data, one weight in memory at a time.

    Args:
        model: after `store`.
        path: ends in ``.onnx``.
        facts: go into the file's metadata.
    """
    import onnx_ir

    for node in model.graph.all_nodes():
        # where in the source code each node came from, with the paths of this machine
        node.metadata_props.clear()
        node.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(facts)
    model.graph.name = "model"
    model.producer_name, model.producer_version = facts["converter"].split(" ", 1)
    with tqdm(desc="weights", delay=2, leave=False, disable=None) as bar:

        def progress(_: Any, position: Any) -> None:
            bar.total = position.total
            bar.update()

        onnx_ir.save(
            model,
            path,
            external_data=f"{path.name}.data",
            callback=progress,
            # pages, so that fp32 weights that a runtime maps into memory are aligned
            alignment=4096,
            align_threshold=0,
        )
