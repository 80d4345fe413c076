"""`prepare`: turn a model into its fake-quantized self, and say what happened to each parameter.

The surgery is small: ``nn.Linear`` becomes `FakeQuantLinear` (same parameters, shared), other
weights get a parametrization, and everything kept is seen rounded to the dtype in which it will be
saved. Nothing is skipped silently: the `Coverage` has an entry for each parameter.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qat.errors import UserError, nearest
from qat.fake_quant import FakeQuantLinear, RoundTo, WeightFakeQuant
from qat.scheme import InputSpec, Rule, Scheme, describe
from qat_kernels import QuantSpec, check_finite

KEEP_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class CoverageEntry:
    """What happened to one parameter."""

    name: str
    """Name in the state dict of the original model."""
    module: str
    """Name of the module that owns it."""
    module_class: str
    """Class of that module."""
    shape: tuple[int, ...]
    """[N, K] for linear layers, [E, N, K] for experts."""
    status: str
    """quantized, kept or unsupported."""
    reason: str
    """The rule or the property that decided."""
    matmul: bool
    """Whether it counts as a linear layer's weight (the output head does not)."""
    weight: QuantSpec | None = None
    """Weight spec, if quantized."""
    input: InputSpec | None = None
    """Input spec of the layer, if its input is quantized."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Coverage:
    """The entries of all parameters of a prepared model, tied ones once."""

    entries: tuple[CoverageEntry, ...]

    @property
    def quantized(self) -> list[CoverageEntry]:
        """The quantized entries."""
        return [entry for entry in self.entries if entry.status == "quantized"]

    @property
    def share(self) -> float:
        """Quantized share of the matmul parameters, 0 ... 1 (0 for a model without any)."""
        total = sum(entry.numel for entry in self.entries if entry.matmul)
        done = sum(entry.numel for entry in self.quantized if entry.matmul)
        return done / total if total else 0.0

    def summary(self) -> str:
        """A table with one line for each (status, class, shape, reason)."""
        groups: dict[tuple[str, ...], list[CoverageEntry]] = {}
        for entry in self.entries:
            what = describe(entry.weight) if entry.weight else entry.reason
            if entry.input:
                what += f", inputs {describe(entry.input)}"
            key = (entry.status, entry.module_class, "x".join(map(str, entry.shape)), what)
            groups.setdefault(key, []).append(entry)
        lines = [f"{'status':<12}{'class':<24}{'shape':<18}{'count':>6}{'parameters':>14}  what"]
        for (status, cls, shape, what), members in groups.items():
            numel = sum(entry.numel for entry in members)
            lines.append(f"{status:<12}{cls:<24}{shape:<18}{len(members):>6}{numel:>14,}  {what}")
        lines.append(f"quantized: {self.share:.1%} of the linear layers' parameters")
        return "\n".join(lines)


def prepare(model: PreTrainedModel, scheme: Scheme) -> Coverage:
    """Make ``model`` compute with fake-quantized weights; in place.

    Args:
        model: a causal LM with parameters in fp32 (the master weights) or on the meta device.
        scheme: what to quantize and how.

    Returns:
        The coverage report.

    Raises:
        UserError: a rule matches nothing, a group divides no selected layer, too little of the
            model would be quantized, a parameter holds NaN or infinity, a class has no public
            packed format.
    """
    coverage = plan(model, scheme)
    dtype = KEEP_DTYPES[scheme.keep_dtype]
    entries = {entry.name: entry for entry in coverage.entries}
    names = {id(p): n for n, p in model.named_parameters()}
    replaced: dict[int, nn.Module] = {}
    for owner_name, found, name, parameter in list(_own_parameters(model)):
        entry = entries[names[id(parameter)]]
        owner = replaced.get(id(found), found)
        if not parameter.is_floating_point():
            continue
        if not parameter.is_meta:
            try:
                check_finite(parameter, entry.name)
            except ValueError as error:
                raise UserError(f"model: {error}; such a model cannot be quantized") from error
        if entry.weight is None:
            parametrize.register_parametrization(owner, name, RoundTo(dtype), unsafe=True)
        elif type(owner) is nn.Linear:
            replacement = FakeQuantLinear(owner, entry.weight, entry.input, scheme.observer)
            model.set_submodule(owner_name, replacement)
            replaced[id(found)] = replacement
        else:
            quantizer = WeightFakeQuant(entry.weight)
            parametrize.register_parametrization(owner, name, quantizer, unsafe=True)
    model.to(next(model.parameters()).device)
    return coverage


def plan(model: PreTrainedModel, scheme: Scheme) -> Coverage:
    """The coverage that `prepare` would give, without touching the model; same errors."""
    _check_rules(model, scheme)
    names = {id(p): n for n, p in model.named_parameters()}
    head = model.get_output_embeddings()
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen: set[int] = set()
    entries = []
    for owner_name, owner, name, parameter in _own_parameters(model):
        decide = _Decision(scheme, owner_name, owner, name, parameter)
        is_head = owner is head
        if id(parameter) in seen:
            # tied: the first owner decided, but a rule for this one must not be lost
            decide.status(is_head, id(parameter) in tied)
            continue
        seen.add(id(parameter))
        status, reason, rule = decide.status(is_head, id(parameter) in tied)
        entries.append(
            CoverageEntry(
                name=names[id(parameter)],
                module=owner_name,
                module_class=type(owner).__name__,
                shape=tuple(parameter.shape),
                status=status,
                reason=reason,
                matmul=decide.is_matmul and not is_head,
                weight=decide.weight(rule) if status == "quantized" else None,
                input=decide.input(rule) if status == "quantized" else None,
            )
        )
    coverage = Coverage(tuple(entries))
    _check_shared(model, coverage)
    _check_coverage(coverage, scheme)
    return coverage


def _own_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(owner's name, owner, parameter's name, parameter), tied parameters once for each owner."""
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            yield owner_name, owner, name, parameter


@dataclass(frozen=True)
class _Decision:
    """What the scheme says of one parameter."""

    scheme: Scheme
    owner_name: str
    owner: nn.Module
    name: str
    parameter: nn.Parameter

    @property
    def is_matmul(self) -> bool:
        if isinstance(self.owner, nn.Linear | Conv1D):
            return self.name == "weight" and not self.is_router
        return self.is_experts

    @property
    def is_router(self) -> bool:
        # a plain parameter in most mixtures, a subclass of Linear in some: kept in all of them
        return type(self.owner).__name__.endswith("Router")

    @property
    def is_experts(self) -> bool:
        return self.parameter.ndim == 3 and "expert" in type(self.owner).__name__.lower()

    def weight(self, rule: Rule | None) -> QuantSpec:
        return rule.weight if rule and rule.weight else self.scheme.weight

    def input(self, rule: Rule | None) -> InputSpec | None:
        if self.is_experts:
            # no reader quantizes the inputs of experts; the coverage shows that they have no spec
            return None
        return rule.input if rule and rule.input else self.scheme.input

    def status(self, is_head: bool, is_embedding: bool) -> tuple[str, str, Rule | None]:
        """(status, reason, the rule that applies)."""
        rule = self.scheme.rule_for(self.owner_name)
        if is_embedding or isinstance(self.owner, nn.Embedding):
            if rule and rule.action == "quantize":
                raise UserError(
                    f"scheme.rules: {rule.match!r} selects {self.owner_name}, an embedding"
                    f"{' that the output head shares' if is_head or is_embedding else ''}; no "
                    "public packed format carries quantized embeddings that plain transformers "
                    "and vLLM both read. Narrow the rule, or untie the head"
                )
            return "kept", "embedding", None
        if self.is_router:
            return "kept", "router", None
        if not self.is_matmul:
            return "kept", "norm, bias or other small parameter", None
        if rule and rule.action == "keep":
            return "kept", f"rule {rule.match!r}", rule
        if is_head and rule is None:
            return "kept", "output head (a rule can quantize it)", None
        reason = self._unsupported(rule)
        if reason:
            return "unsupported", reason, rule
        try:
            self.weight(rule).group_of(self.parameter.shape[-1])
        except ValueError as error:
            return "kept", str(error), rule
        return "quantized", f"rule {rule.match!r}" if rule else "scheme", rule

    def _unsupported(self, rule: Rule | None) -> str:
        cls = type(self.owner).__name__
        if isinstance(self.owner, Conv1D):
            return f"{cls} stores its weight transposed; no inference engine reads that packed"
        if self.is_experts and getattr(self.owner, "is_transposed", True):
            # transformers marks the classes whose experts are [E, N, K] by is_transposed=False
            return f"{cls} stores its experts transposed; no inference engine reads that packed"
        if type(self.owner) is not nn.Linear and self.input(rule) is not None:
            return f"inputs of {cls} cannot be quantized: readers do so for nn.Linear only"
        return ""


def _check_rules(model: nn.Module, scheme: Scheme) -> None:
    """Raise UserError for a rule that decides nothing, and say why."""
    names = [name for name, _ in model.named_modules() if name]
    deciding = []
    for owner_name, owner, name, parameter in _own_parameters(model):
        rule = scheme.rule_for(owner_name)
        quantizable = _Decision(scheme, owner_name, owner, name, parameter).is_matmul
        if rule and (rule.action == "keep" or quantizable or isinstance(owner, nn.Embedding)):
            deciding.append(rule)
    for rule in scheme.rules:
        if rule in deciding:
            continue
        matched = [name for name in names if fnmatch.fnmatchcase(name, rule.match)]
        if not matched:
            near = nearest(rule.match, names) or names[-1]
            raise UserError(
                f"scheme.rules: match={rule.match!r} selects no module of this model; a near name "
                f"is {near!r} (wildcards * and ? are allowed)"
            )
        raise UserError(
            f"scheme.rules: match={rule.match!r} decides nothing: it selects {matched[0]!r}, which "
            f"has no weight of its own to {rule.action}, or an earlier rule decides first. To "
            f"select what is inside a block write {rule.match + '.*'!r}"
        )


def _check_shared(model: nn.Module, coverage: Coverage) -> None:
    """Raise UserError for a weight that several linear layers share."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    matmul = {entry.name for entry in coverage.entries if entry.matmul}
    for names in owners.values():
        if len(names) > 1 and matmul.intersection(names):
            raise UserError(
                f"model: {' and '.join(names[:3])} are one weight; no public packed format carries "
                "linear layers that share one, so this model cannot be converted"
            )


def _check_coverage(coverage: Coverage, scheme: Scheme) -> None:
    unsupported = [entry for entry in coverage.entries if entry.status == "unsupported"]
    matmul = [entry for entry in coverage.entries if entry.matmul]
    if not coverage.quantized:
        undivided = [entry for entry in matmul if "group_size" in entry.reason]
        if undivided and not unsupported:
            sizes = sorted({entry.shape[-1] for entry in undivided})
            raise UserError(
                f"scheme.weight.group_size={scheme.weight.group_size} divides no selected layer: "
                f"their inputs (K) are {', '.join(map(str, sizes[:8]))}. Choose a divisor, or "
                "scheme.weight.granularity=channel"
            )
    if coverage.share < scheme.min_coverage or not coverage.quantized:
        missing = [entry for entry in matmul if entry.status != "quantized"]
        reasons: dict[str, CoverageEntry] = {entry.reason: entry for entry in missing}
        why = "; ".join(
            f"{entry.name}: {entry.status}, {reason}" for reason, entry in reasons.items()
        )
        raise UserError(
            f"scheme.min_coverage={scheme.min_coverage}: only {coverage.share:.1%} of the linear "
            f"layers' parameters would be quantized ({why or 'the model has no linear layers'}). "
            "Change the scheme, or lower scheme.min_coverage if that is what you want"
        )
