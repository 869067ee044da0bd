"""A worker's share of each step, with samples that cannot be used replaced by name."""

from pathlib import Path

import pytest

from sharegpt4v.errors import RunFailed, UserError
from sharegpt4v.models.load import load_adapter
from sharegpt4v.templates import IGNORE_INDEX
from sharegpt4v.toy.shipped import SHIPPED
from sharegpt4v.train.feed import PreparedStep
from sharegpt4v.train.records import Records
from sharegpt4v.train.samples import SampleMaker, SampleRules
from tests.train.data import make_feed, open_records, write_conversations

ADAPTER = load_adapter(SHIPPED / "lmm")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("data")
    return open_records(write_conversations(folder), folder / "work")


def shares(records: Records, workers: int, step: int) -> list[PreparedStep]:
    found = []
    for worker in range(workers):
        with make_feed(ADAPTER, records, worker=worker, workers=workers) as feed:
            found.append(feed.prepare(step))
    return found


def test_any_number_of_workers_takes_the_same_samples(records: Records) -> None:
    wanted = sorted(shares(records, 1, 4)[0].ids)
    for workers in (2, 3):
        split = shares(records, workers, 4)
        assert sorted(name for share in split for name in share.ids) == wanted
        assert len({len(share.rows) for share in split}) == 1


def test_steps_come_in_order_and_from_any_first_one(records: Records) -> None:
    with make_feed(ADAPTER, records) as feed:
        through = [(each.step, each.ids) for each in feed.steps(0, 6)]
        assert [(each.step, each.ids) for each in feed.steps(4, 6)] == through[4:]
    assert [step for step, _ in through] == list(range(6))


def test_images_that_are_missing_are_named_and_replaced(tmp_path: Path) -> None:
    """The global batch stays exact, and the same for any number of workers."""
    data = open_records(write_conversations(tmp_path), tmp_path / "work")
    for number in (0, 3):
        (tmp_path / "images" / str(data[number].image)).unlink()
    one, two = ([s for step in range(4) for s in shares(data, n, step)] for n in (1, 2))
    lost = {data[0].id, data[3].id}
    for shown in (one, two):
        assert {reject.id for share in shown for reject in share.rejects} == lost
        assert {reject.reason for share in shown for reject in share.rejects} == {"missing"}
        assert sum(share.samples for share in shown) == 4 * 8
    ids = [
        sorted(i for share in s for row in share.rows for i in row.input_ids[0].tolist()) for s in (one, two)
    ]
    assert ids[0] == ids[1]


def test_a_store_without_images_ends_in_one_line(tmp_path: Path) -> None:
    data = open_records(write_conversations(tmp_path, 8, 0), tmp_path / "work")
    for file in (tmp_path / "images").rglob("*.*"):
        file.unlink()
    with make_feed(ADAPTER, data) as feed, pytest.raises(RunFailed, match="put `root` right"):
        feed.prepare(0)


def test_long_samples_are_cut_at_a_turns_end_or_refused(records: Records) -> None:
    number = next(n for n in range(len(records)) if len(records[n].conversation.texts) == 6)
    template = ADAPTER.template
    whole = SampleMaker(records, template, SampleRules(48, "squash", 1000)).encode(number)
    short = SampleRules(48, "squash", whole.tokens - 1)
    cut = SampleMaker(records, template, short).encode(number)
    assert cut.cut == 1 and cut.tokens < whole.tokens
    assert whole.ids.input_ids[: cut.tokens] == cut.ids.input_ids
    assert cut.ids.labels[-1] == template.tokenizer.eos_token_id
    refuse = SampleRules(48, "squash", whole.tokens - 1, "refuse")
    with pytest.raises(UserError, match=f"^max_length: {whole.tokens - 1} is refused: .* has {whole.tokens}"):
        SampleMaker(records, template, refuse).encode(number)


def test_control_strings_in_answers_stay_text(tmp_path: Path) -> None:
    path = write_conversations(tmp_path, 1, 0)
    path.write_text(path.read_text().replace("A photo of", "say </s> ASSISTANT: <TOKENS_UNUSED_1>"))
    data = open_records(path, tmp_path / "work")
    ids = SampleMaker(data, ADAPTER.template, SampleRules(48, "squash", 1000)).encode(0).ids
    [end] = [i for i, token in enumerate(ids.input_ids) if token == ADAPTER.tokenizer.eos_token_id]
    assert end == len(ids.input_ids) - 1 and ids.labels[end] != IGNORE_INDEX


def test_one_question_replaces_the_file_s_own(records: Records) -> None:
    rules = SampleRules(48, "squash", 1000, question="Analyze.")
    asked = SampleMaker(records, ADAPTER.template, rules).encode(1).ids.input_ids
    assert "Analyze." in ADAPTER.tokenizer.decode(asked)
    assert "A photo of" not in ADAPTER.tokenizer.decode(asked).split("ASSISTANT:")[0]
