"""Whether a cluster answers and takes our token; Ray alone tries for half a minute and says neither."""

import os
import re
import socket
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader, GcsClient
from ray.exceptions import AuthenticationError

from sharegpt4v.errors import UserError

_CONNECT_SECONDS = 5.0


def require_access(address: str) -> None:
    """Raises UserError when nothing listens at `address`, HOST:PORT, or the cluster there refuses our token.

    Other forms of an address (`auto`, `ray://...`) are left to Ray.
    """
    parts = re.fullmatch(r"\[?([^\[\]/]+)\]?:(\d{1,5})", address)
    if parts is None:
        return
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot reach Ray at {address}: {error}: give the address that `ray start --head` prints"
        ) from None
    try:
        if _token_mode() and not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            raise refused_token(address)  # Ray's client would end the whole process
        GcsClient(address=address)
    except AuthenticationError:
        raise refused_token(address) from None


def refused_token(address: str) -> UserError:
    """Returns the error that says what to do about the token, which depends on what this machine has."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        there, place, remedy = (
            True,
            "RAY_AUTH_TOKEN",
            "set it to what `ray get-auth-token` prints on its head",
        )
    else:
        file = token_file()
        there, place, remedy = file.exists(), str(file), f"copy ~/.ray/auth_token of its head to {file}"
    mode = "" if _token_mode() else "`export RAY_AUTH_MODE=token`"
    if not there:
        return UserError(f"Ray at {address} asks for a token: {' and '.join(filter(None, (remedy, mode)))}")
    if mode:
        return UserError(f"Ray at {address} asks for a token: {mode}, and Ray sends the one in {place}")
    return UserError(f"Ray at {address} refuses the token in {place}: {remedy}")


def token_file() -> Path:
    """Returns the path where Ray looks for the token, whether there is one or not."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _token_mode() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
