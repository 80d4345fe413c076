"""Exports read by programs of other people: GPTQModel, onnxruntime-genai, vLLM, llama.cpp.

``python tests/outside/run.py [READER ...]`` builds the environments that are missing (in the
directory QAT_OUTSIDE, see `environments`), makes tiny artifacts, exports them, lets each reader
answer in a process of its own and prints a table. Exit code 1 if an answer is wrong. A reader that
cannot be installed here, or takes longer than QAT_OUTSIDE_SECONDS (default 1200), is listed as
SKIPPED with the reason.
"""

import json
import os
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1"
)

import numpy  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qat.export import ExportOptions, export  # noqa: E402
from qat.scheme import Rule, Scheme  # noqa: E402
from qat_kernels import QuantSpec  # noqa: E402
from tests.outside import environments  # noqa: E402
from tests.qat.export.artifacts import make_artifact  # noqa: E402

READERS = Path(__file__).parent / "readers"
INT8 = QuantSpec(bits=8, granularity="channel", grid="absmax")
ASYMMETRIC = QuantSpec(symmetric=False, grid="absmax")
MODELS: dict[str, tuple[str, Scheme]] = {
    "llama int4 g32": ("llama", Scheme()),
    "llama_bias int4 g128": ("llama_bias", Scheme(weight=QuantSpec(group_size=128))),
    "qwen3 int4 g64": ("qwen3", Scheme(weight=QuantSpec(group_size=64, grid="absmax"))),
    "llama_tied int4 channel": ("llama_tied", Scheme(weight=QuantSpec(granularity="channel"))),
    "mistral int4 asymmetric": ("mistral", Scheme(weight=ASYMMETRIC)),
    "llama int8 channel": ("llama", Scheme(weight=INT8)),
    "llama int3": ("llama", Scheme(weight=QuantSpec(bits=3))),
    "llama int2 g64": ("llama", Scheme(weight=QuantSpec(bits=2, group_size=64))),
    "llama kept o_proj": ("llama", Scheme(rules=[Rule("*.0.*o_proj", action="keep")])),
}
FOR_GENAI = ["llama int4 g32", "llama_bias int4 g128", "mistral int4 asymmetric"]
FOR_VLLM = {
    "llama int4 g32": ["compressed-tensors", "gptq", "awq"],
    "llama_bias int4 g128": ["compressed-tensors", "gptq", "awq"],
    "qwen3 int4 g64": ["compressed-tensors", "gptq", "awq"],
    # vLLM refuses asymmetric GPTQ: bits=4, sym=False
    "mistral int4 asymmetric": ["compressed-tensors", "awq"],
}
GENAI_ERROR = 15 * 256 * 2.0**-24
"""Relative error of logits: 15 matmuls in a row, each a sum of at most 256 fp32 products whose
order is not ours, so off by less than 256 units of 2^-24."""


class Skipped(Exception):  # noqa: N818  (no error of what is tested)
    """A reader gave no answer; the message says why."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    reader: str
    model: str
    form: str
    result: str
    ok: bool | None
    """None: skipped."""


class Bench:
    """Artifacts and exports in a temporary directory, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 500, (2, 24), generator=generator)
        self.prompts = torch.randint(3, 500, (64, 8), generator=generator)

    def artifact(self, name: str) -> Path:
        """The artifact of one of `MODELS`."""
        path = self.root / name.replace(" ", "-")
        family, scheme = MODELS[name]
        return path if path.exists() else make_artifact(path, family, scheme)

    def export(self, name: str, form: str) -> Path:
        """It in a format; exact, or an exception."""
        source = self.artifact(name)
        out = source.with_name(f"{source.name}.{form}")
        if not out.exists():
            export(source, ExportOptions(form, str(out)))  # type: ignore[arg-type]
        return out

    def mislabelled(self, name: str) -> Path:
        """A GPTQ export of version 1 that says it is version 2."""
        source = self.export(name, "gptq")
        wrong = source.with_name(f"{source.name}-mislabelled")
        if not wrong.exists():
            shutil.copytree(source, wrong)
            for path in (wrong / "config.json", wrong / "quantize_config.json"):
                text = path.read_text(encoding="utf-8")
                path.write_text(text.replace('format": "gptq"', 'format": "gptq_v2"'), "utf-8")
        return wrong

    def model(self, name: str) -> Any:
        """The artifact in plain transformers, fp32: what readers are held against."""
        path = self.artifact(name)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def logits(self, name: str) -> Any:
        """Its logits, fp32 [B, T, V]."""
        with torch.no_grad():
            return self.model(name)(self.ids).logits.numpy()


def ask(environment: str, reader: str, jobs: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Run a reader in its environment; the JSON that it prints.

    Raises:
        Skipped: it took too long.
        RuntimeError: it failed; the message ends with what it said.
    """
    python = environments.interpreter(environments.root(), environment)
    path = bench.root / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    done = run([str(python), str(READERS / reader), str(path)])
    if done.returncode:
        raise RuntimeError(f"{reader} failed: {done.stderr.strip()[-600:]}")
    # the programs log to the same stream, some of them at their very end
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"versions"')]
    answer: dict[str, Any] = json.loads(answers[-1])
    print(f"{environment}: {answer['versions']}", flush=True)
    return answer


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program within the time limit; raises `Skipped` after it."""
    limit = environments.limit()
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, **options
        )
    except subprocess.TimeoutExpired:
        raise Skipped(f"no answer within {limit:.0f} s, the time that was left") from None


def ask_logits(
    bench: Bench, environment: str, reader: str, directories: dict[tuple[str, str], Path]
) -> dict[tuple[str, str], Any]:
    """(model, format) → logits [B, T, V] by a reader."""
    outs = {key: bench.root / f"logits-{i}.npy" for i, key in enumerate(directories)}
    jobs = {str(path): str(outs[key]) for key, path in directories.items()}
    ask(environment, reader, {"ids": bench.ids.tolist(), "directories": jobs}, bench)
    return {key: numpy.load(out) for key, out in outs.items()}


def gptqmodel(bench: Bench) -> Iterator[Row]:
    """Logits equal to the last bit; under the wrong label they are other ones."""
    reader, wrong = "GPTQModel", (next(iter(MODELS)), "gptq mislabelled")
    directories = {(n, f): bench.export(n, f) for n in MODELS for f in ("gptq", "gptq_v2")}
    directories[wrong] = bench.mislabelled(wrong[0])
    answers = ask_logits(bench, "gptqmodel", "gptq.py", directories)
    error = relative_error(answers.pop(wrong), bench.logits(wrong[0]))
    for (name, form), found in answers.items():
        expected = bench.logits(name)
        same = bool((found == expected).all())
        text = "logits equal" if same else f"logits differ by {abs(found - expected).max():.1e}"
        yield Row(reader, name, form, text, same)
    # every weight is off by a scale of a grid of 16
    yield Row(reader, *wrong, f"another model, as it must: error {error:.1e}", error > 0.1)
    yield export_beside_gptqmodel(bench)


def export_beside_gptqmodel(bench: Bench) -> Row:
    """``qat export`` where GPTQModel is installed, which then does the reading back."""
    name = "llama int3"
    paths = [str(ROOT), str(ROOT / "kernels"), *site.getsitepackages()]
    code = (
        f"import sys; sys.path += {paths!r}\n"
        "from qat.export import ExportOptions, export\n"
        f"for form in ('gptq', 'gptq_v2'):\n"
        f"    options = ExportOptions(form, {str(bench.root / 'beside')!r} + form)\n"
        f"    print('READ', export({str(bench.artifact(name))!r}, options).read_back.summary())\n"
    )
    python = environments.interpreter(environments.root(), "gptqmodel")
    done = run([str(python), "-c", code])
    lines = [line for line in done.stdout.splitlines() if line.startswith("READ ")]
    good = len(lines) == 2 and all("gptqmodel" in line and "differ" not in line for line in lines)
    text = lines[-1].removeprefix("READ ") if lines else done.stderr.strip()[-300:]
    return Row("GPTQModel", name, "qat export", text, good)


def genai(bench: Bench) -> Iterator[Row]:
    """Logits within the rounding of fp32 sums."""
    directories = {(name, "gptq"): bench.export(name, "gptq") for name in FOR_GENAI}
    answers = ask_logits(bench, "onnxruntime-genai", "genai.py", directories)
    for (name, form), found in answers.items():
        expected = bench.logits(name)
        error = relative_error(found, expected)
        text = f"relative error {error:.1e}, largest {abs(found - expected).max():.1e}"
        yield Row("onnxruntime-genai", name, form, text, error < GENAI_ERROR)


def relative_error(found: Any, expected: Any) -> float:
    """||found - expected|| / ||expected||."""
    return float(numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected))


def vllm(bench: Bench) -> Iterator[Row]:
    """The same greedy tokens, in bf16, for the prompts on which fp32 is most certain of them."""
    for name, wanted in FOR_VLLM.items():
        prompts, expected = certain_prompts(bench, name)
        forms = {form: bench.export(name, form) for form in wanted}
        jobs = {"prompts": prompts, "tokens": len(expected[0])}
        jobs["directories"] = [str(path) for path in forms.values()]
        found = ask("vllm", "vllm_tokens.py", jobs, bench)["found"]
        for form, path in forms.items():
            answer = found[str(path)]
            if "error" in answer:
                yield Row("vLLM (CPU)", name, form, " ".join(answer["error"].split())[:160], False)
                continue
            same = sum(a == b for a, b in zip(answer["tokens"], expected))
            text = f"{same} of {len(expected)} continuations equal"
            yield Row("vLLM (CPU)", name, form, text, same == len(expected))


def certain_prompts(
    bench: Bench, name: str, count: int = 4, tokens: int = 8
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts whose greedy continuation has the largest least margin, and that continuation.

    vLLM computes in bf16, which may swap two tokens of nearly equal logits; of 64 random prompts
    these are the least exposed to that.
    """
    model, ids = bench.model(name), bench.prompts
    margins = torch.full((len(ids),), float("inf"))
    with torch.no_grad():
        for _ in range(tokens):
            best = model(ids).logits[:, -1].topk(2)
            margins = torch.minimum(margins, best.values[:, 0] - best.values[:, 1])
            ids = torch.cat([ids, best.indices[:, :1]], dim=1)
    chosen = ids[margins.argsort(descending=True)[:count]]
    length = bench.prompts.shape[1]
    return chosen[:, :length].tolist(), chosen[:, length:].tolist()


def llama_cpp(bench: Bench) -> Iterator[Row]:
    """Its tests are a pytest file of their own."""
    del bench
    path = Path(__file__).parent / "test_llama_cpp.py"
    done = run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--no-header", str(path)],
        cwd=ROOT,
        env=os.environ | {"QAT_OUTSIDE": str(environments.root())},
    )
    lines = done.stdout.strip().splitlines() or [done.stderr[-200:]]
    passed = done.returncode == 0 and "passed" in lines[-1] and "skipped" not in lines[-1]
    yield Row("llama.cpp", "see the test file", "gguf", lines[-1].strip("= "), passed)
    if not passed:
        print(done.stdout[-6000:])


CHECKS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "gptqmodel": gptqmodel,
    "onnxruntime-genai": genai,
    "llama-cpp-python": llama_cpp,
    "vllm": vllm,
}
"""Environment → what is checked in it."""


def check(name: str, bench: Bench) -> list[Row]:
    """The rows of one environment, printed as they come."""
    start, rows = time.monotonic(), []
    found = environments.ready(name)
    try:
        if not found["built"]:
            raise Skipped(str(found["reason"]))
        for row in CHECKS[name](bench):
            rows.append(row)
            show(row)
    except Skipped as reason:
        rows.append(Row(name, "", "", str(reason), None))
        show(rows[-1])
    except Exception as error:
        # a reader that fails is a wrong answer: the others are asked all the same
        rows.append(Row(name, "", "", f"{type(error).__name__}: {error}", False))
        show(rows[-1])
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return rows


def show(row: Row) -> None:
    """Print one line of the table."""
    verdict = {True: "ok", False: "WRONG", None: "SKIPPED"}[row.ok]
    print(f"{verdict:8}{row.reader:19}{row.model:25}{row.form:20}{row.result}", flush=True)


def main(names: list[str]) -> int:
    """Check the environments with these names, or all; the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        rows = [row for name in names or list(CHECKS) for row in check(name, bench)]
    counts = {state: sum(row.ok is state for row in rows) for state in (True, False, None)}
    print(f"{counts[True]} ok, {counts[False]} wrong, {counts[None]} skipped")
    return 1 if counts[False] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
