"""What comes before vLLM: dialogues as its prompts, by our own templates or by the folder's chat template."""

import json
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from sharegpt4v.dialogue import Request, Turn
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter
from sharegpt4v.models.control_strings import ControlStrings
from sharegpt4v.models.load import FAMILIES, load_without_decoder
from sharegpt4v.models.vlm import (
    check_ends_with_question,
    end_tokens,
    load_tokenizer,
    to_pillow,
    without_surrogates,
)


class Frontend(ABC):
    """Makes vLLM's prompts for one model.

    folder: its weights. decoder: the configuration of its language model. context: tokens of prompt and
    answer together that it was made for. eos_token_ids: tokens that end an answer. embeds: whether its
    prompts are embeddings, and vLLM runs the decoder alone.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerFast
    eos_token_ids: frozenset[int]
    decoder: Any
    dtype: torch.dtype
    context: int
    embeds = False

    @abstractmethod
    def prompt(self, request: Request, renderer: Any) -> tuple[dict[str, Any], int]:
        """Returns vLLM's prompt and its number of tokens, images included.

        renderer: vLLM's. Raises UserError for what the model cannot be asked.
        """

    @abstractmethod
    def count(self, turns: Sequence[Turn], renderer: Any) -> int:
        """Returns the tokens of a prompt, images included; may be called from any thread."""


class AdapterFrontend(Frontend):
    """LLaVA-shaped models, and Share-Captioner by its own vision tower and sampler: our own templates."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.folder = adapter.folder
        self.tokenizer = adapter.tokenizer
        self.eos_token_ids = adapter.eos_token_ids
        self.decoder = adapter.language_model.config
        self.dtype = adapter.dtype
        self.context = self.decoder.max_position_embeddings
        self.embeds = isinstance(adapter, CaptionerAdapter)

    def count(self, turns: Sequence[Turn], renderer: Any) -> int:
        return self.adapter.prompt_tokens(turns)

    def prompt(self, request: Request, renderer: Any) -> tuple[dict[str, Any], int]:
        adapter = self.adapter
        tokens = adapter.prompt_tokens(request.turns)
        if self.embeds:
            # One at a time: requests begin as others end, and a bad image then fails its request alone.
            [embeddings] = adapter.embed([request])
            return {"prompt_embeds": embeddings.cpu()}, tokens
        for image in request.images:
            adapter.check_image(image)
        template = adapter.template
        first, *rest = template.segments(request.turns)
        # vLLM replaces each image token by all of an image's; text of a turn is never encoded to it.
        ids = first + [token for segment in rest for token in (template.image_token_id, *segment)]
        if not request.images:
            return {"prompt_token_ids": ids}, tokens
        # The checkpoint's processor only normalises images that already have the model's size.
        images = [Image.fromarray(image) for image in request.images]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}, tokens


class ChatFrontend(Frontend):
    """Any other model of images and text that vLLM knows: by its folder's chat template and processor."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Loads configuration and tokenizer. Raises UserError for a folder without what prompts need."""
        self.folder = folder
        self.dtype = dtype
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            first = " ".join(str(error).split()).partition(". ")[0]
            raise UserError(f"{folder}: {first}", field="model") from error
        self.decoder = config.get_text_config()
        self.tokenizer = load_tokenizer(folder)
        if (folder / "generation_config.json").exists():
            settings = GenerationConfig.from_pretrained(folder)
        else:
            settings = GenerationConfig.from_model_config(config)
        self.eos_token_ids = end_tokens(folder, settings, self.tokenizer)
        self.context = (
            getattr(self.decoder, "max_position_embeddings", None) or self.tokenizer.model_max_length
        )
        self._controls = ControlStrings(folder.resolve().name, self.tokenizer)
        self._rendering = threading.Lock()  # tokenizer and processor are not made for several threads

    def count(self, turns: Sequence[Turn], renderer: Any) -> int:
        return len(self._render(turns, renderer)["prompt_token_ids"])

    def prompt(self, request: Request, renderer: Any) -> tuple[dict[str, Any], int]:
        prompt = self._render(request.turns, renderer)
        return prompt, len(prompt["prompt_token_ids"])

    def _render(self, turns: Sequence[Turn], renderer: Any) -> dict[str, Any]:
        """Returns vLLM's prompt, its image tokens expanded. Control strings in texts stay plain text.

        Raises UserError where that cannot be: vLLM writes some prompts as text again, to put images in.
        """
        check_ends_with_question(turns)
        with self._rendering:
            prompt = self._process(turns, renderer)
            if self._controls.are_in(turns):
                harmless = self._process(self._controls.removed(turns), renderer)
                if self._outside_images(prompt) != self._outside_images(harmless):
                    raise self._controls.refused(turns)
        return prompt

    def _process(self, turns: Sequence[Turn], renderer: Any) -> dict[str, Any]:
        from vllm.renderers.params import ChatParams

        key = secrets.token_hex(8)  # no text holds it: control strings are hidden behind it from the template
        text_only = ChatParams(chat_template_kwargs={"tokenize": False, "add_generation_prompt": True})
        messages = [self._message(turn, key) for turn in turns]
        _, rendered = renderer.render_messages(messages, text_only)
        rendered["prompt_token_ids"] = self._encode(rendered.pop("prompt"), key, turns)
        prompt: dict[str, Any] = renderer.process_for_engine(rendered, time.time())
        return prompt

    def _message(self, turn: Turn, key: str) -> dict[str, Any]:
        images = [{"type": "image_pil", "image_pil": to_pillow(image)} for image in turn.images]
        text = self._controls.hide(without_surrogates(turn.text), key)
        return {"role": turn.role, "content": [*images, {"type": "text", "text": text}]}

    def _encode(self, text: str, key: str, turns: Sequence[Turn]) -> list[int]:
        """Encodes what the template wrote, as processors do, and the control strings in it as plain text."""
        tokenizer = self.tokenizer
        begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        first, *rest = self._controls.split(text, key)
        ids = list(tokenizer.encode(first, add_special_tokens=not begins))
        for number, part in enumerate(rest):
            is_control = number % 2 == 0
            new = tokenizer.encode(part, add_special_tokens=False, split_special_tokens=is_control)
            if is_control and self._controls.count(new):
                raise self._controls.refused(turns)
            ids += new
        return ids

    def _outside_images(self, prompt: dict[str, Any]) -> Counter[int]:
        """Counts the control tokens of a prompt that no image was expanded to."""
        ids = list(prompt["prompt_token_ids"])
        for places in prompt.get("mm_placeholders", {}).values():
            for place in places:
                ids[place.offset : place.offset + place.length] = [-1] * place.length
        return self._controls.count(ids)


def make_frontend(folder: Path, dtype: torch.dtype, device: str) -> Frontend:
    """Makes the frontend of the model in a folder; of its weights it loads those that vLLM does not run."""
    if json.loads((folder / "config.json").read_text()).get("model_type") in FAMILIES:
        return AdapterFrontend(load_without_decoder(folder, dtype, device))
    return ChatFrontend(folder, dtype)
