"""Checkpoints from one layout to another, shard by shard, in memory for one shard.

The keys decide the layout. Released ShareGPT4V and LLaVA-1.5 <-> transformers' LLaVA; released
Share-Captioner -> ours. Names and shapes are checked before the first byte is written, and the folder gets
its name when it is complete.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import LlavaConfig

from sharegpt4v.checkpoints import captioner, llava, metadata
from sharegpt4v.checkpoints.family import check_released, check_tower
from sharegpt4v.checkpoints.output import check_out, unfinished
from sharegpt4v.checkpoints.reader import Checkpoint, TensorRef
from sharegpt4v.checkpoints.released_config import config_errors
from sharegpt4v.checkpoints.rules import Report, TensorRule, check, total_size, write
from sharegpt4v.errors import RunFailed, UserError

Layout = Literal["captioner", "released", "transformers"]
Target = Literal["transformers", "released"]

_USAGE = """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(".", dtype="auto")
processor = AutoProcessor.from_pretrained(".")
content = [{"type": "image"}, {"type": "text", "text": "What is in this photo?"}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
# The text begins with <s> already: special tokens would add a second one.
inputs = processor(images=Image.open("photo.jpg"), text=text, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=200)
print(processor.decode(answer[0], skip_special_tokens=True))
"""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that has been found possible.

    text: one line for people. parts: subfolder, and the tensors that go there. finish: writes the files
    beside the weights into a folder. sources: folders that are read.
    """

    text: str
    tensors: Mapping[str, TensorRef]
    parts: tuple[tuple[str, list[TensorRule]], ...]
    finish: Callable[[Path], None]
    sources: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors that will be written."""
        return sum(total_size(rules, self.tensors) for _, rules in self.parts)

    def check_out(self, out: Path) -> Path:
        """Resolves `out`. Raises UserError when it is not new or empty, or could not be written."""
        return check_out(out, self.bytes, self.sources)


def plan_conversion(
    source: Path, to: Target = "transformers", vision_tower: Path | None = None, tokenizer: Path | None = None
) -> Conversion:
    """Plans from names and shapes only. Raises UserError, one line, for everything that does not fit."""
    checkpoint = Checkpoint(source)
    layout = detect_layout(checkpoint)
    if to == "released" and layout != "transformers":
        raise UserError(f"{source} is in the released layout already: leave it out", field="to")
    if vision_tower and layout != "released":
        raise UserError(f"{source} brings its own: leave it out", field="vision_tower")
    if layout == "captioner":
        return _captioner(checkpoint, tokenizer or source)
    if layout == "transformers":
        return _from_transformers(checkpoint, to, tokenizer)
    return _llava(checkpoint, Checkpoint(vision_tower) if vision_tower else None, tokenizer or source)


def convert(
    plan_conversion: Conversion, out: Path, shard_bytes: int, report: Report = lambda written: None
) -> None:
    """Writes the planned folder, completely or not at all.

    Raises UserError when `out` holds something or cannot be written, and for weights that turn out to be
    damaged, NaN or infinite; RunFailed when the work breaks off.
    """
    out = plan_conversion.check_out(out)
    try:
        with unfinished(out) as partial:
            for name, rules in plan_conversion.parts:
                (partial / name).mkdir(exist_ok=True)
                write(rules, plan_conversion.tensors, partial / name, shard_bytes, report)
            plan_conversion.finish(partial)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunFailed(f"{out} could not be written: {reason}; what was written is removed") from error


def detect_layout(checkpoint: Checkpoint) -> Layout:
    """Returns the layout of a checkpoint. Raises UserError when its names are none that we know."""
    names = checkpoint.tensors
    if any(name.startswith("internlm_model.") for name in names):
        return "captioner"
    if any(name.startswith("model.mm_projector.") for name in names):
        return "released"
    if any("multi_modal_projector." in name for name in names):
        return "transformers"
    if any(name.startswith(("resampler.", "qformer.")) for name in names):
        raise UserError(f"{checkpoint.folder} is a Share-Captioner of ours already; nothing is to be done")
    raise UserError(
        f"{checkpoint.folder} holds neither LLaVA nor Share-Captioner: no internlm_model, mm_projector or "
        f"multi_modal_projector among {len(names)} tensors such as {next(iter(names), 'none')}"
    )


def _llava(checkpoint: Checkpoint, tower: Checkpoint | None, tokenizer_folder: Path) -> Conversion:
    check_released(checkpoint.folder / "config.json", checkpoint.config())
    if tower:
        check_tower(tower.folder / "config.json", tower.config())
    tensors = llava.released_tensors(checkpoint, tower)
    config = llava.llava_config(checkpoint, tower, tensors)
    with config_errors(checkpoint.folder / "config.json"):
        rules = llava.to_transformers(config)
    elsewhere = {"vision_model.": tower.folder} if tower else {}
    check(rules, tensors, checkpoint.folder, llava.released_depths(config, tower), elsewhere)
    tokenizer = _llava_tokenizer(tokenizer_folder, config)
    dtype = tensors["model.embed_tokens.weight"].dtype

    def finish(out: Path) -> None:
        metadata.write_llava(out, config, dtype, tokenizer, originals=checkpoint.folder)
        where = tower.folder.resolve().name if tower else "inside the checkpoint"
        facts = [*_facts(rules, dtype), f"vision tower: {where}", *_llava_facts(config)]
        metadata.write_card(out, _title(checkpoint), facts, _USAGE)

    text = f"released LLaVA layout -> transformers' LLaVA, {len(rules)} tensors"
    sources = (checkpoint.folder, tokenizer_folder, *([tower.folder] if tower else []))
    return Conversion(text, tensors, ((".", rules),), finish, sources)


def _from_transformers(checkpoint: Checkpoint, to: Target, tokenizer_folder: Path | None) -> Conversion:
    tensors = llava.transformers_tensors(checkpoint)
    config = metadata.read_llava_config(checkpoint.folder)
    if to == "released":
        return _to_released(checkpoint, tensors, config, tokenizer_folder)
    with config_errors(checkpoint.folder / "config.json"):
        rules = llava.unchanged(config)
    check(rules, tensors, checkpoint.folder, llava.transformers_depths(config))
    tokenizer = _llava_tokenizer(tokenizer_folder or checkpoint.folder, config)
    dtype = tensors["language_model.lm_head.weight"].dtype
    kept = checkpoint.folder / metadata.ORIGINALS

    def finish(out: Path) -> None:
        metadata.write_llava(out, config, dtype, tokenizer, originals=kept if kept.is_dir() else None)
        facts = [*_facts(rules, dtype), *_llava_facts(config)]
        metadata.write_card(out, _title(checkpoint), facts, _USAGE)

    text = f"transformers' LLaVA -> the names that vLLM and older versions read, {len(rules)} tensors"
    return Conversion(text, tensors, ((".", rules),), finish, (checkpoint.folder, tokenizer.source))


def _to_released(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorRef],
    config: LlavaConfig,
    tokenizer_folder: Path | None,
) -> Conversion:
    with config_errors(checkpoint.folder / "config.json"):
        language, tower = llava.to_released(config)
    check([*language, *tower], tensors, checkpoint.folder, llava.transformers_depths(config))
    dtype = tensors["language_model.lm_head.weight"].dtype
    tokenizer = _llava_tokenizer(tokenizer_folder or metadata.released_tokenizer(checkpoint.folder), config)
    changed = metadata.released_config(checkpoint.folder, config, dtype)
    return Conversion(
        f"transformers' LLaVA -> released layout, {len(language)} + {len(tower)} tensors",
        tensors,
        ((".", language), ("vision_tower", tower)),
        lambda out: metadata.write_released(out, checkpoint.folder, config, dtype, tokenizer, changed),
        (checkpoint.folder, tokenizer.source),
    )


def _captioner(checkpoint: Checkpoint, tokenizer_folder: Path) -> Conversion:
    tensors = captioner.captioner_tensors(checkpoint)
    config = captioner.captioner_config(checkpoint, tensors)
    with config_errors(checkpoint.folder / "config.json"):
        rules = captioner.to_ours(config, checkpoint.config(), tensors)
    check(rules, tensors, checkpoint.folder, captioner.depths(config))
    tokenizer = metadata.find_tokenizer(
        tokenizer_folder, config.text_config.vocab_size, {}, captioner.CONTROLS
    )
    dtype = tensors["internlm_model.model.embed_tokens.weight"].dtype
    merged = sum(name.endswith(".lora_A.weight") for name in tensors)

    def finish(out: Path) -> None:
        metadata.write_captioner(out, config, dtype, tokenizer, originals=checkpoint.folder)
        facts = [
            *_facts(rules, dtype),
            f"sampler: {config.sampler}, {config.image_tokens} embeddings an image",
            f"LoRA merged into {merged} weights",
            f"images: squashed to a square of {config.vision_config.image_size} px",
            "runs as the model of `sharegpt4v caption`",
        ]
        metadata.write_card(out, _title(checkpoint), facts)

    text = f"released Share-Captioner, {config.sampler} -> ours, {len(rules)} tensors, {merged} with LoRA"
    return Conversion(text, tensors, ((".", rules),), finish, (checkpoint.folder, tokenizer_folder))


def _llava_tokenizer(tokenizer_folder: Path, config: LlavaConfig) -> metadata.LoadedTokenizer:
    ids = {metadata.IMAGE: config.image_token_index, metadata.PAD: config.text_config.pad_token_id}
    return metadata.find_tokenizer(tokenizer_folder, config.text_config.vocab_size, ids)


def _title(checkpoint: Checkpoint) -> str:
    return checkpoint.folder.resolve().name


def _facts(rules: list[TensorRule], dtype: torch.dtype) -> list[str]:
    parameters = sum(math.prod(rule.shape) for rule in rules)
    kind = str(dtype).removeprefix("torch.")
    return [f"{parameters:,} parameters in {len(rules)} tensors, language model in {kind}"]


def _llava_facts(config: LlavaConfig) -> list[str]:
    text = config.text_config
    return [
        f"images: {config.image_protocol} to a square of {config.vision_config.image_size} px, "
        f"{config.image_seq_length} tokens",
        f"`<image>` = {config.image_token_index}, `<pad>` = {text.pad_token_id}; tables of {text.vocab_size} "
        "rows, those without a token hold the mean of the others",
        "loads with `LlavaForConditionalGeneration` and `AutoProcessor`, transformers 4.49 or newer; "
        "chat template vicuna_v1",
        "pixels: equal to those of `sharegpt4v` where `AutoProcessor` resizes with Pillow; "
        "with torchvision some differ by up to 0.03, two steps of 1/255 before normalisation",
    ]
