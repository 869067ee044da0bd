"""What goes wrong inside a run: poison images, a hung engine, Ctrl-C, a second run, a wrong root."""

import json
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.commands import outcomes_left, rows, sharegpt4v, start, wait_for_commits, write_images

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def test_poison_and_hanging_images_are_quarantined_and_all_others_captioned(
    caption_there: Command, tmp_path: Path
) -> None:
    names = ["000 a b.jpg", *(f"{index:03}.jpg" for index in range(1, 120))]
    write_images(tmp_path / "images", names)
    (tmp_path / "images" / "070.jpg").write_bytes(b"")
    (tmp_path / "images" / "055.jpg").write_bytes((tmp_path / "images" / "056.jpg").read_bytes()[:-50])
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for name in names[60 * number : 60 * (number + 1)]:
                tar.add(tmp_path / "images" / name, name)
    faults = {"kill": "007", "hang": "090", "error": "033", "empty": "034", "once": "035"}
    run = tmp_path / "run"
    done = caption_there(
        *("--images", shards, "--out", run, "--engine", "fake"),
        *("--fake.faults", json.dumps(faults), "--hang-seconds", "2", "--rows-per-commit", "20"),
        *("--fake.requests-at-once", "10"),
    )
    assert done.returncode == 0, done.stderr
    rejects = {row["id"]: row for row in rows(run, "rejects").to_pylist()}
    assert {key: row["reason"] for key, row in rejects.items()} == {
        "0.tar/007.jpg": "killed_worker",
        "0.tar/033.jpg": "engine_error",
        "0.tar/034.jpg": "empty_caption",
        "0.tar/055.jpg": "truncated",
        "1.tar/070.jpg": "empty",
        "1.tar/090.jpg": "killed_worker",
    }
    assert rejects["0.tar/034.jpg"]["attempt"] == 1  # refused twice, not once
    captions = {row["id"]: row for row in rows(run, "captions").to_pylist()}
    ids = {f"{index // 60}.tar/{name}" for index, name in enumerate(names)}
    assert captions.keys() == ids - rejects.keys()
    assert {key for key, row in captions.items() if row["attempt"] == 1} == {"0.tar/035.jpg"}


def test_ctrl_c_ends_in_ten_seconds_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{index:03}.jpg" for index in range(200)])
    run = tmp_path / "run"
    arguments = ["caption", "--images", str(tmp_path / "images"), "--out", str(run), "--engine", "fake"]
    arguments += ["--rows-per-commit", "4"]
    process = start(*arguments, "--fake.seconds-per-request", "0.2", "--fake.requests-at-once", "1")
    wait_for_commits(process, run, 2)

    second = sharegpt4v(*arguments)
    assert second.returncode == 2
    assert "in use by another run" in second.stderr and str(process.pid) in second.stderr

    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == 130
    assert "Traceback" not in said
    kept = outcomes_left(run)
    assert 8 <= kept < 200
    assert said.endswith(
        f"interrupted: {kept} of 200 images are saved in {run}; the same command goes on from there\n"
    )
    assert not (run / "_SUCCESS").exists()

    plan = sharegpt4v(*arguments, "--dry-run")
    assert f"resumes {run}: {kept} of 200 images are done" in plan.stdout


def test_a_wrong_root_stops_early_and_later_runs_take_up_repaired_and_new_images(
    caption_there: Command, tmp_path: Path
) -> None:
    names = [f"{index:04}.jpg" for index in range(1_104)]
    images, run, manifest = tmp_path / "images", tmp_path / "run", tmp_path / "manifest.jsonl"
    write_images(images, names, size=8)
    good = (images / "0005.jpg").read_bytes()
    (images / "0005.jpg").write_bytes(good[: len(good) // 2])
    arguments = ["--images", str(manifest), "--out", str(run), "--engine", "fake"]

    _write_manifest(manifest, names[:1_100])
    wrong = caption_there(*arguments, "--root", tmp_path)
    assert wrong.returncode == 1
    line = wrong.stderr.strip().splitlines()[-1]
    assert "--max-reject-rate is 5.0%" in line and "missing" in line and "--root" in line
    assert ".jpg' does not exist" in line
    assert not (run / "_SUCCESS").exists()

    right = caption_there(*arguments, "--root", images, "--retry-rejects", "missing")
    assert right.returncode == 0, right.stderr
    before = rows(run, "captions").to_pylist()
    assert len(before) == 1_099 and rows(run, "rejects")["reason"].to_pylist() == ["truncated"]
    assert (run / "_SUCCESS").exists()

    (images / "0005.jpg").write_bytes(good)
    _write_manifest(manifest, names)
    last = caption_there(*arguments, "--root", images, "--retry-rejects", "--actors", "1:2")
    assert last.returncode == 0, last.stderr
    assert "1,099 of 1,104 images are done" in last.stderr
    captions = rows(run, "captions").to_pylist()
    assert [row["id"] for row in captions] == names and len(rows(run, "rejects")) == 0
    assert [row for row in captions if row["id"] in {kept["id"] for kept in before}] == before
    assert json.loads((run / "summary.json").read_text())["sessions"] == 3


def _write_manifest(path: Path, names: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": name, "image": name}) + "\n" for name in names))
