"""Refusals in the shape of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}``."""

from typing import Any

LONGEST_MESSAGE = 1000
"""Characters. A message may quote the request, which can be megabytes."""


class ApiError(Exception):
    """A request that cannot be answered, with the HTTP status and the body of the refusal."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Args: see `body`; retry_after: seconds after which the client may ask again."""
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[:LONGEST_MESSAGE]}..."
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def type(self) -> str:
        """OpenAI's class of the error, which follows from the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def draining() -> ApiError:
    """The refusal of everything that arrives after the signal to stop."""
    return ApiError(
        503, "the server is shutting down and takes no new requests", code="draining", retry_after=5
    )
