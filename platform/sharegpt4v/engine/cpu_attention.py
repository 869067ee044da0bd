"""Attention of a decode step on a CPU: each slot reads only its own live positions, all in one call.

PyTorch's calls read all slots up to the longest one, or cost 40 microseconds a slot. The kernel is
cpu_attention.cpp. It is compiled for this very processor, in two seconds, when an engine first starts;
`python -m sharegpt4v.engine.cpu_attention` does that beforehand. Without a compiler PyTorch's calls are used.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharegpt4v.engine.gpu_kernels import AttendLive, check_against_mask
from sharegpt4v.engine.slots import SlotCache

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    # Sums in any order, as vectors need it. Infinities and NaN stay what they are.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)

_SECONDS = 60.0
"""Longest time to compile."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _NotHere(RuntimeError):
    """The kernel cannot be had on this machine; says why."""


def load_attend_live(cache: SlotCache, heads: int, dtype: torch.dtype) -> AttendLive | None:
    """Returns the kernel, None where there is none for this machine, dtype or head width.

    cache: on a CPU and empty; its first slot is used and cleared. heads: number of query heads. dtype: the
    model's. Raises AssertionError if its result is not PyTorch's.
    """
    keys = cache.keys[0] if cache.keys else None
    if keys is None or dtype not in _DTYPES or keys.dtype != dtype:
        return None
    try:
        function = getattr(_library(), f"{_DTYPES[dtype]}_{keys.shape[3]}", None)
    except _NotHere as error:
        log.info("attention reads every slot up to the longest: %s", error)
        return None
    if function is None:
        return None
    attend_live = _caller(function)
    check_against_mask(attend_live, cache, heads, dtype)
    return attend_live


def _caller(function: Callable[..., Any]) -> AttendLive:
    def attend_live(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Computes what `triton_attention.attend_live` does."""
        slots, heads, _, width = query.shape
        if query.stride()[1:] != (width, width, 1):  # heads may stand beside those of keys and values
            query = query.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept, context = keys.shape[1:3]
        tensors = (query, keys, values, positions.contiguous(), out)
        sizes = (slots, kept, heads // kept, context, query.stride(0), torch.get_num_threads())
        function(
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            *(ctypes.c_int64(size) for size in sizes),
        )
        return out

    return attend_live


@cache
def _library() -> ctypes.CDLL:
    """Loads the kernel, compiled before or now. Raises _NotHere."""
    if sys.platform != "linux":
        raise _NotHere(f"the kernel is not built for {sys.platform}")
    _share_openmp()
    try:
        with _folder() as folder:
            target = folder / f"attention-{_fingerprint()}.so"
            if target.exists():
                with suppress(OSError):  # damaged: compiled again
                    return ctypes.CDLL(str(target))
            _compile(target)
            return ctypes.CDLL(str(target))
    except OSError as error:
        raise _NotHere(f"the kernel can be neither stored nor loaded ({error})") from None


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder for the compiled kernel: this user's cache, or a temporary one."""
    try:
        folder = _cache_folder()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    yield folder


def _cache_folder() -> Path:
    """Returns a folder that this user alone can write: what is in it is executed. Raises OSError."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "sharegpt4v"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022 or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def _fingerprint() -> str:
    """Names what a compiled kernel depends on: the source, the flags and the processor."""
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("flags", "Features", "model name")
        processor += "".join(next((line for line in lines if line.startswith(name)), "") for name in names)
    except OSError:
        processor += platform.processor()
    whole = "\n".join([_SOURCE.read_text(), *_FLAGS, processor])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _share_openmp() -> None:
    """Gives the kernel the OpenMP library of PyTorch. A second one's threads would spin beside PyTorch's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise _NotHere("PyTorch computes without OpenMP here")


def _compile(target: Path) -> None:
    """Compiles the kernel into a file that appears whole. Raises _NotHere, and OSError for the folder."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise _NotHere("there is no C++ compiler here to build the kernel that reads each to its own length")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        objects, library = Path(temporary) / "attention.o", Path(temporary) / target.name
        # Linked without OpenMP, so that its functions are looked for in what is loaded.
        for words in (
            (*_FLAGS, "-c", str(_SOURCE), "-o", str(objects)),
            ("-shared", str(objects), "-o", str(library)),
        ):
            try:
                done = subprocess.run(
                    [*compiler.split(), *words], capture_output=True, text=True, timeout=_SECONDS
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _NotHere(f"{compiler} does not compile the attention kernel ({error})") from None
            if done.returncode:
                said = (done.stderr.strip() or "no message").splitlines()[0]
                raise _NotHere(f"{compiler} does not compile the attention kernel: {said[:200]}")
        library.replace(target)


def main() -> None:
    """Compiles the kernel, or prints why it cannot be had; engines then work without it."""
    try:
        _library()
    except _NotHere as error:
        print(f"engines on CPUs attend with PyTorch's own calls, more slowly: {error}")


if __name__ == "__main__":
    main()
