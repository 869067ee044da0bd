"""The ways of generating that benchmarks/engine.py sets the engine beside: transformers' own, and vLLM."""

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sharegpt4v.dialogue import Request

EOS = 2

Side = Callable[[Any, Sequence[Request], int], float]
"""Model, requests, batch size -> seconds."""


def prompt_ids(request: Request, vocabulary: int) -> torch.Tensor:
    """Draws the prompt that a request's question gives the length of."""
    generator = torch.Generator().manual_seed(int(request.id))
    return torch.randint(10, vocabulary, (int(request.turns[0].text),), generator=generator)


def in_order(model: Any, requests: Sequence[Request], size: int) -> float:
    """Generates in static batches as the requests come."""
    return _batches(model, requests, size)


def by_length(model: Any, requests: Sequence[Request], size: int) -> float:
    """Generates in static batches of requests sorted by their true length, with a static cache.

    No real job knows its lengths before: this is the strongest static side there is.
    """
    longest_first = sorted(requests, key=lambda request: -request.sampling.max_new_tokens)
    return _batches(model, longest_first, size, cache_implementation="static")


def continuous(model: Any, requests: Sequence[Request], size: int) -> float:
    """Generates by transformers' continuous batching, which sets its own batch size."""
    vocabulary = model.config.vocab_size
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=200)
    unfinished = len(requests)
    with model.continuous_batching_context_manager(generation_config=config, timeout=5) as manager:
        start = time.perf_counter()
        for request in requests:
            ids = prompt_ids(request, vocabulary).tolist()
            manager.add_request(ids, request_id=request.id, max_new_tokens=request.sampling.max_new_tokens)
        while unfinished:
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError("transformers' continuous batching gave nothing for a minute")
            unfinished -= result.is_finished()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Vllm:
    """vLLM on the same prompts and lengths, with as many requests at once.

    python: the interpreter of an environment that has it. folder: where models are saved for it. eager:
    without torch.compile.
    """

    python: Path
    folder: Path
    eager: bool
    threads: int

    def __call__(self, model: Any, requests: Sequence[Request], size: int) -> float:
        """Returns the seconds that vLLM measures itself; loading and compiling come before them."""
        folder = self.folder / f"{sum(p.numel() for p in model.parameters())}"
        if not folder.exists():
            model.save_pretrained(folder)
        question = {
            "model": str(folder),
            "slots": size,
            "threads": self.threads,
            "eager": self.eager,
            "prompts": [prompt_ids(request, model.config.vocab_size).tolist() for request in requests],
            "lengths": [request.sampling.max_new_tokens for request in requests],
        }
        script = Path(__file__).with_name("engine_vllm.py")
        done = subprocess.run(
            [self.python, script], input=json.dumps(question), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"vLLM ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return float(done.stdout.split()[-1])


SIDES: dict[str, Side] = {
    "generate in order": in_order,
    "generate sorted": by_length,
    "generate continuous": continuous,
}


def rate(side: Side, model: Any, requests: Sequence[Request], size: int, threads: int) -> float:
    """Returns tokens/s of a side; only wanted tokens count.

    In a thread that ends with it: a team of OpenMP threads that stayed would slow down the other sides.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        seconds = pool.submit(side, model, requests, size).result()
    return sum(request.sampling.max_new_tokens for request in requests) / seconds


@torch.inference_mode()
def _batches(model: Any, requests: Sequence[Request], size: int, **options: Any) -> float:
    start = time.perf_counter()
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
            **options,
        )
    return time.perf_counter() - start
