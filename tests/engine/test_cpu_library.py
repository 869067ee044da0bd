"""Libraries that are compiled here, and machines that cannot compile them."""

import ctypes
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sharegpt4v.engine.cpu_kernels import load_attend_live, load_kernels
from sharegpt4v.engine.cpu_library import load_library
from sharegpt4v.engine.cpu_linear import Panels, load_linear
from sharegpt4v.engine.linear import Linear, pack
from sharegpt4v.engine.llama import TorchKernels
from tests.commands import REPOSITORY, environment
from tests.engine.compiling import needs_compiler, small_cache

SOURCE = """extern "C" int answer() { return ANSWER; }"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def _answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.answer())


@needs_compiler
def test_a_library_is_compiled_once(own_cache: Path, source: Path) -> None:
    assert _answer(load_library(source, "ANSWER=42")) == 42
    [compiled] = own_cache.iterdir()
    before = compiled.stat().st_mtime_ns
    load_library.cache_clear()
    assert _answer(load_library(source, "ANSWER=42")) == 42
    assert compiled.stat().st_mtime_ns == before
    assert _answer(load_library(source, "ANSWER=7")) == 7
    source.write_text(SOURCE.replace("ANSWER;", "ANSWER + 1;"))
    load_library.cache_clear()
    assert _answer(load_library(source, "ANSWER=7")) == 8
    assert len(list(own_cache.iterdir())) == 3


def _in_processes(count: int, cache_home: Path) -> list[int]:
    code = (
        "from sharegpt4v.engine import cpu_linear, cpu_library; "
        "cpu_library.load_library(cpu_linear._SOURCE)._name"
    )
    env = environment() | {"XDG_CACHE_HOME": str(cache_home)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        for _ in range(count)
    ]
    return [process.wait(120) for process in started]


@needs_compiler
def test_processes_that_start_together_each_get_them(tmp_path: Path) -> None:
    assert _in_processes(3, tmp_path / "Ünïcode") == [0, 0, 0]
    [compiled] = (tmp_path / "Ünïcode" / "sharegpt4v" / "kernels").iterdir()
    size = compiled.stat().st_size
    compiled.write_bytes(b"not a library")
    assert _in_processes(1, tmp_path / "Ünïcode") == [0]
    assert compiled.stat().st_size == size


@needs_compiler
def test_a_folder_that_others_can_write_is_not_trusted(own_cache: Path, source: Path) -> None:
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    assert _answer(load_library(source, "ANSWER=42")) == 42  # from a temporary folder
    assert not list(own_cache.iterdir())


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("", "there is no C\\+\\+ compiler here"),
        ("false", "false does not compile it: no message"),
        ("/nonexistent/g++", "does not compile it"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other systems never compile")
def test_without_a_compiler_pytorch_computes_and_the_log_says_why(
    compiler: str,
    why: str,
    own_cache: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", os.environ["PATH"] if compiler else "")
    with caplog.at_level(logging.INFO):
        assert load_library(source, "ANSWER=42") is None
        assert load_library(source, "ANSWER=42") is None
    [message] = caplog.messages  # of one attempt
    assert re.search(f"answer is computed by PyTorch's own calls, which takes longer: .*{why}", message)


@needs_compiler
@pytest.mark.usefixtures("own_cache")
def test_an_engine_without_a_compiler_computes_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    cache, weight = small_cache(), torch.ones(1024, 512)
    assert load_attend_live(cache, 2, torch.float32) is None
    assert isinstance(load_kernels(cache, 2, torch.float32), TorchKernels)
    assert load_linear() is None
    layer = Linear(weight, None)
    pack([layer])
    assert not isinstance(layer.packed, Panels)
    torch.testing.assert_close(layer(torch.ones(2, 512)), torch.full((2, 1024), 512.0))
