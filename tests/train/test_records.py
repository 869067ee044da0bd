"""Training data of every kind as one file of records."""

import json
import resource
from pathlib import Path

import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.train.records import Records, take_in
from sharegpt4v.train.sets import TrainingSet
from tests.captions.fake_run import caption, reject, write_run
from tests.train.data import open_records, write_conversations


def test_a_conversation_file_becomes_records_by_number(tmp_path: Path) -> None:
    records = open_records(write_conversations(tmp_path, 5, 2), tmp_path / "data")
    assert len(records) == 7
    third = records[2]
    assert third.image and third.conversation.image_turn == 0
    assert len(third.conversation.texts) == 6
    assert records[6].image is None and records[6].conversation.texts[1] == "red red "


def test_dropped_records_are_counted_and_listed(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 3, 1)
    rows = json.loads(path.read_text())
    rows[1]["conversations"] = rows[1]["conversations"][1:2]
    path.write_text(json.dumps(rows))
    records = open_records(path, tmp_path / "data")
    assert records.intake.dropped == {"starts_with_assistant": 1} and len(records) == 3
    [line] = (tmp_path / "data" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == rows[1]["id"]


def test_a_set_without_a_usable_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"id": "1", "image": "a.jpg", "conversations": []}]))
    with pytest.raises(UserError, match="no conversation to train on \\(1 no_turns\\)"):
        open_records(path, tmp_path / "data")


def test_dialogues_are_refused_where_a_stage_takes_captions(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 3, 0)
    with pytest.raises(UserError, match="^data: .* has 2 rounds, and this stage takes a question and its"):
        take_in([TrainingSet(str(path))], None, tmp_path / "data", one_round=True)
    assert not (tmp_path / "data" / "data.json").exists()


def test_unchanged_files_are_not_read_again_and_changed_ones_are_refused(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 3, 1)
    open_records(path, tmp_path / "data")
    written = (tmp_path / "data" / "records.arrow").stat().st_mtime_ns
    open_records(path, tmp_path / "data")
    assert (tmp_path / "data" / "records.arrow").stat().st_mtime_ns == written
    path.write_text(path.read_text().replace("A photo of", "Another photo of"))
    with pytest.raises(UserError, match="^data: changed since this run began"):
        open_records(path, tmp_path / "data")
    assert (tmp_path / "data" / "records.arrow").stat().st_mtime_ns == written


def make_run(folder: Path) -> Path:
    written = [caption("a", "One."), caption("b", "Two.")]
    return write_run(folder / "run", written, [reject("c", "missing")])


def test_a_caption_run_becomes_records_with_its_prompt_and_root(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    take_in([TrainingSet(str(run))], None, tmp_path / "data")
    records = Records(tmp_path / "data")
    assert [record.id for record in (records[0], records[1])] == ["a", "b"] and len(records) == 2
    first = records[0]
    assert first.conversation.image_turn == 0 and first.root and first.image
    question, answer = first.conversation.texts
    assert question and answer and "<image>" not in question


def test_an_unfinished_caption_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="^data: .* is not finished"):
        take_in([TrainingSet(str(run))], None, tmp_path / "data")


def test_weights_are_read_from_the_end_of_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a:b.json"
    path.write_text("[]")
    assert TrainingSet.parse(f"{path}:0.5") == TrainingSet(str(path), 0.5)
    assert TrainingSet.parse(str(path)) == TrainingSet(str(path), 1.0)
    assert TrainingSet.parse("s3://bucket/a.json:2") == TrainingSet("s3://bucket/a.json", 2.0)
    with pytest.raises(UserError, match="a weight of 0"):
        TrainingSet.parse(f"{path}:0")
    with pytest.raises(UserError, match="does not exist"):
        TrainingSet.parse(str(tmp_path / "none.json"))


def test_memory_stays_flat_for_a_large_file(tmp_path: Path) -> None:
    """40 MB of conversations; reading them as a whole takes several times as much."""
    path, answer = tmp_path / "talk.json", "word " * 400
    with open(path, "w") as file:
        file.write("[")
        for number in range(20_000):
            turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": answer}]
            row = {"id": str(number), "image": f"{number}.jpg", "conversations": turns}
            file.write(("," if number else "") + json.dumps(row))
        file.write("]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = open_records(path, tmp_path / "data")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(records) == 20_000 and records[19_999].id == "19999"
    # The written file is mapped and counts where its pages are touched.
    assert grown < 60
