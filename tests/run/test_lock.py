"""One driver a run folder, and no lock that outlives its holder."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.run.lock import RunLock
from tests.commands import environment, kill

HOLD = "import sys, time; from pathlib import Path; from sharegpt4v.run.lock import RunLock\n" + (
    "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def _holder(run: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    process = _holder(tmp_path)
    try:
        with pytest.raises(UserError, match=f"in use by another run \\(process {process.pid} on .* since"):
            RunLock(tmp_path).__enter__()
    finally:
        kill(process)


def test_a_killed_holder_leaves_no_stale_lock(tmp_path: Path) -> None:
    kill(_holder(tmp_path))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_is_free_again_after_use_and_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    with RunLock(tmp_path), pytest.raises(UserError):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        assert len((tmp_path / "lock.json").read_text().splitlines()) == 1


def test_the_refused_one_leaves_the_holders_name_as_it_is(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        before = (tmp_path / "lock.json").read_text()
        with pytest.raises(UserError):
            RunLock(tmp_path).__enter__()
        assert (tmp_path / "lock.json").read_text() == before


def test_a_holder_that_has_not_written_its_name_yet(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / "lock.json").write_text('{"host": "no')
        with pytest.raises(UserError, match="its holder is still writing its name"):
            RunLock(tmp_path).__enter__()


def test_storage_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match="No locks available.*storage with file locks"):
        RunLock(tmp_path).__enter__()
