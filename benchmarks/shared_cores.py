"""The engine's rate with two threads and with one, on a machine that others keep busy.

    python -m benchmarks.shared_cores

The processes that keep cores busy start after OpenMP was loaded, so that how its threads wait was chosen on a
quiet machine.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import torch

from benchmarks.engine import large_model, make_requests, ours, toy_model
from benchmarks.machine import describe_machine


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("toy", "100m"), default="toy")
    parser.add_argument("--requests", type=int, default=512, help="of 20 to 200 tokens each")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of busy processes")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    print(describe_machine())
    torch.set_num_threads(1)
    model = large_model() if options.model == "100m" else toy_model()
    requests = make_requests(options.requests, 32)
    for busy in options.busy:
        rates: dict[int, list[float]] = {threads: [] for threads in options.threads}
        with busy_processes(busy):
            for _ in range(options.rounds):
                for threads, measured in rates.items():
                    measured.append(ours(model, requests, options.slots, threads)[0])
        said = (
            f"{threads} threads {median(measured):,.0f} tokens/s ({', '.join(f'{x:,.0f}' for x in measured)})"
            for threads, measured in rates.items()
        )
        print(f"{options.model}, {busy} busy processes: {'; '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
