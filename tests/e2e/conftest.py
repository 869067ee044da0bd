import pytest

from pipelines.steps import caption_job


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not start: a request that gets so far was not refused, and ends in 130."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(caption_job, "ray_session", interrupted)
