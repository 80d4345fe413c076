"""Fidelity: the artifact on disk is the model that was trained, or the run fails.

The artifact is read back with code that this project did not write: plain transformers loads the
model, compressed-tensors unpacks the codes. Codes, weights and logits must be equal, not close;
what was not compared is reported as not compared.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from qat.convert import TrainedMatrix, trained_matrices
from qat.module import forward_logits
from qat.packing import Batch
from qat.prepare import Coverage, kept_parameters, quantized_parameters
from qat_kernels import fake_quantize


class FidelityError(RuntimeError):
    """The artifact differs from the trained model."""


@dataclass(frozen=True)
class Fidelity:
    """What was compared, with what result."""

    codes_equal: bool
    """Codes and scales on disk equal the trained ones, unpacked by compressed-tensors."""
    codes_compared: int
    """Number of weight matrices compared."""
    weights_equal: bool | None
    """Each parameter of the reloaded model equals the trained one; None: not compared."""
    weights_compared: int
    """Number of parameters compared."""
    logits: str
    """equal, different, or not compared (with the reason)."""
    logit_blocks: int
    """Text blocks whose logits were compared."""
    max_logit_diff: float | None
    """Largest absolute difference of a logit; None: not compared."""
    problems: tuple[str, ...] = ()
    """The first differences, by name."""

    @property
    def holds(self) -> bool:
        """Whether nothing that was compared differs."""
        return self.codes_equal and self.weights_equal is not False and self.logits != "different"


def reload(artifact: Path) -> PreTrainedModel:
    """The artifact in plain transformers, fp32, unpacked by compressed-tensors.

    Raises:
        FidelityError: a tensor of the file has no place in the model, or the other way round.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        str(artifact), dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise FidelityError(f"{artifact}: {kind}: {sorted(map(str, info[kind]))[:5]}")
    model.eval()
    # compressed-tensors unpacks a layer at its first forward pass
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
    return model


class Stored:
    """The tensors of an artifact's safetensors files, read one at a time."""

    def __init__(self, artifact: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in sorted(artifact.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self.files.update(dict.fromkeys(file.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _stored_codes(stored: Stored, prefix: str, bits: int) -> Tensor:
    """int8 codes [N, K] of one matrix, unpacked by compressed-tensors."""
    if f"{prefix}.weight_packed" not in stored:
        return stored[f"{prefix}.weight"]
    shape = torch.Size(stored[f"{prefix}.weight_shape"].tolist())
    codes: Tensor = unpack_from_int32(stored[f"{prefix}.weight_packed"], bits, shape)
    return codes


def _stored_zero_point(stored: Stored, prefix: str, matrix: TrainedMatrix, bits: int) -> Tensor:
    value = stored[f"{prefix}.weight_zero_point"]
    if value.dtype == torch.int8:
        return value
    unpacked: Tensor = unpack_from_int32(
        value, bits, torch.Size((matrix.codes.shape[0], matrix.scale.shape[1])), packed_dim=0
    )
    return unpacked


def _code_problem(stored: Stored, matrix: TrainedMatrix) -> str:
    """What differs between a stored matrix and the trained one; empty when nothing does."""
    spec = matrix.entry.weight
    assert spec is not None
    prefix = matrix.prefix
    try:
        if not torch.equal(_stored_codes(stored, prefix, spec.bits), matrix.codes):
            return f"{prefix}: codes differ"
        scale = stored[f"{prefix}.weight_scale"].float()
        if not torch.equal(scale.reshape(matrix.scale.shape), matrix.scale):
            return f"{prefix}: scales differ"
        if matrix.zero_point is not None:
            zero_point = _stored_zero_point(stored, prefix, matrix, spec.bits)
            if not torch.equal(zero_point.reshape(matrix.zero_point.shape), matrix.zero_point):
                return f"{prefix}: zero points differ"
        expected = matrix.input_scale
        if expected is not None and not torch.equal(stored[f"{prefix}.input_scale"], expected):
            return f"{prefix}: the input scale differs"
    except KeyError as error:
        return f"{error.args[0]} is missing"
    return ""


@torch.no_grad()
def _weight_problems(trained: PreTrainedModel, reloaded: PreTrainedModel) -> Iterator[str]:
    """Compare what both models multiply with, parameter by parameter."""
    found = dict(reloaded.named_parameters(remove_duplicate=False))

    def compare(name: str, value: Tensor) -> str:
        if name not in found:
            return f"{name} is missing after reloading"
        if not torch.equal(found[name].float(), value):
            return f"{name} differs after reloading"
        return ""

    for item in quantized_parameters(trained):
        yield compare(item.name, fake_quantize(item.weight, item.quantizer.spec))
    for name, value, dtype in kept_parameters(trained):
        yield compare(name, value.to(dtype).float())


@torch.no_grad()
def _logit_difference(
    trained: PreTrainedModel, reloaded: PreTrainedModel, batches: Sequence[Batch]
) -> tuple[float, int]:
    """(largest absolute difference, text blocks compared)."""
    worst, blocks = torch.zeros(()), 0
    for batch in tqdm(batches, desc="compare logits", delay=2, leave=False):
        difference = (forward_logits(trained, batch) - forward_logits(reloaded, batch)).abs()
        # torch.maximum keeps a NaN, Python's max would drop it
        worst = torch.maximum(worst, difference.max())
        blocks += batch["input_ids"].shape[0]
    return float(worst), blocks


def compare(
    trained: PreTrainedModel,
    coverage: Coverage,
    artifact: Path,
    batches: Sequence[Batch],
) -> tuple[Fidelity, PreTrainedModel | None]:
    """Reload ``artifact`` and compare it with the trained module, in fp32.

    Args:
        trained: the prepared model in eval mode, quantizers on.
        coverage: its coverage.
        artifact: the directory that convert wrote.
        batches: text on which logits are compared.

    Returns:
        The result and the reloaded model (None when memory does not allow it).

    Raises:
        FidelityError: something differs.
    """
    stored = Stored(artifact)
    codes = [_code_problem(stored, matrix) for matrix in trained_matrices(trained, coverage)]
    problems = [problem for problem in codes if problem]
    reloaded: PreTrainedModel | None = None
    weights: list[str] = []
    worst: float | None = None
    blocks = 0
    need = sum(parameter.numel() for parameter in trained.parameters()) * 4 * 1.25
    free = psutil.virtual_memory().available
    if need <= free:
        reloaded = reload(artifact)
        weights = list(_weight_problems(trained, reloaded))
        problems += [problem for problem in weights if problem]
        worst, blocks = _logit_difference(trained, reloaded, batches)
        logits = "equal" if worst == 0.0 else "different"
    else:
        logits = f"not compared: needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    result = Fidelity(
        codes_equal=not any(codes),
        codes_compared=len(codes),
        weights_equal=None if reloaded is None else not any(weights),
        weights_compared=len(weights),
        logits=logits,
        logit_blocks=blocks,
        max_logit_diff=worst,
        problems=tuple(problems[:10]),
    )
    if not result.holds:
        raise FidelityError(
            f"the artifact is not the trained model: logits {logits} (largest difference "
            f"{worst}); {'; '.join(result.problems) or 'codes and weights are equal'}"
        )
    return result, reloaded
