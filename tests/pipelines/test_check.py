"""`sharegpt4v check`: the step by itself, every kind of manifest on Ray, and the command."""

import json
import tarfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.steps.check_job
from cluster.session import ray_session
from pipelines.check import main as check
from pipelines.steps.check_job import Inspect, look
from pipelines.steps.isolation import RunStopped
from pipelines.steps.ledger import Ledger
from pipelines.steps.phases import Phases
from pipelines.steps.storage_faults import JUDGED_AFTER
from sharegpt4v.errors import RunFailed
from sharegpt4v.images import ImageReader, StorageError, storage
from sharegpt4v.inspection import INSPECTED, Inspection
from sharegpt4v.manifest import Manifest, normalise
from sharegpt4v.manifest.writer import shards
from tests.commands import rows, sharegpt4v, write_images
from tests.images.every_kind import BAD, write_bad, write_odd
from tests.pipelines.steps.pending_rows import pending_rows


def test_the_step_gives_one_row_an_image_in_order(tmp_path: Path) -> None:
    write_images(tmp_path, ["b.jpg", "a.jpg"])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-50])
    ledger = Ledger(1.0)
    table = Inspect(ImageReader(str(tmp_path)), ledger)(pending_rows("b.jpg", "gone.jpg", "cut.jpg", "a.jpg"))
    assert table.schema == INSPECTED
    assert table["id"].to_pylist() == [f"id of {name}" for name in ("b.jpg", "gone.jpg", "cut.jpg", "a.jpg")]
    assert table["reason"].to_pylist() == [None, "missing", "truncated", None]
    assert len(set(table["digest"].to_pylist())) == 4
    assert table["digest"][1].as_py() == bytes(16)
    tally = ledger.tally()
    assert (tally.captions, tally.rejects, tally.reasons) == (2, 2, {"missing": 1, "truncated": 1})


def test_an_image_that_kills_its_process_is_a_finding(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.jpg", "poison.jpg"])
    ledger = Ledger(1.0)
    for worker in ("first", "second", "third"):
        ledger.begin(worker, ["check:id of poison.jpg"])
        ledger.begin_alone(worker, "check:id of poison.jpg")
    table = Inspect(ImageReader(str(tmp_path)), ledger)(pending_rows("poison.jpg", "a.jpg"))
    assert table["reason"].to_pylist() == ["killed_worker", None]


def test_an_image_whose_storage_fails_is_unread_and_the_others_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_DELAYS", ())
    write_images(tmp_path, ["a.jpg"])
    dead = [f"http://127.0.0.1:9/{number}.jpg" for number in range(JUDGED_AFTER)]
    rows, reader = pending_rows(*dead, "a.jpg"), ImageReader(str(tmp_path))
    table = Inspect(reader, Ledger(1.0), [("a.jpg", "", 0, -1)])(rows)
    assert table["reason"].to_pylist() == ["unread"] * JUDGED_AFTER + [None]
    assert "1 try failed" in table["message"][0].as_py()
    with pytest.raises(RunStopped, match="127.0.0.1:9/0.jpg"):
        Inspect(reader, Ledger(1.0), [(dead[0], "", 0, -1)])(rows)


class _Web(SimpleHTTPRequestHandler):
    """Files of a folder; whatever is called broken fails on the server's side."""

    def do_GET(self) -> None:
        if "broken" in self.path:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, [f"{index:04}.jpg" for index in range(700)], size=8)
    (folder / "0600.jpg").write_bytes((folder / "0007.jpg").read_bytes())
    (folder / "0300.jpg").unlink()
    return folder


@pytest.fixture(scope="module")
def web(images: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *of: _Web(*of, directory=str(images)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def on_ray() -> Iterator[None]:
    with ray_session("local"):
        yield


Pairs = list[tuple[str, str]]


def _look(path: str | Path, tmp_path: Path, root: str | None = None) -> tuple[Pairs, Pairs]:
    """Rejects with their reasons, and duplicates with their originals."""
    manifest = normalise(str(path), root, tmp_path / "manifest")
    inspection = Inspection(tmp_path)
    look(manifest, inspection, Phases(time.time()))
    found = inspection.settle(tmp_path / "rejects.parquet", tmp_path / "duplicates.parquet")
    assert found.count("images") == manifest.rows
    rejects = pq.read_table(tmp_path / "rejects.parquet").to_pylist()
    duplicates = pq.read_table(tmp_path / "duplicates.parquet").to_pylist()
    return (
        [(row["id"], row["reason"]) for row in rejects],
        [(row["id"], row["original"]) for row in duplicates],
    )


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_findings_are_in_the_order_of_any_manifest(
    on_ray: None, images: Path, tmp_path: Path, kind: str
) -> None:
    """Several blocks are in work at once and end in any order; rows come back as the manifest has them."""
    names = [f"{index:04}.jpg" for index in range(700)]
    names = [*names[350:], *names[:350], "../secret.jpg", "/etc/passwd"]
    records = [{"id": f"{index}", "image": name} for index, name in enumerate(names)]
    path = tmp_path / f"list.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    rejects, duplicates = _look(path, tmp_path, root=str(images))
    assert rejects == [
        (str(names.index("0300.jpg")), "missing"),
        ("700", "outside_root"),
        ("701", "outside_root"),
    ]
    assert duplicates == [(str(names.index("0007.jpg")), str(names.index("0600.jpg")))]


def test_tar_shards(on_ray: None, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, names in enumerate((["0600.jpg", "0001.jpg"], ["0007.jpg", "0002.jpg"])):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for name in names:
                tar.add(images / name, name)
    assert _look(folder, tmp_path) == ([], [("00001.tar/0007.jpg", "00000.tar/0600.jpg")])


def test_a_manifest_and_its_images_on_a_server(on_ray: None, web: str, images: Path, tmp_path: Path) -> None:
    records = [{"image": f"{web}/0001.jpg"}, {"image": "0002.jpg"}, {"image": "0300.jpg"}]
    (images / "list.json").write_text(json.dumps(records))
    assert _look(f"{web}/list.json", tmp_path, root=web) == ([("0300.jpg", "missing")], [])


def test_one_dead_url_is_unread_and_a_dead_storage_ends_the_check(
    on_ray: None, images: Path, web: str, tmp_path: Path
) -> None:
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps({"image": f"{web}/{name}"}) + "\n" for name in ("broken.jpg", "0001.jpg"))
    )
    assert _look(tmp_path / "list.jsonl", tmp_path / "one") == ([(f"{web}/broken.jpg", "unread")], [])
    (tmp_path / "list.jsonl").write_text(
        "".join(json.dumps({"image": f"{web}/broken{number}.jpg"}) + "\n" for number in range(20))
    )
    with pytest.raises(RunFailed, match="^'.*broken.*.jpg': 5 tries failed, the last with"):
        _look(tmp_path / "list.jsonl", tmp_path / "all")


def test_the_command_finds_every_bad_file_and_none_that_is_only_odd(tmp_path: Path) -> None:
    images, out = tmp_path / "ïmages", tmp_path / "chécked"
    (tmp_path / "secret").write_text("secret")
    write_bad(images / "coco", outside=tmp_path / "secret")
    odd = write_odd(images / "sam")
    (images / "sam" / "twin.jpg").write_bytes((images / "sam" / "grey.jpg").read_bytes())
    (images / "notes.txt").write_text("no image")
    done = sharegpt4v("check", "--images", images, "--out", out, "--strict")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr

    found = {row["id"]: row["reason"] for row in rows(out, "rejects").to_pylist()}
    assert found == {f"coco/{name}": reason for name, reason in BAD.items()}
    assert rows(out, "duplicates").select(["id", "original"]).to_pylist() == [
        {"id": "sam/twin.jpg", "original": "sam/grey.jpg"}
    ]
    assert list(found) == sorted(found)  # the order of a folder's manifest
    summary = json.loads((out / "summary.json").read_text())
    assert summary["by_source"]["sam"] == {
        "images": len(odd) + 1,
        "usable": len(odd) + 1,
        "missing": 0,
        "broken": 0,
        "oversized": 0,
        "unread": 0,
        "duplicate": 1,
    }
    assert summary["by_source"]["coco"]["usable"] == 0
    assert summary["by_reason"]["truncated"] == 3
    cells = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│")]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    assert table["all"] == [str(len(found) + len(odd) + 1), str(len(odd) + 1), "1", "14", "5", "0", "1"]
    assert "too_large, for example 'coco/area.png': 10001x10000: 100,010,000 pixels" in done.stdout
    verdict = f"{len(odd) + 1} of {len(odd) + 1 + len(BAD)} images can be captioned, 1 of them with the same"
    assert verdict in done.stdout
    assert f"{len(BAD)} cannot: 1 missing, 14 broken, 5 oversized, all listed in {out}/rejects" in done.stdout
    assert "passed over: 1 .txt" in done.stdout


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with its one step called here, for what it does around it."""

    def look_here(manifest: Manifest, inspection: Inspection, phases: Phases) -> None:
        step = Inspect(ImageReader(manifest.root), Ledger(1.0))
        for shard in shards(manifest.folder):
            inspection.add(step(pq.read_table(shard)))

    monkeypatch.setattr(pipelines.steps.check_job, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(pipelines.steps.check_job, "look", look_here)


def test_only_strict_makes_a_finding_a_failure(
    without_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    arguments = ["--images", str(tmp_path / "images")]
    assert check([*arguments, "--strict"]) == 0
    (tmp_path / "images" / "c.jpg").touch()
    assert check(arguments) == 0
    assert "'c.jpg': 'c.jpg' has 0 bytes" in capsys.readouterr().out
    assert check([*arguments, "--strict"]) == 1
    assert check([*arguments, "--strict", "--limit", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_without_out_the_table_says_how_to_keep_the_findings(
    without_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(8):
        (tmp_path / f"{index}.jpg").touch()
    write_images(tmp_path, ["good.jpg"])
    assert check(["--images", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "empty, for example '0.jpg': " in out and "'1.jpg'" not in out
    assert "1 of 9 images can be captioned; 8 cannot: 8 broken; --out keeps the list" in out


def test_duplicates_are_usable_as_they_are_for_caption(
    without_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, ["a.jpg"])
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    assert check(["--images", str(tmp_path), "--strict"]) == 0
    assert "2 of 2 images can be captioned, 1 of them with the same bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            StorageError("'a.jpg': 5 tries failed"),
            1,
            "sharegpt4v check: StorageError: 'a.jpg': 5 tries failed",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_check_that_ends_early_leaves_no_file(
    without_ray: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipelines.steps.check_job, "look", fail)
    write_images(tmp_path / "images", ["a.jpg"])
    arguments = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert check(arguments) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)
    assert list((tmp_path / "out").rglob("*")) == []


def test_an_out_that_holds_files_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "rejects").mkdir(parents=True)
    (tmp_path / "out" / "rejects" / "part-00000.parquet").touch()
    assert check(["--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    line = f"sharegpt4v check: --out: {tmp_path}/out holds other files (rejects/part-00000.parquet, ...)"
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.parametrize("out", ["s3://bucket/out", "/proc/nowhere/out"])
def test_an_out_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    assert check(["--images", str(tmp_path), "--out", out]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("sharegpt4v check: ")


def test_an_empty_folder_left_by_an_interrupted_check_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "rejects").mkdir(parents=True)
    assert check(["--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_what_a_killed_check_left_in_its_out_does_not_close_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kill may come between making and removing the file that shows whether the folder can be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".probe-77").touch()
    assert check(["--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
