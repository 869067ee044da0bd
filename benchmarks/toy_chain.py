"""The whole chain at toy size by its real commands: captioner, caption run, align, pretrain, sft, and a test.

    python -m benchmarks.toy_chain --scenes 2000        (make e2e)

It begins from the shipped foundation, as the real chain from InternLM-XComposer, Vicuna and CLIP: no part of
it has seen an image together with an answer. The captioner is trained on the true captions of half of the
scenes and captions all, and the chat model is pre-trained on what it wrote. At the end the chat model answers
questions about scenes of another world, and the captioner's captions are compared with the true ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import describe_machine
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.build import EngineSpec, build_engine
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.captions import detailed_caption
from sharegpt4v.toy.images import iter_write_images
from sharegpt4v.toy.questions import CONVERSATIONS, Question, questions, score
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.shipped import FOUNDATION, SHIPPED, ship
from sharegpt4v.toy.sources import SOURCES

UNSEEN = 1_000_033
"""World of the test; training takes another."""


def write_data(folder: Path, scenes: int) -> None:
    """Writes images, and the three conversation files: about half of them for the captioner, about all."""
    start = time.monotonic()
    seen = list(iter_write_images(folder / "images", scenes, seed=11, longest_side=128))
    for name, make in CONVERSATIONS.items():
        about = seen[: scenes // 2] if name == "detailed" else seen
        (folder / f"{name}.json").write_text(json.dumps([make(scene) for scene in about]))
    print(f"{time.monotonic() - start:6.0f} s  {scenes} images")


def command(*words: str) -> None:
    """Runs a command and prints how long it took and its last lines."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "cluster.cli", *words], capture_output=True, text=True)
    print(
        f"{time.monotonic() - start:6.0f} s  sharegpt4v {words[0]} {words[1]}: {done.stdout.splitlines()[:1]}"
    )
    if done.returncode:
        sys.exit(done.stderr)


def ask(weights: Path, asked: list[tuple[Scene, str]]) -> list[str]:
    """Answers one question about each scene, greedily, all slots in use."""
    engine = build_engine(EngineSpec("torch", weights.name, str(weights), capacity=64, threads=2))
    pixels = [np.array(render(scene, (48, 48))) for scene, _ in asked]
    handles = [
        engine.submit(Request(str(n), (Turn("user", text, (image,)),), SamplingParams(max_new_tokens=120)))
        for n, (image, (_, text)) in enumerate(zip(pixels, asked, strict=True))
    ]
    answers = [handle.result().text for handle in handles]
    engine.close()
    return answers


def unseen(count: int) -> list[Scene]:
    names = tuple(SOURCES)
    return [make_scene(UNSEEN, n, source=names[n % len(names)], difficulty=1) for n in range(count)]


def chain(folder: Path, steps: dict[str, int]) -> tuple[Path, Path]:
    """Runs all commands; returns the captioner's and the chat model's folders."""
    root = ("--root", str(folder / "images"))
    out = {name: str(folder / name) for name in ("captioner", "captions", "align", "pretrain", "sft")}
    how = {name: ("--max-steps", str(steps[name]), "--out", out[name], "--workers", "2") for name in steps}
    parts = {name: str(FOUNDATION / name) for name in ("captioner", "language", "tower")}
    data = ("--data", str(folder / "detailed.json"), *root)
    command("train", "captioner", *data, "--init", parts["captioner"], *how["captioner"])
    model = str(folder / "captioner" / "model")
    command("caption", "--images", str(folder / "images"), "--out", out["captions"], "--model", model)
    both = ("--language-model", parts["language"], "--vision-tower", parts["tower"])
    command("train", "align", "--data", str(folder / "short.json"), *root, *both, *how["align"])
    init = ("--init", f"{out['align']}/model")
    command("train", "pretrain", "--data", out["captions"], *init, *how["pretrain"])
    mix = ("--data", str(folder / "questions.json"), "--data", f"{out['captions']}:0.2")
    command("train", "sft", *mix, *root, "--init", f"{out['pretrain']}/model", *how["sft"])
    return folder / "captioner" / "model", folder / "sft" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--tests", type=int, default=200, help="scenes of the test")
    for stage, count in (("captioner", 600), ("align", 80), ("pretrain", 250), ("sft", 300)):
        parser.add_argument(f"--{stage}", type=int, default=count, help="steps")
    parser.add_argument("--ship", action="store_true", help="write both models to where the shipped ones are")
    options = parser.parse_args()
    print(describe_machine())
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="toy-chain-") as name:
        folder = Path(name)
        write_data(folder, options.scenes)
        steps = {stage: getattr(options, stage) for stage in ("captioner", "align", "pretrain", "sft")}
        captioner, chat = chain(folder, steps)
        scenes = unseen(options.tests)
        captions = ask(captioner, [(scene, UNIFIED_CAPTION.text) for scene in scenes])
        asked: list[tuple[Scene, Question]] = [(scene, q) for scene in scenes for q in questions(scene)]
        answers = ask(chat, [(scene, question.text) for scene, question in asked])
        if options.ship:
            ship(captioner, SHIPPED / "captioner")
            ship(chat, SHIPPED / "lmm")
    exact = sum(text.strip() == detailed_caption(scene) for text, scene in zip(captions, scenes, strict=True))
    shares = score([(question, said) for (_, question), said in zip(asked, answers, strict=True)])
    print(f"captions exact: {exact / len(scenes):.1%}")
    print("answers right: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
