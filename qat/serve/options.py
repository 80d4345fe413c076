"""Options of ``qat serve``."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from qat.serve.engine import EngineOptions

API_KEY = "QAT_API_KEY"
"""Environment variable with the API key; unlike a word of the command line, others cannot see it
in the list of processes."""


@dataclass(frozen=True)
class ServeOptions(EngineOptions):
    """Options of ``qat serve``."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine, then set an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that clients must send as ``Authorization: Bearer KEY``; null takes the environment
    variable QAT_API_KEY, and asks for none when that is unset. The page and /health are open."""
    engine: Literal["qat", "vllm", "llama.cpp"] = "qat"
    """What computes: this project's kernels, or vLLM or llama.cpp where they are installed."""
    lora: tuple[str, ...] = ()
    """Further LoRA adapters for the base of an nf4/ directory, NAME=DIRECTORY each."""
    max_queued: int = 256
    """Most sequences that wait for a place in the batch; further requests get status 429."""
    max_answers: int = 64
    """Most sequences of one request: its prompts times n."""
    max_tokens: int | None = None
    """Most tokens of one answer; null leaves it to the context."""
    max_body_mib: float = 4.0
    """Largest body of a request, MiB."""
    drain_seconds: float = 120.0
    """After the signal to stop, how long the accepted requests may take to finish."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API, such as https://example.org."""
    access_log: bool = False
    """Log a line for each request."""
    engine_python: Path | None = None
    """Python of another environment that holds vllm or llama_cpp; null takes this one."""
    gguf: Path | None = None
    """For engine=llama.cpp, the model's GGUF file: used if it is there, else written and kept.
    Null writes a temporary one."""
    adapters: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port}: 0 to 65535")
        for name in ("max_queued", "max_answers", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least 1")
        if self.max_body_mib <= 0:
            raise ValueError(f"max_body_mib={self.max_body_mib}: above 0")
        if self.drain_seconds < 0:
            raise ValueError(f"drain_seconds={self.drain_seconds}: 0 or more")
        for word in self.lora:
            name, equals, directory = word.partition("=")
            if not (name and equals and directory):
                raise ValueError(f"lora={word}: NAME=DIRECTORY")
            if name in self.adapters:
                raise ValueError(f"lora={word}: {name} is given twice")
            self.adapters[name] = directory

    @property
    def key(self) -> str | None:
        """The API key: the option, else the environment variable.

        Raises:
            ValueError: it is set but empty, which could open a server by accident.
        """
        if self.api_key is not None:
            found, source = self.api_key, "api_key"
        elif API_KEY in os.environ:
            found, source = os.environ[API_KEY], API_KEY
        else:
            return None
        # a header loses its outer blanks on the way
        if not found.strip():
            raise ValueError(f"{source} is set but empty; leave it unset to serve without a key")
        return found.strip()
