"""`prepare_adapters`: a frozen base, 4-bit or 16-bit, with LoRA adapters on it.

The counterpart of `qat.prepare`: the same scheme, the same coverage, another kind of training. The
model is built from its configuration and filled tensor by tensor: a linear layer's 16-bit weight
is read, initialises its adapter, is quantized to NF4 and forgotten. So the peak is the 4-bit model
and one matrix. Everything else is frozen in the dtype in which it is shipped; what
`modules_to_save` and `new_tokens` name trains beside the adapters.
"""

import fnmatch
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.errors import UserError, nearest
from qat.fake_quant import Quantizer, RoundTo, TrainedRows, WeightFakeQuant
from qat.linear_4bit import Linear4bit
from qat.lora import FrozenLinear, LoraLinear, MergedLinear
from qat.observers import RangeObserver
from qat.original import OriginalWeights
from qat.prepare import KEEP_DTYPES, Coverage, CoverageEntry, plan
from qat.scheme import Scheme
from qat_kernels.nf4 import Spec4bit

Initialisation = Literal[
    "default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq"
]

WEIGHT_DTYPE = torch.float32
"""Dtype that 4-bit weights are dequantized to before the matmul's dtype. bitsandbytes goes through
the dtype in the checkpoint while it trains and not while it infers; with fp32 both are the same."""

TAKES_FROM_BASE = ("pissa", "pissa_niter_16", "olora", "loftq")
"""Initialisations that move a part of the base into the adapter."""


@dataclass(frozen=True)
class AdapterConfig:
    """The frozen base and the adapters on it."""

    base: Literal["nf4", "fp4", "16bit"] = "nf4"
    """How linear layers of the base are held: 4-bit NormalFloat or float, or as they are."""
    block_size: int = 64
    """Weights that share one absmax in the 4-bit base: 32, 64, ... 4096."""
    double_quant: bool = True
    """Quantize the absmax values too (8 bits, blocks of 256): 4.13 instead of 4.5 bits."""
    rank: int = 16
    """Rank r of the adapters."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / r, or alpha / sqrt(r) with rslora."""
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    """Layers that get an adapter: all-linear (but the head), names such as q_proj, or wildcards."""
    dropout: float = 0.0
    """Dropout of the adapters' inputs."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (arXiv:2402.09353)."""
    init: Initialisation = "default"
    """default (B = 0), gaussian, orthogonal (BA = 0), pissa (arXiv:2404.02948), pissa_niter_16 (the
    same by a fast SVD), olora (arXiv:2406.01775), loftq (arXiv:2310.08659)."""
    loftq_iterations: int = 1
    """Alternations of quantizing and factorising; read only by init=loftq."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the adapters' parameters."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained as a whole beside the adapters, for example lm_head."""
    new_tokens: list[str] = field(default_factory=list)
    """Special tokens to add; their rows of embedding and head are trained."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range, or for what has no merged form."""
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: at least 0 and below 1")
        if self.loftq_iterations < 1:
            raise ValueError(f"loftq_iterations={self.loftq_iterations}: at least 1")
        if self.init == "loftq" and self.base == "16bit":
            raise ValueError("init=loftq: needs a 4-bit base; take base=nf4, or init=pissa")
        if self.dora and self.init in TAKES_FROM_BASE:
            raise ValueError(
                f"dora=true with init={self.init}: the norms would belong to another base; take "
                "init=default"
            )
        if not self.targets:
            raise ValueError("targets=[]: name layers, or all-linear")
        tokens = self.new_tokens
        if len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens):
            raise ValueError(f"new_tokens={tokens}: each a text of its own, none empty")
        self.spec()

    def spec(self) -> Spec4bit | None:
        """How the base is quantized; None for 16 bit."""
        if self.base == "16bit":
            return None
        return Spec4bit(self.base, self.block_size, self.double_quant)

    def peft(self, targets: list[str] | None = None) -> LoraConfig:
        """PEFT's configuration, with the resolved ``targets``."""
        inits = {"default": True, "loftq": True}
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=targets,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=inits.get(self.init, self.init),
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class _Build:
    """What building needs to know."""

    original: OriginalWeights
    adapter: AdapterConfig
    scheme: Scheme
    seed: int
    storage: torch.dtype
    device: torch.device
    new_rows: Sequence[int]
    load: bool

    @property
    def keep(self) -> torch.dtype:
        return KEEP_DTYPES[self.scheme.keep_dtype]


def prepare_adapters(
    original: OriginalWeights,
    adapter: AdapterConfig,
    scheme: Scheme,
    seed: int,
    storage: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    new_rows: Sequence[int] = (),
    load: bool = True,
) -> tuple[PreTrainedModel, Coverage]:
    """Build the frozen base with its adapters.

    Args:
        original: the model; with ``rows`` for new tokens.
        adapter: base and adapters.
        scheme: how the merged model is quantized.
        seed: of the adapters' initialisation, which depends on it and the layer's name alone.
        storage: dtype in which what is not 4-bit is held: fp32, or scheme.keep_dtype to save memory
            (the values are the same).
        device: where to.
        new_rows: ids of the tokens whose rows of embedding and head are trained.
        load: False leaves all weights on the meta device, to count them.

    Returns:
        The model, computing in its plain form, and the coverage of its merged form.

    Raises:
        UserError: see `qat.prepare.plan`; a target or module to save that matches nothing.
    """
    build = _Build(original, adapter, scheme, seed, storage, torch.device(device), new_rows, load)
    if (
        original.quantization is not None
        and adapter.base != "16bit"
        and (adapter.init in TAKES_FROM_BASE)
    ):
        raise UserError(
            f"adapter.init={adapter.init}: changes the base, and model={original.model} is 4-bit "
            "already; take adapter.init=default, or give the 16-bit model"
        )
    model = original.skeleton()
    coverage = plan(model, scheme)
    # names are resolved before anything is read
    targets = set(target_names(model, adapter))
    saved = saved_names(model, adapter, coverage)
    entries = {entry.name: entry for entry in coverage.entries}
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    for name, linear in tqdm(linears, desc="base", delay=2, leave=False):
        entry = entries.get(f"{name}.weight")
        if entry is None or name in saved:
            continue  # a tied head, or trained as a whole
        if linear is head and entry.weight is None and name not in targets:
            continue
        layer = _layer(build, name, linear, name in targets, linear is head)
        layer.merge_with(
            _Master(original, f"{name}.weight", layer),
            entry.weight,
            entry.input,
            scheme.observer,
            build.keep,
        )
        model.set_submodule(name, layer)
    if load:
        original.fill(model, build.keep)
        _store(model, build)
    _keep(model, coverage, build)
    _train_modules(model, saved)
    if new_rows:
        _train_rows(model, build)
    model.train(False)
    return model, coverage


class _Master:
    """Gives the weight that a layer's adapter is merged onto: the original, read from disk.

    A checkpoint that is already 4-bit has no original: its base is dequantized instead.
    """

    def __init__(self, original: OriginalWeights, name: str, layer: MergedLinear) -> None:
        self.original = original
        self.name = name
        base, packed = layer.base_layer, original.quantization is not None
        self.packed = base if isinstance(base, Linear4bit) and packed else None

    def __call__(self) -> Tensor:
        return self.original.read(self.name) if self.packed is None else self.packed.weight


def _layer(
    build: _Build, name: str, linear: nn.Linear, adapted: bool, is_head: bool
) -> LoraLinear | FrozenLinear:
    """The layer in the place of ``linear``: its base filled, its adapter initialised."""
    weight_name = f"{name}.weight"
    weight = linear.weight.detach()
    if build.load:
        weight = build.original[weight_name].to(build.device)
    spec = None if is_head else build.adapter.spec()
    packed = build.original.packed(weight_name) if build.load and spec else None
    if packed is not None and packed.spec != spec:
        held = packed.spec
        raise UserError(
            f"model={build.original.model}: {name} is 4-bit already, and not as the base shall be "
            f"({spec}). Give adapter.base={held.quant_type} adapter.block_size={held.block_size} "
            f"adapter.double_quant={str(held.double_quant).lower()}, or the 16-bit model"
        )
    if linear.bias is not None and build.load:
        # frozen, so already as it will be shipped
        bias = build.original[f"{name}.bias"].to(build.device, build.keep).to(build.storage)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    if not adapted:
        return FrozenLinear(_base(build, linear, weight, spec, packed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(_digest(f"{build.seed}/{name}".encode())[:7], "little"))
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        # a copy: some initialisations write into it
        dense.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
        # factors of a matrix that is not there cannot be made
        adapter = build.adapter if build.load else replace(build.adapter, init="default")
        layer = LoraLinear(dense, adapter.peft())
    if build.adapter.init == "loftq" and build.load:
        assert spec is not None
        _loftq(layer, weight.float(), spec, build)
    if build.adapter.init in TAKES_FROM_BASE:
        layer.remember_initial()
        weight = dense.weight.detach()
    layer.base_layer = _base(build, linear, weight, spec, packed)
    if build.adapter.dtype == "bfloat16":
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return layer


def _base(
    build: _Build,
    linear: nn.Linear,
    weight: Tensor,
    spec: Spec4bit | None,
    packed: Linear4bit | None,
) -> nn.Linear:
    """The frozen layer itself: 4-bit, or 16-bit values in the storage dtype."""
    if spec is None:
        if build.load:
            value = weight.to(build.keep).to(build.storage)
            linear.weight = nn.Parameter(value, requires_grad=False)
        return linear
    if packed is not None:
        return Linear4bit.from_packed(
            packed.packed, packed.spec, packed.shape, WEIGHT_DTYPE, linear.bias
        ).to(build.device)
    if not build.load:
        bias = linear.bias is not None
        return Linear4bit.meta(linear.in_features, linear.out_features, spec, WEIGHT_DTYPE, bias)
    return Linear4bit.from_weight(weight, spec, WEIGHT_DTYPE, linear.bias)


def _loftq(layer: LoraLinear, weight: Tensor, spec: Spec4bit, build: _Build) -> None:
    """Alternate Q(W - s B A) and the best rank-r factors of what it misses (arXiv:2310.08659)."""
    a, b = layer.factors
    scale, rank = layer.scaling["default"], build.adapter.rank
    moved = torch.zeros_like(weight)
    for _ in range(build.adapter.loftq_iterations):
        held = Linear4bit.from_weight(weight - moved, spec, WEIGHT_DTYPE).weight
        u, s, v = torch.linalg.svd(weight - held, full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        # contiguous: matmuls of the model read back must add in the same order
        b.data, a.data = (u[:, :rank] * root).contiguous(), (root[:, None] * v[:rank]).contiguous()
        base = weight - moved
        moved = scale * (b.data @ a.data)
    layer.base_layer.weight.data = base


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


# --- what is not a linear layer of the base ------------------------------------------------------


def _store(model: PreTrainedModel, build: _Build) -> None:
    """Hold what was filled in the storage dtype; its values are those of the keep dtype."""
    seen: set[int] = set()
    for parameter in model.parameters():
        if id(parameter) not in seen and not parameter.requires_grad:
            seen.add(id(parameter))
            parameter.data = parameter.data.to(build.device, build.storage)
    model.to(build.device)


def _keep(model: PreTrainedModel, coverage: Coverage, build: _Build) -> None:
    """Mark every other frozen parameter: kept, or quantized without being an nn.Linear."""
    entries = {entry.name: entry for entry in coverage.entries}
    names = {id(p): n for n, p in model.named_parameters()}
    for owner_name, owner in list(model.named_modules()):
        if isinstance(owner, MergedLinear) or _inside_adapter(owner_name):
            continue
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            if leaf == "weight" and owner_name.endswith(".base_layer"):
                continue  # shipped as a part of the merged weight
            entry: CoverageEntry | None = entries.get(names[id(parameter)])
            added: nn.Module = RoundTo(build.keep, exact=True)
            if entry is not None and entry.weight is not None:
                added = WeightFakeQuant(entry.weight)
                added.enable(False)
            parametrize.register_parametrization(owner, leaf, added, unsafe=True)


def _inside_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _train_modules(model: PreTrainedModel, saved: list[str]) -> None:
    """Let whole modules train: fp32 masters that the forward pass sees as they will be shipped."""
    for name in saved:
        for held in _parametrizations(model.get_submodule(name)):
            held.original.data = held.original.data.float()
            held.original.requires_grad_(True)
    for held in _parametrizations(model):
        # all of its owners, for a weight that is tied
        if held.original.requires_grad:
            held[0].exact = False


def _parametrizations(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, parametrize.ParametrizationList)]


def _train_rows(model: PreTrainedModel, build: _Build) -> None:
    """Let the rows of the new tokens train, in the embedding and in a head of its own."""
    rows = torch.tensor(build.new_rows, device=build.device)
    shared: dict[int, TrainedRows] = {}
    for owner in (model.get_input_embeddings(), model.get_output_embeddings()):
        held: Any = owner.parametrizations["weight"]
        if held.original.requires_grad:
            continue  # trained as a whole
        added = shared.get(id(held.original))
        if added is None:
            added = TrainedRows(rows, held.original.detach()[rows].float())
            shared[id(held.original)] = added
        held[0].exact = False
        held.insert(0, added)


# --- names ---------------------------------------------------------------------------------------


def target_names(model: PreTrainedModel, adapter: AdapterConfig) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Raises:
        UserError: a target matches no linear layer.
    """
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    chosen: dict[str, None] = {}
    for target in adapter.targets:
        found = linears if target == "all-linear" else [n for n in linears if _matches(n, target)]
        if not found:
            leaves = sorted({name.rpartition(".")[2] for name in linears})
            near = nearest(target, [*leaves, *linears])
            hint = f" Did you mean {near!r}?" if near else ""
            other = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)}
            leaves = leaves or [f"none, only {', '.join(sorted(other - {'Linear'}))}"]
            raise UserError(
                f"adapter.targets: {target!r} selects no plain nn.Linear of this model.{hint} "
                f"There are: {', '.join(leaves)} (wildcards * and ? are allowed)"
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def saved_names(model: PreTrainedModel, adapter: AdapterConfig, coverage: Coverage) -> list[str]:
    """Full names of the modules that train as a whole.

    Raises:
        UserError: a name matches nothing, or a module that the scheme quantizes.
    """
    modules = [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(False))]
    quantized = {entry.module for entry in coverage.entries if entry.weight is not None}
    chosen: dict[str, None] = {}
    for wanted in adapter.modules_to_save:
        found = [name for name in modules if _matches(name, wanted)]
        if not found:
            near = nearest(wanted, [*{n.rpartition(".")[2] for n in modules}, *modules])
            hint = f"; did you mean {near!r}?" if near else ""
            raise UserError(
                f"adapter.modules_to_save: {wanted!r} selects no module with parameters{hint}"
            )
        taken = [name for name in found if name in quantized]
        if taken:
            raise UserError(
                f"adapter.modules_to_save: {taken[0]!r} is quantized by the scheme; give it an "
                "adapter through adapter.targets, or keep it in 16 bit by a rule: "
                f"scheme.rules='[{{match: {taken[0]}, action: keep}}]'"
            )
        chosen.update(dict.fromkeys(found))
    return list(chosen)


# --- what is saved -------------------------------------------------------------------------------


def trained_state(model: nn.Module) -> set[str]:
    """Names in the state dict of what training changes: adapters, saved modules, observers."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for owner_name, owner in model.named_modules():
        if isinstance(owner, Quantizer | RangeObserver):
            names |= {f"{owner_name}.{leaf}" for leaf in owner._buffers}
    return names


def trained_modules(model: nn.Module) -> dict[str, Tensor]:
    """Original parameter name → value in fp32, of the modules that train as a whole."""
    return {
        f"{owner_name}.{leaf}": held.original.detach()
        for owner_name, owner in model.named_modules()
        for leaf, held in _held(owner)
        if held.original.requires_grad
    }


def trained_rows(model: nn.Module) -> dict[str, TrainedRows]:
    """Module name → its trained rows; of tied modules the first."""
    found: dict[int, tuple[str, TrainedRows]] = {}
    for owner_name, owner in model.named_modules():
        for _, held in _held(owner):
            if isinstance(held[0], TrainedRows):
                found.setdefault(id(held[0]), (owner_name, held[0]))
    return dict(found.values())


def _held(owner: nn.Module) -> list[tuple[str, Any]]:
    """(parameter's name, its parametrizations) of a module."""
    if not parametrize.is_parametrized(owner):
        return []
    parametrizations: Any = owner.parametrizations
    return list(parametrizations.items())


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of what training does not change, the initial factors included."""
    changing = trained_state(model)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name not in changing:
            yield name, value


def _merged_onto(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of the weights on disk that adapters are merged onto, one at a time."""
    for name, module in model.named_modules():
        if isinstance(module, MergedLinear):
            master = module.master
            if not (isinstance(master, _Master) and master.packed is not None):
                yield f"{name}.master", master()


def base_sha256(model: nn.Module) -> str:
    """Identity of the frozen base: sha256 (hex) over names, shapes and bytes of its tensors.

    The original weights belong to it: rounding to 4 bits hides small differences between them,
    and the merge at the end does not.
    """
    digest = hashlib.sha256()
    for name, value in chain(sorted(_frozen(model)), _merged_onto(model)):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        # in fp32, so that the storage dtype does not matter: the values are the same
        value = value.detach().float() if value.is_floating_point() else value
        flat = value.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def summary(model: nn.Module, keep: torch.dtype) -> str:
    """Two lines on base and adapters, for people."""
    layers = sum(isinstance(module, LoraLinear) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    total += sum(
        m.in_features * m.out_features for m in model.modules() if isinstance(m, Linear4bit)
    )
    return (
        f"base: {base_bits(model, keep):.3f} bits per weight of its linear layers\n"
        f"adapters: {layers} layers; {trained:,} parameters train, {trained / total:.2%} of the "
        "model's"
    )


def base_bits(model: nn.Module, keep: torch.dtype) -> float:
    """Bits per weight of the base's linear layers, absmax values included."""
    bits = weights = 0.0
    for module in model.modules():
        if isinstance(module, MergedLinear):
            base = module.base_layer
            count = base.in_features * base.out_features
            weights += count
            if isinstance(base, Linear4bit):
                bits += 8.0 * _buffer_bytes(base)
            else:
                bits += 8.0 * keep.itemsize * count
    return bits / weights


def stored_bytes(model: nn.Module, keep: torch.dtype) -> int:
    """Size of base and adapter together, as they are written."""
    size = 0
    for parameter in model.parameters():
        width = parameter.element_size() if parameter.requires_grad else keep.itemsize
        size += parameter.numel() * width
    for module in model.modules():
        if isinstance(module, Linear4bit):
            size += _buffer_bytes(module)
    return size


def _buffer_bytes(layer: Linear4bit) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())


def in_fp32(model: nn.Module) -> None:
    """Hold what was stored in 16 bit in fp32, for exact measurement; no value changes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    """Whether the model was made by `prepare_adapters`."""
    return any(isinstance(module, MergedLinear) for module in model.modules())
