"""Toy scenes as files: an image root that looks like the released ones, and the truth beside it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from sharegpt4v.errors import UserError
from sharegpt4v.toy.captions import brief_caption, detailed_caption
from sharegpt4v.toy.render import render
from sharegpt4v.toy.scene import Scene, make_scene
from sharegpt4v.toy.sources import SOURCES
from sharegpt4v.toy.truth import TRUTH_FILE

_JPEG_QUALITY = 92

SMALLEST = 96
"""Pixels of the longest side: smaller ones would be enlarged on their way into a toy model."""


def write_images(
    out_dir: Path,
    count: int,
    *,
    seed: int = 0,
    difficulty: int = 1,
    sources: Sequence[str] | None = None,
    longest_side: int | None = None,
) -> None:
    """Writes `count` images below `out_dir`, and TRUTH_FILE: a manifest with both captions and the truth.

    The same arguments give the same bytes. sources: taken in turn, all of SOURCES by default. longest_side:
    of every image, in pixels; None draws each at its source's size, which takes ten times as long as 128.
    Raises UserError for a count below one, an unknown source or difficulty, a side below SMALLEST.
    """
    for _ in iter_write_images(
        out_dir, count, seed=seed, difficulty=difficulty, sources=sources, longest_side=longest_side
    ):
        pass


def iter_write_images(
    out_dir: Path,
    count: int,
    *,
    seed: int = 0,
    difficulty: int = 1,
    sources: Sequence[str] | None = None,
    longest_side: int | None = None,
) -> Iterator[Scene]:
    """Does what write_images does, and yields each scene once its image is on disk, for progress bars."""
    if count < 1:
        raise UserError(f"{count} is too few: give 1 or more", field="count")
    if longest_side is not None and longest_side < SMALLEST:
        raise UserError(f"{longest_side} is too small: give {SMALLEST} or more", field="longest_side")
    names = tuple(sources or SOURCES)
    scenes = (make_scene(seed, i, source=names[i % len(names)], difficulty=difficulty) for i in range(count))
    return _written(out_dir, scenes, longest_side)


def _written(out_dir: Path, scenes: Iterable[Scene], longest_side: int | None) -> Iterator[Scene]:
    out_dir.mkdir(parents=True, exist_ok=True)
    with open(out_dir / TRUTH_FILE, "w", encoding="utf-8") as truth:
        for scene in scenes:
            path = out_dir / scene.path
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(render(scene, _size(scene, longest_side)), path)
            truth.write(json.dumps(truth_record(scene)) + "\n")
            yield scene


def _size(scene: Scene, longest_side: int | None) -> tuple[int, int] | None:
    if longest_side is None:
        return None
    share = longest_side / max(scene.width, scene.height)
    return round(share * scene.width), round(share * scene.height)


def truth_record(scene: Scene) -> dict[str, object]:
    """Returns one record of TRUTH_FILE; its id is the path below the root, as for a folder of images."""
    return {
        "id": scene.path,
        "image": scene.path,
        "source": scene.source,
        "caption": detailed_caption(scene),
        "brief": brief_caption(scene),
        "scene": scene.to_json(),
    }


def _save(image: Image.Image, path: Path) -> None:
    if path.suffix == ".png":
        image.save(path, compress_level=3)
    else:
        image.save(path, quality=_JPEG_QUALITY)
