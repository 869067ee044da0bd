"""Who may import whom, held by processes that really import."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = REPOSITORY / "platform" / "sharegpt4v"
NEEDS_AN_EXTRA = (
    ("sharegpt4v.engine.triton_attention", "triton"),
    ("sharegpt4v.engine.triton_llama", "triton"),
)
"""Modules that import at their top what `make setup` does not install everywhere, and what that is."""
FORBIDDEN = ["ray", "serve", "pipelines", "cluster", "gradio", "fastapi"]
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
    apart = {module for module, _ in NEEDS_AN_EXTRA}
    modules = [name for name in _modules(LIBRARY) if name not in apart]
    assert len(modules) > 15
    assert _imported_beside(modules, FORBIDDEN) == set()


@pytest.mark.parametrize(("module", "extra"), NEEDS_AN_EXTRA)
def test_modules_that_need_an_extra_import_neither(module: str, extra: str) -> None:
    assert module in _modules(LIBRARY)
    if find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed: make test-kernels")
    assert _imported_beside([module], FORBIDDEN) == set()


def test_models_and_engines_stay_usable_without_the_data_libraries() -> None:
    modules = _modules(*[path for name in NARROW for path in LIBRARY.glob(f"{name}*")])
    # transformers itself may bring the others in, so what counts is what our own modules ask for.
    asked = set()
    for name in modules:
        path = LIBRARY.parent / Path(*name.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        lines = file.read_text(encoding="utf-8").splitlines()
        asked |= {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    # jinja2 is none of them: transformers' chat templates need it.
    assert asked & {"pydantic", "pyarrow", "yaml", "fsspec", "rich"} == set()


def test_configurations_stay_importable_without_what_takes_long() -> None:
    heavy = ["torch", "transformers", "numpy", "pyarrow", "PIL", "fsspec", "cyclopts"]
    assert _imported_beside(_modules(LIBRARY / "config"), heavy) == set()


_OTHERS_FLAGS = {"--always", "--dirty", "--abbrev", "--dataset"}
"""Of git, pip and ms-swift, in commands that the library runs or prints."""


def test_the_library_names_no_flag() -> None:
    """Its errors name fields; flags are the command line's business."""
    found = {}
    for file in LIBRARY.rglob("*.py"):
        if file == LIBRARY / "toy" / "__main__.py":  # a command line itself
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        if named := set(re.findall(r"--[a-z][\w-]*", " ".join(texts))) - _OTHERS_FLAGS:
            found[file.name] = named
    assert found == {}


ORDER = (
    *(
        "credentials",
        "errors",
        "collector",
        "dialogue",
        "atomic",
        "records",
        "prompts",
        "gate",
        "templates",
        "images",
    ),
    *("manifest", "inspection", "models", "checkpoints", "engine", "python_api", "config", "run"),
    *("captions", "train", "evaluate", "analysis", "toy"),
)
"""Parts of the library; each may import those before it, and itself."""


def _asked_for(file: Path, top: str) -> set[str]:
    """Second parts of the modules below `top` that a file imports anywhere, in functions as well."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith(f"{top}.")}


@pytest.mark.parametrize("part", ORDER)
def test_the_parts_of_the_library_import_one_way(part: str) -> None:
    files = [*LIBRARY.glob(f"{part}.py"), *(LIBRARY / part).rglob("*.py")]
    allowed = set(ORDER[: ORDER.index(part) + 1])
    asked = {str(file.relative_to(LIBRARY)): _asked_for(file, "sharegpt4v") - allowed for file in files}
    assert {name: parts for name, parts in asked.items() if parts} == {}


def test_every_part_of_the_library_has_a_place_in_the_order() -> None:
    parts = {
        path.stem for path in LIBRARY.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("package", ["pipelines", "serve", "cluster"])
def test_applications_never_import_each_other(package: str) -> None:
    """Of cluster they take what connects, fails and parses; cluster itself loads commands by name."""
    others = {"pipelines", "serve", "cluster"} - {package}
    allowed = {
        "cluster": {"session", "watchdog", "errors", "command_line"},
        "pipelines": set(),
        "serve": set(),
    }
    for file in (REPOSITORY / package).rglob("*.py"):
        for other in others:
            assert _asked_for(file, other) <= allowed[other], file
