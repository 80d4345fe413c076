"""What an adapter run writes beside its low-bit artifact.

===================  ============================================================================
``adapter/``         the adapter in PEFT's format, for the original model
``nf4/``             the 4-bit base in bitsandbytes' serialization, with the adapter that was
                     trained on it in ``nf4/adapter/``: the model exactly as it was trained
``merged/``          the original weights with the adapter added, in 16 bit
===================  ============================================================================

``adapter/`` and ``nf4/adapter/`` differ only where the initialisation took a part of the base
(PiSSA, OLoRA, LoftQ): for the original model the adapter is then B A - B0 A0, of twice the rank.
An adapter is not merged into a 4-bit base: rounding to the base's own codes swallows most of a
small update (of the gain of one whose norm is 2.8 % of the weights', 12 % is left).
"""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from qat import bitsandbytes_format
from qat.adapter_card import adapter_card, merged_card, nf4_card
from qat.adapter_config import AdapterConfig
from qat.adapter_state import base_bits, codes_sha256, trained_modules, trained_rows
from qat.artifact import staged_directory, write_manifest
from qat.convert import merged_tensors, write_config, write_shards
from qat.linear_4bit import Linear4bit
from qat.lora import LoraLinear, MergedLinear
from qat.original import OriginalWeights
from qat.prepare import Coverage
from qat.provenance import public_name

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model."""


@dataclass(frozen=True)
class AdapterFiles:
    """Writes the outputs of one trained adapter model."""

    model: PreTrainedModel
    """The trained model."""
    coverage: Coverage
    """Coverage of its merged form."""
    original: OriginalWeights
    """The model before training."""
    adapter: AdapterConfig
    """Base and adapters."""
    keep: torch.dtype
    """Dtype of what is not quantized."""
    tokenizer: PreTrainedTokenizerFast
    """Saved with each model."""
    base_sha256: str
    """Identity of the frozen base."""
    provenance: dict[str, Any]
    """For the manifests: recipe, data, configuration."""

    def write(self, names: Sequence[str], run: Path) -> None:
        """Write the outputs of these names into directories of the same names below ``run``."""
        for name in names:
            with staged_directory(run / name, replace=True) as staging:
                if name == "adapter":
                    self.write_adapter(staging, self.original.model, on_original=True)
                elif name == "nf4":
                    self.write_nf4(staging)
                else:
                    self.write_merged(staging)

    @property
    def bits(self) -> float:
        """Bits per weight of the base's linear layers."""
        return base_bits(self.model, self.keep)

    def facts(self) -> dict[str, Any]:
        """What the report says of the adapters."""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return {
            **asdict(self.adapter),
            "trained_parameters": trained,
            "base_bits_per_weight": self.bits,
            **self.identity(),
        }

    def write_adapter(self, directory: Path, base: str, on_original: bool) -> None:
        """Write an adapter in PEFT's format.

        Args:
            directory: an existing, empty directory.
            base: goes into ``base_model_name_or_path``.
            on_original: for the original model, else for the base that it was trained on.
        """
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, LoraLinear)}
        names = _short(self.model, list(layers))
        config = self.adapter.peft(names)
        config.target_modules = names  # PEFT made a set of it, whose order varies
        config.base_model_name_or_path = base
        config.inference_mode = True
        config.init_lora_weights = True  # else readers would compute it again from their base
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            # training is over and the model in fp32, but the values are of the adapter's dtype
            dtype = getattr(torch, self.adapter.dtype)
            a, b, alpha = _factors(layer, on_original, dtype)
            config.r, config.lora_alpha = a.shape[0], alpha
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
            if layer.magnitude is not None:
                vector = layer.magnitude.to(dtype)
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = vector
        modules = trained_modules(self.model)
        config.modules_to_save = sorted({n.rpartition(".")[0] for n in modules}) or None
        ties = self.model.all_tied_weights_keys
        config.ensure_weight_tying = not modules.keys().isdisjoint({*ties, *ties.values()})
        for name, value in modules.items():
            tensors[PREFIX + name] = value.to(self.keep)
        rows = trained_rows(self.model)
        if rows:
            config.trainable_token_indices = {n: r.rows.tolist() for n, r in rows.items()}
            for name, added in rows.items():
                key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
                tensors[key] = added.values.to(self.keep)
        identity = {"base_model": public_name(self.original.model), **self.identity()}
        if not on_original:
            identity["codes_sha256"] = codes_sha256(self.model)
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        path = directory / "adapter_model.safetensors"
        # one entry: safetensors writes several in varying order, and runs should repeat to the bit
        save_file(stored, path, {"format": "pt"})
        path.chmod((directory.stat().st_mode & 0o444) | 0o200)
        config.save_pretrained(str(directory))
        text = json.dumps(identity, indent=2) + "\n"
        (directory / "base.json").write_text(text, encoding="utf-8")
        self.tokenizer.save_pretrained(directory)
        vocabulary = self.model.config.get_text_config().vocab_size if self.original.added else None
        if on_original:
            self._describe(directory, adapter_card(self.original.model, identity, vocabulary))

    def identity(self) -> dict[str, Any]:
        """What the adapter was trained on: hash of the base and its quantizer."""
        spec = self.adapter.spec()
        quantizer: dict[str, Any] = {"dtype": str(self.keep).removeprefix("torch.")}
        if spec is not None:
            quantizer |= {
                "quant_type": spec.quant_type,
                "block_size": spec.block_size,
                "double_quant": spec.double_quant,
            }
        versions = {p: metadata.version(p) for p in ("qat-lightning", "torch", "peft")}
        return {"base_sha256": self.base_sha256, "quantizer": quantizer, "versions": versions}

    def caveat(self) -> str | None:
        """Why plain bitsandbytes misreads ``nf4/`` on some machines; None if it does not."""
        for name, module in self.model.named_modules():
            if isinstance(module, Linear4bit):
                why = bitsandbytes_format.caveat(module)
                if why is not None:
                    return f"{name.removesuffix('.base_layer')}: {why}"
        return None

    def write_nf4(self, directory: Path) -> None:
        """Write the frozen base as bitsandbytes stores it, and the adapter on it."""
        spec = self.adapter.spec()
        assert spec is not None
        write_shards(self._base_tensors(), directory, "write nf4")
        plain = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and not isinstance(module, Linear4bit)
            and not name.endswith((".base_layer", ".default"))
        ]
        head = self.model.get_output_embeddings()
        plain += [n for n, m in self.model.named_modules() if m is head and n not in plain]
        values = {
            "dtype": str(self.keep).removeprefix("torch."),
            "quantization_config": bitsandbytes_format.quantization_config(spec, self.keep, plain),
        }
        write_config(self.model, values, directory)
        self.tokenizer.save_pretrained(directory)
        (directory / "adapter").mkdir()
        self.write_adapter(directory / "adapter", "..", on_original=False)
        self._describe(directory, nf4_card(self.original.model, self.identity(), self.caveat()))

    def _base_tensors(self) -> Iterator[dict[str, Tensor]]:
        skeleton = self.original.skeleton()
        layers = dict(self.model.named_modules())
        for name, _ in skeleton.named_parameters():
            layer = layers.get(name.rpartition(".")[0])
            base = layer.base_layer if isinstance(layer, MergedLinear) else None
            if name.endswith(".weight") and isinstance(base, Linear4bit):
                tensors = bitsandbytes_format.tensors(name.removesuffix(".weight"), base)
                yield {key: value.cpu() for key, value in tensors.items()}
            else:
                value = self.original[name].to(self.keep).contiguous()
                yield dict(revert_weight_conversion(skeleton, {name: value}))
        for name in skeleton.state_dict().keys() - dict(skeleton.named_parameters()).keys():
            if name in self.original and name not in skeleton.all_tied_weights_keys:
                yield {name: self.original[name].clone()}

    def write_merged(self, directory: Path) -> None:
        """Write the merged model in 16 bit; it loads in plain transformers."""
        write_shards(self._merged_tensors(), directory, "write merged")
        write_config(self.model, {"dtype": str(self.keep).removeprefix("torch.")}, directory)
        self.tokenizer.save_pretrained(directory)
        self._describe(directory, merged_card(self.original.model, self.identity()))

    def _describe(self, directory: Path, card: str) -> None:
        (directory / "README.md").write_text(card, encoding="utf-8")
        write_manifest(directory, self.provenance | self.identity())

    def _merged_tensors(self) -> Iterator[dict[str, Tensor]]:
        for name, value in merged_tensors(self.model, self.coverage, self.keep):
            # the experts of a layer are one tensor, and several in a checkpoint
            yield dict(revert_weight_conversion(self.model, {name: value.cpu()}))


def _factors(
    layer: LoraLinear, on_original: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """(A, B, alpha) of the adapter in ``dtype``, or in fp32 of its difference to the initial one.

    The initial factors are fp32 whatever the adapter's dtype: rounded, they would not be what the
    initialisation took from the base.
    """
    a, b = layer.factors
    scale = layer.scaling["default"]
    if not on_original or layer.initial_a is None or layer.initial_b is None:
        return a.to(dtype), b.to(dtype), float(layer.lora_alpha["default"])
    a = torch.cat([a.float(), layer.initial_a.float()])
    b = torch.cat([b.float(), -layer.initial_b.float()], dim=1)
    rank = a.shape[0]
    alpha = scale * (math.sqrt(rank) if layer.use_rslora["default"] else rank)
    return a, b, float(alpha)


def _short(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Names of layers for adapter_config.json: last parts, if these select no other layer."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | MergedLinear)
        and name not in names
        and name.rpartition(".")[2] in leaves
    ]
    return names if others else leaves


def reload_nf4(directory: Path) -> PreTrainedModel:
    """``nf4/`` and its adapter in plain transformers, bitsandbytes and PEFT, in fp32.

    bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 and computes in bf16 then; this is
    switched off, because the comparison is about fp32.
    """
    import bitsandbytes

    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, local_files_only=True
    )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()  # it comes in the stored dtype all the same
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 by a name that is being retired
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        peft_model = PeftModel.from_pretrained(model, str(directory / "adapter"))
    reloaded: PreTrainedModel = peft_model.base_model.model
    return reloaded.eval()
