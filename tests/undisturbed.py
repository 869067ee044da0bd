"""One set of images and how it is captioned: a run that is killed or distributed has to equal a plain one."""

from pathlib import Path

from PIL import Image

from tests.commands import rows, write_images

IMAGES = 160
PER_COMMIT = 2
COMMITS = IMAGES // PER_COMMIT


def make_images(folder: Path) -> None:
    """Good ones, one that is no image, and four that take a while to decode."""
    write_images(folder, [f"coco/{index:03}.jpg" for index in range(IMAGES)])
    for index in range(4):
        Image.new("RGB", (5000, 5000), (60 * index, 90, 120)).save(folder / "coco" / f"00{index}.jpg")
    (folder / "coco" / "100.jpg").write_bytes(b"<html>not found</html>")


def arguments(images: Path, run: Path, seconds: float) -> list[str]:
    """One caption passes at the second attempt only, one never. seconds: for each, one after another.

    They change no row.
    """
    return [
        *("caption", "--images", str(images), "--out", str(run), "--engine", "fake"),
        *("--fake.seconds-per-request", str(seconds), "--fake.requests-at-once", "1"),
        *("--rows-per-commit", str(PER_COMMIT)),
        *("--fake.faults", '{"once": "110", "refusal": "120"}', "--fake.image-side", "24"),
    ]


def assert_same_outcome(run: Path, undisturbed: Path) -> None:
    """Every id once, in the same order, with the same caption or reason; and the run is finished."""
    assert (run / "_SUCCESS").exists()
    for part in ("captions", "rejects"):
        assert rows(run, part).equals(rows(undisturbed, part)), part
