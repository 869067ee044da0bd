from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.errors import UserError
from sharegpt4v.manifest import IdSet, Manifest, json_files, normalise
from sharegpt4v.manifest.writer import ShardWriter
from sharegpt4v.records import MANIFEST
from tests.manifest.conftest import Record, caption_record, write_json, write_jsonl


def ids(manifest: Manifest) -> list[str]:
    return [name for chunk in manifest.ids() for name in chunk.to_pylist()]


def records(*numbers: int) -> list[Record]:
    return [caption_record(number) for number in numbers]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_writes_shards_of_the_contract_in_input_order(tmp_path: Path, out: Path) -> None:
    manifest = normalise(write_json(tmp_path / "m.json", records(3, 1, 2)), None, out, shard_rows=2)
    assert [path.name for path in sorted(out.iterdir())] == ["part-00000.parquet", "part-00001.parquet"]
    table = pq.read_table(out)
    assert table.schema.equals(MANIFEST)
    assert table["id"].to_pylist() == [f"{n:012d}" for n in (3, 1, 2)] == ids(manifest)
    assert (manifest.rows, manifest.added, manifest.sources) == (3, 3, {"coco": 3})
    assert len(IdSet(manifest.ids())) == 3
    assert not list(out.parent.glob(".*"))


def test_the_same_input_again_adds_nothing(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", records(1, 2))
    normalise(path, None, out)
    before = listing(out)
    again = normalise(path, None, out)
    assert (again.rows, again.added, again.sources) == (2, 0, {"coco": 2})
    assert listing(out) == before


def test_new_ids_join_as_new_shards_and_vanished_ones_stay(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", records(1, 2))
    normalise(path, None, out)
    first = listing(out)
    write_json(tmp_path / "m.json", [*records(5, 2), caption_record(6, "sam/images/sa_6.jpg")])
    joined = normalise(path, None, out)
    assert ids(joined) == [f"{n:012d}" for n in (1, 2, 5, 6)]
    assert (joined.rows, joined.added, joined.sources) == (4, 2, {"coco": 3, "sam": 1})
    assert listing(out).items() > first.items()


@pytest.mark.parametrize(
    "change", [{"image": "other.jpg"}, {"source": "mine"}, {"container": "a.tar"}, {"offset": 7}, {"size": 9}]
)
def test_changed_rows_are_refused_by_id_and_nothing_moves(
    tmp_path: Path, out: Path, change: dict[str, Any]
) -> None:
    path = write_json(tmp_path / "m.json", records(1, 2))
    normalise(path, None, out)
    before = listing(out)
    write_json(tmp_path / "m.json", [*records(1, 7), {**caption_record(2), **change}])
    with pytest.raises(
        UserError, match=r"1 ids are in .* already .*\(first: 000000000002\); give the rows new"
    ):
        normalise(path, None, out)
    assert listing(out) == before
    assert not list(out.parent.glob(".*"))


def test_limit_takes_the_first_and_a_run_without_it_joins_the_rest(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", [*records(1, 2, 3, 4), *records(1)])
    first = normalise(path, None, out, limit=3)
    assert ids(first) == [f"{n:012d}" for n in (1, 2, 3)]  # the repeat comes later and is not looked at
    write_json(tmp_path / "m.json", records(1, 2, 3, 4))
    assert normalise(path, None, out).added == 1
    assert normalise(path, None, out, limit=1).rows == 4


def test_repeated_ids_are_refused_and_listed(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", records(9, *range(8), *range(8)))
    with pytest.raises(UserError, match="8 of 17 ids repeat") as refused:
        normalise(path, None, out)
    assert ", ".join(f"{n:012d}" for n in range(5)) + ")" in str(refused.value)
    assert not out.exists()


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_empty_manifest_is_refused(tmp_path: Path, out: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(UserError, match="is empty"):
        normalise(str(tmp_path / "m.json"), None, out)


def test_one_image_under_two_ids_is_allowed_and_reported(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", [caption_record(1, "a.jpg"), caption_record(2, "a.jpg")])
    manifest = normalise(path, None, out)
    assert (manifest.rows, manifest.same_image_ids) == (2, 1)


@pytest.mark.parametrize("dedupe_image", [False, True])
def test_limit_goes_on_from_batch_to_batch(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, dedupe_image: bool
) -> None:
    monkeypatch.setattr(json_files, "BATCH_ROWS", 2)
    path = write_json(tmp_path / "m.json", records(*range(9)))
    assert normalise(path, None, out, limit=5, dedupe_image=dedupe_image).rows == 5


def test_an_empty_image_path_counts_as_none(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "m.json", [{"id": "a", "image": ""}, *records(1)])
    assert normalise(path, None, out, dedupe_image=True).without_image == 1


SFT_MIX: list[Record] = [
    {"id": "5", "conversations": [{"from": "human", "value": "Write a poem."}]},
    caption_record(1, "coco/1.jpg"),
    caption_record(1, "vg/1.jpg"),
    caption_record(2, "coco/1.jpg"),
]


def test_sft_mix_is_refused_with_its_counts_and_the_way_out(tmp_path: Path, out: Path) -> None:
    path = write_json(tmp_path / "mix.json", SFT_MIX)
    with pytest.raises(UserError) as refused:
        normalise(path, None, out)
    message = str(refused.value)
    assert "1 of 4 records have no image and 1 ids repeat (first: 000000000001)" in message
    assert "`dedupe_image`" in message and "\n" not in message


def test_dedupe_takes_each_image_once_under_its_path(tmp_path: Path, out: Path) -> None:
    manifest = normalise(write_json(tmp_path / "mix.json", SFT_MIX), None, out, dedupe_image=True)
    assert ids(manifest) == ["coco/1.jpg", "vg/1.jpg"]
    assert (manifest.without_image, manifest.repeats) == (1, 1)


def test_dedupe_counts_its_limit_in_images(tmp_path: Path, out: Path) -> None:
    mix = [SFT_MIX[0], SFT_MIX[1], SFT_MIX[3], SFT_MIX[2], caption_record(9)]
    manifest = normalise(write_json(tmp_path / "mix.json", mix), None, out, dedupe_image=True, limit=2)
    assert ids(manifest) == ["coco/1.jpg", "vg/1.jpg"]


def test_progress_counts_the_records_read(tmp_path: Path, out: Path) -> None:
    read: list[int] = []
    pq.write_table(pa.table({"image": [f"{n}.jpg" for n in range(10_000)]}), tmp_path / "m.parquet")
    normalise(str(tmp_path / "m.parquet"), None, out, progress=read.append)
    assert len(read) > 1 and read == sorted(read) and read[-1] == 10_000


def test_what_a_killed_run_left_is_cleared_and_never_read(tmp_path: Path, out: Path) -> None:
    killed = ShardWriter(out, 10)
    killed.__enter__()
    (out.parent / ".manifest.new" / "part-00000.parquet").write_bytes(b"torn")
    manifest = normalise(write_json(tmp_path / "m.json", records(1)), None, out)
    assert ids(manifest) == ["000000000001"]
    assert [path.name for path in out.parent.iterdir()] == ["manifest"]


def test_killed_while_publishing_leaves_a_prefix_that_the_next_run_completes(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "m.json", records(1, 2, 3))
    moved: list[Path] = []

    def rename(shard: Path, target: Path) -> Path:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        return shard.replace(target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", rename)
        normalise(path, None, out, shard_rows=1)
    assert [shard.name for shard in out.iterdir()] == ["part-00000.parquet"]
    assert ids(normalise(path, None, out)) == [f"{n:012d}" for n in (1, 2, 3)]


def test_a_damaged_shard_is_named(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [caption_record(1)])
    normalise(path, None, out)
    shard = out / "part-00000.parquet"
    content = shard.read_bytes()
    for damaged in (content[:-10], b"", bytes(len(content) - 8) + content[-8:]):
        shard.write_bytes(damaged)
        with pytest.raises(UserError, match=r"part-00000\.parquet is damaged: restore it"):
            normalise(path, None, out)


def test_a_shard_that_is_gone_does_not_lend_its_number_to_another(tmp_path: Path, out: Path) -> None:
    path = write_jsonl(tmp_path / "m.jsonl", [caption_record(number) for number in range(4)])
    normalise(path, None, out, shard_rows=2)
    first = out / "part-00000.parquet"
    first.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"has no part-00000\.parquet before its part-00001\.parquet"):
        normalise(path, None, out)
    assert [shard.name for shard in out.iterdir()] == ["part-00001.parquet"]
    (tmp_path / "kept").rename(first)
    assert normalise(path, None, out).rows == 4
