"""The one runtime environment: what a node needs to run our code, beside what its image has installed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("pipelines", "serve", "cluster", "sharegpt4v")
"""All that is sent to nodes, whatever else lies in the checkout or in site-packages beside them."""

JOB_FOLDER = Path(__file__).resolve().parent / "job_folder"
"""Where jobs and workers run: with a folder of the head's own, Python would find that one's modules first."""

EXCLUDES = ["__pycache__", "foundation"]
"""The second one: models that only the toy chain trains from, 4 MB."""


def runtime_env() -> dict[str, Any]:
    """Returns the runtime environment for `ray.init(runtime_env=)` from a driver on this machine.

    Its folders are those that the packages are imported from, in a checkout or in site-packages.
    `cluster/runtime_env.yaml` holds the same for `ray job submit` in a checkout.
    """
    return {
        "working_dir": str(JOB_FOLDER),
        "py_modules": [str(package_folder(name)) for name in PACKAGES],
        "excludes": EXCLUDES,
    }


def package_folder(name: str) -> Path:
    """Returns the folder of an importable package, without importing it."""
    spec = find_spec(name)
    assert spec is not None and spec.submodule_search_locations, f"{name} is not importable"
    return Path(spec.submodule_search_locations[0]).resolve()


if __name__ == "__main__":
    print(json.dumps(runtime_env()))
