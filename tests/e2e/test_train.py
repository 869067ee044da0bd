"""`sharegpt4v train` as a user runs it: on Ray's workers, resumed by the same command."""

import json
import signal
import time
from pathlib import Path

import pytest

from sharegpt4v.train.logs import read_metrics
from tests.commands import sharegpt4v, start
from tests.train.data import write_conversations

pytestmark = pytest.mark.long


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    """Not by Muon, whose steps in bfloat16 enlarge the rounding of a sum in another order to 1e-4."""
    return [
        *("train", "sft", "--data", str(folder / "talk.json"), "--root", str(folder / "images")),
        *("--out", str(run), "--max-steps", "6", "--batch-size", "6", "--save-steps", "2"),
        *("--optimizer", "adamw", "--learning-rate", "1e-3", *more),
    ]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.timeout(400)
def test_two_workers_train_as_one_does_and_the_same_command_resumes(tmp_path: Path) -> None:
    write_conversations(tmp_path, 12, 3)
    one = sharegpt4v(*arguments(tmp_path, tmp_path / "one"), timeout=200)
    assert one.returncode == 0, one.stderr
    assert "15 records, 6 steps of 6" in one.stderr and "step 6 of 6, loss" in one.stderr
    assert "model: " in one.stdout
    two = sharegpt4v(
        *arguments(tmp_path, tmp_path / "two", "--workers", "2", "--stop-after", "4"), timeout=200
    )
    assert two.returncode == 0, two.stderr
    assert not (tmp_path / "two" / "_SUCCESS").exists() and not (tmp_path / "two" / "model").exists()
    rest = sharegpt4v(*arguments(tmp_path, tmp_path / "two", "--workers", "2"), timeout=200)
    assert rest.returncode == 0, rest.stderr
    assert "going on from step 4" in rest.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["step"] == 6
    again = sharegpt4v(*arguments(tmp_path, tmp_path / "one"))
    assert again.returncode == 0 and "nothing to do" in again.stderr
    other = sharegpt4v(*arguments(tmp_path, tmp_path / "one", "--learning-rate", "0.1"))
    assert other.returncode == 2 and "--learning-rate: changed since this run began" in other.stderr


@pytest.mark.timeout(200)
def test_an_error_of_a_worker_is_the_commands_one_line(tmp_path: Path) -> None:
    write_conversations(tmp_path, 12, 3)
    for path in (tmp_path / "images").rglob("*.*g"):
        path.unlink()
    done = sharegpt4v(*arguments(tmp_path, tmp_path / "run"), timeout=180)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sharegpt4v train sft: ") and "more than --max-reject-rate (0.05)" in last
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.timeout(240)
def test_ctrl_c_says_what_is_saved(tmp_path: Path) -> None:
    write_conversations(tmp_path, 12, 3)
    run = tmp_path / "run"
    words = arguments(tmp_path, run)
    words[words.index("--max-steps") + 1] = "5000"
    process = start(*words)
    deadline = time.monotonic() + 150
    while len(read_metrics(run)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "is saved in" in said.splitlines()[-1] and "goes on from there" in said
