"""Training of the demo model's tokenizer: byte-level BPE, lossless for every UTF-8 text.

Pre-tokenization is GPT-2's regular expression, the one that other formats know by name (GGUF
calls it `gpt-2`), and nothing is normalised, so decoding returns the very bytes that went in.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The only special token, id 0: it stands between documents and starts and pads a text."""

_BYTES = 256


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `documents` and return it in transformers' form.

    `vocab_size` counts the special token and the 256 byte tokens; the same documents in the same
    order give the same tokenizer. `save_pretrained` writes a directory that
    `AutoTokenizer.from_pretrained` reads.

    Raises ValueError where `vocab_size` leaves no room for the bytes, or where the documents are
    too small to fill it.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(f"vocab_size={vocab_size}: at least {_BYTES + 1}, the bytes and one more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: the documents hold merges for {found} tokens only; "
            f"use more text or vocab_size={found}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
