"""Nothing torn under a final name; what is renamed is on the disk first, and stays renamed."""

import errno
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sharegpt4v.atomic import atomic_path, make_folder, publish, sync, write_atomic
from tests.commands import environment


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is synced and renamed, in order: `sync NAME`, `name NAME`."""
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_sync(descriptor: int) -> None:
        seen.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def spy_rename(source: Path, target: Path) -> None:
        seen.append(f"name {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "rename", spy_rename)
    return seen


def _without_token(calls: list[str]) -> list[str]:
    return [call.rpartition(".")[0] if call.startswith("sync .") else call for call in calls]


def test_a_file_is_synced_before_its_rename_and_the_folder_after(tmp_path: Path, calls: list[str]) -> None:
    write_atomic(tmp_path / "summary.json", "{}")
    assert _without_token(calls) == ["sync .summary.json", "name summary.json", f"sync {tmp_path.name}"]


def test_a_folder_is_synced_with_all_that_is_in_it(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "elsewhere").touch()
    with atomic_path(tmp_path / "step-10") as folder:
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "rank-0.bin").write_bytes(b"1")
        (folder / "latest").symlink_to(tmp_path / "elsewhere")
    assert calls[:2] == ["sync rank-0.bin", "sync state"]
    assert _without_token(calls[2:]) == ["sync .step-10", "name step-10", f"sync {tmp_path.name}"]
    assert (tmp_path / "step-10" / "latest").is_symlink()


def test_text_is_utf_8_and_bytes_are_kept(tmp_path: Path) -> None:
    write_atomic(tmp_path / "text", "é\r\n")
    write_atomic(tmp_path / "bytes", b"\xff\x00")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\r\n"
    assert (tmp_path / "bytes").read_bytes() == b"\xff\x00"


def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_full_disk_is_noticed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("code", "raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)]
)
def test_storage_that_cannot_sync_a_folder_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    if raised:
        with pytest.raises(OSError, match="Input/output"):
            write_atomic(tmp_path / "a", "new")
    else:
        write_atomic(tmp_path / "a", "new")
        assert (tmp_path / "a").read_text() == "new"


def test_no_folder_is_made_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "gone" / "a", "new")
    assert not (tmp_path / "gone").exists()


def test_a_folder_with_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    (tmp_path / "fresh").mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "fresh", tmp_path / "out")
    assert (tmp_path / "out" / "kept").exists() and (tmp_path / "fresh").exists()


def test_readers_and_patterns_do_not_see_the_unfinished_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "part-00000.parquet") as temporary:
        temporary.write_bytes(b"half")
        assert not list(tmp_path.glob("*.parquet"))  # pathlib's * matches hidden names, too
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_writers_of_one_name_do_not_mix(tmp_path: Path) -> None:
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_atomic(tmp_path / "a", text), texts))
    assert (tmp_path / "a").read_text() in texts and list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_writer_killed_at_any_moment_leaves_whole_files_only(tmp_path: Path) -> None:
    code = (
        "import sys; from itertools import count; from pathlib import Path\n"
        "from sharegpt4v.atomic import write_atomic\n"
        "print('begun', flush=True)\n"
        "for n in count(): write_atomic(Path(sys.argv[1]) / 'a', str(n % 10) * 300_000)"
    )
    for wait in (0.02, 0.05, 0.11):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], env=environment(), stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for path in tmp_path.glob("a"):
            assert len(path.read_text()) == 300_000


def test_sync_returns_for_one_file_and_for_an_empty_folder(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "empty").mkdir()
    sync(tmp_path / "a")
    sync(tmp_path / "empty")
    assert calls == ["sync a", "sync empty"]


def test_each_folder_that_is_made_is_synced_into_its_parent(tmp_path: Path, calls: list[str]) -> None:
    make_folder(tmp_path / "work" / "outcomes")
    assert calls == [f"sync {tmp_path.name}", "sync work"]
    make_folder(tmp_path / "work" / "outcomes")
    assert len(calls) == 2
    with pytest.raises(FileNotFoundError):
        make_folder(tmp_path / "gone" / "0000", parents=False)
