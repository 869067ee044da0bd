"""Errors as storages raise them: those of credentials, buckets and services are never a row's own fault."""

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError, storage
from sharegpt4v.images.faults import describe, judge


class ClientError(Exception):
    """As botocore's: the service's answer in a dictionary."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation: denied")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpResponseError(Exception):
    """As azure.core's."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"denied\nErrorCode:{code}\nrequestid:1")
        self.status_code, self.error_code = status, code


class RepositoryNotFoundError(Exception):
    """As huggingface_hub's: the status is in its response alone."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error.\n\nRepository Not Found")
        self.response = type("Response", (), {"status_code": status})()


class HttpError(Exception):
    """As gcsfs's."""

    def __init__(self, status: int) -> None:
        super().__init__(f"Invalid Credentials, {status}")
        self.code = status


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


OF_THE_STORE: dict[str, Exception] = {
    "expired token": _from(PermissionError("denied"), ClientError(400, "ExpiredToken")),
    "invalid key": _from(PermissionError("denied"), ClientError(403, "InvalidAccessKeyId")),
    "wrong signature": _from(PermissionError("denied"), ClientError(403, "SignatureDoesNotMatch")),
    "clock skew": _from(PermissionError("denied"), ClientError(403, "RequestTimeTooSkewed")),
    "no access": _from(PermissionError("denied"), ClientError(403, "AccessDenied")),
    "invalid token": _from(OSError(22, "denied"), ClientError(400, "InvalidToken")),
    "token to refresh": _from(OSError(22, "denied"), ClientError(400, "TokenRefreshRequired")),
    "other region": _from(OSError(22, "denied"), ClientError(400, "AuthorizationHeaderMalformed")),
    "no such bucket": _from(FileNotFoundError("denied"), ClientError(404, "NoSuchBucket")),
    "slow down": _from(OSError(16, "denied"), ClientError(503, "SlowDown")),
    "no credentials": type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"),
    "Azure, signature": HttpResponseError(403, "AuthenticationFailed"),
    "Azure, token": HttpResponseError(400, "InvalidAuthenticationInfo"),
    "Azure, container": _from(FileNotFoundError(2, "gone"), HttpResponseError(404, "ContainerNotFound")),
    "Google, 401": HttpError(401),
    "Google, 403": OSError("Forbidden: https://storage.googleapis.com/download"),
    "Google, grant": ValueError("Bad Request: https://storage.googleapis.com/download"),
    "Hugging Face": _from(FileNotFoundError("repository not found"), RepositoryNotFoundError(401)),
    "permission": PermissionError(13, "Permission denied"),
    "timeout": TimeoutError(),
}

OF_THE_ROW: dict[str, tuple[Exception, str]] = {
    "no such key": (_from(FileNotFoundError("gone"), ClientError(404, "NoSuchKey")), "missing"),
    "key too long": (_from(OSError(36, "long"), ClientError(400, "KeyTooLongError")), "missing"),
    "archived": (_from(PermissionError("no"), ClientError(403, "InvalidObjectState")), "unreadable"),
    "deleted": (_from(OSError(5, "no"), ClientError(405, "MethodNotAllowed")), "unreadable"),
    "Azure, blob": (_from(FileNotFoundError(2, "gone"), HttpResponseError(404, "BlobNotFound")), "missing"),
    "Azure, archived": (HttpResponseError(409, "BlobArchived"), "unreadable"),
    "folder": (IsADirectoryError(21, "Is a directory"), "unreadable"),
    "missing": (FileNotFoundError("https://storage.googleapis.com/download"), "missing"),
}


@pytest.mark.parametrize("name", OF_THE_STORE)
def test_a_fault_of_the_store_rejects_no_row(name: str) -> None:
    assert judge("a.jpg", OF_THE_STORE[name], remote=True) is None


@pytest.mark.parametrize("name", OF_THE_ROW)
def test_a_fault_of_the_row_rejects_it(name: str) -> None:
    error, reason = OF_THE_ROW[name]
    rejected = judge("a.jpg", error, remote=True)
    assert rejected and rejected.reason == reason


def test_a_local_file_that_may_not_be_read_is_the_rows_matter() -> None:
    rejected = judge("a.jpg", PermissionError(13, "Permission denied"), remote=False)
    assert rejected and rejected.reason == "unreadable"


def test_the_cause_is_one_line_with_the_code_of_the_service() -> None:
    assert describe(OF_THE_STORE["expired token"]) == "PermissionError: denied (ExpiredToken)"
    assert describe(OF_THE_STORE["timeout"]) == "TimeoutError"
    assert "\n" not in describe(OF_THE_STORE["Azure, signature"])


class _Bucket(MemoryFileSystem):  # type: ignore[misc]
    """A store that answers with `failure` while there is one."""

    protocol = "oss"
    failure: ClassVar[Callable[[str], Exception] | None] = None
    tries: ClassVar[list[str]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.tries.append(path)
        if _Bucket.failure is not None:
            raise _Bucket.failure(path)
        return b"picture"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Bucket]]:
    monkeypatch.setattr(storage, "_DELAYS", (0.0, 0.0))
    monkeypatch.setitem(_registry, "oss", _Bucket)
    _Bucket.failure, _Bucket.tries = None, []
    yield _Bucket
    _Bucket.failure = None


def test_a_failing_store_is_tried_again_and_then_once_a_row_until_it_answers(bucket: type[_Bucket]) -> None:
    reader = ImageReader("oss://bucket")
    bucket.failure = lambda path: _from(PermissionError("denied"), ClientError(400, "ExpiredToken"))
    with pytest.raises(StorageError, match=r"3 tries failed, the last with PermissionError.*ExpiredToken"):
        reader.read("a.jpg")
    with pytest.raises(StorageError, match="1 try failed"):
        reader.read("b.jpg")
    assert len(bucket.tries) == 4
    bucket.failure = None
    assert reader.read("b.jpg") == b"picture"
    bucket.failure = lambda path: TimeoutError()
    with pytest.raises(StorageError, match="3 tries failed"):
        reader.read("c.jpg")


def test_stores_fail_apart(bucket: type[_Bucket]) -> None:
    reader = ImageReader(None)
    bucket.failure = lambda path: TimeoutError()
    for name in ("oss://one/a.jpg", "oss://other/a.jpg"):
        with pytest.raises(StorageError, match="3 tries failed"):
            reader.read(name)


def test_a_root_that_is_gone_rejects_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DELAYS", ())
    reader = ImageReader(str(tmp_path / "mounted"))
    with pytest.raises(StorageError, match="mounted does not exist"):
        reader.read("a.jpg")
    (tmp_path / "mounted").mkdir()
    with pytest.raises(Rejected, match="missing"):
        reader.read("a.jpg")


@pytest.mark.parametrize(
    "url",
    [
        "http://[1:2/a.jpg",
        "http:///a.jpg",
        "http://a..b/x.jpg",
        "http://h:99999/a",
        f"http://{'a' * 70}.com/x",
    ],
)
def test_what_is_no_url_is_the_rows_matter(url: str) -> None:
    with pytest.raises(Rejected, match="is no valid URL"):
        ImageReader(None).read(url)


class _Service(BaseHTTPRequestHandler):
    """Answers everything with the status and the code of AWS or Azure that the path ends with."""

    def do_GET(self) -> None:
        status, code = self.path.partition("?")[0].rsplit("/", 1)[-1].removesuffix(".jpg").split("-")
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self.send_response(int(status))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-ms-error-code", code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Service)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        *(
            (f"{status}-{code}", "")
            for status, code in ((400, "ExpiredToken"), (403, "RequestTimeTooSkewed"))
        ),
        *((f"{status}-{code}", "") for status, code in ((403, "AccessDenied"), (404, "NoSuchBucket"))),
        ("404-NoSuchKey", "missing"),
        ("403-InvalidObjectState", "unreadable"),
    ],
)
def test_what_s3fs_raises(service: str, monkeypatch: pytest.MonkeyPatch, answer: str, reason: str) -> None:
    pytest.importorskip("s3fs", reason="s3fs is not installed; its errors are imitated above")
    monkeypatch.setattr(storage, "_DELAYS", ())
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("ENDPOINT_URL", service)):
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(Rejected if reason else StorageError, match=reason or answer.split("-")[1]):
        ImageReader("s3://bucket").read(f"{answer}.jpg")
