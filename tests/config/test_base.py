"""Configurations: layers, unknown keys, and one-line errors."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sharegpt4v.config.base import flat_fields, resolve
from sharegpt4v.config.caption import CaptionConfig, Decoding
from sharegpt4v.dialogue import SAMPLING_BOUNDS, SamplingParams
from sharegpt4v.errors import UserError

NEEDED: dict[str, Any] = {"images": "photos", "out": "run"}


def test_later_layers_win_and_nested_keys_merge() -> None:
    config = resolve(
        CaptionConfig,
        NEEDED,
        {"decoding": {"max_new_tokens": 7, "temperature": 0.5}},
        {"decoding": {"max_new_tokens": 9}},
    )
    assert (config.decoding.max_new_tokens, config.decoding.temperature) == (9, 0.5)


@pytest.mark.parametrize("preset", CaptionConfig.presets)
def test_every_preset_is_a_valid_configuration(preset: str) -> None:
    resolve(CaptionConfig, NEEDED, CaptionConfig.presets[preset].values)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"imges": "x"}, "unknown key imges; did you mean images?"),
        (
            {"decoding": {"max_tokens": 5}},
            "unknown key decoding.max_tokens; did you mean decoding.max_new_tokens?",
        ),
        ({"max_reject_rate": 1.5}, "max_reject_rate: 1.5 is refused: it should be less than or equal to 1"),
        (
            {"decoding": {"min_new_tokens": 9, "max_new_tokens": 8}},
            "decoding.min_new_tokens: 9 is refused: `max_new_tokens` is 8",
        ),
        ({"actors": "8:2"}, "the smaller number comes first: 2:8"),
        ({"actors": "many"}, "expected auto, a number such as 2, or MIN:MAX"),
        ({"engine": "tensorrt"}, "engine: 'tensorrt' is refused"),
        ({"limit": True}, "limit: true is refused"),
        ({"decoding": {"temperature": False}}, "decoding.temperature: false is refused"),
        ({"decoding": None}, "decoding: None is refused: it should be keys and values"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(CaptionConfig, NEEDED, layer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WHOLE = ("max_new_tokens", "min_new_tokens")


@pytest.mark.parametrize("name", sorted(SAMPLING_BOUNDS.keys() & Decoding.model_fields.keys()))
def test_decoding_takes_the_values_that_sampling_takes(name: str) -> None:
    others = {"max_new_tokens": 1000} if name == "min_new_tokens" else {}
    values = [-1, 0, 1, 2, 100, 101] if name in WHOLE else [float("nan"), -1, 0, 1e-9, 1, 1.001, 100, 101]
    for value in values:
        given = others | {name: value}
        assert _is_taken(Decoding, given) == _is_taken(SamplingParams, given), value


def _is_taken(kind: Callable[..., object], values: Mapping[str, float]) -> bool:
    try:
        kind(**values)
    except ValueError:
        return False
    return True


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(UserError, match="^images: required, and so is `out`$"):
        resolve(CaptionConfig, {})


def test_nested_fields_have_the_group_of_their_model() -> None:
    groups = {dotted: title for dotted, _, title in flat_fields(CaptionConfig)}
    assert groups["decoding.top_p"] == "Decoding" and groups["fake.faults"] == "Testing"
    assert "Other" not in groups.values()


def test_a_configuration_is_frozen() -> None:
    config = resolve(CaptionConfig, NEEDED)
    with pytest.raises(ValueError, match="frozen"):
        config.images = "other"  # type: ignore[misc]
