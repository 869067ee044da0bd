"""Damaged image files: each is a picture or a named reject, in `check` as in `caption`, silently and soon."""

import time
import warnings

import pytest

from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import Rejected
from sharegpt4v.images import inspect, prepare
from tests.images.mutations import corpus, mutated

REASONS = frozenset(
    "bad_aspect bomb corrupt empty not_an_image out_of_memory too_large truncated unsupported_format".split()
)
PROTOCOLS: tuple[ImageProtocol, ...] = ("pad", "crop", "squash")
SLOWEST = 30.0  # seconds: a file that takes longer is a bomb, however busy the machine


def _outcome(seed: int, data: bytes) -> str:
    """Returns "" for a picture, else the reason of the reject; both commands must agree on which."""
    try:
        prepared = prepare(data, 48, PROTOCOLS[seed % 3], fast=seed % 2 == 0)
    except Rejected as rejected:
        found = rejected.reason
    else:
        assert prepared.pixels.shape == (48, 48, 3) and min(prepared.width, prepared.height) > 0
        found = ""
    try:
        inspect(data)
    except Rejected as rejected:
        assert found, f"caption takes what check calls {rejected.reason}"
    else:
        assert not found, f"check takes what caption calls {found}"
    return found


def _survive(seeds: range) -> set[str]:
    """Returns the reasons met. A seed is the name of its file: mutated(seed)."""
    found = set()
    for seed in seeds:
        name, data = mutated(seed)
        begun = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found.add(_outcome(seed, data))
        except Exception as error:
            raise AssertionError(f"mutated({seed}), from {name}: {error!r}") from error
        assert time.monotonic() - begun < SLOWEST, f"mutated({seed}), from {name}"
    return found - {""}


def test_the_files_that_are_damaged_are_good_ones() -> None:
    for name, data in corpus():
        assert inspect(data) > (0, 0), name


def test_some_hundred_damaged_files_are_pictures_or_named_rejects() -> None:
    found = _survive(range(800))
    assert {"corrupt", "truncated", "not_an_image", "too_large"} <= found <= REASONS


@pytest.mark.fuzz
@pytest.mark.parametrize("block", range(20))
def test_a_hundred_thousand_damaged_files_are_pictures_or_named_rejects(block: int) -> None:
    assert _survive(range(block * 5000, (block + 1) * 5000)) <= REASONS
