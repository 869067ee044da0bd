"""WebDataset shards: tar files of <key>.<jpg|png|...>, <key>.txt and <key>.json.

A key is the row's number, because an id may hold dots, slashes or newlines, which part a name for tar
readers; the id stands in the JSON member.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any

from sharegpt4v.captions import parts
from sharegpt4v.captions.parts import Location
from sharegpt4v.errors import Rejected, UserError
from sharegpt4v.images import ImageLimits, ImageReader, StorageError
from sharegpt4v.images.formats import Format, check_file

SHARD_SAMPLES = 10_000
SHARD_BYTES = 1_000_000_000
"""A shard is closed before it grows beyond either."""

EXTENSIONS: dict[Format, str] = {
    **{"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"},
    **{"AVIF": "avif", "HEIF": "heic"},
}
"""What the bytes are, whatever the file was called, to the extension that readers decode by."""

READERS = 8
"""Images read at once: storage waits, not the processor, bound a remote root."""

Member = tuple[str, bytes]
"""Extension and content of one file of a sample."""


def write(run: Path, out: Path, root: str | None) -> None:
    """Write train-*.tar below `out`, in the captions' order.

    Raises UserError naming the ids whose images cannot be read, or are not the ones that were captioned.
    """
    out.mkdir()
    shards = _Shards(out)
    try:
        for number, members in enumerate(_samples(run, ImageReader(root))):
            shards.add(f"{number:09}", members)
    finally:
        shards.close()


class _Shards:
    """The tar file being written, replaced by the next one when it is full."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._bytes = 0

    def add(self, key: str, members: Sequence[Member]) -> None:
        size = sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for _, data in members)
        if self._samples == SHARD_SAMPLES or self._bytes + size > SHARD_BYTES - tarfile.RECORDSIZE:
            self.close()
        if self._tar is None:
            path = self._folder / f"train-{self._count:06}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
            self._count += 1
        for extension, data in members:
            # Owner and time stay zero: the same run gives the same bytes on every machine.
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._samples += 1
        self._bytes += size

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._tar, self._samples, self._bytes = None, 0, 0


def _samples(run: Path, reader: ImageReader) -> Iterator[list[Member]]:
    """The members of each sample; images are read a few dozen at a time, so memory stays flat."""
    with ThreadPoolExecutor(READERS) as pool:
        for batch in parts.batches(run, "captions"):
            places = parts.locations(run, batch.column("id").to_pylist())
            for start in range(0, len(batch), 4 * READERS):
                rows = batch.slice(start, 4 * READERS).to_pylist()
                digests = [row["image_sha256"] for row in rows]
                images = pool.map(_read, repeat(reader), digests, [places[row["id"]] for row in rows])
                samples, broken = [], []
                for row, image in zip(rows, images, strict=True):
                    if isinstance(image, bytes):
                        samples.append(_members(row, image))
                    else:
                        broken.append(f"{row['id']!r}: {image}")
                if broken:
                    raise UserError(
                        f"{len(broken)} or more images cannot be exported ({'; '.join(broken[:3])}): restore "
                        f"them below --root, or choose llava-json or hf, which need no images"
                    )
                yield from samples


def _read(reader: ImageReader, digest: str, place: Location) -> bytes | Exception:
    """The bytes that were captioned, or why there are none."""
    try:
        data = reader.read(place.image, place.container, place.offset, place.size)
    except (Rejected, StorageError) as error:
        return error
    return data if sha256(data).hexdigest() == digest else ValueError("changed since it was captioned")


def _members(row: dict[str, Any], image: bytes) -> list[Member]:
    return [
        (EXTENSIONS[check_file(image, ImageLimits())], image),
        ("txt", row.pop("caption").encode()),
        ("json", json.dumps(row, ensure_ascii=False).encode()),
    ]
