"""Logits of GPTQ directories by onnxruntime-genai, which builds its own ONNX models from them.

``python genai.py JOBS.json`` reads ``{"ids": [[id, ...], ...], "directories": {DIRECTORY: OUT}}``,
writes fp32 logits [B, T, V] of each directory to OUT and prints the versions as JSON. Runs in the
environment ``onnxruntime-genai``; knows nothing of this project.
"""

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from typing import Any

import numpy


def logits(directory: str, tokens: Any) -> Any:
    """Logits in fp32 of the model that the builder makes."""
    import onnxruntime_genai

    with tempfile.TemporaryDirectory() as built:
        # level 1 multiplies in fp32, and the head was never quantized
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", directory]
        builder += ["-o", f"{built}/model", "-c", f"{built}/cache", "-p", "int4", "-e", "cpu"]
        extra = ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul"]
        done = subprocess.run(
            [*builder, "--extra_options", *extra], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"the builder failed: {done.stderr[-2000:]}")
        model = onnxruntime_genai.Model(f"{built}/model")
        rows = []
        for row in tokens:
            parameters = onnxruntime_genai.GeneratorParams(model)
            parameters.set_search_options(max_length=tokens.shape[1] + 1)
            generator = onnxruntime_genai.Generator(model, parameters)
            generator.append_tokens(row[None])
            rows.append(generator.get_output("logits")[0])
    return numpy.stack(rows).astype(numpy.float32)


def main() -> None:
    """See the module."""
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for directory, out in jobs["directories"].items():
        numpy.save(out, logits(directory, numpy.array(jobs["ids"], dtype=numpy.int32)))
    names = ("onnxruntime-genai", "onnxruntime")
    print(json.dumps({"versions": {name: metadata.version(name) for name in names}}))


if __name__ == "__main__":
    main()
