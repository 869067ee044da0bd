"""The static cache: what stands in a slot is read from there, and from nowhere else."""

import pytest
import torch
from transformers import LlamaConfig

from sharegpt4v.engine.graphs import bucket
from sharegpt4v.engine.slots import SlotCache, live_mask, padded_context

CPU = torch.device("cpu")


def _cache(slots: int = 4, context: int = 300, kv_heads: int = 2) -> SlotCache:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        vocab_size=8,
    )
    torch.manual_seed(0)
    cache = SlotCache(config, slots, context, torch.float32, CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return cache


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_slot_by_slot_equals_attention_under_a_mask(kv_heads: int) -> None:
    cache, lengths = _cache(kv_heads=kv_heads), [7, 250, 1]
    query = torch.randn(3, 4, 1, 64)
    together = cache.attend(0, query, live_mask(torch.tensor(lengths) - 1, max(lengths), torch.float32))
    torch.testing.assert_close(cache.attend_each(0, query, lengths), together)


def test_slots_are_read_apart_only_where_padding_is_dear() -> None:
    cache = _cache(kv_heads=4)  # 2 KB a token
    assert cache.better_apart([290, 10, 10, 10])
    assert not cache.better_apart([290, 280, 285, 290])


def test_a_moved_slot_keeps_its_tokens() -> None:
    cache = _cache()
    before = cache.keys[0][3, :, :20].clone()
    cache.move(3, 1, 20)
    assert torch.equal(cache.keys[0][1, :, :20], before)


def test_graph_sizes_are_rounded_up_within_what_there_is() -> None:
    assert bucket(1, 1, slots=32, context=600, live_step=256) == (8, 256)
    assert bucket(9, 257, slots=32, context=600, live_step=256) == (16, 512)
    assert bucket(16, 513, slots=32, context=600, live_step=256) == (16, 600)
    assert bucket(31, 490, slots=31, context=600, live_step=256) == (31, 512)


def test_one_graph_serves_all_lengths_where_length_changes_nothing() -> None:
    assert [bucket(8, live, 32, 600, live_step=600)[1] for live in (1, 257, 600)] == [600, 600, 600]


def test_a_mask_is_of_the_querys_dtype() -> None:
    """On a GPU attention refuses any other."""
    mask = live_mask(torch.tensor([0, 2]), 4, torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert (mask[:, 0, 0] == 0).tolist() == [[True, False, False, False], [True, True, True, False]]


def test_rows_of_the_cache_are_as_long_as_kernels_read_them() -> None:
    assert [padded_context(context) for context in (1, 8, 1022, 4096)] == [8, 16, 1024, 4104]
