"""Reading the bytes of images: local files by plain open and read, everything else through fsspec.

A manifest is other people's input, so a path must stay below the root. And storage that fails is never
the image's fault: what a second try may cure is tried again, and ends as StorageError, not as a reject.
"""

import errno
import os
import random
import stat
import time
from urllib.parse import quote, urlsplit

import fsspec

from sharegpt4v.errors import Rejected
from sharegpt4v.images.faults import describe, http_status, judge
from sharegpt4v.images.formats import ImageLimits

_SCHEMES = frozenset(
    "abfs abfss adl az cos gcs gs hdfs hf http https memory oci oss r2 s3 s3a wasb webhdfs".split()
)
"""Object stores. Others that fsspec knows (file, git, zip, chains with ::) reach around the root."""

_DELAYS = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try, halved at most by chance so that workers do not come back together."""

_CONNECT_SECONDS, _SILENT_SECONDS, _ALL_SECONDS = 15.0, 30.0, 300.0
"""Until a web server is reached, between two parts of its answer, and for all of it. aiohttp alone would wait
five minutes for a server that is gone, and a try is one of several."""

_MAX_CHECKED_FOLDERS = 65_536


class StorageError(RuntimeError):
    """Storage failed after every retry (EIO, timeouts, 401, 403, 429, 5xx): the row stays undone."""


class ImageReader:
    """Reads images below one root; picklable, usable from several threads.

    root: a local folder, a URI that fsspec reads, or None where the manifest names URIs or tar shards only.
    max_bytes: larger files are rejected before they are read, where the storage tells.
    """

    def __init__(self, root: str | None, *, max_bytes: int = ImageLimits.max_bytes) -> None:
        self._max_bytes = max_bytes
        self._uri = root.rstrip("/") if root and _is_uri(root) else ""
        local = "" if self._uri or root is None else root
        self._root = os.path.realpath(local.removeprefix("file://")) if local else ""
        self._checked: set[str] = set()
        self._failing: set[str] = set()  # stores whose last read failed after all tries
        self._buckets: set[str] = set()  # that are known to exist

    def read(self, image: str, container: str = "", offset: int = 0, size: int = -1) -> bytes:
        """Reads an image's bytes: a path below the root, a URI, or `size` bytes at `offset` of a tar shard.

        size -1 means to the end. A shard (`container`) obeys the root like an image; without a root it is
        a path or URI as given. Raises Rejected: missing, unreadable, outside_root, empty, too_large,
        truncated (the shard ends early); StorageError when the storage keeps failing.
        """
        name = container or image
        if container and _leaves(image):
            raise Rejected("outside_root", f"{image!r} in {container!r} leaves the archive's folder")
        start, count = (offset, size) if container else (0, -1)
        if start < 0:
            raise Rejected("truncated", f"{name!r} has no byte {start}")
        if count > self._max_bytes:
            raise self._too_large(name, f"{count:,}")
        location = self._locate(name, shard=bool(container))
        # One byte over the limit is enough to know, whatever the file's size.
        wanted = count if count >= 0 else self._max_bytes + 1
        data = self._with_retries(name, location, start, wanted) if wanted else b""
        if len(data) > self._max_bytes:
            raise self._too_large(name, f"over {self._max_bytes:,}")
        if len(data) < count or (start and wanted and not data):
            raise Rejected("truncated", f"{name!r} ends before byte {start + max(count, 1):,}")
        if not data:
            raise Rejected("empty", f"{name!r} has 0 bytes")
        return data

    def __getstate__(self) -> dict[str, object]:
        # Another machine's folders are not this one's.
        return {**self.__dict__, "_checked": set(), "_failing": set(), "_buckets": set()}

    def _too_large(self, name: str, count: str) -> Rejected:
        return Rejected("too_large", f"{name!r} has {count} bytes, the limit is {self._max_bytes:,}")

    def _locate(self, name: str, shard: bool) -> str:
        """Resolves the path or URI to open. Raises Rejected (missing, outside_root, unreadable)."""
        if not name or "\0" in name:
            raise Rejected("missing", f"{name!r} is not a file name")
        if _is_uri(name):
            scheme = name.partition("://")[0].lower()
            if scheme in ("file", "local") or "::" in name:
                raise Rejected("outside_root", f"{name!r}: give local files as a path below the root")
            if scheme not in _SCHEMES:
                raise Rejected(
                    "unreadable", f"{name!r}: {scheme}:// is not one of {', '.join(sorted(_SCHEMES))}"
                )
            _refuse_bad_url(name)
            return name
        if shard and not self._root and not self._uri:
            return name
        if _leaves(name):
            raise Rejected("outside_root", f"{name!r} leaves the root: give a path below it, without ..")
        if self._uri:
            return f"{self._uri}/{quote(name) if self._uri.startswith('http') else name}"
        if not self._root:
            raise Rejected("outside_root", f"{name!r} is relative, and no root is given")
        return os.path.join(self._root, name)

    def _with_retries(self, name: str, location: str, start: int, count: int) -> bytes:
        """Reads with back-off. A store that is failing gets one try a row, or each row would wait."""
        remote, store = _is_uri(location), _store(location)
        delays = () if store in self._failing else _DELAYS
        for delay in (*delays, None):
            try:
                data = (
                    _read_remote(location, start, count)
                    if remote
                    else self._read_local(location, start, count)
                )
                self._failing.discard(store)
                return data
            except Rejected:
                raise
            except Exception as error:
                rejected = judge(name, error, remote)
                gone = rejected and rejected.reason == "missing" and self._is_gone(location)
                if rejected and not gone:
                    self._failing.discard(store)
                    raise rejected from error
                if delay is None:
                    self._failing.add(store)
                    tries = f"{len(delays) + 1} tries" if delays else "1 try"
                    cause = f"{store or self._root} does not exist" if gone else describe(error)
                    raise StorageError(f"{name!r}: {tries} failed, the last with {cause}") from error
                time.sleep(delay * random.uniform(0.5, 1.0))
        raise AssertionError("the last round returns or raises")

    def _is_gone(self, location: str) -> bool:
        """Returns whether a missing file's whole root or bucket is missing; gcsfs reports both alike."""
        bucket = _store(location)
        if not bucket:
            return bool(self._root) and not os.path.isdir(self._root)
        if not bucket.startswith(("gs://", "gcs://")) or bucket in self._buckets:
            return False
        try:
            filesystem, path = fsspec.core.url_to_fs(bucket)
            filesystem.info(path)
        except FileNotFoundError:
            return True
        except Exception:  # it may not be looked at, so it is there, or the next read tells
            return False
        self._buckets.add(bucket)
        return False

    def _read_local(self, path: str, start: int, count: int) -> bytes:
        folder = os.path.dirname(path)
        if self._root and folder not in self._checked:
            self._check_below_root(folder)
            if len(self._checked) >= _MAX_CHECKED_FOLDERS:
                self._checked.clear()
            self._checked.add(folder)
        try:
            return _read_file(path, start, count)
        except OSError as error:
            if error.errno != errno.ELOOP or not os.path.islink(path):
                raise
        # Only a link pays for its resolution: _read_file does not follow one.
        target = os.path.realpath(path)
        if self._root:
            self._check_below_root(target)
        return _read_file(target, start, count)

    def _check_below_root(self, path: str) -> None:
        real = os.path.realpath(path)
        if real != self._root and not real.startswith(self._root.rstrip("/") + "/"):
            raise Rejected("outside_root", f"{path!r} leaves the root {self._root!r} through a symbolic link")


def _leaves(name: str) -> bool:
    return name.startswith("/") or (".." in name and ".." in name.split("/"))


def _is_uri(name: str) -> bool:
    return "://" in name and name.partition("://")[0].isalnum()


def _store(location: str) -> str:
    """Returns what fails as one: scheme and host or bucket; "" for local files."""
    return "/".join(location.split("/", 3)[:3]) if _is_uri(location) else ""


def _refuse_bad_url(name: str) -> None:
    """Raises Rejected for a URL that names no server: clients raise errors of all kinds for those."""
    try:
        parts = urlsplit(name)
        host = (parts.hostname or "").encode("idna")
        if parts.scheme.lower() not in ("http", "https") or (host and parts.port != 0):
            return
    except ValueError:  # UnicodeError among them
        pass
    raise Rejected("unreadable", f"{name!r} is no valid URL")


def _read_file(path: str, start: int, count: int) -> bytes:
    # O_NONBLOCK: opening a pipe that nobody writes to must not hang a worker.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Rejected("unreadable", f"{path!r} is not a regular file")
        left = min(count, max(0, found.st_size - start))
        data = os.pread(handle, left, start)
        while len(data) < left and (more := os.pread(handle, left - len(data), start + len(data))):
            data += more  # a read ends early past 2 GiB, and on some network file systems
        return data
    finally:
        os.close(handle)


def _read_remote(uri: str, start: int, count: int) -> bytes:
    filesystem, path = fsspec.core.url_to_fs(uri, **_options(uri))
    try:
        return bytes(filesystem.cat_file(path, start=start, end=start + count))
    except Exception as error:
        if http_status(error) == 416:  # the range starts at or behind the end
            return b""
        raise


def _options(uri: str) -> dict[str, object]:
    """Returns what fsspec is to open a URI with; a user's own configuration of fsspec goes before."""
    if not uri.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout  # here: most runs read no URLs, and do without it

    timeout = ClientTimeout(_ALL_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=_SILENT_SECONDS)
    kwargs: dict[str, object] = {"timeout": timeout}
    for scheme in ("http", "https"):  # fsspec takes what is configured for either
        kwargs |= fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
    return {"client_kwargs": kwargs}
