"""The end product goes to the released layout and comes back with equal tensors."""

from pathlib import Path

import pytest
import torch

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from tests.checkpoints.released import llava_tensors, save_llava, save_tower, tower_tensors
from tests.checkpoints.test_convert_llava import read
from tests.train.runs import prepare_job, train_here

SHARD = 300_000
"""Bytes: the tensors come in several files."""


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_sft_has_trained_goes_to_the_released_layout_and_back(lora_rank: int, tmp_path: Path) -> None:
    """From a released checkpoint, as one continues ShareGPT4V-7B, also with adapters that were merged."""
    model = save_llava(tmp_path / "ShareGPT4V-7B", llava_tensors(320))
    tower = save_tower(tmp_path / "tower", tower_tensors())
    convert(plan_conversion(model, vision_tower=tower), tmp_path / "start", SHARD)
    job = prepare_job(tmp_path, init=str(tmp_path / "start"), max_steps=2, lora_rank=lora_rank)
    train_here(job)
    convert(plan_conversion(job.product, to="released"), tmp_path / "released", SHARD)
    released = tmp_path / "released"
    back = plan_conversion(released, vision_tower=released / "vision_tower")
    convert(back, tmp_path / "back", SHARD)
    trained, again, start = read(job.product), read(tmp_path / "back"), read(tmp_path / "start")
    assert trained.keys() == again.keys() == start.keys()
    # The released tables end with the words that they know; behind them are <image> and <pad>, and fillers.
    words = 320
    for name in trained:
        rows = words if name.endswith(("embed_tokens.weight", "lm_head.weight")) else None
        assert torch.equal(trained[name][:rows], again[name][:rows]), name
    assert any(not torch.equal(trained[name], start[name]) for name in trained)
