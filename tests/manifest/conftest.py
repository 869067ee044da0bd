"""Small files in the shapes the field has, made in the test that reads them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

Record = dict[str, Any]


def caption_record(number: int, image: str | None = None) -> Record:
    """One record as the released caption files spell it."""
    return {
        "id": f"{number:012d}",
        "image": image or f"coco/train2017/{number:012d}.jpg",
        "conversations": [
            {"from": "human", "value": "What do you see in this picture?\n<image>"},
            {"from": "gpt", "value": f"A red cup stands on table {number}.\nIt is *empty*."},
        ],
    }


def write_json(path: Path, records: Iterable[Any]) -> str:
    path.write_text(json.dumps(list(records)))
    return str(path)


def write_jsonl(path: Path, records: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run" / "manifest"
