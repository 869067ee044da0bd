"""What a session is to do: its files, their row groups, and how many commits make a block."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sharegpt4v.captions.blocks import row_groups, rows_per_block, rows_per_commit, write_pending
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.captions.resume import survey
from sharegpt4v.records import PENDING
from tests.captions.sessions import begin, caption, commit


@pytest.fixture
def run(tmp_path: Path) -> CaptionRun:
    return begin(tmp_path, ["c", "a", "d"], ["b", "e"])


def _write(run: CaptionRun, commit_rows: int = 2, block_rows: int = 2) -> list[Path]:
    return write_pending(run, survey(run)[0], commit_rows, block_rows)


def test_pending_rows_carry_their_place_and_come_in_groups_of_a_commit(run: CaptionRun) -> None:
    commit(run, 0, "x", caption(run, "a"))
    first, second = _write(run, 1, 1)
    table = pq.read_table(first)
    assert table.schema == PENDING
    assert table.select(["shard", "row", "id", "image"]).to_pylist() == [
        {"shard": 0, "row": 0, "id": "c", "image": "c.jpg"},
        {"shard": 0, "row": 2, "id": "d", "image": "d.jpg"},
    ]
    assert pq.read_metadata(first).num_row_groups == 2
    assert pq.read_table(second)["shard"].to_pylist() == [1, 1]


def test_each_time_the_files_have_other_names(run: CaptionRun) -> None:
    """A worker that outlived its driver must not read the next session's rows under the names it knows."""
    before = _write(run)
    commit(run, 0, "x", *[caption(run, key) for key in "cad"])
    [path] = _write(run)
    assert pq.read_table(path)["id"].to_pylist() == ["b", "e"]
    assert path not in before and not any(old.exists() for old in before)
    assert len(list(run.pending.iterdir())) == 1


def test_the_first_commits_are_blocks_of_their_own(tmp_path: Path) -> None:
    run = begin(tmp_path, [f"{n:03}" for n in range(100)], [f"x{n:03}" for n in range(20)])
    files = _write(run, commit_rows=2, block_rows=16)
    sizes = [
        pq.read_metadata(str(group["file"])).row_group(int(group["row_group"])).num_rows
        for group in row_groups(files)
    ]
    assert sizes == [2] * 32 + [16, 16, 4] + [16, 4]
    assert [key for file in files for key in pq.read_table(file)["row"].to_pylist()] == [
        *range(100),
        *range(20),
    ]


def test_blocks_are_few_in_large_runs_and_small_in_small_ones() -> None:
    """1,200,000 rows of 64 a commit are 18,750 commits."""
    assert [rows_per_block(rows, 64, 336) for rows in (200, 32_767, 100_000, 1_200_000)] == [64, 64, 320, 320]
    assert rows_per_block(1_200_000, 64, 96) == 66 * 64
    assert rows_per_block(1_200_000, 4096, 96) == 4096
    assert rows_per_block(1_200_000, 4096, 448) == 4096  # a commit of more pixels than a block should have


def test_commits_are_small_for_small_runs_and_bounded_for_large_ones() -> None:
    assert [rows_per_commit(rows, 96) for rows in (1, 200, 6_400, 1_200_000)] == [16, 16, 200, 4096]
    assert rows_per_commit(1_200_000, 448) == 195  # 117 MB of pixels
