"""Greedy tokens of vLLM on a CPU.

``python vllm_tokens.py JOBS.json`` reads ``{"prompts": [[id, ...], ...], "tokens": N,
"directories": [...]}`` and prints, as the last line, JSON: the versions, and for each directory its
tokens or the error that it gave. Runs in the environment ``vllm``; knows nothing of this project.
"""

import gc
import json
import os
import sys
from importlib import metadata
from typing import Any


def generate(directory: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy continuations of ``count`` tokens."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        disable_log_stats=True,
    )
    parameters = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    results = model.generate(inputs, parameters, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def main() -> None:
    """See the module."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    found: dict[str, Any] = {}
    for directory in jobs["directories"]:
        # the engine is a process of its own, which ends when the model is collected
        try:
            found[directory] = {"tokens": generate(directory, jobs["prompts"], jobs["tokens"])}
        except Exception as error:
            found[directory] = {"error": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()
    print(json.dumps({"versions": {"vllm-cpu": metadata.version("vllm-cpu")}, "found": found}))


if __name__ == "__main__":
    main()
