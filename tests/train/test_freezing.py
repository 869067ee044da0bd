"""Each stage changes exactly the tensors of its recipe: everything else stays bit-identical."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from sharegpt4v.models.captioner import ImageSampler, ShareCaptioner
from sharegpt4v.models.freeze import TrainStage, freeze, freeze_captioner, part_of
from sharegpt4v.models.load import load_adapter
from sharegpt4v.train.collate import pack
from sharegpt4v.train.packed_model import PackedModel
from tests.models.random_weights import save_random_captioner, save_random_lmm
from tests.train.data import make_feed, open_records, write_conversations


def changed_by_a_step(model: PackedModel, tmp_path: Path) -> set[str]:
    """The names of parameters that an optimizer step with weight decay changes."""
    before: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    records = open_records(write_conversations(tmp_path, 6, 2), tmp_path / "data")
    with make_feed(model.adapter, records) as feed:
        row = pack([feed.maker.decode(feed.maker.encode(number)) for number in range(len(records))])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model(row).backward()
    optimizer.step()
    return {n for n, p in model.model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("stage", ["align", "pretrain", "sft"])
def test_a_step_changes_what_its_stage_trains(stage: TrainStage, tmp_path: Path) -> None:
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    assert isinstance(adapter.model, LlavaForConditionalGeneration)
    trained = freeze(adapter.model, stage, first_block=2)
    assert changed_by_a_step(PackedModel(adapter), tmp_path) == set(trained)
    parts = {"align": {"projector"}, "sft": {"projector", "language"}}
    assert {part_of(name) for name in trained} == parts.get(stage, {"projector", "language", "vision"})


@pytest.mark.parametrize("sampler", ["resampler", "qformer"])
def test_a_step_of_the_captioner_s_stage_changes_every_part(sampler: ImageSampler, tmp_path: Path) -> None:
    """A parameter without a gradient would hang ZeRO, so each one that is said to train must change."""
    adapter = load_adapter(save_random_captioner(tmp_path / "model", sampler))
    assert isinstance(adapter.model, ShareCaptioner)
    trained = freeze_captioner(adapter.model)
    assert changed_by_a_step(PackedModel(adapter), tmp_path) == set(trained)
    assert {part_of(name) for name in trained} == {"projector", "language", "vision"}
    assert part_of("resampler.kv_proj.weight") == part_of("query_tokens") == "projector"
