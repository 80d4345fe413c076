"""Text generation: from an artifact on packed weights (`generate`), or from a model (`sample`)."""

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qat.decode_graph import StaticDecoding, covers
from qat.errors import UserError
from qat.kv_cache import make_cache
from qat.models import load_tokenizer
from qat.runtime import load_packed, read_artifact_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateOptions:
    """Options of ``qat generate``."""

    max_new_tokens: int = 64
    """Most tokens to generate; ends earlier at an end-of-text token."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above 0 samples, 1 from the model's distribution."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens that add up to this probability: above 0, at most 1."""
    seed: int = 0
    """Seed of the sampling; the same seed gives the same text."""
    chat: bool = True
    """Wrap the prompt in the tokenizer's chat template, where it has one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of activations and kept weights; float32 computes what plain transformers computes."""
    kv_cache: Literal["none", "int8", "int4"] = "none"
    """Keys and values in codes of 8 or 4 bits: less memory; none keeps them in ``dtype``."""
    device: str | None = None
    """Device such as cpu or cuda:0; null takes the first GPU, else the CPU."""
    cuda_graphs: bool = True
    """On a GPU, launch a step as one CUDA graph, for models with full attention and kv_cache=none.
    A first step that is not equal bit for bit switches it off. Ignored on the CPU."""
    compile: bool = False
    """Compile the decoding step by torch.compile: minutes before the first token, and results may
    round differently. For models with full attention and kv_cache=none."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: above 0 and at most 1")
        if self.compile and self.kv_cache != "none":
            raise ValueError(
                "compile=true: a quantized KV cache is not compiled; use kv_cache=none"
            )


def generate(
    artifact: Path | str, prompt: str, options: GenerateOptions | None = None, stream: bool = False
) -> str:
    """Continue ``prompt`` with the model of an artifact, on packed weights.

    Args:
        artifact: the ``artifact/`` directory of a run.
        prompt: the text to continue, or the user's turn of a chat.
        options: see `GenerateOptions`; None takes its defaults.
        stream: print the text to stdout while it is generated, and the speed to stderr.

    Returns:
        The generated text without the prompt.

    Raises:
        UserError: not a whole artifact, no tokenizer in it, a device that is not there, a prompt
            that is empty or longer than the model's context, or a model whose attention a
            quantized cache does not cover.
    """
    options = options or GenerateOptions()
    path = Path(artifact)
    device = find_device(options.device)
    # the cheap checks first: loading can take minutes
    read_artifact_config(path)
    tokenizer = _tokenizer(path)
    model = load_packed(path, getattr(torch, options.dtype), device)
    start = time.perf_counter()
    new_ids = _generate_ids(model, tokenizer, prompt, options, stream)
    seconds = time.perf_counter() - start
    if stream:
        print(
            f"{new_ids.numel()} tokens in {seconds:.2f} s, {new_ids.numel() / seconds:.1f} "
            f"tokens/s ({options.dtype} on {device}, the prompt included)",
            file=sys.stderr,
        )
    text: str = tokenizer.decode(new_ids, skip_special_tokens=True)
    return text


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
) -> str:
    """The greedy continuation of ``prompt``, without the prompt.

    ``chat`` puts the prompt as a user's turn into the tokenizer's chat template.

    The model's training mode and the random state are left as they were.

    Raises:
        UserError: the prompt is empty or longer than the model's context.
    """
    options = GenerateOptions(max_new_tokens=max_new_tokens, chat=chat)
    training = model.training
    model.eval()
    try:
        new_ids = _generate_ids(model, tokenizer, prompt, options, stream=False)
    finally:
        model.train(training)
    text: str = tokenizer.decode(new_ids, skip_special_tokens=True)
    return text


def find_device(name: str | None) -> torch.device:
    """The device of that name; None: the first GPU, else the CPU.

    Raises:
        UserError: no device of that name is here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: cpu, cuda or cuda:N") from error
    found = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: packed weights run on cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"device={name}: this machine has {found} CUDA devices; use device=cpu")
    return device


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(str(path))
    except UserError as error:
        raise UserError(str(error).replace("model=", "artifact=", 1)) from error


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: GenerateOptions
) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` [1, T] of the prompt."""
    if options.chat and tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        # the template has written the special tokens
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise UserError("the prompt is empty and this tokenizer has no token to start a text with")
    input_ids = torch.tensor([ids])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    if options.temperature == 0:
        # None switches off what a model's own generation_config may ask for
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": 0,
    }


def _decoding(model: PreTrainedModel, options: GenerateOptions) -> dict[str, Any]:
    """How steps are launched: transformers' own loop, or `StaticDecoding` where it has a use."""
    graphs = options.cuda_graphs and options.kv_cache == "none" and model.device.type == "cuda"
    if not (graphs or options.compile):
        return {}
    if not covers(model):
        if options.compile:
            log.warning("compile: %s is not covered; decoding without", model.config.model_type)
        return {}
    return {"custom_generate": StaticDecoding(model, graphs, options.compile)}


@torch.no_grad()
def _generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: GenerateOptions,
    stream: bool,
) -> torch.Tensor:
    """The new token ids [T]."""
    device = next(model.parameters()).device
    inputs = {name: ids.to(device) for name, ids in _encode(tokenizer, prompt, options).items()}
    length = inputs["input_ids"].shape[1]
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and length + options.max_new_tokens > context:
        raise UserError(
            f"max_new_tokens={options.max_new_tokens}: with the prompt's {length} tokens it passes "
            f"the model's context of {context}; shorten the prompt or generate less"
        )
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    # the caller may be in the middle of a training run: its random state stays untouched
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        output = model.generate(
            **inputs,
            max_new_tokens=options.max_new_tokens,
            eos_token_id=end,
            pad_token_id=0 if pad is None else pad,
            streamer=streamer if stream else None,
            **make_cache(model, options.kv_cache, length + options.max_new_tokens),
            **_decoding(model, options),
            **_sampling(options),
        )
    new_ids: torch.Tensor = output[0, length:]
    return new_ids
