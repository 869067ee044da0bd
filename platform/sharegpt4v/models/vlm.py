"""Loads any vision-language model that transformers knows, and encodes dialogues by its own processor.

Images are processed by the backends of Pillow and numpy: the tensors are then the same with and without
torchvision, which not every environment can load. A processor for videos, which needs it, is left out.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image as PillowImage
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from sharegpt4v.dialogue import Image, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.control_strings import ControlStrings
from sharegpt4v.models.load import load_strictly

_KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id"),
)
"""Of a folder's generation settings; sampling comes from the request."""


class Vlm:
    """A model with its tokenizer, and the tensors of dialogues by its processor's chat template.

    context: tokens of prompt and answer together. vocabulary: logits of a step. eos_token_ids: tokens that
    end an answer.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, processor: Any) -> None:
        self.name = folder.resolve().name
        self.model = model
        self.tokenizer: PreTrainedTokenizerFast = processor.tokenizer
        self.device = model.device
        self.dtype = model.dtype
        text = model.config.get_text_config()
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.context: int = getattr(text, "max_position_embeddings", None) or self.tokenizer.model_max_length
        settings = model.generation_config
        self.eos_token_ids = end_tokens(folder, settings, self.tokenizer)
        pad = settings.pad_token_id if settings.pad_token_id is not None else self.tokenizer.pad_token_id
        self.pad_token_id: int = min(self.eos_token_ids) if pad is None else pad
        kept = {name: getattr(settings, name, None) for name in _KEPT}
        model.generation_config = GenerationConfig(**kept | {"pad_token_id": self.pad_token_id})
        self._processor = processor
        # A processor sets padding on its tokenizer, which another thread must not use meanwhile.
        self._one_at_a_time = threading.Lock()
        self._controls = ControlStrings(self.name, self.tokenizer)

    def encode(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """Encodes a dialogue: the model's inputs by name, input_ids (1, T) among them, on the CPU.

        Control strings in texts stay plain text. Raises UserError where the processor cannot do that, for a
        dialogue that does not end with the user, and for one that the chat template refuses; besides whatever
        the processor raises. May be called by several threads.
        """
        check_ends_with_question(turns)
        with self._one_at_a_time:
            try:
                return self._encode_safely(turns)
            except TemplateError as error:
                raise UserError(f"the chat template refuses this dialogue: {error}") from error

    def _encode_safely(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        if not self._controls.are_in(turns):
            return self._encode(turns, {})
        try:
            encoded = self._encode(turns, {"sanitize_control_tokens": True})
        except Exception as error:  # processors that know nothing of it fail in their own ways
            raise self._controls.refused(turns) from error
        harmless = self._encode(self._controls.removed(turns), {})
        if self._count_controls(encoded) != self._count_controls(harmless):
            raise self._controls.refused(turns)
        return encoded

    def _encode(self, turns: Sequence[Turn], options: dict[str, Any]) -> dict[str, Tensor]:
        encoded = self._processor.apply_chat_template(
            [_message(turn) for turn in turns],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        )
        tensors = {name: value for name, value in encoded.items() if isinstance(value, Tensor)}
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in tensors.items()
        }

    def _count_controls(self, encoded: dict[str, Tensor]) -> Counter[int]:
        return self._controls.count(encoded["input_ids"][0].tolist())


def check_ends_with_question(turns: Sequence[Turn]) -> None:
    """Raises UserError for a dialogue that does not end with the user."""
    if not turns or turns[-1].role != "user":
        raise UserError("a dialogue ends with the user's question")


def end_tokens(
    folder: Path, settings: GenerationConfig, tokenizer: PreTrainedTokenizerFast
) -> frozenset[int]:
    """Returns the tokens that end an answer. Raises UserError when neither names any."""
    ids = settings.eos_token_id if settings.eos_token_id is not None else tokenizer.eos_token_id
    if ids is None:
        raise UserError(f"{folder} names no token that ends an answer: add eos_token_id to its files")
    return frozenset(ids if isinstance(ids, Sequence) else [ids])


def load_vlm(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Vlm:
    """Loads model and processor from a transformers folder.

    Raises UserError for a model that transformers does not know as one of images and text, one with code of
    its own, one whose images only torchvision can process, and one whose weights are not all there.
    """
    processor = load_processor(folder)
    # Surplus tensors are common, such as heads for training; missing ones would be random numbers.
    faults = ("missing_keys", "mismatched_keys")
    model = load_strictly(AutoModelForImageTextToText, folder, dtype, faults)
    return Vlm(folder, model.to(device), processor)


def load_processor(folder: Path) -> Any:
    """Loads what makes the tensors of prompts, without a weight. Raises UserError as `load_vlm` does."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"{folder}: {_first_sentence(error)}", field="model") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UserError(
            f"{folder} holds a {config.model_type!r} model, which transformers does not know as one of "
            f"images and text",
            field="model",
        )
    return _make_processor(folder, config)


def _make_processor(folder: Path, config: PreTrainedConfig) -> Any:
    """Makes the family's processor from its tokenizer and its image processor alone."""
    family = PROCESSOR_MAPPING.get(type(config), None)
    if family is None:
        raise UserError(f"transformers has no processor for {config.model_type!r} models", field="model")
    try:
        images = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (ValueError, ImportError, OSError) as error:
        why = _first_sentence(error)
        if "torchvision" in str(error).lower():
            why = "only torchvision can process their images, and it is not installed here"
        raise UserError(f"{folder} holds a {config.model_type!r} model: {why}", field="model") from error
    tokenizer = load_tokenizer(folder)
    parts = {"image_processor": images, "tokenizer": tokenizer}
    settings, _ = family.get_processor_dict(folder)
    kind = _for_images_alone(family)
    try:
        return kind.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
    except ImportError as error:  # SmolVLM's needs num2words
        raise UserError(f"{folder}: {_one_line(error)}", field="model") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a folder's tokenizer. Raises UserError for one that is not of tokenizers' kind."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{folder} has no tokenizer.json, from which text can be streamed", field="model")
    return tokenizer


def _for_images_alone(family: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Returns the processor's class, which may then lack the parts for videos and sound."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if part is None else family.check_argument_for_proper_class(self, name, part)

    return type(family.__name__, (family,), {"check_argument_for_proper_class": check})


def _message(turn: Turn) -> dict[str, Any]:
    # Pillow images: of an array of three rows a processor could not tell rows from colours.
    images = [{"type": "image", "image": to_pillow(image)} for image in turn.images]
    return {"role": turn.role, "content": [*images, {"type": "text", "text": without_surrogates(turn.text)}]}


def without_surrogates(text: str) -> str:
    """Replaces lone surrogates, which tokenizers refuses."""
    return text.encode("utf-8", "replace").decode()


def to_pillow(image: Image) -> PillowImage.Image:
    """Converts pixels (H, W, 3) uint8. Raises UserError for others."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f"pixels are {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
    return PillowImage.fromarray(image)


def _first_sentence(error: Exception) -> str:
    return _one_line(error).partition(". ")[0]


def _one_line(error: Exception) -> str:
    # In our own errors backticks stand around fields, which become flags.
    return " ".join(str(error).split()).replace("`", "'")
