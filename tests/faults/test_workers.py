"""What goes wrong inside a run: poison images, a hung engine, Ctrl-C, a second run, a wrong root."""

import json
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq

from tests.commands import outcomes_left, rows, sharegpt4v, start, wait_for_commits, write_images


def test_poison_and_hanging_images_are_quarantined_and_all_others_captioned(tmp_path: Path) -> None:
    names = [f"{index:03}.jpg" for index in range(120)]
    write_images(tmp_path / "images", names)
    faults = {"kill": "007", "hang": "090", "error": "033", "empty": "034", "once": "035"}
    run = tmp_path / "run"
    done = sharegpt4v(
        *("caption", "--images", tmp_path / "images", "--out", run, "--engine", "fake"),
        *("--fake.faults", json.dumps(faults), "--hang-seconds", "2", "--rows-per-commit", "20"),
        *("--fake.capacity", "10"),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    rejects = {row["id"]: row for row in rows(run, "rejects").to_pylist()}
    assert {key: row["reason"] for key, row in rejects.items()} == {
        "007.jpg": "killed_worker",
        "090.jpg": "killed_worker",
        "033.jpg": "engine_error",
        "034.jpg": "empty_caption",
    }
    assert rejects["034.jpg"]["attempt"] == 1  # refused twice, not once
    captions = {row["id"]: row for row in rows(run, "captions").to_pylist()}
    assert sorted(captions) == sorted(set(names) - set(rejects))
    assert {key for key, row in captions.items() if row["attempt"] == 1} == {"035.jpg"}


def test_ctrl_c_ends_in_ten_seconds_and_a_second_run_is_refused_meanwhile(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{index:03}.jpg" for index in range(200)])
    run = tmp_path / "run"
    arguments = ["caption", "--images", str(tmp_path / "images"), "--out", str(run), "--engine", "fake"]
    arguments += ["--rows-per-commit", "4"]
    process = start(*arguments, "--fake.seconds-per-request", "0.2")
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
    assert not (run / "_SUCCESS").exists()

    last = sharegpt4v(*arguments)
    assert last.returncode == 0, last.stderr
    assert f"{kept} of 200 images are done" in last.stderr
    assert len(rows(run, "captions")) == 200


def test_a_wrong_root_stops_early_and_rejects_are_taken_up_once_it_is_right(tmp_path: Path) -> None:
    names = [f"{index:04}.jpg" for index in range(1_100)]
    write_images(tmp_path / "images", names, size=8)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"id": name, "image": name}) + "\n" for name in names))
    run = tmp_path / "run"
    arguments = ["caption", "--images", str(manifest), "--out", str(run), "--engine", "fake"]

    wrong = sharegpt4v(*arguments, "--root", tmp_path)
    assert wrong.returncode == 1
    line = wrong.stderr.strip().splitlines()[-1]
    assert "--max-reject-rate is 5.0%" in line and "missing" in line and "--root" in line
    assert ".jpg' does not exist" in line
    assert not (run / "_SUCCESS").exists()

    right = sharegpt4v(*arguments, "--root", tmp_path / "images", "--retry-rejects", "missing")
    assert right.returncode == 0, right.stderr
    assert len(rows(run, "captions")) == 1_100 and len(rows(run, "rejects")) == 0
    assert (run / "_SUCCESS").exists()


def test_repaired_images_and_new_ids_join_a_finished_run(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    write_images(images, [f"{index:02}.jpg" for index in range(12)])
    good = (images / "05.jpg").read_bytes()
    (images / "05.jpg").write_bytes(good[: len(good) // 2])
    arguments = ["caption", "--images", str(images), "--out", str(run), "--engine", "fake"]
    first = sharegpt4v(*arguments, "--limit", "8")
    assert first.returncode == 0, first.stderr
    assert (len(rows(run, "captions")), len(rows(run, "rejects"))) == (7, 1)
    before = rows(run, "captions").to_pylist()

    (images / "05.jpg").write_bytes(good)
    second = sharegpt4v(*arguments, "--retry-rejects", "--actors", "1:2")
    assert second.returncode == 0, second.stderr
    assert "7 of 12 images are done" in second.stderr
    captions = rows(run, "captions").to_pylist()
    assert [row["id"] for row in captions] == [f"{index:02}.jpg" for index in range(12)]
    assert [row for row in captions if row["id"] in {kept["id"] for kept in before}] == before
    assert len(rows(run, "rejects")) == 0
    assert json.loads((run / "summary.json").read_text())["sessions"] == 2


def test_a_torn_file_is_passed_over_and_its_images_are_done_again(tmp_path: Path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    write_images(images, [f"{index:02}.jpg" for index in range(40)])
    arguments = ["caption", "--images", str(images), "--out", str(run), "--engine", "fake"]
    arguments += ["--rows-per-commit", "4"]
    process = start(*arguments, "--fake.seconds-per-request", "0.2")
    wait_for_commits(process, run, 2)
    process.kill()
    process.communicate()
    torn = sorted((run / "work" / "outcomes").glob("*/*.parquet"))[0]
    torn.write_bytes(torn.read_bytes()[:-20])
    left = outcomes_left(run)

    last = sharegpt4v(*arguments)
    assert last.returncode == 0, last.stderr
    assert f"{left} of 40 images are done" in last.stderr
    assert len(rows(run, "captions")) == 40
    parts = [pq.read_table(part)["id"].to_pylist() for part in sorted((run / "captions").glob("*.parquet"))]
    assert sum(parts, []) == [f"{index:02}.jpg" for index in range(40)]
