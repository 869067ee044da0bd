"""Checks of the torch engine on a GPU, in about a minute; needs torch and transformers alone.

    PYTHONPATH=platform:. python benchmarks/gpu_first_light.py

The shipped toy models answer 2,000 requests of mixed lengths, sampled and greedy, some of them cancelled;
greedy answers in float32 are compared with the same engine on the CPU. Two layers at ShareGPT4V-7B's shape
are decoded with captured graphs and the attention kernel, and by transformers in float32.
"""

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from transformers import LlamaForCausalLM

from sharegpt4v.dialogue import Completion, Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.torch_engine import TorchEngine
from sharegpt4v.models.lmm import share_gpt4v_config
from sharegpt4v.models.load import load_adapter
from sharegpt4v.models.toy import toy_lmm_config
from sharegpt4v.toy.shipped import SHIPPED

QUESTIONS = (
    "What do you see?",
    "Describe the image in detail, with colours and places of all things.",
    "Why?",
)


def mixed_requests(count: int, size: int) -> list[Request]:
    """A third is sampled, a third has a penalty, lengths are 1 to 120 tokens."""
    draw, pixels = random.Random(5), np.random.default_rng(5)
    images = pixels.integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    requests = []
    for number in range(count):
        length = draw.randint(1, 120)
        sampling = SamplingParams(
            max_new_tokens=length,
            min_new_tokens=draw.randint(0, length),
            temperature=0.8 if number % 3 == 0 else 0.0,
            top_p=0.9 if number % 3 == 0 else 1.0,
            repetition_penalty=1.5 if number % 3 == 1 else 1.0,
            seed=number,
        )
        turn = Turn("user", draw.choice(QUESTIONS), (images[number % 16],))
        requests.append(Request(str(number), (turn,), sampling))
    return requests


def answers(
    name: str, dtype: torch.dtype, device: str, requests: Sequence[Request], slots: int
) -> list[Completion]:
    adapter = load_adapter(SHIPPED / name, dtype=dtype, device=device)
    with closing(TorchEngine(adapter, f"{name}@toy", slots)) as engine:
        handles = [engine.submit(request) for request in requests]
        return [handle.result(300) for handle in handles]


def check_storm(count: int, device: str) -> None:
    """Mixed lengths with cancels in bfloat16: every request ends, with its own number of tokens at most."""
    adapter = load_adapter(SHIPPED / "lmm", dtype=torch.bfloat16, device=device)
    requests = mixed_requests(count, adapter.image_size)
    draw = random.Random(7)
    start = time.perf_counter()
    with closing(TorchEngine(adapter, "lmm@toy", 64)) as engine:
        handles = [engine.submit(request) for request in requests]
        for handle in draw.sample(handles, count // 10):
            time.sleep(0.002)
            handle.cancel()
        ended = [handle.result(300) for handle in handles]
        stats = engine.stats()
    seconds = time.perf_counter() - start
    reasons = {
        reason: sum(e.finish_reason == reason for e in ended) for reason in ("stop", "length", "cancelled")
    }
    for request, completion in zip(requests, ended, strict=True):
        if completion.finish_reason != "cancelled":
            assert request.sampling.min_new_tokens <= completion.tokens <= request.sampling.max_new_tokens, (
                request.id
            )
    print(
        f"storm: {count} requests in {seconds:.1f} s, {reasons}, {stats.failed} failed, slot use {stats.slot_use:.2f}"
    )
    assert not stats.failed


def check_texts(count: int, device: str) -> None:
    """Greedy and sampled answers of both toy models in float32, against the same engine on the CPU."""
    for name in ("captioner", "lmm"):
        size = load_adapter(SHIPPED / name).image_size
        requests = mixed_requests(count, size)
        there = answers(name, torch.float32, device, requests, 48)
        here = answers(name, torch.float32, "cpu", requests, 48)
        same = sum(a.text == b.text for a, b in zip(there, here, strict=True))
        print(f"{name} in float32: {same} of {count} answers equal the CPU's")
        assert same >= 0.97 * count
        half = answers(name, torch.bfloat16, device, requests, 48)
        same = sum(a.text == b.text for a, b in zip(half, here, strict=True))
        print(f"{name} in bfloat16: {same} of {count} answers equal the CPU's in float32")


@torch.inference_mode()
def check_logits(device: str, toy: bool) -> None:
    """Forty slots, 24 steps, two layers: logits of each step beside transformers' in float32, same tokens."""
    torch.manual_seed(0)
    config = (toy_lmm_config() if toy else share_gpt4v_config("7b")).text_config
    config.num_hidden_layers = 2
    model = LlamaForCausalLM(config).eval().to(device, torch.bfloat16)
    slots, steps = (4, 6) if toy else (40, 24)
    lengths = [20 + 7 * slot for slot in range(slots)]
    exact = LlamaForCausalLM(config).eval().to(device)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    prompts = [
        0.02 * torch.randn(n, config.hidden_size, device=device, dtype=torch.bfloat16) for n in lengths
    ]
    decoder = Decoder(model, slots, 512 if not toy else 128, torch.bfloat16, torch.device(device))
    found = decoder.prefill(prompts, list(range(slots))).clone()
    wrong, agree = [], 0
    histories = [prompt.float() for prompt in prompts]
    for step in range(steps):
        expected = torch.stack(
            [exact(inputs_embeds=h[None], logits_to_keep=1).logits[0, -1] for h in histories]
        )
        wrong.append(((found - expected).norm() / expected.norm()).item())
        agree += int((found.argmax(-1) == expected.argmax(-1)).sum())
        tokens = expected.argmax(-1)
        embedded = exact.get_input_embeddings()(tokens)
        histories = [torch.cat([h, e[None]]) for h, e in zip(histories, embedded, strict=True)]
        found = decoder.step(tokens.tolist(), [n + step for n in lengths]).clone()
    print(
        f"two layers, bfloat16 against float32: relative error of logits {max(wrong):.1e} at most over {steps} steps, "
        f"greedy tokens equal in {agree / slots / steps:.1%}"
    )
    assert max(wrong) < 0.03


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="few requests on the CPU: a test of this script")
    options = parser.parse_args()
    device = "cpu" if options.toy else "cuda"
    count = 40 if options.toy else 2_000
    check_logits(device, options.toy)
    check_storm(count, device)
    check_texts(min(count, 300), device)
    if device == "cuda":
        print(f"memory at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
