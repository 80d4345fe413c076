"""What an adapter run is made of: tokenizer, original weights, and the models built from them."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.demo import model_path
from qat.adapter_config import AdapterConfig
from qat.adapter_state import in_fp32, trained_state
from qat.adapters import prepare_adapters
from qat.fake_quant import set_enabled
from qat.models import BITSANDBYTES, load_config, load_tokenizer
from qat.original import OriginalWeights
from qat.prepare import KEEP_DTYPES, Coverage
from qat.training import training_device
from recipes.config import AdapterRunConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """The parts of one run."""

    config: AdapterRunConfig
    """The run's."""
    tokenizer: PreTrainedTokenizerFast
    """With the new tokens."""
    original: OriginalWeights
    """With rows for the new tokens."""
    new_rows: list[int]
    """Ids of the new tokens."""

    @classmethod
    def load(cls, config: AdapterRunConfig) -> "Parts":
        """Read what the configuration names; no weight is read yet."""
        path = model_path(config.model)
        shape = load_config(path, allow=BITSANDBYTES).get_text_config()
        tokenizer = load_tokenizer(path, shape.vocab_size)
        new = config.adapter.new_tokens
        if new:
            known = [token for token in new if token in tokenizer.get_vocab()]
            if known:
                log.warning("adapter.new_tokens: %s exist; their rows are trained", known)
            tokenizer.add_special_tokens(
                {"additional_special_tokens": new}, replace_extra_special_tokens=False
            )
        original = OriginalWeights(path, rows=len(tokenizer) if new else 0)
        ids = [int(i) for i in tokenizer.convert_tokens_to_ids(new)]
        return cls(config, tokenizer, original, ids)

    @property
    def keep(self) -> torch.dtype:
        """Dtype of what is not quantized."""
        return KEEP_DTYPES[self.config.scheme.keep_dtype]

    @property
    def storage(self) -> torch.dtype:
        """Dtype in which training holds it."""
        return torch.float32 if self.config.trainer.precision == "32-true" else self.keep

    @property
    def baseline(self) -> AdapterConfig:
        """Adapters of the 16-bit baseline."""
        return replace(self.config.adapter, base="16bit", init="default")

    def build(self, adapter: AdapterConfig, load: bool = True) -> tuple[PreTrainedModel, Coverage]:
        """A base with its adapters, where it will be trained; on the meta device without `load`."""
        device = training_device(self.config.trainer) if load else "cpu"
        scheme, seed = self.config.scheme, self.config.seed
        return prepare_adapters(
            self.original, adapter, scheme, seed, self.storage, device, self.new_rows, load
        )

    def finetuned(self, checkpoint: Path) -> PreTrainedModel:
        """The trained 16-bit baseline, in its plain form."""
        model, _ = self.build(self.baseline)
        saved = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        state = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
        assert trained_state(model) == state.keys()
        model.load_state_dict(state, strict=False)
        model.cpu()
        in_fp32(model)
        set_enabled(model, False)
        return model
