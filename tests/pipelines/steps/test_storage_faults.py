"""When rows are put off, when a storage counts as dead, and what is listed."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.steps.ledger import Ledger
from pipelines.steps.put_off import list_put_off
from pipelines.steps.storage_faults import JUDGED_AFTER, SAMPLE, StorageFaults, most_fail, sample_places
from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.images import ImageReader, storage
from sharegpt4v.manifest import normalise
from tests.captions.sessions import caption, commit

DEAD = ("http://127.0.0.1:9/a.jpg", "", 0, -1)
MISSING = ("gone.jpg", "", 0, -1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_DELAYS", ())


def test_a_look_is_asked_for_now_and_then_until_the_storage_is_given_up() -> None:
    faults = StorageFaults()
    answers = [faults.put_off(f"{number}", "") for number in range(2 * JUDGED_AFTER)]
    assert answers == (["go on"] * (JUDGED_AFTER - 1) + ["look"]) * 2
    faults.give_up("token expired")
    faults.give_up("another")
    assert faults.dead == "token expired" and faults.put_off("x", "") == "stop"


def test_messages_of_a_million_rows_are_not_kept() -> None:
    faults = StorageFaults()
    for number in range(3_000):
        faults.put_off(f"{number}", "no answer")
    assert (faults.count, len(faults.messages)) == (3_000, 1_000)
    faults.begin_again()
    assert (faults.count, faults.messages) == (0, {})


def test_a_dead_storage_admits_no_image() -> None:
    ledger = Ledger(1.0)
    assert ledger.begin("w", ["a"]).stop is None
    ledger.give_up("token expired")
    assert ledger.begin("w", ["b"]).stop == "token expired" and ledger.tally().dead == "token expired"


def test_most_of_a_sample_decides(tmp_path: Path) -> None:
    reader = ImageReader(str(tmp_path))
    assert most_fail(reader, [DEAD, MISSING, DEAD, MISSING, DEAD])
    assert most_fail(reader, [DEAD, MISSING, DEAD, MISSING, MISSING]) is None
    assert most_fail(reader, []) is None


def _pending(path: Path, first: int, rows: int) -> Path:
    images = [f"{number}.jpg" for number in range(first, first + rows)]
    columns = {"image": images, "container": [""] * rows, "offset": [0] * rows, "size": [-1] * rows}
    pq.write_table(pa.table(columns), path)
    return path


def test_a_sample_is_spread_over_all_files(tmp_path: Path) -> None:
    files = [
        _pending(tmp_path / "a", 0, 30),
        _pending(tmp_path / "b", 30, 5),
        _pending(tmp_path / "c", 35, 65),
    ]
    places = sample_places(files)
    assert [place[0] for place in places] == ["10.jpg", "30.jpg", "50.jpg", "70.jpg", "90.jpg"]
    assert len(places) == SAMPLE and places[0][1:] == ("", 0, -1)
    assert sample_places([_pending(tmp_path / "d", 0, JUDGED_AFTER)]) == []


def test_what_has_no_outcome_is_listed_with_what_its_storage_answered(tmp_path: Path) -> None:
    run = CaptionRun.open(tmp_path / "run")
    (tmp_path / "list.jsonl").write_text("".join(f'{{"image": "{name}.jpg"}}\n' for name in "abc"))
    normalise(str(tmp_path / "list.jsonl"), None, run.manifest)
    commit(run, 0, "x", caption(run, "b.jpg"))
    line = list_put_off(run, {"c.jpg": "'c.jpg': 5 tries failed"})
    assert line and line.startswith("2 images could not be read, since the storage failed ('c.jpg': 5 tries")
    rows = [json.loads(text) for text in run.put_off.read_text().splitlines()]
    assert [(row["id"], row["message"]) for row in rows] == [
        ("a.jpg", ""),
        ("c.jpg", "'c.jpg': 5 tries failed"),
    ]
    commit(run, 1, "x", caption(run, "a.jpg"), caption(run, "c.jpg"))
    assert list_put_off(run, {"c.jpg": ""}) is None
