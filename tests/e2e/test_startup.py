"""The benchmark of start-up follows the phases that the command says."""

import re
import subprocess
import sys

from tests.commands import REPOSITORY, environment


def test_every_phase_of_a_run_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", "--rounds", "1", "--images", "8", "--engine", "fake"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    phases = re.findall(r"^([a-zA-Z, ]+?) +(-?[\d.]+) s, ends at +([\d.]+) s$", done.stdout, re.MULTILINE)
    assert len(phases) == 7
    ends = [float(end) for _, _, end in phases]
    assert ends == sorted(ends) and ends[0] > 0
    assert re.search(r"^CPU: [\d.]+ s in \d+ processes$", done.stdout, re.MULTILINE)
