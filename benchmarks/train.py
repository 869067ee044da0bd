"""Training speed on CPU at toy size: packed rows, padded ones and transformers' Trainer; and the data side.

    python -m benchmarks.train --steps 12 --batch 32

All sides train the same model on the same samples in the same steps, after a warm-up step each. Lengths are
spread as in the 665K mix: 60 % one short answer, 30 % some rounds, 10 % long dialogues; 6 % are text alone.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.machine import describe_machine
from sharegpt4v.models.adapter import LmmAdapter
from sharegpt4v.models.freeze import freeze
from sharegpt4v.models.lmm import share_gpt4v_config
from sharegpt4v.models.load import lmm_template
from sharegpt4v.templates import IGNORE_INDEX, TrainingIds
from sharegpt4v.toy.images import write_images
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.train.collate import Sample, collate, pack
from sharegpt4v.train.feed import Feed
from sharegpt4v.train.order import SampleOrder
from sharegpt4v.train.packed_model import PackedModel
from sharegpt4v.train.packing import plan_step
from sharegpt4v.train.records import Records, take_in
from sharegpt4v.train.samples import SampleMaker, SampleRules
from sharegpt4v.train.sets import TrainingSet

BUDGET = 2048
"""Tokens of a packed row, and of a padded micro-batch."""

KINDS = ((0.60, 2, 12, 1), (0.30, 40, 160, 4), (0.10, 300, 700, 8))
"""Share, fewest and most answer tokens in all, rounds."""


def make_samples(count: int) -> list[Sample]:
    """Returns samples with random ids; question tokens have no label."""
    rng = np.random.default_rng(0)
    size, image_id, image_tokens = 48, 3, 36
    samples = []
    for _ in range(count):
        _, least, most, rounds = KINDS[rng.choice(len(KINDS), p=[kind[0] for kind in KINDS])]
        ids, labels = [1] + [20] * 36, [IGNORE_INDEX] * 37
        pictured = rng.random() > 0.06
        if pictured:
            ids, labels = ids + [image_id] * image_tokens, labels + [IGNORE_INDEX] * image_tokens
        for _ in range(rounds):
            question, answer = int(rng.integers(6, 16)), max(1, int(rng.integers(least, most)) // rounds)
            words = rng.integers(10, 400, question + answer).tolist()
            ids, labels = ids + words, labels + [IGNORE_INDEX] * question + words[question:]
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        samples.append(Sample(TrainingIds(ids, labels), (pixels,) if pictured else ()))
    return samples


def make_model() -> PackedModel:
    torch.manual_seed(0)
    config = share_gpt4v_config("toy")
    model = LlavaForConditionalGeneration(config)
    freeze(model, "sft")
    return PackedModel(LmmAdapter(Path("random"), model, lmm_template(build_tokenizer(), config)))


Step = Callable[[list[Sample]], None]


def packed(model: PackedModel, optimizer: torch.optim.Optimizer) -> Step:
    def step(samples: list[Sample]) -> None:
        labels = sum(sum(label != IGNORE_INDEX for label in each.ids.labels) for each in samples)
        plan = plan_step([len(each.ids.input_ids) for each in samples], 1, BUDGET)
        for row in plan.rows[0]:
            torch.autograd.backward(model(pack([samples[place] for place in row])) / labels)
        optimizer.step()
        optimizer.zero_grad()

    return step


def padded(model: PackedModel, optimizer: torch.optim.Optimizer, grouped: bool) -> Step:
    """Micro-batches of 8, as released; grouped: of like modality and length."""
    model.model.config.text_config._attn_implementation = "sdpa"
    model.model.model.language_model.config._attn_implementation = "sdpa"

    def step(samples: list[Sample]) -> None:
        labels = sum(sum(label != IGNORE_INDEX for label in each.ids.labels) for each in samples)
        if grouped:
            samples = sorted(samples, key=lambda each: (bool(each.images), len(each.ids.input_ids)))
        for first in range(0, len(samples), 8):
            batch = collate(samples[first : first + 8])
            pixels = model.adapter.normalise(batch.pixels) if len(batch.pixels) else None
            logits = model.model(input_ids=batch.input_ids, pixel_values=pixels).logits[:, :-1]
            wanted = batch.labels[:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum")
            torch.autograd.backward(loss / labels)
        optimizer.step()
        optimizer.zero_grad()

    return step


def side(name: str) -> Step:
    model = make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    return packed(model, optimizer) if name == "packed" else padded(model, optimizer, name == "grouped")


def rate(step: Step, batches: list[list[Sample]]) -> float:
    """Samples per second after the first batch."""
    step(batches[0])
    start = time.perf_counter()
    for batch in batches[1:]:
        step(batch)
    return sum(map(len, batches[1:])) / (time.perf_counter() - start)


def trainer_rate(batches: list[list[Sample]]) -> float:
    """Samples per second of transformers' Trainer, padded, in random order; its first step is left out."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = make_model()
    model.model.config.text_config._attn_implementation = "sdpa"
    model.model.model.language_model.config._attn_implementation = "sdpa"
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: object, **more: object) -> None:
            times.append(time.perf_counter())

    def join(samples: list[Sample]) -> dict[str, torch.Tensor]:
        batch = collate(samples)
        pixels = {"pixel_values": model.adapter.normalise(batch.pixels)} if len(batch.pixels) else {}
        return {"input_ids": batch.input_ids, "labels": batch.labels, **pixels}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=len(batches[0]) // 8,
            max_steps=len(batches),
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        data = [sample for batch in batches for sample in batch]
        Trainer(model.model, arguments, data_collator=join, train_dataset=data, callbacks=[Clock()]).train()
    return sum(map(len, batches[1:])) / (times[-1] - times[0])


def data_side(count: int, threads: int) -> float:
    """Samples per second of reading, decoding JPEGs at 336 px, tokenising and packing; nothing is trained."""
    with tempfile.TemporaryDirectory(prefix="train-data-") as folder:
        images = Path(folder) / "images"
        write_images(images, count, seed=1, sources=("coco",))
        truth = [json.loads(line) for line in (images / "truth.jsonl").read_text().splitlines()]
        for scene in truth:
            turns = (
                {"from": "human", "value": "<image>\nAnalyze."},
                {"from": "gpt", "value": scene["caption"]},
            )
            scene["conversations"] = turns
        (images / "talk.json").write_text(json.dumps(truth))
        intake = take_in([TrainingSet(str(images / "talk.json"))], None, Path(folder) / "data")
        template = make_model().adapter.template
        maker = SampleMaker(Records(Path(folder) / "data"), template, SampleRules(336, "pad", 2048))
        order = SampleOrder(intake.counts, [1.0], 0, 32)
        with Feed(maker, order, worker=0, workers=1, budget=4096, threads=threads) as feed:
            steps = count // 32
            list(feed.steps(0, 2))
            start = time.perf_counter()
            done = sum(step.samples for step in feed.steps(0, steps))
            return done / (time.perf_counter() - start)


def _batches(samples: list[Sample], batch: int) -> Iterator[list[Sample]]:
    for first in range(0, len(samples), batch):
        yield samples[first : first + batch]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=512, help="of the data side; 0 leaves it out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(describe_machine())
    samples = make_samples(options.batch * (options.steps + 1))
    lengths = [len(sample.ids.input_ids) for sample in samples]
    print(f"{len(samples)} samples of {np.mean(lengths):.0f} tokens in the mean, {max(lengths)} at most")
    batches = list(_batches(samples, options.batch))
    rates = {name: rate(side(name), batches) for name in ("packed", "random", "grouped")}
    if importlib.util.find_spec("accelerate"):
        rates["trainer"] = trainer_rate(batches)
    else:
        print("Hugging Face Trainer: not measured, accelerate is not installed")
    for name, found in rates.items():
        print(f"{name}: {found:.1f} samples/s, packed is {rates['packed'] / found:.2f} times as fast")
    if options.images:
        cores = len(os.sched_getaffinity(0))
        found = data_side(options.images, cores)
        print(f"data side: {found:.0f} samples/s on {cores} cores, {found / cores:.0f} a core")


if __name__ == "__main__":
    main()
