"""The torch engine against transformers' generate in static batches, against one by one, and without a model.

    python -m benchmarks.engine --requests 512

Output lengths are drawn from 20..200 with a fixed seed; both sides ban the end token until then. Each side
gets the batch size it is fastest with on a part of the requests. `decode` has prompts of one token.
"""

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from statistics import median
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.machine import describe_machine
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.toy import toy_text_config
from sharegpt4v.toy.tokenizer import build_tokenizer

EOS = 2
SIZES = (32, 64, 128, 256)


class PromptAdapter:
    """A bare language model: a request's prompt is as many random tokens as its question says."""

    image_size = 0
    template = None  # its prompts are no text

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self.language_model = model
        self.tokenizer = build_tokenizer()
        self.eos_token_ids = frozenset({EOS})
        self.device = torch.device("cpu")
        self.dtype = dtype

    def prompt_tokens(self, turns: Sequence[Turn]) -> int:
        return int(turns[0].text)

    def embed(self, requests: Sequence[Request], skip: Sequence[int]) -> list[torch.Tensor]:
        table = self.language_model.get_input_embeddings()
        return [table(prompt_ids(request, self.language_model.config.vocab_size)) for request in requests]


class NoModel:
    """A language model that does nothing: what is left is the scheduler."""

    def __init__(self) -> None:
        self.config = LlamaConfig(vocab_size=64, hidden_size=64, num_attention_heads=1, num_hidden_layers=0)
        self._table = torch.nn.Embedding(64, 64)
        self.model = LlamaModel(self.config)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self._table

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def prompt_ids(request: Request, vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(request.id))
    return torch.randint(10, vocabulary, (int(request.turns[0].text),), generator=generator)


def make_requests(count: int, prompt_tokens: int, equal: bool = False) -> list[Request]:
    draw = random.Random(7)
    lengths = [110 if equal else draw.randint(20, 200) for _ in range(count)]
    return [
        Request(
            str(number),
            (Turn("user", str(prompt_tokens)),),
            SamplingParams(max_new_tokens=length, min_new_tokens=length),
        )
        for number, length in enumerate(lengths)
    ]


def ours(model: Any, requests: Sequence[Request], size: int, threads: int) -> tuple[float, TorchEngine]:
    """Tokens/s, start of the first request to end of the last, and the closed engine."""
    longest = max(int(request.turns[0].text) + request.sampling.max_new_tokens for request in requests)
    adapter = cast(Adapter, PromptAdapter(model))
    with closing(TorchEngine(adapter, "bench@0", size, max_context=longest + 1, threads=threads)) as engine:
        start = time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        tokens = sum(handle.result().tokens for handle in handles)
        seconds = time.perf_counter() - start
    return tokens / seconds, engine


def static(model: Any, requests: Sequence[Request], size: int, threads: int) -> float:
    """Tokens/s of transformers' generate in batches of `size`, in order; only wanted tokens count.

    In a thread that ends with it: a team of OpenMP threads that stayed would slow down the other side.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        return pool.submit(_generate, model, requests, size).result()


@torch.inference_mode()
def _generate(model: Any, requests: Sequence[Request], size: int) -> float:
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        longest = max(request.sampling.max_new_tokens for request in batch)
        ids = torch.stack([prompt_ids(request, model.config.vocab_size) for request in batch])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        tokens += sum(request.sampling.max_new_tokens for request in batch)
    return tokens / (time.perf_counter() - start)


def best_sizes(model: Any, sizes: Sequence[int], threads: int) -> tuple[int, int]:
    """Slots and batch size that each side is fastest with, over as many requests as the largest size."""
    if len(sizes) == 1:
        return sizes[0], sizes[0]
    probe = make_requests(max(sizes), 32)
    slots = max(sizes, key=lambda size: ours(model, probe, size, threads)[0])
    return slots, max(sizes, key=lambda size: static(model, probe, size, threads))


def compare(
    name: str, model: Any, requests: Sequence[Request], slots: int, batch: int, rounds: int, threads: int
) -> None:
    """One line of the table. The sides take turns, since others use this machine: medians of the rounds."""
    theirs, rates = [], []
    for _ in range(rounds):
        theirs.append(static(model, requests, batch, threads))
        rate, engine = ours(model, requests, slots, threads)
        rates.append(rate)
    ratios = sorted(rate / other for rate, other in zip(rates, theirs, strict=True))
    print(
        f"{name}, {len(requests)} requests: engine {median(rates):,.0f} tokens/s ({slots} slots, "
        f"use {engine.stats().slot_use:.2f}), generate {median(theirs):,.0f} (batches of {batch}), "
        f"ratio {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        flush=True,
    )


def one_by_one(name: str, model: Any, requests: Sequence[Request], slots: int, threads: int) -> None:
    """The rate of one after the other does not depend on their number: a part of them tells it."""
    some = requests[:8]
    alone = static(model, some, 1, threads)
    rate, _ = ours(model, requests, slots, threads)
    print(
        f"{name}: {alone:,.1f} tokens/s over {len(some)} requests, engine {rate:,.0f} over {len(requests)}, "
        f"ratio {rate / alone:.1f}",
        flush=True,
    )


def measure(name: str, model: Any, options: argparse.Namespace, rounds: int) -> None:
    """The lines of one model."""
    count = options.requests
    slots, batch = best_sizes(model, [int(size) for size in options.sizes.split(",")], options.threads)
    lines = {
        "decode": (1, count, False),
        "32-token prompts": (32, count, False),
        "equal lengths": (32, count, True),
        "576-token prompts": (576, count // 8, False),
    }
    for label, (prompt, number, equal) in lines.items():
        if label.split()[0] in options.lines:
            requests = make_requests(number, prompt, equal)
            compare(f"{name}, {label}", model, requests, slots, batch, rounds, options.threads)
    if "alone" in options.lines:
        one_by_one(f"{name}, one by one", model, make_requests(count, 32), slots, options.threads)


def large_model() -> LlamaForCausalLM:
    """About 100 million parameters, random."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8_000,
        hidden_size=768,
        intermediate_size=2_048,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=1024,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def toy_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(toy_text_config(EOS, attention_bias=True)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument(
        "--lines", default="decode,32-token,equal,576-token,alone", help="which comparisons to make"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="batch sizes to choose from, for both sides"
    )
    parser.add_argument("--models", default="none,toy,100m", help="some of none, toy, 100m")
    options = parser.parse_args()
    print(describe_machine())
    torch.set_num_threads(1)  # of this thread; each side has its own
    if "none" in options.models:
        rate, engine = ours(NoModel(), make_requests(2 * options.requests, 32), 64, options.threads)
        print(f"scheduler alone: {rate:,.0f} tokens/s over 64 slots, use {engine.stats().slot_use:.2f}")
    for name, make, rounds in (("toy", toy_model, 3), ("100m", large_model, 1)):
        if name not in options.models:
            continue
        model = make()
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        measure(name, model, options, rounds)


if __name__ == "__main__":
    main()
