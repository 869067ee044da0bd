"""From Ray's nested exceptions to the one line that says why a run ended and what to do."""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray.exceptions
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError, SystemException

from sharegpt4v.errors import RunFailed
from sharegpt4v.images import StorageError

RESUME = "what was committed is kept: run the same command again"

_RETRY_NOTE = re.compile(r"\s*Failed to .{1,80} after \d+/\d+ attempts \(total backoff .*", re.DOTALL)
"""Ray Data appends it to the message of whatever a step raised, and to an OSError as its file name."""


@contextmanager
def plain_errors(advice: str) -> Iterator[None]:
    """Raises what ends a dataset as RunFailed: one line with its cause, then the advice.

    Ray Data would log the worker's traceback as well, and hand it on as text that has lost its type.
    """
    DataContext.get_current().raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield
    except (ray.exceptions.RayError, ExecutionTimeoutError, OSError) as error:
        raise RunFailed(f"{_why(error)}; {advice}") from error


def _why(error: BaseException) -> str:
    """The innermost cause in one line; Ray wraps what a step raised two or three times."""
    cause = error
    # Ray Data raises its own failures "from" an empty SystemException, which tells nothing.
    while (inner := getattr(cause, "cause", None) or cause.__cause__) and not isinstance(
        inner, SystemException
    ):
        cause = inner
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        path = _RETRY_NOTE.sub("", str(cause.filename or ""))
        return f"the disk is full ({path or 'while writing'}): free some space"
    if isinstance(cause, ray.exceptions.OutOfDiskError):
        return "the disk that holds Ray's objects is full (/tmp/ray, unless set otherwise): free some space"
    if isinstance(cause, ExecutionTimeoutError):
        return "nothing was finished for a long time, and the run was given up"
    if isinstance(cause, ray.exceptions.RaySystemError | ray.exceptions.LocalRayletDiedError):
        return "Ray went down under the run"
    text = " ".join(_last_words(str(cause)).rstrip(" :'\"").split())[:300]
    return text if isinstance(cause, StorageError | RunFailed) else f"{type(cause).__name__}: {text}"


def _last_words(text: str) -> str:
    """What a traceback ends with: an actor that could not begin hands its cause on as such a text."""
    text = _RETRY_NOTE.sub("", text)
    if "Traceback" not in text and 'File "' not in text:
        return text
    return text.strip().rsplit("\n", 1)[-1]
