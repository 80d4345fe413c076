"""Transformers' own ``from_pretrained`` with packed layers on `qat_kernels`.

>>> import qat                                                            # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(                         # doctest: +SKIP
...     path, config=qat.packed_config(path), dtype=torch.bfloat16
... )

An artifact names a public method (``compressed-tensors``) in its ``config.json``, so that everyone
can read it. `packed_config` returns that configuration under the method name ``qat``, which is
registered with transformers on first use. It is opt-in on purpose: to take the place of
transformers' own reader as soon as ``qat`` is imported would remove the independent reader against
which an artifact's fidelity is checked, and would change how the checkpoints of others are loaded.

The layers are those of `qat.runtime.load_packed`, by the same plan, so the logits are equal bit for
bit. Transformers loads what is kept; packed layers are built from memory-mapped files, and a
quantized layer never exists in 16 bit.
"""

import copy
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qat.errors import UserError
from qat.mapped_tensors import MappedTensors, limit_primitive_caches, release_freed_memory
from qat.packed_plan import NotCovered, PlannedLayer, fix_rows, parse, plan_layers, swap_layers

METHOD = "qat"
"""Name under which the reader is registered with transformers."""


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc,unused-ignore]
    """The ``quantization_config`` of an artifact, to be read by `PackedQuantizer`."""

    def __init__(self, stored: dict[str, Any], quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.stored = stored

    def to_dict(self) -> dict[str, Any]:
        """The section as it is stored, so that a saved config names the public method."""
        return copy.deepcopy(self.stored)


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc,unused-ignore]
    """Puts packed layers in the place of the quantized ``nn.Linear`` while transformers loads."""

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.artifact: Path | None = None
        self._plan: list[PlannedLayer] = []
        self._dtype = torch.bfloat16

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise UserError for a device map that is not one device."""
        device_map = kwargs.get("device_map")
        if device_map is not None and (isinstance(device_map, str) or list(device_map) != [""]):
            raise UserError(
                f"device_map={device_map}: packed layers run on one device; give "
                'device_map={"": "cuda:0"}, or none for the CPU'
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype of activations, which is what ``from_pretrained`` was asked for."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Take the quantized layers out of the skeleton, so that transformers loads the rest."""
        if not checkpoint_files:
            raise UserError("packed layers are loaded from the files of an artifact; give its path")
        limit_primitive_caches()
        self.artifact = Path(checkpoint_files[0]).parent
        files = MappedTensors(self.artifact)
        try:
            section = parse(self.quantization_config.stored)
            self._plan = plan_layers(model, section, files, self.artifact)
        except NotCovered as reason:
            raise UserError(
                f"{self.artifact}: the packed kernels do not cover it ({reason}); load it without "
                "config=qat.packed_config(...), with transformers' own reader"
            ) from reason
        for layer in self._plan:
            model.set_submodule(layer.name, nn.Identity())
        prefixes = "|".join(layer.name.replace(".", r"\.") for layer in self._plan)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"^({prefixes})\.",
        }
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Build the packed layers on the device of what was loaded."""
        assert self.artifact is not None, "transformers loads between the two"
        device = next(model.parameters()).device
        swap_layers(model, self._plan, MappedTensors(self.artifact), self._dtype, device)
        fix_rows(model, self._dtype, device)
        self._plan = []
        release_freed_memory()
        return model.eval().requires_grad_(False)

    def is_serializable(self) -> NoReturn:
        """Transformers asks before it saves: packed layers have another layout than the file.

        Raises:
            UserError: always; it names the directory to copy.
        """
        raise UserError(
            f"save_pretrained: this model is served from packed weights; copy {self.artifact}, "
            "whose files hold exactly what it computes with"
        )

    @property
    def is_trainable(self) -> bool:
        """No: packed layers have no backward."""
        return False


def refuse_saving(model: PreTrainedModel, artifact: Path) -> None:
    """Let ``model.save_pretrained`` raise a UserError that names the artifact.

    Without this, transformers would write a checkpoint that lacks every packed layer.
    """
    quantizer = PackedQuantizer(PackedConfig({}))
    quantizer.artifact = artifact
    model.hf_quantizer = quantizer


def packed_config(artifact: Path | str) -> Any:
    """The configuration of an artifact with which ``from_pretrained`` loads packed layers.

    Args:
        artifact: the ``artifact/`` directory of a run.

    Raises:
        UserError: no such directory, or not an artifact.
    """
    # imported here: it guards its models with what is above
    from qat.runtime import read_artifact_config

    config, stored = read_artifact_config(Path(artifact))
    config.quantization_config = {"quant_method": METHOD, "stored": stored}
    return config
