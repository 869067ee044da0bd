"""A finished run folder as the caption job leaves it, with captions of a test's choice."""

import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from sharegpt4v import records

PROMPT = "Analyze the image in a comprehensive and detailed manner."
SETTINGS = {
    "root": "/images",
    "prompt_text": PROMPT,
    "fingerprint": {
        "model": "toy-captioner@0123",
        "prompt": f"caption@1: {PROMPT}",
        "protocol": "squash",
        "decoding.max_new_tokens": 500,
        "gate.min_characters": 20,
    },
    "versions": {"torch": "2.11.0", "vllm": None},
    "git_revision": "0123456789ab",
}


def caption(name: str, text: str, **other: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "image": f"{name}.jpg",
        "source": "coco",
        "caption": text,
        "prompt_id": "caption@1",
    }
    row |= {"model": "toy-captioner@0123", "tokens": len(text.split()) + 1, "finish_reason": "stop"}
    return row | {"attempt": 0, "image_sha256": "", "width": 64, "height": 48} | other


def reject(name: str, reason: str, **other: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "image": f"{name}.jpg",
        "source": "coco",
        "stage": "decode",
        "reason": reason,
    }
    return row | {"message": f"{name} is {reason}", "attempt": 0} | other


def write_images(root: Path, rows: list[dict[str, Any]], colour: str = "teal") -> None:
    """A real JPEG for each row, and its digest in the row."""
    for row in rows:
        path = root / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (row["width"], row["height"]), colour).save(path)
        row["image_sha256"] = sha256(path.read_bytes()).hexdigest()


def write_run(
    run: Path,
    captions: list[dict[str, Any]],
    rejects: list[dict[str, Any]] | None = None,
    part_rows: int = 1_000,
    settings: dict[str, Any] | None = None,
    **summary: Any,
) -> Path:
    """Write the folder with consistent counts; `settings` and `summary` override fields of the two files."""
    rejects = rejects or []
    whole_file = {"container": "", "offset": 0, "size": -1, "conversations": None}
    manifest = [
        {key: row[key] for key in ("id", "image", "source")} | whole_file for row in captions + rejects
    ]
    _write_parts(run / "manifest", manifest, records.MANIFEST, part_rows)
    _write_parts(run / "captions", captions, records.CAPTIONS, part_rows)
    _write_parts(run / "rejects", rejects, records.REJECTS, part_rows)
    (run / "run.yaml").write_text(yaml.safe_dump(SETTINGS | (settings or {})))
    content = _summary(captions, rejects) | summary
    (run / "summary.json").write_text(json.dumps(content))
    (run / "_SUCCESS").touch()
    return run


def _write_parts(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema, part_rows: int) -> None:
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), part_rows)):
        table = pa.Table.from_pylist(rows[start : start + part_rows], schema=schema)
        pq.write_table(table, folder / f"part-{number:05}.parquet")


def _summary(captions: list[dict[str, Any]], rejects: list[dict[str, Any]]) -> dict[str, Any]:
    rows = len(captions) + len(rejects)
    sources = {row["source"]: {"captions": 0, "rejects": 0} for row in captions + rejects}
    for kind, members in (("captions", captions), ("rejects", rejects)):
        for row in members:
            sources[row["source"]][kind] += 1
    lengths = sorted(len(row["caption"]) for row in captions) or [0]
    return {
        "rows": rows,
        "captions": len(captions),
        "rejects": len(rejects),
        "by_source": sources,
        "by_reason": dict(Counter(row["reason"] for row in rejects)),
        "reject_rate": len(rejects) / max(1, rows),
        "seconds": 12.5,
        "startup_seconds": 4.5,
        "wall_seconds": 12.5,
        "sessions": 1,
        "images_per_second": rows / 12.5,
        "tokens": sum(row["tokens"] for row in captions),
        "duplicates": 0,
        "duplicates_dropped": 0,
        "model": "toy-captioner@0123",
        "prompt_id": "caption@1",
        "engine": "torch",
        "root": "/images",
        "started": "2026-03-01T14:05:00+00:00",
        "finished": "2026-03-01T14:05:12+00:00",
        "commits": [{"time": 1772373905.0 + i, "rows": max(1, rows // 8)} for i in range(8)] if rows else [],
        "caption_characters": {
            "mean": sum(lengths) / len(lengths),
            "median": float(lengths[len(lengths) // 2]),
            "p95": float(lengths[int(0.95 * (len(lengths) - 1))]),
        },
    }
