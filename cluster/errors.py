"""How commands end: their exit codes, and from Ray's nested exceptions the one line that says why.

Importable without Ray, so that a command line can name the codes.
"""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from sharegpt4v.errors import RunFailed, UserError

EXIT_PROBLEM = 1  # the work was done or begun, and something is wrong
EXIT_USAGE = 2  # the user can put it right before anything runs
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells report it

RESUME = "what was committed is kept: run the same command again"

_RETRY_NOTE = re.compile(r"\s*Failed to .{1,80} after \d+/\d+ attempts \(total backoff .*", re.DOTALL)
"""Ray Data appends it to the message of whatever a step raised, and to an OSError as its file name."""

_USER_ERROR = re.compile(r"(?:[\w.]+\.)?UserError: (?:(?P<field>[a-z_][\w.]*): )?(?P<text>.+)", re.DOTALL)
"""The last line of a traceback that a UserError ended."""


@contextmanager
def plain_errors(advice: str) -> Iterator[None]:
    """Raises what ends a dataset as RunFailed: one line with its cause, then the advice.

    A UserError of a step stays one, with its field. Ray Data would log the worker's traceback as well, and
    hand it on as text that has lost its type.
    """
    import ray.exceptions
    from ray.data import DataContext
    from ray.data.exceptions import ExecutionTimeoutError

    DataContext.get_current().raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    except (ray.exceptions.RayError, ExecutionTimeoutError, OSError) as error:
        cause = _innermost(error)
        if user_error := _user_error(cause):
            raise user_error from error
        raise RunFailed(f"{_why(cause)}; {advice}") from error


def _innermost(error: BaseException) -> BaseException:
    """Unwraps what a step raised: Ray wraps it two or three times."""
    from ray.data.exceptions import SystemException

    cause = error
    # Ray Data raises its own failures "from" an empty SystemException, which says nothing.
    while (inner := getattr(cause, "cause", None) or cause.__cause__) and not isinstance(
        inner, SystemException
    ):
        cause = inner
    return cause


def _user_error(cause: BaseException) -> UserError | None:
    if isinstance(cause, UserError):
        return UserError(_one_line(cause.text), field=cause.field)
    # Of what an actor's constructor raised Ray keeps the traceback's text alone.
    found = _USER_ERROR.fullmatch(_last_words(str(cause)))
    return UserError(_one_line(found["text"]), field=found["field"]) if found else None


def _why(cause: BaseException) -> str:
    """Describes the cause in one line."""
    import ray.exceptions
    from ray.data.exceptions import ExecutionTimeoutError

    from sharegpt4v.images import StorageError

    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        path = _RETRY_NOTE.sub("", str(cause.filename or ""))
        return f"the disk is full ({path or 'while writing'}): free some space"
    if isinstance(cause, ray.exceptions.OutOfDiskError):
        return "the disk that holds Ray's objects is full (/tmp/ray, unless set otherwise): free some space"
    if isinstance(cause, ExecutionTimeoutError):
        return "nothing was finished for a long time, and the run was given up"
    if isinstance(cause, ray.exceptions.RaySystemError | ray.exceptions.LocalRayletDiedError):
        return "Ray went down under the run"
    text = _one_line(_last_words(str(cause)).rstrip(" :'\""))[:300]
    return text if isinstance(cause, StorageError | RunFailed) else f"{type(cause).__name__}: {text}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _last_words(text: str) -> str:
    """Returns the end of a traceback: an actor that could not begin hands its cause on as such a text."""
    text = _RETRY_NOTE.sub("", text)
    if "Traceback" not in text and 'File "' not in text:
        return text
    return text.strip().rsplit("\n", 1)[-1]
