"""Chat messages and image paths, a JSON object a line, as ms-swift and LLaMA-Factory read them.

Both put an image wherever a message says <image>, the assistant's included, and count that against `images`.
They know no escape, so a caption with one of their tags is left out. `id` and `source` are ours: both tools
drop columns that they do not know.
Sources: ms-swift, docs/source_en/Customization/Custom-dataset.md; LLaMA-Factory, data/README.md.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.export.card import card
from sharegpt4v.errors import UserError

IMAGE = "<image>"
_TAGS = re.compile("<(image|video|audio|ref-object|bbox)>")
"""What the two tools replace in any message."""

_FILE = "train.jsonl"

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Ends of a line for Python's splitlines, though not for JSON; they occur inside strings alone."""

_COLUMNS = {
    "id": "unique name of the row",
    "source": "collection that the image comes from",
    "messages": "the prompt with `<image>` in front, and the caption",
    "images": "one path or URI",
}

HINT = "ms-swift: --dataset {out}/" + _FILE + "; LLaMA-Factory: dataset_dir: {out}, dataset: {name}"
"""What the command says last."""


def write(captions: CaptionSet, out: Path) -> None:
    """Writes train.jsonl, the dataset_info.json that LLaMA-Factory asks for, and README.md below `out`.

    Local images are named by their absolute path. Adds the ids of captions that hold a tag to `left_out`.
    Raises UserError for images in tar shards, which have no path, and for a prompt that holds a tag.
    """
    _refuse(captions)
    out.mkdir()
    with open(out / _FILE, "w", encoding="utf-8") as file:
        for record in _records(captions):
            file.write(json.dumps(record, ensure_ascii=False).translate(_LINE_ENDS) + "\n")
    name = dataset_name(captions.name)
    info = json.dumps({name: _dataset_info()}, indent=2, ensure_ascii=False)
    (out / "dataset_info.json").write_text(info + "\n", encoding="utf-8")
    usage = "Paths are absolute: give these folders to the tools where the images are.\n\n" + "\n".join(
        f"- {line}" for line in HINT.format(out="path/to/this/folder", name=name).split("; ")
    )
    text = card(captions, data_files=_FILE, columns=_COLUMNS, usage=usage)
    (out / "README.md").write_text(text, encoding="utf-8")


def dataset_name(run: str) -> str:
    """Returns a run's name as a key of dataset_info.json, which LLaMA-Factory's lists part by commas."""
    return re.sub(r"[^\w.-]+", "_", run)


def _records(captions: CaptionSet) -> Iterator[dict[str, Any]]:
    root = captions.root.removeprefix("file://")
    root = root if "://" in root else os.path.abspath(root)
    for batch in captions.batches(["id", "image", "source", "caption"]):
        for row in batch.to_pylist():
            if _TAGS.search(row["caption"]):
                captions.left_out.append(row["id"])
                continue
            question = {"role": "user", "content": IMAGE + captions.prompt}
            answer = {"role": "assistant", "content": row["caption"]}
            image = row["image"] if "://" in row["image"] else f"{root.rstrip('/')}/{row['image']}"
            yield {
                "id": row["id"],
                "source": row["source"],
                "messages": [question, answer],
                "images": [image],
            }
        captions.advance(len(batch))


def _refuse(captions: CaptionSet) -> None:
    tag = _TAGS.search(captions.prompt)
    if tag:
        raise UserError(
            f"the prompt of {captions.name} holds {tag[0]}, which ms-swift and LLaMA-Factory would replace: "
            f"export as hf or llava-json"
        )
    captions.refuse_shards("messages")


def _dataset_info() -> dict[str, Any]:
    return {
        "file_name": _FILE,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
