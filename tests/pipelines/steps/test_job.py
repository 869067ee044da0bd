"""What a configuration comes to before anything starts."""

from pathlib import Path

from pipelines.steps.job import CaptionJob, make_job
from sharegpt4v.config.caption import CaptionConfig, Decoding


def _job(folder: Path, decoding: Decoding) -> CaptionJob:
    return make_job(CaptionConfig(images="photos", out=folder, decoding=decoding))


def test_the_first_try_and_the_retry_are_bounded_alike(tmp_path: Path) -> None:
    rules = _job(tmp_path, Decoding(min_new_tokens=20, max_new_tokens=30)).rules
    for sampling in (rules.sampling, rules.retry):
        assert (sampling.min_new_tokens, sampling.max_new_tokens) == (20, 30)
