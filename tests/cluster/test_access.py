"""A cluster that cannot be reached is answered in one line, before Ray tries for half a minute."""

import socket
from pathlib import Path

import pytest

from cluster.access import refused_token, require_access
from sharegpt4v.errors import UserError


@pytest.fixture(autouse=True)
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the token would be; none is there, and no mode is set."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot reach Ray at {address}: .*refused: give the address"):
            require_access(address)


def test_addresses_of_other_forms_are_left_to_ray() -> None:
    require_access("auto")
    require_access("ray://head:10001")


def test_without_a_token_the_remedy_is_the_heads_file_and_the_mode(token: Path) -> None:
    assert str(refused_token("head:6379")) == (
        f"Ray at head:6379 asks for a token: copy ~/.ray/auth_token of its head to {token} and "
        "`export RAY_AUTH_MODE=token`"
    )


def test_with_a_token_but_no_mode_the_remedy_is_the_mode(token: Path) -> None:
    token.write_text("ab" * 32)
    said = str(refused_token("head:6379"))
    assert "asks for a token: `export RAY_AUTH_MODE=token`" in said and "copy" not in said


def test_a_wrong_token_is_named_by_its_place(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.write_text("ab" * 32)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert f"refuses the token in {token}: copy" in str(refused_token("head:6379"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "cd" * 32)
    assert "refuses the token in RAY_AUTH_TOKEN: set it" in str(refused_token("head:6379"))
