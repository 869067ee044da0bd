"""Locations of captioned images: the manifest is read once, however many batches of captions."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sharegpt4v.captions import parts
from sharegpt4v.captions.export.write import export_run
from sharegpt4v.config.export import ExportFormat
from sharegpt4v.errors import UserError
from sharegpt4v.records import MANIFEST
from tests.captions.fake_run import caption, reject, write_images, write_run


def manifest_run(folder: Path, ids: list[str], part_rows: int) -> Path:
    whole = {"source": "coco", "container": "", "offset": 0, "size": -1, "conversations": None}
    rows = [{"id": name, "image": f"{name}.jpg"} | whole for name in ids]
    (folder / "manifest").mkdir(parents=True)
    for number, start in enumerate(range(0, len(rows), part_rows)):
        table = pa.Table.from_pylist(rows[start : start + part_rows], schema=MANIFEST)
        pq.write_table(table, folder / "manifest" / f"part-{number:05}.parquet")
    return folder


@pytest.mark.parametrize("part_rows", [1, 7, 100])
@pytest.mark.parametrize("batch_rows", [1, 4, 50])
def test_places_of_some_rows_are_those_of_the_manifest(
    part_rows: int, batch_rows: int, tmp_path: Path
) -> None:
    ids = [f"{number:03}" for number in range(50)]
    run = manifest_run(tmp_path / "run", ids, part_rows)
    wanted = [name for name in ids if int(name) % 3]  # the others are rejects
    locations = parts.Locations(run)
    for start in range(0, len(wanted), batch_rows):
        batch = wanted[start : start + batch_rows]
        found = locations.after_the_last(pa.array(batch))
        assert [place.image for place in found] == [f"{name}.jpg" for name in batch]


@pytest.mark.parametrize("wanted", [["b", "a"], ["a", "gone"], ["c", "d", "b"]])
def test_ids_in_another_order_than_the_manifests_are_refused(wanted: list[str], tmp_path: Path) -> None:
    run = manifest_run(tmp_path / "run", ["a", "b", "c", "d"], 2)
    with pytest.raises(UserError, match="in the order of its captions: another command works on the run"):
        parts.Locations(run).after_the_last(pa.array(wanted))


@pytest.mark.parametrize("target", ["webdataset", "hf"])
def test_export_with_images_reads_the_manifest_in_one_pass(
    target: ExportFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [caption(f"{number}", "text") for number in range(6)]
    write_images(tmp_path / "images", rows)
    settings = {"root": str(tmp_path / "images")}
    run = write_run(tmp_path / "run", rows, [reject("gone", "missing")], part_rows=1, settings=settings)
    passes: list[str] = []
    paths = parts.paths

    def counted(run: Path, kind: parts.Kind) -> list[Path]:
        passes.append(kind)
        return paths(run, kind)

    monkeypatch.setattr(parts, "paths", counted)
    export_run(run, target, tmp_path / "out", with_images=True)
    assert passes.count("manifest") == 2  # the look at a few images that the root is right, and the export
