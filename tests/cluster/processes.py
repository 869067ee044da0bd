"""Finds and kills the processes of one cluster, never those of another on the same machine."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


def descendants(root: int) -> dict[int, str]:
    """pid -> command line of all that `root` started, directly or not. Ray titles its workers `ray::STEP`."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, queue = {}, [root]
    while queue:
        for pid in children.get(queue.pop(), []):
            found[pid] = _command_line(pid)
            queue.append(pid)
    return found


def kill_one(root: int, title: str, seconds: float = 30) -> int:
    """kill -9 of the first descendant of `root` whose command line contains `title`. Returns its pid."""
    deadline = time.monotonic() + seconds
    while True:
        seen = descendants(root)
        for pid, line in seen.items():
            if title in line:
                os.kill(pid, signal.SIGKILL)
                return pid
        assert time.monotonic() < deadline, f"no process {title!r} under {root}"
        time.sleep(0.02)


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The command's name stands in parentheses and may contain any character.
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except (FileNotFoundError, ProcessLookupError):
                continue
            yield int(entry.name), int(parent)


def _command_line(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
