"""`python -m sharegpt4v.toy train`: trains the toy models and writes the folders that are shipped.

Each is a transformers folder: configuration, tokenizer and one safetensors file at half precision. The chat
model's is as `sharegpt4v convert` writes it, with processor and chat template, so that older transformers and
vLLM read it, too.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from sharegpt4v.checkpoints.convert import convert, plan_conversion
from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.load import load_adapter
from sharegpt4v.models.toy import toy_captioner_config, toy_lmm_config
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.toy.train import TrainingProgress, TrainingRecipe, exact_match, train

SHIPPED = Path(__file__).parent / "checkpoints"
"""One folder a model, for the model `toy` and for everything that needs a model that knows something."""

JUDGED_SCENES = 500


LEARN = TrainingRecipe(steps=3600)
POLISH = TrainingRecipe(
    steps=1200, seed=1, batch_size=64, matrix_learning_rate=2e-3, learning_rate=1.5e-3, warmup=50
)
"""The second stage: new scenes, larger batches, lower rates."""


@dataclass(frozen=True, slots=True)
class ToyModel:
    """build: the untrained model. prompt: the one question it learns to answer. stages: of its training."""

    build: Callable[[], PreTrainedModel]
    prompt: str
    stages: tuple[TrainingRecipe, ...]


TOY_MODELS: dict[str, ToyModel] = {
    "captioner": ToyModel(
        lambda: ShareCaptioner(toy_captioner_config()), UNIFIED_CAPTION.text, (LEARN, POLISH)
    ),
    "lmm": ToyModel(
        lambda: LlavaForConditionalGeneration(toy_lmm_config()),
        UNIFIED_CAPTION.text,
        (replace(LEARN, steps=2800),),
    ),
}


def make_weights(name: str, folder: Path, stages: Sequence[TrainingRecipe]) -> Iterator[TrainingProgress]:
    """Trains the toy model `name` of TOY_MODELS stage by stage and writes it to `folder` after each.

    A stage starts from the half-precision files of the one before, so that any of them can be run again.
    """
    toy = TOY_MODELS[name]
    torch.manual_seed(stages[0].seed)
    with tempfile.TemporaryDirectory() as untrained:
        _save(toy.build(), Path(untrained))
        adapter = load_adapter(untrained)
    for recipe in stages:
        yield from train(adapter, toy.prompt, recipe)
        _save(adapter.model.half(), folder)
        if isinstance(adapter.model, LlavaForConditionalGeneration):
            write_as_converted(folder)
        adapter = load_adapter(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    decoder = model.language_model if isinstance(model, ShareCaptioner) else model
    decoder.generation_config.save_pretrained(folder)  # where other tools look for the end tokens
    build_tokenizer().save_pretrained(folder)


def write_as_converted(folder: Path) -> None:
    """Rewrites a LLaVA folder of transformers in place as `convert` would; tensors keep their bytes.

    The card of `convert` is left out: it speaks of a source and its terms, and here is none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        converted = Path(scratch) / "converted"
        planned = plan_conversion(folder)
        convert(planned, converted, shard_bytes=2 * planned.bytes)  # one file, whatever its size
        shutil.copytree(converted, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))


def make_and_judge(name: str | None = None, steps: int | None = None, out: Path | None = None) -> None:
    """Makes one model's weights, or all; prints a line every 50 steps, then how many captions come out exact.

    name: of TOY_MODELS. steps: of the first stage, which is then the only one. out: in place of SHIPPED.
    The final shares are measured on the files as written. Raises UserError for less than one step.
    """
    if steps is not None and steps < 1:
        raise UserError(f"{steps} is too few: give 1 or more, or none for the shipped number", field="steps")
    for each in [name] if name else TOY_MODELS:
        toy, folder = TOY_MODELS[each], (out or SHIPPED) / each
        stages = (replace(toy.stages[0], steps=steps),) if steps else toy.stages
        for line in make_weights(each, folder, stages):
            print(
                f"{each}  step {line.step}/{line.steps}  loss {line.loss:.3f}  exact {line.exact:.1%}  "
                f"{line.seconds:.0f} s",
                flush=True,
            )
        adapter = load_adapter(folder)
        shares = [exact_match(adapter, toy.prompt, JUDGED_SCENES, difficulty) for difficulty in (1, 2, 3)]
        print(f"{each}: exact at difficulty 1, 2, 3: " + ", ".join(f"{s:.1%}" for s in shares))
        print(f"{each}: written to {folder}")
