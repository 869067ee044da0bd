"""WebDataset shards: tar files of <key>.<jpg|png|...>, <key>.txt and <key>.json.

A key is the row's number, because an id may hold dots, slashes or newlines, which part a name for tar
readers; the id is in the JSON member.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.export.card import COLUMNS, card
from sharegpt4v.captions.export.images import captioned_images
from sharegpt4v.images import ImageLimits
from sharegpt4v.images.formats import Format, check_file

SHARD_SAMPLES = 10_000
SHARD_BYTES = 1_000_000_000
"""A shard is closed before it grows beyond either."""

EXTENSIONS: dict[Format, str] = {
    **{"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"},
    **{"AVIF": "avif", "HEIF": "heic"},
}
"""What the bytes are, whatever the file was called, to the extension that readers decode by."""

_USAGE = """\
`jpg` (or another image format), `txt` and `json` of one key belong together: the image file as it was
captioned, the caption, and the other columns.

```python
import webdataset as wds

samples = wds.WebDataset("path/to/this/folder/train-{{000000..{last:06}}}.tar").decode("pil")
```"""

Member = tuple[str, bytes]
"""Extension and content of one file of a sample."""


def write(captions: CaptionSet, out: Path) -> None:
    """Writes train-*.tar, in the captions' order, and README.md below `out`.

    Raises UserError naming the ids whose images cannot be read, or are not the ones that were captioned.
    """
    out.mkdir()
    shards = _Shards(out)
    try:
        for number, (row, image) in enumerate(captioned_images(captions)):
            shards.add(f"{number:09}", _members(row, image))
    finally:
        shards.close()
    columns = {**COLUMNS, "image": "path that the image had below its root, or its URI"}
    usage = _USAGE.format(last=shards.count - 1)
    text = card(captions, data_files="train-*.tar", columns=columns, usage=usage)
    (out / "README.md").write_text(text, encoding="utf-8")


class _Shards:
    """The tar file being written, replaced by the next one when it is full. count: files begun."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._folder = folder
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._bytes = 0

    def add(self, key: str, members: Sequence[Member]) -> None:
        size = sum(tarfile.BLOCKSIZE * (1 + -(-len(data) // tarfile.BLOCKSIZE)) for _, data in members)
        if self._samples == SHARD_SAMPLES or self._bytes + size > SHARD_BYTES - tarfile.RECORDSIZE:
            self.close()
        if self._tar is None:
            path = self._folder / f"train-{self.count:06}.tar"
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)
            self.count += 1
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


def _members(row: dict[str, Any], image: bytes) -> list[Member]:
    return [
        (EXTENSIONS[check_file(image, ImageLimits())], image),
        ("txt", row.pop("caption").encode()),
        ("json", json.dumps(row, ensure_ascii=False).encode()),
    ]
