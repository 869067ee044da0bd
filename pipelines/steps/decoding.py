"""The first step of captioning, as plain code that runs without Ray: pending rows to pixels.

A batch of columns comes in and one goes out in the same order, one row for each image whatever happens to it:
an output in completion order loses and doubles rows when Ray repeats a call.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.steps.isolation import KILLED_WORKER, KILLED_WORKER_MESSAGE, Isolation, RunStopped
from pipelines.steps.ledger import LedgerClient
from pipelines.steps.pixel_memory import pixel_memory
from pipelines.steps.storage_faults import PUT_OFF, Place, most_fail
from sharegpt4v.dialogue import Image, ImageShape, SquareImages
from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError, prepare_shape
from sharegpt4v.records import IDENTITY_COLUMNS, LOCATION_COLUMNS, OUTCOMES, PENDING


def decoded_schema(shape: ImageShape) -> pa.Schema:
    """Returns the schema of Decode's output: identity, uint8 RGB pixels, reject reason.

    pixels: (side, side, 3) of squares; of whole images the bytes of (pixel_rows, W, 3), empty where none
    could be decoded.
    """
    if isinstance(shape, SquareImages):
        pixels = [pa.field("pixels", pa.fixed_shape_tensor(pa.uint8(), (shape.side, shape.side, 3)))]
    else:
        pixels = [pa.field("pixels", pa.large_binary()), pa.field("pixel_rows", pa.int32())]
    return pa.schema(
        [
            *[PENDING.field(name) for name in IDENTITY_COLUMNS],
            *pixels,
            *[OUTCOMES.field(name) for name in ("image_sha256", "width", "height", "reason", "message")],
        ]
    )


def read_row_group(batch: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one row group: columns file and row_group (one row) in, that file's columns or `columns` out."""
    [place] = batch.to_pylist()
    return pq.ParquetFile(place["file"]).read_row_group(place["row_group"], columns=columns)


def pixels_of(batch: pa.Table) -> Sequence[Image]:
    """Returns the images (H, W, 3) of a table of decoded_schema without copying them, row by row."""
    column = batch["pixels"]  # one chunk as a rule, and combine_chunks would copy even that
    if not pa.types.is_large_binary(column.type):
        squares = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        return cast(Sequence[Image], squares.to_numpy_ndarray())
    flat = (np.frombuffer(value.as_buffer(), np.uint8) for value in column)
    rows = batch["pixel_rows"].to_pylist()
    return [pixels.reshape(max(1, height), -1, 3) for pixels, height in zip(flat, rows, strict=True)]


class Decode:
    """Bytes to uint8 pixels in the shape that the engine takes.

    In: a table of records.PENDING. Out: a table of decoded_schema; a row that cannot be decoded has a reason,
    a message and black pixels, or none. The reason is PUT_OFF where the storage failed: no fault of the row.
    """

    def __init__(
        self,
        reader: ImageReader,
        shape: ImageShape,
        fast: bool,
        ledger: LedgerClient,
        sample: Sequence[Place] = (),
    ) -> None:
        """Takes a sample of all images: when most of it cannot be read, the run ends."""
        self._reader = reader
        self._shape = shape
        self._fast = fast
        self._ledger = ledger
        self._sample = sample

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [_Decoded() for _ in range(len(batch))]
        ids = batch["id"].to_pylist()
        pixels = (
            _Squares(len(batch), self._shape.side)
            if isinstance(self._shape, SquareImages)
            else _Whole(len(batch))
        )
        places = list(zip(*(batch[name].to_pylist() for name in LOCATION_COLUMNS), strict=True))

        def work(positions: list[int]) -> None:
            for position in positions:
                rows[position], image = self._decode(places[position])
                pixels.set(position, image)
                if rows[position].reason == PUT_OFF:
                    put_off(self._ledger, self._reader, self._sample, ids[position], rows[position].message)

        # A task has its process to itself, so the ledger's name for it may be as short-lived as the call.
        isolation = Isolation(self._ledger, "decode")
        for position in isolation.run(ids, work):
            rows[position] = _Decoded(reason=KILLED_WORKER, message=KILLED_WORKER_MESSAGE)
            pixels.set(position, None)
        columns = {
            **{name: batch[name] for name in IDENTITY_COLUMNS},
            **pixels.columns(),
            **{field.name: [getattr(row, field.name) for row in rows] for field in fields(_Decoded)},
        }
        schema = decoded_schema(self._shape)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _decode(self, place: tuple[str, str, int, int]) -> "tuple[_Decoded, Image | None]":
        """Returns the pixels (H, W, 3), or why there are none."""
        digest = ""
        try:
            data = self._reader.read(*place)
            digest = hashlib.sha256(data).hexdigest()
            prepared = prepare_shape(data, self._shape, fast=self._fast)
        except Rejected as rejected:
            return _Decoded(digest, reason=rejected.reason, message=rejected.message), None
        except StorageError as fault:
            return _Decoded(reason=PUT_OFF, message=str(fault)), None
        return _Decoded(digest, prepared.width, prepared.height), prepared.pixels


class _Squares:
    """The pixels of a batch in one piece of memory; black where there are none."""

    def __init__(self, count: int, side: int) -> None:
        self._pixels = pixel_memory((count, side, side, 3))

    def set(self, position: int, image: "Image | None") -> None:
        self._pixels[position] = 0 if image is None else image

    def columns(self) -> dict[str, pa.Array]:
        return {"pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(self._pixels)}


class _Whole:
    """The pixels of a batch, each in its own shape; empty where there are none."""

    def __init__(self, count: int) -> None:
        self._images: list[Image | None] = [None] * count

    def set(self, position: int, image: "Image | None") -> None:
        self._images[position] = image

    def columns(self) -> dict[str, pa.Array]:
        images = self._images
        data = [b"" if image is None else image.tobytes() for image in images]
        rows = [0 if image is None else len(image) for image in images]
        return {"pixels": pa.array(data, pa.large_binary()), "pixel_rows": pa.array(rows, pa.int32())}


def put_off(
    ledger: LedgerClient, reader: ImageReader, sample: Sequence[Place], key: str, message: str | None
) -> None:
    """Notes an image whose storage failed. Raises RunStopped where it is not this image's alone."""
    step = ledger.put_off(key, message or "")
    cause = most_fail(reader, sample) if step == "look" else None
    if cause:
        ledger.give_up(cause)
    if cause or step == "stop":
        raise RunStopped(cause or message)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The columns of decoded_schema that decoding finds out, but for the pixels."""

    image_sha256: str = ""
    width: int = 0
    height: int = 0
    reason: str | None = None
    message: str | None = None
