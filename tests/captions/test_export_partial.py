"""Exports of runs that are not finished: killed, interrupted in the finish step, or at work right now."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.export import main
from sharegpt4v.captions import finish
from sharegpt4v.captions.export import snapshot
from sharegpt4v.captions.export.write import export_run
from sharegpt4v.captions.finish import compact
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.sessions import begin_session
from sharegpt4v.captions.settle import SettledShard, settled_shards
from sharegpt4v.errors import UserError
from sharegpt4v.run.lock import RunLock
from tests.captions.sessions import add_shard, begin, caption, commit, reject

SETTINGS: dict[str, Any] = {
    "root": "/images",
    "model": "fake@0",
    "engine": "fake",
    "prompt_id": "p@1",
    "prompt_text": "Describe the image.",
}


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    """Seven images: a finished session over four of them, then one that was killed after two outcomes."""
    run = begin(tmp_path / "run", ["c", "a", "d"], ["b"])
    (run.path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    begin_session(run, started=0.0)
    commit(run, 0, "x", caption(run, "c", "old c"), reject(run, "a"))
    commit(run, 0, "y", caption(run, "d", "d"), reject(run, "b"))
    compact(run)
    add_shard(run, ["e", "f", "g"])
    begin_session(run, started=1.0)
    commit(run, 1, "x", caption(run, "e", "e"), caption(run, "a", "a at last"))
    return run


def exported(run: CaptionRun, out: Path) -> list[tuple[str, str]]:
    """Id and caption of each row, in order."""
    export_run(run.path, "llava-json", out, partial=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    out.unlink()
    return [(row["id"], row["conversations"][1]["value"]) for row in rows]


SO_FAR = [("c", "old c"), ("a", "a at last"), ("d", "d"), ("e", "e")]


def test_an_unfinished_run_is_refused_by_a_line_that_names_partial(
    run: CaptionRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run-partial-hf").mkdir()  # an earlier one is not in the way

    assert main(["--run", str(run.path), "--format", "hf"]) == 2
    assert "is not finished (it has no _SUCCESS)" in (said := capsys.readouterr().err) and "--partial" in said
    assert not (tmp_path / "run-hf").exists()


def test_a_killed_run_gives_what_is_committed_and_says_how_much(run: CaptionRun, tmp_path: Path) -> None:
    assert exported(run, tmp_path / "out.json") == SO_FAR

    summary = export_run(run.path, "hf", tmp_path / "out", partial=True)
    assert summary.partial
    assert (summary.captions, summary.rejects, summary.undone, summary.rows) == (4, 1, 2, 7)


def test_the_later_caption_wins_and_a_torn_file_counts_for_nothing(run: CaptionRun, tmp_path: Path) -> None:
    commit(run, 1, "y", caption(run, "c", "new c"), reject(run, "a"))
    torn = commit(run, 1, "z", caption(run, "g", "torn"))
    torn.write_bytes(torn.read_bytes()[:-20])

    assert exported(run, tmp_path / "out.json") == [("c", "new c"), *SO_FAR[1:]]


def test_an_export_changes_nothing_in_the_run_and_takes_no_lock(run: CaptionRun, tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in run.path.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    with RunLock(run.path):
        before = state()
        assert exported(run, tmp_path / "out.json") == SO_FAR
        assert state() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_card_and_command_say_partial(
    run: CaptionRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(run.path), "--format", "hf", "--partial"]) == 0

    out = tmp_path / "run-partial-hf"
    said = capsys.readouterr().out
    assert said.startswith("partial: 4 captions of 7 images (1 rejected, 2 not done yet) written to")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "**Partial.**" in card and "# Captions of run\n" in card
    assert "4 of\n> 7 images have a caption, 1 were rejected" in card
    assert pq.read_table(out / "data")["id"].to_pylist() == [key for key, _ in SO_FAR]


def test_a_run_without_a_caption_so_far_is_refused(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", ["a"])
    (run.path / "run.yaml").write_text(yaml.safe_dump(SETTINGS))

    with pytest.raises(UserError, match="holds no captions.*caption` again"):
        export_run(run.path, "hf", tmp_path / "out", partial=True)


@pytest.mark.parametrize("steps", range(6))
def test_a_finish_step_killed_while_it_moves_parts_hides_none(
    steps: int, run: CaptionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of finish.roll_forward, as far as they came."""
    commit(run, 1, "y", caption(run, "f", "f"), reject(run, "g"))
    with monkeypatch.context() as patch:
        patch.setattr(finish, "roll_forward", lambda run: None)
        compact(run)
    compacted = run.path / "work" / "compacted"
    moves: list[Callable[[], object]] = []
    for final in (run.captions, run.rejects):
        moves.append(partial(shutil.rmtree, final))
        moves.append(partial((compacted / final.name).rename, final))
    moves.append(partial(shutil.rmtree, run.outcomes))
    for move in moves[:steps]:
        move()

    assert exported(run, tmp_path / "out.json") == [*SO_FAR, ("f", "f")]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_job_that_compacts_in_the_middle_of_a_snapshot_costs_no_row(
    after: int, run: CaptionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job finishes when the snapshot has read so many shards."""
    commit(run, 1, "y", caption(run, "f", "f"), reject(run, "g"))
    attempts: list[int] = []

    def disturbed(run: CaptionRun, captions: Path, rejects: Path) -> Iterator[SettledShard]:
        attempts.append(0)
        for number, shard in enumerate(settled_shards(run, captions, rejects)):
            if number == after and len(attempts) == 1:
                compact(run)
            yield shard

    monkeypatch.setattr(snapshot, "settled_shards", disturbed)
    monkeypatch.setattr(snapshot, "SECONDS_BETWEEN", 0.0)

    assert exported(run, tmp_path / "out.json") == [*SO_FAR, ("f", "f")]
    assert len(attempts) == 2


def test_a_job_that_commits_in_the_middle_of_a_snapshot_does_not_disturb_it(
    run: CaptionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(run: CaptionRun, captions: Path, rejects: Path) -> Iterator[SettledShard]:
        for number, shard in enumerate(settled_shards(run, captions, rejects)):
            if number == 1:
                commit(run, 1, "y", caption(run, "f", "f"))
            yield shard

    monkeypatch.setattr(snapshot, "settled_shards", disturbed)
    monkeypatch.setattr(snapshot, "TRIES", 1)

    assert exported(run, tmp_path / "out.json") == SO_FAR


def test_a_run_that_never_holds_still_ends_in_one_line(
    run: CaptionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(run: CaptionRun, captions: Path, rejects: Path) -> Iterator[SettledShard]:
        (captions / "part-00000.parquet").touch()
        yield from settled_shards(run, captions, rejects)

    monkeypatch.setattr(snapshot, "settled_shards", disturbed)
    monkeypatch.setattr(snapshot, "SECONDS_BETWEEN", 0.0)

    with pytest.raises(UserError, match="changed each of the 10 times"):
        exported(run, tmp_path / "out.json")


def test_partial_of_a_finished_run_is_a_plain_export(run: CaptionRun, tmp_path: Path) -> None:
    commit(run, 1, "y", caption(run, "f", "f"), reject(run, "g"))
    finish.summarise(run, compact(run), [], SETTINGS, started=0.0)
    run.success.touch()

    assert not export_run(run.path, "hf", tmp_path / "out", partial=True).partial
    assert "Partial" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
