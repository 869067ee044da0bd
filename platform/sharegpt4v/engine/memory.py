"""Main memory: what this process may still take, within its control groups' limits, and in which pages."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Files:
    """Names by which one version says what a group may use and uses. cache: lines of memory.stat, in bytes.

    Used memory includes the page cache, which the kernel takes back before it refuses memory: on a machine
    that read a model's weights most of it is cache, and counted as used it left no room for a slot.
    """

    limit: str
    used: str
    cache: tuple[str, str]


_VERSION_1 = _Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_VERSION_2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def free_memory() -> int:
    """Returns the bytes that can be allocated: what the machine has, or less where a group allows less."""
    free = _sum(_PROC / "meminfo", ("MemAvailable:",)) * 1024
    for group, files in _groups():
        try:
            most = int((group / files.limit).read_text())
            used = int((group / files.used).read_text())
            cache = _sum(group / "memory.stat", files.cache)
        except (OSError, ValueError):
            continue  # a group without limits, "max", or a controller that is not here
        free = min(free, most - used + cache)
    return max(0, free)


def _groups() -> Iterator[tuple[Path, _Files]]:
    """Yields this process's group and those around it, whose limits hold for it, too, of both versions."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (_GROUPS / "memory", _VERSION_1) if controllers else (_GROUPS, _VERSION_2)
        # In a container the path may be the host's and the root the container's own group.
        group = root / path.lstrip("/")
        yield group, files
        for parent in group.parents:
            if parent.is_relative_to(root):
                yield parent, files


def _sum(path: Path, names: tuple[str, ...]) -> int:
    """Sums the numbers of the lines of these names."""
    lines = (line.split() for line in path.read_text().splitlines())
    return sum(int(words[1]) for words in lines if words and words[0] in names)


def use_huge_pages() -> None:
    """Has PyTorch ask Linux for pages of 2 MB for tensors larger than that; keeps what the environment says.

    Weights, keys and values are read from end to end at every step. With pages of 4 kB the processor looks
    up an address every 4 kB: a decode step took a tenth longer. No effect once torch has made a tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
