"""Benchmarks run from start to end at toy size: no rented hour is the first test of those for a GPU."""

import re
import subprocess
import sys

import pytest

from benchmarks.engine import VLLM_PYTHON
from tests.commands import REPOSITORY, environment

pytestmark = pytest.mark.slow


def printed(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_captioning_is_measured_for_every_model() -> None:
    said = printed("benchmarks/gpu_caption.py", "--toy", "--seconds", "2", "--slots", "4")
    rates = dict(re.findall(r"^(\w+): ([\d.]+) images/s, ", said, re.MULTILINE))
    assert rates.keys() == {"lmm", "resampler", "qformer"}
    assert all(float(rate) > 0 for rate in rates.values())
    assert re.search(r"^\d+ s with loading and warming up; not measured: ", said, re.MULTILINE)
    assert len(re.findall(r"ms a step, \d+% of measured bandwidth", said)) == 3
    assert "the paper's" not in said  # toy models are no match for it, in either direction


def test_each_kernel_of_attention_is_measured_or_says_why_not() -> None:
    said = printed("benchmarks/gpu_attention.py", "--toy", "--slots", "4", "--live", "64")
    assert re.search(r"^the engine's kernel: \w+", said, re.MULTILINE)
    assert re.search(
        r"^PyTorch's choice: [\d.]+ ms a layer, [\d,]+ GB/s, off by \d\.\de-\d+$", said, re.MULTILINE
    )
    assert re.search(r"^MATH: [\d.]+ ms a layer", said, re.MULTILINE)
    assert re.search(r"^CUDNN_ATTENTION: \w+", said, re.MULTILINE)


def test_training_on_a_gpu_is_measured_at_toy_size() -> None:
    said = printed("benchmarks/gpu_train.py", "--toy", "--batch", "4", "--steps", "1")
    assert re.findall(r"^(\w+): [\d,]+ tokens/s", said, re.MULTILINE) == ["pretrain", "sft"]
    assert len(re.findall(r"by cause: \w+ \d+%", said)) == 2
    assert "not measured: " in said


def test_the_engine_is_measured_with_a_model_and_without() -> None:
    flags = ("--models", "none,toy", "--lines", "decode,bfloat16,alone", "--requests", "6", "--sizes", "4")
    said = printed("-m", "benchmarks.engine", *flags)
    assert re.search(r"^scheduler alone: [\d,]+ tokens/s over 64 slots", said, re.MULTILINE)
    assert re.search(r"^toy, decode, 6 requests: engine [\d,]+ tokens/s \(4 slots", said, re.MULTILINE)
    for side in ("in order, batches of 4", "sorted, batches of 4", "continuous"):
        assert re.search(rf"^    generate {side}: [\d,]+ tokens/s, ratio [\d.]+", said, re.MULTILINE)
    assert "of the best of generate sorted, target 1.1" in said
    for side in ("eager", "compiled") if VLLM_PYTHON.exists() else ():
        assert re.search(
            rf"^    vllm {side}, batches of 4: [\d,]+ tokens/s, ratio [\d.]+", said, re.MULTILINE
        )
    halves = (
        r"^toy, bfloat16: float32 [\d,]+ tokens/s \(4 slots\), bfloat16 [\d,]+ tokens/s \(4 slots\), ratio"
    )
    assert re.search(halves, said, re.MULTILINE)
    assert re.search(r"^toy, one by one: [\d.,]+ tokens/s over 6 requests", said, re.MULTILINE)


def test_checks_of_a_gpu_run_on_a_cpu() -> None:
    said = printed("benchmarks/gpu_first_light.py", "--toy")
    assert said.count("relative error of logits") == 2
    assert re.search(r"^storm: 40 requests in .* 0 failed", said, re.MULTILINE)


def test_shared_cores_and_matrices_are_measured() -> None:
    flags = ("--requests", "6", "--slots", "4", "--busy", "0", "1", "--rounds", "1")
    said = printed("-m", "benchmarks.shared_cores", *flags)
    assert re.findall(r"^toy, (\d) busy processes: 2 threads [\d,]+ tokens/s", said, re.MULTILINE) == [
        "0",
        "1",
    ]
    said = printed("-m", "benchmarks.cpu_matrices", "--rows", "1", "20", "--layers", "1", "--rounds", "1")
    assert len(re.findall(r"^\d+ rows: oneDNN [\d.]+ ms \(\d+ GFLOP/s\)", said, re.MULTILINE)) == 2
