"""Checks of the torch engine on a GPU, in about a minute; needs torch and transformers alone.

    PYTHONPATH=platform:. python benchmarks/gpu_first_light.py

The shipped toy models answer 2,000 requests of mixed lengths, sampled and greedy, some of them cancelled;
greedy answers in float32 are compared with the same engine on the CPU. Two layers at ShareGPT4V-7B's shape
are decoded with captured graphs and the attention kernel, and by transformers in float32.
"""

import argparse
import gc
import random
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import torch
from transformers import LlamaForCausalLM

from sharegpt4v.dialogue import Completion, Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.graphs import CudaCapture
from sharegpt4v.engine.llama import Llama, TorchKernels
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import padded_context
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
        f"storm: {count} requests in {seconds:.1f} s, {reasons}, {stats.failed} failed, "
        f"slot use {stats.slot_use:.2f}"
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
    """Forty slots, 24 steps, two layers: logits of each step beside transformers' in float32, same tokens.

    The error that bfloat16 has by itself is that of transformers in bfloat16 on the prompts.
    """
    torch.manual_seed(0)
    config = (toy_lmm_config() if toy else share_gpt4v_config("7b")).text_config
    config.num_hidden_layers = 2
    model = LlamaForCausalLM(config).eval().to(device, torch.bfloat16)
    exact = LlamaForCausalLM(config).eval().to(device)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    slots, steps = (4, 6) if toy else (40, 24)
    lengths = [20 + 7 * slot for slot in range(slots)]
    table = model.get_input_embeddings()
    prompts = [table(torch.randint(3, 300, (length,), device=device)) for length in lengths]
    half = torch.stack(
        [model(inputs_embeds=p[None], logits_to_keep=1).logits[0, -1].float() for p in prompts]
    )
    for name in ("captured, our kernels", "uncaptured, PyTorch's kernels"):
        sampler = TokenSampler(slots, config.vocab_size, [2], torch.device(device))
        decoder = Decoder(
            Llama(model), sampler, slots, padded_context(340), torch.bfloat16, torch.device(device)
        )
        if name.startswith("captured"):
            decoder.prepare()
        else:
            decoder._attend_live, decoder._kernels = None, TorchKernels()
        spans = [Span(slot, 0, length) for slot, length in enumerate(lengths)]
        found = decoder.prefill(list(zip(spans, prompts, strict=True)))
        histories = [prompt.float() for prompt in prompts]
        wrong, agree = [], 0
        for step in range(steps):
            expected = torch.stack(
                [exact(inputs_embeds=h[None], logits_to_keep=1).logits[0, -1] for h in histories]
            )
            if not step:
                own = error_of(half, expected)
            wrong.append(error_of(found, expected))
            agree += int((found.argmax(-1) == expected.argmax(-1)).sum())
            tokens = expected.argmax(-1)
            embedded = exact.get_input_embeddings()(tokens)
            histories = [torch.cat([h, e[None]]) for h, e in zip(histories, embedded, strict=True)]
            positions = [length + step for length in lengths]
            decoder.begin(range(slots), torch.stack([tokens, tokens]), positions)
            decoder.step(dict(enumerate(positions)))
            found = decoder.logits[:slots].clone()
        print(
            f"{name}: relative error of logits {wrong[0]:.1e} after prefill, {max(wrong[1:]):.1e} at most "
            f"over {steps - 1} steps (transformers in bfloat16: {own:.1e}); best tokens equal float32's in "
            f"{agree / slots / steps:.1%}",
            flush=True,
        )
        assert max(wrong) < 2 * own + 0.002


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_memory(device: str) -> None:
    """A capture without memory must name that cause, so that the engine halves its slots."""
    if device != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps for later would be found by the capture
    whole = torch.cuda.mem_get_info()[0]
    held = torch.empty(whole - 400 * 2**20, dtype=torch.uint8, device=device)
    kept: list[object] = []

    def work() -> None:
        kept.append(torch.empty(150 * 2**20, dtype=torch.uint8, device=device))

    try:
        capture = CudaCapture(torch.device(device))
        for _ in range(4):
            kept.append(capture(work))
        raise AssertionError("a capture without memory was not refused")
    except torch.OutOfMemoryError:
        print("capture without memory: OutOfMemoryError, as wanted")
    del held, capture
    kept.clear()
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="few requests on the CPU: a test of this script")
    options = parser.parse_args()
    device = "cpu" if options.toy else "cuda"
    count = 40 if options.toy else 2_000
    check_logits(device, options.toy)
    check_memory(device)
    check_storm(count, device)
    check_texts(min(count, 300), device)
    if device == "cuda":
        print(f"memory at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
