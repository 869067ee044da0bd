"""Anonymous memory that `sharegpt4v convert` takes above its imports, on synthetic checkpoints.

    python benchmarks/convert_memory.py --gb 2

The bound: the largest tensor and one output shard. A process of its own converts while this one reads its
RssAnon from /proc every two milliseconds; mapped files are no anonymous memory and the kernel may drop them.
Kinds: ShareGPT4V from .bin shards and from safetensors, back to the released layout, and Share-Captioner
with LoRA to merge. Ends with code 1 when a bound is broken.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from tests.checkpoints import released

WIDTH, MLP, VOCABULARY = 2048, 5504, 32000
KINDS = ("ShareGPT4V .bin", "ShareGPT4V safetensors", "back to released", "Share-Captioner LoRA .bin")

CHILD = """
import sys
from pathlib import Path
from sharegpt4v.checkpoints.convert import convert, plan_conversion
source, out, tower, to, shard = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
convert(plan_conversion(Path(source), to, Path(tower) if tower else None), Path(out), int(shard))
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes, all of them. peak: anonymous memory above the imports. bound: what it may be."""

    kind: str
    size: int
    largest: int
    peak: int
    bound: int
    seconds: float


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(kind: str, folder: Path, size: int, shard: int) -> Measured:
    """Makes a checkpoint of about `size` bytes in `folder`, converts it in a process, and watches that."""
    source, tower, to = make(kind, folder, size, shard)
    tensors = [t.numel() * t.element_size() for t in stored(source)]
    command = [sys.executable, "-c", CHILD, str(source), str(folder / "out"), tower, to, str(shard)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous(child.pid)
        start = time.perf_counter()
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.002)
        seconds = time.perf_counter() - start
    assert child.returncode == 0
    return Measured(kind, sum(tensors), max(tensors), peak - before, max(tensors) + shard, seconds)


def make(kind: str, folder: Path, size: int, shard: int) -> tuple[Path, str, str]:
    """The source folder, its vision tower's or nothing, and the layout to go to."""
    captioner = kind.startswith("Share-Captioner")
    per_layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    released.WIDTH, released.MLP, released.HEADS = WIDTH, MLP, WIDTH // 128
    released.LAYERS = max(2, round((size - 4 * VOCABULARY * WIDTH) / per_layer))
    released.LORA_RANK = 256
    released.DRAWN = False
    if captioner:
        tensors = released.captioner_tensors("qformer", VOCABULARY, torch.float16)
        return released.save_captioner(folder / "model", tensors), "", "transformers"
    model = released.save_llava(folder / "model", released.llava_tensors(VOCABULARY, torch.float16))
    tower = released.save_tower(folder / "tower", released.tower_tensors())
    if kind.endswith("safetensors"):
        released.save_safetensors(model, released.llava_tensors(VOCABULARY, torch.float16))
    if kind != "back to released":
        return model, str(tower), "transformers"
    command = [sys.executable, "-c", CHILD, str(model), str(folder / "there"), str(tower), "transformers"]
    subprocess.run([*command, str(shard)], input="\n", text=True, check=True, stdout=subprocess.DEVNULL)
    return folder / "there", "", "released"


def stored(folder: Path) -> list[Tensor]:
    """Every tensor on the meta device."""
    from sharegpt4v.checkpoints.reader import Checkpoint

    tensors = Checkpoint(folder).tensors.values()
    return [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of each checkpoint in 10^9 bytes")
    parser.add_argument("--shard-gb", type=float, default=0.3, help="size of an output shard")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--json", action="store_true", help="one line of JSON a kind")
    arguments = parser.parse_args()
    results = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            size, shard = int(arguments.gb * 1e9), int(arguments.shard_gb * 1e9)
            results.append(measure(kind, Path(folder), size, shard))
    if arguments.json:
        for result in results:
            print(json.dumps({name: getattr(result, name) for name in Measured.__slots__}))
    else:
        print(describe_machine())
        print(f"{'MB':>27} {'checkpoint':>11} {'largest':>8} {'bound':>6} {'peak':>6} {'seconds':>8}")
        for r in results:
            sizes = (math.ceil(b / 1e6) for b in (r.size, r.largest, r.bound, r.peak))
            print("{:>27} {:>11} {:>8} {:>6} {:>6}".format(r.kind, *sizes), f"{r.seconds:>8.1f}")
    return int(any(result.peak > result.bound for result in results))


if __name__ == "__main__":
    sys.exit(main())
