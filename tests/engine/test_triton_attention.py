"""The GPU's attention kernel, without a GPU: interpreted on CPU tensors, and compiled for real cards."""

import logging
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig

from sharegpt4v.engine.decoder import triton_attention
from sharegpt4v.engine.slots import SlotCache
from tests.commands import REPOSITORY, environment

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed: pip install '.[kernels]'"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_triton
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


@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_the_kernel_compiles_for_cards(capability: int) -> None:
    """To machine code, by the assembler that comes with Triton, at ShareGPT4V-7B's shape."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sharegpt4v.engine.triton_attention import _attend

    tensors = dict.fromkeys(("query", "keys", "values", "out"), "*bf16")
    signature = tensors | {"positions": "*i64", "scale": "fp32", "context": "i32"}
    constants = {"HEADS": 32, "GROUP": 1, "WIDTH": 128, "BLOCK": 32}
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in _attend.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(ordered) if ordered[name][0] == "*"
    }
    kernel = triton.compile(
        ASTSource(_attend, ordered, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True},
    )
    assert kernel.asm["cubin"].startswith(b"\x7fELF")
    code = kernel.asm["ptx"]
    # Keys and values come 16 bytes at a time, and two blocks of eight copies are ahead of the loop.
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10", code)) == 24
    assert ".local" not in code  # no registers in memory


def test_where_it_cannot_run_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Here because there is no GPU; elsewhere there may be no C compiler."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1, vocab_size=8
    )
    cache = SlotCache(config, 2, 8, torch.float32, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        assert triton_attention(cache, 2) is None
    assert "which is slower: its kernel cannot be compiled here (" in caplog.text


@needs_triton
@needs_gpu
def test_the_kernel_on_a_gpu() -> None:
    from sharegpt4v.engine.triton_attention import attend_live

    torch.manual_seed(0)
    query = torch.randn(64, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    keys, values = (torch.randn(64, 32, 1_024, 128, device="cuda", dtype=query.dtype) for _ in range(2))
    positions = torch.randint(1_024, (64,), device="cuda")
    seen = (torch.arange(1_024, device="cuda") <= positions[:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), keys.float(), values.float(), attn_mask=seen
    )
    torch.testing.assert_close(
        attend_live(query, keys, values, positions).float(), expected, rtol=2e-2, atol=2e-3
    )
