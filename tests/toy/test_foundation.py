"""The foundation models' training: what is where, the contrast of it, and the same weights from one seed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.cells import NOTHING, Region, cell_phrases, regions
from sharegpt4v.toy.contrast import RegionContrast, coverage
from sharegpt4v.toy.foundation import LENGTHS, make_foundation
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.shown import Length
from sharegpt4v.toy.sources import SOURCES
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.train.assemble import check_parts


def scenes(count: int = 100) -> Iterator[Scene]:
    names = tuple(SOURCES)
    return (make_scene(3, n, source=names[n % len(names)], difficulty=1 + n % 2) for n in range(count))


def test_every_object_is_named_in_its_cell_and_signs_and_landmarks_in_all_of_theirs() -> None:
    for scene in scenes():
        phrases = cell_phrases(scene)
        for thing in scene.objects:
            assert phrases[thing.cell] == f"{thing.size} {thing.colour} {thing.shape}"
        for word in scene.words:
            assert phrases[3 * word.row : 3 * word.row + 3] == [word.text] * 3
        filled = len(scene.objects) + 3 * len(scene.words) + 4 * bool(scene.landmark)
        assert phrases.count(NOTHING) == 9 - filled


def test_regions_name_each_thing_once_and_hold_it() -> None:
    for scene in scenes():
        found = list(regions(scene))
        assert found[0] == Region((0.0, 0.0, 1.0, 1.0), scene.background)
        named = {region.phrase: region.box for region in found[1:] if region.phrase != NOTHING}
        assert len(named) == len(scene.objects) + len(scene.words) + bool(scene.landmark)
        boxes = [(f"{o.size} {o.colour} {o.shape}", o.box) for o in scene.objects]
        boxes += [(word.text, word.box) for word in scene.words]
        for phrase, box in boxes:
            x0, y0, x1, y1 = named[phrase]
            assert x0 <= (box.x0 + box.x1) / 2 / scene.width <= x1
            assert y0 <= (box.y0 + box.y1) / 2 / scene.height <= y1
        assert all(0 <= r.box[0] < r.box[2] <= 1 and 0 <= r.box[1] < r.box[3] <= 1 for r in found)


def test_coverage_is_the_share_of_a_box_in_each_patch() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 0.5], [0.25, 0.5, 0.75, 1.0]])
    wanted = [[0.25] * 4, [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    torch.testing.assert_close(coverage(boxes, 2), torch.tensor(wanted))


def test_the_contrast_is_low_where_regions_lie_by_their_phrases_alone() -> None:
    torch.manual_seed(0)
    contrast = RegionContrast(64, build_tokenizer(), 512)
    nn.init.eye_(contrast.image.weight)
    with torch.no_grad():
        contrast.scale.fill_(5.0)
    names = ["large red ring", "small blue cross", "OPEN", NOTHING]
    quarters = [(x / 2, y / 2, x / 2 + 0.5, y / 2 + 0.5) for y in (0, 1) for x in (0, 1)]
    found = [[Region(box, name) for box, name in zip(quarters, names, strict=True)]]

    def features(order: list[str]) -> Tensor:
        return torch.cat([contrast.text(torch.tensor([contrast._ids(name)])) for name in order])[None]

    assert contrast(features(names), found).item() < 0.01
    assert contrast(features(names[::-1]), found).item() > 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foundation")
    for once in ("one", "two"):
        for _ in make_foundation(folder / once, dict.fromkeys(LENGTHS, Length(2, 4))):
            pass
    return folder


@pytest.mark.parametrize("part", LENGTHS)
def test_the_same_seed_gives_the_same_weights(part: str, made: Path) -> None:
    one, two = (made / once / part / "model.safetensors" for once in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_the_parts_are_what_the_chain_begins_from(made: Path) -> None:
    check_parts(made / "one" / "language", made / "one" / "tower", None)
    tower = CLIPVisionModel.from_pretrained(made / "one" / "tower", dtype=torch.float32)
    assert all(torch.isfinite(parameter).all() for parameter in tower.parameters())


def test_the_captioner_reads_as_the_language_model_does(made: Path) -> None:
    adapter = load_adapter(made / "one" / "captioner")
    assert isinstance(adapter.model, ShareCaptioner)
    language = LlamaForCausalLM.from_pretrained(made / "one" / "language", dtype=torch.float32)
    ids = torch.tensor([[1, 300, 301, 302]])
    with torch.inference_mode():
        torch.testing.assert_close(adapter.language_model(ids).logits, language(ids).logits)
