"""Reads GGUF files with llama-cpp-python; runs in an environment that need not have torch.

``python llama_cpp_reader.py JOBS.json``: a list of ``{"model", "ids", "texts", "talk"}``. Beside
each model it leaves ``MODEL.npy`` (fp32 logits [T, V] of ids) and ``MODEL.read.json`` with the
token ids of each text and the text back from them, the talk in the file's chat template, and the
number of tokens that the model answers.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

F32 = 0
"""GGML type of the KV cache: as transformers keeps it, so that only activations are rounded."""


def read(job: dict) -> None:
    """Do one job."""
    model = llama_cpp.Llama(
        job["model"],
        n_ctx=256,
        n_batch=256,
        n_threads=1,
        logits_all=True,
        type_k=F32,
        type_v=F32,
        verbose=False,
    )
    try:
        model.eval(job["ids"])
        logits = np.array(model.scores[: len(job["ids"])], dtype=np.float32)
        np.save(job["model"] + ".npy", logits)
        found = {
            "tokens": [
                model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]
            ],
            "back": [
                model.detokenize(model.tokenize(t.encode(), add_bos=False)).decode("utf-8")
                for t in job["texts"]
            ],
        }
        if job["talk"]:
            model.reset()
            formatter = Jinja2ChatFormatter(
                template=model.metadata["tokenizer.chat_template"], bos_token="", eos_token="</s>"
            )
            found["prompt"] = formatter(messages=job["talk"]).prompt
            answer = model.create_chat_completion(job["talk"], max_tokens=4, temperature=0.0)
            found["answer"] = answer["usage"]["completion_tokens"]
        Path(job["model"] + ".read.json").write_text(json.dumps(found), encoding="utf-8")
    finally:
        model.close()


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        read(each)
