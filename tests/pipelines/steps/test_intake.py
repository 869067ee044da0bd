"""What the caption job says of its input before it works."""

import pytest

from pipelines.steps.intake import say_unknown_reason
from sharegpt4v.captions.resume import RunProgress


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (None, ""),
        ("all", ""),
        ("missing", ""),
        ("misssing", "no reject has the reason 'misssing'; there are: missing (1,200), truncated (3)\n"),
    ],
)
def test_a_mistyped_reason_to_retry_is_answered_with_those_there_are(
    reason: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say_unknown_reason(reason, RunProgress(2_000, 797, 1_203, {"missing": 1_200, "truncated": 3}))
    assert capsys.readouterr().err == said
