"""Caches model folders on this node: each is made once, completely or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sharegpt4v.atomic import publish


def cached(name: str, make: Callable[[Path], object]) -> Path:
    """Returns the folder `name` in this node's cache, $SHAREGPT4V_CACHE or ~/.cache/sharegpt4v.

    `make` fills it once, under a lock and another name: a node's actors never read half of it.
    """
    target = Path(os.environ.get("SHAREGPT4V_CACHE", "~/.cache/sharegpt4v")).expanduser() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # No marker file in place of a lock that the storage lacks: it would outlive a kill.
    with FileLock(target.with_suffix(".lock"), fallback_to_soft=False):
        if not target.exists():
            unfinished = target.with_suffix(".partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            publish(unfinished, target)
    return target
