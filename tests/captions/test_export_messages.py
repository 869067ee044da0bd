"""The messages format, held against what the documents and readers of ms-swift and LLaMA-Factory ask for."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sharegpt4v.captions.export.write import export_run
from sharegpt4v.config.export import ExportFormat
from sharegpt4v.errors import UserError
from sharegpt4v.records import MANIFEST
from tests.captions.fake_run import PROMPT, caption, write_images, write_run

ROWS = [
    caption("coco/1.jpg", 'A "red" bus.\nAnd a dog\\.', image="a b/1.jpg"),
    caption("ü\n", "Ein Bär,\u2028 im Wald\x85 und 🚌.", source="sam", image="ü.jpg"),
    caption("c", "It reads <images> and <img>.", image="c.jpg"),
]


def written(tmp_path: Path, rows: list[dict[str, Any]], prompt: str = PROMPT) -> Path:
    rows = [dict(row) for row in rows]
    write_images(tmp_path / "images", rows)
    settings = {"root": str(tmp_path / "images"), "prompt_text": prompt}
    return write_run(tmp_path / "my run, 2", rows, settings=settings)


def records(folder: Path) -> list[dict[str, Any]]:
    """splitlines, and not the file's own lines: careless readers part a text at U+2028, too."""
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def for_ms_swift(record: dict[str, Any]) -> dict[str, Any]:
    """By Custom-dataset.md and MessagesPreprocessor: what is left of a row, or AssertionError."""
    keys = {"messages", "images"}
    assert keys <= record.keys()
    assert not record.keys() & {"image", "conversation", "conversations", "system", "label", "channel"}
    for message in record["messages"]:
        assert message["role"] in {"system", "user", "tool_call", "tool_response", "tool", "assistant"}
        assert message["content"] is not None
    text = "\n".join(message["content"] for message in record["messages"])
    assert text.count("<image>") <= len(record["images"])
    assert not any(tag in text for tag in ("<video>", "<audio>", "<ref-object>", "<bbox>"))
    return {key: record[key] for key in keys}


def for_llama_factory(record: dict[str, Any], entry: dict[str, Any]) -> tuple[str, str, list[str]]:
    """By data/README.md, the sharegpt converter and the plugin's count: prompt, response and images."""
    assert entry["formatting"] == "sharegpt" and not entry.get("ranking")
    tags, messages = entry["tags"], record[entry["columns"]["messages"]]
    assert len(messages) % 2 == 0
    for number, message in enumerate(messages):
        assert message[tags["role_tag"]] == tags[("user_tag", "assistant_tag")[number % 2]]
    texts = [message[tags["content_tag"]] for message in messages]
    images = record[entry["columns"]["images"]]
    assert len(images) == sum(text.count("<image>") for text in texts)
    assert all(os.path.isfile(os.path.join("/other/media_dir", image)) for image in images)
    return texts[0], texts[1], images


def test_both_tools_read_every_row_with_its_image(tmp_path: Path) -> None:
    run = written(tmp_path, ROWS)
    summary = export_run(run, "messages", tmp_path / "out")

    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text(encoding="utf-8"))
    (name,) = info
    assert name == "my_run_2"  # LLaMA-Factory parts names by commas
    assert info[name]["file_name"] == "train.jsonl"
    assert summary.captions == len(ROWS) == len(records(tmp_path / "out"))
    for record, row in zip(records(tmp_path / "out"), ROWS, strict=True):
        image = str(tmp_path / "images" / row["image"])
        expected = (f"<image>{PROMPT}", row["caption"], [image])
        assert for_llama_factory(record, info[name]) == expected
        assert for_ms_swift(record) == {
            "messages": [
                {"role": "user", "content": f"<image>{PROMPT}"},
                {"role": "assistant", "content": row["caption"]},
            ],
            "images": [image],
        }
        assert (record["id"], record["source"]) == (row["id"], row["source"])


def test_datasets_reads_the_file_as_both_tools_do(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export_run(written(tmp_path, ROWS), "messages", tmp_path / "out")

    files = str(tmp_path / "out" / "train.jsonl")
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == records(tmp_path / "out")


@pytest.mark.parametrize("tag", ["<image>", "<video>", "<audio>", "<ref-object>", "<bbox>"])
def test_captions_with_a_tag_of_the_tools_are_left_out_and_counted(tag: str, tmp_path: Path) -> None:
    rows = [*ROWS, caption("tagged", f"The sign reads {tag}.")]
    summary = export_run(written(tmp_path, rows), "messages", tmp_path / "out")

    assert summary.left_out == ["tagged"] and summary.captions == len(ROWS)
    assert [record["id"] for record in records(tmp_path / "out")] == [row["id"] for row in ROWS]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| Left out | 1 (" in card and "3 detailed image captions" in card
    assert "with `<image>` in front" in card  # Markdown shows entities inside of code as they are


def test_a_prompt_with_a_tag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds <image>"):
        export_run(written(tmp_path, ROWS, prompt="What is in <image>?"), "messages", tmp_path / "out")


@pytest.mark.parametrize("target", ["messages", "llava-json"])
def test_images_inside_of_tar_shards_are_refused(target: ExportFormat, tmp_path: Path) -> None:
    """Members of several shards have the same names, and no reader of either format looks into a shard."""
    run = written(tmp_path, ROWS)
    manifest = pq.read_table(run / "manifest").to_pylist()
    manifest[-1] |= {"container": "train-000000.tar", "offset": 512, "size": 100}
    pq.write_table(pa.Table.from_pylist(manifest, MANIFEST), run / "manifest" / "part-00000.parquet")

    with pytest.raises(UserError, match=f"tar shards, and {target} can name files only: export"):
        export_run(run, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_relative_root_and_a_uri_are_named_as_the_tools_need_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written(tmp_path, ROWS)
    monkeypatch.chdir(tmp_path)
    export_run(run, "messages", tmp_path / "local", root="images/")
    export_run(run, "messages", tmp_path / "file", root=f"file://{tmp_path}/images")
    (run / "run.yaml").write_text(yaml.safe_dump({"root": "memory://bucket", "prompt_text": PROMPT}))
    export_run(run, "messages", tmp_path / "uri")

    expected = [[str(tmp_path / "images" / row["image"])] for row in ROWS]
    assert [record["images"] for record in records(tmp_path / "local")] == expected
    assert [record["images"] for record in records(tmp_path / "file")] == expected
    assert records(tmp_path / "uri")[2]["images"] == ["memory://bucket/c.jpg"]
