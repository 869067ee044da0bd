"""Whose fault a failed read is: the row's, which rejects it, or the storage's, which a later try may cure.

Every back-end of fsspec has its own exceptions. What they carry was looked up in s3fs 2026.9 (botocore),
gcsfs 2026.10, adlfs 2026.8, huggingface_hub 2.4 and aiohttp 3.14. A credential that has expired must not turn
good images into rejects, so a refusal counts as the storage's fault wherever a service gave it.
"""

import errno
import os
from collections.abc import Iterator

from sharegpt4v.errors import Rejected

_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_UNREADABLE = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENXIO, errno.ELOOP})

_OF_THE_STORE = frozenset({401, 402, 403, 407, 408, 421, 423, 425, 429})
"""HTTP answers below 500 that say nothing about the one file: credentials, quota, load."""

_MISSING_CODES = frozenset("NoSuchKey NoSuchVersion KeyTooLongError 404 BlobNotFound PathNotFound".split())
_ARCHIVED_CODES = frozenset("InvalidObjectState BlobArchived".split())
_OTHER_CODES_OF_ROWS = frozenset("InvalidURI MethodNotAllowed 405".split())

_CODES_OF_STORES = frozenset(
    "ContainerNotFound ContainerDisabled ContainerBeingDeleted AccountIsDisabled FilesystemNotFound "
    "InvalidAuthenticationInfo RepositoryNotFoundError RevisionNotFoundError GatedRepoError "
    "DisabledRepoError".split()
)
"""What a 400, 404 or FileNotFoundError may mean besides a missing file: codes of Azure, and classes of
huggingface_hub."""


def judge(name: str, error: Exception, remote: bool) -> Rejected | None:
    """Returns the reject for a row that cannot be read, None where the storage is at fault.

    remote: whether a service was asked; a local file that may not be read is the row's matter.
    """
    code, of_aws = _code(error)
    status = http_status(error)
    number = error.errno if isinstance(error, OSError) else None
    if code in _ARCHIVED_CODES:
        return Rejected("unreadable", f"{name!r} is archived: restore it first")
    if code in _CODES_OF_STORES or status in _OF_THE_STORE:
        return None
    if code in _MISSING_CODES:
        return Rejected("missing", f"{name!r} does not exist")
    if of_aws and code not in _OTHER_CODES_OF_ROWS:  # NoSuchBucket as FileNotFoundError, ExpiredToken as 400
        return None
    if number in _MISSING or isinstance(error, FileNotFoundError) or status in (404, 410):
        return Rejected("missing", f"{name!r} does not exist")
    if isinstance(error, IsADirectoryError):
        return Rejected("unreadable", f"{name!r} is a folder")
    if not remote and (number in _UNREADABLE or isinstance(error, PermissionError)):
        return Rejected("unreadable", f"{name!r}: {os.strerror(number) if number else 'permission denied'}")
    if status is not None and 400 <= status < 500:
        return Rejected("unreadable", f"{name!r}: the server answered {status}")
    return None


def describe(error: BaseException) -> str:
    """Says in one line what a storage answered, with the code that its documentation lists."""
    text = " ".join(str(error).split())[:300]
    code = _code(error)[0] or http_status(error)
    known = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return known if code is None or str(code) in known else f"{known} ({code})"


def http_status(error: BaseException) -> int | None:
    """Finds the HTTP status in an error of any fsspec back-end, or in its causes."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            return _number(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for holder in (cause, response):  # Hugging Face has it in the response alone
            for field in ("status", "status_code", "code"):  # aiohttp, Azure, Google
                if (number := _number(getattr(holder, field, None))) is not None:
                    return number
    return None


def _code(error: BaseException) -> tuple[str | None, bool]:
    """Returns a service's own code for an error, or the class that tells as much, and whether AWS gave it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and (code := response.get("Error", {}).get("Code")):
            return str(code), True
        if code := getattr(cause, "error_code", None):  # Azure: a text, or an enumeration of texts
            return str(getattr(code, "value", code)), False
        if type(cause).__name__ in _CODES_OF_STORES:
            return type(cause).__name__, False
    return None, False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _number(value: object) -> int | None:
    try:
        return int(value) if isinstance(value, int | str) else None
    except ValueError:
        return None
