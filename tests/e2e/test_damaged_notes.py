"""Small JSON files of a run folder, emptied as a crash or a full disk leaves them: the run is finished."""

from pathlib import Path

import pytest

from tests.commands import rows, sharegpt4v, write_images


def test_a_damaged_note_costs_no_run(tmp_path: Path) -> None:
    write_images(tmp_path / "images", [f"{number}.png" for number in range(6)])
    command = ("caption", "--images", tmp_path / "images", "--out", tmp_path / "run", "--engine", "fake")
    assert sharegpt4v(*command).returncode == 0
    run = tmp_path / "run"
    before = rows(run, "captions")
    for emptied, success in (
        ("work/sessions/0000.json", False),
        ("work/commits.json", False),
        ("summary.json", True),
    ):
        (run / emptied).write_text("")
        if not success:
            (run / "_SUCCESS").unlink()
        done = sharegpt4v(*command)
        assert done.returncode == 0, (emptied, done.stderr)
        assert (run / "_SUCCESS").exists() and rows(run, "captions").equals(before)
    exported = sharegpt4v("export", "--run", run, "--format", "llava-json", "--out", tmp_path / "out.json")
    assert exported.returncode == 0, exported.stderr


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"stage": "sft"}'])
def test_a_summary_of_no_captions_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    write_images(tmp_path / "images", ["0.png"])
    run, out = tmp_path / "run", tmp_path / "out.json"
    command = ("caption", "--images", tmp_path / "images", "--out", run, "--engine", "fake")
    assert sharegpt4v(*command).returncode == 0
    (run / "summary.json").write_text(text)
    done = sharegpt4v("export", "--run", run, "--format", "llava-json", "--out", out)
    assert done.returncode == 2 and not out.exists()
    warned, refused = done.stderr.splitlines()
    assert warned.startswith("warning: Written by the fake engine") and "summary.json" in refused
