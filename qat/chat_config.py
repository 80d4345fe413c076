"""The configuration of instruction data."""

from dataclasses import dataclass
from typing import Literal

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]


@dataclass(frozen=True)
class ChatConfig:
    """Instruction data: which rows, which template, which tokens are trained on."""

    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Form of the rows; auto goes by the columns of the first ones, and says what it chose."""
    messages_column: str = "messages"
    """Column with the list of messages; where the default is absent, conversations is taken."""
    prompt_column: str = "prompt"
    """Column with the prompt, beside prompt_completion's other one."""
    completion_column: str = "completion"
    """Column with the completion."""
    template: str | None = None
    """Chat template: plain, chatml, llama3, alpaca, a .jinja file, or null for the tokenizer's."""
    system: str | None = None
    """System message of the conversations that have none; null adds nothing."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Tokens with a loss: those of the assistant's turns, or all."""
    max_bad_rows: float = 0.01
    """Share of rows that may be unusable; they are left out and reported. More stop the run."""

    def __post_init__(self) -> None:
        """Raise ValueError for values that cannot be meant."""
        if not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows={self.max_bad_rows}: a share, from 0 to 1")
        for name in ("messages_column", "prompt_column", "completion_column"):
            if not getattr(self, name):
                raise ValueError(f"{name}=: the name of a column")
        if self.prompt_column == self.completion_column:
            raise ValueError(
                f"completion_column={self.completion_column}: another column than prompt_column"
            )

    @property
    def names_prompt(self) -> bool:
        """Whether the two columns were named, which says that the rows have them."""
        return (self.prompt_column, self.completion_column) != ("prompt", "completion")
