"""A folder that `datasets.load_dataset(folder)` reads and the Hugging Face hub shows: Parquet and a card."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.export.card import COLUMNS, card
from sharegpt4v.captions.export.images import captioned_images
from sharegpt4v.records import CAPTIONS

SHARD_BYTES = 500_000_000
"""Data in one file, before compression; the hub asks for files well below 5 GB."""

GROUP_IMAGES = 100
GROUP_BYTES = 32_000_000
"""Rows with images written at once, whichever comes first: they are in memory here and in every reader."""

IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
"""How `datasets` stores its Image feature."""

_IMAGE_COLUMNS = {
    "image": "the image file as it was captioned",
    "image_path": "path of the image below its root, or its URI",
}

_USAGE = """\
```python
from datasets import load_dataset

captions = load_dataset("path/to/this/folder", split="train")
```"""


def write(captions: CaptionSet, out: Path) -> None:
    """Writes data/train-*.parquet with the columns of `records.CAPTIONS`, and README.md, below `out`.

    With images, `image` is the Image feature of `datasets`, and `image_path` names the file.
    Raises UserError naming the ids whose images cannot be read, or are not the ones that were captioned.
    """
    (out / "data").mkdir(parents=True)
    if captions.with_images:
        _write_files(_with_images(captions), image_schema(), out / "data")
    else:
        _write_files(_without_images(captions), CAPTIONS, out / "data")
    columns = {**COLUMNS, **(_IMAGE_COLUMNS if captions.with_images else {})}
    text = card(captions, data_files="data/train-*.parquet", columns=columns, usage=_USAGE)
    (out / "README.md").write_text(text, encoding="utf-8")


def image_schema() -> pa.Schema:
    """Returns CAPTIONS with bytes in `image`, `image_path` added, and the metadata that `datasets` reads."""
    fields = [pa.field("image", IMAGE) if field.name == "image" else field for field in CAPTIONS]
    fields.append(pa.field("image_path", pa.string()))
    features = {
        field.name: {"_type": "Image"}
        if field.name == "image"
        else {"_type": "Value", "dtype": str(field.type)}
        for field in fields
    }
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _without_images(captions: CaptionSet) -> Iterator[pa.RecordBatch]:
    for batch in captions.batches():
        yield batch
        captions.advance(len(batch))


def _with_images(captions: CaptionSet) -> Iterator[pa.RecordBatch]:
    schema = image_schema()
    rows: list[dict[str, Any]] = []
    size = 0
    for row, image in captioned_images(captions):
        path = row["image"]
        row |= {"image": {"bytes": image, "path": PurePosixPath(path).name}, "image_path": path}
        if rows and (len(rows) == GROUP_IMAGES or size + len(image) > GROUP_BYTES):
            yield pa.RecordBatch.from_pylist(rows, schema)
            rows, size = [], 0
        rows.append(row)
        size += len(image)
    yield pa.RecordBatch.from_pylist(rows, schema)


def _write_files(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path) -> None:
    """Writes one row group a batch and a new file where one is full; names tell how many files there are."""
    writer: pq.ParquetWriter | None = None
    files: list[Path] = []
    size = 0
    try:
        for batch in batches:
            if writer is None or size + batch.nbytes > SHARD_BYTES:
                if writer is not None:
                    writer.close()
                files.append(folder / f"{len(files):05}")
                writer, size = pq.ParquetWriter(files[-1], schema, compression="zstd"), 0
            writer.write_batch(batch)
            size += batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    for number, file in enumerate(files):
        file.rename(folder / f"train-{number:05}-of-{len(files):05}.parquet")
