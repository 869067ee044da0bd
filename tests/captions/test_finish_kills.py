"""The finish step under kills, a full disk and a power cut: outcomes go once what replaces them is safe."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sharegpt4v.captions.finish import compact, roll_forward
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey
from tests.captions.sessions import add_shard, begin, caption, commit, reject


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    """Five images, all with an outcome, in files whose order is not the manifest's."""
    run = begin(tmp_path / "run", ["c", "a", "d"], ["b", "e"])
    commit(run, 0, "z", caption(run, "e"), caption(run, "d"))
    commit(run, 0, "a", reject(run, "b"), caption(run, "a"))
    commit(run, 1, "m", caption(run, "c"))
    return run


def _rows(run: CaptionRun, part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.path / part).to_pylist()
    return rows


def _settled(run: CaptionRun) -> dict[str, list[dict[str, Any]]]:
    return {part: _rows(run, part) for part in ("captions", "rejects")}


class _Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def _kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The step-th change of the file system from here on does not happen. Returns how many were tried."""
    tried = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            nonlocal tried
            tried += 1
            if tried == step:
                raise _Killed
            return real(*arguments, **options)

        return change

    monkeypatch.setattr(Path, "rename", counting(Path.rename))
    monkeypatch.setattr(Path, "touch", counting(Path.touch))
    monkeypatch.setattr(Path, "mkdir", counting(Path.mkdir))
    monkeypatch.setattr(pq, "write_table", counting(pq.write_table))
    monkeypatch.setattr(os, "unlink", counting(os.unlink))
    monkeypatch.setattr(os, "rmdir", counting(os.rmdir))
    return lambda: tried


@pytest.mark.parametrize("again", [False, True], ids=["first finish", "second finish"])
def test_killed_at_any_step_the_next_start_ends_with_the_same_output(tmp_path: Path, again: bool) -> None:
    """Every single step of compaction and of the move into place, one after the other."""

    def prepare(path: Path) -> CaptionRun:
        run = begin(path, ["c", "a"], ["b"])
        commit(run, 0, "x", caption(run, "a"), reject(run, "b"), caption(run, "c"))
        if again:
            compact(run)
            add_shard(run, ["d"])
            commit(run, 1, "y", caption(run, "b"), reject(run, "d"))
        return run

    whole = prepare(tmp_path / "whole")
    compact(whole)
    expected = _settled(whole)
    step = 0
    while True:
        step += 1
        run = prepare(tmp_path / f"{step}")
        with pytest.MonkeyPatch.context() as monkeypatch:
            tried = _kill_at(step, monkeypatch)
            try:
                compact(run)
            except _Killed:
                pass
            if tried() < step:
                break
        roll_forward(run)
        assert survey(run)[1].done == survey(run)[1].rows, f"killed at step {step}"
        compact(run)
        assert _settled(run) == expected, f"killed at step {step}"
    assert step > 12


def test_a_move_without_its_marker_is_undone_not_rolled_forward(run: CaptionRun) -> None:
    unfinished = run.path / "work" / "compacted" / "captions"
    unfinished.mkdir(parents=True)
    (unfinished / "part-00000.parquet").touch()
    roll_forward(run)
    assert not unfinished.parent.exists() and not run.captions.exists()
    assert survey(run)[1].done == 5


def test_all_that_replaces_the_outcomes_is_on_the_disk_before_they_go(
    run: CaptionRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut only what was synced is there: files, their folders, and the folders of these."""
    synced: list[str] = []
    fsync, rmtree = os.fsync, shutil.rmtree

    def spy_sync(descriptor: int) -> None:
        synced.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(run.path)))
        fsync(descriptor)

    def spy_remove(path: Path, ignore_errors: bool = False) -> None:
        synced.append(f"remove {path.relative_to(run.path)}")
        rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(shutil, "rmtree", spy_remove)
    compact(run)
    before = synced[: synced.index("remove work/outcomes")]
    kinds = ("captions", "rejects")
    parts = [f"work/compacted/{kind}/part-0000{n}.parquet" for kind in kinds for n in (0, 1)]
    folders = ["work", "work/compacted", "work/compacted/captions", "work/compacted/rejects"]
    assert {*parts, *folders} <= set(before)
    moved = before.index("remove captions")
    assert before.index("work") < moved and all(before.index(part) < moved for part in parts)
    assert before.count(".") >= 2  # both renames into the run folder


def test_a_full_disk_leaves_the_outcomes_alone(run: CaptionRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        compact(run)
    monkeypatch.undo()
    roll_forward(run)
    assert compact(run).rows == 5
