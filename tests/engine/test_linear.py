"""Packed matrices give the same products, and are not made where memory is short."""

import platform

import pytest
import torch
from torch import nn

from sharegpt4v.engine.linear import LEAST_PACKED, Linear, join, pack

needs_packing = pytest.mark.skipif(
    platform.machine() != "x86_64" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"),
    reason="this torch packs no matrices here",
)


def _large(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, Linear]:
    torch.manual_seed(0)
    module = nn.Linear(1024, LEAST_PACKED // 1024 + 1, bias=bias).to(dtype)
    return module, join(module)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_products_are_the_modules_whatever_the_number_of_tokens(
    dtype: torch.dtype, error: float, bias: bool
) -> None:
    module, layer = _large(dtype, bias)
    pack([layer])
    if layer.packed is None and dtype == torch.bfloat16:
        pytest.skip("oneDNN has no bfloat16 for this CPU")
    assert layer.packed is not None
    with torch.inference_mode():
        for tokens in (1, 7, 64, 300):
            inputs = torch.randn(tokens, 1024).to(dtype)
            # Measured: 2e-6, and in bfloat16 one rounding of values up to 2.
            torch.testing.assert_close(layer(inputs), module(inputs), rtol=0, atol=error)


@needs_packing
def test_without_memory_for_copies_matrices_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    module, layer = _large()
    monkeypatch.setattr("sharegpt4v.engine.linear.free_memory", lambda: 2 * module.weight.nbytes - 1)
    pack([layer])
    assert layer.packed is None
    monkeypatch.setattr("sharegpt4v.engine.linear.free_memory", lambda: 2 * module.weight.nbytes)
    pack([layer])
    assert layer.packed is not None


def test_small_matrices_are_not_packed() -> None:
    layer = join(nn.Linear(128, 512))
    pack([layer])
    assert layer.packed is None
