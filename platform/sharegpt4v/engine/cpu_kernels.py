"""What surrounds the matrices of a Llama layer on a CPU, in C++: attention, norms, rotary positions, gates.

In a decode step PyTorch's attention reads all slots up to the longest one, or costs 40 microseconds a slot;
this one reads each slot to its own length, all in one call. cpu_kernels.cpp is compiled for this processor
and the model's heads, in some seconds, when an engine first starts. Without a compiler PyTorch's calls are
used.
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
from sharegpt4v.engine.gpu_kernels import AttendLive, check_against_mask, check_kernels
from sharegpt4v.engine.handle import one_line
from sharegpt4v.engine.llama import Heads, Kernels, Places, TorchKernels, split_heads
from sharegpt4v.engine.slots import SlotCache

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")

_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    # Sums in any order, as vectors need it. Infinities and NaN stay what they are.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),
)

_SECONDS = 60.0
"""Longest time to compile."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class _NotHere(RuntimeError):
    """The kernels cannot be had on this machine; says why."""


def load_attend_live(cache: SlotCache, heads: int, dtype: torch.dtype) -> AttendLive | None:
    """Returns the attention of a decode step, None where there is none for this machine or dtype.

    Nor where its result is not PyTorch's: the log then says so. cache: on a CPU and empty; its first slot is
    used and cleared. heads: number of query heads. dtype: the model's.
    """
    library = _library_for(cache, dtype)
    if library is None:
        return None
    function = getattr(library, f"attend_{_DTYPES[dtype]}")

    def attend_live(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Computes what `triton_attention.attend_live` does."""
        slots, heads, _, width = query.shape
        if query.stride()[1:] != (width, width, 1):  # heads may stand beside those of keys and values
            query = query.contiguous()
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        kept, context = keys.shape[1:3]
        sizes = (slots, kept, heads // kept, context, query.stride(0))
        _call(function, (query, keys, values, positions.contiguous(), out), sizes)
        return out

    try:
        check_against_mask(attend_live, cache, heads, dtype)
    except AssertionError as error:
        _warn(error)
        return None
    return attend_live


def load_kernels(cache: SlotCache, heads: int, dtype: torch.dtype) -> Kernels:
    """Returns the small operations of this module, PyTorch's where there are none for this machine or dtype.

    Also where their results are not PyTorch's: the log then says so. cache: on a CPU and empty; its first
    slot is used and cleared. heads: number of query heads. dtype: the model's.
    """
    library = _library_for(cache, dtype)
    if library is None:
        return TorchKernels()
    kernels = _CompiledKernels(library, dtype)
    try:
        check_kernels(kernels, cache, heads, dtype)
    except AssertionError as error:
        _warn(error)
        return TorchKernels()
    return kernels


def _warn(error: AssertionError) -> None:
    log.warning(
        "what the compiler here made of the kernels computes something else than PyTorch (%s): not used",
        one_line(error)[:300],
    )


class _CompiledKernels:
    """`llama.Kernels` on a CPU. Computes in float32 and rounds once."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        names = ("add_norm", "rotate_store", "gate")
        self._add_norm, self._rotate_store, self._gate = (
            getattr(library, f"{name}_{_DTYPES[dtype]}") for name in names
        )

    def add_norm(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Adds in place."""
        hidden, delta = hidden.contiguous(), None if delta is None else delta.contiguous()
        normed = torch.empty_like(hidden)
        _call(self._add_norm, (hidden, delta, norm.to(hidden), normed), hidden.shape, ctypes.c_float(eps))
        return hidden, normed

    def rotate_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, places: Places, keys: Tensor, values: Tensor
    ) -> Heads:
        """Rotates in place: the heads are views of qkv."""
        _, kept, context, width = keys.shape
        heads = split_heads(qkv, kept, width)
        asking = heads.query.shape[1]
        angles = (cos.contiguous(), sin.contiguous(), places.slots.contiguous(), places.cells.contiguous())
        _call(self._rotate_store, (qkv, *angles, keys, values), (len(qkv), asking, kept, width, context))
        return heads

    def gate(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        gated = gate_up.new_empty(rows, width)
        _call(self._gate, (gate_up.contiguous(), gated), (rows, width))
        return gated


def _call(
    function: Callable[..., None],
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    *more: ctypes.c_float,
) -> None:
    function(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int64, (*sizes, torch.get_num_threads())),
        *more,
    )


def _library_for(cache: SlotCache, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Returns the kernels if they can be had and know this dtype, of the model and in the slots."""
    if not cache.keys or dtype not in _DTYPES or cache.keys[0].dtype != dtype:
        return None
    return _library(cache.keys[0].shape[3])


@cache
def _library(width: int) -> ctypes.CDLL | None:
    """Loads the kernels for a width of heads; None, and logs why, where they cannot be had."""
    try:
        return _load(width)
    except _NotHere as error:
        log.info("a decode step goes through PyTorch's own calls, which takes longer: %s", error)
        return None


def _load(width: int) -> ctypes.CDLL:
    """Loads the kernels, compiled before or now. Raises _NotHere."""
    if sys.platform != "linux":
        raise _NotHere(f"the kernels are not built for {sys.platform}")
    _share_openmp()
    try:
        with _folder() as folder:
            target = folder / f"kernels-{width}-{_fingerprint()}.so"
            if target.exists():
                with suppress(OSError):  # damaged: compiled again
                    return ctypes.CDLL(str(target))
            _compile(target, width)
            return ctypes.CDLL(str(target))
    except OSError as error:
        raise _NotHere(f"the kernels can be neither stored nor loaded ({error})") from None


@contextmanager
def _folder() -> Iterator[Path]:
    """Yields a folder for the compiled kernels: this user's cache, or a temporary one."""
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


def _fingerprint() -> str:
    """Names what the compiled kernels depend on: the source, the flags and the processor."""
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
    """Gives the kernels the OpenMP library of PyTorch. A second one's threads would spin beside PyTorch's."""
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith(("libgomp", "libiomp", "libomp")):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            return
    raise _NotHere("PyTorch computes without OpenMP here")


def _compile(target: Path, width: int) -> None:
    """Compiles the kernels into a file that appears whole. Raises _NotHere, and OSError for the folder."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise _NotHere("there is no C++ compiler here")
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        objects, library = Path(temporary) / "kernels.o", Path(temporary) / target.name
        # Linked without OpenMP, so that its functions are looked for in what is loaded.
        for words in (
            (*_FLAGS, f"-DWIDTH={width}", "-c", str(_SOURCE), "-o", str(objects)),
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
                raise _NotHere(f"{compiler} does not compile the kernels ({error})") from None
            if done.returncode:
                said = (done.stderr.strip() or "no message").splitlines()[0]
                raise _NotHere(f"{compiler} does not compile the kernels: {said[:200]}")
        publish(library, target)
