"""Memory for the pixels of a batch, reused for the next one.

A batch is larger than what the C library keeps when it is freed. Fresh memory the kernel clears first, which
was a tenth of the time of a decoder at 96 x 96 pixels (benchmarks/README.md).
"""

import ctypes
import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

_spare: deque[bytearray] = deque(maxlen=1)  # of this process, whatever tasks it runs

_MOST_KEPT = 256 << 20
"""Bytes: a worker without work must not sit on more."""


def pixel_memory(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Returns an array of `shape`, uint8, with whatever its memory held before.

    Its memory comes back when nothing refers to it any more: an Arrow array over it counts as well.
    """
    size = math.prod(shape)
    memory = _take(size)
    # Whoever looks into the memory holds this object by the buffer protocol, so its end is the end of all.
    lent = (ctypes.c_uint8 * size).from_buffer(memory)
    weakref.finalize(lent, _give_back, memory).atexit = False
    return np.frombuffer(memoryview(lent), np.uint8).reshape(shape)


def _give_back(memory: bytearray) -> None:
    if len(memory) <= _MOST_KEPT:
        _spare.append(memory)


def _take(size: int) -> bytearray:
    try:
        memory = _spare.pop()
    except IndexError:
        return bytearray(size)
    return memory if len(memory) >= size else bytearray(size)
