"""The compiled kernels of a CPU against PyTorch's operations."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from sharegpt4v.engine import cpu_kernels
from sharegpt4v.engine.cpu_kernels import load_attend_live, load_kernels
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.llama import Kernels, Llama, Places, TorchKernels
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import SlotCache
from tests.engine.compiling import needs_compiler, small_cache

CPU = torch.device("cpu")
TIGHT = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kept", "width"), [(2, 2, 32), (4, 2, 16), (6, 1, 80), (3, 3, 10)])
def test_each_slot_attends_to_its_own_positions(
    heads: int, kept: int, width: int, dtype: torch.dtype
) -> None:
    cache = small_cache(heads, kept, width, dtype)
    attend_live = load_attend_live(cache, heads, dtype)
    assert attend_live is not None
    keys, values = cache.keys[0].normal_(), cache.values[0].normal_()
    qkv = torch.randn(5, heads + 2 * kept, width).to(dtype)
    query = qkv[:, :heads, None]  # a view beside keys and values, as the engine has it
    positions = torch.tensor([0, 6, 7, 8, 47])
    found = attend_live(query, keys, values, positions)
    assert found.shape == query.shape and found.dtype == dtype
    for slot, position in enumerate(positions.tolist()):
        expected = scaled_dot_product_attention(
            query[slot : slot + 1].float(),
            keys[slot : slot + 1, :, : position + 1].float(),
            values[slot : slot + 1, :, : position + 1].float(),
            enable_gqa=heads != kept,
        )
        torch.testing.assert_close(found[slot : slot + 1].float(), expected, rtol=0, atol=TIGHT[dtype])


@needs_compiler
def test_what_is_no_number_spoils_its_own_slot_alone() -> None:
    cache = small_cache()
    attend_live = load_attend_live(cache, 2, torch.float32)
    assert attend_live is not None
    keys, values = cache.keys[0].normal_(), cache.values[0].normal_()
    keys[1, :, 3], values[2, :, 4], keys[3, :, 9] = torch.nan, torch.inf, torch.inf
    found = attend_live(torch.randn(5, 2, 1, 32), keys, values, torch.tensor([8] * 5))
    assert [bool(torch.isfinite(row).all()) for row in found] == [True, False, False, True, True]


def _small_operations(kernels: Kernels, dtype: torch.dtype, cache: SlotCache) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape).normal_(generator=draw).to(dtype)

    steep = torch.tensor([0.0, -0.0, 1e-30, 88, -88, 104, -104, 3e4, -3e4, torch.inf, torch.nan, 1]).to(dtype)
    hidden, norm = normal(7, 96), normal(96)
    slots, cells = torch.tensor([0, 0, 1, 4, 4, 4, 2]), torch.tensor([0, 1, 5, 47, 46, 0, 7])
    qkv, angles = normal(7, 8 * 32), normal(7, 32).float()
    found = [*kernels.add_norm(hidden.clone(), None, norm, 1e-6)]
    found += kernels.add_norm(hidden.clone(), normal(7, 96), norm, 1e-6)
    found += [kernels.gate(normal(7, 24)), kernels.gate(torch.cat([steep, torch.ones(12).to(dtype)])[None])]
    found += kernels.rotate_store(
        qkv, angles.cos(), angles.sin(), Places(cells, slots, cells), cache.keys[0], cache.values[0]
    )
    return [*found, cache.keys[0], cache.values[0]]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_small_operations_are_those_of_pytorch(dtype: torch.dtype) -> None:
    ours, theirs = (small_cache(4, 2, 32, dtype) for _ in range(2))
    kernels = load_kernels(ours, 4, dtype)
    assert not isinstance(kernels, TorchKernels)
    pairs = zip(
        _small_operations(kernels, dtype, ours), _small_operations(TorchKernels(), dtype, theirs), strict=True
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=TIGHT[dtype], atol=2 * TIGHT[dtype], equal_nan=True)


@needs_compiler
def test_an_engine_computes_with_them() -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=32
    )
    sampler = TokenSampler(2, 32, [1], CPU)
    for stored, compiled in ((torch.float32, True), (torch.float8_e4m3fn, False)):
        decoder = Decoder(Llama(LlamaForCausalLM(config).eval()), sampler, 2, 16, torch.float32, CPU, stored)
        assert (decoder._attend_live is not None) is compiled
        assert isinstance(decoder._kernels, TorchKernels) is not compiled


@needs_compiler
def test_kernels_that_compute_something_else_are_not_used(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = tmp_path / "cpu_kernels.cpp"
    source = cpu_kernels._SOURCE.read_text()
    assert source.count("scores[i] - best") == 1 and source.count("angle_cos[half + i] +") == 1
    source = source.replace("scores[i] - best", "scores[i] - best - 1.0f * (i & 1)")
    wrong.write_text(source.replace("other * angle_cos[half + i] +", "other * angle_cos[half + i] -"))
    monkeypatch.setattr(cpu_kernels, "_SOURCE", wrong)
    assert load_attend_live(small_cache(), 2, torch.float32) is None
    assert isinstance(load_kernels(small_cache(), 2, torch.float32), TorchKernels)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
