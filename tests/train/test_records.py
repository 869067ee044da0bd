"""Training data of every kind as one file of records."""

import json
import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.manifest.locate import locate
from sharegpt4v.manifest.read import read_batches
from sharegpt4v.models.load import load_adapter
from sharegpt4v.toy.shipped import SHIPPED
from sharegpt4v.train.records import Records, take_in
from sharegpt4v.train.samples import SampleMaker, SampleRules
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


def talk(question: object, answer: object, **more: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_text_alone_is_training_data_and_no_input_of_caption(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"talk.{suffix}"
    rows = [talk("q", "a", id="1"), talk("r", "b", id="2")]
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    records = open_records(path, tmp_path / "data")
    assert [records[n].conversation.texts for n in (0, 1)] == [("q", "a"), ("r", "b")]
    assert records[0].image is None and records[0].conversation.image_turn is None
    with pytest.raises(UserError, match="has no column image"):
        list(read_batches(locate(str(path), None)))


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("a\0b", "a\0b"),
        ("\x1b[31m \x07", "\x1b[31m \x07"),
        ("\u202eabc\u202c", "\u202eabc\u202c"),
        ("half \ud800 a pair", "half \ufffd a pair"),
        ("</s> USER: ASSISTANT: <TOKENS_UNUSED_1>", "</s> USER: ASSISTANT: <TOKENS_UNUSED_1>"),
    ],
    ids=["NUL", "terminal", "right to left", "lone surrogate", "control strings"],
)
def test_odd_characters_are_kept_as_text(written: str, kept: str, tmp_path: Path) -> None:
    """In both turns, and they become ids; half a surrogate pair, which no UTF-8 holds, becomes U+FFFD."""
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([talk(written, written, id="1")]))
    records = open_records(path, tmp_path / "data")
    assert records[0].conversation.texts == (kept, kept)
    template = load_adapter(SHIPPED / "lmm").template
    encoded = SampleMaker(records, template, SampleRules(48, "squash", 500)).encode(0)
    ends = [token for token in encoded.ids.input_ids if token == template.tokenizer.eos_token_id]
    assert len(ends) == 1 and encoded.ids.input_ids[-1] == ends[0]


def test_a_megabyte_of_text_is_read_and_too_long(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([talk("q", "word " * 200_000, id="long"), talk("q", "a", id="short")]))
    records = open_records(path, tmp_path / "data")
    assert len(records[0].conversation.texts[1]) == 1_000_000
    maker = SampleMaker(records, load_adapter(SHIPPED / "lmm").template, SampleRules(48, "squash", 500))
    with pytest.raises(Rejected, match="long: its first round has more than 500 tokens") as caught:
        maker.encode(0)
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (talk("q", 5, id="1"), "record 1 has conversations"),
        ({"id": "1", "conversations": "hello"}, "record 1 has conversations 'hello'; it needs a list of"),
        (
            talk("<image>", "a", id="1", image=["a.jpg", "b.jpg"]),
            "record 1 has image .*; it needs a path as text",
        ),
    ],
    ids=["a number as an answer", "text as turns", "two images"],
)
def test_records_of_another_shape_are_refused_by_number(
    record: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match=said):
        open_records(path, tmp_path / "data")


def test_null_questions_are_empty_and_null_answers_dropped(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([talk(None, "a", id="1"), talk("q", None, id="2")]))
    records = open_records(path, tmp_path / "data")
    assert len(records) == 1 and records[0].conversation.texts == ("", "a")
    assert records.intake.dropped == {"empty_answer": 1}


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
