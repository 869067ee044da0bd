"""Requests to a captioner with random weights, and what transformers' own generate answers them."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from sharegpt4v.dialogue import Image, Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.graphs import StepGraphs
from sharegpt4v.engine.slots import padded_context
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; see engine/build.py for how"
)

PROMPTS = ("Analyze the image in a comprehensive and detailed manner.", "Analyze the image.")


def make_image(adapter: Adapter, seed: int) -> Image:
    size = adapter.image_size
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_request(adapter: Adapter, number: int, prompt: str = PROMPTS[0], **sampling: Any) -> Request:
    params = SamplingParams(**{"max_new_tokens": 12} | sampling)
    return Request(f"r{number}", (Turn("user", prompt, (make_image(adapter, number),)),), params)


def generate(adapter: Adapter, request: Request) -> list[int]:
    """transformers' greedy generate, one request at a time."""
    embeddings = torch.stack(adapter.embed([request]))
    model: Any = adapter.language_model  # the declared self type of generate is a protocol of its own
    tokens: list[int] = model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=request.sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(adapter.eos_token_ids),
        repetition_penalty=1.0,
    )[0].tolist()
    return tokens


def reference(adapter: Adapter, request: Request) -> tuple[str, int]:
    tokens = generate(adapter, request)
    kept = [token for token in tokens if token not in adapter.eos_token_ids]
    return str(adapter.tokenizer.decode(kept, skip_special_tokens=True)).strip(), len(tokens)


def _logits_of(adapter: Adapter, prompt: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """What follows the prompt and `tokens`: (V,)."""
    table = adapter.language_model.get_input_embeddings()
    with torch.inference_mode():
        whole = torch.cat([prompt, table(torch.tensor(tokens, dtype=torch.long))])
        logits: torch.Tensor = adapter.language_model(inputs_embeds=whole[None], logits_to_keep=1).logits
    return logits[0, -1]


def is_a_tie(adapter: Adapter, request: Request, ours: list[int], reference: list[int]) -> bool:
    """Whether the two part where the reference's two best logits are within 1e-4."""
    same = next(i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b)
    [prompt] = adapter.embed([request])
    best = _logits_of(adapter, prompt, reference[:same]).topk(2).values
    return bool(best[0] - best[1] < 1e-4)


class Repeated:
    """What CudaCapture makes of a step, without a GPU: the same work on the same tensors, done again."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        work()  # as before a capture

    def replay(self) -> None:
        self._work()


def repeat_steps(decoder: Decoder, slots: int, context: int, by_length: bool = True) -> None:
    """Lets a decoder on a CPU step as on a GPU: sizes rounded up, inputs and logits in tensors that stay."""
    vocabulary = decoder._model.config.vocab_size
    decoder._graphs = StepGraphs(slots, context, vocabulary, torch.device("cpu"), Repeated, by_length)


class Remembering(TorchEngine):
    """Keeps the tokens of every answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.answers: dict[str, list[int]] = {}
        super().__init__(*args, **options)

    def _take_tokens(self, logits: torch.Tensor, slots: Any) -> None:
        rows = [self._rows[slot] for slot in slots]
        super()._take_tokens(logits, slots)
        self.answers |= {row.handle.request.id: row.tokens for row in rows if row}


class Stepping(Remembering):
    """Steps as on a GPU."""

    def _open_slots(self, count: int) -> None:
        super()._open_slots(count)
        repeat_steps(self._decoder, count, padded_context(self._context))
