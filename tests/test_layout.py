"""Who may import whom, held by processes that really import."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = REPOSITORY / "platform" / "sharegpt4v"
NARROW = ("models", "engine", "templates", "train/packing", "train/collate", "train/loop")


def _modules(*folders: Path) -> list[str]:
    files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*.py"))]
    dotted = [".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts) for file in files]
    return sorted(name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__"))


def _imported_beside(modules: list[str], forbidden: list[str]) -> set[str]:
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(' '.join(set(m.split('.')[0] for m in sys.modules) & set({forbidden!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return set(done.stdout.split())


def test_platform_is_a_source_root_and_no_package() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip()


def test_the_library_imports_neither_ray_nor_applications() -> None:
    modules = _modules(LIBRARY)
    assert len(modules) > 15
    assert _imported_beside(modules, ["ray", "serve", "pipelines", "cluster", "gradio", "fastapi"]) == set()


def test_models_and_engines_stay_usable_without_the_data_libraries() -> None:
    modules = _modules(*[path for name in NARROW for path in LIBRARY.glob(f"{name}*")])
    # transformers itself may bring the others in, so what counts is what our own modules ask for.
    asked = set()
    for name in modules:
        path = LIBRARY.parent / Path(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        lines = file.read_text(encoding="utf-8").splitlines()
        asked |= {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert asked & {"pydantic", "pyarrow", "yaml", "fsspec", "rich", "jinja2"} == set()


@pytest.mark.parametrize("package", ["pipelines", "serve"])
def test_applications_never_import_each_other(package: str) -> None:
    other = {"pipelines": "serve", "serve": "pipelines"}[package]
    for file in (REPOSITORY / package).rglob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(
                (f"from {other}", f"import {other}", "from cluster", "import cluster")
            ), file
