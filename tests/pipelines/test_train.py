"""`sharegpt4v train` without a worker: what is refused before one starts, and the dry run."""

from pathlib import Path

import pytest

from pipelines.train import main
from sharegpt4v.checkpoints.card import TOY_CAPTIONER
from tests.train.data import write_conversations


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("data"), 6, 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--init", str(TOY_CAPTIONER)], "--init: .* holds a share_captioner model and the stage sft trains"),
        (["--init", "nowhere"], "--init: nowhere: cannot read nowhere/config.json"),
        (["--preset", "7b"], "--init: this preset ships none"),
        (["--zero", "2"], "--optimizer: muon is refused: ZeRO divides the matrices"),
        (["--offload"], "--offload: optimizer states are moved by ZeRO: set --zero to 2 or 3"),
        (["--tokens-per-micro-step", "100"], "--tokens-per-micro-step: 100 is refused: a row must hold"),
        (["--workers", "40"], "--batch-size: 32 is refused: 40 workers need a sample each"),
        (
            ["--max-length", "5000", "--tokens-per-micro-step", "9000"],
            "--max-length: 5000 is refused: toy-chat",
        ),
        (["--data", "nowhere.json"], "--data: nowhere.json does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_workers_start(
    arguments: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["sft", "--data", str(data), "--out", str(tmp_path / "run"), *arguments]) == 2
    line = capsys.readouterr().err
    assert re.match(f"sharegpt4v train sft: {said}", line), line
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_block_that_the_tower_lacks_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--out", str(tmp_path / "run"), "--first-block", "9"]
    assert main(["pretrain", *arguments]) == 2
    assert (
        "--first-block: 9 is refused: the vision tower of toy-chat has blocks 0 to 3"
        in capsys.readouterr().err
    )


def test_a_dry_run_shows_recipe_and_plan_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["align", "--data", f"{data}:0.5", "--out", str(out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "learning_rate: 0.003" in said and "stage: align, trains projector" in said
    assert f"data: {data}, weight 0.5" in said and not out.exists()
