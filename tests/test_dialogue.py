"""Turns and requests that nothing can answer are refused where they are made, in one plain line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharegpt4v.dialogue import Request, SamplingParams, Turn
from sharegpt4v.engine.fake import FakeEngine, FakeOptions
from sharegpt4v.engine.handle import EngineError, one_line
from sharegpt4v.errors import UserError

PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": None}, "a turn's text is None: give a text, an empty one for images alone"),
        ({"text": 7}, "a turn's text is 7: give a text"),
        ({"images": (Path("photo.jpg"),)}, "a turn's image is 'photo.jpg': give its pixels, an array"),
        ({"images": (PIXELS, b"\x89PNG")}, "give its pixels"),
    ],
)
def test_a_turn_without_text_or_pixels_is_refused(values: dict[str, Any], expected: str) -> None:
    """A text of None was answered as the word None."""
    with pytest.raises(UserError) as error:
        Turn(**{"role": "user", "text": "?"} | values)
    assert expected in str(error.value)
    assert "Error" not in str(error.value) and "object at" not in str(error.value)


def test_numbers_of_numpy_are_numbers() -> None:
    numbers: dict[str, Any] = {
        "max_new_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "top_k": np.uint8(2),
    }
    assert SamplingParams(**numbers).max_new_tokens == 3


def test_errors_of_ours_are_given_without_the_name_of_their_type() -> None:
    assert one_line(UserError("too long\n by 3 tokens", field="text")) == "text: too long by 3 tokens"
    assert one_line(EngineError("not finished")) == "not finished"
    assert one_line(KeyError("x")) == "KeyError: 'x'"  # an error of the code, which somebody must find


def test_a_turn_with_an_image_and_an_empty_text_is_answered() -> None:
    engine = FakeEngine(FakeOptions())
    assert engine.submit(Request("a", (Turn("user", "", (PIXELS,)),))).result(5).text
    engine.close()
