"""Reading bytes: what is below the root, what is not, and whose fault a failure is."""

import errno
import os
import pickle
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError, storage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.jpg").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DELAYS", (0.0, 0.0))


def _reason(reader: ImageReader, image: str, container: str = "", offset: int = 0, size: int = -1) -> str:
    with pytest.raises(Rejected) as caught:
        reader.read(image, container, offset, size)
    return caught.value.reason


def test_a_file_below_the_root(root: Path) -> None:
    assert ImageReader(str(root)).read("sub/a.jpg") == b"picture"
    assert ImageReader(f"file://{root}/").read("sub/a.jpg") == b"picture"


@pytest.mark.parametrize(
    "name", ["a b.jpg", "ünï 漢字.jpg", "quote'\".jpg", "new\nline.jpg", "..jpg", "a..b", "#?%2e.jpg"]
)
def test_odd_names(root: Path, name: str) -> None:
    (root / name).write_bytes(name.encode())
    assert ImageReader(str(root)).read(name) == name.encode()


def test_what_is_not_there_is_missing(root: Path) -> None:
    reader = ImageReader(str(root))
    names = ["sub/b.jpg", "no/such/folder.jpg", "sub/a.jpg/b.jpg", "", "nul\0.jpg", "x" * 5000]
    assert {name[:20]: _reason(reader, name) for name in names} == {name[:20]: "missing" for name in names}


def test_folders_and_pipes_are_unreadable(root: Path) -> None:
    os.mkfifo(root / "pipe")
    reader = ImageReader(str(root))
    assert [_reason(reader, "sub"), _reason(reader, "pipe")] == ["unreadable", "unreadable"]


def test_a_refused_permission_is_unreadable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod: the tests may run as root, whom no mode stops.
    _failing_open(monkeypatch, errno.EACCES, times=1)
    assert _reason(ImageReader(str(root)), "sub/a.jpg") == "unreadable"


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "..", "/etc/passwd", "file:///etc/passwd"])
def test_a_path_that_leaves_the_root_is_refused(root: Path, name: str) -> None:
    assert _reason(ImageReader(str(root)), name) == "outside_root"


def test_an_absolute_path_is_refused_even_below_the_root(root: Path) -> None:
    assert _reason(ImageReader(str(root)), str(root / "sub" / "a.jpg")) == "outside_root"


def test_chained_uris_are_refused(root: Path) -> None:
    # fsspec would open the last link of the chain, wherever it points.
    reader = ImageReader(str(root))
    assert _reason(reader, "http://127.0.0.1/a::file:///etc/passwd") == "outside_root"
    assert _reason(reader, "simplecache::file:///etc/passwd") == "missing"


def test_other_schemes_are_named(root: Path) -> None:
    with pytest.raises(Rejected, match="git:// is not one of") as caught:
        ImageReader(str(root)).read("git://repository/file")
    assert caught.value.reason == "unreadable"


def test_symbolic_links_may_not_leave_the_root(root: Path) -> None:
    (root / "file.jpg").symlink_to(root.parent / "secret")
    (root / "folder").symlink_to(root.parent)
    (root / "sub" / "relative.jpg").symlink_to("../../secret")
    reader = ImageReader(str(root))
    names = ["file.jpg", "folder/secret", "sub/relative.jpg"]
    assert [_reason(reader, name) for name in names * 2] == ["outside_root"] * 6


def test_symbolic_links_inside_the_root_are_followed(root: Path) -> None:
    (root / "file.jpg").symlink_to("sub/a.jpg")
    (root / "folder").symlink_to("sub")
    (root / "loop").symlink_to("loop")
    reader = ImageReader(str(root))
    assert [reader.read("file.jpg"), reader.read("folder/a.jpg")] == [b"picture"] * 2
    assert _reason(reader, "loop") in {"missing", "unreadable"}


def test_a_root_that_is_a_link_itself(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    assert ImageReader(str(link)).read("sub/a.jpg") == b"picture"


def test_a_sibling_with_the_same_prefix_is_outside(root: Path) -> None:
    other = root.parent / "root2"
    other.mkdir()
    (other / "b.jpg").write_bytes(b"secret")
    (root / "b.jpg").symlink_to(other / "b.jpg")
    assert _reason(ImageReader(str(root)), "b.jpg") == "outside_root"


def test_empty_and_too_large(root: Path) -> None:
    (root / "empty.jpg").write_bytes(b"")
    reader = ImageReader(str(root), max_bytes=6)
    assert [_reason(reader, "empty.jpg"), _reason(reader, "sub/a.jpg")] == ["empty", "too_large"]
    assert ImageReader(str(root), max_bytes=7).read("sub/a.jpg") == b"picture"


def test_a_byte_range_of_a_shard(root: Path) -> None:
    (root / "shard.tar").write_bytes(b"0123456789")
    reader = ImageReader(str(root))
    assert reader.read("member", "shard.tar", 3, 4) == b"3456"
    assert reader.read("member", "shard.tar", 3) == b"3456789"
    assert _reason(reader, "member", "shard.tar", 3, 0) == "empty"
    assert _reason(reader, "member", "shard.tar", 8, 4) == "truncated"
    assert _reason(reader, "member", "shard.tar", 10) == "truncated"
    assert _reason(reader, "member", "shard.tar", -1, 4) == "truncated"
    assert _reason(reader, "member", "../shard.tar", 0, 4) == "outside_root"
    assert ImageReader(None).read("member", str(root / "shard.tar"), 3, 4) == b"3456"


def test_without_a_root_a_path_is_refused(root: Path) -> None:
    assert _reason(ImageReader(None), "sub/a.jpg") == "outside_root"
    assert _reason(ImageReader(None), str(root / "sub" / "a.jpg")) == "outside_root"


def test_a_failing_disk_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_open(monkeypatch, errno.EIO, times=2)
    assert ImageReader(str(root)).read("sub/a.jpg") == b"picture"


@pytest.mark.parametrize("code", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EMFILE])
def test_a_dead_disk_is_no_reject(root: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    _failing_open(monkeypatch, code, times=99)
    with pytest.raises(StorageError, match="3 tries failed"):
        ImageReader(str(root)).read("sub/a.jpg")


def _failing_open(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
    real, failures = os.open, iter(range(times))

    def fail(path: str, flags: int) -> int:
        if next(failures, None) is not None:
            raise OSError(code, os.strerror(code))
        return real(path, flags)

    monkeypatch.setattr(os, "open", fail)


def test_retries_back_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(storage, "_DELAYS", (1.0, 2.0))
    monkeypatch.setattr(time, "sleep", waits.append)
    _failing_open(monkeypatch, errno.EIO, times=99)
    with pytest.raises(StorageError):
        ImageReader(str(root)).read("sub/a.jpg")
    assert [0.5 <= waits[0] <= 1.0, 1.0 <= waits[1] <= 2.0, len(waits)] == [True, True, 2]


def test_uris_as_root_and_as_image() -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/a b#.jpg": b"picture", "/bucket/empty.jpg": b"", "/bucket/s.tar": b"0123456789"})
    rooted, free = ImageReader("memory://bucket/"), ImageReader(None)
    assert rooted.read("a b#.jpg") == free.read("memory://bucket/a b#.jpg") == b"picture"
    assert rooted.read("m", "s.tar", 3, 4) == free.read("m", "memory://bucket/s.tar", 3, 4) == b"3456"
    assert [_reason(rooted, "b.jpg"), _reason(rooted, "empty.jpg")] == ["missing", "empty"]
    assert [_reason(rooted, "../a"), _reason(rooted, "/bucket/a")] == ["outside_root"] * 2
    assert _reason(ImageReader("memory://bucket", max_bytes=6), "a b#.jpg") == "too_large"


class _Server(BaseHTTPRequestHandler):
    """Answers /STATUS with that status, /STATUS-once with it the first time, the rest with its own path."""

    seen: set[str] = set()

    def do_GET(self) -> None:
        code, _, once = self.path.strip("/").partition("-")
        status = int(code) if code.isdigit() and not (once and self.path in self.seen) else 200
        self.seen.add(self.path)
        body = b"" if status == 416 else self.path.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (404, "missing"),
        (410, "missing"),
        (400, "unreadable"),
        (451, "unreadable"),
        (416, "empty"),
    ],
)
def test_a_final_answer_of_a_server_is_a_reject(web: str, status: int, reason: str) -> None:
    assert _reason(ImageReader(web), str(status)) == reason


@pytest.mark.parametrize("status", [401, 402, 403, 407, 408, 429, 500, 503])
def test_a_passing_answer_of_a_server_is_tried_again_and_no_reject(web: str, status: int) -> None:
    assert ImageReader(web).read(f"{status}-once") == f"/{status}-once".encode()
    with pytest.raises(StorageError):
        ImageReader(web).read(str(status))


def test_a_server_that_is_gone_is_no_reject() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(StorageError):
        ImageReader("http://127.0.0.1:9").read("a.jpg")


def test_names_are_quoted_for_a_server(web: str) -> None:
    assert ImageReader(web).read("a b?c#d.jpg") == b"/a%20b%3Fc%23d.jpg"
    assert ImageReader(web).read("%2e%2e/secret") == b"/%252e%252e/secret"


def test_a_reader_travels_and_is_shared_by_threads(root: Path) -> None:
    reader = ImageReader(str(root))
    reader.read("sub/a.jpg")
    travelled: ImageReader = pickle.loads(pickle.dumps(reader))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: travelled.read("sub/a.jpg"), range(200))) == {b"picture"}


def test_a_server_that_falls_silent_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a user's own configuration of fsspec, which holds headers for it."""
    monkeypatch.setattr(storage, "_SILENT_SECONDS", 0.3)
    monkeypatch.setitem(fsspec.config.conf, "http", {"client_kwargs": {"headers": {"X-Key": "secret"}}})
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                heard.append(connection.recv(4096))  # and answers nothing

        Thread(target=listen, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(StorageError, match="3 tries failed, the last with .*Timeout"):
            ImageReader(f"http://127.0.0.1:{server.getsockname()[1]}").read("a.jpg")
    assert time.monotonic() - begun < 10 and b"X-Key: secret" in heard[0]
