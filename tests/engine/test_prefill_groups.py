"""Requests that begin together: in groups that bound memory and waste little on padding."""

from sharegpt4v.engine.prefill_groups import PREFILL_TOKENS, embed_groups, prefill_groups


def test_images_go_through_the_vision_tower_in_passes_of_bounded_size() -> None:
    images = {slot: 1 for slot in range(40)}
    assert [len(group) for group in embed_groups(images)] == [32, 8]
    assert list(embed_groups({3: 20, 1: 12, 2: 1})) == [[3, 1], [2]]
    assert list(embed_groups({})) == []


def test_a_request_with_more_images_than_a_pass_goes_alone() -> None:
    assert list(embed_groups({0: 1, 1: 50, 2: 1})) == [[0], [1], [2]]


def test_prompts_of_like_length_are_prefilled_together() -> None:
    assert list(prefill_groups({0: 100, 1: 20, 2: 125, 3: 25, 4: 126})) == [[1, 3], [0, 2], [4]]


def test_a_prefill_takes_a_bounded_number_of_tokens() -> None:
    length = PREFILL_TOKENS // 3
    assert [len(group) for group in prefill_groups({slot: length for slot in range(7)})] == [3, 3, 1]
    assert list(prefill_groups({0: 2 * PREFILL_TOKENS})) == [[0]]
