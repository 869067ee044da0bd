"""Credentials in URIs, taken out of everything that is written for people: settings, reports, messages."""

import re
from typing import Any

HIDDEN = "***"

_IN = r"[^\s/?#'\"<>"  # a class without its end: no blank, none of what ends host and user in a text
_USER = re.compile(
    rf"(?<=://)(?:{_IN}:]*:{_IN}]*@"  # user:password@, up to the last @ before the path
    rf"|{_IN}:@]*:(?!\d+/)[^\s@'\"<>]{{0,4096}}@"  # a password with slashes that should have been escaped
    rf"|(?<=https://){_IN}]+@)"  # token@
)
"""Of a URI what precedes its host: all of it where there is a password, and with https a lone token."""

_PARAMETER = re.compile(
    r"([?&](?=[^=&?\s#]*(?:sig|token|key|secret|passw|pwd|credential|auth))[^=&?\s#]*=)[^&\s#'\"<>]+",
    re.IGNORECASE,
)
"""Of presigned URIs: X-Amz-Signature and X-Amz-Credential, X-Goog-Signature, sig, access_token and others."""


def without_credentials(text: str) -> str:
    """Replaces user names, passwords, tokens and signatures in the URIs of a text by `***`.

    What names a place stays, abfs://container@account/ for example.
    """
    if "://" not in text:
        return text
    return _PARAMETER.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text))


def all_without_credentials(value: Any) -> Any:
    """Does the same to every text in nested dicts and lists, keys left as they are."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, dict):
        return {key: all_without_credentials(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [all_without_credentials(entry) for entry in value]
    return value
