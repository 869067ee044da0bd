"""How fast a decode step's attention reads the cache: the engine's kernel and PyTorch's; no Ray is needed.

    PYTHONPATH=platform:. python benchmarks/gpu_attention.py

One layer at ShareGPT4V-7B's shape: one query a slot, keys and values of bfloat16. The engine's kernel reads
each slot up to its own length; PyTorch's read all up to the longest, behind one mask, and PyTorch chooses
among them by itself. Rates count the bytes of live positions alone, so that they compare; `off by` is the
largest difference from attention in float32.
"""

import argparse
import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from benchmarks.gpu_caption import seconds_of
from sharegpt4v.engine.gpu_kernels import load_attend_live
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
    attend_live = load_attend_live(
        cache, heads, torch.bfloat16
    )  # before there is anything in the cache: it clears a slot
    draw = random.Random(11)
    lengths = [draw.randint(options.live // 2, options.live) for _ in range(options.slots)]
    positions = torch.tensor(lengths, device=device) - 1
    mask = live_mask(positions, options.live, torch.bfloat16)
    query = torch.randn(options.slots, heads, 1, width, device=device).to(torch.bfloat16)
    keys, values = cache.keys[0].normal_(), cache.values[0].normal_()
    needed = 2 * sum(lengths) * heads * width * 2
    share = sum(lengths) / (options.live * options.slots)
    print(f"{options.slots} slots, {heads} heads of {width}, {options.live} positions, {share:.0%} live")
    with torch.inference_mode():
        exact = scaled_dot_product_attention(
            query.float(), keys.float(), values.float(), attn_mask=mask.float()
        )

        def report(name: str, attend: Callable[[], Tensor]) -> None:
            wrong = (attend().float() - exact).abs().max().item()
            seconds = seconds_of(attend, device.type)
            rate = needed / seconds / 1e9
            print(f"{name}: {1e3 * seconds:.3f} ms a layer, {rate:,.0f} GB/s, off by {wrong:.1e}", flush=True)

        if attend_live is not None:
            report("the engine's kernel", lambda: attend_live(query, keys, values, positions))
        else:
            print("the engine's kernel: not here, the warning says why")
        report("PyTorch's choice", lambda: cache.attend(0, query, mask))
        for backend in BACKENDS:
            try:
                with sdpa_kernel(backend):
                    report(backend.name, lambda: cache.attend(0, query, mask))
            except RuntimeError as error:
                print(f"{backend.name}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
