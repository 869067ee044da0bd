"""A root that is not the run's is found by a few images, before anything is written."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from sharegpt4v.captions import parts
from sharegpt4v.captions.export.write import FORMATS, export_run
from sharegpt4v.config.export import ExportFormat
from sharegpt4v.errors import UserError
from tests.captions.fake_run import caption, write_images, write_run

NAMES_ALONE: list[ExportFormat] = ["llava-json", "messages", "hf"]
HOLD: list[tuple[ExportFormat, bool]] = [("webdataset", False), ("hf", True)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "images"


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Path:
    """A hundred images of coco, one of sam in the middle where no even spread meets it."""
    rows = [caption(f"{n:03}", "text", image=f"coco/{n:03}.jpg") for n in range(101)]
    rows[51] = caption("051", "text", source="sam", image="sam/051.jpg")
    write_images(root, rows)
    return write_run(tmp_path / "run", rows, part_rows=40, settings={"root": str(root)})


@pytest.mark.parametrize("target", list(FORMATS))
def test_a_wrong_root_is_refused_naming_root_id_and_path(
    target: ExportFormat, run: Path, root: Path, tmp_path: Path
) -> None:
    wrong = root / "coco"  # one folder too deep: what people mistype
    with pytest.raises(UserError, match=f"9 of 9 images .* '000' at {wrong}/coco/000.jpg .*`root`"):
        export_run(run, target, tmp_path / "out", root=str(wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", list(FORMATS))
def test_a_root_without_one_of_the_sources_is_refused(
    target: ExportFormat, run: Path, root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root / "sam")

    with pytest.raises(UserError, match=f"1 of 9 images .* '051' at {root}/sam/051.jpg"):
        export_run(run, target, tmp_path / "out", root=str(root))


@pytest.mark.parametrize(("target", "with_images"), HOLD)
def test_a_root_with_other_images_of_these_names_is_refused_where_they_are_held(
    target: ExportFormat, with_images: bool, run: Path, root: Path, tmp_path: Path
) -> None:
    for path in root.rglob("*.jpg"):
        Image.new("RGB", (64, 48), "red").save(path)

    with pytest.raises(UserError, match="9 of 9 images .*other bytes"):
        export_run(run, target, tmp_path / "out", root=str(root), with_images=with_images)


@pytest.mark.parametrize("target", NAMES_ALONE)
def test_resized_images_may_be_named(target: ExportFormat, run: Path, root: Path, tmp_path: Path) -> None:
    for path in root.rglob("*.jpg"):
        Image.new("RGB", (32, 24), "teal").save(path)

    assert export_run(run, target, tmp_path / "out", root=str(root)).captions == 101


@pytest.mark.parametrize(("target", "with_images"), HOLD)
def test_a_run_whose_images_moved_asks_for_the_root(
    target: ExportFormat, with_images: bool, run: Path, root: Path, tmp_path: Path
) -> None:
    root.rename(tmp_path / "moved")

    with pytest.raises(UserError, match=f"'000' at {root}/coco/000.jpg .*`root`"):
        export_run(run, target, tmp_path / "out", with_images=with_images)
    export_run(run, target, tmp_path / "out", with_images=with_images, root=str(tmp_path / "moved"))


def test_messages_say_where_paths_lead_nowhere(run: Path, root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / "moved")

    (note,) = export_run(run, "messages", tmp_path / "out").notes
    assert f"'000' at {root}/coco/000.jpg" in note and "`root`" in note
    assert not export_run(run, "messages", tmp_path / "again", root=str(tmp_path / "moved")).notes


@pytest.mark.parametrize("target", ["llava-json", "hf"])
def test_paths_below_no_root_in_particular_need_no_images(
    target: ExportFormat, run: Path, root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(root)

    assert not export_run(run, target, tmp_path / "out").notes


@pytest.mark.parametrize(("target", "with_images"), HOLD)
def test_images_are_located_in_one_pass_over_the_manifest(
    target: ExportFormat, with_images: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    paths = parts.paths

    def counted(folder: Path, kind: parts.Kind) -> list[Path]:
        passes.append(kind)
        return paths(folder, kind)

    monkeypatch.setattr(parts, "paths", counted)
    export_run(run, target, tmp_path / "out", with_images=with_images)
    assert passes.count("manifest") == 2  # the look at a few images that the root is right, and the export
