"""Images as they were captioned: read again, and compared with the digest that the captioner noted."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import repeat, tee
from typing import Any

from sharegpt4v.captions import parts
from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.parts import Location
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageReader, StorageError

READERS = 8
"""Images read at once: storage waits, not the processor, bound a remote root."""

_AHEAD = 4 * READERS
"""Images in memory at once."""


def captioned_images(captions: CaptionSet) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yields every row of records.CAPTIONS in order with its image file's bytes, and reports the progress.

    Raises UserError naming the ids whose images cannot be read, or are not the ones that were captioned.
    """
    reader = ImageReader(captions.root)
    with ThreadPoolExecutor(READERS) as pool:
        batches, again = tee(captions.batches())
        places = parts.locations_in_order(captions.folder, (batch["id"] for batch in again))
        for batch, located in zip(batches, places, strict=True):
            for start in range(0, len(batch), _AHEAD):
                rows = batch.slice(start, _AHEAD).to_pylist()
                digests = [row["image_sha256"] for row in rows]
                where = located[start : start + _AHEAD]
                images = list(pool.map(read_captioned, repeat(reader), where, digests))
                _refuse_broken(rows, images)
                for row, image in zip(rows, images, strict=True):
                    assert isinstance(image, bytes)
                    yield row, image
                    captions.advance(1)


def read_captioned(reader: ImageReader, place: Location, digest: str | None) -> bytes | Exception:
    """Reads the bytes of this digest (None: whatever is there), or says why there are none."""
    try:
        data = reader.read(place.image, place.container, place.offset, place.size)
    except (Rejected, StorageError) as error:
        return error
    same = digest is None or sha256(data).hexdigest() == digest
    return data if same else Rejected("changed", "other bytes than those that were captioned")


def _refuse_broken(rows: list[dict[str, Any]], images: list[bytes | Exception]) -> None:
    broken = [
        f"{row['id']!r}: {image}"
        for row, image in zip(rows, images, strict=True)
        if isinstance(image, Exception)
    ]
    if broken:
        raise UserError(
            f"{len(broken)} or more images cannot be exported ({'; '.join(broken[:3])}): restore them below "
            f"`root`, or export without images (llava-json, messages, hf)"
        )
