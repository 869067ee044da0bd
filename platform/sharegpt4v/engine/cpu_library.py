"""Compiles C++ for this machine's processor when it is first needed, and loads it.

The libraries are kept in the user's cache. Where there is no compiler, or none that can be used, there is no
library: callers then compute with PyTorch's own calls.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sharegpt4v.atomic import publish

log = logging.getLogger(__name__)

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    # Sums in any order, as vectors need it. Infinities and NaN stay what they are.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)

_SECONDS = 60.0
"""Longest time to compile."""


class _NotHere(RuntimeError):
    """A library cannot be had on this machine; says why."""


@cache
def load_library(source: Path, *constants: str) -> ctypes.CDLL | None:
    """Loads the library of a source file; None, and logs why, where it cannot be had.

    constants: NAME=VALUE each, which the source is compiled with.
    """
    try:
        return _load(source, constants)
    except _NotHere as error:
        log.info("%s is computed by PyTorch's own calls, which takes longer: %s", source.stem, error)
        return None


def call(
    function: Callable[..., None],
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    *more: ctypes.c_float,
) -> None:
    """Calls a function of a library with the tensors' memory, sizes, the number of threads, and `more`."""
    function(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int64, (*sizes, torch.get_num_threads())),
        *more,
    )


def _load(source: Path, constants: Sequence[str]) -> ctypes.CDLL:
    """Loads a library, compiled before or now. Raises _NotHere."""
    if sys.platform != "linux":
        raise _NotHere(f"it is not built for {sys.platform}")
    _share_openmp()
    try:
        with _folder() as folder:
            target = folder / f"{source.stem}-{_fingerprint(source, constants)}.so"
            if target.exists():
                with suppress(OSError):  # damaged: compiled again
                    return ctypes.CDLL(str(target))
            _compile(source, constants, target)
            return ctypes.CDLL(str(target))
    except OSError as error:
        raise _NotHere(f"it can be neither stored nor loaded ({error})") from None


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder for the libraries: this user's cache, or a temporary one."""
    try:
        folder = _cache_folder()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    yield folder


def _cache_folder() -> Path:
    """Returns a folder that this user alone can write: what is in it is executed. Raises OSError."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (given if given.is_absolute() else Path.home() / ".cache") / "sharegpt4v" / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022 or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _fingerprint(source: Path, constants: Sequence[str]) -> str:
    """Names what a library depends on: the source, the flags and the processor."""
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("flags", "Features", "model name")
        processor += "".join(next((line for line in lines if line.startswith(name)), "") for name in names)
    except OSError:
        processor += platform.processor()
    whole = "\n".join([source.read_text(), *_FLAGS, *constants, processor])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _share_openmp() -> None:
    """Gives libraries the OpenMP of PyTorch. The threads of a second one would spin beside PyTorch's."""
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise _NotHere("PyTorch computes without OpenMP here")


def _compile(source: Path, constants: Sequence[str], target: Path) -> None:
    """Compiles a library into a file that appears whole. Raises _NotHere, and OSError for the folder."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise _NotHere("there is no C++ compiler here")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        objects, library = Path(temporary) / "source.o", Path(temporary) / target.name
        # Linked without OpenMP, so that its functions are looked for in what is loaded.
        for words in (
            (*_FLAGS, *(f"-D{constant}" for constant in constants), "-c", str(source), "-o", str(objects)),
            ("-shared", str(objects), "-o", str(library)),
        ):
            try:
                done = subprocess.run(
                    [*compiler.split(), *words],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=_SECONDS,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _NotHere(f"{compiler} does not compile it ({error})") from None
            if done.returncode:
                said = (done.stderr.strip() or "no message").splitlines()[0]
                raise _NotHere(f"{compiler} does not compile it: {said[:200]}")
        publish(library, target)
