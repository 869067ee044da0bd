"""Workers that do not come to a meeting: one that hangs is named, one that died is no reason to give up."""

import os
import tempfile
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from sharegpt4v.errors import RunFailed
from sharegpt4v.train.backend import Workers

PATIENCE = 6.0


def _meet(rank: int, store: str, said: str, dies: bool) -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    workers = Workers(PATIENCE)
    assert workers.total([1, rank]) == [2.0, 1.0]
    assert workers.gather([f"text {rank}"]) == ["text 0", "text 1"]
    workers.meet("the first step")
    if rank == 1:
        if dies:
            os._exit(0)
        time.sleep(2 * PATIENCE)
        os._exit(0)
    try:
        workers.meet("step 12")
    except (RunFailed, RuntimeError) as error:
        Path(said).write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


@pytest.mark.parametrize("dies", [False, True])
def test_a_worker_that_hangs_is_named_and_one_that_died_is_not_taken_for_it(
    dies: bool, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"file://{folder}/meeting", str(tmp_path / "said"), dies)
        mp.start_processes(_meet, arguments, nprocs=2, start_method="spawn")  # type: ignore
    said = (tmp_path / "said").read_text()
    if dies:
        assert said.startswith("RuntimeError: ")
    else:
        assert said.startswith("RunFailed: workers did not all come to step 12 within 6 s")
        assert "Ranks 1 failed" in said
