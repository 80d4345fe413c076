"""Logits of GPTQ directories by transformers, optimum and GPTQModel's torch kernel.

``python gptq.py JOBS.json`` reads ``{"ids": [[id, ...], ...], "directories": {DIRECTORY: OUT}}``,
writes fp32 logits [B, T, V] of each directory to OUT and prints the versions as JSON. Runs in the
environment ``gptqmodel``; knows nothing of this project.
"""

import json
import sys
from importlib import metadata
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, GPTQConfig


def logits(directory: str, ids: torch.Tensor) -> Any:
    """Logits in fp32, every quantized layer on GPTQModel's torch kernel."""
    with open(f"{directory}/config.json", encoding="utf-8") as file:
        bits = json.load(file)["quantization_config"]["bits"]
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        device_map="cpu",
        # what stands in config.json holds, but for the kernel
        quantization_config=GPTQConfig(bits=bits, backend="torch"),
    ).eval()
    layers = [module for module in model.modules() if hasattr(module, "qweight")]
    kernels = {type(layer).__name__ for layer in layers}
    if kernels != {"TorchLinear"}:
        raise RuntimeError(f"other kernels than TorchLinear: {kernels}")
    for layer in layers:
        # held in fp16; products in fp32 are those of the trained weights
        layer.scales = layer.scales.float()
    with torch.no_grad():
        return model(ids).logits.float().numpy()


def main() -> None:
    """See the module."""
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for directory, out in jobs["directories"].items():
        numpy.save(out, logits(directory, torch.tensor(jobs["ids"])))
    versions = {name: metadata.version(name) for name in ("gptqmodel", "optimum", "transformers")}
    print(json.dumps({"versions": versions}))


if __name__ == "__main__":
    main()
