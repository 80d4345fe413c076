"""The model before training, one tensor at a time.

Adapter runs never hold the 16-bit model in memory: the frozen base is quantized tensor by tensor
from here, and the merge at the end reads the same tensors again. Safetensors are memory-mapped, so
what is read costs page cache and no memory of its own. A checkpoint that is already 4-bit
(bitsandbytes) gives its dequantized weights and, through `packed`, its codes as they are.
"""

import copy
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qat import bitsandbytes_format
from qat.errors import UserError
from qat.linear_4bit import Linear4bit
from qat.models import BITSANDBYTES, load_config, load_model
from qat.tensor_files import TensorFiles
from qat_kernels import check_finite


def resolve(model: str) -> Path:
    """The local directory of a model; Hub ids are downloaded (safetensors and JSON files only).

    Raises:
        UserError: the download fails.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json", "*.model"]))
    except Exception as error:
        raise UserError(
            f"model={model}: cannot be downloaded ({type(error).__name__}: {error}). Give a local "
            "directory with config.json and safetensors"
        ) from error


class OriginalWeights:
    """Parameters and buffers of a model directory, under the names that the model gives them.

    Args:
        model: Hugging Face id or local directory.
        rows: entries that the vocabulary must have; where the checkpoint has fewer, the new rows
            of embedding and head are the mean of the old ones.

    Raises:
        UserError: not a causal LM; when the first weight is read also: missing or unreadable
            files, weights that are not in them.
    """

    def __init__(self, model: str, rows: int = 0) -> None:
        self.model = model
        self.config = load_config(model, allow=BITSANDBYTES)
        section = getattr(self.config, "quantization_config", None)
        self.quantization: dict[str, Any] | None = section
        """The section of config.json, for a checkpoint that is already 4-bit."""
        if section is not None:
            try:
                bitsandbytes_format.spec_of(section)
            except UserError as error:
                raise UserError(f"model={model}: {error}") from None
            del self.config.quantization_config
        self.dtype: torch.dtype = self.config.dtype or torch.float32
        """Dtype of the checkpoint."""
        skeleton = self._empty()
        # both ways: the file may store a tied weight under either name
        ties = skeleton.all_tied_weights_keys
        self._ties = {**ties, **{source: target for target, source in ties.items()}}
        vocabulary = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
        self._vocabulary = {
            f"{name}.weight"
            for name, module in skeleton.named_modules()
            if any(module is owner for owner in vocabulary)
        }
        self.added = max(0, rows - skeleton.get_input_embeddings().weight.shape[0])
        """Rows that the vocabulary has beyond the checkpoint's."""
        self._shapes = {name: value.shape for name, value in skeleton.state_dict().items()}
        self._whole: dict[str, Tensor] = {}

    # opened when the first weight is wanted: a dry run needs none, and must not download any

    @cached_property
    def directory(self) -> Path:
        """Where the files are."""
        return resolve(self.model)

    @cached_property
    def _files(self) -> TensorFiles:
        try:
            return TensorFiles(self.directory, ExitStack())
        except UserError as error:
            raise UserError(f"model={self.model}: the weights cannot be loaded: {error}") from error

    @cached_property
    def _names(self) -> dict[str, str]:
        """Model's name → file's name."""
        return self._map(self._empty())

    def _empty(self) -> PreTrainedModel:
        try:
            with init_empty_weights(include_buffers=False):
                # a copy, since resizing the vocabulary changes it
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    copy.deepcopy(self.config), dtype=torch.float32
                )
        except ValueError as error:
            raise UserError(f"model={self.model}: not a causal language model ({error})") from error
        model.tie_weights()
        return model

    def _map(self, skeleton: PreTrainedModel) -> dict[str, str]:
        transforms = get_model_conversion_mapping(skeleton)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        expected = dict(skeleton.state_dict())
        names = {}
        converted = False
        for stored in sorted(self._files.names()):
            name, converter = rename_source_key(
                stored, renamings, converters, skeleton.base_model_prefix, expected
            )
            converted |= converter is not None
            names[name] = stored
        if converted:
            # experts are stored one by one and fused on loading, which only transformers can do
            self._whole = dict(load_model(self.model, dtype=self.dtype).state_dict())
            names = {name: name for name in self._whole}
        wanted = [name for name, _ in skeleton.named_parameters()]
        missing = [n for n in wanted if n not in names and self._ties.get(n) not in names]
        if missing:
            raise UserError(
                f"model={self.model}: {len(missing)} weights are missing, the first is "
                f"{missing[0]}; they would be random. Check that the directory is complete"
            )
        return names

    def skeleton(self) -> PreTrainedModel:
        """The model without weights: parameters on the meta device, buffers computed."""
        model = self._empty()
        if self.added:
            embedding: Any = model.get_input_embeddings()
            model.resize_token_embeddings(
                embedding.weight.shape[0] + self.added, mean_resizing=False
            )
            model.tie_weights()
        return model

    def _source(self, name: str) -> str | None:
        """Name in the files; a tied parameter may be stored under its partner's name."""
        return self._names.get(name) or self._names.get(self._ties.get(name, ""))

    def __contains__(self, name: str) -> bool:
        return self._source(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        """One parameter or buffer as it is stored, dequantized if it is 4-bit.

        Raises:
            UserError: it holds NaN or infinity, or has another shape than config.json says.
        """
        value = self.read(name)
        shape = list(self._shapes[name])
        if name in self._vocabulary:
            shape[0] += self.added
        if list(value.shape) != shape:
            raise UserError(
                f"model={self.model}: {name} has the shape {list(value.shape)}, by config.json it "
                f"has {shape}; configuration and weights do not belong together"
            )
        if value.is_floating_point():
            try:
                check_finite(value, name)
            except ValueError as error:
                raise UserError(f"model={self.model}: {error}; it cannot be trained") from error
        return value

    def read(self, name: str) -> Tensor:
        """The same, not checked again: for what is read in each pass."""
        source = self._source(name)
        assert source is not None, name
        layer = self.packed(name)
        if layer is not None:
            value = layer.weight
        else:
            value = self._whole[source] if self._whole else self._files.get(source)
        if self.added and name in self._vocabulary:
            mean = value.float().mean(0, keepdim=True).to(value.dtype)
            value = torch.cat([value, mean.expand(self.added, -1)])
        return value

    def packed(self, name: str) -> Linear4bit | None:
        """The layer of a weight that the checkpoint holds in 4 bits, else None."""
        source = self._source(name)
        if source is None or f"{source}.absmax" not in self._files:
            return None
        prefix = source.removesuffix(".weight")
        layer = bitsandbytes_format.read(prefix, self._files.get, self._files.names())
        # bitsandbytes' inference in fp32 does not go through the dtype in the checkpoint either
        layer.weight_dtype = torch.float32
        return layer

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The whole model in ``dtype``, in eval mode."""
        model = self.skeleton()
        self.fill(model, dtype)
        return model.requires_grad_(True).eval()

    def fill(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Give what is still on the meta device its value in ``dtype``; and the stored buffers."""
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in model.modules():
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    owners.setdefault(id(parameter), []).append((owner, leaf))
        for name, parameter in list(model.named_parameters()):
            if parameter.is_meta:
                value = self[name].to(dtype, copy=True)
                filled = nn.Parameter(value, requires_grad=False)
                # everywhere at once, so that tied weights stay one
                for owner, leaf in owners[id(parameter)]:
                    owner._parameters[leaf] = filled
        if (self.directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.directory)
        persistent = model.state_dict().keys()
        for name, buffer in list(model.named_buffers()):
            if name in persistent and name in self:
                buffer.copy_(self[name])


class Master:
    """Gives the weight that a layer's adapter is merged onto: the original, read from disk.

    A checkpoint that is already 4-bit has no original: its base is dequantized instead.

    Args:
        original: the model.
        name: of the weight.
        base: the layer that holds it.
    """

    def __init__(self, original: OriginalWeights, name: str, base: nn.Linear) -> None:
        self.original = original
        self.name = name
        packed = original.quantization is not None
        self.packed = base if isinstance(base, Linear4bit) and packed else None

    def __call__(self) -> Tensor:
        """The weight [N, K], in the dtype in which it is stored."""
        return self.original.read(self.name) if self.packed is None else self.packed.weight
