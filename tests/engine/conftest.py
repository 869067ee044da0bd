"""A captioner with random weights for tests of the torch engine, and a folder for compiled libraries."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sharegpt4v.engine.cpu_library import load_library
from sharegpt4v.engine.cpu_linear import load_linear
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from tests.models.random_weights import save_random_captioner


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    torch.set_num_threads(1)
    return load_adapter(save_random_captioner(tmp_path_factory.mktemp("captioner")))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Gives this test a folder of its own for compiled libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (load_library, load_linear):
        cached.cache_clear()
    yield tmp_path / "cache" / "sharegpt4v" / "kernels"
    for cached in (load_library, load_linear):
        cached.cache_clear()
