"""The folder that `sharegpt4v convert` writes: whole or not at all, and nothing else is touched."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from pipelines.convert import main
from sharegpt4v.checkpoints.convert import Conversion, convert, plan_conversion
from sharegpt4v.checkpoints.output import unfinished
from sharegpt4v.errors import RunFailed, UserError
from tests.checkpoints.released import captioner_tensors, save_captioner


@pytest.fixture
def planned(tmp_path: Path) -> Conversion:
    return plan_conversion(save_captioner(tmp_path / "model", captioner_tensors("resampler")))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_of_that_name_which_no_conversion_left_is_not_cleared(
    planned: Conversion, tmp_path: Path
) -> None:
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="out.partial is in the way, and no conversion left it"):
        convert(planned, tmp_path / "out", 10**9)
    assert mine.read_text() == "mine"


def test_source_that_would_be_cleared_is_refused(planned: Conversion, tmp_path: Path) -> None:
    (tmp_path / "model").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / ".sharegpt4v-convert").touch()
    moved = plan_conversion(tmp_path / "out.partial")
    with pytest.raises(UserError, match="out.partial is cleared when this is"):
        convert(moved, tmp_path / "out", 10**9)
    assert plan_conversion(tmp_path / "out.partial").bytes == planned.bytes


def test_what_a_killed_conversion_left_is_cleared(planned: Conversion, tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from sharegpt4v.checkpoints.convert import convert, plan_conversion\n"
        "planned = plan_conversion(Path(sys.argv[1]))\n"
        "convert(planned, Path(sys.argv[2]), 100_000, lambda done: os.kill(os.getpid(), 9))"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "model", tmp_path / "out"], check=False)
    assert killed.returncode == -9
    assert len(files(tmp_path / "out.partial")) > 1
    convert(planned, tmp_path / "out", 10**9)
    assert "model.safetensors" in files(tmp_path / "out")
    assert [name for name in files(tmp_path / "out") if "-of-" in name or name.startswith(".")] == []
    assert not (tmp_path / "out.partial").exists()


def test_second_conversion_to_the_same_folder_is_refused(planned: Conversion, tmp_path: Path) -> None:
    refused = []

    def again(done: int) -> None:
        with pytest.raises(UserError, match="another convert is writing") as error:
            convert(planned, tmp_path / "out", 10**9)
        refused.append(str(error.value))

    convert(planned, tmp_path / "out", 10**9, again)
    assert len(refused) == 1
    assert "model.safetensors" in files(tmp_path / "out")


def test_folder_that_was_finished_while_its_lock_was_awaited_stays_as_it_is(
    planned: Conversion, tmp_path: Path
) -> None:
    lock = fcntl.flock

    def late(file: IO[str], kind: int) -> None:
        with mock.patch.object(fcntl, "flock", lock):
            shutil.rmtree(tmp_path / "out.partial")
            convert(planned, tmp_path / "out", 10**9)
        lock(file, kind)

    with (
        mock.patch.object(fcntl, "flock", late),
        pytest.raises(UserError, match="another convert is writing"),
    ):
        convert(planned, tmp_path / "out", 10**9)
    assert "model.safetensors" in files(tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_conversion_that_breaks_off_leaves_nothing(
    failure: BaseException, planned: Conversion, tmp_path: Path
) -> None:
    def break_off(done: int) -> None:
        raise failure

    wanted = RunFailed if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(wanted) as error:
        convert(planned, tmp_path / "out", 100_000, break_off)
    assert wanted is KeyboardInterrupt or "No space left on device" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_room_is_looked_at_before_anything_is_written(planned: Conversion, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=usage):
        with pytest.raises(UserError, match=r"0\.00 GB will be written and 0\.00 GB are free there"):
            convert(planned, tmp_path / "out", 10**9)
    assert not (tmp_path / "out.partial").exists()


def test_everybody_may_read_what_the_umask_lets_them(planned: Conversion, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert(planned, tmp_path / "out", 100_000)
    finally:
        os.umask(before)
    modes = {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == {"0o640"}


OUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda out: out.write_text("x"), "is a file; give a new folder"),
    "inside a file": (lambda out: out.parent.write_text("x"), "is no folder that can be written"),
    "holds something": (lambda out: (out / "mine").mkdir(parents=True), "is not empty; give a new folder"),
    "too long a name": (lambda out: None, "File name too long; give another folder"),
}


@pytest.mark.parametrize("kind", OUTS)
def test_out_that_cannot_be_is_one_line(
    kind: str, planned: Conversion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, expected = OUTS[kind]
    out = tmp_path / "new" / ("o" * 250 if "long" in kind else "out")
    if kind != "inside a file":
        out.parent.mkdir()
    prepare(out)
    capsys.readouterr()
    assert main(["--checkpoint", str(tmp_path / "model"), "--out", str(out)]) == 2
    assert expected in capsys.readouterr().err
    assert main(["--checkpoint", str(tmp_path / "model"), "--out", str(out), "--dry-run"]) == 2


def test_folder_that_another_process_sees_unfinished_is_not_taken_from_the_first(
    planned: Conversion, tmp_path: Path
) -> None:
    """The second one has seen the mark and opens it only when the folder has its name already."""
    seen = Path.exists

    def late(path: Path, **more: bool) -> bool:
        found = seen(path, **more)
        if found and path.name.startswith(".sharegpt4v"):
            with mock.patch.object(Path, "exists", seen):
                shutil.rmtree(tmp_path / "out.partial")
                convert(planned, tmp_path / "out", 10**9)
        return found

    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".sharegpt4v-convert").touch()
    with mock.patch.object(Path, "exists", late), pytest.raises(UserError):
        with unfinished(tmp_path / "out"):
            pass
    assert "model.safetensors" in files(tmp_path / "out")
    assert ".sharegpt4v-convert" not in files(tmp_path / "out")


@pytest.mark.parametrize("failure", [OSError(16, "Device or resource busy"), KeyboardInterrupt()])
def test_renaming_that_fails_leaves_nothing_in_the_way(
    failure: BaseException, planned: Conversion, tmp_path: Path
) -> None:
    with mock.patch.object(Path, "rename", side_effect=failure):
        with pytest.raises((RunFailed, KeyboardInterrupt)):
            convert(planned, tmp_path / "out", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    convert(planned, tmp_path / "out", 10**9)


def test_folder_that_was_there_keeps_its_mode(planned: Conversion, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o2770)
    convert(planned, tmp_path / "out", 10**9)
    assert oct((tmp_path / "out").stat().st_mode & 0o7777) == "0o2770"


def test_leftover_of_a_killed_conversion_counts_as_room(planned: Conversion, tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / ".sharegpt4v-convert").touch()
    (left / "model.safetensors").write_bytes(bytes(planned.bytes))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with mock.patch("shutil.disk_usage", return_value=usage):
        convert(planned, tmp_path / "out", 10**9)


def test_link_to_an_empty_folder_is_filled(planned: Conversion, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    convert(planned, tmp_path / "out", 10**9)
    assert (tmp_path / "out").is_symlink()
    assert "model.safetensors" in files(tmp_path / "disk")


def test_tensors_that_share_memory_are_written_each_by_itself(tmp_path: Path) -> None:
    tensors = captioner_tensors("resampler")
    tensors["internlm_model.lm_head.weight"] = tensors["internlm_model.model.embed_tokens.weight"]
    model = save_captioner(tmp_path / "model", tensors)
    for shard in model.glob("*.bin"):
        shard.unlink()
    (model / "pytorch_model.bin.index.json").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    convert(plan_conversion(model), tmp_path / "out", 10**9)
    got = load_file(tmp_path / "out" / "model.safetensors")
    table = got["language_model.model.embed_tokens.weight"]
    assert torch.equal(got["language_model.lm_head.weight"], table)
