"""Captioning speed of the real shapes with random weights on one GPU; needs torch and transformers alone.

    PYTHONPATH=platform:. python benchmarks/gpu_caption.py --models lmm,resampler,qformer

Images are random pixels at model size, lengths of captions are spread around 190 tokens (a mean of 826
characters, Table 2), and the end token is banned until then. Decoding is greedy with the release's penalty
of 1.5. Every slot has an answer, of any age, when the measurement begins and when it ends. The paper's rate
is 1.246 M images in 44 A100 GPU-days, with 3 beams and on another card: an orientation, not a race.
"""

import argparse
import gc
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlavaForConditionalGeneration

from benchmarks.gpu_profile import report, report_run
from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.decoder import Decoder
from sharegpt4v.engine.llama import Llama
from sharegpt4v.engine.prefill_attention import Span
from sharegpt4v.engine.sampling import TokenSampler
from sharegpt4v.engine.slots import bytes_per_slot, padded_context
from sharegpt4v.engine.stats import EngineStats
from sharegpt4v.engine.torch_engine import PREFILL_TOKENS, TorchEngine
from sharegpt4v.errors import UserError
from sharegpt4v.models.adapter import Adapter, CaptionerAdapter, LmmAdapter
from sharegpt4v.models.captioner import ImageSampler, ShareCaptioner, share_captioner_7b
from sharegpt4v.models.lmm import share_gpt4v_config
from sharegpt4v.models.load import captioner_template, lmm_template
from sharegpt4v.models.toy import toy_captioner_config, toy_lmm_config
from sharegpt4v.prompts import UNIFIED_CAPTION
from sharegpt4v.toy.tokenizer import build_tokenizer

NOT_MEASURED = (
    "not measured: image files (pixels are made in memory), released weights and what their captions say, "
    "start-up, Ray, several cards, the vision tower's share of the matrix rate"
)

PAPER_RATE = 0.316  # images/s/A100: 1.246 M images over 44 GPU-days [derived from section 3.3]
MEAN_TOKENS = 190
_PROFILED_SECONDS = 3.0


def make_captioner(sampler: ImageSampler, toy: bool, layers: int | None = None) -> Adapter:
    config = toy_captioner_config(sampler) if toy else share_captioner_7b(sampler)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    template = captioner_template(build_tokenizer(), config)
    return CaptionerAdapter(Path("random"), ShareCaptioner(config).eval(), template)


def make_lmm(toy: bool, layers: int | None = None) -> Adapter:
    config = toy_lmm_config() if toy else share_gpt4v_config("7b")
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    template = lmm_template(build_tokenizer(), config)
    return LmmAdapter(Path("random"), LlavaForConditionalGeneration(config).eval(), template)


MODELS: dict[str, Callable[[bool, int | None], Adapter]] = {
    "lmm": make_lmm,
    "resampler": lambda toy, layers: make_captioner("resampler", toy, layers),
    "qformer": lambda toy, layers: make_captioner("qformer", toy, layers),
}


def make_requests(image_size: int) -> Iterator[Request]:
    """Makes requests without end, with one image each, all different: the engine embeds equal ones once."""
    draw = random.Random(11)
    noise = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
    for number in count():
        length = min(400, max(60, round(draw.gauss(MEAN_TOKENS, 50))))
        yield Request(
            str(number),
            (Turn("user", UNIFIED_CAPTION.text, (np.roll(noise, number, (0, 1)),)),),
            SamplingParams(max_new_tokens=length, min_new_tokens=length, repetition_penalty=1.5),
        )


def keep_busy(engine: TorchEngine, requests: Iterator[Request], until: Callable[[EngineStats], bool]) -> None:
    """Has a request waiting for every slot, so that none is empty for long.

    Raises RuntimeError for requests that fail.
    """
    while not until(stats := engine.stats()):
        if stats.failed:
            raise RuntimeError(f"{stats.failed} requests failed")
        if stats.queued < engine.capacity:
            engine.submit(next(requests))
        else:
            time.sleep(0.002)


def card_rates(device: str) -> tuple[float, float]:
    """Measured bandwidth in bytes/s (a copy reads and writes) and bf16 matrix rate in operations/s."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device)
    side = 8192 if device == "cuda" else 256
    matrix = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device)
    product = seconds_of(lambda: matrix @ matrix, device)
    return 2 * size / copy, 2 * side**3 / product


def seconds_of(work: Callable[[], object], device: str) -> float:
    for _ in range(3):
        work()
    _wait(device)
    start = time.perf_counter()
    for _ in range(10):
        work()
    _wait(device)
    return (time.perf_counter() - start) / 10


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(name: str, options: argparse.Namespace, device: str, bandwidth: float, operations: float) -> None:
    """One model: images/s end to end, and where the time goes."""
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        adapter = MODELS[name](options.toy, options.layers)
    torch.set_default_dtype(torch.float32)
    requests = make_requests(adapter.image_size)
    prompt = adapter.prompt_tokens(next(requests).turns)
    if options.profile:
        with torch.inference_mode():
            profile_parts(adapter, requests, prompt, options.slots, options.fp8)
        gc.collect()
        torch.cuda.empty_cache()
    # Closed whatever happens, or its memory would be missing for the next model.
    stored = torch.float8_e4m3fn if options.fp8 else None
    with closing(
        TorchEngine(adapter, f"{name}@random", options.slots, max_context=prompt + 400, stored=stored)
    ) as engine:
        # Graphs are captured, libraries warm, and answers of any age in the slots.
        keep_busy(engine, requests, lambda stats: stats.requests >= engine.capacity)
        before, start = engine.stats(), time.perf_counter()
        keep_busy(engine, requests, lambda _: time.perf_counter() - start > options.seconds)
        seconds, spent = time.perf_counter() - start, difference(engine.stats(), before)
        if options.profile:
            profile_run(engine, requests)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    rate = spent.requests / seconds
    paper = "" if options.toy else f" ({rate / PAPER_RATE:.0f}x the paper's A100 with 3 beams)"
    print(
        f"{name}{', fp8 keys and values' * options.fp8}: {rate:.2f} images/s{paper}, "
        f"{spent.new_tokens / seconds:,.0f} new tokens/s, "
        f"{engine.capacity} slots, use {spent.slot_use:.2f}, prompt {prompt} tokens, memory {memory:.1f} GB"
    )
    steps = spent.slot_steps / engine.capacity
    weights = sum(parameter.numel() for parameter in adapter.language_model.parameters())
    # What a step must read: the weights once, and each live slot's prompt and on average half of its answer.
    live = spent.live_steps * (prompt + MEAN_TOKENS // 2)
    read = steps * weights * adapter.dtype.itemsize
    read += bytes_per_slot(adapter.language_model.config, live, stored or adapter.dtype)
    matrix = 2 * weights * spent.prompt_tokens / spent.prefill_seconds / operations
    print(
        f"  decode {spent.decode_seconds:.1f} s of {seconds:.1f}: "
        f"{1000 * spent.decode_seconds / steps:.1f} ms a step, "
        f"{read / spent.decode_seconds / bandwidth:.0%} of measured bandwidth; embed and prefill "
        f"{spent.prefill_seconds:.1f} s: {matrix:.0%} of the measured matrix rate",
        flush=True,
    )


def profile_parts(adapter: Adapter, requests: Iterator[Request], prompt: int, slots: int, fp8: bool) -> None:
    """Divides the three parts of the work by cause, each at the size that the engine gives it."""
    number = max(1, PREFILL_TOKENS["cuda"] // prompt)
    embedded = list(islice(requests, number))
    report("vision and embedding", lambda: adapter.embed(embedded), 3, "image", number)
    device, vocabulary = adapter.device, adapter.language_model.config.vocab_size
    sampler = TokenSampler(slots, vocabulary, adapter.eos_token_ids, device)
    context = padded_context(prompt + 400)
    stored = torch.float8_e4m3fn if fp8 else adapter.dtype
    decoder = Decoder(Llama(adapter.language_model), sampler, slots, context, adapter.dtype, device, stored)
    decoder.prepare()
    prompts = adapter.embed(embedded)
    spans = [Span(slot, 0, prompt) for slot in range(number)]
    parts = list(zip(spans, prompts, strict=True))
    report("prefill", lambda: decoder.prefill(parts), 3, "image", number)
    # Answers in progress are anywhere between their first and their last token.
    positions = [prompt + round(MEAN_TOKENS * slot / slots) for slot in range(slots)]
    decoder.begin(range(slots), torch.ones(2, slots, dtype=torch.long, device=device), positions)
    report("decode step", lambda: decoder.step(dict(enumerate(positions))), 10, "slot", slots)


def profile_run(engine: TorchEngine, requests: Iterator[Request]) -> None:
    """Divides the time of a busy engine by cause."""

    def work() -> int:
        before, start = engine.stats(), time.perf_counter()
        keep_busy(engine, requests, lambda _: time.perf_counter() - start > _PROFILED_SECONDS)
        return difference(engine.stats(), before).requests

    report_run(work, "image")


def difference(after: EngineStats, before: EngineStats) -> EngineStats:
    """What was counted between the two."""
    names = [field.name for field in fields(EngineStats)]
    return EngineStats(**{name: getattr(after, name) - getattr(before, name) for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="lmm,resampler,qformer", help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=20, help="measured with all slots in use")
    parser.add_argument("--slots", type=int, default=192)
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU: a test of this script")
    parser.add_argument("--profile", action="store_true", help="divide the time by cause first (GPU only)")
    parser.add_argument("--fp8", action="store_true", help="keys and values as fp8 in the slots")
    parser.add_argument("--layers", type=int, help="layers of the language model; all by default")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.toy else "cpu"
    if device == "cpu" and not options.toy:
        parser.exit(2, "no GPU here: --toy runs the script at toy size on the CPU\n")
    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    print(f"{card}, torch {torch.__version__}, transformers {transformers.__version__}")
    bandwidth, operations = card_rates(device)
    if device == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later would not count as free for slots
    print(f"measured: {bandwidth / 1e9:,.0f} GB/s copied, {operations / 1e12:,.1f} bf16 TFLOP/s")
    start = time.perf_counter()
    for name in options.models.split(","):
        try:
            measure(name, options, device, bandwidth, operations)
        except (RuntimeError, UserError) as error:  # EngineError and out of memory among them
            print(f"{name}: could not be measured: {type(error).__name__}: {' '.join(str(error).split())}")
        gc.collect()  # an error holds the frames it passed through, and they the engine and its cache
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(f"{time.perf_counter() - start:.0f} s with loading and warming up; {NOT_MEASURED}")


if __name__ == "__main__":
    main()
