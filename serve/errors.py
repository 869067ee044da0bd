"""Errors of the API: an HTTP status and a body of OpenAI's shape, which says nothing of our insides."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from sharegpt4v.engine.handle import EngineError, ErrorKind
from sharegpt4v.errors import Rejected, UserError

log = logging.getLogger("serve.errors")

RETRY_SECONDS = 1
"""What Retry-After says when nothing better is known: a slot is usually free by then."""


class ApiError(Exception):
    """An answer that is an error. message: one line for the client. param: the field of the request at fault.

    retry_after: seconds after which the same request may succeed, of 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's class of error, which its clients show."""
        names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        names |= {429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Returns the JSON body that OpenAI's clients read."""
        shown = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": shown}

    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(max(1, round(self.retry_after)))}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def __reduce__(self) -> "tuple[Callable[..., ApiError], tuple[int, str]]":
        rest: Any = {"code": self.code, "param": self.param, "retry_after": self.retry_after}
        return partial(type(self), **rest), (self.status, self.message)


def internal() -> ApiError:
    """Returns the error of our own faults; what happened is in the log, under the request's id."""
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def overloaded() -> ApiError:
    return ApiError(
        429, "too many requests are in progress: try again", code="overloaded", retry_after=RETRY_SECONDS
    )


def unavailable() -> ApiError:
    """Returns the error of a server that is about to end, or of a model that is being started again."""
    return ApiError(
        503, "this server takes no requests at the moment: try again", code="unavailable", retry_after=2
    )


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


_FIELDS = {"max_new_tokens": "max_tokens"}
"""What the API calls fields of SamplingParams that have another name there."""


def as_api_error(error: BaseException, request_id: str) -> ApiError:
    """Returns an error of the library as one of the API; one that is our fault is logged here, in full."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        field = error.field and _FIELDS.get(error.field, error.field)
        return refused(error.text.replace("`", ""), field)
    if isinstance(error, Rejected):
        return refused(f"an image cannot be used: {error.message}", "image_url", f"image_{error.reason}")
    kind: ErrorKind = error.kind if isinstance(error, EngineError) else "internal"
    if kind == "bad_request":
        return refused(str(error))
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    if kind == "timeout":
        return ApiError(504, "the answer was not finished within its time limit", code="timeout")
    if kind == "overloaded":
        return overloaded()
    return unavailable() if kind == "closed" else internal()
