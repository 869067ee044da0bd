"""Errors between processes, where pickle rebuilds them from what they name."""

import pickle

import pytest

from sharegpt4v.errors import Rejected, UserError


@pytest.mark.parametrize("field", ["limit", None])
def test_a_user_error_keeps_its_field_even_with_a_note_of_rays(field: str | None) -> None:
    error = UserError("0 is too few", field=field)
    error.args = (*error.args, "Failed to apply UDF")  # as Ray Data does
    arrived = pickle.loads(pickle.dumps(error))
    assert (arrived.text, arrived.field) == ("0 is too few", field)
    assert str(arrived) == ("limit: 0 is too few" if field else "0 is too few")


def test_a_reject_keeps_reason_and_message() -> None:
    arrived = pickle.loads(pickle.dumps(Rejected("truncated", "ends early")))
    assert (arrived.reason, arrived.message) == ("truncated", "ends early")
