"""The GPU's attention kernel, without a GPU: interpreted on CPU tensors, and compiled for real cards."""

import logging
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from packaging.version import Version
from transformers import LlamaConfig

from sharegpt4v.engine import gpu_kernels
from sharegpt4v.engine.gpu_kernels import check_against_mask, check_kernels, load_attend_live
from sharegpt4v.engine.llama import Heads, Places, TorchKernels
from sharegpt4v.engine.slots import SlotCache
from tests.commands import REPOSITORY, environment

HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed: make test-kernels")


@needs_triton
@pytest.mark.skipif(
    HAS_TRITON and Version(version("triton")) < Version("3.7"),
    reason="the interpreter of Triton before 3.7 wants NumPy before 2.4",
)
def test_the_kernel_computes_what_attention_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.interpreted_attention"],
        cwd=REPOSITORY,
        env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr


class Card:
    """Triton's driver for a card that is not there: kernels are compiled for it, launches do nothing."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (0, 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 100_000},
        )

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_the_kernel_compiles_for_cards(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, as `attend_live` launches it at ShareGPT4V-7B's heads, and once for all steps."""
    from triton.runtime.driver import driver

    from sharegpt4v.engine.triton_attention import _attend, attend_live

    monkeypatch.setattr(driver, "_active", Card(capability))
    _attend.device_caches.clear()
    query, keys = torch.zeros(16, 32, 1, 128).bfloat16(), torch.zeros(16, 32, 40, 128).bfloat16()
    positions = torch.zeros(16, dtype=torch.long)
    for rows in (1, 8, 16):
        attend_live(query[:rows], keys, keys.clone(), positions[:rows])
    [kernel] = _attend.device_caches[0][0].values()
    _attend.device_caches.clear()
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    code = kernel.asm["ptx"]
    # Keys and values come 16 bytes at a time, and two blocks of eight copies are ahead of the loop.
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10", code)) == 24
    assert "fma.rn.f32" in code
    assert ".local" not in code  # no registers in memory
    # Where a slot begins may lie beyond 2**31: the one product of two numbers that are not known before.
    assert re.search(r"mul\.wide\.s32\s+%rd\d+, %r\d+, %r\d+;|mul\.lo\.s64\s+%rd\d+, %rd\d+, %rd\d+;", code)


def _cache() -> SlotCache:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=8
    )
    return SlotCache(config, 2, 80, torch.bfloat16, torch.device("cpu"))


def test_where_the_kernel_cannot_run_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here because the cache is on a CPU; elsewhere there may be no C compiler."""
    with caplog.at_level(logging.WARNING):
        assert load_attend_live(_cache(), 2, torch.bfloat16) is None
    assert "length cannot be used here (" in caplog.text


@needs_triton
def test_a_lack_of_memory_is_no_reason_to_do_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It halves the slots instead."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(gpu_kernels, "check_against_mask", Mock(side_effect=torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        load_attend_live(_cache(), 2, torch.bfloat16)


def test_a_kernel_that_computes_something_else_is_refused() -> None:
    cache = _cache()

    def last_value(query: Any, keys: Any, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values[:1, :, int(positions[0])][:, :, None]

    with pytest.raises(AssertionError, match="not close"):
        check_against_mask(last_value, cache, 2, torch.bfloat16)
    assert not cache.keys[0].any()


def test_kernels_that_write_elsewhere_are_refused() -> None:
    class Misplaced(TorchKernels):
        def rotate_store(self, qkv: Any, cos: Any, sin: Any, places: Places, *cache: Any) -> Heads:
            return super().rotate_store(qkv, cos, sin, places._replace(cells=places.cells.roll(1)), *cache)

    check_kernels(TorchKernels(), _cache(), 2, torch.bfloat16)
    with pytest.raises(AssertionError, match="not close"):
        check_kernels(Misplaced(), _cache(), 2, torch.bfloat16)
