"""Packed rows against plain ones: the same loss and the same gradients, in both model families."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.load import load_adapter
from sharegpt4v.templates import IGNORE_INDEX
from sharegpt4v.train import packed_model
from sharegpt4v.train.attention import Segments
from sharegpt4v.train.collate import PackedRow, Sample, pack, pad, without_labels
from sharegpt4v.train.packed_model import PackedModel
from tests.models.random_weights import save_random_captioner, save_random_lmm
from tests.train.data import make_feed, open_records, write_conversations

FAMILIES: dict[str, Callable[[Path], Path]] = {"captioner": save_random_captioner, "lmm": save_random_lmm}


def samples_of(adapter: Adapter, tmp_path: Path) -> list[Sample]:
    records = open_records(write_conversations(tmp_path, 9, 3), tmp_path / "data")
    with make_feed(adapter, records) as feed:
        return [feed.maker.decode(feed.maker.encode(number)) for number in range(len(records))]


def unpacked_loss(adapter: Adapter, samples: list[Sample]) -> Tensor:
    """One dialogue at a time through the model's own forward, as transformers computes it."""
    total = torch.zeros(())
    for sample in samples:
        row = pack([sample])
        pixels = adapter.normalise(row.pixels) if len(row.pixels) else None
        logits = adapter.model(input_ids=row.input_ids, pixel_values=pixels).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], row.labels[0, 1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
    return total


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    named = adapter.model.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    adapter.model.zero_grad()
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_of_packed_rows_equal_the_unpacked_ones(family: str, tmp_path: Path) -> None:
    """Measured: loss 1e-7 relative, gradients 2e-7 absolute after division by the number of labels."""
    folder = FAMILIES[family](tmp_path / "model")
    plain, packed = load_adapter(folder), load_adapter(folder)
    samples = samples_of(plain, tmp_path)
    labels = sum(pack([sample]).label_tokens for sample in samples)
    expected = unpacked_loss(plain, samples) / labels
    expected.backward()  # type: ignore[no-untyped-call]
    model = PackedModel(packed)
    rows = [pack(samples[:5]), pack(samples[5:])]
    loss = sum((model(row) for row in rows), torch.zeros(())) / labels
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = gradients(packed), gradients(plain)
    assert set(theirs) <= set(ours) and len(theirs) > 30
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=0, atol=1e-6), name


def test_padding_changes_neither_loss_nor_gradients(tmp_path: Path) -> None:
    """Measured: the same loss, gradients of a summed loss 2e-5 absolute."""
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    samples, model = samples_of(adapter, tmp_path), PackedModel(adapter)
    packed = model(pack(samples))
    packed.backward()
    expected = gradients(adapter)
    row = pad(samples)
    assert row.input_ids.shape[1] == row.width * len(samples) > row.tokens  # type: ignore[operator]
    padded = model(row)
    padded.backward()
    assert padded.item() == pytest.approx(packed.item(), rel=1e-6)
    for name, gradient in gradients(adapter).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-4), name


def test_a_dialogue_does_not_see_its_neighbours(tmp_path: Path) -> None:
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    samples = samples_of(adapter, tmp_path)
    model = PackedModel(adapter)
    alone = model(pack([samples[1]]))
    beside = model(pack([without_labels(samples[0]), samples[1], without_labels(samples[2])]))
    assert beside.item() == pytest.approx(alone.item(), rel=1e-5)


def test_logits_in_pieces_give_the_same_loss_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    row, model = pack(samples_of(adapter, tmp_path)), PackedModel(adapter)
    whole = model(row)
    whole.backward()
    expected = gradients(adapter)
    monkeypatch.setattr(packed_model, "LOGITS_AT_ONCE", 7 * 512)
    pieces = model(row)
    pieces.backward()
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)
    for name, gradient in gradients(adapter).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-4), name


def test_text_alone_gives_tower_and_projector_a_gradient_of_zero(tmp_path: Path) -> None:
    """Under ZeRO-3 a worker whose row has no image would else wait for the others for ever."""
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    text = [sample for sample in samples_of(adapter, tmp_path) if not sample.images]
    PackedModel(adapter)(pack(text)).backward()
    found = {name: g for name, g in gradients(adapter).items() if "projector" in name or "layers.1." in name}
    assert any("vision_tower" in name for name in found) and any("projector" in name for name in found)
    assert all(not g.any() for name, g in found.items() if "language_model" not in name)


def test_a_row_without_a_label_adds_nothing(tmp_path: Path) -> None:
    adapter = load_adapter(save_random_captioner(tmp_path / "model"))
    loss = PackedModel(adapter)(pack([without_labels(samples_of(adapter, tmp_path)[0])]))
    loss.backward()
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(adapter).values())


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    adapter = load_adapter(save_random_lmm(tmp_path / "model"))
    row, model = pack(samples_of(adapter, tmp_path)), PackedModel(adapter)
    expected = model(row).item()
    adapter.model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter.model.train()
    loss = model(row)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert any("vision_tower" in name for name in gradients(adapter))


def test_segments_name_every_position_once() -> None:
    lengths = (5, 40, 37, 6, 12)
    segments = Segments.of(lengths)
    assert segments.starts.tolist() == [0, 5, 45, 82, 88, 100] and segments.longest == 40
    taken = torch.cat([positions[real] for positions, real in segments.groups])
    assert sorted(taken.tolist()) == list(range(100))
    assert taken[segments.back].tolist() == list(range(100))
    waste = [1 - real.float().mean().item() for _, real in segments.groups]
    assert max(waste) <= 0.2


def test_pack_counts_positions_from_zero_in_each_dialogue() -> None:
    from sharegpt4v.templates import TrainingIds

    a, b = TrainingIds([1, 9], [IGNORE_INDEX, 9]), TrainingIds([1, 5, 6], [IGNORE_INDEX, 5, 6])
    row: PackedRow = pack([Sample(a, ()), Sample(b, ())])
    assert row.input_ids.tolist() == [[1, 9, 1, 5, 6]] and row.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert row.lengths == (2, 3) and row.label_tokens == 3 and row.pixels.shape == (0, 0, 0, 3)
