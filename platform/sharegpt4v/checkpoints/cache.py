"""Caches model folders on this node: each is made once, whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` in this node's cache, $SHAREGPT4V_CACHE or ~/.cache/sharegpt4v.

    `make` fills it once, under a lock and another name: a node's actors never read half of it.
    """
    target = Path(os.environ.get("SHAREGPT4V_CACHE", "~/.cache/sharegpt4v")).expanduser() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_suffix(".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(target)
    return target
