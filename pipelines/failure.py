"""From Ray's nested exceptions to the one line that says why a run ended and what to do."""

import errno

import ray.exceptions

from sharegpt4v.errors import RunFailed

_KEPT = "what was committed is kept: run the same command again"


def explain(error: BaseException) -> RunFailed:
    """The innermost cause in one line; Ray wraps what a step raised two or three times."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return RunFailed(f"the disk is full ({cause.filename or 'while writing'}): free some space; {_KEPT}")
    if isinstance(cause, ray.exceptions.RaySystemError | ray.exceptions.LocalRayletDiedError):
        return RunFailed(f"Ray went down under the run; {_KEPT}")
    text = " ".join(str(cause).split())
    return RunFailed(f"{type(cause).__name__}: {text[:300]}; {_KEPT}")
