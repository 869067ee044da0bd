"""Credentials in URIs are used and never written down: not in settings, reports, messages or plans."""

import base64
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sharegpt4v.errors import Rejected
from tests.commands import rows, write_images
from tests.e2e.requests import commit, jsonl, request

SECRET = "hush4711"


class _Guarded(SimpleHTTPRequestHandler):
    """Answers those alone who bring the password."""

    def _may(self) -> bool:
        expected = base64.b64encode(f"user:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {expected}":
            return True
        self.send_error(401)
        return False

    def do_GET(self) -> None:
        if self._may():
            super().do_GET()

    def do_HEAD(self) -> None:
        if self._may():
            super().do_HEAD()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, no_ray: None) -> Iterator[str]:
    """A URI with a password, below which are three images and a list that names a fourth."""
    folder = tmp_path / "served"
    write_images(folder, ["a.jpg", "b.jpg", "c.jpg"])
    jsonl(folder / "list.jsonl", *({"id": name, "image": f"{name}.jpg"} for name in "abcd"))
    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Guarded, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://user:{SECRET}@127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


def _holders(run: Path) -> list[str]:
    files = [path for path in run.rglob("*") if path.is_file()]
    return [path.name for path in files if SECRET.encode() in path.read_bytes()]


def test_a_run_below_a_uri_with_a_password(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = tmp_path / "run", f"{server}/list.jsonl"
    assert request(images, run) == 130
    assert request(images, run, "--dry-run") == 0
    commit(run, "a", "b", "c")
    assert request(images, run) == 130
    assert _holders(run) == []
    commit(run, "d", rejected=True)
    assert request(images, run, "--max-reject-rate", "1") == 0
    assert len(rows(run, "captions")) == 3
    assert _holders(run) == []
    assert "data:image" in (run / "report.html").read_text()  # its pictures came with the password
    assert request(f"{server}/nothing.jsonl", run) == 2
    printed = capsys.readouterr()
    assert "http://***@127.0.0.1" in printed.err + printed.out
    assert SECRET not in printed.err + printed.out


def test_what_is_said_of_a_row_hides_its_credentials() -> None:
    reject = Rejected("missing", f"'https://host/a.jpg?sig={SECRET}' does not exist")
    assert reject.message == "'https://host/a.jpg?sig=***' does not exist"
    assert SECRET not in str(reject)
