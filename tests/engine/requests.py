"""Requests to a captioner with random weights, what transformers' generate answers, and watched engines.

Engines are watched, and made to fail, through the parts they are built of: none of their methods is replaced.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from sharegpt4v.dialogue import Completion, Image, Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm")

END = -1
"""Stands for any end token."""

PROMPTS = ("Analyze the image in a comprehensive and detailed manner.", "Analyze the image.")


def make_image(adapter: Adapter, seed: int) -> Image:
    size = adapter.image_size
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_request(adapter: Adapter, number: int, prompt: str = PROMPTS[0], **sampling: Any) -> Request:
    """Its seed is its number, by which `watch_sampling` knows it."""
    params = SamplingParams(**{"max_new_tokens": 12, "seed": number} | sampling)
    return Request(f"r{number}", (Turn("user", prompt, (make_image(adapter, number),)),), params)


def generate(adapter: Adapter, request: Request) -> list[int]:
    """transformers' greedy generate, one request at a time; an end token is END."""
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
    return [END if token in adapter.eos_token_ids else token for token in tokens]


def reference(adapter: Adapter, request: Request) -> tuple[str, int]:
    tokens = generate(adapter, request)
    kept = [token for token in tokens if token != END]
    return str(adapter.tokenizer.decode(kept, skip_special_tokens=True)).strip(), len(tokens)


def _logits_of(adapter: Adapter, prompt: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """What follows the prompt and `tokens`: (V,)."""
    table = adapter.language_model.get_input_embeddings()
    with torch.inference_mode():
        whole = torch.cat([prompt, table(torch.tensor(tokens, dtype=torch.long))])
        logits: torch.Tensor = adapter.language_model(inputs_embeds=whole[None], logits_to_keep=1).logits
    return logits[0, -1]


class NumberTokenizer:
    """Spells each token as its number, so that a text tells its tokens; encodes as another one does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def spelling_numbers(adapter: Adapter) -> Adapter:
    """The same model, whose answers are the numbers of their tokens: see `tokens_of`."""
    spelling = copy.copy(adapter)
    spelling.tokenizer = NumberTokenizer(adapter.tokenizer)
    return spelling


def tokens_of(completion: Completion) -> list[int]:
    """All tokens of an answer that spells numbers; its end token is END."""
    tokens = [int(number) for number in completion.text.split()]
    return tokens + [END] * (completion.tokens - len(tokens))


def torch_answers(adapter: Adapter, requests: Sequence[Request], slots: int) -> dict[str, list[int]]:
    """The torch engine's tokens by request id."""
    with closing(TorchEngine(spelling_numbers(adapter), "test@0", capacity=slots)) as engine:
        handles = [engine.submit(request) for request in requests]
        return {handle.request.id: tokens_of(handle.result(120)) for handle in handles}


def is_a_tie(adapter: Adapter, request: Request, ours: list[int], reference: list[int]) -> bool:
    """Whether the two part where the reference's two best logits are within 1e-4."""
    same = next(i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b)
    [prompt] = adapter.embed([request])
    best = _logits_of(adapter, prompt, reference[:same]).topk(2).values
    return bool(best[0] - best[1] < 1e-4)


Look = Callable[[dict[int, int], torch.Tensor], None]


def watch_sampling(monkeypatch: pytest.MonkeyPatch, look: Look) -> None:
    """Has torch engines call `look` before they choose tokens.

    With the seeds of the requests by slot, and their logits, a row each; it may change these, or raise.
    """

    class Watched(TokenSampler):
        def __init__(self, slots: int, *args: Any) -> None:
            super().__init__(slots, *args)
            self._seeds = [-1] * slots
            self.live: set[int] = set()

        def admit(self, slot: int, params: SamplingParams, seed: int, tokens: Sequence[int] = ()) -> None:
            super().admit(slot, params, seed, tokens)
            self._seeds[slot] = seed

        def move(self, source: int, target: int) -> None:
            super().move(source, target)
            self._seeds[target] = self._seeds[source]

        def choose(self, logits: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
            self.live = set(slots)
            return super().choose(logits, slots)

        def greedy(
            self, logits: torch.Tensor, index: torch.Tensor, alive: torch.Tensor | int = 1
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [row for row, slot in enumerate(index.tolist()) if slot in self.live]
            own = logits[rows]
            look({slot: self._seeds[slot] for slot in index[rows].tolist()}, own)
            logits[rows] = own
            return super().greedy(logits, index, alive)

    class WatchedDecoder(Decoder):
        def _tell_alive(self, slots: Mapping[int, object]) -> None:
            assert isinstance(self._sampler, Watched)
            self._sampler.live = set(slots)
            super()._tell_alive(slots)

    monkeypatch.setattr("sharegpt4v.engine.torch_engine.TokenSampler", Watched)
    monkeypatch.setattr("sharegpt4v.engine.torch_engine.Decoder", WatchedDecoder)


class Repeated:
    """What CudaCapture makes of a step, without a GPU: the same work on the same tensors, done again."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        work()  # as before a capture

    def replay(self) -> None:
        self._work()


class SteppingDecoder(Decoder):
    """Steps as on a GPU, without one: sizes rounded up, inputs and logits in tensors that stay."""

    def prepare(self) -> None:
        if self._graphs is None:
            self.use_graphs(Repeated)
