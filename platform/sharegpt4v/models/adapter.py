"""One face for both model families: pixels and a prompt in, embeddings for a Llama decoder out.

The engine knows this object and nothing of vision towers, samplers or templates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from sharegpt4v.dialogue import Image, ImageProtocol, Request, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.captioner import IMAGE_PLACEHOLDER, ShareCaptioner

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Both families normalise as CLIP does, on pixels scaled to 0..1."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System line of the vicuna_v1 template."""


class Adapter(ABC):
    """What every family offers. Subclasses say how an image is embedded and what stands around it.

    name: name of the weights' folder. image_size: side in px of the square image the model takes.
    protocol: how an image becomes that square. language_model: takes inputs_embeds, attention_mask,
    position_ids, past_key_values and use_cache as LlamaForCausalLM does.
    """

    protocol: ImageProtocol
    image_token_id: int  # what stands for an image position in training ids
    image_tokens: int  # embeddings of one image in the prompt
    model: ShareCaptioner | LlavaForConditionalGeneration  # trains on input_ids, pixel_values and labels
    language_model: LlamaForCausalLM
    image_mean = CLIP_MEAN
    image_std = CLIP_STD

    def __init__(
        self,
        folder: Path,
        model: ShareCaptioner | LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
    ) -> None:
        self.folder = folder
        self.name = folder.resolve().name
        self.tokenizer = tokenizer
        self.device = model.device
        self.dtype = model.dtype
        self.image_size: int = model.config.vision_config.image_size
        # One tensor op on the device: (pixel / 255 - mean) / std = pixel * scale + shift.
        mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
        self._scale = (1 / (255 * std)).view(3, 1, 1).to(self.device)
        self._shift = (-mean / std).view(3, 1, 1).to(self.device)

    @abstractmethod
    def segments(self, turns: Sequence[Turn], images: int) -> list[list[int]]:
        """Token ids of a dialogue, cut where an image stands: images + 1 lists.

        Control strings inside a turn's text stay plain text.
        """

    def prompt_tokens(self, turns: Sequence[Turn], images: int) -> int:
        """Length of a prompt, image embeddings included. Raises UserError for roles out of order."""
        _check_roles(turns)
        return sum(map(len, self.segments(turns, images))) + images * self.image_tokens

    @abstractmethod
    def answer_ids(self, answer: str) -> list[int]:
        """Token ids that a model is trained to give after the prompt, its end token included."""

    @abstractmethod
    def image_features(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S) float, normalised -> (B, image_tokens, D)."""

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.language_model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, Sequence) else [ids])

    def normalise(self, pixels: Tensor | npt.NDArray[np.uint8]) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, 3, S, S) float on the model's device, CLIP-normalised."""
        batch = torch.as_tensor(pixels)
        # uint8 over the bus, a quarter of the bytes; floats only on the device.
        channels_first = batch.to(self.device).permute(0, 3, 1, 2)
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
    def embed(self, requests: Sequence[Request]) -> list[Tensor]:
        """Prompts of dialogues, (T, D) each in the model's dtype; generation goes on from there.

        The images of all requests share one pass of the vision tower. Raises UserError for images that are
        not at model size, and for features that are not as many as the image tokens.
        """
        dialogues = [self.segments(request.turns, len(request.images)) for request in requests]
        images = iter(self._features([image for request in requests for image in request.images]))
        ids = [token for segments in dialogues for segment in segments for token in segment]
        table = self.language_model.get_input_embeddings()
        # On a GPU it would end the process, and not just the request.
        if max(ids, default=0) >= table.num_embeddings:
            raise UserError(
                f"{self.name} has a table of {table.num_embeddings} rows and its tokenizer gives {max(ids)}: "
                "the two do not belong together"
            )
        words = table(torch.tensor(ids, dtype=torch.long, device=self.device))
        lengths = [len(segment) for segments in dialogues for segment in segments]
        pieces = iter(words.split(lengths))
        prompts = []
        for segments in dialogues:
            parts = [next(pieces)]
            for _ in segments[1:]:
                parts += [next(images).to(words.dtype), next(pieces)]
            prompts.append(torch.cat(parts))
        return prompts

    def _features(self, images: Sequence[Image]) -> Tensor:
        """(N, image_tokens, D) of N images (S, S, 3) uint8."""
        if not images:
            return torch.empty(0)
        for image in images:
            self.check_image(image)
        features = self.image_features(self.normalise(np.stack(images)))
        if features.shape[1] != self.image_tokens:
            raise UserError(
                f"{self.name} has {self.image_tokens} image tokens in its prompt and its vision tower gives "
                f"{features.shape[1]} features: config.json does not fit these weights"
            )
        return features

    def _text(self, text: str) -> list[int]:
        """Ids of plain text: the tokenizer was loaded so that it finds no control tokens in text."""
        whole = text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text for tokenizers
        ids: list[int] = self.tokenizer.encode(whole, add_special_tokens=False)
        return ids

    def _join(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts and control tokens. Texts side by side are encoded as one.

        Sentencepiece marks where a text begins: apart, an answer would begin with a mark that it does not
        have behind its `ASSISTANT:`.
        """
        ids: list[int] = []
        text = ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue
            ids += self._text(text) if text else []
            ids += [] if part is None else [part]
            text = ""
        return ids

    def _following(self, before: str, text: str) -> list[int]:
        """Ids of text as they come behind `before`; alone where the tokenizer merges the two."""
        lead, both = self._text(before), self._text(before + text)
        return both[len(lead) :] if both[: len(lead)] == lead else self._text(text)

    def _control(self, token: str) -> int:
        """Id of a control token. Raises UserError when the tokenizer does not have it."""
        index = self.tokenizer.get_vocab().get(token)
        if index is None:
            raise UserError(
                f"the tokenizer in {self.folder} has no {token}; copy the one of the released model"
            )
        return int(index)

    def _marker(self, marker: str) -> str | int:
        """A template's marker: a control token where the tokenizer has it, else its text."""
        return self._control(marker) if marker in self.tokenizer.get_vocab() else marker


class CaptionerAdapter(Adapter):
    """Share-Captioner: BOS `<|User|>:` image prompt `<TOKENS_UNUSED_0>` newline `<|Bot|>:` (as released).

    Later rounds follow the answer's `<TOKENS_UNUSED_1>` and a newline, as in InternLM's own chats.
    """

    protocol: ImageProtocol = "squash"
    image_token_id = IMAGE_PLACEHOLDER

    def __init__(self, folder: Path, model: ShareCaptioner, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(folder, model, tokenizer)
        self.model = model
        self.language_model = model.language_model
        self.image_tokens = model.config.image_tokens
        self._user = self._marker("<|User|>:")
        self._bot = self._marker("<|Bot|>:")
        self._end_of_turn = self._control("<TOKENS_UNUSED_0>")
        self._end_of_answer = self._control("<TOKENS_UNUSED_1>")

    def segments(self, turns: Sequence[Turn], images: int) -> list[list[int]]:
        parts: list[list[str | int]] = [
            [self.tokenizer.bos_token_id, self._user],
            *([] for _ in range(images)),
        ]
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                parts[-1] += [turn.text, self._end_of_answer, "\n"]
            else:
                opening = [self._user] if number else []
                parts[-1] += [*opening, turn.text, self._end_of_turn, "\n", self._bot]
        return [self._join(segment) for segment in parts]

    def answer_ids(self, answer: str) -> list[int]:
        text = self._text(answer) if isinstance(self._bot, int) else self._following(self._bot, answer)
        return [*text, self._end_of_answer]

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_features(pixel_values)


class LmmAdapter(Adapter):
    """ShareGPT4V: BOS system line ` USER: ` image newline question ` ASSISTANT:` (template vicuna_v1).

    Later rounds: ` answer</s>USER: question ASSISTANT:`.
    """

    def __init__(
        self, folder: Path, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        super().__init__(folder, model, tokenizer)
        self.model = model
        self.protocol = getattr(model.config, "image_protocol", "pad")
        self.image_token_id = model.config.image_token_id
        self.image_tokens = model.config.image_seq_length
        self.language_model = _causal_language_model(model)

    def segments(self, turns: Sequence[Turn], images: int) -> list[list[int]]:
        parts: list[list[str | int]] = [[self.tokenizer.bos_token_id, f"{VICUNA_SYSTEM} USER: "]]
        parts += (["\n"] for _ in range(images))
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                parts[-1] += [f" {turn.text}", self.tokenizer.eos_token_id]
            else:
                parts[-1].append(f"{'USER: ' if number else ''}{turn.text} ASSISTANT:")
        return [self._join(segment) for segment in parts]

    def answer_ids(self, answer: str) -> list[int]:
        return [*self._following("ASSISTANT:", f" {answer}"), self.tokenizer.eos_token_id]

    def image_features(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = torch.stack(self.model.get_image_features(pixel_values).pooler_output)
        return features


def _check_roles(turns: Sequence[Turn]) -> None:
    roles = [turn.role for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(
            f"a dialogue begins and ends with the user and alternates; its roles are "
            f"{', '.join(roles) or 'none'}"
        )


def _causal_language_model(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """LLaVA keeps its head beside the decoder; this is the two as one module, sharing every tensor."""
    with torch.device("meta"):
        language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model = model.model.language_model
    language_model.lm_head = model.lm_head
    language_model.generation_config = model.generation_config
    return language_model.eval()
