"""GGUF for llama.cpp and what builds on it: the trained (q, s) in its blocks, tokenizer included.

Quantized weights become Q4_0, Q4_1 or Q8_0 blocks (`qat.export.gguf_blocks` says when each is
exact), kept matrices F16 where that is exact, else BF16 or F32; vectors are F32, as llama.cpp wants
them. Asymmetric 4-bit weights whose minimum is no fp16 number are stored as Q8_0: levels q - z lie
in -15 ... 15, int8 holds them, and d (q - z) is the same weight at 8.5 bits each.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor
from tqdm import tqdm

from qat import __version__
from qat.artifact import MANIFEST
from qat.errors import UserError
from qat.export.format import Loss, ReadMatrix, ReadTensor, require
from qat.export.gguf_blocks import (
    SMALLEST,
    Choice,
    TypeName,
    choose,
    pack,
    pack_values,
    permutation,
    unpack,
    value_type,
)
from qat.export.gguf_families import (
    NEAREST,
    add_metadata,
    config_losses,
    family_of,
    heads_of,
    names,
    rope_factors,
)
from qat.export.gguf_tokenizer import Vocabulary, add_vocabulary, chat_template, read_vocabulary
from qat.export.hf_directory import is_exact, model_dtype
from qat.export.run import ExportOptions
from qat.export.source import Source
from qat.tensor_files import read_json

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""``general.file_type`` by the type of most quantized values (llama.h)."""

ROPE_FACTORS = "rope_freqs.weight"

USE = """```bash
llama-cli -m MODEL.gguf -p "..."          # llama.cpp
llama-server -m MODEL.gguf                # OpenAI-compatible
```

or `AutoModelForCausalLM.from_pretrained(directory, gguf_file="MODEL.gguf")` in transformers.

The weights are the trained ones. llama.cpp rounds activations to blocks of 32 int8 values on the
way into each quantized layer, so its logits are close to those of transformers, not equal. It
normalizes no text: give it Unicode NFC where the tokenizer asks for that. Do not pass the file
through `llama-quantize`, which rounds the weights again."""


@dataclass(frozen=True)
class Plan:
    """What goes into the file, decided before the first byte is written."""

    names: dict[str, str]
    """Name in the artifact → name in GGUF."""
    choices: dict[str, Choice]
    """Name in the artifact → type."""
    shapes: dict[str, tuple[int, ...]]
    """Name in the artifact → shape of its values."""
    vocabulary: Vocabulary
    """The tokenizer."""

    @property
    def main_type(self) -> TypeName:
        """The type of most quantized matrices, else of the kept ones: it names the file."""
        counts: dict[TypeName, int] = {}
        for choice in self.choices.values():
            counts[choice.type] = counts.get(choice.type, 0) + 1
        blocks = {kind: count for kind, count in counts.items() if kind in SMALLEST}
        sixteen = {kind: count for kind, count in counts.items() if kind != "F32"}
        chosen = blocks or sixteen or counts
        return max(chosen, key=lambda kind: chosen[kind])


class Gguf:
    """Writes one ``.gguf`` file; see `qat.export.format.Format`."""

    suffix = ".gguf"

    def __init__(self, options: ExportOptions) -> None:
        self.options = options
        self.use = USE
        require("gguf", "export")
        from importlib.metadata import version

        self.reader = f"gguf {version('gguf')}"
        self._planned: tuple[Source, Plan] | None = None

    def losses(self, source: Source) -> Sequence[Loss]:
        """What GGUF or llama.cpp cannot carry.

        Raises:
            UserError: the family or the kind of tokenizer is not written.
        """
        family_of(source)
        found = list(config_losses(source))
        plan = self._plan(source)
        found += plan.vocabulary.losses()
        quantized = [name for name, info in source.matrices.items() if info.inputs is not None]
        if quantized:
            found.append(
                Loss(
                    "quantized inputs",
                    f"{len(quantized)} layers such as {quantized[0]} were trained with int8 "
                    "inputs; GGUF carries their weights, and llama.cpp rounds activations in its "
                    "own way (blocks of 32)",
                    NEAREST,
                )
            )
        for name, choice in plan.choices.items():
            if choice.problem is not None:
                module = name.removesuffix(".weight")
                # compressed-tensors keeps scales in the model's dtype
                fits = is_exact(source.scale(module), model_dtype(source))
                nearest = NEAREST if fits else "format=merged dtype=float32"
                found.append(Loss(module, choice.problem, nearest))
        return found

    def write(self, source: Source, directory: Path, notes: dict[str, Any]) -> None:
        """Write ``NAME-TYPE.gguf``, one tensor in memory at a time."""
        import gguf

        plan = self._plan(source)
        base, licence = _card_facts(source)
        name = _model_name(source, base)
        path = directory / f"{name}-{plan.main_type}.gguf"
        self.use = USE.replace("MODEL.gguf", path.name)
        writer = gguf.GGUFWriter(path, family_of(source).arch)
        try:
            _add_general(writer, plan, notes, name, base, licence)
            add_metadata(writer, source)
            add_vocabulary(writer, plan.vocabulary)
            template = chat_template(source)
            if template:
                writer.add_chat_template(template)
            factors = rope_factors(source)
            if factors is not None:
                _announce(writer, ROPE_FACTORS, (factors.numel(),), "F32")
            for own, outside in plan.names.items():
                _announce(writer, outside, plan.shapes[own], plan.choices[own].type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for own in _progress(plan.names, "write"):
                writer.write_tensor_data(_data(source, own, plan.choices[own].type))
        finally:
            writer.close()

    def read(self, source: Source, directory: Path) -> Iterator[ReadMatrix | ReadTensor]:
        """What gguf's reader and dequantizer find, under the artifact's names.

        Raises:
            UserError: the file is truncated or otherwise no GGUF file.
        """
        import gguf

        (path,) = directory.glob("*.gguf")
        try:
            tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        except (ValueError, IndexError, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: not a whole GGUF file ({error}); it may be truncated, export it again"
            ) from error
        for own, outside in _progress(names(source).items(), "read back"):
            if outside in tensors:
                yield _read(source, own, tensors[outside])

    def _plan(self, source: Source) -> Plan:
        """Decide on every tensor; kept for the writing that follows."""
        if self._planned is None or self._planned[0] is not source:
            table = names(source)
            plan = Plan(table, {}, {}, read_vocabulary(source))
            for own in _progress(table, "check"):
                plan.choices[own], plan.shapes[own] = _choose(source, own)
            self._planned = (source, plan)
        return self._planned[1]


def _progress(items: Any, what: str) -> Any:
    """Iterate with a bar, for models that take longer than two seconds."""
    return tqdm(items, desc=f"gguf: {what}", unit="tensor", delay=2, disable=None, leave=False)


def _module(source: Source, own: str) -> str | None:
    """The matrix that a name belongs to, or None for a kept tensor."""
    module = own.removesuffix(".weight")
    return module if own.endswith(".weight") and module in source.matrices else None


def _choose(source: Source, own: str) -> tuple[Choice, tuple[int, ...]]:
    """How a tensor is stored, and its shape."""
    module = _module(source, own)
    if module is not None:
        matrix = source.matrix(module)
        return choose(matrix), tuple(matrix.codes.shape)
    values = source.tensor(own)
    return Choice("F32" if values.ndim == 1 else value_type(values)), tuple(values.shape)


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: TypeName) -> None:
    """Add a tensor's entry; its data follows later, in the same order."""
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    size, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    elements = int(np.prod(shape))
    writer.add_tensor_info(
        name, shape, np.dtype(np.float32), elements // size * block_bytes, raw_dtype=type_
    )


def _data(source: Source, own: str, kind: TypeName) -> np.ndarray[Any, Any]:
    """A tensor as it stands in the file."""
    module = _module(source, own)
    if module is not None:
        data = pack(source.matrix(module), kind)
    else:
        values = source.tensor(own)
        data = pack_values(_norm_plus_one(source, own, values.float()), kind)
    heads = heads_of(own, source)
    return data if heads is None else data[permutation(len(data), heads).numpy()]


def _is_gemma_norm(source: Source, own: str) -> bool:
    return family_of(source).gemma and own.endswith("norm.weight")


def _norm_plus_one(source: Source, own: str, values: Tensor) -> Tensor:
    """1 + w for Gemma's norms: the sum that the model itself computes in fp32."""
    return 1.0 + values if _is_gemma_norm(source, own) else values


def _read(source: Source, own: str, tensor: Any) -> ReadMatrix | ReadTensor:
    from gguf.quants import dequantize

    kind: TypeName = tensor.tensor_type.name
    heads = heads_of(own, source)
    order = None if heads is None else torch.argsort(permutation(len(tensor.data), heads))

    def in_order(rows: Tensor) -> Tensor:
        return rows if order is None else rows[order]

    module = _module(source, own)
    if module is None or kind not in SMALLEST:
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        values = in_order(values)
        if module is not None:
            return ReadMatrix(module, None, None, None, values)
        # held against the sum: it rounds away w's last bits where |w| < 2^-16, in the model as here
        expected = _norm_plus_one(source, own, source.tensor(own).float())
        return ReadTensor(own, values, expected if _is_gemma_norm(source, own) else None)
    found = unpack(tensor.data, kind)
    zero = None if found.zero_point is None else in_order(found.zero_point)
    return ReadMatrix(
        module, in_order(found.codes), in_order(found.scale), zero, in_order(found.values)
    )


# --- general metadata ----------------------------------------------------------------------------


def _add_general(
    writer: Any, plan: Plan, notes: dict[str, Any], name: str, base: str | None, licence: str | None
) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by(f"qat-lightning {__version__}")
    writer.add_file_type(FILE_TYPES[plan.main_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if licence:
        writer.add_license(licence)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        if "/" in base:
            writer.add_base_model_organization(0, base.rpartition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_string("qat.source_sha256", notes["source_sha256"])
    writer.add_bool("qat.exact", not notes["lossy"])
    writer.add_array("qat.lossy", list(notes["lossy"]))


def _card_facts(source: Source) -> tuple[str | None, str | None]:
    """base_model and licence from the artifact's card."""
    path = source.path / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    front = yaml.safe_load(match[1]) if match else None
    if not isinstance(front, dict):
        return None, None
    base, licence = front.get("base_model"), front.get("license")
    base = base[0] if isinstance(base, list) and base else base
    return (str(base) if base else None), (str(licence) if licence else None)


def _model_name(source: Source, base: str | None) -> str:
    """A file name: that of the model that was trained."""
    provenance = read_json(source.path / MANIFEST).get("provenance", {})
    name = str(base or provenance.get("model") or source.model_type).rstrip("/")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip(".-") or "model"
