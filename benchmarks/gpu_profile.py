"""Divides the time of embedding, prefill, one decode step and the whole run on a GPU by cause; gpu_caption.py
prints it.
"""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

CAUSES = {
    "attention": ("_attend", "flash", "fmha", "attention", "softmax"),
    "matrices": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "gemv"),
    "copies": ("memcpy", "memset"),
}
"""Parts of kernel names, in order; what has none of them is a small kernel."""


def cause_of(kernel: str) -> str:
    lowered = kernel.lower()
    return next((cause for cause, parts in CAUSES.items() if any(p in lowered for p in parts)), "small")


def report(name: str, work: Callable[[], object], runs: int, per: str, count: int) -> None:
    """Prints milliseconds of `work` by cause, for one of `count` things it does at once (`per`)."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(runs):
        work()
    torch.cuda.synchronize()
    whole = 1e3 * (time.perf_counter() - start) / runs
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(runs):
            work()
        torch.cuda.synchronize()
    _print(name, profiled, whole, runs, per, count)


def report_run(work: Callable[[], int], per: str) -> None:
    """Prints milliseconds of what the GPU did in all threads while `work` ran; it returns how many things."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = time.perf_counter()
        count = work()
        whole = 1e3 * (time.perf_counter() - start)
    _print("whole run", profiled, whole, 1, per, max(1, count))


def _print(name: str, profiled: profile, whole: float, runs: int, per: str, count: int) -> None:
    times = dict.fromkeys(("attention", "matrices", "small", "copies"), 0.0)
    largest: list[tuple[float, int, str]] = []
    for event in profiled.key_averages():
        spent = event.self_device_time_total / 1e3 / runs
        if not spent:
            continue
        times[cause_of(event.key)] += spent
        largest.append((spent, event.count // runs, event.key))
    parts = ", ".join(f"{cause} {spent:.2f}" for cause, spent in times.items())
    idle = whole - sum(times.values())
    print(
        f"  {name}: {whole:.2f} ms ({whole / count:.2f} ms a {per}): {parts}, gaps {idle:.2f}; "
        f"{sum(number for _, number, _ in largest)} kernels"
    )
    for spent, number, kernel in sorted(largest, reverse=True)[:8]:
        print(f"    {spent:8.3f} ms {number:5d}x {kernel[:110]}")
    print(end="", flush=True)
