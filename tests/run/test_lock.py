"""One driver a run folder, and no lock that outlives its holder."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.run.lock import LOCK_FILE, RunLock
from tests.commands import environment, kill

HOLD = """
import os, sys, time
from pathlib import Path
from sharegpt4v.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if "fork" not in sys.argv or os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def _holder(run: Path, *arguments: str) -> "tuple[subprocess.Popen[str], str]":
    """A process that holds the lock, and the id that was printed: its own, or its forked child's."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may not write, also when the tests run as root."""
    before = os.geteuid()
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        try:
            if before == 0:
                os.seteuid(65534)  # root may write everywhere
            yield Path(name)
        finally:
            os.seteuid(before)
            Path(name).chmod(0o755)


def test_a_second_run_is_refused_at_once_and_hears_who_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, _ = _holder(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    try:
        with pytest.raises(UserError, match=f"in use by another run \\(process {process.pid} on .* since"):
            RunLock(tmp_path).__enter__()
    finally:
        monkeypatch.undo()
        kill(process)


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    process, _ = _holder(tmp_path)
    kill(process)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_forked_child_that_lives_on_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    process, child = _holder(tmp_path, "fork")
    try:
        process.kill()
        process.wait()  # not for its output, which the child holds open
        os.kill(int(child), 0)  # it lives
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(int(child), 9)


@pytest.mark.parametrize("text", ["", '{"host": "no', json.dumps({"host": "gone", "pid": 1, "since": 1.0})])
def test_a_lock_file_that_was_left_over_does_not_block(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_lock_is_free_again_after_use_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    with RunLock(tmp_path), pytest.raises(UserError):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_file_stays_so_that_two_processes_never_lock_two_files_of_its_name(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        before = (tmp_path / LOCK_FILE).stat().st_ino
    assert (tmp_path / LOCK_FILE).stat().st_ino == before


def test_another_thread_is_refused_and_may_give_the_lock_back(tmp_path: Path) -> None:
    lock, refused = RunLock(tmp_path).__enter__(), []

    def second() -> None:
        with pytest.raises(UserError, match="in use") as error:
            RunLock(tmp_path).__enter__()
        refused.append(error)
        lock.__exit__(None, None, None)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert refused
    with RunLock(tmp_path):
        pass


def test_the_refused_one_leaves_the_holders_name_as_it_is(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        before = (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(UserError):
            RunLock(tmp_path).__enter__()
        assert (tmp_path / LOCK_FILE).read_text() == before


def test_a_holder_that_has_not_written_its_name_yet(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_FILE).write_text('{"host": "no')
        with pytest.raises(UserError, match="it has not written its name yet"):
            RunLock(tmp_path).__enter__()


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(read_only: Path) -> None:
    with pytest.raises(UserError, match=f"cannot lock {read_only}/lock.json .*denied.*give another folder"):
        RunLock(read_only).__enter__()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_storage_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), RunLock(tmp_path):
        assert f"{tmp_path} has no file locks ({os.strerror(code)})" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] in ([], [LOCK_FILE])  # no marker that a kill leaves


def test_a_full_disk_does_not_leave_the_folder_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device"):
        RunLock(tmp_path).__enter__()
    monkeypatch.undo()
    with RunLock(tmp_path):
        pass
