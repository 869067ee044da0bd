"""How full captioning keeps the engine's slots, and what smaller or larger commits change.

    python -m benchmarks.slot_use

First the step of the pipeline without Ray: called by four threads at once, as an actor is, each with one
commit's images after the other; output lengths are drawn from 20..200 by image id. Then a whole run of
`sharegpt4v caption`, from start-up to its last caption, with random weights: an answer has 20 tokens at least
and 200 at most, and ends after any token between with a chance of one in a hundred. The gate refuses some of
these texts, so that retries are among the answers. Both models have the toy captioner's shape.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from unittest import mock

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import describe_machine
from pipelines.steps.captioning import Caption, CaptionRules
from pipelines.steps.decoding import decoded_schema
from pipelines.steps.ledger import Ledger
from pipelines.steps.pool import CALLS_PER_ACTOR
from sharegpt4v.checkpoints.card import TOY_CAPTIONER
from sharegpt4v.dialogue import Request, SamplingParams, SquareImages
from sharegpt4v.engine.build import EngineSpec
from sharegpt4v.engine.handle import Handle
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.gate import GateRules
from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.load import load_adapter
from sharegpt4v.models.toy import toy_captioner_config
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.images import write_images
from sharegpt4v.toy.tokenizer import SPECIAL_TOKENS, build_tokenizer


class DrawnLengths(TorchEngine):
    """Every answer has the length that its image's id draws."""

    def submit(self, request: Request) -> Handle:
        length = random.Random(request.id).randint(20, 200)
        return super().submit(
            replace(request, sampling=SamplingParams(max_new_tokens=length, min_new_tokens=length))
        )


def slot_use(images: int, slots: int, per_commit: int) -> EngineStats:
    engine = DrawnLengths(load_adapter(TOY_CAPTIONER), "toy@0", slots, max_context=300)
    rules = CaptionRules(UNIFIED_CAPTION, SamplingParams(), SamplingParams(), GateRules())
    with mock.patch("pipelines.steps.captioning.build_engine", return_value=engine):
        step = Caption(EngineSpec("torch", "toy@0"), rules, Ledger(1.0), hang_seconds=60)
    commits: SimpleQueue[pa.Table] = SimpleQueue()
    for first in range(0, images, per_commit):
        commits.put(decoded(range(first, min(images, first + per_commit)), engine.image_size))

    def work() -> None:
        while True:
            try:
                step(commits.get_nowait())
            except Empty:
                return

    threads = [threading.Thread(target=work) for _ in range(CALLS_PER_ACTOR)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    return engine.stats()


def decoded(numbers: range, size: int) -> pa.Table:
    pixels = np.random.default_rng(numbers.start).integers(
        0, 256, (len(numbers), size, size, 3), dtype=np.uint8
    )
    names = [f"image-{number}" for number in numbers]
    columns = {
        "shard": [0] * len(numbers),
        "row": list(numbers),
        "id": names,
        "image": names,
        "source": ["coco"] * len(numbers),
        "pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
        "image_sha256": [""] * len(numbers),
        "width": [size] * len(numbers),
        "height": [size] * len(numbers),
        "reason": pa.nulls(len(numbers), pa.string()),
        "message": pa.nulls(len(numbers), pa.string()),
    }
    return pa.table(columns, schema=decoded_schema(SquareImages(size, "squash")))


def save_model_of_any_length(folder: Path) -> None:
    """Random weights that give each token about the same chance; four tokens end an answer."""
    torch.manual_seed(0)
    model = ShareCaptioner(toy_captioner_config("resampler"))
    tokenizer = build_tokenizer()
    ends = ("</s>", "<unk>", "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>")
    model.config.text_config.eos_token_id = [SPECIAL_TOKENS.index(token) for token in ends]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pipeline_statistics(folder: Path, images: int, slots: int) -> dict[str, float]:
    """`engine_statistics` of summary.json after captioning so many toy images."""
    save_model_of_any_length(folder / "model")
    write_images(folder / "images", images, seed=1)
    flags = {
        "--images": folder / "images",
        "--out": folder / "run",
        "--model": folder / "model",
        "--batch-size": slots,
        "--decoding.temperature": 1,
        "--decoding.min-new-tokens": 20,
        "--decoding.max-new-tokens": 200,
        "--max-reject-rate": 1,
    }
    command = [sys.executable, "-m", "cluster.cli", "caption"]
    command += [str(part) for flag in flags.items() for part in flag]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    statistics: dict[str, float] = summary["engine_statistics"]
    return statistics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000, help="without Ray, for each size of commit")
    parser.add_argument("--run-images", type=int, default=4_000, help="in the whole run")
    parser.add_argument("--slots", type=int, default=32)
    options = parser.parse_args()
    print(describe_machine())
    torch.set_num_threads(1)
    for share in (0.5, 1, 2, 4):
        commit = int(share * options.slots)
        stats = slot_use(options.images, options.slots, commit)
        print(f"{options.slots} slots, commits of {commit} images: use {stats.slot_use:.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="slot-use-") as folder:
        run = pipeline_statistics(Path(folder), options.run_images, options.slots)
    print(
        f"whole run on Ray, two actors of {options.slots} slots, {options.run_images} images: "
        f"use {run['slot_use']:.2f}, {run['requests']:.0f} answers of "
        f"{run['new_tokens'] / run['requests']:.0f} tokens"
    )


if __name__ == "__main__":
    main()
