"""The matrices of the 100 M model by cpu_linear.py and by oneDNN, for different numbers of rows.

    python -m benchmarks.cpu_matrices

All weights are read from memory each time, as in a decode step.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from sharegpt4v.engine.cpu_linear import Panels, load_linear
from sharegpt4v.engine.linear import one_dnn

LAYER = ((2_304, 768), (768, 768), (4_096, 768), (768, 2_048))
"""Outputs and inputs of the joined projections of a layer."""

Matrix = tuple[int, Callable[[Tensor], Tensor]]
"""Its inputs, and the product with it."""


def milliseconds(matrices: Sequence[Matrix], inputs: dict[int, Tensor]) -> float:
    start = time.perf_counter()
    for width, product in matrices:
        product(inputs[width])
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 128, 512])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    print(describe_machine())
    torch.set_num_threads(options.threads)
    shapes = [*LAYER * options.layers, (8_000, 768)]
    sides: dict[str, list[Matrix]] = {
        "oneDNN": [(shape[1], one_dnn(torch.randn(shape), None)) for shape in shapes]
    }
    if (function := load_linear()) is not None:
        sides["ours"] = [(shape[1], Panels(function, torch.randn(shape), None)) for shape in shapes]
    weights = sum(outputs * width for outputs, width in shapes)
    for rows in options.rows:
        inputs = {width: torch.randn(rows, width) for width in (768, 2_048)}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds):  # in turn, since others use this machine
            for name, matrices in sides.items():
                times[name].append(milliseconds(matrices, inputs))
        said = (
            f"{name} {median(each):.1f} ms ({2 * rows * weights / median(each) / 1e6:.0f} GFLOP/s)"
            for name, each in times.items()
        )
        print(f"{rows} rows: {', '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
