"""The memory bound of `convert`, on checkpoints of 400 MB in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["ShareGPT4V .bin", "Share-Captioner LoRA .bin"])
def test_no_more_than_the_largest_tensor_and_one_shard(kind: str) -> None:
    # The two tables are 131 MB each; two shards at once, or a whole input file, would break the bound.
    command = [sys.executable, "-m", "benchmarks.convert_memory", "--json", "--kinds", kind]
    done = subprocess.run(
        [*command, "--gb", "0.4", "--shard-gb", "0.1"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout, done.stderr
    measured = json.loads(done.stdout)
    assert measured["size"] > 390e6
    assert measured["bound"] == measured["largest"] + 100_000_000 < 250e6
    assert measured["peak"] <= measured["bound"]
