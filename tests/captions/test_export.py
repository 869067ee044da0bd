"""Exports read back with the libraries they are made for: the same ids, captions and image bytes."""

import json
import os
import tarfile
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipelines.export import main
from sharegpt4v.captions.export import hf, webdataset
from sharegpt4v.captions.export import write as export_write
from sharegpt4v.captions.export.card import size_category
from sharegpt4v.captions.export.write import FORMATS, export_run
from sharegpt4v.config.export import ExportFormat
from sharegpt4v.errors import UserError
from sharegpt4v.images import ImageReader
from sharegpt4v.manifest import read_rows
from sharegpt4v.records import MANIFEST
from tests.captions.fake_run import PROMPT, caption, reject, write_images, write_run

HOSTILE = [
    caption("coco/train2017/000.1.jpg", 'A "red" bus.\nAnd a dog\\.', image="a b/000.1.jpg"),
    caption("日本/ü\n.tar", "Ein Bär, \u2028 <image> und 🚌.", source="sam", image="ü.jpg"),
    caption("../../etc/passwd", "x" * 100_000, source="a|b", image="c.jpg"),
    caption(" ", "", image="d.jpg"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Path:
    rows = [dict(row) for row in HOSTILE]
    write_images(root, rows)
    settings = {"root": str(root), "model": "toy-captioner@0123"}
    return write_run(tmp_path / "run", rows, [reject("gone", "missing")], part_rows=3, settings=settings)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`datasets.load_dataset` of the split train, offline."""
    monkeypatch.setitem(os.environ, "HF_DATASETS_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    return partial(datasets.load_dataset, split="train", cache_dir=str(tmp_path / "cache"))


def texts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["id"]: row["caption"] for row in rows}


def test_llava_json_is_one_array_with_the_prompt_as_the_human_turn(run: Path, tmp_path: Path) -> None:
    summary = export_run(run, "llava-json", tmp_path / "out.json")

    records = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert summary.captions == len(records) == len(HOSTILE)
    assert summary.size == (tmp_path / "out.json").stat().st_size
    for record, row in zip(records, HOSTILE, strict=True):
        assert record == {
            "id": row["id"],
            "image": row["image"],
            "source": row["source"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": row["caption"]},
            ],
        }


def test_hf_folder_loads_with_datasets(
    run: Path, tmp_path: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "SHARD_BYTES", 1)
    export_run(run, "hf", tmp_path / "out")

    loaded = load(str(tmp_path / "out"))

    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert loaded["id"] == [row["id"] for row in HOSTILE]
    assert texts(loaded.to_list()) == texts(HOSTILE)


def test_hf_with_images_decodes_to_the_captioned_pixels(
    run: Path, root: Path, tmp_path: Path, load: Callable[..., Any]
) -> None:
    export_run(run, "hf", tmp_path / "out", with_images=True)

    loaded = load(str(tmp_path / "out"))

    assert loaded["image_path"] == [row["image"] for row in HOSTILE]
    assert texts(loaded.remove_columns("image").to_list()) == texts(HOSTILE)
    for row in loaded:
        with Image.open(root / row["image_path"]) as original:
            assert row["image"].tobytes() == original.tobytes()
    kept = pq.read_table(tmp_path / "out" / "data")["image"].to_pylist()
    assert [image["bytes"] for image in kept] == [(root / row["image"]).read_bytes() for row in HOSTILE]


@pytest.mark.parametrize(("images", "size", "groups"), [(3, 10**6, [3, 1]), (100, 1, [1, 1, 1, 1])])
def test_hf_row_groups_with_images_are_of_bounded_size(
    images: int, size: int, groups: list[int], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "GROUP_IMAGES", images)
    monkeypatch.setattr(hf, "GROUP_BYTES", size)
    export_run(run, "hf", tmp_path / "out", with_images=True)

    (file,) = (tmp_path / "out" / "data").iterdir()
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == groups


def test_hf_files_with_images_end_at_their_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "GROUP_IMAGES", 1)
    monkeypatch.setattr(hf, "SHARD_BYTES", 10_000)  # the third row alone has more
    export_run(run, "hf", tmp_path / "out", with_images=True)

    files = sorted((tmp_path / "out" / "data").iterdir())
    assert [file.name for file in files] == [f"train-{n:05}-of-00003.parquet" for n in range(3)]
    assert [pq.read_metadata(file).num_rows for file in files] == [2, 1, 1]


@pytest.mark.parametrize("target", ["llava-json", "messages"])
def test_formats_that_only_name_images_refuse_to_hold_them(
    target: ExportFormat, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"{target} only names images"):
        export_run(run, target, tmp_path / "out", with_images=True)


def test_the_card_says_where_the_captions_come_from(run: Path, tmp_path: Path) -> None:
    export_run(run, "hf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")

    _, front, body = card.split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["size_categories"] == ["n<1K"]
    assert settings["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert "license" not in settings
    for expected in ("toy-captioner@0123", "caption@1", PROMPT, "generated by a model", "Stand-in"):
        assert expected in body
    assert "| a\\|b | 1 | 0 |" in body


def test_the_card_of_a_real_model_speaks_of_no_stand_in(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [caption("a", "text")], model="share-captioner@9f")
    export_run(tmp_path / "run", "hf", tmp_path / "out")

    assert "Stand-in" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["messages", "hf", "webdataset"])
def test_every_folder_carries_the_warning_of_a_stand_in(
    target: ExportFormat, run: Path, tmp_path: Path
) -> None:
    export_run(run, target, tmp_path / "out")

    assert "**Stand-in.** Written by a toy model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("rows", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (1_246_000, "1M<n<10M"), (3 * 10**10, "10B<n<100B")],
)
def test_size_categories_are_the_hubs(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_webdataset_gives_back_ids_captions_and_the_very_image_bytes(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "SHARD_SAMPLES", 3)
    export_run(run, "webdataset", tmp_path / "out", root=str(root))

    wds = pytest.importorskip("webdataset")
    shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [Path(shard).name for shard in shards] == ["train-000000.tar", "train-000001.tar"]
    assert [sample["__key__"] for sample in samples] == [f"{n:09}" for n in range(len(HOSTILE))]
    for sample, row in zip(samples, HOSTILE, strict=True):
        assert json.loads(sample["json"])["id"] == row["id"]
        assert sample["txt"].decode() == row["caption"]
        assert sample["jpg"] == (root / row["image"]).read_bytes()


def test_llava_json_and_webdataset_are_manifests_that_lose_nothing(
    run: Path, root: Path, tmp_path: Path
) -> None:
    export_run(run, "llava-json", tmp_path / "out.json")
    export_run(run, "webdataset", tmp_path / "out", root=str(root))

    listed = list(read_rows(str(tmp_path / "out.json"), str(root)))
    sharded = list(read_rows(str(tmp_path / "out")))
    expected = [(row["id"], row["source"]) for row in HOSTILE]
    assert [(row["id"], row["source"]) for row in listed] == expected
    assert [(row["id"], row["source"]) for row in sharded] == expected
    assert [row["image"] for row in listed] == [row["image"] for row in HOSTILE]
    reader = ImageReader(str(tmp_path / "out"))
    for row, original in zip(sharded, HOSTILE, strict=True):
        image = reader.read(row["image"] or "", row["container"], row["offset"], row["size"])
        assert image == (root / original["image"]).read_bytes()


def test_webdataset_reads_images_out_of_tar_shards(run: Path, root: Path, tmp_path: Path) -> None:
    """A run over shards names its images by container and byte range, not by file."""
    export_run(run, "webdataset", tmp_path / "first", root=str(root))
    rows: list[dict[str, Any]] = [dict(row) for row in read_rows(str(tmp_path / "first"))]
    again = [caption(row["id"], "again", image=row["image"]) for row in rows]
    for row, original in zip(again, HOSTILE, strict=True):
        row["image_sha256"] = sha256((root / original["image"]).read_bytes()).hexdigest()
    second = write_run(tmp_path / "again", again)
    places = {key: [row[key] for row in rows] for key in MANIFEST.names}
    pq.write_table(pa.table(places, schema=MANIFEST), second / "manifest" / "part-00000.parquet")

    export_run(second, "webdataset", tmp_path / "second", root=str(tmp_path / "first"))

    with tarfile.open(tmp_path / "second" / "train-000000.tar") as tar:
        image = tar.extractfile("000000001.jpg")
        assert image and image.read() == (root / HOSTILE[1]["image"]).read_bytes()


def test_webdataset_extension_follows_the_bytes_not_the_name(tmp_path: Path, root: Path) -> None:
    row = caption("a", "text", image="really-a-png.jpg")
    write_images(root, [row])
    Image.new("RGB", (64, 48)).save(root / row["image"], "PNG")
    row["image_sha256"] = sha256((root / row["image"]).read_bytes()).hexdigest()
    export_run(write_run(tmp_path / "run", [row]), "webdataset", tmp_path / "out", root=str(root))

    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.txt", "000000000.json"]


def test_webdataset_shards_stay_below_their_size(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webdataset, "SHARD_BYTES", 120_000)
    export_run(run, "webdataset", tmp_path / "out", root=str(root))

    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) == 2 and max(sizes) <= 120_000


def test_webdataset_refuses_missing_images_by_id(run: Path, root: Path, tmp_path: Path) -> None:
    (root / "c.jpg").unlink()

    with pytest.raises(UserError, match=r"'\.\./\.\./etc/passwd'.*missing"):
        export_run(run, "webdataset", tmp_path / "out", root=str(root))
    assert [path.name for path in tmp_path.iterdir()] == ["images", "run"]


def test_webdataset_refuses_an_image_that_is_not_the_captioned_one(
    run: Path, root: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 48), "red").save(root / "c.jpg")

    with pytest.raises(UserError, match=r"etc/passwd'.*other bytes than those that were captioned"):
        export_run(run, "webdataset", tmp_path / "out", root=str(root))


@pytest.mark.parametrize("target", list(FORMATS))
def test_an_existing_target_is_refused_and_left_alone(
    target: ExportFormat, run: Path, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")

    with pytest.raises(UserError, match="exists already"):
        export_run(run, target, out, root=str(root))
    assert out.read_text() == "mine"


def test_a_run_without_captions_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], [reject("a", "missing")])

    with pytest.raises(UserError, match="no captions"):
        export_run(run, "llava-json", tmp_path / "out")


def test_a_failed_export_leaves_nothing_behind(
    run: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_write, "unusable_images", lambda *_, **__: None)
    (root / "d.jpg").unlink()  # the last one, when there are files already

    with pytest.raises(UserError, match="' '.*missing"):
        export_run(run, "webdataset", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run"]


def test_a_run_that_is_resumed_meanwhile_is_not_passed_off_as_finished(run: Path, tmp_path: Path) -> None:
    def resume(done: int, rows: int) -> None:
        (run / "_SUCCESS").unlink(missing_ok=True)

    with pytest.raises(UserError, match="resumed meanwhile"):
        export_run(run, "llava-json", tmp_path / "out", progress=resume)
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_hold_what_the_summary_says_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "captions" / "part-00001.parquet").unlink()

    with pytest.raises(UserError, match="has 3 captions and its summary.json says 4"):
        export_run(run, "llava-json", tmp_path / "out")


@pytest.mark.parametrize("target", list(FORMATS))
def test_progress_ends_with_every_caption(target: ExportFormat, run: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    export_run(run, target, tmp_path / "out", progress=lambda done, rows: seen.append((done, rows)))

    assert seen[-1] == (len(HOSTILE), len(HOSTILE))
    assert len(seen) > 1


def test_the_command_warns_of_a_stand_in_first_and_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--run", str(run), "--format", "messages"])

    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert code == 0
    assert lines[0] == lines[-1] and lines[0].startswith("warning: Written by a toy model")
    assert captured.out.splitlines()[0].startswith(
        f"3 captions written to {tmp_path}/run-messages: 3 files, "
    )
    assert "1 captions are left out, '日本/ü\\n.tar' for one" in captured.err
    assert f"LLaMA-Factory: dataset_dir: {tmp_path}/run-messages, dataset: run" in captured.out
