"""A folder of images as a manifest: every image below it, in the order of their paths."""

import os
from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from sharegpt4v.errors import UserError
from sharegpt4v.manifest.locate import Located, is_hidden, is_image, is_text, suffix
from sharegpt4v.manifest.rows import BATCH_ROWS, raw_batch
from sharegpt4v.manifest.stored import note

CHUNK = 65536  # names held as Python strings at a time; sorted in Arrow they take a sixth of the memory


def read_folder(located: Located) -> Iterator[pa.RecordBatch]:
    """Yields RAW batches with `image` alone, sorted by path: the manifest is the same on every disk.

    Hidden files are skipped. Other files, linked folders (their images would lie outside the root) and names
    that are not UTF-8 are counted in located.ignored. Raises UserError where no image is found.
    """
    walk = _walk_local(located) if located.is_local else _walk_remote(located)
    paths = _arrow(walk, located.ignored)
    if not len(paths):
        others = ", ".join(f"{count} {kind}" for kind, count in located.ignored.most_common(5)) or "nothing"
        raise UserError(
            f"{located.name} holds no image (found: {others}); give a folder with images or a manifest"
        )
    order = pc.sort_indices(paths)
    for start in range(0, len(order), BATCH_ROWS):
        part = paths.take(order.slice(start, BATCH_ROWS))
        yield raw_batch(image=part.combine_chunks())


def _walk_local(located: Located) -> Iterator[str]:
    """Yields the paths of the images below a folder, in no order."""
    waiting, ignored = [""], located.ignored
    while waiting:
        below = waiting.pop()
        here = os.path.join(located.folder, below)
        note(located, here)
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{below}{entry.name}/")
                elif is_image(entry.name):
                    yield below + entry.name
                else:
                    ignored[_kind(entry)] += 1


def _kind(entry: os.DirEntry[str]) -> str:
    """Says what an entry that is no image is passed over as."""
    try:
        linked_folder = entry.is_dir()
    except OSError:  # a link to itself, or into a folder that this user may not enter
        return "link that leads nowhere"
    return "linked folder" if linked_folder else suffix(entry.name) or "no suffix"


def _walk_remote(located: Located) -> Iterator[str]:
    base = located.folder.rstrip("/") + "/"
    located.seen[located.folder] = None  # a folder of objects has nothing that changes with its entries
    for path in located.fs.find(located.folder):
        relative = str(path).removeprefix(base)
        if is_hidden(relative):
            continue
        if is_image(relative):
            yield relative
        else:
            located.ignored[suffix(relative) or "no suffix"] += 1


def _arrow(paths: Iterator[str], ignored: Counter[str]) -> pa.ChunkedArray:
    chunks: list[pa.Array] = []
    waiting: list[str] = []
    for path in paths:
        if path.isascii() or is_text(path):
            waiting.append(path)
        else:
            ignored["name not UTF-8"] += 1
        if len(waiting) == CHUNK:
            chunks.append(pa.array(waiting, pa.string()))
            waiting.clear()
    chunks.append(pa.array(waiting, pa.string()))
    return pa.chunked_array(chunks)
