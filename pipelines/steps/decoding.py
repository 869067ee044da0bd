"""The first step of captioning, as plain code that runs without Ray: pending rows to pixels at model size.

A batch of columns comes in and one goes out in the same order, one row for each image whatever happens to it:
an output in completion order loses and doubles rows when Ray repeats a call.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.steps.isolation import KILLED_WORKER, KILLED_WORKER_MESSAGE, Isolation, RunStopped
from pipelines.steps.ledger import LedgerClient
from pipelines.steps.pixel_memory import pixel_memory
from pipelines.steps.storage_faults import PUT_OFF, Place, most_fail
from sharegpt4v.dialogue import ImageProtocol
from sharegpt4v.errors import Rejected
from sharegpt4v.images import ImageReader, StorageError, prepare
from sharegpt4v.records import IDENTITY_COLUMNS, LOCATION_COLUMNS, OUTCOMES, PENDING


def decoded_schema(size: int) -> pa.Schema:
    """Returns the schema of Decode's output: identity, pixels (size, size, 3) uint8 RGB, reject reason."""
    return pa.schema(
        [
            *[PENDING.field(name) for name in IDENTITY_COLUMNS],
            pa.field("pixels", pa.fixed_shape_tensor(pa.uint8(), (size, size, 3))),
            *[OUTCOMES.field(name) for name in ("image_sha256", "width", "height", "reason", "message")],
        ]
    )


def read_row_group(batch: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads one row group: columns file and row_group (one row) in, that file's columns or `columns` out."""
    [place] = batch.to_pylist()
    return pq.ParquetFile(place["file"]).read_row_group(place["row_group"], columns=columns)


class Decode:
    """Bytes to uint8 pixels at model size.

    In: a table of records.PENDING. Out: a table of decoded_schema; a row that cannot be decoded has a reason,
    a message and black pixels. The reason is PUT_OFF where the storage failed: no fault of the row.
    """

    def __init__(
        self,
        reader: ImageReader,
        size: int,
        protocol: ImageProtocol,
        fast: bool,
        ledger: LedgerClient,
        sample: Sequence[Place] = (),
    ) -> None:
        """Takes a sample of all images: when most of it cannot be read, the run ends."""
        self._reader = reader
        self._size = size
        self._protocol = protocol
        self._fast = fast
        self._ledger = ledger
        self._sample = sample

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [_Decoded() for _ in range(len(batch))]
        ids = batch["id"].to_pylist()
        pixels = pixel_memory((len(batch), self._size, self._size, 3))
        places = list(zip(*(batch[name].to_pylist() for name in LOCATION_COLUMNS), strict=True))

        def work(positions: list[int]) -> None:
            for position in positions:
                rows[position] = self._decode(places[position], pixels[position])
                if rows[position].reason == PUT_OFF:
                    put_off(self._ledger, self._reader, self._sample, ids[position], rows[position].message)

        # A task has its process to itself, so the ledger's name for it may be as short-lived as the call.
        isolation = Isolation(self._ledger, "decode")
        for position in isolation.run(ids, work):
            rows[position] = _Decoded(reason=KILLED_WORKER, message=KILLED_WORKER_MESSAGE)
        for position, row in enumerate(rows):
            if row.reason:
                pixels[position] = 0
        columns = {
            **{name: batch[name] for name in IDENTITY_COLUMNS},
            "pixels": pa.FixedShapeTensorArray.from_numpy_ndarray(pixels),
            **{field.name: [getattr(row, field.name) for row in rows] for field in fields(_Decoded)},
        }
        schema = decoded_schema(self._size)
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def _decode(self, place: tuple[str, str, int, int], pixels: npt.NDArray[np.uint8]) -> "_Decoded":
        """Fills `pixels` (S, S, 3), or says why not."""
        digest = ""
        try:
            data = self._reader.read(*place)
            digest = hashlib.sha256(data).hexdigest()
            prepared = prepare(data, self._size, self._protocol, fast=self._fast)
        except Rejected as rejected:
            return _Decoded(digest, reason=rejected.reason, message=rejected.message)
        except StorageError as fault:
            return _Decoded(reason=PUT_OFF, message=str(fault))
        pixels[:] = prepared.pixels
        return _Decoded(digest, prepared.width, prepared.height)


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
