"""One line that says what a figure was measured on."""

import os
import platform
from datetime import date
from pathlib import Path


def describe_machine() -> str:
    """Processor, cores, load and date: figures of two machines are never compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    load = os.getloadavg()[0]
    python = platform.python_version()
    return f"{date.today()}, {model}, {os.cpu_count()} cores, load {load:.1f}, Python {python}"
