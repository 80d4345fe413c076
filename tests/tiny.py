"""Randomly initialised tiny models of the supported architectures, built from configurations."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

VOCAB = 256
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GQA = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**BASE, tie_word_embeddings=True),
    "llama_bias": LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "mistral": MistralConfig(**BASE, sliding_window=16),
    "gemma": GemmaConfig(**BASE, head_dim=16),
    "gemma2": Gemma2Config(**BASE, head_dim=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(**BASE, head_dim=16, sliding_window=16),
    "phi": PhiConfig(**BASE),
    "phi3": Phi3Config(**BASE),
    "gpt_neox": GPTNeoXConfig(**NO_GQA),
    "stablelm": StableLmConfig(**BASE),
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon": FalconConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=True,
        alibi=False,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mixtral": MixtralConfig(**BASE, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **BASE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode whose weights are not on the bf16 grid."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # larger than initialisation, and norms that are not all ones
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 entries: three special tokens and the ASCII range."""
    alphabet = sorted(ByteLevel.alphabet())[: VOCAB - 3]
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    model = Tokenizer(BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_batch(blocks: int = 2, tokens: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random packed blocks of one document each; see qat.module for the fields."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (blocks, tokens), generator=generator)
    return {
        "input_ids": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(tokens).expand(blocks, -1),
        "segment_ids": torch.ones(blocks, tokens, dtype=torch.int32),
        "loss_tokens": torch.tensor(blocks * tokens),
    }


def save_tiny(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model with its tokenizer as a model directory on disk."""
    tiny(family).to(dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
