"""The torch engine beside transformers' own ways of generating, vLLM, one by one, and without a model.

    python -m benchmarks.engine --requests 512

Output lengths are drawn from 20..200 with a fixed seed; all sides ban the end token until then. Each has,
for each line, the batch size it is fastest with on a part of the requests: generate in batches as requests
come; generate with a static cache and requests sorted by their true length, which no job knows; and
transformers' continuous batching. vLLM, eager and compiled, runs in its own environment where that is there
(`make vllm`), on the same requests with as many at once as the engine has slots. `decode` has prompts of one
token; `bfloat16` puts the engine in that type beside itself in float32.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from benchmarks.engine_sides import EOS, SIDES, Side, Vllm, prompt_ids, rate
from benchmarks.machine import describe_machine
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.adapter import Adapter
from sharegpt4v.models.toy import toy_text_config
from sharegpt4v.toy.tokenizer import build_tokenizer

SIZES = (32, 64, 128, 256)

VLLM_PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"

TARGETS = {1.2: "vllm", 1.1: "generate sorted"}
"""Wanted ratios, to the best of the sides whose names begin so."""


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
    adapter = cast(Adapter, PromptAdapter(model, model.get_input_embeddings().weight.dtype))
    with closing(TorchEngine(adapter, "bench@0", size, max_context=longest + 1, threads=threads)) as engine:
        start = time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        tokens = sum(handle.result().tokens for handle in handles)
        seconds = time.perf_counter() - start
    return tokens / seconds, engine


def best_size(run: Callable[[int], float], sizes: Sequence[int]) -> int:
    """Returns the size that `run` has the highest rate with."""
    return sizes[0] if len(sizes) == 1 else max(sizes, key=run)


def compare(
    name: str,
    model: Any,
    requests: Sequence[Request],
    sizes: Sequence[int],
    rounds: int,
    threads: int,
    sides: Mapping[str, Side],
) -> None:
    """Prints one line of the table for each side, with its own best size; vLLM has the engine's.

    The sides take turns, since others use this machine: medians of the rounds.
    """
    probe = requests[: max(sizes)]
    slots = best_size(lambda size: ours(model, probe, size, threads)[0], sizes)
    batches = {
        side: best_size(partial(_rate_of_size, SIDES[side], model, probe, threads), sizes)
        for side in ("generate in order", "generate sorted")
    }
    batches |= {side: slots for side, run in sides.items() if isinstance(run, Vllm)}
    rates: list[float] = []
    theirs: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            try:
                theirs[side].append(rate(run, model, requests, batches.get(side, 0), threads))
            except Exception as error:  # a side that this transformers does not have
                print(f"{name}, {side}: could not be measured: {type(error).__name__}: {error}")
        rates.append(ours(model, requests, slots, threads)[0])
    use = ours(model, requests, slots, threads)[1].stats().slot_use
    print(
        f"{name}, {len(requests)} requests: engine {median(rates):,.0f} tokens/s ({slots} slots, "
        f"use {use:.2f})"
    )
    ratios = {
        side: sorted(one / other for one, other in zip(rates, measured, strict=False))
        for side, measured in theirs.items()
        if measured
    }
    for side, measured in ratios.items():
        size = f", batches of {batches[side]}" if side in batches else ""
        print(
            f"    {side}{size}: {median(theirs[side]):,.0f} tokens/s, ratio {median(measured):.2f} "
            f"({', '.join(f'{ratio:.2f}' for ratio in measured)})",
            flush=True,
        )
    for target, among in TARGETS.items():
        if reached := [median(measured) for side, measured in ratios.items() if side.startswith(among)]:
            print(f"    {min(reached):.2f} of the best of {among}, target {target}", flush=True)


def _rate_of_size(side: Side, model: Any, requests: Sequence[Request], threads: int, size: int) -> float:
    return rate(side, model, requests, size, threads)


def one_by_one(name: str, model: Any, requests: Sequence[Request], slots: int, threads: int) -> None:
    """The rate of one after the other does not depend on their number: a part of them tells it."""
    some = requests[:8]
    alone = rate(SIDES["generate in order"], model, some, 1, threads)
    ours_rate, _ = ours(model, requests, slots, threads)
    print(
        f"{name}: {alone:,.1f} tokens/s over {len(some)} requests, engine {ours_rate:,.0f} over "
        f"{len(requests)}, ratio {ours_rate / alone:.1f}",
        flush=True,
    )


def in_half(
    name: str, model: Any, requests: Sequence[Request], sizes: Sequence[int], rounds: int, threads: int
) -> None:
    """Prints the engine's rate in bfloat16 beside float32, taking turns, each with its own best size."""
    models = {"float32": model, "bfloat16": copy.deepcopy(model).to(torch.bfloat16)}
    probe = requests[: max(sizes)]

    def rate_of(one: Any, size: int) -> float:
        return ours(one, probe, size, threads)[0]

    best = {kind: best_size(partial(rate_of, one), sizes) for kind, one in models.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds):
        for kind, one in models.items():
            rates[kind].append(ours(one, requests, best[kind], threads)[0])
    ratios = sorted(half / whole for half, whole in zip(rates["bfloat16"], rates["float32"], strict=True))
    print(
        f"{name}: "
        + ", ".join(f"{kind} {median(rates[kind]):,.0f} tokens/s ({best[kind]} slots)" for kind in models)
        + f", ratio {median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})",
        flush=True,
    )


def measure(name: str, model: Any, options: argparse.Namespace, sides: Mapping[str, Side]) -> None:
    """The lines of one model."""
    count, sizes = options.requests, [int(size) for size in options.sizes.split(",")]
    lines = {
        "decode": (1, count, False),
        "32-token prompts": (32, count, False),
        "equal lengths": (32, count, True),
        "576-token prompts": (576, count // 8, False),
    }
    for label, (prompt, number, equal) in lines.items():
        if label.split()[0] in options.lines:
            requests = make_requests(number, prompt, equal)
            compare(f"{name}, {label}", model, requests, sizes, options.rounds, options.threads, sides)
    if "bfloat16" in options.lines:
        requests = make_requests(count, 32)
        in_half(f"{name}, bfloat16", model, requests, sizes, options.rounds, options.threads)
    if "alone" in options.lines:
        one_by_one(f"{name}, one by one", model, make_requests(count, 32), max(sizes), options.threads)


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


def vllm_sides(python: Path | None, folder: Path, threads: int) -> dict[str, Side]:
    """Returns vLLM's two modes; nothing, and says so, without an interpreter that has it."""
    if python is None:
        print("vLLM: not measured, there is no .venv-vllm (make vllm)")
        return {}
    return {
        "vllm eager": Vllm(python, folder, eager=True, threads=threads),
        "vllm compiled": Vllm(python, folder, eager=False, threads=threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument(
        "--lines", default="decode,32-token,equal,576-token,bfloat16,alone", help="which comparisons to make"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="batch sizes to choose from, for both sides"
    )
    parser.add_argument("--models", default="none,toy,100m", help="some of none, toy, 100m")
    parser.add_argument(
        "--vllm",
        type=Path,
        default=VLLM_PYTHON if VLLM_PYTHON.exists() else None,
        help="interpreter of an environment that has vLLM; default: .venv-vllm's, where it is there",
    )
    options = parser.parse_args()
    print(describe_machine())
    torch.set_num_threads(1)  # of this thread; each side has its own
    if "none" in options.models:
        rate, engine = ours(NoModel(), make_requests(2 * options.requests, 32), 64, options.threads)
        print(f"scheduler alone: {rate:,.0f} tokens/s over 64 slots, use {engine.stats().slot_use:.2f}")
    with TemporaryDirectory() as saved:
        sides = SIDES | vllm_sides(options.vllm, Path(saved), options.threads)
        for name, make in (("toy", toy_model), ("100m", large_model)):
            if name not in options.models:
                continue
            model = make()
            print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
            measure(name, model, options, sides)


if __name__ == "__main__":
    main()
