"""API keys: a file of names and hashes. `python -m serve.keys NAME` makes a key and prints its line.

A line is `NAME sha256:HEX`; empty lines and those that begin with # are left out. Keys have 256 random bits,
so that a plain hash is as good as a slow one.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from sharegpt4v.errors import UserError

_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+sha256:(?P<hash>[0-9a-f]{64})")


def read_keys(path: Path) -> dict[str, str]:
    """Reads a key file: names by hash. Raises UserError for a missing or empty file, or a wrong line.

    The message has the line's number and never its text, which may be a key by mistake. A key under two names
    is wrong: its limits and log lines would be those of one of them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # editors on Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"cannot read {path}: {why}", field="api_keys") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise UserError(
                f"line {number} of {path} is no key: expected NAME sha256:HEX, "
                "as `python -m serve.keys NAME` prints it",
                field="api_keys",
            )
        if keys.setdefault(found["hash"], found["name"]) != found["name"]:
            raise UserError(
                f"line {number} of {path} has the key of {keys[found['hash']]} under another name",
                field="api_keys",
            )
    if not keys:
        raise UserError(
            f"{path} holds no key: `python -m serve.keys NAME >> {path}` adds one", field="api_keys"
        )
    return keys


def name_of(authorization: str, keys: Mapping[str, str]) -> str | None:
    """Returns the name of the key in an Authorization header, None for none or a wrong one."""
    scheme, _, key = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return None
    given = digest(key.strip())
    # All are compared, each in constant time: the time says nothing of how much of a hash was right.
    names = [name for known, name in keys.items() if hmac.compare_digest(known, given)]
    return names[0] if names else None


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address; a name but localhost may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(arguments: list[str]) -> int:
    """Prints the line of a new key to stdout and the key itself, once, to stderr."""
    if len(arguments) != 1 or not re.fullmatch(r"[\w.@-]{1,64}", arguments[0]):
        print("usage: python -m serve.keys NAME >> keys.txt", file=sys.stderr)
        return 2
    key = f"sk-{secrets.token_urlsafe(32)}"
    print(f"{arguments[0]} sha256:{digest(key)}")
    print(f"the key of {arguments[0]}, shown this once: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
