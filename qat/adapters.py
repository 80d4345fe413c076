"""`prepare_adapters`: a frozen base, 4-bit or 16-bit, with LoRA adapters on it.

The counterpart of `qat.prepare`: the same scheme, the same coverage, another kind of training. The
model is built from its configuration and filled tensor by tensor: a linear layer's 16-bit weight
is read, initialises its adapter, is quantized to NF4 and forgotten. So the peak is the 4-bit model
and one matrix. Everything else is frozen in the dtype in which it is shipped; what
`modules_to_save` and `new_tokens` name trains beside the adapters.
"""

import fnmatch
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import PreTrainedModel

from qat.adapter_config import TAKES_FROM_BASE, AdapterConfig
from qat.errors import UserError, nearest
from qat.fake_quant import RoundTo, TrainedRows, WeightFakeQuant
from qat.linear_4bit import Linear4bit
from qat.lora import FrozenLinear, LoraLinear, MergedLinear
from qat.original import Master, OriginalWeights
from qat.prepare import KEEP_DTYPES, Coverage, CoverageEntry, plan
from qat.scheme import Scheme
from qat_kernels.nf4 import Spec4bit

WEIGHT_DTYPE = torch.float32
"""Dtype that 4-bit weights are dequantized to before the matmul's dtype. bitsandbytes goes through
the dtype in the checkpoint while it trains and not while it infers; with fp32 both are the same."""


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
    takes = adapter.base != "16bit" and adapter.init in TAKES_FROM_BASE
    if takes and original.quantization is not None:
        raise UserError(
            f"adapter.init={adapter.init}: changes the base, and model={original.model} is 4-bit "
            "already; take adapter.init=default, or give the 16-bit model"
        )
    model = original.skeleton()
    coverage = plan(model, scheme)
    # names are resolved before anything is read
    targets = set(target_names(model, adapter))
    saved = saved_names(model, adapter, coverage)
    model.requires_grad_(False)
    _replace_linears(build, model, coverage, targets, saved)
    if load:
        original.fill(model, build.keep)
        _store(model, build)
    _keep(model, coverage, build)
    _train_modules(model, saved)
    if new_rows:
        _train_rows(model, build)
    model.train(False)
    return model, coverage


def _replace_linears(
    build: _Build, model: PreTrainedModel, coverage: Coverage, targets: set[str], saved: list[str]
) -> None:
    """Put layers with both forms in the place of linear ones, but for what trains as a whole."""
    entries = {entry.name: entry for entry in coverage.entries}
    head = model.get_output_embeddings()
    linears = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    for name, linear in tqdm(linears, desc="base", delay=2, leave=False):
        entry = entries.get(f"{name}.weight")
        if entry is None or name in saved:
            continue  # a tied head, or trained as a whole
        if linear is head and entry.weight is None and name not in targets:
            continue
        layer = _layer(build, name, linear, name in targets, linear is head)
        layer.merge_with(
            Master(build.original, f"{name}.weight", layer.base_layer),
            entry.weight,
            entry.input,
            build.scheme.observer,
            build.keep,
        )
        model.set_submodule(name, layer)


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
    layer, weight = _adapter(build, name, weight, spec)
    layer.base_layer = _base(build, linear, weight, spec, packed)
    if build.adapter.dtype == "bfloat16":
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return layer


def _adapter(
    build: _Build, name: str, weight: Tensor, spec: Spec4bit | None
) -> tuple[LoraLinear, Tensor]:
    """The initialised adapter of a layer, and what its initialisation left of the weight."""
    adapter, rank = build.adapter, build.adapter.rank
    takes = adapter.init in TAKES_FROM_BASE
    if takes and rank > min(weight.shape):
        raise UserError(
            f"adapter.rank={rank}: adapter.init={adapter.init} takes that many directions of "
            f"{name}, which has {min(weight.shape)}; lower the rank, or take adapter.init=default"
        )
    n, k = weight.shape
    # factors depend on the order of additions, and a resumed run may have other threads
    with torch.random.fork_rng(devices=[]), _one_thread(takes):
        torch.manual_seed(int.from_bytes(_digest(f"{build.seed}/{name}".encode())[:7], "little"))
        dense = nn.Linear(k, n, bias=False, device="meta")
        # a copy: some initialisations write into it
        dense.weight = nn.Parameter(weight.to(torch.float32, copy=takes), requires_grad=False)
        # factors of a matrix that is not there cannot be made
        adapter = adapter if build.load else replace(adapter, init="default")
        layer = LoraLinear(dense, adapter.peft())
        if adapter.init == "loftq":
            assert spec is not None
            _loftq(layer, weight.float(), spec, build)
    if not takes:
        return layer, weight
    layer.remember_initial()
    return layer, dense.weight.detach()


@contextmanager
def _one_thread(on: bool) -> Iterator[None]:
    """Compute the block with one thread, if ``on``."""
    threads = torch.get_num_threads()
    if on:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        held = Linear4bit(packed.packed, packed.spec, packed.shape, WEIGHT_DTYPE, linear.bias)
        return held.to(build.device)
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
        UserError: a name matches nothing, a module that the scheme quantizes, or one that
            ``targets`` names too.
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
    named = [target for target in adapter.targets if target != "all-linear"]
    both = [name for name in chosen if any(_matches(name, target) for target in named)]
    if both:
        raise UserError(
            f"adapter.targets and adapter.modules_to_save both name {both[0]!r}: a module trains "
            "as a whole or through an adapter; take it out of one of them"
        )
    return list(chosen)
