"""What is sent to the nodes of a cluster: our packages and nothing that lies beside them."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from cluster.env import PACKAGES, package_folder, runtime_env
from tests.commands import REPOSITORY, environment

LARGE = 50 * 2**20


def test_the_yaml_for_jobs_says_what_drivers_send() -> None:
    said = yaml.safe_load((REPOSITORY / "cluster" / "runtime_env.yaml").read_text())
    said["working_dir"] = str(REPOSITORY / said["working_dir"])
    said["py_modules"] = [str(REPOSITORY / module) for module in said["py_modules"]]
    assert said == runtime_env()


def test_what_is_sent_is_what_the_wheel_holds() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    built = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {Path(folder).name for folder in built} == set(PACKAGES)


@pytest.mark.parametrize("sources", [".", "platform"], ids=["wheel", "checkout"])
def test_nothing_beside_our_packages_is_sent(sources: str, tmp_path: Path) -> None:
    """sources: where the library is; an installed wheel has it beside the other packages."""
    folder = tmp_path / "folder"
    for name in PACKAGES:
        parent = folder / (sources if name == "sharegpt4v" else ".")
        shutil.copytree(package_folder(name), parent / name)
    beside = ("models/7b/model.safetensors", "my-run/captions/0.parquet", "env311/lib/x.so", "torch/y.so")
    for name in (*beside, "pipelines/steps/__pycache__/x.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(LARGE)
    sent = _sent(_runtime_env([folder / sources, folder]), tmp_path)
    assert {name.split("/")[0] for name in sent} == {*PACKAGES, "README"}
    assert sent["sharegpt4v/toy/checkpoints/captioner/model.safetensors"] > 2**20
    assert "sharegpt4v/toy/foundation.py" in sent
    assert not any("__pycache__" in name or "checkpoints/foundation" in name for name in sent)
    assert 4 * 2**20 < sum(sent.values()) < 8 * 2**20


def _runtime_env(path: list[Path]) -> dict[str, Any]:
    """As a process prints it that imports our packages from `path`."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.env"],
        env=environment() | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout)
    assert all(Path(module).parent in path for module in said["py_modules"])
    return said


def _sent(environment: dict[str, Any], folder: Path) -> dict[str, int]:
    """Name -> bytes of all files in the packages that Ray makes of it."""
    sizes: dict[str, int] = {}
    for index, source in enumerate([environment["working_dir"], *environment["py_modules"]]):
        package = folder / f"{index}.zip"
        create_package(
            source,
            package,
            include_gitignore=True,
            include_parent_dir=index > 0,
            excludes=environment["excludes"],
        )
        with zipfile.ZipFile(package) as archive:
            sizes |= {entry.filename: entry.file_size for entry in archive.infolist()}
    return sizes
