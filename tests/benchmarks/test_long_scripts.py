"""Benchmarks that take minutes even at toy size."""

import re

import pytest

from tests.benchmarks.test_scripts import printed

pytestmark = pytest.mark.long


def test_training_is_measured_against_padded_rows_and_a_trainer() -> None:
    said = printed("-m", "benchmarks.train", "--steps", "2", "--batch", "16", "--images", "64")
    rates = dict(re.findall(r"^(\w+): ([\d.]+) samples/s, packed is", said, re.MULTILINE))
    assert rates.keys() >= {"packed", "random", "grouped"}
    assert float(rates["packed"]) > float(rates["random"])
    assert re.search(r"^data side: \d+ samples/s on \d+ cores", said, re.MULTILINE)


def test_a_run_is_killed_in_the_middle_and_resumed() -> None:
    said = printed("-m", "benchmarks.resume_size", "--rows", "20000")
    assert "20,000 rows, 313 commits of 64 rows" in said
    assert re.search(r"^killed +[\d.]+ s +[\d.]+ s +\d+ MB$", said, re.MULTILINE)
    assert re.search(r"^resumed +[\d.]+ s +[\d.]+ s +\d+ MB$", said, re.MULTILINE)


def test_latencies_are_measured_with_and_without_kept_dialogues() -> None:
    said = printed("-m", "benchmarks.engine_latency", "--dialogues", "1", "--arrivals", "2", "--threads", "1")
    for kept in (4, 0):
        assert re.search(rf"^rounds, {kept} dialogues kept: .* ratio [\d.]+ ", said, re.MULTILINE)
    assert re.search(r"^a stream while 2 prompts with images arrive: .* ratio [\d.]+ ", said, re.MULTILINE)


def test_the_first_step_is_timed_without_a_compiler() -> None:
    said = printed("-m", "benchmarks.train_start", "--rounds", "1")
    for side in ("ZeRO-2, 1 worker", "ZeRO-3, 2 workers"):
        assert re.search(
            rf"^{side}: first step after [\d.]+ s \(rounds [\d.]+\), target \d+ s$", said, re.MULTILINE
        )


def test_serving_is_measured_with_a_model() -> None:
    flags = ("--step", "--overload", "0", "--models", "toy", "--threads", "1", "--rounds", "1")
    said = printed("-m", "benchmarks.serve", *flags)
    for side in ("one process", "Ray, answering itself", "bare engine"):
        found = re.search(rf"^{side} .* (\d+) tokens/s, (\d+) an answer", said, re.MULTILINE)
        assert found and int(found[1]) > 0 and 20 < int(found[2]) <= 128
