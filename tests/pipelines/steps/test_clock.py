"""A command's time begins with its process, but not where another program calls it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.steps.clock import command_started
from tests.commands import environment

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")


@needs_proc
def test_the_time_of_a_command_begins_before_its_first_import(tmp_path: Path) -> None:
    (tmp_path / "sharegpt4v").write_text(
        "import time; time.sleep(0.5)\n"
        "from pipelines.steps.clock import command_started; print(command_started())"
    )
    before = time.time()
    command = [sys.executable, str(tmp_path / "sharegpt4v")]
    started = float(subprocess.check_output(command, env=environment()))
    # The kernel counts in hundredths of a second.
    assert before - 0.02 <= started <= time.time() - 0.5


def test_a_command_that_another_program_calls_begins_then() -> None:
    before = time.time()
    assert before <= command_started() <= time.time()
