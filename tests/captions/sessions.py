"""A run folder under way: its manifest, and outcomes as sessions leave them."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.captions.layout import CaptionRun
from sharegpt4v.records import MANIFEST, OUTCOMES


def begin(path: Path, *shards: list[str]) -> CaptionRun:
    """A manifest with these ids, a list for each shard."""
    run = CaptionRun(path)
    run.manifest.mkdir(parents=True)
    for ids in shards:
        add_shard(run, ids)
    return run


def add_shard(run: CaptionRun, ids: list[str]) -> None:
    rows = [
        {"id": key, "image": f"{key}.jpg", "source": "coco", "container": "", "offset": 0, "size": -1}
        for key in ids
    ]
    path = run.manifest / f"part-{len(run.shards()):05}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, MANIFEST), path)


def caption(run: CaptionRun, key: str, text: str = "A red cup on a table.") -> dict[str, Any]:
    fields = {"outcome": "caption", "caption": text, "prompt_id": "p@1", "model": "m@1", "tokens": 7}
    return _place(run, key) | fields | {"finish_reason": "stop", "attempt": 0}


def reject(
    run: CaptionRun, key: str, reason: str = "missing", attempt: int = 0, caption: str | None = None
) -> dict[str, Any]:
    fields = {"outcome": "reject", "stage": "decode", "reason": reason, "message": f"{key} is {reason}"}
    return _place(run, key) | fields | {"attempt": attempt, "caption": caption}


def commit(
    run: CaptionRun, session: int, name: str, *rows: dict[str, Any], time: float | None = None
) -> Path:
    """One file of work/outcomes, written at `time` (seconds since 1970)."""
    path = run.outcomes / f"{session:04}" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), OUTCOMES), path)
    if time is not None:
        os.utime(path, (time, time))
    return path


def _place(run: CaptionRun, key: str) -> dict[str, Any]:
    for number, path in enumerate(run.shards()):
        ids = pq.read_table(path)["id"].to_pylist()
        if key in ids:
            common = {"id": key, "image": f"{key}.jpg", "source": "coco", "image_sha256": "0"}
            return common | {"shard": number, "row": ids.index(key), "width": 64, "height": 48}
    raise KeyError(key)
