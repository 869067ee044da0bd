"""What a configuration comes to before anything starts."""

from pathlib import Path

from pipelines.steps.job import Plan, make_plan
from sharegpt4v.config.caption import CaptionConfig, Decoding


def _plan(folder: Path, decoding: Decoding) -> Plan:
    return make_plan(CaptionConfig(images="photos", out=folder, decoding=decoding))


def test_the_first_try_and_the_retry_are_bounded_alike(tmp_path: Path) -> None:
    rules = _plan(tmp_path, Decoding(min_new_tokens=20, max_new_tokens=30)).rules
    for sampling in (rules.sampling, rules.retry):
        assert (sampling.min_new_tokens, sampling.max_new_tokens) == (20, 30)


def test_a_run_from_before_there_was_a_minimum_can_be_finished(tmp_path: Path) -> None:
    assert "decoding.min_new_tokens" not in _plan(tmp_path, Decoding()).fingerprint
    assert _plan(tmp_path, Decoding(min_new_tokens=1)).fingerprint["decoding.min_new_tokens"] == 1


def test_the_toy_is_sent_by_its_name_because_each_node_has_it_elsewhere(tmp_path: Path) -> None:
    assert _plan(tmp_path, Decoding()).spec.weights == "toy"
