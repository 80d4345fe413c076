"""What to do about memory: a warning before the run, and advice when it was not enough."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from qat.errors import is_out_of_memory
from qat.memory import Prediction

REMEDIES = {
    "activations": "lower trainer.micro_batch_size or text.seq_len, or set "
    "trainer.activation_checkpointing=true",
    "optimizer": "optim.name=adamw_8bit or paged_adamw_8bit",
    "gradients": "a lower adapter.rank, or an adapter recipe such as qlora_nf4",
    "weights": "an adapter recipe with adapter.base=nf4, or a smaller model",
    "finish": "lower evaluate.batch_size (the end compares whole models in fp32)",
}
"""Part of the estimate → what lowers it."""


def advice(prediction: Prediction) -> str:
    """What takes memory by the estimate, the largest first, and what lowers it."""
    parts = {
        "activations": prediction.activations,
        "optimizer": prediction.optimizer,
        "gradients": prediction.gradients,
        "weights": prediction.weights,
        "finish": prediction.phases["finish"],
    }
    ordered = sorted(parts, key=lambda name: -parts[name])
    return "\n".join(
        [
            "By the estimate (dry_run=true shows all of it), largest first:",
            *[
                f"  {name:<12}{parts[name] / 2**30:>7.2f} GiB   {REMEDIES[name]}"
                for name in ordered
            ],
        ]
    )


@contextmanager
def advised(prediction: Prediction) -> Iterator[None]:
    """Warn if a phase will probably not fit into RAM; attach `advice` to what fails for that."""
    free = psutil.virtual_memory().available
    phase, need = max(prediction.phases.items(), key=lambda item: item[1])
    if need > free:
        print(
            f"warning: the phase '{phase}' needs about {need / 2**30:.1f} GiB of RAM, and "
            f"{free / 2**30:.1f} GiB are free.\n{advice(prediction)}",
            file=sys.stderr,
        )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            error.add_note(advice(prediction))
        raise
