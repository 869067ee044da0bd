"""One interface to both model families: turns dialogues into embeddings for a Llama decoder.

The engine uses only this object, never a vision tower or sampler. Ids come from the adapter's template.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from sharegpt4v.dialogue import Image, ImageProtocol, Request, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import ShareCaptioner
from sharegpt4v.models.send import send
from sharegpt4v.templates import Template

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's values, used by both families, for pixels scaled to 0..1."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """parts: ids and images of a prompt in order. drop: tokens at their front that are not wanted."""

    parts: "list[list[int] | Image]"
    drop: int


class Adapter(ABC):
    """Embeds dialogues. Subclasses define how an image is embedded.

    name: name of the weights' folder. template: encodes dialogues as ids. image_size: side in px of the
    square image that the model takes. protocol: how an image is made that square. language_model: takes
    inputs_embeds, attention_mask, position_ids, past_key_values and use_cache as LlamaForCausalLM does.
    """

    protocol: ImageProtocol
    model: ShareCaptioner | LlavaForConditionalGeneration  # trains on input_ids, pixel_values and labels
    language_model: LlamaForCausalLM
    image_mean = CLIP_MEAN
    image_std = CLIP_STD

    def __init__(
        self,
        folder: Path,
        model: ShareCaptioner | LlavaForConditionalGeneration,
        template: Template,
    ) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.template = template
        self.tokenizer = template.tokenizer
        self.device = model.device
        self.dtype = model.dtype
        self.image_size: int = model.config.vision_config.image_size
        # One tensor op on the device: (pixel / 255 - mean) / std = pixel * scale + shift.
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        self._scale = (1 / (255 * std)).view(3, 1, 1).to(self.device)
        self._shift = (-mean / std).view(3, 1, 1).to(self.device)

    def prompt_tokens(self, turns: Sequence[Turn]) -> int:
        """Computes a prompt's length, image embeddings included. Raises UserError for roles out of order."""
        return len(self.template.prompt(turns))

    @abstractmethod
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeds images: (B, 3, S, S) float, normalised -> (B, the template's image_tokens, D)."""

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        ids = self.language_model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, Sequence) else [ids])

    def normalise(self, pixels: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """Normalises as CLIP: (B, S, S, 3) uint8 -> (B, 3, S, S) float on the model's device."""
        # Copied to the device as uint8, a quarter of the bytes, and converted to float there.
        channels_first = send(torch.as_tensor(pixels), self.device).permute(0, 3, 1, 2)
        return (channels_first * self._scale + self._shift).to(self.dtype)

    def check_image(self, image: Image) -> None:
        """Raises UserError for pixels of another size or type than this model's."""
        wanted = (self.image_size, self.image_size, 3)
        if image.dtype != np.uint8 or image.shape != wanted:
            raise UserError(
                f"pixels are {image.dtype} {image.shape}; {self.name} takes uint8 {wanted}: prepare images "
                f"by the {self.protocol} protocol at {self.image_size} px"
            )

    @torch.inference_mode()
    def embed(self, requests: Sequence[Request], skip: Sequence[int] | None = None) -> list[Tensor]:
        """Embeds the prompts of dialogues: (T, D) each in the model's dtype.

        skip: tokens at the beginning of each prompt that are left out, none by default. The images behind
        them share one pass of the vision tower, equal ones as one. Raises UserError for roles out of order,
        for images not at model size, and when the features are not as many as the image tokens.
        """
        plans = [
            self._plan(request, count)
            for request, count in zip(requests, skip or [0] * len(requests), strict=True)
        ]
        parts = [part for plan in plans for part in plan.parts]
        images = iter(self._features([part for part in parts if not isinstance(part, list)]))
        texts = [part for part in parts if isinstance(part, list)]
        ids = [token for text in texts for token in text]
        table = self.language_model.get_input_embeddings()
        # On a GPU an id out of range would end the process, not only the request.
        if max(ids, default=0) >= table.num_embeddings:
            raise UserError(
                f"{self.name} has a table of {table.num_embeddings} rows and its tokenizer gives {max(ids)}: "
                "the two do not belong together"
            )
        words = table(send(ids, self.device, torch.long))
        pieces = iter(words.split([len(text) for text in texts]))
        return [
            torch.cat(
                [
                    next(pieces) if isinstance(part, list) else next(images).to(words.dtype)
                    for part in plan.parts
                ]
            )[plan.drop :]
            for plan in plans
        ]

    def _plan(self, request: Request, skip: int) -> "_Plan":
        """Returns what of a prompt is behind `skip` tokens."""
        parts: list[list[int] | Image] = []
        position, drop, images = 0, 0, iter(request.images)
        for number, segment in enumerate(self.template.segments(request.turns)):
            if number:
                image = next(images)
                if position < skip < position + self.template.image_tokens:
                    drop = skip - position  # embedded as a whole, then cut
                position += self.template.image_tokens
                if position > skip:
                    parts.append(image)
            parts.append(segment[max(0, skip - position) :])
            position += len(segment)
        return _Plan(parts, drop)

    def _features(self, images: Sequence[Image]) -> Sequence[Tensor]:
        """Embeds images (S, S, 3) uint8 as (image_tokens, D) each; equal ones go through the tower once."""
        if not images:
            return []
        for image in images:
            self.check_image(image)
        contents = [image.tobytes() for image in images]
        places = {content: row for row, content in enumerate(dict.fromkeys(contents))}
        unique = [images[contents.index(content)] for content in places]
        features = self.image_features(self.normalise(np.stack(unique)))
        wanted = self.template.image_tokens
        if features.shape[1] != wanted:
            raise UserError(
                f"{self.name} has {wanted} image tokens in its prompt and its vision tower gives "
                f"{features.shape[1]} features: config.json does not fit these weights"
            )
        return [features[places[content]] for content in contents]


class CaptionerAdapter(Adapter):
    """Embeds for Share-Captioner."""

    protocol: ImageProtocol = "squash"

    def __init__(self, folder: Path, model: ShareCaptioner, template: Template) -> None:
        super().__init__(folder, model, template)
        self.model = model
        self.language_model = model.language_model

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_features(pixel_values)


class LmmAdapter(Adapter):
    """Embeds for ShareGPT4V and other models of LLaVA's shape."""

    def __init__(self, folder: Path, model: LlavaForConditionalGeneration, template: Template) -> None:
        super().__init__(folder, model, template)
        self.model = model
        self.protocol = getattr(model.config, "image_protocol", "pad")
        self.language_model = _causal_language_model(model)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = torch.stack(self.model.get_image_features(pixel_values).pooler_output)
        return features


def _causal_language_model(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """Joins LLaVA's decoder and head, which it keeps apart, in one module that shares every tensor."""
    with torch.device("meta"):
        language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model = model.model.language_model
    language_model.lm_head = model.lm_head
    language_model.generation_config = model.generation_config
    return language_model.eval()
