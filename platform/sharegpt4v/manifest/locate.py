"""What a path given as a manifest refers to: an image folder, or files that list images."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import has_magic
from pathlib import PurePosixPath

import fsspec
from fsspec.implementations.local import LocalFileSystem

from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.images.faults import describe, judge

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .heic .heif .avif .jp2".split()
)
"""Names that promise an image. Some of these formats are refused when read, and then show up as rejects."""

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
TAR_SUFFIXES = (".tar",)
TAR_UNPACKERS = {
    ".tar.gz": "gunzip",
    ".tgz": "gunzip",
    ".tar.bz2": "bunzip2",
    ".tar.xz": "unxz",
    ".tar.zst": "unzstd",
    ".tbz2": "bunzip2",
    ".txz": "unxz",
    ".tzst": "unzstd",
}
KINDS = "an image folder, .json, .jsonl, .parquet, .tar, or a folder or glob of .parquet or .tar files"


@dataclass(frozen=True)
class Located:
    """name: the path as the user gave it. folder: the image folder, or "" where files list the images.

    files: the listing files, sorted, as fs paths. root: where image paths and containers start, path or URI.
    ignored: what a walk or an archive held beside images, counted by suffix or in words; it fills while the
    manifest is read.
    seen: files and folders that were read, with what shows a change of them (stored.identity); likewise.
    """

    name: str
    fs: fsspec.AbstractFileSystem
    folder: str
    files: tuple[str, ...]
    root: str
    ignored: Counter[str] = field(default_factory=Counter)
    seen: dict[str, list[str] | None] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)


def locate(path: str, root: str | None) -> Located:
    """Finds what path names, on local disk or behind any URI that fsspec reads.

    A folder with an image or a sub-folder at its top is an image folder. One without, that holds tar or
    Parquet files, is a folder of shards. Raises UserError where nothing is there, RunFailed where
    the storage fails.
    """
    fs, place = filesystem(path)
    with store_answers(path):
        if fs.isdir(place):
            files = _shards_at_top(fs, place)
            base, folder = place, "" if files else place
        else:
            files, folder = _files(fs, place, path), ""
            base = _fixed_part(place)
        home = _display(fs, base)
        return Located(path, fs, folder, files, _given_root(root) if root is not None else home)


@contextmanager
def store_answers(name: str) -> Iterator[None]:
    """Raises RunFailed, in one line with the cause, where a disk or service fails while `name` is read."""
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:
        if "://" not in name and not isinstance(error, OSError):
            raise  # an error of ours
        raise RunFailed(f"{name} cannot be read: {describe(error)}") from error


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system behind a path or URI, and the path inside it.

    Raises UserError for a local path that is not UTF-8, which neither settings nor reports can hold.
    """
    if "://" not in path and not is_text(place := os.path.abspath(path)):
        raise UserError(f"cannot read {ascii(place)}: its name is not UTF-8, rename it")
    if "::" in path and os.path.lexists(path):  # fsspec would read it as one URI inside another
        return LocalFileSystem(), os.path.abspath(path)
    try:
        fs, inside = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path}: {reason}") from error
    return fs, str(inside)


def suffix(name: str) -> str:
    """Returns the last suffix in lower case, `.jpg` for A.B.JPG; "" where there is none."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    return suffix(name) in IMAGE_SUFFIXES


def is_hidden(relative: str) -> bool:
    """Returns whether the file or a folder of its path starts with a dot, as .DS_Store and ._photo.jpg do."""
    return relative.startswith(".") or "/." in relative


def is_text(name: str) -> bool:
    """Returns False for a name that is not UTF-8, whose bytes Python decodes to lone surrogates."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _shards_at_top(fs: fsspec.AbstractFileSystem, folder: str) -> tuple[str, ...]:
    tars: list[str] = []
    parquets: list[str] = []
    for entry in fs.ls(folder, detail=True):
        name = PurePosixPath(entry["name"]).name
        if is_hidden(name):
            continue
        if entry["type"] == "directory" or is_image(name):
            return ()
        if name.endswith((*TAR_SUFFIXES, *TAR_UNPACKERS)):
            tars.append(entry["name"])
        elif name.endswith(PARQUET_SUFFIXES):
            parquets.append(entry["name"])
    return tuple(sorted(tars or parquets))  # img2dataset leaves a Parquet file of notes beside each tar


def _files(fs: fsspec.AbstractFileSystem, place: str, path: str) -> tuple[str, ...]:
    if _exists(fs, place):
        return (place,)
    if has_magic(place):
        matches = tuple(sorted(str(match) for match in fs.glob(place) if not fs.isdir(match)))
        if matches:
            return matches
        raise UserError(f"{path} matches no file: check the pattern, and quote it for the shell")
    raise UserError(f"{path} does not exist{_nearest(fs, place)}")


def _exists(fs: fsspec.AbstractFileSystem, place: str) -> bool:
    """Returns whether there is something; raises what a store answers to a token that has expired."""
    if isinstance(fs, LocalFileSystem):
        return bool(fs.exists(place))
    try:
        fs.info(place)  # exists() would take any error for a No
    except Exception as error:
        if judge(place, error, remote=True) is None:
            raise
        return False
    return True


def _nearest(fs: fsspec.AbstractFileSystem, place: str) -> str:
    """Returns a hint: the name most like the first part of the path that does not exist."""
    missing = PurePosixPath(place)
    while not fs.exists(str(missing.parent)) and missing.parent != missing:
        missing = missing.parent
    if not fs.isdir(str(missing.parent)):
        return ""
    if isinstance(fs, LocalFileSystem) and os.path.islink(missing):
        return f": {missing} is a link to nothing"
    names = [PurePosixPath(entry).name for entry in fs.ls(str(missing.parent), detail=False)]
    near = get_close_matches(missing.name, names, n=1)
    return (
        f": did you mean {missing.parent / near[0]}?" if near else f": {missing.parent} has no {missing.name}"
    )


def _fixed_part(place: str) -> str:
    """Returns the folder of a file; for a pattern, the deepest folder named before the first wildcard."""
    # Not PurePosixPath, which would fold the two slashes of http://host/ into one.
    parent = posixpath.dirname(place)
    while has_magic(parent):
        parent = posixpath.dirname(parent)
    return parent


def _display(fs: fsspec.AbstractFileSystem, place: str) -> str:
    return place if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(place))


def _given_root(root: str) -> str:
    fs, place = filesystem(root)
    if not fs.isdir(place):
        raise UserError(f"the image root {root} is not a folder{_nearest(fs, place)}")
    return _display(fs, place)
