"""The one runtime environment: what a node needs to run our code, beside what its image has installed."""

from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent

EXCLUDES = ["/.git/", "/.venv/", "/runs/", "/toy-images/", "/dist/", "**/__pycache__/", "*.log"]
"""Never shipped to nodes: large, private to this machine, or made there again."""


def runtime_env() -> dict[str, Any]:
    """Returns the runtime environment for `ray.init(runtime_env=)` from a driver on this machine.

    working_dir carries pipelines, serve and cluster; the library goes as a module because platform/ is a
    source root and not a package. `cluster/runtime_env.yaml` says the same for `ray job submit`.
    """
    return {
        "working_dir": str(REPOSITORY),
        "py_modules": [str(REPOSITORY / "platform" / "sharegpt4v")],
        "excludes": EXCLUDES,
    }
