import time

import pytest

from sharegpt4v.credentials import all_without_credentials, without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host/a.jpg", "https://***@host/a.jpg"),
        ("https://token@host/a.jpg", "https://***@host/a.jpg"),
        ("s3://KEY:SEC/RET@bucket/photos", "s3://***@bucket/photos"),
        ("s3://KEY:SEC/RET@bucket/a@2x.jpg", "s3://***@bucket/a@2x.jpg"),
        ("ftp://u:p@ss@host", "ftp://***@host"),
        ("'hdfs://u:p@host:9000/x' does not exist", "'hdfs://***@host:9000/x' does not exist"),
        (
            "https://b.s3.amazonaws.com/a.jpg?X-Amz-Credential=AK%2F1&X-Amz-Expires=60&X-Amz-Signature=ab12",
            "https://b.s3.amazonaws.com/a.jpg?X-Amz-Credential=***&X-Amz-Expires=60&X-Amz-Signature=***",
        ),
        (
            "https://x.blob.core.windows.net/c/a.jpg?sv=2024&sig=a%2Bb",
            "https://x.blob.core.windows.net/c/a.jpg?sv=2024&sig=***",
        ),
        (
            "two: http://a:b@h/1 and http://c:d@h/2?token=e#f",
            "two: http://***@h/1 and http://***@h/2?token=***#f",
        ),
    ],
)
def test_secrets_are_hidden(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert without_credentials(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/photos/a@2x.jpg",
        "abfs://container@account.dfs.core.windows.net/photos",
        "http://host:8080/a:b/c@d.jpg",
        "https://host/a.jpg?width=5",
        "/photos/a:b@c.jpg?token=not-a-uri",
        "write to: me@example.org",
    ],
)
def test_what_names_a_place_stays(text: str) -> None:
    assert without_credentials(text) == text


def test_nested_values() -> None:
    value = {"root": "s3://k:s@b", "n": 5, "list": ["https://t@h/", None]}
    assert all_without_credentials(value) == {"root": "s3://***@b", "n": 5, "list": ["https://***@h/", None]}


@pytest.mark.parametrize("part", ["?", "&token", "?sig", "://a:b", "https://"])
def test_a_long_text_takes_no_minutes(part: str) -> None:
    text = "https://host/" + part * (200_000 // len(part))
    begin = time.perf_counter()
    without_credentials(text)
    assert time.perf_counter() - begin < 5.0
