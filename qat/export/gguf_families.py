"""Families of models in GGUF: names of tensors, metadata, and what llama.cpp cannot compute.

llama.cpp knows an architecture by name and takes the rest from metadata. What it has no key for is
fixed in its code (attention scale, activation, where biases may be), so a configuration that
differs there is refused: such a file would load and answer with another model.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.export.format import Loss
from qat.export.source import Source

NEAREST = "format=compressed-tensors"


@dataclass(frozen=True)
class Family:
    """How llama.cpp treats one model_type of transformers."""

    arch: str
    """``general.architecture``."""
    activation: str = "silu"
    """The only one that its graph has."""
    biases: tuple[str, ...] = ()
    """Linear layers that may have a bias there."""
    gemma: bool = False
    """Norms multiply by 1 + w; GGUF stores 1 + w."""
    permuted: bool = False
    """Rows of q and k are stored in another order, see `gguf_blocks.permutation`."""
    untied: bool = True
    """Whether an output head of its own is read."""
    pattern: int = 0
    """Every ``pattern``-th layer attends to everything, the others to the sliding window."""
    wide: int = 0
    """Number of layers of the one size whose queries are scaled by hidden size over heads."""
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    """Kinds of rotary embedding that its graph has."""


QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LLAMA = Family(
    "llama",
    biases=(*QKV, "o_proj", *MLP),
    permuted=True,
    ropes=("default", "linear", "yarn", "llama3"),
)
GELU = "gelu_pytorch_tanh"

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2", biases=QKV),
    "qwen3": Family("qwen3", biases=QKV),
    "gemma": Family("gemma", GELU, biases=QKV, gemma=True, untied=False, ropes=("default",)),
    "gemma2": Family(
        "gemma2", GELU, biases=QKV, gemma=True, untied=False, pattern=2, wide=46, ropes=("default",)
    ),
    "gemma3_text": Family(
        "gemma3", GELU, biases=QKV, gemma=True, pattern=6, wide=62, ropes=("default", "linear")
    ),
}
"""model_type → family."""


def family_of(source: Source) -> Family:
    """The family of an artifact.

    Raises:
        UserError: it is none that this exporter writes.
    """
    if source.kind != "compressed-tensors":
        raise UserError(
            "format=gguf: an nf4/ directory holds NF4 codes, which GGUF has no type for; give the "
            "artifact/ directory of the run, or take format=bitsandbytes"
        )
    family = FAMILIES.get(source.model_type)
    if family is None:
        raise UserError(
            f"format=gguf: model_type={source.model_type} is not written; this exporter knows "
            f"{', '.join(FAMILIES)}. The nearest format that carries this model: {NEAREST}"
        )
    return family


def text_config(source: Source) -> Any:
    """Transformers' configuration of the language model."""
    return source.hf_config.get_text_config()


def head_dim(config: Any) -> int:
    """Size of an attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)


# --- names ---------------------------------------------------------------------------------------


def names(source: Source) -> dict[str, str]:
    """Name in the artifact (``.weight`` included) → name in GGUF, in the order of the file.

    Raises:
        UserError: a tensor has no name in this architecture.
    """
    import gguf

    family, config = family_of(source), text_config(source)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.arch]
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    found = {}
    for name in [*(f"{name}.weight" for name in source.matrices), *source.kept]:
        stem, _, leaf = name.rpartition(".")
        mapped = table.get_name(stem)
        if mapped is None or leaf not in ("weight", "bias"):
            raise UserError(
                f"format=gguf: {name} has no name in the architecture {family.arch}; the nearest "
                f"format: {NEAREST}"
            )
        found[name] = f"{mapped}.{leaf}"
    return found


def heads_of(name: str, source: Source) -> int | None:
    """Heads whose rows are reordered in this tensor, or None where rows stay as they are."""
    config = text_config(source)
    if not family_of(source).permuted or name.endswith("norm.weight"):
        return None
    if ".q_proj." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".k_proj." in name else None


# --- what llama.cpp cannot compute ---------------------------------------------------------------


def config_losses(source: Source) -> Iterator[Loss]:
    """Properties of the model that llama.cpp's graph of this family lacks."""
    family, config = family_of(source), text_config(source)
    for what, reason in _fixed(source, family, config):
        yield Loss(what, reason, NEAREST, writable=False)
    if family.pattern == 0:
        window = _window(config)
        if window is not None and window < config.max_position_embeddings:
            yield Loss(
                "sliding window",
                f"llama.cpp's {family.arch} attends to all earlier tokens, this model to {window}; "
                f"equal for texts of up to {window} tokens",
                NEAREST,
            )


def _window(config: Any) -> int | None:
    """Tokens that some layer is limited to, or None."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types is not None and "sliding_attention" not in types):
        return None
    return int(window)


def _fixed(source: Source, family: Family, config: Any) -> Iterator[tuple[str, str]]:
    """(what, reason) for everything that llama.cpp takes for granted and this model has not."""
    arch = family.arch
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        yield f"activation {activation}", f"llama.cpp's {arch} computes {family.activation}"
    for name in source.kept:
        stem, _, leaf = name.rpartition(".")
        if leaf == "bias" and stem.rpartition(".")[2] not in family.biases:
            yield name, f"llama.cpp's {arch} has no bias there"
            break
    if not family.untied and not source.tied:
        yield "untied output head", f"llama.cpp's {arch} always uses the embedding"
    if arch == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {head_dim(config)}", "llama.cpp's qwen2 divides the hidden size by heads"
    if getattr(config, "use_bidirectional_attention", None):
        yield "bidirectional attention", f"llama.cpp's {arch} is causal"
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and float(scalar) != _query_scalar(family, config):
        yield (
            f"query_pre_attn_scalar {scalar}",
            f"llama.cpp scales queries of this size by {_query_scalar(family, config):g}",
        )
    if arch == "gemma3" and getattr(config, "attn_logit_softcapping", None) is not None:
        yield "attention softcap", "llama.cpp's gemma3 has none"
    yield from _rope_problems(family, config)


def _query_scalar(family: Family, config: Any) -> float:
    if config.num_hidden_layers == family.wide:
        return float(config.hidden_size // config.num_attention_heads)
    return float(head_dim(config))


def _rope_problems(family: Family, config: Any) -> Iterator[tuple[str, str]]:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    known = {
        "rope_type",
        "rope_theta",
        "type",  # what older configurations call rope_type
        *{
            "default": (),
            "linear": ("factor",),
            "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
            "llama3": LLAMA3_KEYS,
        }.get(kind, ()),
    }
    others = {key for key, value in rope.items() if value is not None} - known
    if rope.get("partial_rotary_factor") == 1:
        others.discard("partial_rotary_factor")
    if kind not in family.ropes:
        allowed = ", ".join(family.ropes)
        yield f"rotary embedding {kind}", f"llama.cpp's {family.arch} has {allowed}"
    elif others:
        yield f"rotary embedding with {', '.join(sorted(others))}", "GGUF has no key for it"
    local = (_local_rope(config) or {}).get("rope_type", "default")
    if local != "default":
        yield f"local rotary embedding {local}", "llama.cpp scales global layers only"


def _rope(config: Any) -> dict[str, Any]:
    """Rotary parameters of all layers, or of the global ones where there are two kinds."""
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    chosen = parameters.get("full_attention")
    return chosen if isinstance(chosen, dict) else parameters


def _local_rope(config: Any) -> dict[str, Any] | None:
    """Rotary parameters of the layers with a sliding window, where they have their own."""
    return dict(config.rope_parameters or {}).get("sliding_attention")


# --- metadata ------------------------------------------------------------------------------------

LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def add_metadata(writer: Any, source: Source) -> None:
    """Sizes and constants of the model, under the architecture's keys."""
    family, config = family_of(source), text_config(source)
    size = head_dim(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)
    if family.pattern:
        _add_window(writer, family, config)
    for key in ("attn", "final"):
        cap = getattr(config, f"{key}_logit_softcapping", None)
        if cap is not None:
            getattr(writer, f"add_{key}_logit_softcapping")(cap)


def _add_rope(writer: Any, config: Any) -> None:
    import gguf

    rope, local = _rope(config), _local_rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if local is not None:
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(float(rope[key]))


def _add_window(writer: Any, family: Family, config: Any) -> None:
    """The sliding window, and which layers have it where that is not the architecture's rule."""
    window = _window(config)
    if window is None:
        if family.arch == "gemma2":  # without the key llama.cpp takes 4096
            writer.add_sliding_window(config.max_position_embeddings)
        return
    writer.add_sliding_window(window)
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    usual = [i % family.pattern < family.pattern - 1 for i in range(len(sliding))]
    if sliding != usual:
        writer.add_sliding_window_pattern(sliding)


def rope_factors(source: Source) -> Tensor | None:
    """fp32 [head_dim / 2]: divisors of the rotary frequencies of Llama 3.1 and later, or None.

    The formula of the reference implementation (``apply_scaling`` of Llama 3.1), in fp64: high
    frequencies stay, low ones are divided by ``factor``, those between are interpolated.
    """
    config = text_config(source)
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    factor, low, high, context = (float(rope[key]) for key in LLAMA3_KEYS)
    size = head_dim(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float64) / size
    wavelength = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).to(torch.float32)
