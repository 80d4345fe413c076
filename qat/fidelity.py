"""Fidelity: the artifact on disk is the model that was trained, or the run fails.

The artifact is read back with code that this project did not write: plain transformers loads the
model, compressed-tensors unpacks the codes. Codes, weights and logits must be equal, not close;
what was not compared is reported as not compared.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from qat.convert import TrainedMatrix, kept_tensors, merged_tensors, trained_matrices
from qat.loss import forward_logits
from qat.packing import Batch
from qat.prepare import Coverage
from qat.trained import kept_parameters, quantized_parameters
from qat_kernels import fake_quantize


class FidelityError(RuntimeError):
    """The artifact differs from the trained model."""


@dataclass(frozen=True)
class Fidelity:
    """What was compared, with what result."""

    codes_equal: bool
    """What the files hold equals what was trained: codes as unpacked by compressed-tensors, scales,
    zero points, input scales, kept parameters; and they hold nothing else."""
    codes_compared: int
    """Number of weight matrices compared."""
    weights_equal: bool | None
    """Each parameter and persistent buffer of the reloaded model equals the trained one; None: not
    compared."""
    weights_compared: int
    """Number of parameters and buffers compared."""
    logits: str
    """equal, or not compared (with the reason); a difference is an error."""
    logit_blocks: int
    """Text blocks whose logits were compared."""
    max_logit_diff: float | None
    """Largest absolute difference of a logit; None: not compared."""


def reload(artifact: Path) -> PreTrainedModel:
    """A written model in plain transformers, fp32; packed ones are unpacked by compressed-tensors.

    Raises:
        FidelityError: a tensor of the file has no place in the model, or the other way round.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(artifact), dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        model.eval()
        # compressed-tensors unpacks a layer at its first forward pass
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
    except Exception as error:
        raise FidelityError(
            f"{artifact}: plain transformers cannot load it ({type(error).__name__}: {error})"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise FidelityError(f"{artifact}: {kind}: {sorted(map(str, info[kind]))[:5]}")
    return model


class Stored:
    """The tensors of an artifact's safetensors files, read one at a time.

    Raises:
        FidelityError: a file is damaged.
    """

    def __init__(self, artifact: Path) -> None:
        self.files: dict[str, Path] = {}
        self.read: set[str] = set()
        for path in sorted(artifact.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self.files.update(dict.fromkeys(file.keys(), path))
            except SafetensorError as error:
                raise FidelityError(f"{path}: cannot be read ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        self.read.add(name)
        return tensor


def _stored_codes(stored: Stored, matrix: TrainedMatrix, bits: int) -> Tensor:
    """int8 codes [N, K] of one matrix, unpacked by compressed-tensors."""
    prefix = matrix.prefix
    if f"{prefix}.weight_packed" not in stored:
        return stored[f"{prefix}.weight"]
    shape = torch.Size(stored[f"{prefix}.weight_shape"].tolist())
    if shape != matrix.codes.shape:
        # the unpacking below would cut off or ignore what does not fit
        raise ValueError(f"weight_shape is {tuple(shape)}, not {tuple(matrix.codes.shape)}")
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
        if not torch.equal(_stored_codes(stored, matrix, spec.bits), matrix.codes):
            return f"{prefix}: codes differ"
        scale = stored[f"{prefix}.weight_scale"].float()
        if not torch.equal(scale.flatten(), matrix.scale.flatten()):
            return f"{prefix}: scales differ"
        if matrix.zero_point is not None:
            zero_point = _stored_zero_point(stored, prefix, matrix, spec.bits)
            if not torch.equal(zero_point.flatten(), matrix.zero_point.flatten()):
                return f"{prefix}: zero points differ"
        static = matrix.input_scale
        if static is not None and not torch.equal(stored[f"{prefix}.input_scale"], static):
            return f"{prefix}: the input scale differs"
    except KeyError as error:
        return f"{error.args[0]} is missing"
    except (ValueError, RuntimeError) as error:
        return f"{prefix}: {error}"
    return ""


def _check_files(artifact: Path, trained: PreTrainedModel, coverage: Coverage) -> int:
    """Compare what the files hold with the trained model; the number of weight matrices.

    Raises:
        FidelityError: a tensor differs, is missing, or does not belong there.
    """
    stored = Stored(artifact)
    matrices = [_code_problem(stored, matrix) for matrix in trained_matrices(trained, coverage)]
    problems = [problem for problem in matrices if problem]
    for name, value in kept_tensors(trained, coverage):
        if name not in stored:
            problems.append(f"{name} is missing")
        elif not torch.equal(stored[name], value):
            problems.append(f"{name} differs")
    if not problems:
        extra = [name for name in stored.files if name not in stored.read]
        problems = [f"{name} does not belong there" for name in extra]
    _raise_for(problems, "the artifact")
    return len(matrices)


def _raise_for(problems: Sequence[str], what: str) -> None:
    """Raise FidelityError that names the first of some differences, if there are any."""
    if problems:
        raise FidelityError(f"{what} is not the trained model: {'; '.join(problems[:10])}")


@torch.no_grad()
def _computed_with(trained: PreTrainedModel, coverage: Coverage) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of what a model computes with, tied parameters under each of their names."""
    for item in quantized_parameters(trained):
        yield item.name, fake_quantize(item.weight, item.quantizer.spec)
    kept = set()
    for name, value, dtype in kept_parameters(trained):
        kept.add(name)
        yield name, value.to(dtype)
    for name, value in kept_tensors(trained, coverage):
        if name not in kept:
            yield name, value


def _weight_problems(
    expected: Iterable[tuple[str, Tensor]], reloaded: PreTrainedModel
) -> Iterator[str]:
    """Compare a model's parameters and buffers, each in fp32: "" or a problem for each of them."""
    found = dict(reloaded.named_parameters(remove_duplicate=False))
    found |= dict(reloaded.named_buffers(remove_duplicate=False))
    for name, value in expected:
        if name not in found:
            yield f"{name} is missing after reloading"
        else:
            same = torch.equal(found[name].float(), value.float())
            yield "" if same else f"{name} differs after reloading"


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


def check_merged(
    trained: PreTrainedModel, coverage: Coverage, merged: PreTrainedModel, dtype: torch.dtype
) -> None:
    """Compare parameters and buffers of ``merged/``, as reloaded, with what was merged.

    Raises:
        FidelityError: one differs, or is missing.
    """
    problems = _weight_problems(merged_tensors(trained, coverage, dtype), merged)
    _raise_for([problem for problem in problems if problem], "merged/")


def check_logits(
    trained: PreTrainedModel, reloaded: PreTrainedModel, batches: Sequence[Batch], what: str
) -> None:
    """Compare the logits of what was trained with those of its copy on disk, in fp32.

    Raises:
        FidelityError: they differ.
    """
    worst, _ = _logit_difference(trained, reloaded, batches)
    if worst != 0.0:
        raise FidelityError(f"{what}: logits differ from the trained model's by up to {worst}")


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
    matrices = _check_files(artifact, trained, coverage)
    # by the coverage: a frozen 4-bit base holds its weights in buffers of half a byte each
    need = sum(entry.numel for entry in coverage.entries) * 4 * 1.25
    free = psutil.virtual_memory().available
    if need > free:
        why = f"not compared: needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        return Fidelity(True, matrices, None, 0, why, 0, None), None
    reloaded = reload(artifact)
    weights = list(_weight_problems(_computed_with(trained, coverage), reloaded))
    worst, blocks = _logit_difference(trained, reloaded, batches)
    problems = [problem for problem in weights if problem]
    if worst != 0.0:
        problems.append(f"logits differ by up to {worst}")
    _raise_for(problems, "the artifact")
    result = Fidelity(
        codes_equal=True,
        codes_compared=matrices,
        weights_equal=True,
        weights_compared=len(weights),
        logits="equal" if blocks else "not compared: no text was given",
        logit_blocks=blocks,
        max_logit_diff=worst if blocks else None,
    )
    return result, reloaded
