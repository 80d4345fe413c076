"""What a client may send to the generation endpoints: OpenAI's fields, checked.

Nothing that changes the answer is ignored: a parameter that this server lacks is refused by name
unless it carries its neutral value, and so is one that nobody knows. Only fields that say
something about the caller (``user``, ``metadata`` ...) are accepted and left alone.
Reference: the OpenAI API, "Create chat completion" and "Create completion".
"""

import json
from abc import abstractmethod
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from qat.errors import did_you_mean
from qat.serve.errors import ApiError

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Fields about the caller, its account, or calls of tools, which are refused by themselves."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (0, -1),
    "min_p": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters that this server lacks, with the values (beside null) that ask for nothing."""

MAX_STOPS = 4
MAX_LOGPROBS = 20
LONGEST_NAME = 64
"""Characters of a parameter's name that are compared with the known ones."""
MAX_ITEMS = 4096
"""Messages or prompts of one request: checking them all keeps everyone waiting meanwhile."""
Request = TypeVar("Request", bound="GenerationRequest")


def _wrong(message: str) -> PydanticCustomError:
    # braces would be read as a template
    return PydanticCustomError("value", "{text}", {"text": message})


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    """Send the token counts in a last chunk of their own."""
    include_obfuscation: bool | None = None
    """Padding against traffic analysis, which this server never sends."""


class GenerationRequest(BaseModel):
    """The fields that both endpoints share; null takes the default."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    """Name of the weights; None takes the artifact's."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # JSON's integers have no end, and Python prints none of more than 4300 digits
    n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: list[str] | None = None
    ignore_eos: bool | None = None
    """Go on after end-of-text tokens, up to max_tokens (an extension, for benchmarks)."""

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> list[str] | None:
        if value is None:
            return None
        stops = [value] if isinstance(value, str) else value
        if (
            not isinstance(stops, list)
            or not all(isinstance(stop, str) and stop for stop in stops)
            or len(stops) > MAX_STOPS
        ):
            raise _wrong(f"a string or a list of at most {MAX_STOPS} strings, none of them empty")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate, None when the client left it open."""
        return self.max_tokens

    @property
    @abstractmethod
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to report beside each token; None: no log-probabilities."""


class Message(BaseModel):
    """One turn of a chat, its content as text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: str
    content: str
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Any = None
    tool_calls: Any = None
    function_call: None = None

    @field_validator("role")
    @classmethod
    def _role(cls, value: str) -> str:
        if value not in ("system", "developer", "user", "assistant"):
            raise _wrong(f"{value!r}: system, developer, user or assistant (no tools here)")
        return "system" if value == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise _wrong('a string or a list of parts {"type": "text", "text": ...}')
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            text = part.get("text") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(text, str):
                raise _wrong(f"a part of type {kind!r}: this model reads text parts only")
            texts.append(text)
        return "".join(texts)

    @field_validator("tool_calls")
    @classmethod
    def _no_tools(cls, value: Any) -> None:
        if value not in (None, []):
            raise _wrong("this server runs no tools")


class ChatRequest(GenerationRequest):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS), FailFast()]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value and not info.data.get("logprobs"):
            raise _wrong("needs logprobs=true")
        return value

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; ``max_completion_tokens`` is the newer name."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to report beside each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """The body of ``POST /v1/completions``."""

    prompt: list[str] | list[list[int]]
    """One or more prompts, as text or as token ids; a single one arrives as a list of one."""
    echo: bool | None = None
    """Put the prompt in front of the answer."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            # bool is an int of Python's, but no token id
            if all(type(item) is int for item in value):
                return [value]
            if len(value) > MAX_ITEMS:
                raise _wrong(f"{len(value)} prompts, at most {MAX_ITEMS} are read")
            if all(type(item) is str for item in value):
                return value
            if all(
                isinstance(item, list) and item and all(type(i) is int for i in item)
                for item in value
            ):
                return value
        raise _wrong("a string, a list of strings, a list of token ids, or a list of such lists")

    @field_validator("logprobs")
    @classmethod
    def _not_of_the_prompt(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("echo"):
            raise _wrong("not together with echo: the prompt's own are not computed")
        return value

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many alternatives to report beside each token; None: no log-probabilities."""
        return self.logprobs


def parse(schema: type[Request], body: bytes) -> Request:
    """The checked request.

    Raises:
        ApiError: 400, for anything but a JSON object of known fields with allowed values; `param`
            names the field.
    """
    raw = _read_object(body)
    try:
        request = schema.model_validate(raw)
    except ValidationError as error:
        raise _refusal(error) from None
    for name, value in (request.model_extra or {}).items():
        _check_extra(schema, name, value, request.n or 1)
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "stream_options needs stream=true", param="stream_options", code="invalid_value"
        )
    return request


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode()
        raw = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            # half a surrogate pair is no character, and tokenizers choke on it
            json.dumps(raw, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return raw


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            param += f".{part}" if param else part
    if first["type"] == "missing":
        return ApiError(400, f"{param}: missing", param=param, code="missing_required_parameter")
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def _check_extra(schema: type[BaseModel], name: str, value: Any, n: int) -> None:
    """Refuse a field outside the schema unless it is harmless or asks for nothing."""
    if name in HARMLESS or (value is None and name in NEUTRAL):
        return
    if name not in NEUTRAL:
        known = [*schema.model_fields, *HARMLESS]
        raise ApiError(
            400,
            f"{name}: no such parameter.{did_you_mean(name[:LONGEST_NAME], known)}",
            param=name,
            code="unknown_parameter",
        )
    neutral = (*NEUTRAL[name], n) if name == "best_of" else NEUTRAL[name]
    # True == 1 in Python, but not for a client
    if isinstance(value, bool) or value not in neutral:
        raise ApiError(
            400,
            f"{name}: this server does not support it; leave it out",
            param=name,
            code="unsupported_parameter",
        )
