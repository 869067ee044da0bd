"""A wrong root, found by a few images before an export reads or names a million."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sharegpt4v.captions import parts
from sharegpt4v.captions.export.caption_set import CaptionSet
from sharegpt4v.captions.export.images import READERS, read_captioned
from sharegpt4v.images import ImageReader

LOOKED_AT = 8
"""Rows spread evenly over the run; the first row of each source, of as many sources, comes on top."""


def unusable_images(captions: CaptionSet, *, same_bytes: bool) -> str | None:
    """Reads a few images of every source below the root and says what is wrong with them, or None.

    same_bytes: an image that was replaced since it was captioned is wrong, too; else it has only to be there.
    """
    rows = list(_spread(captions))
    places = parts.locations(captions.folder, [row["id"] for row in rows])
    reader = ImageReader(captions.root)

    def read(row: dict[str, Any]) -> bytes | Exception:
        return read_captioned(reader, places[row["id"]], row["image_sha256"] if same_bytes else None)

    with ThreadPoolExecutor(READERS) as pool:
        images = list(pool.map(read, rows))
    wrong = [(row, image) for row, image in zip(rows, images, strict=True) if isinstance(image, Exception)]
    if not wrong:
        return None
    row, error = wrong[0]
    name = places[row["id"]].container or places[row["id"]].image
    path = name if "://" in name else f"{captions.root}/{name}"
    return f"{len(wrong)} of {len(rows)} images looked at cannot be used, {row['id']!r} at {path} ({error})"


def _spread(captions: CaptionSet) -> Iterator[dict[str, Any]]:
    wanted = {int(row) for row in np.linspace(0, captions.rows - 1, LOOKED_AT)}
    sources: set[str] = set()
    start = 0
    for batch in captions.batches(["id", "source", "image_sha256"]):
        names = batch.column("source")
        inside = {row - start for row in wanted if start <= row < start + len(batch)}
        for source in names.unique().to_pylist():
            if source not in sources and len(sources) < LOOKED_AT:
                sources.add(source)
                inside.add(names.index(source).as_py())
        for row in sorted(inside):
            yield batch.slice(row, 1).to_pylist()[0]
        start += len(batch)
