"""How fast each of PyTorch's attention kernels reads the cache in a decode step; no Ray is needed.

    PYTHONPATH=platform:. python benchmarks/gpu_attention.py

The engine's own call at ShareGPT4V-7B's shape: one query a slot, keys and values of bfloat16, each slot up to
its own length behind one mask. The rate is of the bytes up to the longest slot, which is what the call reads;
`needed` is the share of them that belong to live positions. PyTorch chooses among these by itself.
"""

import argparse
import random

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig

from benchmarks.gpu_caption import seconds_of
from sharegpt4v.engine.slots import SlotCache, live_mask

BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.MATH,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=192)
    parser.add_argument("--live", type=int, default=1_024, help="positions up to the longest slot")
    parser.add_argument("--toy", action="store_true", help="toy shapes on the CPU: a test of this script")
    options = parser.parse_args()
    device = torch.device("cpu" if options.toy else "cuda")
    heads, width = (4, 32) if options.toy else (32, 128)
    config = LlamaConfig(
        num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * width
    )
    cache = SlotCache(config, options.slots, options.live, torch.bfloat16, device)
    draw = random.Random(11)
    lengths = [draw.randint(options.live // 2, options.live) for _ in range(options.slots)]
    mask = live_mask(torch.tensor(lengths, device=device) - 1, options.live, torch.bfloat16)
    query = torch.randn(options.slots, heads, 1, width, device=device).to(torch.bfloat16)
    read = 2 * options.slots * options.live * heads * width * 2
    needed = sum(lengths) / (options.live * options.slots)
    print(f"{options.slots} slots, {heads} heads of {width}, {options.live} positions, needed {needed:.0%}")
    with torch.inference_mode():
        default = seconds_of(lambda: cache.attend(0, query, mask), device.type)
        print(f"PyTorch's choice: {1e3 * default:.3f} ms a layer, {read / default / 1e9:,.0f} GB/s")
        for backend in BACKENDS:
            try:
                with sdpa_kernel(backend):
                    seconds = seconds_of(lambda: cache.attend(0, query, mask), device.type)
            except RuntimeError as error:
                print(f"{backend.name}: {str(error).splitlines()[0]}")
                continue
            print(
                f"{backend.name}: {1e3 * seconds:.3f} ms a layer, {read / seconds / 1e9:,.0f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
