"""Training speed of ShareGPT4V-7B's shape with random weights on one GPU; needs torch and transformers alone.

    PYTHONPATH=platform:. python benchmarks/gpu_train.py --stages pretrain,sft --layers 12

Plain torch, bfloat16 weights, gradient checkpointing over tower and language model, AdamW. The 7B with its
optimizer does not fit one card: --layers sets the depth of the language model, and MFU counts what runs.
Samples are random pixels and ids: captions of about 190 tokens for pre-training, and for SFT the
lengths of the 665K mix. The released code reached about 20 % MFU, the best published comparable 30 to 40 %.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import LlavaForConditionalGeneration

from sharegpt4v.models.adapter import LmmAdapter
from sharegpt4v.models.freeze import TrainStage, freeze
from sharegpt4v.models.lmm import share_gpt4v_config
from sharegpt4v.models.load import lmm_template
from sharegpt4v.templates import IGNORE_INDEX, TrainingIds
from sharegpt4v.toy.tokenizer import build_tokenizer
from sharegpt4v.train.collate import PackedRow, Sample, pack
from sharegpt4v.train.flops import Work, peak_operations
from sharegpt4v.train.packed_model import PackedModel
from sharegpt4v.train.packing import plan_step

NOT_MEASURED = (
    "not measured: image files, released weights, Ray, DeepSpeed, several cards, the depth that was left out"
)

CAUSES = {
    "matrices": ("gemm", "matmul", "::mm", "addmm", "cutlass", "nvjet", "::linear"),
    "attention": ("flash", "varlen", "fmha", "attention"),
    "optimizer": ("multi_tensor", "foreach", "adam"),
    "loss": ("softmax", "cross_entropy", "nll"),
    "copies": ("copy", "memcpy", "memset", "cat"),
}
"""Parts of kernels' names by what they are for; all others count as elementwise."""


def make_model(toy: bool, layers: int | None, stage: TrainStage, device: str) -> PackedModel:
    config = share_gpt4v_config("toy" if toy else "7b")
    if layers:
        config.text_config.num_hidden_layers = layers
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).to(dtype)
    freeze(model, stage, 2 if toy else 12)
    if not toy:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    template = lmm_template(build_tokenizer(), config, "plain" if stage == "pretrain" else "vicuna_v1")
    packed = PackedModel(LmmAdapter(Path("random"), model, template))
    packed.train()
    return packed


def make_samples(count: int, stage: TrainStage, model: PackedModel) -> list[Sample]:
    rng = np.random.default_rng(0)
    template, size = model.adapter.template, model.adapter.image_size
    picture = [template.image_token_id] * template.image_tokens
    samples = []
    for _ in range(count):
        if stage == "pretrain":
            question, answer = 1, int(np.clip(rng.normal(190, 50), 60, 400))
        else:
            long = rng.random() < 0.1
            question, answer = (
                int(rng.integers(45, 80)),
                int(rng.integers(300, 700) if long else rng.integers(2, 160)),
            )
        words = rng.integers(10, 400, question + answer).tolist()
        ids = [1, *picture, *words]
        labels = [IGNORE_INDEX] * (1 + len(picture) + question) + words[question:]
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        samples.append(Sample(TrainingIds(ids, labels), (pixels,)))
    return samples


def run_step(model: PackedModel, optimizer: torch.optim.Optimizer, rows: list[PackedRow]) -> None:
    labels = sum(row.label_tokens for row in rows)
    for row in rows:
        (model(row.to(model.adapter.device)) / labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(stage: TrainStage, options: argparse.Namespace, device: str) -> None:
    model = make_model(options.toy, options.layers, stage, device)
    samples = make_samples(options.batch, stage, model)
    plan = plan_step([len(each.ids.input_ids) for each in samples], 1, options.tokens)
    rows = [pack([samples[place] for place in row]) for row in plan.rows[0]]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device != "cpu")
    where = model.adapter.device
    run_step(model, optimizer, rows)
    wait(where)
    start = time.perf_counter()
    for _ in range(options.steps):
        run_step(model, optimizer, rows)
    wait(where)
    seconds = (time.perf_counter() - start) / options.steps
    tokens = sum(row.tokens for row in rows)
    print(f"{stage}: {tokens / seconds:,.0f} tokens/s, {len(samples) / seconds:.2f} samples/s", end="")
    print(f", {seconds:.2f} s a step of {len(rows)} rows, {_use(model, rows, seconds)}")
    print(f"{stage}, by cause: {by_cause(model, optimizer, rows)}")


def _use(model: PackedModel, rows: list[PackedRow], seconds: float) -> str:
    config = model.model.config
    work = Work.of(model.model, config.text_config)
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1
    lengths = [length for row in rows for length in row.lengths]
    labels, images = sum(row.label_tokens for row in rows), sum(len(row.pixels) for row in rows)
    done = work.operations(lengths, labels, images, patches, model.adapter.template.image_tokens) / seconds
    peak = peak_operations(model.adapter.device)
    share = f"MFU {done / peak:.1%}" if peak else "MFU unknown: the device's peak is not listed"
    if model.adapter.device.type != "cuda":
        return f"{done / 1e9:,.1f} GFLOP/s, {share}"
    return f"{done / 1e12:,.0f} TFLOP/s, {share}, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"


def by_cause(model: PackedModel, optimizer: torch.optim.Optimizer, rows: list[PackedRow]) -> str:
    """Returns each cause's share of the device's time in one step."""
    gpu = model.adapter.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        run_step(model, optimizer, rows)
        wait(model.adapter.device)
    sums: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        name = event.key.lower()
        cause = next((c for c, parts in CAUSES.items() if any(part in name for part in parts)), "elementwise")
        sums[cause] = sums.get(cause, 0.0) + spent
    total = sum(sums.values()) or 1.0
    return ", ".join(f"{cause} {sums[cause] / total:.0%}" for cause in sorted(sums, key=lambda c: -sums[c]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="pretrain,sft")
    parser.add_argument("--layers", type=int, help="of the language model (32)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16_384, help="of a packed row")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="the toy model")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    for stage in options.stages.split(","):
        measure(stage, options, device)
    print(NOT_MEASURED)


if __name__ == "__main__":
    main()
