"""kill -9 of training workers and of the driver: the losses equal an undisturbed run's, step by step."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from sharegpt4v.train.logs import read_metrics
from tests.cluster.processes import kill_one
from tests.commands import kill, sharegpt4v, start
from tests.train.data import write_conversations

pytestmark = pytest.mark.long

STEPS = 60


def arguments(folder: Path, run: Path) -> list[str]:
    return [
        *("train", "sft", "--data", str(folder / "talk.json"), "--root", str(folder / "images")),
        *("--out", str(run), "--max-steps", str(STEPS), "--batch-size", "64", "--save-steps", "3"),
        *("--workers", "2"),
    ]


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        lines = read_metrics(run)
        if lines and lines[-1]["step"] >= step:
            return
        assert time.monotonic() < deadline, f"step {lines[-1]['step'] if lines else 0} of {step}"
        time.sleep(0.05)


@pytest.mark.timeout(1500)
def test_five_workers_and_two_drivers_killed_cost_no_step(tmp_path: Path) -> None:
    write_conversations(tmp_path, 24, 6)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    done = sharegpt4v(*arguments(tmp_path, undisturbed), timeout=300)
    assert done.returncode == 0, done.stderr
    draw = random.Random(random.randrange(1_000_000))
    kills = sorted(draw.sample(range(4, STEPS - 4), 7))
    drivers = set(draw.sample(kills, 2))
    process = start(*arguments(tmp_path, run))
    for step in kills:
        wait_for_step(process, run, step)
        assert process.poll() is None, process.communicate()[1]
        if step in drivers:
            kill(process)
            time.sleep(5)  # Ray's own processes end with it
            process = start(*arguments(tmp_path, run))
        else:
            kill_one(process.pid, "RayTrainWorker")
    assert process.wait(timeout=300) == 0, process.communicate()[1]
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(undisturbed)]
