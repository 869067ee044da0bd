"""Small training data: scenes of the toy world and conversations about them."""

import json
from pathlib import Path
from typing import Any

from sharegpt4v.models.adapter import Adapter
from sharegpt4v.toy.images import write_images
from sharegpt4v.train.feed import Feed
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.records import Records, take_in
from sharegpt4v.train.samples import SampleMaker, SampleRules
from sharegpt4v.train.sets import TrainingSet


def write_conversations(folder: Path, count: int = 24, text_only: int = 6, rounds: int = 3) -> Path:
    """Toy images, and a LLaVA file of dialogues of up to `rounds` rounds about them."""
    write_images(folder / "images", count, seed=5)
    truth = [json.loads(line) for line in (folder / "images" / "truth.jsonl").read_text().splitlines()]
    records: list[dict[str, Any]] = []
    for number, scene in enumerate(truth):
        turns = [
            {"from": "human", "value": "<image>\nA photo of"},
            {"from": "gpt", "value": scene["brief"] if number % 3 else scene["caption"]},
        ]
        for more in range(number % rounds):
            turns.append({"from": "human", "value": f"says {more}"})
            turns.append({"from": "gpt", "value": scene["caption"] if more else "red"})
        records.append({"id": scene["id"], "image": scene["image"], "conversations": turns})
    for number in range(text_only):
        turns = [{"from": "human", "value": "A photo"}, {"from": "gpt", "value": "red " * (number + 1)}]
        records.append({"id": f"text-{number}", "conversations": turns})
    path = folder / "talk.json"
    path.write_text(json.dumps(records))
    return path


def open_records(path: Path, folder: Path, weight: float = 1.0) -> Records:
    """Takes in one file whose images are in `images` beside it."""
    images = path.parent / "images"
    take_in([TrainingSet(str(path), weight)], str(images) if images.is_dir() else None, folder)
    return Records(folder)


def make_feed(
    adapter: Adapter,
    records: Records,
    *,
    worker: int = 0,
    workers: int = 1,
    batch: int = 8,
    budget: int = 700,
) -> Feed:
    """A feed as training has it, with the adapter's own template."""
    rules = SampleRules(adapter.image_size, "squash", budget)
    order = SampleOrder(records.intake.counts, [1.0] * len(records.intake.counts), 3, batch)
    maker = SampleMaker(records, adapter.template, rules)
    return Feed(maker, order, worker=worker, workers=workers, budget=budget, threads=2)
