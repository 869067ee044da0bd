"""Plans at full size: every released name finds its place in the full model, from headers alone.

The files are as large as released ones and hold nothing: they are sparse, and a plan reads no tensor.
"""

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharegpt4v.checkpoints.captioner import CONTROLS
from sharegpt4v.checkpoints.convert import plan_conversion
from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import ImageSampler
from tests.checkpoints import released
from tests.checkpoints.released import Tensors, pieces, sentencepiece_model
from tests.models.test_full_size import share_captioner, share_gpt4v

FULL = {
    "LORA_RANK": 256,
    "LORA_ALPHA": 256,
    "QUERIES": 256,
    "RESAMPLER_WIDTH": 4096,
    "QFORMER_WIDTH": 768,
    "QFORMER_LAYERS": 12,
    "QFORMER_MLP": 3072,
    "TOWER": {"width": 1024, "mlp": 4096, "blocks": 24, "heads": 16, "image": 336, "patch": 14},
    "EVA": {"width": 1408, "mlp": 6144, "blocks": 39, "image": 448, "patch": 14},
}
SEVEN = {"WIDTH": 4096, "MLP": 11008, "LAYERS": 32, "HEADS": 32}
THIRTEEN = {"WIDTH": 5120, "MLP": 13824, "LAYERS": 40, "HEADS": 40}


def nothing(self: released.Random, *shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
    return torch.empty(shape, dtype=self.dtype, device="meta")


def full_size(monkeypatch: pytest.MonkeyPatch, **sizes: object) -> None:
    for name, value in (FULL | sizes).items():
        monkeypatch.setattr(released, name, value)
    monkeypatch.setattr(released.Random, "tensor", nothing)
    monkeypatch.setattr(released, "save_bins", save_sparse)


def save_sparse(folder: Path, tensors: Tensors) -> None:
    """Shards of 100 tensors of 16-bit floats, each a header and a hole, and their index."""
    folder.mkdir()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for first in range(0, len(names), 100):
        part = names[first : first + 100]
        _save_sparse(folder / f"model-{first}.safetensors", {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, f"model-{first}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _save_sparse(path: Path, tensors: Tensors) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("sizes", "preset"), [(SEVEN, (4096, 11008, 32)), (THIRTEEN, (5120, 13824, 40))])
def test_released_share_gpt4v_fills_the_full_model(
    sizes: dict[str, int], preset: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size(monkeypatch, **sizes)
    inside = {f"model.vision_tower.vision_tower.{n}": t for n, t in released.tower_tensors().items()}
    model = released.save_llava(tmp_path / "model", released.llava_tensors(32000) | inside)
    planned = plan_conversion(model)
    (_, rules), *others = planned.parts
    renames = {
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    got = {
        next(
            new + r.name.removeprefix(old) for old, new in renames.items() if r.name.startswith(old)
        ): r.shape
        for r in rules
    }
    assert others == []
    assert got == share_gpt4v(*preset)


def test_tower_without_its_last_block_is_no_smaller_tower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size(monkeypatch, **SEVEN)
    kept = {n: t for n, t in released.tower_tensors().items() if ".layers.23." not in n}
    inside = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in kept.items()}
    model = released.save_llava(tmp_path / "model", released.llava_tensors(32000) | inside)
    with pytest.raises(UserError, match=r"16 tensors are missing, vision_model\.encoder\.layers\.23\."):
        plan_conversion(model)


@pytest.mark.parametrize(("sampler", "queries"), [("resampler", 256), ("qformer", 64)])
def test_released_share_captioner_fills_the_full_model(
    sampler: ImageSampler, queries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_size(monkeypatch, **SEVEN, QUERIES=queries)
    tensors = released.captioner_tensors(sampler, 103168)
    model = released.save_captioner(tmp_path / "model", tensors)
    (model / "tokenizer.model").write_bytes(sentencepiece_model(pieces(320, CONTROLS)))  # a full one: seconds
    planned = plan_conversion(model)
    ((_, rules),) = planned.parts
    assert {rule.name: rule.shape for rule in rules} == share_captioner(sampler)
    merged = sum(len(rule.takes) == 3 for rule in rules)
    assert merged == (4 * 32 if sampler == "qformer" else 0)
    assert planned.bytes == 2 * (8_417_326_592 if sampler == "qformer" else 8_399_717_632)
