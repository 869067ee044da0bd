"""Dialogues for models that take images of any shape."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image as PillowImage

from sharegpt4v.dialogue import Image, Request, SamplingParams, Turn

GREEDY = SamplingParams(max_new_tokens=24)


def picture(seed: int, height: int = 48, width: int = 48) -> Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(PillowImage.fromarray(noise).resize((width, height), PillowImage.Resampling.BICUBIC))


SHAPES = [(48, 48), (60, 120), (112, 57), (30, 31), (3, 40), (90, 90)]


def colour(seed: int, height: int = 48, width: int = 48) -> Image:
    """One colour all over: whatever resizes it, its pixels are the same."""
    return np.full((height, width, 3), np.random.default_rng(seed).integers(0, 256, 3), np.uint8)


def mixed(
    count: int, sampling: SamplingParams = GREEDY, draw: Callable[[int, int, int], Image] = picture
) -> list[Request]:
    """Requests with images of many shapes, some with two, some with none, some of several rounds."""
    requests = []
    for number in range(count):
        images = tuple(draw(number + k, *SHAPES[(number + k) % len(SHAPES)]) for k in range(1 + number % 2))
        turns: tuple[Turn, ...] = (Turn("user", f"Describe {'the image ' * (number % 4)}in detail.", images),)
        if number % 5 == 3:
            turns = (Turn("user", "A red square?"), Turn("assistant", "A green tree."), *turns)
        if number % 5 == 4:
            turns = (Turn("user", "A red square stands beside a green tree."),)
        length = sampling.max_new_tokens - number % 3
        requests.append(Request(f"r{number}", turns, replace(sampling, max_new_tokens=length)))
    return requests
